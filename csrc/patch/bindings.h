// Included by bindings.cpp alone.
#pragma once

#include "binding.h"
#include "patch/op.h"

namespace wsss {
namespace {

patch::Params patch_params(const TensorView& image, const TensorView& patches, int64_t grid_h, int64_t grid_w,
                           bool channels_last) {
    const int64_t element = image.element_bytes();
    const int64_t pixel = channels_last ? element * image.size(1) : element;
    patch::Params p{};
    p.images = image.size(0);
    p.grid_h = grid_h;
    p.grid_w = grid_w;
    p.planes = channels_last ? 1 : image.size(1);
    p.height = image.size(2);
    p.patch_height = patches.size(2);
    p.row_bytes = image.size(3) * pixel;
    p.patch_row_bytes = patches.size(3) * pixel;
    p.image_stride = image.stride(0) * element;
    p.plane_stride = channels_last ? 0 : image.stride(1) * element;
    p.row_stride = image.stride(2) * element;
    constexpr int64_t limit = int64_t{1} << 30;  // kernels count these in 32 bits
    if (patches.size(0) > limit || p.planes * p.patch_height > limit || p.patch_row_bytes > limit) {
        throw std::invalid_argument("more than 2^30 patches, rows of a patch or bytes in a row");
    }
    return p;
}

void patch_split(const TensorView& image, const TensorView& patches, int64_t grid_h, int64_t grid_w,
                 bool channels_last, uint64_t where) {
    patch::Params p = patch_params(image, patches, grid_h, grid_w, channels_last);
    p.from = image.data();
    p.to = patches.data();
    if (patches.elements() > 0) run(patch::split, p, image, where);
}

void patch_merge(const TensorView& patches, const TensorView& image, int64_t grid_h, int64_t grid_w,
                 bool channels_last, uint64_t where) {
    patch::Params p = patch_params(image, patches, grid_h, grid_w, channels_last);
    p.from = patches.data();
    p.to = image.data();
    if (image.elements() > 0) run(patch::merge, p, image, where);
}

void bind_patch(py::module_& m) {
    m.def("patch_split", &patch_split, py::arg("image"), py::arg("patches"), py::arg("grid_h"),
          py::arg("grid_w"), py::arg("channels_last"), py::arg("where"));
    m.def("patch_merge", &patch_merge, py::arg("patches"), py::arg("image"), py::arg("grid_h"),
          py::arg("grid_w"), py::arg("channels_last"), py::arg("where"));
}

}  // namespace
}  // namespace wsss
