// How a block of threads shares sums on CUDA.
#pragma once

#include "launch.h"
#include "prototype/math.h"

namespace wsss::prototype {
namespace {

constexpr int kWarp = 32, kGroups = 8;
constexpr int kThreads = kWarp * kGroups;
constexpr int kFew = 8;  // classes whose sums a thread keeps in registers

// A block sums for several items, pixels or channels, several lanes for each. Where items are side by side in
// memory (kTogether), a warp takes 32 of them and the block's 8 warps are the lanes; elsewhere a warp is the
// 32 lanes of one of 8 items. So neighbouring threads always read neighbouring numbers. Sums have a fixed
// order.
template <bool kTogether>
struct Group {
    static constexpr int kItems = kTogether ? kWarp : kGroups;
    static constexpr int kLanes = kTogether ? kGroups : kWarp;

    static __device__ int item() { return static_cast<int>(kTogether ? threadIdx.x : threadIdx.y); }
    static __device__ int lane() { return static_cast<int>(kTogether ? threadIdx.y : threadIdx.x); }

    // Of all lanes of an item, to each of them; all threads call it.
    template <class W>
    static __device__ W sum(W value) {
        if constexpr (kTogether) {
            __shared__ W of_lane[kGroups][kWarp];
            __syncthreads();
            of_lane[threadIdx.y][threadIdx.x] = value;
            __syncthreads();
            W total = 0;
            for (int lane = 0; lane < kGroups; ++lane) total += of_lane[lane][threadIdx.x];
            return total;
        } else {
            for (int step = kWarp / 2; step > 0; step /= 2)
                value += __shfl_xor_sync(0xffffffffu, value, step);
            return value;
        }
    }
};

// Where a block finds its items: blocks follow each other image by image.
struct Items {
    Divisor blocks;
    uint32_t count;

    template <bool kTogether>
    static Items of(int64_t count) {
        return {Divisor(static_cast<uint32_t>(ceil_div<int64_t>(count, Group<kTogether>::kItems))),
                static_cast<uint32_t>(count)};
    }
    __device__ int64_t image() const { return blocks.quotient(blockIdx.x); }
    template <bool kTogether>
    __device__ uint32_t item() const {
        const uint32_t block = blocks.remainder(blockIdx.x, blocks.quotient(blockIdx.x));
        return block * Group<kTogether>::kItems + static_cast<uint32_t>(Group<kTogether>::item());
    }
};

template <bool kTogether>
dim3 group_blocks(int64_t images, int64_t items) {
    return dim3(static_cast<unsigned>(images * ceil_div<int64_t>(items, Group<kTogether>::kItems)));
}
inline dim3 group_threads() { return dim3(kWarp, kGroups); }

}  // namespace
}  // namespace wsss::prototype
