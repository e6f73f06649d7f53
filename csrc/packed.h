// A few numbers that lie side by side in memory, moved as words by CUDA kernels: 16 bytes, or one number.
//
// Arrays of 16-bit numbers cost a GPU two to three more instructions for each, by which the compiler takes
// them out of words and puts them back; what is done here takes one, to float or, for two, from float.
#pragma once

#include <cstring>

#include "dtype.h"
#include "launch.h"

namespace wsss {

template <class T, int kCount>
struct alignas(16) Packed {
    static_assert(sizeof(T) * kCount == 16);
    uint32_t words[4];
};
template <class T>
struct Packed<T, 1> {
    T number;
};

template <class T, int kCount>
__device__ __forceinline__ Packed<T, kCount> load(const T* from) {
    return *reinterpret_cast<const Packed<T, kCount>*>(from);
}

// Zeros, and nothing is read, unless it is there. Not a branch, so that several loads are under way. Memory
// that the kernel does not write.
template <class T, int kCount>
__device__ __forceinline__ Packed<T, kCount> load_if(bool there, const T* from) {
#if defined(__CUDACC__)
    if constexpr (kCount > 1) {
        Packed<T, kCount> packed;
        asm("{\n"
            "  .reg .pred there;\n"
            "  setp.ne.s32 there, %5, 0;\n"
            "  mov.u32 %0, 0;\n"
            "  mov.u32 %1, 0;\n"
            "  mov.u32 %2, 0;\n"
            "  mov.u32 %3, 0;\n"
            "  @there ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];\n"
            "}"
            : "=&r"(packed.words[0]), "=&r"(packed.words[1]), "=&r"(packed.words[2]), "=&r"(packed.words[3])
            : "l"(__cvta_generic_to_global(from)), "r"(static_cast<int>(there)));
        return packed;
    }
#endif
    return there ? load<T, kCount>(from) : Packed<T, kCount>{};
}

template <class T, int kCount>
__device__ __forceinline__ void store(T* to, const Packed<T, kCount>& packed) {
    *reinterpret_cast<Packed<T, kCount>*>(to) = packed;
}

// Of what is not read soon: it leaves caches to other numbers.
template <class T, int kCount>
__device__ __forceinline__ void store_once(T* to, const Packed<T, kCount>& packed) {
#if defined(__CUDACC__)
    if constexpr (kCount > 1) {
        __stcs(reinterpret_cast<uint4*>(to),
               make_uint4(packed.words[0], packed.words[1], packed.words[2], packed.words[3]));
        return;
    }
#endif
    store(to, packed);
}

// Two 16-bit floats of a word.
__device__ __forceinline__ float2 widen_pair(__half, uint32_t word) {
    __half2 pair;
    std::memcpy(static_cast<void*>(&pair), &word, sizeof(word));
    return __half22float2(pair);
}
__device__ __forceinline__ float2 widen_pair(__nv_bfloat16, uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ __half2 narrow_pair(__half, float x, float y) { return __floats2half2_rn(x, y); }
__device__ __forceinline__ __nv_bfloat162 narrow_pair(__nv_bfloat16, float x, float y) {
    return __floats2bfloat162_rn(x, y);
}
__device__ __forceinline__ float2 narrow_pair(float, float x, float y) { return {x, y}; }

template <class T, int kCount>
__device__ __forceinline__ void widen(const Packed<T, kCount>& packed, wide<T> (&numbers)[kCount]) {
    if constexpr (kCount == 1) {
        numbers[0] = static_cast<wide<T>>(packed.number);
    } else if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = widen_pair(T(0.0f), packed.words[i]);
            numbers[2 * i] = pair.x;
            numbers[2 * i + 1] = pair.y;
        }
    } else {
        std::memcpy(numbers, packed.words, sizeof(packed));
    }
}

template <class T, int kCount>
__device__ __forceinline__ Packed<T, kCount> narrow(const wide<T> (&numbers)[kCount]) {
    Packed<T, kCount> packed;
    if constexpr (kCount == 1) {
        packed.number = static_cast<T>(numbers[0]);
    } else if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const auto pair = narrow_pair(T(0.0f), numbers[2 * i], numbers[2 * i + 1]);
            std::memcpy(&packed.words[i], static_cast<const void*>(&pair), sizeof(pair));
        }
    } else {
        std::memcpy(packed.words, numbers, sizeof(packed));
    }
    return packed;
}

}  // namespace wsss
