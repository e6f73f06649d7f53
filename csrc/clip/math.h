// The arithmetic of clip_features that all backends share. NaN compares false with everything, so it is never
// a maximum and never above a limit.
#pragma once

#include <cmath>

#include "clip/op.h"

namespace wsss::clip {

template <class W>
WSSS_HOST_DEVICE W larger_number(W maximum, W value) {
    return value > maximum ? value : maximum;
}

// The maximum of no numbers.
template <class W>
WSSS_HOST_DEVICE W lowest() {
    return -static_cast<W>(INFINITY);
}

// In double, where no beta > 0 becomes 0 and turns an infinite maximum into NaN. Never -0, so that limits can
// be compared as integers.
template <class T>
WSSS_HOST_DEVICE T find_limit(double beta, wide<T> maximum) {
    const T limit(static_cast<wide<T>>(beta * static_cast<double>(maximum)));
    return T(static_cast<wide<T>>(limit) + wide<T>{0});
}

}  // namespace wsss::clip
