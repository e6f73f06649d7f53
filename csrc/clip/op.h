// clip_features: what a backend is asked to do. An image is a dense run of numbers, whatever the order of its
// dimensions; it is walked in chunks, the last of which may be shorter.
//
//   x         [images][elements]   image_stride apart (0 where all are one), images dense
//   limits    [images]             the least number that beta allows, in the type of x
//   maxima    [images][chunks]     of each chunk, in the wide type
//   the rest  [images][elements]   dense, or x_gradient's source gradient_stride apart
#pragma once

#include "dtype.h"

namespace wsss::clip {

struct Params {
    DType dtype;
    int64_t images, elements;
    int64_t chunks, chunk_elements;
    const void* x;
    int64_t image_stride;  // in elements, as gradient_stride
    void* limits;          // written by clip, read by differentiate

    // clip
    double beta;
    void* maxima;
    void* clipped;  // may be x itself

    // differentiate
    const void* gradient;
    int64_t gradient_stride;
    void* x_gradient;  // may be gradient itself
};

// limits = beta * the images' maxima, NaN left aside; clipped = min(x, limits), NaN where x is.
WSSS_OPERATION(clip, Params)
// x_gradient = gradient where !(x > limits), elsewhere zero.
WSSS_OPERATION(differentiate, Params)

}  // namespace wsss::clip
