// Atomics, fences, loads and stores with cache hints. One thread runs at a time: plain operations are atomic.
#pragma once

#include <type_traits>

#include "accesses.h"
#include "half.h"

namespace wsss::emulation {

template <class T>
struct Same {
    using type = T;
};
template <class T>
using same = typename Same<T>::type;  // the pointer alone decides T

// What integers do in CUDA, where C++ leaves signed overflow undefined.
template <class T>
T wrapping_sum(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
        using Unsigned = std::make_unsigned_t<T>;
        return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
    } else {
        return a + b;
    }
}

}  // namespace wsss::emulation

// Always inlined, so that the checks of the accesses name the kernel's line.
#define WSSS_INLINE inline __attribute__((always_inline))

#define WSSS_ATOMIC(name, expression)                                \
    template <class T>                                               \
    WSSS_INLINE T name(T* address, wsss::emulation::same<T> value) { \
        const wsss::emulation::AtomicAccess access(address);         \
        const T old = *address;                                      \
        *address = static_cast<T>(expression);                       \
        return old;                                                  \
    }
WSSS_ATOMIC(atomicAdd, wsss::emulation::wrapping_sum(old, value))
WSSS_ATOMIC(atomicSub, wsss::emulation::wrapping_sum(old, static_cast<T>(0u - value)))
WSSS_ATOMIC(atomicMax, old < value ? value : old)
WSSS_ATOMIC(atomicMin, value < old ? value : old)
WSSS_ATOMIC(atomicAnd, old& value)
WSSS_ATOMIC(atomicOr, old | value)
WSSS_ATOMIC(atomicXor, old ^ value)
WSSS_ATOMIC(atomicExch, value)
WSSS_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
WSSS_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef WSSS_ATOMIC

template <class T>
WSSS_INLINE T atomicCAS(T* address, wsss::emulation::same<T> expected, wsss::emulation::same<T> value) {
    const wsss::emulation::AtomicAccess access(address);
    const T old = *address;
    if (old == expected) *address = value;
    return old;
}

inline void __threadfence_block() {}
inline void __threadfence() { wsss::emulation::note_fence(); }
inline void __threadfence_system() { wsss::emulation::note_fence(); }

#define WSSS_LOAD(name)                    \
    template <class T>                     \
    WSSS_INLINE T name(const T* address) { \
        return *address;                   \
    }
WSSS_LOAD(__ldg)
WSSS_LOAD(__ldca)
WSSS_LOAD(__ldcg)
WSSS_LOAD(__ldcs)
WSSS_LOAD(__ldcv)
WSSS_LOAD(__ldlu)
#undef WSSS_LOAD

#define WSSS_STORE(name)                                                \
    template <class T>                                                  \
    WSSS_INLINE void name(T* address, wsss::emulation::same<T> value) { \
        *address = value;                                               \
    }
WSSS_STORE(__stwb)
WSSS_STORE(__stcg)
WSSS_STORE(__stcs)
WSSS_STORE(__stwt)
#undef WSSS_STORE
