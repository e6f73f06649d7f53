// __half and __nv_bfloat16: storage in 16 bits, arithmetic by rounding the float result, as CUDA defines it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "arithmetic.h"
#include "vector_types.h"

namespace wsss::emulation {

// A sign bit, an exponent and a mantissa. Every float and double rounds once, to nearest even.
template <int exponent_bits, int mantissa_bits>
class SmallFloat {
  public:
    SmallFloat() = default;
    template <class Number, class = std::enable_if_t<std::is_arithmetic_v<Number>>>
    SmallFloat(Number value) : bits_(encode(static_cast<double>(value))) {}

    static SmallFloat from_bits(uint16_t bits) {
        SmallFloat result;
        result.bits_ = bits;
        return result;
    }
    uint16_t bits() const { return bits_; }

    // Inlined, so that the checks of the access name the kernel's line.
    __attribute__((always_inline)) operator float() const { return decode(bits_); }
    friend SmallFloat operator+(SmallFloat a, SmallFloat b) { return float(a) + float(b); }
    friend SmallFloat operator-(SmallFloat a, SmallFloat b) { return float(a) - float(b); }
    friend SmallFloat operator*(SmallFloat a, SmallFloat b) { return float(a) * float(b); }
    friend SmallFloat operator/(SmallFloat a, SmallFloat b) { return float(a) / float(b); }
    friend SmallFloat operator-(SmallFloat a) { return from_bits(a.bits_ ^ 0x8000); }
    SmallFloat& operator+=(SmallFloat other) { return *this = *this + other; }
    SmallFloat& operator-=(SmallFloat other) { return *this = *this - other; }
    SmallFloat& operator*=(SmallFloat other) { return *this = *this * other; }
    SmallFloat& operator/=(SmallFloat other) { return *this = *this / other; }

  private:
    static constexpr int implicit_one = 1 << mantissa_bits;
    static constexpr int exponent_mask = (1 << exponent_bits) - 1;
    static constexpr int bias = exponent_mask / 2;

    static float decode(uint16_t bits) {
        const int exponent = bits >> mantissa_bits & exponent_mask;
        const int mantissa = bits & (implicit_one - 1);
        float magnitude;
        if (exponent == exponent_mask) {
            magnitude = mantissa == 0 ? INFINITY : NAN;
        } else {
            const int steps = exponent == 0 ? mantissa : mantissa + implicit_one;
            magnitude = std::ldexp(static_cast<float>(steps), std::max(exponent, 1) - bias - mantissa_bits);
        }
        return bits >> 15 ? -magnitude : magnitude;
    }

    static uint16_t encode(double value) {
        if (std::isnan(value)) return 0x7fff;
        // 2^(bias + 1) is the bit pattern of infinity read as a number, and where rounding up from the
        // largest finite number ends; below the normal numbers the steps stay those of the smallest exponent.
        const double magnitude = std::min(std::fabs(value), std::ldexp(1.0, bias + 1));
        const int exponent = std::max(std::ilogb(magnitude), 1 - bias);
        const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent)));
        const int code = ((exponent + bias - 1) << mantissa_bits) + steps;
        return static_cast<uint16_t>(code | (std::signbit(value) ? 0x8000 : 0));
    }

    uint16_t bits_;
};

// a * b + c of numbers with at most 26 bits each, inexact results rounded to odd: rounded again to fewer bits
// this gives what rounding the true value once does.
inline double fused(double a, double b, double c) {
    const double product = a * b;  // exact
    const double sum = product + c;
    const double of_c = sum - product;
    const double lost = (product - (sum - of_c)) + (c - of_c);
    if (!std::isfinite(lost) || lost == 0 || bit_cast<uint64_t>(sum) % 2 == 1) return sum;
    return std::nextafter(sum, lost > 0 ? INFINITY : -INFINITY);
}

template <class Half>
struct alignas(4) Pair {
    Half x, y;
    friend Pair operator+(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
    friend Pair operator-(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }
    friend Pair operator*(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
};

}  // namespace wsss::emulation

using __half = wsss::emulation::SmallFloat<5, 10>;
using __half2 = wsss::emulation::Pair<__half>;
using half = __half;
using half2 = __half2;
using __nv_bfloat16 = wsss::emulation::SmallFloat<8, 7>;
using __nv_bfloat162 = wsss::emulation::Pair<__nv_bfloat16>;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline __half __float2half(float v) { return v; }
inline __half __float2half_rn(float v) { return v; }
inline __half __double2half(double v) { return v; }
inline float __half2float(__half v) { return v; }
inline __half __ushort_as_half(unsigned short bits) { return __half::from_bits(bits); }
inline unsigned short __half_as_ushort(__half v) { return v.bits(); }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __half2half2(__half v) { return {v, v}; }
inline __half2 __float2half2_rn(float v) { return {v, v}; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }

inline __nv_bfloat16 __float2bfloat16(float v) { return v; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return v; }
inline __nv_bfloat16 __double2bfloat16(double v) { return v; }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return __nv_bfloat16::from_bits(bits); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits(); }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 v) { return {v, v}; }
inline __nv_bfloat162 __float2bfloat162_rn(float v) { return {v, v}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }

template <class Half>
float __low2float(wsss::emulation::Pair<Half> v) {
    return v.x;
}
template <class Half>
float __high2float(wsss::emulation::Pair<Half> v) {
    return v.y;
}

inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }

namespace wsss::emulation {

template <class T>
constexpr bool is_half = false;
template <int e, int m>
constexpr bool is_half<SmallFloat<e, m>> = true;
template <class T>
using IfHalf = std::enable_if_t<is_half<T>, T>;

}  // namespace wsss::emulation

// The named operations, of one number and of a pair.
#define WSSS_HALF_UNARY(name, name2, expression)                 \
    template <class T>                                           \
    wsss::emulation::IfHalf<T> name(T a) {                       \
        return expression;                                       \
    }                                                            \
    template <class T>                                           \
    wsss::emulation::Pair<T> name2(wsss::emulation::Pair<T> a) { \
        return {name(a.x), name(a.y)};                           \
    }
#define WSSS_HALF_BINARY(name, name2, expression)                                            \
    template <class T>                                                                       \
    wsss::emulation::IfHalf<T> name(T a, T b) {                                              \
        return expression;                                                                   \
    }                                                                                        \
    template <class T>                                                                       \
    wsss::emulation::Pair<T> name2(wsss::emulation::Pair<T> a, wsss::emulation::Pair<T> b) { \
        return {name(a.x, b.x), name(a.y, b.y)};                                             \
    }
WSSS_HALF_UNARY(__hneg, __hneg2, -a)
WSSS_HALF_UNARY(__habs, __habs2, T::from_bits(a.bits() & 0x7fff))
WSSS_HALF_BINARY(__hadd, __hadd2, a + b)
WSSS_HALF_BINARY(__hsub, __hsub2, a - b)
WSSS_HALF_BINARY(__hmul, __hmul2, a* b)
WSSS_HALF_BINARY(__hdiv, __h2div, a / b)
WSSS_HALF_BINARY(__hmin, __hmin2, fminf(a, b))
WSSS_HALF_BINARY(__hmax, __hmax2, fmaxf(a, b))
#undef WSSS_HALF_UNARY
#undef WSSS_HALF_BINARY

template <class T>
wsss::emulation::IfHalf<T> __hfma(T a, T b, T c) {
    return wsss::emulation::fused(a, b, c);
}
template <class T>
wsss::emulation::Pair<T> __hfma2(wsss::emulation::Pair<T> a, wsss::emulation::Pair<T> b,
                                 wsss::emulation::Pair<T> c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}

#define WSSS_HALF_COMPARISON(name, operation)      \
    template <class T>                             \
    bool name(wsss::emulation::IfHalf<T> a, T b) { \
        return float(a) operation float(b);        \
    }
WSSS_HALF_COMPARISON(__heq, ==)
WSSS_HALF_COMPARISON(__hne, !=)
WSSS_HALF_COMPARISON(__hlt, <)
WSSS_HALF_COMPARISON(__hle, <=)
WSSS_HALF_COMPARISON(__hgt, >)
WSSS_HALF_COMPARISON(__hge, >=)
#undef WSSS_HALF_COMPARISON
inline bool __hisnan(__half a) { return std::isnan(float(a)); }
inline bool __hisnan(__nv_bfloat16 a) { return std::isnan(float(a)); }
