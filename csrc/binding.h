// What the rooms' bindings share: tensors in, a parameter struct out, and the call. Checks in bindings guard
// against mistakes of wsss_ops, not of its users, whose arguments it has checked.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>

#include "backend.h"
#include "common.h"
#include "tensor_view.h"

namespace wsss {
namespace {

namespace py = pybind11;

// A kernel's launch or loops, without the interpreter's lock and on the tensors' device.
template <class Params>
void run(void (*operation)(const Params&, const Where&), const Params& params, const TensorView& tensor,
         uint64_t where) {
    const py::gil_scoped_release unlocked;
    const DeviceGuard guard(tensor.device());
    operation(params, make_where(where));
}

using OptionalTensor = std::optional<TensorView>;

[[maybe_unused]] void* data_or_null(const OptionalTensor& tensor) {
    return tensor ? tensor->data() : nullptr;
}

[[maybe_unused]] Strides strides_of(const TensorView& tensor) {
    return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

[[maybe_unused]] Strides strides_or_zeros(const OptionalTensor& tensor) {
    return tensor ? strides_of(*tensor) : Strides{};
}

}  // namespace
}  // namespace wsss
