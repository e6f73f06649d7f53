// What all backends share. Notation of wsss_ops.prototype_cam: F the feature of a pixel, P a class's
// prototype, g the gradient of y = relu(cos), cos = F.P / (f p), f = max(|F|, eps), p = max(|P|, eps).
// With w = g / f where y > 0 and else 0,
//   dF = sum over classes of w P / p  -  F / |F| * sum of w y
//   dP = (sum over pixels of w F  -  P / |P| * sum of g y) / p,
// and each pixel of a class gets dP / (their number) besides.
#pragma once

#include <cmath>

#include "prototype/op.h"
#include "resize.h"

namespace wsss::prototype {

// relu, and NaN where that is what comes in.
template <class W>
WSSS_HOST_DEVICE bool passes(W cosine) {
    return !(cosine <= 0);
}

template <class W>
WSSS_HOST_DEVICE W at_least_epsilon(W length) {
    return length < static_cast<W>(kCosineEpsilon) ? static_cast<W>(kCosineEpsilon) : length;
}

template <class W>
WSSS_HOST_DEVICE W find_weight(W gradient, W cosine, W length) {
    return passes(cosine) ? gradient / at_least_epsilon(length) : W{0};
}

// A vector has no direction where its length is 0, and no gradient through that.
template <class W>
WSSS_HOST_DEVICE W divide_by_length(W number, W length) {
    return length > 0 ? number / length : W{0};
}

// What each pixel of a class gets through its prototype, of one channel; sums over the class's pixels: of w F
// in that channel, and of w f y.
template <class W>
WSSS_HOST_DEVICE W find_share(W sum, W along, W prototype, W length, int32_t count) {
    return (sum - divide_by_length(along * prototype, length)) / at_least_epsilon(length) /
           static_cast<W>(count);
}

// Whether a number comes before the largest so far as torch.argmax has it: NaN is larger than all.
template <class W>
WSSS_HOST_DEVICE bool is_larger(W number, W largest) {
    return number > largest || (number != number && largest == largest);
}

WSSS_HOST_DEVICE int64_t nearest(int64_t out, int64_t in_size, int64_t out_size) {
    return out * in_size / out_size;
}

template <class W>
WSSS_HOST_DEVICE W find_scale(W squares) {
    return 1 / (std::sqrt(squares) + static_cast<W>(kNormEpsilon));
}

// The gradient of a normalised level: `gradient` of a number after normalisation, dot = sum over the pixel's
// channels of number * gradient.
template <class W>
WSSS_HOST_DEVICE W find_level_gradient(W gradient, W number, W dot, W squares) {
    const W scale = find_scale(squares);
    return scale * gradient - divide_by_length(number * (dot * scale * scale), std::sqrt(squares));
}

}  // namespace wsss::prototype
