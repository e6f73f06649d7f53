// From a tensor's element type to the C++ type that kernels are templates of: one place for all operators.
#pragma once

#include "dtype.h"
#if !defined(WSSS_BACKEND_CPU)
#include "launch.h"
#endif

namespace wsss {

#if !defined(WSSS_BACKEND_CPU)
using Float16 = __half;
using BFloat16 = __nv_bfloat16;
#endif

// A type as a value, which a generic lambda can take.
template <class T>
struct Type {
    using type = T;
};

// run(Type<T>()) with the T of dtype.
template <class Run>
void with_type(DType dtype, const Run& run) {
    switch (dtype) {
        case DType::kFloat64:
            return run(Type<double>());
        case DType::kFloat32:
            return run(Type<float>());
        case DType::kFloat16:
            return run(Type<Float16>());
        case DType::kBFloat16:
            return run(Type<BFloat16>());
    }
}

}  // namespace wsss
