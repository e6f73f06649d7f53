// msdw_loss: what a backend is asked to do. A map is one class of one image; map 0 is the background.
#pragma once

#include "dtype.h"

namespace wsss::msdw {

constexpr double kMaximumEpsilon = 1e-5;  // beside the maximum that a map is divided by

struct Cam {  // [images][classes][height][width]
    const void* data;
    Strides strides;
};
struct Gradient {
    void* data;
    Strides strides;
};

struct Params {
    DType dtype;  // of all cams
    int64_t images, classes;
    int64_t height, width;              // of cam_w and cam_p
    int64_t small_height, small_width;  // of cam_w_small
    Cam cam_w, cam_p, cam_w_small;
    const bool* tags;                       // [images][classes]
    const void* factors;                    // wide [classes]
    double prototype_factor, scale_factor;  // of a pixel's difference, besides

    void* maxima;   // wide [images][classes]: of cam_p; written by the forward
    double* parts;  // [images][classes]: each map's loss; written by the forward

    // backward
    const void* loss_gradient;  // wide, one number
    Gradient cam_w_gradient, cam_p_gradient, cam_w_small_gradient;
};

WSSS_OPERATION(forward, Params)
WSSS_OPERATION(backward, Params)

}  // namespace wsss::msdw
