// The two things a cuda.cu says differently from plain CUDA, so that g++ can compile its text for the
// emulation: how a kernel is launched and dynamic shared memory declared. All else is the language itself.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// One array type for every kernel: `extern __shared__ T x[]` in a template clashes with itself at a second T.
#define WSSS_DYNAMIC_SHARED(type, name)                                  \
    extern __shared__ __align__(16) unsigned char wsss_dynamic_shared[]; \
    type* const name = reinterpret_cast<type*>(wsss_dynamic_shared)

#elif defined(WSSS_EMULATED)

#include "emulation/cuda.h"

#define WSSS_DYNAMIC_SHARED(type, name) \
    type* const name = static_cast<type*>(wsss::emulation::dynamic_shared())

#else
#error "launch.h is for nvcc, or for g++ with -DWSSS_EMULATED=1"
#endif

namespace wsss {

// Keeps a parameter out of template deduction: the kernel alone decides the types of its arguments.
template <class T>
struct NotDeduced {
    using type = T;
};

#if defined(__CUDACC__)
// More than 48 KiB of shared memory, `__shared__` variables included, has to be asked for. All that the
// device has is: host threads that launch one kernel with different sizes would undo each other's asking.
inline cudaError_t allow_shared_bytes(const void* kernel, size_t shared_bytes) {
    constexpr size_t without_asking = 48 * 1024;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess || attributes.sharedSizeBytes + shared_bytes <= without_asking) return error;
    int device = 0;
    int most = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                most - static_cast<int>(attributes.sharedSizeBytes));
}
#endif

// Launches kernel on a stream (a cudaStream_t). A grid with a zero dimension launches nothing. Throws
// std::runtime_error naming kernel, grid and block; never synchronises, so it reports refused launches only.
// WSSS_DYNAMIC_SHARED names shared_bytes bytes aligned to 16.
template <class... Params>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            typename NotDeduced<Params>::type... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(__CUDACC__)
    const void* function = reinterpret_cast<const void*>(kernel);
    cudaError_t error = shared_bytes > 0 ? allow_shared_bytes(function, shared_bytes) : cudaSuccess;
    if (error == cudaSuccess) {
        // What kernel<<<...>>> does, except that it returns this launch's error and not an earlier one.
        cudaLaunchConfig_t config = {};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = shared_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        error = cudaLaunchKernelEx(&config, kernel, args...);
    }
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();  // reported here; left in place it would be raised again by whoever asks next
    const char* name = "kernel";
    if (cudaFuncGetName(&name, function) != cudaSuccess) name = "kernel";
    const auto text = [](dim3 size) {
        return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) +
               ")";
    };
    throw std::runtime_error(std::string("cannot launch ") + name + " with grid " + text(grid) + ", block " +
                             text(block) + " and " + std::to_string(shared_bytes) +
                             " bytes of shared memory: " + cudaGetErrorString(error));
#else
    (void)stream;
    emulation::run({reinterpret_cast<const void*>(kernel), grid, block, shared_bytes},
                   [&] { kernel(args...); });
#endif
}

}  // namespace wsss
