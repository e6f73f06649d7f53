// Included by bindings.cpp alone.
#pragma once

#include "binding.h"
#include "msdw/op.h"

namespace wsss {
namespace {

// cams: cam_w, cam_p and cam_w_small; settings: prototype_factor and scale_factor of csrc/msdw/op.h.
msdw::Params msdw_params(const std::array<TensorView, 3>& cams, const TensorView& tags,
                         const TensorView& factors, const std::array<double, 2>& settings,
                         const TensorView& maxima) {
    const auto& [cam_w, cam_p, cam_w_small] = cams;
    msdw::Params p{};
    p.dtype = cam_w.dtype();
    p.images = cam_w.size(0);
    p.classes = cam_w.size(1);
    p.height = cam_w.size(2);
    p.width = cam_w.size(3);
    p.small_height = cam_w_small.size(2);
    p.small_width = cam_w_small.size(3);
    p.cam_w = {cam_w.data(), strides_of(cam_w)};
    p.cam_p = {cam_p.data(), strides_of(cam_p)};
    p.cam_w_small = {cam_w_small.data(), strides_of(cam_w_small)};
    p.tags = reinterpret_cast<const bool*>(tags.data());
    p.factors = factors.data();
    p.prototype_factor = settings[0];
    p.scale_factor = settings[1];
    p.maxima = maxima.data();
    constexpr int64_t limit = int64_t{1} << 30;  // kernels count these in 32 bits
    if (p.images * p.classes > limit || p.height * p.width > limit ||
        p.small_height * p.small_width > limit) {
        throw std::invalid_argument("more than 2^30 maps, or pixels of one");
    }
    return p;
}

void msdw_forward(const std::array<TensorView, 3>& cams, const TensorView& tags, const TensorView& factors,
                  const std::array<double, 2>& settings, const TensorView& maxima, const TensorView& parts,
                  uint64_t where) {
    msdw::Params p = msdw_params(cams, tags, factors, settings, maxima);
    p.parts = reinterpret_cast<double*>(parts.data());
    run(msdw::forward, p, cams[0], where);
}

void msdw_backward(const TensorView& loss_gradient, const std::array<TensorView, 3>& cams,
                   const TensorView& tags, const TensorView& factors, const std::array<double, 2>& settings,
                   const TensorView& maxima, const std::array<TensorView, 3>& gradients, uint64_t where) {
    msdw::Params p = msdw_params(cams, tags, factors, settings, maxima);
    p.loss_gradient = loss_gradient.data();
    p.cam_w_gradient = {gradients[0].data(), strides_of(gradients[0])};
    p.cam_p_gradient = {gradients[1].data(), strides_of(gradients[1])};
    p.cam_w_small_gradient = {gradients[2].data(), strides_of(gradients[2])};
    run(msdw::backward, p, cams[0], where);
}

void bind_msdw(py::module_& m) {
    m.def("msdw_forward", &msdw_forward, py::arg("cams"), py::arg("tags"), py::arg("factors"),
          py::arg("settings"), py::arg("maxima"), py::arg("parts"), py::arg("where"));
    m.def("msdw_backward", &msdw_backward, py::arg("loss_gradient"), py::arg("cams"), py::arg("tags"),
          py::arg("factors"), py::arg("settings"), py::arg("maxima"), py::arg("gradients"), py::arg("where"));
}

}  // namespace
}  // namespace wsss
