// The one Python module of a backend: compiled once with each of WSSS_BACKEND_CPU, _CUDA and _EMULATED, it
// gives all of them the same functions, except where a room says otherwise.
#include "deform/bindings.h"

#include "backend.h"
#include "clip/bindings.h"
#include "msdw/bindings.h"
#include "ocr/bindings.h"
#include "patch/bindings.h"
#include "prototype/bindings.h"

PYBIND11_MODULE(WSSS_MODULE, m) {
    m.doc() = "Operators of one wsss_ops backend; called by the functions of the package, not by users.";
    wsss::bind_backend(m);
    wsss::bind_clip(m);
    wsss::bind_deform(m);
    wsss::bind_msdw(m);
    wsss::bind_ocr(m);
    wsss::bind_patch(m);
    wsss::bind_prototype(m);
}
