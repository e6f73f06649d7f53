// ocr_loss: what a backend is asked to do.
//
//   logits        [images][classes][height][width]          any strides
//   tags          [images][classes]                         whether a class is annotated
//   log_prior     [classes][classes]                        row: candidate, column: predicted class
//   ignore, loss, winner, outside_sum  [images][out_height][out_width]
//   gradient      as logits                                 NCHW or channels_last
//
// All but tags, ignore and winner are in the type of the logits or, where it says so, in the wide one.
#pragma once

#include "dtype.h"

namespace wsss::ocr {

struct Params {
    DType dtype;
    int64_t images, classes;
    int64_t height, width;          // of the logits
    int64_t out_height, out_width;  // of the loss: another size means that the logits are resized bilinearly
    bool align_corners;
    const void* logits;
    Strides strides;
    const bool* tags;
    const void* log_prior;  // wide; or null
    double log_threshold;   // -inf for 0
    double margin, scale;

    // What the forward leaves for the backward: the predicted class of an out-of-candidate pixel, -1
    // elsewhere, and its sum over the untagged classes i of exp(scale * (s_i - s_winner)).
    int16_t* winner;
    void* outside_sum;  // wide

    bool mean;       // over out-of-candidate pixels
    int64_t* count;  // of them: written by the forward, read by the backward of a mean

    // forward
    const bool* ignore;   // or null
    void* loss;           // wide, of each pixel; or null
    void* total;          // wide, one number; or null
    double* part_loss;    // scratch: sums and
    int64_t* part_count;  // counts of count_parts() parts

    // backward
    const void* loss_gradient;  // wide: one number, or as many as pixels
    bool gradient_per_pixel;
    void* gradient;
    Strides gradient_strides;
    void* scratch;  // wide, count_scratch() numbers; or null
};

inline bool is_resized(const Params& p) { return p.out_height != p.height || p.out_width != p.width; }

// The forward sums the loss in parts that do not depend on the number of threads: blocks of pixels of an
// image, or the rows of the loss that read the same rows of the logits.
constexpr int64_t kBlockPixels = 512;

inline int64_t blocks_per_image(const Params& p) {
    return ceil_div(p.out_height * p.out_width, kBlockPixels);
}
inline int64_t count_parts(const Params& p) {
    const int64_t blocks = blocks_per_image(p);
    return p.images * (is_resized(p) && p.height > blocks ? p.height : blocks);
}

// Where the logits are resized, the rows of the loss that read the same row of logits and the one below sum
// the gradients of both in `shares`: [images][height][2][classes][count_slots()]. On CUDA a row's columns are
// summed in chunks, each with slots of its own, and statistics of each pixel lie behind the shares.
#if defined(WSSS_BACKEND_CPU)
constexpr int64_t kStatistics = 0;
inline int64_t count_slots(const Params& p) { return p.width; }
#else
constexpr int64_t kStatistics = 5;
constexpr int64_t kChunk = 128;                    // columns of the loss
inline int64_t slots_per_chunk(const Params& p) {  // the columns of the logits that a chunk reads, at most
    const int64_t most = kChunk * p.width / p.out_width + 3;
    return most < p.width ? most : p.width;
}
inline int64_t count_slots(const Params& p) { return ceil_div(p.out_width, kChunk) * slots_per_chunk(p); }
#endif
inline int64_t count_shares(const Params& p) { return p.images * p.height * 2 * p.classes * count_slots(p); }
inline int64_t count_scratch(const Params& p) {
    return count_shares(p) + kStatistics * p.images * p.out_height * p.out_width;
}

// loss or total and count, and what the backward needs; winner null: count alone.
WSSS_OPERATION(forward, Params)
WSSS_OPERATION(backward, Params)

}  // namespace wsss::ocr
