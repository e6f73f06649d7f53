// Included by bindings.cpp alone.
#pragma once

#include "binding.h"
#include "deform/op.h"

namespace wsss {
namespace {

// settings: kernel, stride, padding and dilation, each (y, x), then groups and offset groups.
using DeformSettings = std::array<int64_t, 10>;

deform::Params deform_params(const TensorView& input, const TensorView& offset, const OptionalTensor& mask,
                             const DeformSettings& settings) {
    const auto& [kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups,
                 offset_groups] = settings;
    deform::Params p{};
    p.dtype = input.dtype();
    p.shape = {input.size(0), input.size(1), input.size(2), input.size(3), offset.size(2), offset.size(3),
               kernel_h,      kernel_w,      stride_h,      stride_w,      padding_h,      padding_w,
               dilation_h,    dilation_w,    groups,        offset_groups};
    p.input = input.data();
    p.input_strides = strides_of(input);
    p.offset = offset.data();
    p.offset_strides = strides_of(offset);
    p.mask = data_or_null(mask);
    p.mask_strides = strides_or_zeros(mask);
    return p;
}

void set_gradients(deform::Params& p, const OptionalTensor& offset, const OptionalTensor& mask) {
    p.offset_gradient = data_or_null(offset);
    p.offset_gradient_strides = strides_or_zeros(offset);
    p.mask_gradient = data_or_null(mask);
    p.mask_gradient_strides = strides_or_zeros(mask);
}

#if defined(WSSS_BACKEND_CPU)

void deform_convolve(const TensorView& input, const TensorView& offset, const OptionalTensor& mask,
                     const DeformSettings& settings, const TensorView& weight, const OptionalTensor& bias,
                     const TensorView& packed, const TensorView& output, uint64_t where) {
    deform::Params p = deform_params(input, offset, mask, settings);
    p.outputs = weight.size(0);
    p.weight = weight.data();
    p.weight_strides = strides_of(weight);
    p.bias = data_or_null(bias);
    p.packed = packed.data();
    p.output = output.data();
    p.output_strides = strides_of(output);
    if (output.elements() > 0) run(deform::convolve, p, input, where);
}

void deform_differentiate(const TensorView& input, const TensorView& offset, const OptionalTensor& mask,
                          const DeformSettings& settings, const TensorView& weight, const TensorView& packed,
                          const TensorView& gradient, const OptionalTensor& offset_gradient,
                          const OptionalTensor& mask_gradient, const OptionalTensor& input_gradient,
                          uint64_t where) {
    deform::Params p = deform_params(input, offset, mask, settings);
    p.outputs = weight.size(0);
    p.weight = weight.data();
    p.weight_strides = strides_of(weight);
    p.packed = packed.data();
    p.gradient = gradient.data();
    set_gradients(p, offset_gradient, mask_gradient);
    p.input_gradient = data_or_null(input_gradient);
    if (gradient.elements() > 0) run(deform::differentiate, p, input, where);
}

void deform_differentiate_weight(const TensorView& input, const TensorView& offset,
                                 const OptionalTensor& mask, const DeformSettings& settings,
                                 const TensorView& gradient, const TensorView& weight_gradient,
                                 uint64_t where) {
    deform::Params p = deform_params(input, offset, mask, settings);
    p.outputs = weight_gradient.size(0);
    p.gradient = gradient.data();
    p.weight_gradient = weight_gradient.data();
    p.weight_gradient_strides = strides_of(weight_gradient);
    run(deform::differentiate_weight, p, input, where);
}

void bind_deform(py::module_& m) {
    m.def("deform_convolve", &deform_convolve, py::arg("input"), py::arg("offset"), py::arg("mask"),
          py::arg("settings"), py::arg("weight"), py::arg("bias"), py::arg("packed"), py::arg("output"),
          py::arg("where"));
    m.def("deform_differentiate", &deform_differentiate, py::arg("input"), py::arg("offset"), py::arg("mask"),
          py::arg("settings"), py::arg("weight"), py::arg("packed"), py::arg("gradient"),
          py::arg("offset_gradient"), py::arg("mask_gradient"), py::arg("input_gradient"), py::arg("where"));
    m.def("deform_differentiate_weight", &deform_differentiate_weight, py::arg("input"), py::arg("offset"),
          py::arg("mask"), py::arg("settings"), py::arg("gradient"), py::arg("weight_gradient"),
          py::arg("where"));
}

#else

constexpr int64_t kTooMany = int64_t{1} << 31;  // for kernels, which count in 32 bits

void check_pixels(const deform::Shape& s) {
    if (s.images * s.out_height * s.out_width >= kTooMany) {
        throw std::invalid_argument("2^31 output pixels, or more");
    }
}

void check_counts(const deform::Params& p) {
    const deform::Shape& s = p.shape;
    check_pixels(s);
    if (s.images * s.height * s.width * s.offset_groups >= kTooMany ||
        p.count * s.offset_groups * p.taps >= kTooMany) {
        throw std::invalid_argument("2^31 pixels or samples of a chunk, or more");
    }
}

// With columns of the output pixels from `first` on and of the taps from `first_tap` on, as many as there
// are: [pixels, groups, taps, channels / groups].
deform::Params deform_params(const TensorView& input, const TensorView& offset, const OptionalTensor& mask,
                             const DeformSettings& settings, int64_t first, int64_t first_tap,
                             const TensorView& columns) {
    deform::Params p = deform_params(input, offset, mask, settings);
    p.columns = columns.data();
    p.first = first;
    p.count = columns.size(0);
    p.first_tap = first_tap;
    p.taps = columns.size(2);
    check_counts(p);
    return p;
}

void deform_multiply(const TensorView& input, const TensorView& offset, const OptionalTensor& mask,
                     const DeformSettings& settings, const TensorView& weight, const OptionalTensor& bias,
                     const TensorView& output, bool as_tf32, uint64_t where) {
    deform::Params p = deform_params(input, offset, mask, settings);
    check_pixels(p.shape);
    p.count = output.size(0);
    p.taps = p.shape.kernel_h * p.shape.kernel_w;
    p.outputs = output.size(1);
    p.weight = weight.data();
    p.bias = data_or_null(bias);
    p.output = output.data();
    p.as_tf32 = as_tf32;
    run(deform::multiply, p, input, where);
}

void deform_sample(const TensorView& input, const TensorView& offset, const OptionalTensor& mask,
                   const DeformSettings& settings, int64_t first, int64_t first_tap,
                   const TensorView& columns, uint64_t where) {
    const deform::Params p = deform_params(input, offset, mask, settings, first, first_tap, columns);
    run(deform::sample, p, input, where);
}

void deform_differentiate(const TensorView& input, const TensorView& offset, const OptionalTensor& mask,
                          const DeformSettings& settings, int64_t first, const TensorView& columns,
                          const OptionalTensor& offset_gradient, const OptionalTensor& mask_gradient,
                          uint64_t where) {
    deform::Params p = deform_params(input, offset, mask, settings, first, 0, columns);
    set_gradients(p, offset_gradient, mask_gradient);
    run(deform::differentiate, p, input, where);
}

void deform_scatter(const TensorView& input, const TensorView& offset, const OptionalTensor& mask,
                    const DeformSettings& settings, int64_t first, const TensorView& columns,
                    const TensorView& input_gradient, uint64_t where) {
    deform::Params p = deform_params(input, offset, mask, settings, first, 0, columns);
    p.input_gradient = input_gradient.data();
    run(deform::scatter, p, input, where);
}

void deform_find_targets(const TensorView& input, const TensorView& offset, const OptionalTensor& mask,
                         const DeformSettings& settings, int64_t first, const TensorView& columns,
                         const TensorView& targets, const TensorView& weights, uint64_t where) {
    deform::Params p = deform_params(input, offset, mask, settings, first, 0, columns);
    p.targets = reinterpret_cast<int64_t*>(targets.data());
    p.weights = weights.data();
    run(deform::find_targets, p, input, where);
}

void deform_gather(const TensorView& input, const TensorView& offset, const DeformSettings& settings,
                   const TensorView& columns, const TensorView& weights, const TensorView& order,
                   const TensorView& starts, const TensorView& input_gradient, uint64_t where) {
    deform::Params p = deform_params(input, offset, {}, settings, 0, 0, columns);
    p.weights = weights.data();
    p.order = reinterpret_cast<const int64_t*>(order.data());
    p.starts = reinterpret_cast<const int64_t*>(starts.data());
    p.input_gradient = input_gradient.data();
    run(deform::gather, p, input, where);
}

void bind_deform(py::module_& m) {
    m.def("deform_product_bytes", &deform::product_bytes, py::arg("outputs"));
    m.def("deform_multiply", &deform_multiply, py::arg("input"), py::arg("offset"), py::arg("mask"),
          py::arg("settings"), py::arg("weight"), py::arg("bias"), py::arg("output"), py::arg("as_tf32"),
          py::arg("where"));
    m.def("deform_sample", &deform_sample, py::arg("input"), py::arg("offset"), py::arg("mask"),
          py::arg("settings"), py::arg("first"), py::arg("first_tap"), py::arg("columns"), py::arg("where"));
    m.def("deform_differentiate", &deform_differentiate, py::arg("input"), py::arg("offset"), py::arg("mask"),
          py::arg("settings"), py::arg("first"), py::arg("columns"), py::arg("offset_gradient"),
          py::arg("mask_gradient"), py::arg("where"));
    m.def("deform_scatter", &deform_scatter, py::arg("input"), py::arg("offset"), py::arg("mask"),
          py::arg("settings"), py::arg("first"), py::arg("columns"), py::arg("input_gradient"),
          py::arg("where"));
    m.def("deform_find_targets", &deform_find_targets, py::arg("input"), py::arg("offset"), py::arg("mask"),
          py::arg("settings"), py::arg("first"), py::arg("columns"), py::arg("targets"), py::arg("weights"),
          py::arg("where"));
    m.def("deform_gather", &deform_gather, py::arg("input"), py::arg("offset"), py::arg("settings"),
          py::arg("columns"), py::arg("weights"), py::arg("order"), py::arg("starts"),
          py::arg("input_gradient"), py::arg("where"));
}

#endif

}  // namespace
}  // namespace wsss
