// What every operator shares: the host/device macro, where an operation runs, how a backend provides it, and
// index helpers. Nothing here knows Python, PyTorch or the CUDA runtime.
#pragma once

#include <cstdint>

#if defined(WSSS_BACKEND_CPU)
#include "cpu_level.h"
#endif

// Arithmetic that all backends share is always inlined: the CPU sources are compiled once per instruction
// set, and an out-of-line copy would be one symbol for all of them, of which the linker keeps any one.
#if defined(__CUDACC__)
#define WSSS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define WSSS_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace wsss {

// Where an operation runs: a CUDA stream of a device, or a number of CPU threads.
struct Where {
    void* stream = nullptr;
    int threads = 1;
};

struct Strides {  // of [images][channels][height][width], in elements
    int64_t image, channel, y, x;
};

}  // namespace wsss

// WSSS_OPERATION(name, Params) declares `void name(const Params&, const Where&)`, which every backend
// defines: on the CPU in one namespace per instruction set, of which the declared function picks one.
#if !defined(WSSS_BACKEND_CPU)
#define WSSS_OPERATION(name, Params) void name(const Params& params, const Where& where);
#elif defined(__x86_64__)
#define WSSS_OPERATION(name, Params)                                                     \
    namespace x86_64 {                                                                   \
    void name(const Params&, const Where&);                                              \
    }                                                                                    \
    namespace x86_64_v3 {                                                                \
    void name(const Params&, const Where&);                                              \
    }                                                                                    \
    namespace x86_64_v4 {                                                                \
    void name(const Params&, const Where&);                                              \
    }                                                                                    \
    static inline void name(const Params& params, const Where& where) {                  \
        using Operation = void (*)(const Params&, const Where&);                         \
        constexpr Operation levels[] = {x86_64::name, x86_64_v3::name, x86_64_v4::name}; \
        levels[cpu_level()](params, where);                                              \
    }
#else
#define WSSS_OPERATION(name, Params)        \
    namespace generic {                     \
    void name(const Params&, const Where&); \
    }                                       \
    static inline void name(const Params& params, const Where& where) { generic::name(params, where); }
#endif

namespace wsss {

template <class T>
constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

// Division by a number known at launch, for 0 <= n < 2^31: a multiplication and a shift instead of the twenty
// or so instructions of an integer division on a GPU (Granlund and Montgomery, PLDI 1994).
class Divisor {
  public:
    Divisor() = default;
    explicit Divisor(uint32_t divisor) : divisor_(divisor) {
        while (shift_ < 31 && (1u << shift_) < divisor) ++shift_;
        multiplier_ = static_cast<uint32_t>(((1ull << 32) * ((1ull << shift_) - divisor)) / divisor + 1);
    }

    WSSS_HOST_DEVICE uint32_t quotient(uint32_t n) const {
        const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier_) >> 32);
        return (high + n) >> shift_;
    }
    WSSS_HOST_DEVICE uint32_t remainder(uint32_t n, uint32_t quotient) const {
        return n - quotient * divisor_;
    }
    WSSS_HOST_DEVICE uint32_t divisor() const { return divisor_; }

  private:
    uint32_t divisor_ = 1;
    uint32_t multiplier_ = 1;
    uint32_t shift_ = 0;
};

}  // namespace wsss
