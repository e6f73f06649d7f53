// What a block of threads shares on CUDA: its pixels, their scores in shared memory, its sums.
#pragma once

#include <type_traits>

#include "launch.h"
#include "ocr/math.h"
#include "packed.h"

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

// Whether the numbers of an image lie as one run, pixel by pixel.
inline bool is_run(const Params& p, const Strides& strides) {
    return strides.channel == 1 && strides.x == p.classes && strides.y == p.width * p.classes;
}

// The scores of a pixel for each thread, from a tensor where a pixel's classes lie side by side: neighbouring
// threads copy neighbouring classes, 16 bytes each where the pixels are one run. The pitch is odd: threads
// then find their pixels in different banks.
template <class W>
class Stage {
  public:
    static size_t shared_bytes(int64_t classes, int threads) {
        return static_cast<size_t>(threads) *
               (sizeof(int64_t) + sizeof(W) * static_cast<size_t>(classes | 1));
    }
    __device__ Stage(unsigned char* shared, const Divisor& classes)
        : offsets_(reinterpret_cast<int64_t*>(shared)),
          numbers_(reinterpret_cast<W*>(offsets_ + blockDim.x)),
          classes_(classes),
          pitch_(classes.divisor() | 1) {}

    __device__ W* own() const { return numbers_ + threadIdx.x * pitch_; }
    __device__ void* end() const { return numbers_ + blockDim.x * pitch_; }

    // All threads call these; offset: of the thread's pixel; count: of pixels, perhaps more than threads;
    // run: whether is_run.
    template <class T>
    __device__ void load(const T* tensor, int64_t offset, uint32_t count, bool run) const {
        copy<true>(tensor, offset, count, run);
    }
    template <class T>
    __device__ void store(T* tensor, int64_t offset, uint32_t count, bool run) const {
        copy<false>(tensor, offset, count, run);
    }

  private:
    template <bool kLoad, class T>
    __device__ void copy(T* tensor, int64_t offset, uint32_t count, bool run) const {
        const uint32_t numbers = min(count, blockDim.x) * classes_.divisor();
        __syncthreads();
        if (run) {
            constexpr uint32_t kPack = 16 / sizeof(T);
            T* const first = tensor + offset - threadIdx.x * classes_.divisor();
            const bool aligned = reinterpret_cast<uintptr_t>(first) % 16 == 0;
            const uint32_t packed = aligned ? numbers / kPack * kPack : 0;
            if constexpr (kLoad) {
                read<kPack>(first, 0, packed);
                read<1>(first, packed, numbers);
            } else {
                write<kPack>(first, 0, packed);
                write<1>(first, packed, numbers);
            }
        } else {
            offsets_[threadIdx.x] = offset;
            __syncthreads();
            for (uint32_t i = threadIdx.x; i < numbers; i += blockDim.x) {
                const uint32_t pixel = classes_.quotient(i), c = classes_.remainder(i, pixel);
                T& there = tensor[offsets_[pixel] + c];
                W& here = numbers_[pixel * pitch_ + c];
                if constexpr (kLoad) {
                    here = static_cast<W>(there);
                } else {
                    there = static_cast<T>(here);
                }
            }
        }
        __syncthreads();
    }

    // Numbers begin to end of a run, kCount at once, with several reads under way.
    template <int kCount, class T>
    __device__ void read(const T* run, uint32_t begin, uint32_t end) const {
        constexpr int kAhead = 4;
        const uint32_t step = blockDim.x * kCount;
        for (uint32_t first = begin + threadIdx.x * kCount; first < end; first += kAhead * step) {
            Packed<T, kCount> packed[kAhead];
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
                packed[k] = load_if<T, kCount>(first + k * step < end, run + first + k * step);
            }
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
                W numbers[kCount];
                widen(packed[k], numbers);
                if (first + k * step < end) put(numbers, first + k * step);
            }
        }
    }
    template <int kCount, class T>
    __device__ void write(T* run, uint32_t begin, uint32_t end) const {
        for (uint32_t i = begin + threadIdx.x * kCount; i < end; i += blockDim.x * kCount) {
            W numbers[kCount];
            take(numbers, i);
            wsss::store(run + i, narrow<T, kCount>(numbers));
        }
    }

    // Numbers of a run from i on, here. They are side by side here too if the classes are odd.
    __device__ bool is_dense() const { return pitch_ == classes_.divisor(); }
    __device__ W& number(uint32_t i) const { return numbers_[is_dense() ? i : i + classes_.quotient(i)]; }
    template <int kCount>
    static constexpr int kPart = kCount > 1 ? 16 / sizeof(W) : 1;

    template <int kCount>
    __device__ void put(const W (&numbers)[kCount], uint32_t i) const {
        constexpr int kSize = kPart<kCount>;
#pragma unroll
        for (int k = 0; k < kCount; k += kSize) {
            W part[kSize];
#pragma unroll
            for (int j = 0; j < kSize; ++j) part[j] = numbers[k + j];
            if (is_dense()) {
                wsss::store(numbers_ + i + k, narrow<W, kSize>(part));
            } else {
#pragma unroll
                for (int j = 0; j < kSize; ++j) number(i + k + j) = part[j];
            }
        }
    }
    template <int kCount>
    __device__ void take(W (&numbers)[kCount], uint32_t i) const {
        constexpr int kSize = kPart<kCount>;
#pragma unroll
        for (int k = 0; k < kCount; k += kSize) {
            W part[kSize];
            if (is_dense()) {
                widen(wsss::load<W, kSize>(numbers_ + i + k), part);
            } else {
#pragma unroll
                for (int j = 0; j < kSize; ++j) part[j] = number(i + k + j);
            }
#pragma unroll
            for (int j = 0; j < kSize; ++j) numbers[k + j] = part[j];
        }
    }

    int64_t* offsets_;
    W* numbers_;
    Divisor classes_;
    uint32_t pitch_;
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
