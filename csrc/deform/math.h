// A sample point: where it reads, with which weights, and what its derivatives are. Shared by all backends.
#pragma once

#include <cmath>

#include "deform/op.h"

namespace wsss::deform {

// Corners are numbered 0 (y0, x0), 1 (y0, x0 + 1), 2 (y0 + 1, x0), 3 (y0 + 1, x0 + 1).
template <class W>
struct Sample {
    int32_t image, y, x;  // of corner 0, which may lie beyond the image
    unsigned inside;      // bit i: corner i lies in the image
    W fraction_y, fraction_x;
    W mask;

    WSSS_HOST_DEVICE W weight(int corner) const {
        return (corner & 2 ? fraction_y : 1 - fraction_y) * (corner & 1 ? fraction_x : 1 - fraction_x);
    }
    // d weight / d y and d x: those of the floor's cell, also where a coordinate is an integer.
    WSSS_HOST_DEVICE W weight_y(int corner) const {
        const W along = corner & 1 ? fraction_x : 1 - fraction_x;
        return corner & 2 ? along : -along;
    }
    WSSS_HOST_DEVICE W weight_x(int corner) const {
        const W along = corner & 2 ? fraction_y : 1 - fraction_y;
        return corner & 1 ? along : -along;
    }
};

struct Place {            // of a sample
    int64_t image, y, x;  // the output pixel
    int64_t group, tap_y, tap_x;
};

WSSS_HOST_DEVICE int64_t offset_of(const Strides& strides, const Place& at, int64_t channel) {
    return at.image * strides.image + channel * strides.channel + at.y * strides.y + at.x * strides.x;
}

// Channel of `mask`; that of the y displacement in `offset` is twice as large.
WSSS_HOST_DEVICE int64_t mask_channel(const Shape& s, const Place& at) {
    return (at.group * s.kernel_h + at.tap_y) * s.kernel_w + at.tap_x;
}

// What memory says of a sample.
template <class W>
struct Displacement {
    W y, x, mask;
};

template <class W>
WSSS_HOST_DEVICE Displacement<W> load_displacement(const Params& p, const Place& at) {
    const int64_t channel = mask_channel(p.shape, at);
    const W* offset = static_cast<const W*>(p.offset) + offset_of(p.offset_strides, at, 2 * channel);
    const W* const mask = static_cast<const W*>(p.mask);
    return {offset[0], offset[p.offset_strides.channel],
            mask == nullptr ? W{1} : mask[offset_of(p.mask_strides, at, channel)]};
}

template <class W>
WSSS_HOST_DEVICE Sample<W> find_sample(const Params& p, const Place& at,
                                       const Displacement<W>& displacement) {
    const Shape& s = p.shape;
    const W y = static_cast<W>(at.y * s.stride_h - s.padding_h + at.tap_y * s.dilation_h) + displacement.y;
    const W x = static_cast<W>(at.x * s.stride_w - s.padding_w + at.tap_x * s.dilation_w) + displacement.x;
    Sample<W> sample{};
    // False for NaN; and what is converted to an integer below is small.
    const bool near = y >= -1 && y < static_cast<W>(s.height) && x >= -1 && x < static_cast<W>(s.width);
    if (!near) return sample;
    sample.mask = displacement.mask;
    const W floor_y = std::floor(y), floor_x = std::floor(x);
    sample.fraction_y = y - floor_y;
    sample.fraction_x = x - floor_x;
    sample.image = static_cast<int32_t>(at.image);
    sample.y = static_cast<int32_t>(floor_y);
    sample.x = static_cast<int32_t>(floor_x);
    const unsigned rows = (sample.y >= 0 ? 3u : 0u) | (sample.y + 1 < s.height ? 12u : 0u);
    const unsigned columns = (sample.x >= 0 ? 5u : 0u) | (sample.x + 1 < s.width ? 10u : 0u);
    sample.inside = rows & columns;
    return sample;
}

template <class W>
WSSS_HOST_DEVICE Sample<W> find_sample(const Params& p, const Place& at) {
    return find_sample(p, at, load_displacement<W>(p, at));
}

// What a sample's gradients sum up to, where they are wanted.
template <class W>
WSSS_HOST_DEVICE void write_gradients(const Params& p, const Place& at, W by_y, W by_x, W by_mask) {
    const int64_t channel = mask_channel(p.shape, at);
    if (p.offset_gradient != nullptr) {
        W* const to =
            static_cast<W*>(p.offset_gradient) + offset_of(p.offset_gradient_strides, at, 2 * channel);
        to[0] = by_y;
        to[p.offset_gradient_strides.channel] = by_x;
    }
    if (p.mask_gradient != nullptr) {
        static_cast<W*>(p.mask_gradient)[offset_of(p.mask_gradient_strides, at, channel)] = by_mask;
    }
}

}  // namespace wsss::deform
