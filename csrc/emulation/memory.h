// Atomics, fences and loads and stores with cache hints. One thread runs at a time, so the plain operation is
// atomic.
#pragma once

#include "half.h"

namespace wsss::emulation {

template <class T>
struct Same {
    using type = T;
};
template <class T>
using same = typename Same<T>::type;  // the pointer alone decides T

}  // namespace wsss::emulation

#define WSSS_ATOMIC(name, expression)                    \
    template <class T>                                   \
    T name(T* address, wsss::emulation::same<T> value) { \
        const T old = *address;                          \
        *address = static_cast<T>(expression);           \
        return old;                                      \
    }
WSSS_ATOMIC(atomicAdd, old + value)
WSSS_ATOMIC(atomicSub, old - value)
WSSS_ATOMIC(atomicMax, old < value ? value : old)
WSSS_ATOMIC(atomicMin, value < old ? value : old)
WSSS_ATOMIC(atomicAnd, old& value)
WSSS_ATOMIC(atomicOr, old | value)
WSSS_ATOMIC(atomicXor, old ^ value)
WSSS_ATOMIC(atomicExch, value)
#undef WSSS_ATOMIC

template <class T>
T atomicCAS(T* address, wsss::emulation::same<T> expected, wsss::emulation::same<T> value) {
    const T old = *address;
    if (old == expected) *address = value;
    return old;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

template <class T>
T __ldg(const T* address) {
    return *address;
}
template <class T>
T __ldca(const T* address) {
    return *address;
}
template <class T>
T __ldcg(const T* address) {
    return *address;
}
template <class T>
T __ldcs(const T* address) {
    return *address;
}
template <class T>
void __stcg(T* address, wsss::emulation::same<T> value) {
    *address = value;
}
template <class T>
void __stcs(T* address, wsss::emulation::same<T> value) {
    *address = value;
}
template <class T>
void __stwt(T* address, wsss::emulation::same<T> value) {
    *address = value;
}
