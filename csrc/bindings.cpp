// The one Python binding. Compiled once per backend (WSSS_BACKEND_CPU, _CUDA or _EMULATED), it gives each
// module the same functions: wsss_ops checks arguments, allocates outputs and passes both as tensors, here
// they become the parameter structs of the operators. Checks here guard against mistakes of wsss_ops, not of
// its users.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "backend.h"
#include "common.h"
#include "deform/op.h"
#include "patch/op.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace wsss {
namespace {

// A kernel's launch or loops, without the interpreter's lock and on the tensors' device.
template <class Params>
void run(void (*operation)(const Params&, const Where&), const Params& params, const TensorView& tensor,
         uint64_t where) {
    const py::gil_scoped_release unlocked;
    const DeviceGuard guard(tensor.device());
    operation(params, make_where(where));
}

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

using OptionalTensor = std::optional<TensorView>;

void* data_or_null(const OptionalTensor& tensor) { return tensor ? tensor->data() : nullptr; }

// Of a tensor [image, channel, y, x]; zeros where there is none.
deform::Strides strides(const OptionalTensor& tensor) {
    if (!tensor) return {};
    return {tensor->stride(0), tensor->stride(1), tensor->stride(2), tensor->stride(3)};
}

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
    p.input_strides = strides(input);
    p.offset = offset.data();
    p.offset_strides = strides(offset);
    p.mask = data_or_null(mask);
    p.mask_strides = strides(mask);
    return p;
}

void set_gradients(deform::Params& p, const OptionalTensor& offset, const OptionalTensor& mask,
                   const OptionalTensor& input) {
    p.offset_gradient = data_or_null(offset);
    p.offset_gradient_strides = strides(offset);
    p.mask_gradient = data_or_null(mask);
    p.mask_gradient_strides = strides(mask);
    p.input_gradient = data_or_null(input);
}

#if defined(WSSS_BACKEND_CPU)

void deform_convolve(const TensorView& input, const TensorView& offset, const OptionalTensor& mask,
                     const DeformSettings& settings, const TensorView& weight, const OptionalTensor& bias,
                     const TensorView& packed, const TensorView& output, uint64_t where) {
    deform::Params p = deform_params(input, offset, mask, settings);
    p.outputs = weight.size(0);
    p.weight = weight.data();
    p.weight_strides = strides(weight);
    p.bias = data_or_null(bias);
    p.packed = packed.data();
    p.output = output.data();
    p.output_strides = strides(output);
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
    p.weight_strides = strides(weight);
    p.packed = packed.data();
    p.gradient = gradient.data();
    set_gradients(p, offset_gradient, mask_gradient, input_gradient);
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
    p.weight_gradient_strides = strides(weight_gradient);
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

// Of the chunk of `count` output pixels from `first` on.
deform::Params deform_params(const TensorView& input, const TensorView& offset, const OptionalTensor& mask,
                             const DeformSettings& settings, int64_t first, int64_t count) {
    deform::Params p = deform_params(input, offset, mask, settings);
    p.first = first;
    p.count = count;
    const deform::Shape& s = p.shape;
    constexpr int64_t limit = int64_t{1} << 31;  // kernels count these in 32 bits
    if (s.images * s.out_height * s.out_width >= limit ||
        s.images * s.height * s.width * s.offset_groups >= limit ||
        count * s.offset_groups * s.kernel_h * s.kernel_w >= limit) {
        throw std::invalid_argument("2^31 pixels or samples of a chunk, or more");
    }
    return p;
}

void deform_sample(const TensorView& input, const TensorView& offset, const OptionalTensor& mask,
                   const DeformSettings& settings, int64_t first, const TensorView& columns, uint64_t where) {
    deform::Params p = deform_params(input, offset, mask, settings, first, columns.size(0));
    p.columns = columns.data();
    run(deform::sample, p, input, where);
}

void deform_differentiate(const TensorView& input, const TensorView& offset, const OptionalTensor& mask,
                          const DeformSettings& settings, int64_t first, const TensorView& columns,
                          const OptionalTensor& offset_gradient, const OptionalTensor& mask_gradient,
                          const OptionalTensor& input_gradient, uint64_t where) {
    deform::Params p = deform_params(input, offset, mask, settings, first, columns.size(0));
    p.columns = columns.data();
    set_gradients(p, offset_gradient, mask_gradient, input_gradient);
    run(deform::differentiate, p, input, where);
}

void deform_find_targets(const TensorView& input, const TensorView& offset, const OptionalTensor& mask,
                         const DeformSettings& settings, int64_t first, const TensorView& targets,
                         const TensorView& weights, uint64_t where) {
    deform::Params p = deform_params(input, offset, mask, settings, first, targets.size(0));
    p.targets = reinterpret_cast<int64_t*>(targets.data());
    p.weights = weights.data();
    run(deform::find_targets, p, input, where);
}

void deform_gather(const TensorView& input, const TensorView& offset, const DeformSettings& settings,
                   const TensorView& columns, const TensorView& weights, const TensorView& order,
                   const TensorView& starts, const TensorView& input_gradient, uint64_t where) {
    deform::Params p = deform_params(input, offset, {}, settings, 0, columns.size(0));
    p.columns = columns.data();
    p.weights = weights.data();
    p.order = reinterpret_cast<const int64_t*>(order.data());
    p.starts = reinterpret_cast<const int64_t*>(starts.data());
    p.input_gradient = input_gradient.data();
    run(deform::gather, p, input, where);
}

void bind_deform(py::module_& m) {
    m.def("deform_sample", &deform_sample, py::arg("input"), py::arg("offset"), py::arg("mask"),
          py::arg("settings"), py::arg("first"), py::arg("columns"), py::arg("where"));
    m.def("deform_differentiate", &deform_differentiate, py::arg("input"), py::arg("offset"), py::arg("mask"),
          py::arg("settings"), py::arg("first"), py::arg("columns"), py::arg("offset_gradient"),
          py::arg("mask_gradient"), py::arg("input_gradient"), py::arg("where"));
    m.def("deform_find_targets", &deform_find_targets, py::arg("input"), py::arg("offset"), py::arg("mask"),
          py::arg("settings"), py::arg("first"), py::arg("targets"), py::arg("weights"), py::arg("where"));
    m.def("deform_gather", &deform_gather, py::arg("input"), py::arg("offset"), py::arg("settings"),
          py::arg("columns"), py::arg("weights"), py::arg("order"), py::arg("starts"),
          py::arg("input_gradient"), py::arg("where"));
}

#endif

}  // namespace
}  // namespace wsss

PYBIND11_MODULE(WSSS_MODULE, m) {
    m.doc() = "Operators of one wsss_ops backend; called by the functions of the package, not by users.";
    wsss::bind_backend(m);
    m.def("patch_split", &wsss::patch_split, py::arg("image"), py::arg("patches"), py::arg("grid_h"),
          py::arg("grid_w"), py::arg("channels_last"), py::arg("where"));
    m.def("patch_merge", &wsss::patch_merge, py::arg("patches"), py::arg("image"), py::arg("grid_h"),
          py::arg("grid_w"), py::arg("channels_last"), py::arg("where"));
    wsss::bind_deform(m);
}
