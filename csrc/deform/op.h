// Deformable convolution: what a backend is asked to do. The CPU multiplies samples while they are in its
// caches. CUDA does so in shared memory where it can (`multiply`), else it lays samples out in columns, chunk
// by chunk, which PyTorch multiplies.
//
//   input    [images][height][width][channels]          any strides, channels dense
//   offset   [images][2 * offset_groups * taps][out_height][out_width]   any strides, y before x
//   mask     [images][offset_groups * taps][out_height][out_width]       any strides, or null: all ones
//
// Output pixels are counted over all images. Offsets, masks and all gradients but that of the columns are in
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

struct Params {
    DType dtype;  // of input, output and columns
    Shape shape;
    const void* input;
    Strides input_strides;  // channel: 1
    const void* offset;
    Strides offset_strides;
    const void* mask;
    Strides mask_strides;

    // Gradients; null where one is not wanted.
    void* offset_gradient;
    Strides offset_gradient_strides;
    void* mask_gradient;
    Strides mask_gradient_strides;
    void* input_gradient;  // [images][height][width][channels], dense; is added to

#if defined(WSSS_BACKEND_CPU)
    int64_t outputs;     // output channels
    const void* weight;  // [outputs][channels / groups][kernel_h][kernel_w] of the element type
    Strides weight_strides;
    const void* bias;  // [outputs] of the wide type, or null
    void* output;
    Strides output_strides;
    const void* gradient;   // of the output, [output pixels][outputs] of the wide type, dense
    void* packed;           // packed_size(...) numbers of the wide type, for the weight in panels
    void* weight_gradient;  // of the wide type
    Strides weight_gradient_strides;
#else
    // `multiply` alone
    int64_t outputs;
    const void* weight;  // [outputs][taps][channels], dense, 16-byte aligned
    const void* bias;    // [outputs] of the element type, or null
    void* output;        // [count][outputs], dense
    bool as_tf32;        // whether floats may be rounded so

    void* columns;            // [count][groups][taps][channels / groups], dense
    int64_t first, count;     // output pixels
    int64_t first_tap, taps;  // of kernel_h * kernel_w
    // The input's gradient deterministically: 4 corners a sample, in the order pixel, offset group, tap.
    int64_t* targets;       // (image pixel) * offset_groups + group; or, for none, one more than all of them
    void* weights;          // of the corners
    const int64_t* order;   // of the corners, by target
    const int64_t* starts;  // of each target's corners in `order`, and the end
#endif
};

#if defined(WSSS_BACKEND_CPU)

// output = bias + weight * samples.
WSSS_OPERATION(convolve, Params)
// offset_gradient, mask_gradient = from the output's; input_gradient += likewise.
WSSS_OPERATION(differentiate, Params)
// weight_gradient = from the output's.
WSSS_OPERATION(differentiate_weight, Params)

#else

// How many bytes of shared memory `multiply` needs for so many outputs.
int64_t product_bytes(int64_t outputs);
// output = bias + weight * samples, for 16-bit types and float32, one weight group, channels of an offset
// group that are a multiple of 16 bytes, an even number of outputs of at most 256, and 16-byte addresses and
// strides.
WSSS_OPERATION(multiply, Params)
// columns = the samples.
WSSS_OPERATION(sample, Params)
// offset_gradient, mask_gradient = from the columns' gradient in `columns`.
WSSS_OPERATION(differentiate, Params)
// input_gradient += from the columns' gradient, in any order.
WSSS_OPERATION(scatter, Params)
// targets, weights = of the samples' corners.
WSSS_OPERATION(find_targets, Params)
// input_gradient += from the columns' gradient, each target's corners in their order.
WSSS_OPERATION(gather, Params)

#endif

}  // namespace wsss::deform
