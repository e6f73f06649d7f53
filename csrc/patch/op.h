// patch_split and patch_merge: what a backend is asked to do. Everything is counted in bytes, so the operator
// knows no element types, and NCHW and channels_last are one case:
//
//   image    [images][planes][height][row of pixels]   image_stride, plane_stride, row_stride; rows dense
//   patches  [images][grid_h][grid_w][planes][patch_height][row of pixels]   dense
//
// NCHW has D planes with pixels of one element, channels_last one plane with pixels of D elements. Patch rows
// and columns beyond the image are zero after a split and left out by a merge.
#pragma once

#include "common.h"

namespace wsss::patch {

struct Params {
    const char* from;  // split: the image; merge: the patches
    char* to;          // split: the patches; merge: the image
    int64_t images, grid_h, grid_w, planes;
    int64_t height, patch_height;                    // in rows
    int64_t row_bytes, patch_row_bytes;              // dense rows of the image and of a patch
    int64_t image_stride, plane_stride, row_stride;  // of the image, in bytes
};

WSSS_OPERATION(split, Params)
WSSS_OPERATION(merge, Params)

}  // namespace wsss::patch
