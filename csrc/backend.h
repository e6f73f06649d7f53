// The little that differs between the modules beside their kernels: how a call says where it runs, whose
// device is current, and what the module tells about itself. Included by bindings.cpp alone.
#pragma once

#include <pybind11/pybind11.h>

#include "common.h"

#if defined(WSSS_BACKEND_CUDA)
#include <cuda_runtime_api.h>

#include <stdexcept>
#elif defined(WSSS_BACKEND_EMULATED)
#include "emulation/engine.h"
#endif

namespace wsss {

#if defined(WSSS_BACKEND_CUDA)

// `where` is PyTorch's current stream of the tensors' device.
inline Where make_where(uint64_t where) {
    Where result;
    result.stream =
        reinterpret_cast<void*>(where);  // NOLINT(performance-no-int-to-ptr): a handle, not an address
    return result;
}

// Makes a device current, and the one before it again at the end.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_));
        if (device != previous_) check(cudaSetDevice(device));
        changed_ = device != previous_;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    static void check(cudaError_t error) {
        if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
    }
    int previous_ = 0;
    bool changed_ = false;
};

inline void bind_backend(pybind11::module_& m) {
    m.attr("runtime_version") = CUDART_VERSION;
    m.attr("architectures") = WSSS_CUDA_ARCHITECTURES;
}

#else

// `where` is the number of threads, PyTorch's own.
inline Where make_where(uint64_t where) {
    Where result;
    result.threads = static_cast<int>(where);
    return result;
}

struct DeviceGuard {
    explicit DeviceGuard(int /*device*/) {}
};

#if defined(WSSS_BACKEND_CPU)
inline void bind_backend(pybind11::module_& m) {
    m.def("levels", &cpu_levels);
    m.def("level", &cpu_level_name);
    m.def("set_level", &set_cpu_level);
}
#else
inline void bind_backend(pybind11::module_& m) { m.def("set_seed", &emulation::set_seed); }
#endif

#endif

}  // namespace wsss
