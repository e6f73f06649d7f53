// Included by bindings.cpp alone.
#pragma once

#include <algorithm>
#include <utility>

#include "binding.h"
#include "ocr/op.h"

namespace wsss {
namespace {

// settings: log of the threshold, margin and scale.
ocr::Params ocr_params(const TensorView& logits, const TensorView& tags, const OptionalTensor& log_prior,
                       const std::array<double, 3>& settings, int64_t height, int64_t width,
                       bool align_corners) {
    ocr::Params p{};
    p.dtype = logits.dtype();
    p.images = logits.size(0);
    p.classes = logits.size(1);
    p.height = logits.size(2);
    p.width = logits.size(3);
    p.out_height = height;
    p.out_width = width;
    p.align_corners = align_corners;
    p.logits = logits.data();
    p.strides = strides_of(logits);
    p.tags = reinterpret_cast<const bool*>(tags.data());
    p.log_prior = data_or_null(log_prior);
    p.log_threshold = settings[0];
    p.margin = settings[1];
    p.scale = settings[2];
    constexpr int64_t limit = int64_t{1} << 30;  // kernels count these in 32 bits
    if (height * width > limit || p.images * ocr::blocks_per_image(p) > limit ||
        p.images * p.height * (std::max(p.width, width) / 64 + 1) > limit) {
        throw std::invalid_argument("more than 2^30 pixels of an image, or parts of all");
    }
    return p;
}

// loss: one number, the sum or the mean, or one per pixel; without it, winner and outside_sum: count alone.
void ocr_forward(const TensorView& logits, const TensorView& tags, const OptionalTensor& log_prior,
                 const OptionalTensor& ignore, const std::array<double, 3>& settings, int64_t height,
                 int64_t width, bool align_corners, bool mean, const OptionalTensor& loss,
                 const TensorView& count, const OptionalTensor& winner, const OptionalTensor& outside_sum,
                 const TensorView& part_loss, const TensorView& part_count, uint64_t where) {
    ocr::Params p = ocr_params(logits, tags, log_prior, settings, height, width, align_corners);
    p.ignore = static_cast<const bool*>(data_or_null(ignore));
    p.mean = mean;
    if (loss) (loss->rank() == 0 ? p.total : p.loss) = loss->data();
    p.count = reinterpret_cast<int64_t*>(count.data());
    p.winner = static_cast<int16_t*>(data_or_null(winner));
    p.outside_sum = data_or_null(outside_sum);
    p.part_loss = reinterpret_cast<double*>(part_loss.data());
    p.part_count = reinterpret_cast<int64_t*>(part_count.data());
    run(ocr::forward, p, logits, where);
}

void ocr_backward(const TensorView& logits, const TensorView& tags, const OptionalTensor& log_prior,
                  const std::array<double, 3>& settings, int64_t height, int64_t width, bool align_corners,
                  bool mean, const TensorView& loss_gradient, const TensorView& count,
                  const TensorView& winner, const TensorView& outside_sum, const TensorView& gradient,
                  const OptionalTensor& scratch, uint64_t where) {
    ocr::Params p = ocr_params(logits, tags, log_prior, settings, height, width, align_corners);
    p.mean = mean;
    p.loss_gradient = loss_gradient.data();
    p.gradient_per_pixel = loss_gradient.rank() > 0;
    p.count = reinterpret_cast<int64_t*>(count.data());
    p.winner = reinterpret_cast<int16_t*>(winner.data());
    p.outside_sum = outside_sum.data();
    p.gradient = gradient.data();
    p.gradient_strides = strides_of(gradient);
    p.scratch = data_or_null(scratch);
    run(ocr::backward, p, logits, where);
}

// How much scratch to bring: the forward's parts, and the wide numbers of a backward that resizes.
std::pair<int64_t, int64_t> ocr_scratch(const std::array<int64_t, 4>& logits_shape, int64_t height,
                                        int64_t width) {
    ocr::Params p{};
    p.images = logits_shape[0];
    p.classes = logits_shape[1];
    p.height = logits_shape[2];
    p.width = logits_shape[3];
    p.out_height = height;
    p.out_width = width;
    return {ocr::count_parts(p), ocr::count_scratch(p)};
}

void bind_ocr(py::module_& m) {
    m.def("ocr_forward", &ocr_forward, py::arg("logits"), py::arg("tags"), py::arg("log_prior"),
          py::arg("ignore"), py::arg("settings"), py::arg("height"), py::arg("width"),
          py::arg("align_corners"), py::arg("mean"), py::arg("loss"), py::arg("count"), py::arg("winner"),
          py::arg("outside_sum"), py::arg("part_loss"), py::arg("part_count"), py::arg("where"));
    m.def("ocr_backward", &ocr_backward, py::arg("logits"), py::arg("tags"), py::arg("log_prior"),
          py::arg("settings"), py::arg("height"), py::arg("width"), py::arg("align_corners"), py::arg("mean"),
          py::arg("loss_gradient"), py::arg("count"), py::arg("winner"), py::arg("outside_sum"),
          py::arg("gradient"), py::arg("scratch"), py::arg("where"));
    m.def("ocr_scratch", &ocr_scratch, py::arg("logits_shape"), py::arg("height"), py::arg("width"));
}

}  // namespace
}  // namespace wsss
