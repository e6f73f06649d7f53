// __half and __nv_bfloat16: storage in 16 bits, arithmetic by rounding the float result, as CUDA defines it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

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

    operator float() const {
        const int exponent = bits_ >> mantissa_bits & exponent_mask;
        const int mantissa = bits_ & (implicit_one - 1);
        float magnitude;
        if (exponent == exponent_mask) {
            magnitude = mantissa == 0 ? INFINITY : NAN;
        } else {
            const int steps = exponent == 0 ? mantissa : mantissa + implicit_one;
            magnitude = std::ldexp(static_cast<float>(steps), std::max(exponent, 1) - bias - mantissa_bits);
        }
        return bits_ >> 15 ? -magnitude : magnitude;
    }

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
