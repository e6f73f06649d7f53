// The CUDA C++ that our kernels use, for g++: included by launch.h in place of <cuda_runtime.h>,
// <cuda_fp16.h>, <cuda_bf16.h> and <cuda_pipeline_primitives.h> under -DWSSS_EMULATED=1. See README.md here.
#pragma once

#include <string>

#include "arithmetic.h"
#include "copies.h"
#include "engine.h"
#include "half.h"
#include "memory.h"
#include "threads.h"
#include "vector_types.h"

#define __global__
#define __host__
#define __device__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
// So many NOPs before the kernel, which symbols.cpp counts: GCC writes down where they begin. (It takes a
// sum, but no name of a constant.)
#define __launch_bounds__(threads, ...) \
    __attribute__((patchable_function_entry(0 + (threads), 0 + (threads))))
#define __align__(bytes) __attribute__((aligned(bytes)))

// One variable for all threads, as blocks run one after another. The tag becomes part of its mangled name, in
// templates too, by which symbols.cpp finds every such variable to poison it before each block. (A linker
// section would not do: GCC ignores it in templates. Nor thread_local: it has neither red zones nor an
// address known ahead.)
#define __shared__ static __attribute__((abi_tag("cuda_shared")))

// Illegal instruction: ends the launch.
inline void __trap(wsss::emulation::Site site = wsss::emulation::Site::here()) {
    wsss::emulation::fail("__trap", site);
}
