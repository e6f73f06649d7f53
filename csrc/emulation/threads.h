// Barriers, shuffles, votes and reductions: the calls at which threads meet. Each carries the line it is on.
#pragma once

#include <cstring>
#include <type_traits>

#include "engine.h"

inline void __syncthreads(wsss::emulation::Site site = wsss::emulation::Site::here()) {
    wsss::emulation::meet_block("__syncthreads", false, site);
}
inline int __syncthreads_count(int predicate, wsss::emulation::Site site = wsss::emulation::Site::here()) {
    return wsss::emulation::meet_block("__syncthreads_count", predicate != 0, site).yes;
}
inline int __syncthreads_and(int predicate, wsss::emulation::Site site = wsss::emulation::Site::here()) {
    const auto count = wsss::emulation::meet_block("__syncthreads_and", predicate != 0, site);
    return count.yes == count.all;
}
inline int __syncthreads_or(int predicate, wsss::emulation::Site site = wsss::emulation::Site::here()) {
    return wsss::emulation::meet_block("__syncthreads_or", predicate != 0, site).yes > 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       wsss::emulation::Site site = wsss::emulation::Site::here()) {
    wsss::emulation::meet_warp("__syncwarp", mask, 0, site, true);
}

namespace wsss::emulation {

template <class T>
uint64_t pack(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>,
                  "a lane exchanges up to 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <class T>
T unpack(uint64_t bits) {
    T value;
    std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
    return value;
}

// source(lane, first, last): the lane to read, in the segment of width lanes that holds lane.
template <class T, class Source>
T shuffle(const char* operation, unsigned mask, T value, int width, Site site, Source source) {
    if (width < 1 || width > warpSize || (width & (width - 1)) != 0) {
        fail(std::string(operation) + " with width " + std::to_string(width), site);
    }
    const int first = lane() & ~(width - 1);
    const int from = source(lane(), first, first + width - 1);
    const Exchange& lanes = meet_warp(operation, mask, pack(value), site);
    if ((lanes.arrived >> from & 1) == 0) {
        fail(
            std::string(operation) + " reads lane " + std::to_string(from) + ", which its mask does not name",
            site);
    }
    return unpack<T>(lanes.values[from]);
}

// Folds what the lanes of mask bring, in lane order.
template <class T, class Combine>
T reduce(const char* operation, unsigned mask, T value, Site site, Combine combine) {
    const Exchange& lanes = meet_warp(operation, mask, pack(value), site);
    bool any = false;
    T result{};
    for (int i = 0; i < warpSize; ++i) {
        if ((lanes.arrived >> i & 1) == 0) continue;
        const T next = unpack<T>(lanes.values[i]);
        result = any ? combine(result, next) : next;
        any = true;
    }
    return result;
}

// The lanes of mask whose value is the same, bit for bit, as this lane's.
template <class T>
unsigned equal_lanes(const char* operation, unsigned mask, T value, Site site) {
    const Exchange& lanes = meet_warp(operation, mask, pack(value), site);
    unsigned equal = 0;
    for (int i = 0; i < warpSize; ++i) {
        if ((lanes.arrived >> i & 1) != 0 && lanes.values[i] == pack(value)) equal |= 1u << i;
    }
    return equal;
}

}  // namespace wsss::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              wsss::emulation::Site site = wsss::emulation::Site::here()) {
    return wsss::emulation::shuffle("__shfl_sync", mask, value, width, site,
                                    [=](int, int first, int) { return first + (source & (width - 1)); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 wsss::emulation::Site site = wsss::emulation::Site::here()) {
    return wsss::emulation::shuffle(
        "__shfl_up_sync", mask, value, width, site, [=](int lane, int first, int) {
            return delta > static_cast<unsigned>(lane - first) ? lane : lane - static_cast<int>(delta);
        });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   wsss::emulation::Site site = wsss::emulation::Site::here()) {
    return wsss::emulation::shuffle(
        "__shfl_down_sync", mask, value, width, site, [=](int lane, int, int last) {
            return delta > static_cast<unsigned>(last - lane) ? lane : lane + static_cast<int>(delta);
        });
}
// Earlier segments can be read, later ones cannot: so CUDA has it.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  wsss::emulation::Site site = wsss::emulation::Site::here()) {
    return wsss::emulation::shuffle("__shfl_xor_sync", mask, value, width, site,
                                    [=](int lane, int, int last) {
                                        const int from = lane ^ (lane_mask & (warpSize - 1));
                                        return from > last ? lane : from;
                                    });
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              wsss::emulation::Site site = wsss::emulation::Site::here()) {
    const auto& lanes = wsss::emulation::meet_warp("__ballot_sync", mask, predicate != 0, site);
    unsigned ballot = 0;
    for (int i = 0; i < warpSize; ++i) {
        if ((lanes.arrived >> i & 1) != 0 && lanes.values[i] != 0) ballot |= 1u << i;
    }
    return ballot;
}
inline int __any_sync(unsigned mask, int predicate,
                      wsss::emulation::Site site = wsss::emulation::Site::here()) {
    return wsss::emulation::reduce("__any_sync", mask, predicate != 0, site,
                                   [](bool a, bool b) { return a || b; });
}
inline int __all_sync(unsigned mask, int predicate,
                      wsss::emulation::Site site = wsss::emulation::Site::here()) {
    return wsss::emulation::reduce("__all_sync", mask, predicate != 0, site,
                                   [](bool a, bool b) { return a && b; });
}
// All lanes that have not exited: which of them run together is the schedule's secret, so code that takes the
// answer for the lanes of its own branch gets an error at its next shuffle.
inline unsigned __activemask() { return wsss::emulation::lanes_not_exited(); }

template <class T>
unsigned __match_any_sync(unsigned mask, T value,
                          wsss::emulation::Site site = wsss::emulation::Site::here()) {
    return wsss::emulation::equal_lanes("__match_any_sync", mask, value, site);
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all,
                          wsss::emulation::Site site = wsss::emulation::Site::here()) {
    *all = wsss::emulation::equal_lanes("__match_all_sync", mask, value, site) == mask;
    return *all ? mask : 0;
}

#define WSSS_REDUCE(name, type, expression)                                                \
    inline type name(unsigned mask, type value,                                            \
                     wsss::emulation::Site site = wsss::emulation::Site::here()) {         \
        return wsss::emulation::reduce(#name, mask, value, site,                           \
                                       [](type a, type b) -> type { return expression; }); \
    }
WSSS_REDUCE(__reduce_add_sync, unsigned, a + b)
WSSS_REDUCE(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
WSSS_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
WSSS_REDUCE(__reduce_min_sync, int, a < b ? a : b)
WSSS_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
WSSS_REDUCE(__reduce_max_sync, int, a > b ? a : b)
WSSS_REDUCE(__reduce_and_sync, unsigned, a& b)
WSSS_REDUCE(__reduce_or_sync, unsigned, a | b)
WSSS_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef WSSS_REDUCE
