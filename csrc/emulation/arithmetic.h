// CUDA's own arithmetic functions. The approximate ones are exact here: what they lose shows on a GPU only.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace wsss::emulation {

template <class To, class From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

template <class A, class B>
using Common = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>>;

// Out of range gives the nearest end, NaN zero: CUDA's conversions saturate where those of C++ are undefined.
template <class To, class From>
To saturate(From value) {
    constexpr From lowest = static_cast<From>(std::numeric_limits<To>::lowest());
    constexpr From beyond = static_cast<From>(std::numeric_limits<To>::max() / 2 + 1) * 2;
    if (value != value) return 0;
    if (value < lowest) return std::numeric_limits<To>::lowest();
    if (value >= beyond) return std::numeric_limits<To>::max();
    return static_cast<To>(value);
}

}  // namespace wsss::emulation

// Of floats, the other one where one is NaN.
template <class A, class B>
wsss::emulation::Common<A, B> min(A a, B b) {
    using T = wsss::emulation::Common<A, B>;
    if constexpr (std::is_floating_point_v<T>) return fmin(static_cast<T>(a), static_cast<T>(b));
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
wsss::emulation::Common<A, B> max(A a, B b) {
    using T = wsss::emulation::Common<A, B>;
    if constexpr (std::is_floating_point_v<T>) return fmax(static_cast<T>(a), static_cast<T>(b));
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

#if !defined(__GLIBC__) || !__GLIBC_PREREQ(2, 42)  // which has these two
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
#endif
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }

#define WSSS_CONVERSIONS(from, From, to, To)                                                       \
    inline To __##from##2##to##_rn(From x) { return wsss::emulation::saturate<To>(nearbyint(x)); } \
    inline To __##from##2##to##_rz(From x) { return wsss::emulation::saturate<To>(trunc(x)); }     \
    inline To __##from##2##to##_rd(From x) { return wsss::emulation::saturate<To>(floor(x)); }     \
    inline To __##from##2##to##_ru(From x) { return wsss::emulation::saturate<To>(ceil(x)); }
WSSS_CONVERSIONS(float, float, int, int)
WSSS_CONVERSIONS(float, float, uint, unsigned)
WSSS_CONVERSIONS(float, float, ll, long long)
WSSS_CONVERSIONS(double, double, int, int)
WSSS_CONVERSIONS(double, double, uint, unsigned)
WSSS_CONVERSIONS(double, double, ll, long long)
#undef WSSS_CONVERSIONS
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

inline int __float_as_int(float x) { return wsss::emulation::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return wsss::emulation::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return wsss::emulation::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return wsss::emulation::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return wsss::emulation::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return wsss::emulation::bit_cast<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result |= (x >> i & 1u) << (31 - i);
    return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
