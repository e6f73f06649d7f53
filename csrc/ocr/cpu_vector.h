// Vectors as wide as those of the instruction set, a pixel in each lane, and exp and log of them.
// For cpu.cpp alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ocr/op.h"

namespace wsss::ocr::WSSS_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class W>
struct Vectors;
template <>
struct Vectors<float> {
    using Integer = int32_t;
    typedef float Number __attribute__((vector_size(kVectorBytes)));
    typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Vectors<double> {
    using Integer = int64_t;
    typedef double Number __attribute__((vector_size(kVectorBytes)));
    typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
};
template <class W>
using Vec = typename Vectors<W>::Number;
// Of integers as wide as W: -1 or 0 in a lane that a comparison fills.
template <class W>
using Mask = typename Vectors<W>::Mask;
template <class W>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(W));

template <class W>
WSSS_HOST_DEVICE Vec<W> load(const W* from) {
    Vec<W> v;
    std::memcpy(&v, from, sizeof(v));
    return v;
}
template <class W>
WSSS_HOST_DEVICE void store(W* to, const Vec<W>& v) {
    std::memcpy(to, &v, sizeof(v));
}
template <class W>
WSSS_HOST_DEVICE Vec<W> all_lanes(W value) {
    return value - Vec<W>{};
}

template <class To, class From>
WSSS_HOST_DEVICE To same_bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class W>
WSSS_HOST_DEVICE Mask<W> load_mask(const typename Vectors<W>::Integer* from) {
    Mask<W> mask;
    std::memcpy(&mask, from, sizeof(mask));
    return mask;
}
template <class W>
WSSS_HOST_DEVICE void store_mask(typename Vectors<W>::Integer* to, const Mask<W>& mask) {
    std::memcpy(to, &mask, sizeof(mask));
}

template <class W>
WSSS_HOST_DEVICE bool any(const Mask<W>& mask) {
    uint64_t words[kVectorBytes / 8], found = 0;
    std::memcpy(words, &mask, sizeof(words));
    for (const uint64_t word : words) found |= word;
    return found != 0;
}

// exp(scale * x) for x <= 0, 0 where it would be below the normal numbers; NaN for NaN, anything for x > 0.
template <class W>
class Exponential;

template <>
class Exponential<float> {
  public:
    // In base 2; `rest_` is what the float nearest to the factor lacks.
    explicit Exponential(double scale)
        : factor_(static_cast<float>(scale * kLog2E)),
          rest_(static_cast<float>(scale * kLog2E - factor_)),
          lowest_(static_cast<float>(-125 / (scale * kLog2E))) {}

    WSSS_HOST_DEVICE Vec<float> operator()(const Vec<float>& x) const {
        using V = Vec<float>;
        using M = Mask<float>;
        const M vanishes = x < lowest_;
        const V bounded = vanishes ? all_lanes(lowest_) : x;
        // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
        const V shifted = bounded * factor_ + 0x1.8p23f;
        const V whole = shifted - 0x1.8p23f;
        const V part = (bounded * factor_ - whole) + bounded * rest_;  // within +-0.5
        // Of 2^part, relative error 2e-9.
        V power = part * 1.5345811e-4f + 1.33999309e-3f;
        power = power * part + 9.61848907e-3f;
        power = power * part + 5.55032864e-2f;
        power = power * part + 2.40226462e-1f;
        power = power * part + 6.93147182e-1f;
        power = power * part + 1.0f;
        const V scaled = same_bits<V>(same_bits<M>(power) + (same_bits<M>(shifted) << 23));
        return vanishes ? V{} : scaled;
    }

  private:
    static constexpr double kLog2E = 1.4426950408889634;
    float factor_, rest_, lowest_;
};

template <>
class Exponential<double> {
  public:
    explicit Exponential(double scale) : scale_(scale) {}

    WSSS_HOST_DEVICE Vec<double> operator()(Vec<double> x) const {
        for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(scale_ * x[lane]);
        return x;
    }

  private:
    double scale_;
};

// log(1 + x) for finite x >= 0, accurate for small x too.
WSSS_HOST_DEVICE Vec<float> log_plus_one(const Vec<float>& x) {
    using V = Vec<float>;
    using M = Mask<float>;
    const V sum = x + 1.0f;
    const V lost = x - (sum - 1.0f);
    // sum = 2^exponent * m with m from sqrt(1/2) to sqrt(2); log m = 2 atanh((m - 1) / (m + 1)).
    const M bits = same_bits<M>(sum);
    const M exponent = (bits - 0x3f3504f3) >> 23;
    const V m = same_bits<V>(bits - (exponent << 23));
    const V s = (m - 1.0f) / (m + 1.0f);
    const V z = s * s;
    const V series = ((z * (2.0f / 9) + 2.0f / 7) * z + 2.0f / 5) * z + 2.0f / 3;
    const V log_m = 2.0f * s + s * z * series + lost / sum;
    return __builtin_convertvector(exponent, V) * 0x1.62e43p-1f + log_m;
}

WSSS_HOST_DEVICE Vec<double> log_plus_one(Vec<double> x) {
    for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::log1p(x[lane]);
    return x;
}

}  // namespace
}  // namespace wsss::ocr::WSSS_LEVEL
