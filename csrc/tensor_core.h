// Products of small matrices by a warp's tensor cores: instructions that CUDA C++ has no names for, and for
// the emulation the same in C++. For 16-bit floats T, from compute capability 8.0 on.
//
// How the lanes share a matrix: of a 16 x 16 left operand, lane l holds rows l / 4 and l / 4 + 8, columns
// 2 * (l % 4), the next, and the two that are eight further on: part 0 is (row, columns), 1 (row + 8,
// columns), 2 (row, columns + 8), 3 (row + 8, columns + 8). Of a 16 x 8 right operand, column l / 4 and rows
// 2 * (l % 4), the next (part 0), and those eight further on (part 1). Of the 16 x 8 sums, rows l / 4 (0, 1)
// and l / 4 + 8 (2, 3), columns 2 * (l % 4) and the next.
#pragma once

#include <type_traits>

#include "launch.h"

#if defined(__CUDACC__)
#include <cuda_pipeline_primitives.h>
#endif

namespace wsss {

#if defined(__CUDACC__)

// Four matrices of 8 x 8 from shared memory. Lane l names where row l % 8 of matrix l / 8 begins, an address
// that is a multiple of 16; of each matrix it gets row l / 4, columns 2 * (l % 4) and the next.
__device__ __forceinline__ void load_matrices(uint32_t (&parts)[4], const void* row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
                 : "r"(address)
                 : "memory");
}

// sums += left * right
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&left)[4], uint32_t right_0,
                                             uint32_t right_1) {
#define WSSS_MULTIPLY_ADD(type)                                                         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])           \
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1))
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        WSSS_MULTIPLY_ADD("bf16");
    } else {
        static_assert(std::is_same_v<T, __half>);
        WSSS_MULTIPLY_ADD("f16");
    }
#undef WSSS_MULTIPLY_ADD
}

#else

inline void load_matrices(uint32_t (&parts)[4], const void* row,
                          emulation::Site site = emulation::Site::here()) {
    const void* rows[4];
    const auto& lanes = emulation::meet_warp("ldmatrix", 0xffffffffu, emulation::pack(row), site);
    for (int i = 0; i < 4; ++i) {
        rows[i] = emulation::unpack<const void*>(lanes.values[8 * i + emulation::lane() / 4]);
    }
    for (int i = 0; i < 4; ++i) parts[i] = static_cast<const uint32_t*>(rows[i])[emulation::lane() % 4];
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&left)[4], uint32_t right_0, uint32_t right_1,
                  emulation::Site site = emulation::Site::here()) {
    struct Pair {
        T at[2];
    };
    struct Parts {
        Pair part[2];
    };
    const int quad = emulation::lane() / 4 * 4;         // first of the lanes that hold this lane's rows
    const int columns = emulation::lane() % 4 * 2 * 4;  // and of those that hold its two columns
    float rows_of_left[2][16], columns_of_right[2][16];
    for (int half = 0; half < 2; ++half) {
        const uint64_t own = left[2 * half] | uint64_t{left[2 * half + 1]} << 32;
        const auto& lanes = emulation::meet_warp("mma", 0xffffffffu, own, site);
        for (int i = 0; i < 16; ++i) {  // row, lane of the quad, number
            const auto parts = emulation::unpack<Parts>(lanes.values[quad + i / 2 % 4]);
            rows_of_left[i / 8][8 * half + i % 8] = static_cast<float>(parts.part[i / 8].at[i % 2]);
        }
    }
    const uint64_t own = right_0 | uint64_t{right_1} << 32;
    const auto& lanes = emulation::meet_warp("mma", 0xffffffffu, own, site);
    for (int i = 0; i < 32; ++i) {  // column, half, lane of the quad, number
        const auto parts = emulation::unpack<Parts>(lanes.values[columns + 4 * (i / 16) + i / 2 % 4]);
        columns_of_right[i / 16][i % 16] = static_cast<float>(parts.part[i / 8 % 2].at[i % 2]);
    }
    for (int i = 0; i < 4; ++i) {
        for (int k = 0; k < 16; ++k) sums[i] += rows_of_left[i / 2][k] * columns_of_right[i % 2][k];
    }
}

#endif

}  // namespace wsss
