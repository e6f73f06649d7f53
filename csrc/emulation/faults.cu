#include <cstring>
#include <exception>
#include <string>

#include "faults.h"
#include "launch.h"
#include "tensor_core.h"

namespace wsss {
namespace {

constexpr unsigned full_mask = 0xffffffffu;
constexpr int warps = 4;
constexpr int threads = 32 * warps;

// Out of bounds, by one: the last thread reads or writes what is not there.

__global__ void beyond_global(int* memory) { memory[threadIdx.x + 1024 - threads + 1] = 1; }

__global__ void beyond_dynamic(int* memory) {
    WSSS_DYNAMIC_SHARED(int, tile);
    tile[threadIdx.x] = 1;
    __syncthreads();
    memory[threadIdx.x] = tile[threadIdx.x + 1];
}

__global__ void beyond_static(int* memory) {
    __shared__ int tile[threads];
    int* first = tile;
    first[threadIdx.x] = 1;
    __syncthreads();
    memory[threadIdx.x] = first[threadIdx.x + 1];
}

__global__ void beyond_local(int* memory) {
    int values[threads] = {};
    int* first = values;
    first[memory[threadIdx.x]] = 1;
    memory[threadIdx.x] = first[threadIdx.x + 1];
}

__global__ void beyond_array(int* memory) {
    __shared__ int tile[threads];
    tile[threadIdx.x + 1] = 1;
    memory[threadIdx.x] = tile[threadIdx.x + 1];
}

// Without a barrier. Each reads what its predecessor writes, which is right wherever that one ran first.

__global__ void missing_syncthreads(int* memory) {
    __shared__ int tile[threads];
    const int before = threadIdx.x < 32 ? threadIdx.x : threadIdx.x - 32;
    tile[threadIdx.x] = before;
    memory[threadIdx.x] = tile[before] + 1;
}

__global__ void missing_second_syncthreads(int* memory) {
    __shared__ int tile[threads];
    const int after = (threadIdx.x + 32) % threads;
    for (int round = 1; round <= 2; ++round) {
        tile[threadIdx.x] = round;
        __syncthreads();
        memory[threadIdx.x] += tile[after];
    }
}

__global__ void missing_syncwarp(int* memory) {
    __shared__ int tile[32];
    const int before = threadIdx.x == 0 ? 0 : threadIdx.x - 1;
    tile[threadIdx.x] = before;
    memory[threadIdx.x] = tile[before] + 1;
}

// A shuffle makes the lanes meet, but orders no memory.
__global__ void shuffle_for_syncwarp(int* memory) {
    __shared__ int tile[32];
    tile[threadIdx.x] = 1;
    const int other = __shfl_xor_sync(full_mask, static_cast<int>(threadIdx.x), 1);
    memory[threadIdx.x] = tile[other];
}

// Sums that need an atomic operation: within a block, and from several blocks.

__global__ void missing_atomic(int* memory) { memory[threadIdx.x / 64] += 1; }

__global__ void missing_atomic_of_blocks(int* memory) { memory[threadIdx.x] += 1; }

// The last block adds up what the others wrote, but nobody fences.
__global__ void missing_fence(int* memory) {
    memory[blockIdx.x] = 1;
    if (atomicAdd(&memory[1000], 1) != static_cast<int>(gridDim.x) - 1) return;
    for (unsigned i = 0; i < gridDim.x; ++i) memory[500] += memory[i];
}

// Meetings to which not all come.

__global__ void barriers_in_two_branches(int* memory) {
    if (threadIdx.x % 32 < 16) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    memory[threadIdx.x] = 1;
}

__global__ void barrier_of_half_the_warp(int* memory) {
    int value = threadIdx.x;
    if (threadIdx.x % 32 < 16) value = __shfl_down_sync(full_mask, value, 8);
    __syncthreads();
    memory[threadIdx.x] = value;
}

__global__ void waits_for_memory(int* memory) {
    volatile int* flag = memory;
    if (threadIdx.x == 0) {
        while (*flag == 0) {
        }
    }
    __syncthreads();
    if (threadIdx.x == 1) *flag = 1;
}

__global__ void mask_names_exited(int* memory) {
    if (threadIdx.x % 32 >= 16) return;
    memory[threadIdx.x] = __shfl_down_sync(full_mask, memory[threadIdx.x], 8);
}

__global__ void mask_names_absent(int* memory) {  // in a block of 40 threads
    memory[threadIdx.x] = __shfl_down_sync(full_mask, memory[threadIdx.x], 8);
}

__global__ void lane_outside_mask(int* memory) {
    if (threadIdx.x % 32 < 16) memory[threadIdx.x] = __shfl_sync(0xffffu, memory[threadIdx.x], 16);
}

// Misaligned.

__global__ void misaligned_float4(int* memory) {
    const float4 v = reinterpret_cast<const float4*>(memory + 1)[threadIdx.x];
    memory[threadIdx.x] = static_cast<int>(v.x);
}

__global__ void misaligned_ldg(int* memory) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(memory + 2) + threadIdx.x);
    memory[threadIdx.x] = static_cast<int>(v.x);
}

__global__ void misaligned_half2(int* memory) {
    const __half2 v = *reinterpret_cast<const __half2*>(reinterpret_cast<const __half*>(memory) + 1);
    memory[threadIdx.x] = static_cast<int>(__low2float(v));
}

__global__ void missing_wait(int* memory) {
    __shared__ __align__(16) int tile[4 * threads];
    __pipeline_memcpy_async(tile + 4 * threadIdx.x, memory + 4 * threadIdx.x, 16);
    __pipeline_commit();
    if (tile[4 * threadIdx.x] != 0) __trap();
}

__global__ void wait_for_wrong_group(int* memory) {
    __shared__ __align__(16) int tile[4 * threads];
    __pipeline_memcpy_async(tile + 4 * threadIdx.x, memory + 4 * threadIdx.x, 16);
    __pipeline_commit();
    __pipeline_commit();
    __pipeline_wait_prior(2);
    if (tile[4 * threadIdx.x] != 0) __trap();
}

__global__ void copy_over_what_is_read(int* memory) {
    __shared__ __align__(16) int tile[4 * threads];
    for (int turn = 0; turn < 2; ++turn) {
        __pipeline_memcpy_async(tile + 4 * threadIdx.x, memory + 4 * threadIdx.x, 16);
        __pipeline_commit();
        __pipeline_wait_prior(0);  // tile is written at the latest here
        __syncthreads();
        if (tile[4 * (threads - 1 - threadIdx.x)] != 0) __trap();
    }
}

// Values.

__global__ void unwritten_static(int* memory) {
    __shared__ int tile[threads];
    if (threadIdx.x != 77) tile[threadIdx.x] = 1;
    __syncthreads();
    memory[threadIdx.x] = tile[threadIdx.x];
}

__global__ void unwritten_dynamic(int* memory) {
    WSSS_DYNAMIC_SHARED(int, tile);
    if (threadIdx.x != 77) tile[threadIdx.x] = 1;
    __syncthreads();
    memory[threadIdx.x] = tile[threadIdx.x];
}

__global__ void overflow_in_index(int* memory) {
    const int row = 70000 + threadIdx.x;
    const int columns = 70000 + memory[threadIdx.x];
    if (row * columns + 1 > 0) memory[threadIdx.x] = 1;
}

__global__ void float_for_tf32(int* memory) {
    const uint32_t left[4] = {__float_as_uint(0.1f)};
    float sums[4] = {};
    multiply_add<float>(sums, left, 0, 0);
    memory[threadIdx.x] = static_cast<int>(sums[0]);
}

__global__ void nan_to_int(int* memory) {
    const float zero = static_cast<float>(memory[threadIdx.x]);
    memory[threadIdx.x] = static_cast<int>(zero / zero);
}

// Launches.

template <int bound>
__global__ void __launch_bounds__(bound) beyond_launch_bounds(int* memory) {
    memory[threadIdx.x] = 1;
}

__global__ void too_much_shared(int* memory) {  // 40 KiB beside 200 KiB of dynamic memory
    __shared__ int tile[10 * 1024];
    tile[threadIdx.x] = 1;
    memory[threadIdx.x] = tile[threadIdx.x];
}

__global__ void trap(int*) { __trap(); }

struct Planted {
    const char* name;
    void (*kernel)(int*);
    int blocks = 1;
    int block = threads;
    size_t shared_bytes = 0;
};

#define WSSS_PLANTED(kernel, ...) {#kernel, kernel, __VA_ARGS__}
const Planted all_planted[] = {
    WSSS_PLANTED(beyond_global),
    WSSS_PLANTED(beyond_dynamic, 1, threads, threads * sizeof(int)),
    WSSS_PLANTED(beyond_static),
    WSSS_PLANTED(beyond_local),
    WSSS_PLANTED(beyond_array),
    WSSS_PLANTED(missing_syncthreads),
    WSSS_PLANTED(missing_second_syncthreads),
    WSSS_PLANTED(missing_syncwarp, 1, 32),
    WSSS_PLANTED(shuffle_for_syncwarp, 1, 32),
    WSSS_PLANTED(missing_atomic),
    WSSS_PLANTED(missing_atomic_of_blocks, 3),
    WSSS_PLANTED(missing_fence, 3, 1),
    WSSS_PLANTED(barriers_in_two_branches),
    WSSS_PLANTED(barrier_of_half_the_warp),
    WSSS_PLANTED(waits_for_memory),
    WSSS_PLANTED(mask_names_exited),
    WSSS_PLANTED(mask_names_absent, 1, 40),
    WSSS_PLANTED(lane_outside_mask),
    WSSS_PLANTED(misaligned_float4),
    WSSS_PLANTED(misaligned_ldg),
    WSSS_PLANTED(misaligned_half2),
    WSSS_PLANTED(missing_wait, 40),
    WSSS_PLANTED(wait_for_wrong_group, 40),
    WSSS_PLANTED(copy_over_what_is_read),
    WSSS_PLANTED(unwritten_static),
    WSSS_PLANTED(unwritten_dynamic, 1, threads, threads * sizeof(int)),
    WSSS_PLANTED(overflow_in_index),
    WSSS_PLANTED(float_for_tf32, 1, 32),
    WSSS_PLANTED(nan_to_int),
    WSSS_PLANTED(beyond_launch_bounds<96>),
    WSSS_PLANTED(too_much_shared, 1, threads, 200 * 1024),
    WSSS_PLANTED(trap),
};

}  // namespace
}  // namespace wsss

const char* selftest_fault(const char* name, int* memory, void* stream) {
    static thread_local std::string message;
    try {
        for (const wsss::Planted& planted : wsss::all_planted) {
            if (std::strcmp(planted.name, name) != 0) continue;
            wsss::launch(planted.kernel, planted.blocks, planted.block, planted.shared_bytes, stream, memory);
            return nullptr;
        }
        message = std::string("no fault is called ") + name;
    } catch (const std::exception& error) {
        message = error.what();
    }
    return message.c_str();
}
