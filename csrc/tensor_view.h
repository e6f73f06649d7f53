// A tensor seen from C++: pointer, shape, strides, element type and device, taken from Python through DLPack.
// This is the only file that knows that Python tensors exist; no PyTorch header or library is involved, so
// one binary serves every PyTorch release. DLPack drops the conjugate and negative bits: the callers in
// wsss_ops never pass tensors that carry them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace wsss {

namespace dlpack {  // the C structures of the DLPack standard, version 0.x ("dltensor" capsules)

struct Device {
    int32_t type;
    int32_t id;
};
struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};
struct Tensor {
    void* data;
    Device device;
    int32_t rank;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};
struct ManagedTensor {
    Tensor tensor;
    void* context;
    void (*deleter)(ManagedTensor*);
};
constexpr int32_t kCpu = 1;
constexpr int32_t kCuda = 2;

}  // namespace dlpack

class TensorView {
  public:
    TensorView() = default;
    explicit TensorView(pybind11::handle tensor) {
        // torch.utils.dlpack.to_dlpack, unlike Tensor.__dlpack__, takes tensors that require grad, in 0.3 us.
        PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<pybind11::object> to_dlpack;
        capsule_ = to_dlpack
                       .call_once_and_store_result(
                           [] { return pybind11::module_::import("torch.utils.dlpack").attr("to_dlpack"); })
                       .get_stored()(tensor);
        auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
        if (managed == nullptr) throw pybind11::error_already_set();
        tensor_ = &managed->tensor;
#if defined(WSSS_BACKEND_CUDA)
        constexpr int32_t expected = dlpack::kCuda;
#else
        constexpr int32_t expected = dlpack::kCpu;
#endif
        if (tensor_->device.type != expected) {
            throw std::invalid_argument("a tensor of DLPack device type " +
                                        std::to_string(tensor_->device.type) +
                                        " reached the module of type " + std::to_string(expected));
        }
    }

    char* data() const { return static_cast<char*>(tensor_->data) + tensor_->byte_offset; }
    int rank() const { return tensor_->rank; }
    int64_t size(int i) const { return tensor_->shape[i]; }
    // In elements; 0 where there is but one position, whose stride PyTorch sets as it likes.
    int64_t stride(int i) const { return size(i) > 1 ? tensor_->strides[i] : 0; }
    int64_t elements() const {
        int64_t product = 1;
        for (int i = 0; i < rank(); ++i) product *= size(i);
        return product;
    }
    int64_t element_bytes() const { return tensor_->dtype.bits / 8; }
    // Of a floating-point tensor.
    DType dtype() const {
        constexpr uint8_t floating = 2, bfloat = 4;
        const dlpack::DataType type = tensor_->dtype;
        if (type.code == floating && type.bits == 64) return DType::kFloat64;
        if (type.code == floating && type.bits == 32) return DType::kFloat32;
        if (type.code == floating && type.bits == 16) return DType::kFloat16;
        if (type.code == bfloat && type.bits == 16) return DType::kBFloat16;
        throw std::invalid_argument("a tensor of DLPack type " + std::to_string(type.code) + " with " +
                                    std::to_string(type.bits) + " bits is none of floating point");
    }
    int device() const { return tensor_->device.id; }

  private:
    pybind11::object capsule_;  // owns the exported tensor until the view goes
    const dlpack::Tensor* tensor_ = nullptr;
};

}  // namespace wsss

namespace pybind11::detail {

template <>
struct type_caster<wsss::TensorView> {
    PYBIND11_TYPE_CASTER(wsss::TensorView, const_name("torch.Tensor"));
    bool load(handle source, bool /*convert*/) {
        value = wsss::TensorView(source);
        return true;
    }
};

}  // namespace pybind11::detail
