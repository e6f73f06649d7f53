// What a block of threads shares on CUDA: its pixels, their scores in shared memory, its sums.
#pragma once

#include "launch.h"
#include "ocr/math.h"

namespace wsss::ocr {
namespace {

constexpr int kThreads = 256;  // at most; always whole warps

template <class W>
struct Axes {
    Axis<W> y, x;
    explicit Axes(const Params& p)
        : y(p.height, p.out_height, p.align_corners), x(p.width, p.out_width, p.align_corners) {}
};

struct Place {
    int64_t y, x;
};

__device__ inline int64_t offset_of(const Strides& strides, const Place& place) {
    return place.y * strides.y + place.x * strides.x;
}

// Part blockIdx.x of the loss: kBlockPixels pixels of an image, or what is left of it.
struct Part {
    Divisor parts, width, classes;
    uint32_t pixels;  // of an image

    explicit Part(const Params& p)
        : parts(static_cast<uint32_t>(blocks_per_image(p))),
          width(static_cast<uint32_t>(p.out_width)),
          classes(static_cast<uint32_t>(p.classes)),
          pixels(static_cast<uint32_t>(p.out_height * p.out_width)) {}

    __device__ uint32_t image() const { return parts.quotient(blockIdx.x); }
    __device__ uint32_t first() const {
        return parts.remainder(blockIdx.x, image()) * static_cast<uint32_t>(kBlockPixels);
    }
    __device__ uint32_t end() const { return min(first() + static_cast<uint32_t>(kBlockPixels), pixels); }
    __device__ Place place(uint32_t pixel) const {
        const uint32_t y = width.quotient(pixel);
        return {y, width.remainder(pixel, y)};
    }
};

// The scores of a pixel for each thread, from a tensor where a pixel's classes lie side by side: neighbouring
// threads copy neighbouring classes. The pitch is odd: threads then find their pixels in different banks.
template <class W>
class Stage {
  public:
    static size_t shared_bytes(int64_t classes, int threads) {
        return static_cast<size_t>(threads) *
               (sizeof(int64_t) + sizeof(W) * static_cast<size_t>(classes | 1));
    }
    __device__ Stage(unsigned char* shared, int classes)
        : offsets_(reinterpret_cast<int64_t*>(shared)),
          numbers_(reinterpret_cast<W*>(offsets_ + blockDim.x)),
          classes_(static_cast<uint32_t>(classes)),
          pitch_(classes_ | 1) {}

    __device__ W* own() const { return numbers_ + threadIdx.x * pitch_; }
    __device__ void* end() const { return numbers_ + blockDim.x * pitch_; }

    // All threads call these; offset: of the thread's pixel; count: of pixels, perhaps more than threads.
    template <class T>
    __device__ void load(const T* tensor, int64_t offset, uint32_t count, const Divisor& classes) const {
        share_offsets(offset);
        const uint32_t numbers = min(count, blockDim.x) * classes_;
        for (uint32_t i = threadIdx.x; i < numbers; i += blockDim.x) {
            const uint32_t pixel = classes.quotient(i), c = classes.remainder(i, pixel);
            numbers_[pixel * pitch_ + c] = static_cast<W>(tensor[offsets_[pixel] + c]);
        }
        __syncthreads();
    }
    template <class T>
    __device__ void store(T* tensor, int64_t offset, uint32_t count, const Divisor& classes) const {
        share_offsets(offset);
        const uint32_t numbers = min(count, blockDim.x) * classes_;
        for (uint32_t i = threadIdx.x; i < numbers; i += blockDim.x) {
            const uint32_t pixel = classes.quotient(i), c = classes.remainder(i, pixel);
            tensor[offsets_[pixel] + c] = static_cast<T>(numbers_[pixel * pitch_ + c]);
        }
        __syncthreads();
    }

  private:
    __device__ void share_offsets(int64_t offset) const {
        __syncthreads();
        offsets_[threadIdx.x] = offset;
        __syncthreads();
    }
    int64_t* offsets_;
    W* numbers_;
    uint32_t classes_, pitch_;
};

struct BlockSum {
    double loss;
    int64_t count;
};

// Of all threads, in a fixed order; for thread 0.
__device__ inline BlockSum add_block(double loss, int64_t count) {
    __shared__ double losses[kThreads / 32];
    __shared__ int64_t counts[kThreads / 32];
    for (int step = 16; step > 0; step /= 2) {
        loss += __shfl_down_sync(0xffffffffu, loss, step);
        count += __shfl_down_sync(0xffffffffu, count, step);
    }
    if (threadIdx.x % 32 == 0) {
        losses[threadIdx.x / 32] = loss;
        counts[threadIdx.x / 32] = count;
    }
    __syncthreads();
    BlockSum sum{0, 0};
    for (unsigned warp = 0; threadIdx.x == 0 && warp < blockDim.x / 32; ++warp) {
        sum.loss += losses[warp];
        sum.count += counts[warp];
    }
    return sum;
}

}  // namespace
}  // namespace wsss::ocr
