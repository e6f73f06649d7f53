// Products of small matrices by a warp's tensor cores: instructions that CUDA C++ has no names for, and for
// the emulation the same in C++. For 16-bit floats and, in TF32, float; from compute capability 8.0 on.
//
// How the lanes share a matrix, in words of 32 bits, which hold two 16-bit numbers or one float: of a left
// operand of 16 rows by 8 words, lane l holds rows l / 4 and l / 4 + 8, words l % 4 and l % 4 + 4: part 0 is
// (row, word), 1 (row + 8, word), 2 (row, word + 4), 3 (row + 8, word + 4). Of a right operand of 8 words by
// 8 columns, column l / 4 and words l % 4 (part 0) and l % 4 + 4 (part 1). Of the 16 x 8 sums, rows l / 4 (0,
// 1) and l / 4 + 8 (2, 3), columns 2 * (l % 4) and the next.
#pragma once

#include <cmath>
#include <type_traits>

#include "launch.h"

#if defined(__CUDACC__)
#include <cuda_pipeline_primitives.h>
#endif

namespace wsss {

constexpr uint32_t kTf32Bits = 0xffffe000;  // of a float

#if defined(__CUDACC__)

// Four matrices of 8 rows by 4 words from shared memory. Lane l names where row l % 8 of matrix l / 8 begins,
// an address that is a multiple of 16; of each matrix it gets row l / 4, word l % 4.
__device__ __forceinline__ void load_matrices(uint32_t (&parts)[4], const void* row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
                 : "r"(address)
                 : "memory");
}

// sums += left * right. Floats must be in TF32.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&left)[4], uint32_t right_0,
                                             uint32_t right_1) {
#define WSSS_MULTIPLY_ADD(shape, type)                                         \
    asm("mma.sync.aligned." shape ".row.col.f32." type "." type                \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])           \
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1))
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        WSSS_MULTIPLY_ADD("m16n8k16", "bf16");
    } else if constexpr (std::is_same_v<T, float>) {
        WSSS_MULTIPLY_ADD("m16n8k8", "tf32");
    } else {
        static_assert(std::is_same_v<T, __half>);
        WSSS_MULTIPLY_ADD("m16n8k16", "f16");
    }
#undef WSSS_MULTIPLY_ADD
}

// To the nearest TF32, 11 significant bits.
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
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
    constexpr int kEach = 4 / sizeof(T);  // of a word
    constexpr int kHalf = 4 * kEach;      // of a row: four lanes' words
    struct Word {
        T at[kEach];
    };
    struct Parts {
        Word part[2];
    };
    const auto number = [&](const Parts& parts, int part, int i) {
        const auto x = static_cast<float>(parts.part[part].at[i]);
        if (sizeof(T) == 4 && std::isfinite(x) && (__float_as_uint(x) & ~kTf32Bits) != 0) {
            emulation::fail("mma of a float that is not TF32", site);
        }
        return x;
    };
    const int quad = emulation::lane() / 4 * 4;         // first of the lanes that hold this lane's rows
    const int columns = emulation::lane() % 4 * 2 * 4;  // and of those that hold its two columns
    float rows_of_left[2][2 * kHalf], columns_of_right[2][2 * kHalf];
    for (int half = 0; half < 2; ++half) {
        const uint64_t own = left[2 * half] | uint64_t{left[2 * half + 1]} << 32;
        const auto& lanes = emulation::meet_warp("mma", 0xffffffffu, own, site);
        for (int row = 0; row < 2; ++row) {
            for (int i = 0; i < kHalf; ++i) {
                const auto parts = emulation::unpack<Parts>(lanes.values[quad + i / kEach]);
                rows_of_left[row][kHalf * half + i] = number(parts, row, i % kEach);
            }
        }
    }
    const uint64_t own = right_0 | uint64_t{right_1} << 32;
    const auto& lanes = emulation::meet_warp("mma", 0xffffffffu, own, site);
    for (int column = 0; column < 2; ++column) {
        for (int i = 0; i < 2 * kHalf; ++i) {
            const auto parts =
                emulation::unpack<Parts>(lanes.values[columns + 4 * column + i % kHalf / kEach]);
            columns_of_right[column][i] = number(parts, i / kHalf, i % kEach);
        }
    }
    for (int i = 0; i < 4; ++i) {
        for (int k = 0; k < 2 * kHalf; ++k) sums[i] += rows_of_left[i / 2][k] * columns_of_right[i % 2][k];
    }
}

inline uint32_t round_to_tf32(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (std::isnan(x)) return 0x7fffe000;
    return std::isinf(x) ? bits : (bits + 0x1000) & kTf32Bits;
}

#endif

// Ways to multiply on tensor cores: what an operand's words are turned into before, and the sums of products.

// Of 16-bit numbers T.
template <class T_>
struct Plain {
    using T = T_;

    template <int kWords>
    struct Operand {
        uint32_t words[kWords];

        Operand() = default;
        __device__ explicit Operand(const uint32_t* from) {
            for (int i = 0; i < kWords; ++i) words[i] = from[i];
        }
    };

    __device__ static void add(float (&sums)[4], const Operand<4>& left, const Operand<2>& right) {
        multiply_add<T>(sums, left.words, right.words[0], right.words[1]);
    }
};

// Of floats, rounded to TF32.
struct Tf32 {
    using T = float;

    template <int kWords>
    struct Operand {
        uint32_t words[kWords];

        Operand() = default;
        __device__ explicit Operand(const uint32_t* from) {
            for (int i = 0; i < kWords; ++i) words[i] = round_to_tf32(__uint_as_float(from[i]));
        }
    };

    __device__ static void add(float (&sums)[4], const Operand<4>& left, const Operand<2>& right) {
        multiply_add<float>(sums, left.words, right.words[0], right.words[1]);
    }
};

// Of floats, each taken as the sum of two in TF32, to within 2^-23 of it: all products but that of the two
// small ones. Tensor cores cut sums off rather than round them, which costs a long sum four bits; so each short
// one is added outside of them. By a model of that (not measured on a GPU) what comes out is nearer than from a
// chain of float operations. Infinities become NaN, and so do numbers that TF32 rounds to infinity.
struct Tf32Thrice {
    using T = float;

    template <int kWords>
    struct Operand {
        uint32_t high[kWords], low[kWords];

        Operand() = default;
        // Half the instructions of `round_to_tf32`; what is not a number is one at least in `low`.
        __device__ explicit Operand(const uint32_t* from) {
            for (int i = 0; i < kWords; ++i) {
                high[i] = (from[i] + 0x1000) & kTf32Bits;
                low[i] = __float_as_uint(__uint_as_float(from[i]) - __uint_as_float(high[i])) & kTf32Bits;
            }
        }
    };

    __device__ static void add(float (&sums)[4], const Operand<4>& left, const Operand<2>& right) {
        float own[4] = {};
        multiply_add<float>(own, left.low, right.high[0], right.high[1]);
        multiply_add<float>(own, left.high, right.low[0], right.low[1]);
        multiply_add<float>(own, left.high, right.high[0], right.high[1]);
        for (int i = 0; i < 4; ++i) sums[i] += own[i];
    }
};

}  // namespace wsss
