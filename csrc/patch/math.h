// Where a row of a patch lies in the image: the arithmetic that all backends share.
#pragma once

#include "patch/op.h"

namespace wsss::patch {

struct Row {
    int64_t image_offset;  // of the row's first byte, from the image's first byte
    int64_t bytes;         // how many of the patch row's bytes lie inside the image: 0 for a row below it
};

// Row y of plane `plane` of the patch at (grid_row, grid_column) of image `image`.
WSSS_HOST_DEVICE Row locate(const Params& p, int64_t image, int64_t grid_row, int64_t grid_column,
                            int64_t plane, int64_t y) {
    const int64_t image_y = grid_row * p.patch_height + y;
    const int64_t left = grid_column * p.patch_row_bytes;
    const int64_t inside = p.row_bytes - left;
    Row row;
    row.image_offset = image * p.image_stride + plane * p.plane_stride + image_y * p.row_stride + left;
    row.bytes = image_y >= p.height || inside <= 0 ? 0
                : inside < p.patch_row_bytes       ? inside
                                                   : p.patch_row_bytes;
    return row;
}

}  // namespace wsss::patch
