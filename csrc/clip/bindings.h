// Included by bindings.cpp alone.
#pragma once

#include "binding.h"
#include "clip/op.h"

namespace wsss {
namespace {

// Chunks start at multiples of 64 numbers, for whole vectors and cache lines of every type.
clip::Params clip_params(const TensorView& x, const TensorView& limits, int64_t chunks) {
    clip::Params p{};
    p.dtype = x.dtype();
    p.images = x.size(0);
    p.elements = x.size(1) * x.size(2) * x.size(3);
    p.chunk_elements = 64 * ceil_div<int64_t>(ceil_div(p.elements, chunks), 64);
    p.chunks = ceil_div(p.elements, p.chunk_elements);
    p.x = x.data();
    p.image_stride = x.stride(0);
    p.limits = limits.data();
    if (p.images * p.chunks > int64_t{1} << 30) {  // kernels count these in 32 bits
        throw std::invalid_argument("more than 2^30 chunks of images");
    }
    return p;
}

// Of what is not empty.
void clip_features(const TensorView& x, double beta, const TensorView& clipped, const TensorView& limits,
                   const TensorView& maxima, uint64_t where) {
    clip::Params p = clip_params(x, limits, maxima.size(1));
    p.beta = beta;
    p.maxima = maxima.data();
    p.clipped = clipped.data();
    run(clip::clip, p, x, where);
}

void clip_features_backward(const TensorView& gradient, const TensorView& x, const TensorView& limits,
                            const TensorView& x_gradient, int64_t chunks, uint64_t where) {
    clip::Params p = clip_params(x, limits, chunks);
    p.gradient = gradient.data();
    p.gradient_stride = gradient.stride(0);
    p.x_gradient = x_gradient.data();
    run(clip::differentiate, p, x, where);
}

void bind_clip(py::module_& m) {
    m.def("clip_features", &clip_features, py::arg("x"), py::arg("beta"), py::arg("clipped"),
          py::arg("limits"), py::arg("maxima"), py::arg("where"));
    m.def("clip_features_backward", &clip_features_backward, py::arg("gradient"), py::arg("x"),
          py::arg("limits"), py::arg("x_gradient"), py::arg("chunks"), py::arg("where"));
}

}  // namespace
}  // namespace wsss
