// Which classes of an image have pixels, on CUDA, and what the kernels of both directions share beside Group.
#pragma once

#include "prototype/cuda_group.h"

namespace wsss::prototype {
namespace {

constexpr int kFew = 4;  // classes whose sums a thread keeps in registers

template <int kNumber>
struct Few {
    static constexpr int kCount = kNumber;
};

// run(Few<>()) of at least min(count, kMost) classes, so that loops over them are unrolled and what they hold
// lies in registers: an instruction that is skipped takes as long as one that is not.
template <int kMost = kFew, class Run>
__device__ __forceinline__ void with_few(int count, const Run& run) {
    if (count <= 2) {
        run(Few<2>());
    } else if (count == 3 || kMost == 3) {
        run(Few<3>());
    } else {
        run(Few<kMost>());
    }
}

class Present {
  public:
    static size_t shared_bytes(const Params& p) { return sizeof(int16_t) * static_cast<size_t>(p.classes); }
    static size_t counting_bytes(const Params& p) {
        return (sizeof(int32_t) + sizeof(int16_t)) * static_cast<size_t>(p.classes);
    }

    // By all threads of a block of whole warps; `shared` has room for all classes.
    __device__ Present(const int32_t* counts, int64_t classes, int16_t* shared) : classes_(shared) {
        __shared__ int total;
        if (threadIdx.x < kWarp) {
            int found = 0;
            for (int first = 0; first < classes; first += kWarp) {
                const int c = first + static_cast<int>(threadIdx.x);
                const bool here = c < classes && counts[c] > 0;
                const unsigned all = __ballot_sync(0xffffffffu, here);
                if (here) shared[found + __popc(all & ((1u << threadIdx.x) - 1))] = static_cast<int16_t>(c);
                found += __popc(all);
            }
            if (threadIdx.x == 0) total = found;
        }
        __syncthreads();
        count_ = total;
    }
    __device__ int count() const { return count_; }
    // The last one where k is larger: what is found for it is of no use, and does no harm.
    __device__ int operator[](int k) const { return classes_[min(k, count_ - 1)]; }

  private:
    const int16_t* classes_;
    int count_;
};

// Pixels of each class, to `shared`, which has room for all of them.
__device__ inline void count_pixels(const int16_t* seeds, int64_t pixels, int64_t classes, int32_t* shared) {
    for (int64_t c = threadIdx.x; c < classes; c += kThreads) shared[c] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < pixels; i += kThreads) {
        const int seed = seeds[i];
        if (seed >= 0) atomicAdd(shared + seed, 1);
    }
    __syncthreads();
}

template <class W>
__device__ W* row(void* data, const Params& p, int64_t image, int64_t c, int64_t length) {
    return static_cast<W*>(data) + (image * p.classes + c) * length;
}
template <class T>
__device__ const T* features_of(const Params& p, int64_t image) {
    return static_cast<const T*>(p.features) + image * p.image_stride;
}

// Shared memory for sums of up to kFew classes and kMore other numbers of each item.
template <class W, class Lanes, int kMore>
struct Shared {
    static constexpr int kCount = Lanes::kParts * Lanes::kPacks * ((kFew + kMore) * Lanes::kOwn + kFew);
};

// seeds[i] of the pixels that a load has.
template <int kStep>
__device__ __forceinline__ void load_seeds(const int16_t* from, int (&seeds)[kStep]) {
    struct alignas(sizeof(int16_t) * kStep) Seeds {
        int16_t numbers[kStep];
    };
    const Seeds all = *reinterpret_cast<const Seeds*>(from);
#pragma unroll
    for (int i = 0; i < kStep; ++i) seeds[i] = all.numbers[i];
}

}  // namespace
}  // namespace wsss::prototype
