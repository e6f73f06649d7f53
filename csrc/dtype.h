// Element types: which ones operators take, and 16-bit floats for the CPU sources (CUDA brings its own).
#pragma once

#include <cstdint>
#include <cstring>

#include "common.h"

namespace wsss {

enum class DType { kFloat64, kFloat32, kFloat16, kBFloat16 };

// What sums, coordinates and statistics of a storage type are computed in.
template <class T>
struct Wide {
    using type = float;
};
template <>
struct Wide<double> {
    using type = double;
};
template <class T>
using wide = typename Wide<T>::type;

#if defined(WSSS_BACKEND_CPU)

namespace bits {

template <class To, class From>
WSSS_HOST_DEVICE To cast(From from) {
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

}  // namespace bits

// Conversions by integer arithmetic without branches, which every instruction set vectorises; they round to
// nearest even. Members are always inlined, see WSSS_HOST_DEVICE.
struct BFloat16 {
    uint16_t code;

    BFloat16() = default;
    WSSS_HOST_DEVICE BFloat16(float value) {
        const uint32_t number = bits::cast<uint32_t>(value);
        const uint32_t rounded = (number + 0x7fff + (number >> 16 & 1)) >> 16;
        code = static_cast<uint16_t>((number & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
    WSSS_HOST_DEVICE operator float() const { return bits::cast<float>(static_cast<uint32_t>(code) << 16); }
};

struct Float16 {
    uint16_t code;

    Float16() = default;
    WSSS_HOST_DEVICE Float16(float value) {
        const uint32_t number = bits::cast<uint32_t>(value);
        const uint32_t sign = number >> 16 & 0x8000, magnitude = number & 0x7fffffff;
        // Below 2^-14, the smallest normal number, adding 0.5 leaves the subnormal's mantissa at the end.
        const uint32_t subnormal = bits::cast<uint32_t>(bits::cast<float>(magnitude) + 0.5f) - 0x3f000000;
        const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
        const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
        const uint32_t infinite = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
        code = static_cast<uint16_t>(sign | (magnitude >= 0x477ff000 ? infinite : finite));
    }
    WSSS_HOST_DEVICE operator float() const {
        const uint32_t magnitude = static_cast<uint32_t>(code & 0x7fff) << 13;
        // A multiplication moves the exponent, and normalises what is subnormal here but not as a float.
        const float finite = bits::cast<float>(magnitude) * 0x1p112f;
        const uint32_t number =
            magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : bits::cast<uint32_t>(finite);
        return bits::cast<float>(number | static_cast<uint32_t>(code & 0x8000) << 16);
    }
};

#endif

}  // namespace wsss
