// What all backends share. For a map with factor k, w, p and v the pixels of cam_w, cam_p and cam_w_small, m
// the maximum of p and q = p / (m + eps):
//   loss = a sum of |w - q|  +  b sum of |r - v|,  r = w resized,
//   a = k * prototype_factor,  b = k * scale_factor
// (b = 0 for the background and what is not tagged). With s = sign(w - q) and t = sign(r - v),
//   dw = a s  +  b * what the pixels of r that read w have as t,    dv = -b t,
//   dp = -a s / (m + eps)  +  at each of the maxima a * sum of s q / (m + eps) / (their number).
#pragma once

#include <cmath>

#include "msdw/op.h"
#include "resize.h"

namespace wsss::msdw {

// As torch.amax has it: NaN is larger than all.
template <class W>
WSSS_HOST_DEVICE W larger_or_nan(W largest, W number) {
    return number > largest || number != number ? number : largest;
}

template <class W>
WSSS_HOST_DEVICE W divide_by_maximum(W number, W maximum) {
    return number / (maximum + static_cast<W>(kMaximumEpsilon));
}

template <class W>
WSSS_HOST_DEVICE W sign(W difference) {
    return difference > 0 ? W{1} : difference < 0 ? W{-1} : difference;  // of zero zero, of NaN NaN
}

// From cam_w to cam_w_small's size.
template <class W>
struct Axes {
    Axis<W> y, x;

    WSSS_HOST_DEVICE explicit Axes(const Params& p)
        : y(p.height, p.small_height, true), x(p.width, p.small_width, true) {}
};

// A map of a cam.
template <class T>
struct Map {
    const T* data;
    Strides strides;

    WSSS_HOST_DEVICE Map(const Cam& cam, int64_t image, int64_t c)
        : data(static_cast<const T*>(cam.data) + image * cam.strides.image + c * cam.strides.channel),
          strides(cam.strides) {}
    WSSS_HOST_DEVICE wide<T> at(int64_t y, int64_t x) const {
        return static_cast<wide<T>>(data[y * strides.y + x * strides.x]);
    }
    // Resized; what has no weight is not read, so that NaN stays with the pixels that read it.
    WSSS_HOST_DEVICE wide<T> at(const Tap<wide<T>>& row, const Tap<wide<T>>& column) const {
        const int64_t y = row.index, below = y + (row.fraction > 0);
        const int64_t x = column.index, right = x + (column.fraction > 0);
        const wide<T> upper = at(y, x) * (1 - column.fraction) + at(y, right) * column.fraction;
        const wide<T> lower = at(below, x) * (1 - column.fraction) + at(below, right) * column.fraction;
        return upper * (1 - row.fraction) + lower * row.fraction;
    }
};

template <class T>
WSSS_HOST_DEVICE T* pointer(const Gradient& gradient, int64_t image, int64_t c, int64_t y, int64_t x) {
    const Strides& s = gradient.strides;
    return static_cast<T*>(gradient.data) + image * s.image + c * s.channel + y * s.y + x * s.x;
}

// a and b above.
template <class W>
struct Factors {
    W prototype, scale;

    WSSS_HOST_DEVICE Factors(const Params& p, int64_t image, int64_t c) {
        const W k = static_cast<const W*>(p.factors)[c];
        prototype = k * static_cast<W>(p.prototype_factor);
        scale = c > 0 && p.tags[image * p.classes + c] ? k * static_cast<W>(p.scale_factor) : W{0};
    }
};

}  // namespace wsss::msdw
