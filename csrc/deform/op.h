// Deformable convolution around its matrix products, which PyTorch computes: what a backend is asked to do.
//
//   columns  [count][groups][taps][channels / groups]   dense; the chunk of `count` output pixels from
//   `first` on input    [images][height][width][channels]          any strides, channels dense offset
//   [images][2 * offset_groups * taps][out_height][out_width]   any strides, y before x mask
//   [images][offset_groups * taps][out_height][out_width]       any strides, or null: all ones
//
// Output pixels are counted over all images. Offsets, masks and every gradient but that of the columns are in
// the wide type of the element type: double for double, float for the others.
#pragma once

#include "dtype.h"

namespace wsss::deform {

struct Shape {
    int64_t images, channels, height, width;
    int64_t out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
    int64_t groups, offset_groups;
};

struct Strides {  // in elements
    int64_t image, channel, y, x;
};

struct Params {
    DType dtype;  // of input and columns
    Shape shape;
    const void* input;
    Strides input_strides;  // channel: 1
    const void* offset;
    Strides offset_strides;
    const void* mask;
    Strides mask_strides;
    void* columns;
    int64_t first, count;

    // What a gradient is wanted of; null where it is not.
    void* offset_gradient;
    Strides offset_gradient_strides;
    void* mask_gradient;
    Strides mask_gradient_strides;
    void* input_gradient;  // [images][height][width][channels], dense; is added to

    // The deterministic way to the input's gradient: 4 corners per sample, in the order pixel, offset group,
    // tap.
    int64_t* targets;  // (image pixel) * offset_groups + group; images * height * width * offset_groups: none
    void* weights;     // of the corners
    const int64_t* order;   // of the corners, by target
    const int64_t* starts;  // of each target's corners in `order`, and the end
};

// columns = the samples of the input.
WSSS_OPERATION(sample, Params)
// offset_gradient, mask_gradient = from the columns' gradient in `columns`; input_gradient += likewise.
WSSS_OPERATION(differentiate, Params)
#if !defined(WSSS_BACKEND_CPU)  // which adds in a fixed order anyway
// targets, weights = of the samples' corners.
WSSS_OPERATION(find_targets, Params)
// input_gradient += from the columns' gradient, each target's corners in their order.
WSSS_OPERATION(gather, Params)
#endif

}  // namespace wsss::deform
