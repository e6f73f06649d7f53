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

    // All threads call these; offset: of the thread's pixel; count: of pixels, perhaps more than threads.
    template <class T>
    __device__ void load(const T* tensor, int64_t offset, uint32_t count, bool run) const {
        copy<Load>(tensor, offset, count, run);
    }
    template <class T>
    __device__ void store(T* tensor, int64_t offset, uint32_t count, bool run) const {
        copy<Store>(tensor, offset, count, run);
    }

  private:
    // Of `numbers` in a row of the tensor, kCount side by side here too: at here(i) number i. Reads are under
    // way kAhead at once.
    struct Load {
        static constexpr int kAhead = 4;
        template <int kCount, class T, class Here>
        __device__ static void move(const T* tensor, uint32_t numbers, const Here& here) {
            const uint32_t step = blockDim.x * kCount;
            for (uint32_t first = threadIdx.x * kCount; first < numbers; first += kAhead * step) {
                Packed<T, kCount> packed[kAhead];
#pragma unroll
                for (int k = 0; k < kAhead; ++k) {
                    const uint32_t i = first + k * step;
                    packed[k] = load_if<T, kCount>(i < numbers, tensor + i);
                }
#pragma unroll
                for (int k = 0; k < kAhead; ++k) {
                    const uint32_t i = first + k * step;
                    if (i < numbers) put(packed[k], here(i));
                }
            }
        }
    };
    struct Store {
        template <int kCount, class T, class Here>
        __device__ static void move(T* tensor, uint32_t numbers, const Here& here) {
            for (uint32_t i = threadIdx.x * kCount; i < numbers; i += blockDim.x * kCount) {
                wsss::store(tensor + i, take<T, kCount>(here(i)));
            }
        }
    };

    // As wide numbers to shared memory, and from there.
    template <class T, int kCount>
    __device__ static void put(const Packed<T, kCount>& packed, W* here) {
        constexpr int kPart = kCount > 1 ? 16 / sizeof(W) : 1;
        W numbers[kCount / kPart][kPart];
        widen(packed, reinterpret_cast<W(&)[kCount]>(numbers));
#pragma unroll
        for (int i = 0; i < kCount / kPart; ++i) wsss::store(here + i * kPart, narrow<W, kPart>(numbers[i]));
    }
    template <class T, int kCount>
    __device__ static Packed<T, kCount> take(const W* here) {
        constexpr int kPart = kCount > 1 ? 16 / sizeof(W) : 1;
        W numbers[kCount / kPart][kPart];
#pragma unroll
        for (int i = 0; i < kCount / kPart; ++i) widen(wsss::load<W, kPart>(here + i * kPart), numbers[i]);
        return narrow<T, kCount>(reinterpret_cast<const W(&)[kCount]>(numbers));
    }

    template <class Move, class T>
    __device__ void copy(T* tensor, int64_t offset, uint32_t count, bool run) const {
        const uint32_t numbers = min(count, blockDim.x) * classes_.divisor();
        const uint32_t padding = pitch_ - classes_.divisor();
        __syncthreads();
        if (!run) {
            offsets_[threadIdx.x] = offset;
            __syncthreads();
            for (uint32_t i = threadIdx.x; i < numbers; i += blockDim.x) {
                const uint32_t pixel = classes_.quotient(i), c = classes_.remainder(i, pixel);
                one(Move(), tensor + offsets_[pixel] + c, numbers_ + pixel * pitch_ + c);
            }
        } else {
            constexpr uint32_t kPack = 16 / sizeof(T);
            T* const first = tensor + offset - threadIdx.x * classes_.divisor();
            const bool aligned = padding == 0 && reinterpret_cast<uintptr_t>(first) % 16 == 0;
            const uint32_t packed = aligned ? numbers / kPack * kPack : 0;
            Move::template move<kPack>(first, packed, [&](uint32_t i) { return numbers_ + i; });
            Move::template move<1>(first + packed, numbers - packed, [&](uint32_t i) {
                return numbers_ + packed + i + (padding > 0 ? classes_.quotient(i) : 0);
            });
        }
        __syncthreads();
    }
    template <class T>
    __device__ static void one(Load, const T* tensor, W* here) {
        *here = static_cast<W>(*tensor);
    }
    template <class T>
    __device__ static void one(Store, T* tensor, const W* here) {
        *tensor = static_cast<T>(*here);
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
