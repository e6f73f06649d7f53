// What the threads of a CUDA block find together.
#pragma once

#include "launch.h"

namespace wsss {

// All threads' values by fold(x, y), to each of them, in a fixed order; of blocks of kThreads.
template <int kThreads, class W, class Fold>
__device__ __forceinline__ W fold_block(W value, const Fold& fold) {
    constexpr int kWarp = 32;
    __shared__ W of_warp[kThreads / kWarp];
    for (int step = kWarp / 2; step > 0; step /= 2) {
        value = fold(value, __shfl_xor_sync(0xffffffffu, value, step));
    }
    __syncthreads();  // a fold before this one has been read
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = of_warp[0];
    for (int warp = 1; warp < kThreads / kWarp; ++warp) value = fold(value, of_warp[warp]);
    return value;
}

}  // namespace wsss
