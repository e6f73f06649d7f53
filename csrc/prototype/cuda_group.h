// How a block of threads shares sums on CUDA, and how it walks through features.
#pragma once

#include "packed.h"
#include "prototype/math.h"

namespace wsss::prototype {
namespace {

constexpr int kWarp = 32, kGroups = 8;
constexpr int kThreads = kWarp * kGroups;

// A block sums for several items, pixels or channels, several lanes for each, and loads kCount numbers at
// once: 16 bytes, or one number where memory is not aligned. Where items are side by side in memory
// (kTogether), those kCount numbers are of as many items, one pack, and 8 neighbouring threads take as many
// packs, 128 bytes; the other threads are lanes. Elsewhere a warp is the 32 lanes of kApart items, so
// that what goes with each number is loaded once for them. Sums have a fixed order.
constexpr int items_apart(int count) { return count == 4 ? 4 : 2; }

template <bool kTogether, int kCount, int kApart = items_apart(kCount)>
struct Group {
    static constexpr int kPacks = kTogether && kCount == 1 ? kWarp : kGroups;
    static constexpr int kOwn = kTogether ? kCount : kApart;  // items of a thread, neighbours
    static constexpr int kStep = kTogether ? 1 : kCount;      // numbers of an item in one load
    static constexpr int kItems = kPacks * kOwn;              // of a block
    static constexpr int kLanes = kThreads / kPacks;          // of an item
    static constexpr int kParts = kTogether ? kGroups : 1;    // sums of an item, by warps

    static __device__ int pack() {
        return static_cast<int>(kTogether ? threadIdx.x % kPacks : threadIdx.x / kWarp);
    }
    static __device__ int lane() {
        return static_cast<int>(kTogether ? threadIdx.x / kPacks : threadIdx.x % kWarp);
    }
    // Of the sum `value` of a pack in what `add` leaves.
    static __device__ int at(int value, int pack) { return value * kPacks + pack; }

    // Adds up the lanes' values; all threads call it, and find the sums in `shared`, which has kParts *
    // kPacks * kValues numbers.
    template <class W, int kValues>
    static __device__ void add(const W (&values)[kValues], W* shared) {
        constexpr int kFirst = kTogether ? kPacks : 1;
        const int part = kTogether ? static_cast<int>(threadIdx.x) / kWarp : 0;
        __syncthreads();
#pragma unroll
        for (int v = 0; v < kValues; ++v) {
            W value = values[v];
#pragma unroll
            for (int step = kWarp / 2; step >= kFirst; step /= 2)
                value += __shfl_xor_sync(0xffffffffu, value, step);
            if (static_cast<int>(threadIdx.x) % kWarp < kFirst)
                shared[part * kValues * kPacks + at(v, pack())] = value;
        }
        __syncthreads();
        if constexpr (kParts > 1) {
            for (int i = static_cast<int>(threadIdx.x); i < kValues * kPacks; i += kThreads) {
                W total = shared[i];
#pragma unroll
                for (int other = 1; other < kParts; ++other) total += shared[other * kValues * kPacks + i];
                shared[i] = total;
            }
            __syncthreads();
        }
    }
};

// Where a block finds its items: blocks follow each other image by image.
struct Items {
    Divisor blocks;
    uint32_t count;

    template <class Lanes>
    static Items of(int64_t count) {
        return {Divisor(static_cast<uint32_t>(ceil_div<int64_t>(count, Lanes::kItems))),
                static_cast<uint32_t>(count)};
    }
};

// The image and the items of a block.
template <class Lanes>
struct Place {
    int64_t image;
    uint32_t first, count;

    __device__ Place(const Items& items, uint32_t block) : count(items.count) {
        const uint32_t of_image = items.blocks.quotient(block);
        image = of_image;
        first = items.blocks.remainder(block, of_image) * Lanes::kItems;
    }
    // Of the thread's own items.
    __device__ uint32_t own(int i) const {
        return first + static_cast<uint32_t>(Lanes::pack() * Lanes::kOwn + i);
    }
    // The same, or the last one where it does not exist: read in its place, for nothing.
    __device__ uint32_t readable(int i) const { return min(own(i), count - 1); }
};

template <class Lanes>
dim3 group_blocks(int64_t images, int64_t items) {
    return dim3(static_cast<unsigned>(images * ceil_div<int64_t>(items, Lanes::kItems)));
}

// kStep wide numbers, which the kernel does not write.
template <int kStep, class W>
__device__ __forceinline__ void load_wide(const W* from, W (&to)[kStep]) {
    if constexpr (kStep == 1) {
        to[0] = __ldg(from);
    } else {
        constexpr int kCount = 16 / sizeof(W);
#pragma unroll
        for (int i = 0; i < kStep; i += kCount) {
            W numbers[kCount];
            widen(load_if<W, kCount>(true, from + i), numbers);
#pragma unroll
            for (int j = 0; j < kCount; ++j) to[i + j] = numbers[j];
        }
    }
}

// Blocks that a multiprocessor has at once, at least: more where a thread holds four numbers in all.
constexpr int blocks_at_once(bool together, int count) { return together && count == 4 ? 3 : 2; }

// A thread's loads of features: one pack of several items, or a pack of each item.
template <class T, bool kTogether, int kCount, class Lanes = Group<kTogether, kCount>>
struct Loads {
    static constexpr int kLoads = kTogether ? 1 : Lanes::kOwn;

    const T* from[kLoads];
    int64_t step;

    // From a map [images][length][items] or, not kTogether, [images][items][length].
    __device__ Loads(const T* image, const Place<Lanes>& place, uint32_t length)
        : step(kTogether ? place.count : 1) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            from[i] = kTogether ? image + min(place.own(0), place.count - kCount)
                                : image + place.readable(i) * static_cast<int64_t>(length);
        }
    }
    // Numbers j to j + kStep of all items.
    __device__ void load_all(int64_t j, Packed<T, kCount> (&packs)[kLoads]) const {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            packs[i] = load_if<T, kCount>(true, from[i] + j * step);
        }
    }
    static __device__ void widen_all(const Packed<T, kCount> (&packs)[kLoads],
                                     wide<T> (&numbers)[Lanes::kOwn][Lanes::kStep]) {
        if constexpr (kTogether) {
            wide<T> flat[kCount];
            widen(packs[0], flat);
#pragma unroll
            for (int i = 0; i < kCount; ++i) numbers[i][0] = flat[i];
        } else {
#pragma unroll
            for (int i = 0; i < kLoads; ++i) widen(packs[i], numbers[i]);
        }
    }
};

// visit(j, numbers) with numbers j to j + kStep of each of the thread's items, for this lane's share.
// kUnderWay loads are issued before the first is waited for: a test between them would end that.
template <int kUnderWay, class T, bool kTogether, int kCount, class Visit>
__device__ __forceinline__ void each_number(const Loads<T, kTogether, kCount>& loads, int64_t length,
                                            const Visit& visit) {
    using Lanes = Group<kTogether, kCount>;
    using Packs = Packed<T, kCount>[Loads<T, kTogether, kCount>::kLoads];
    [[maybe_unused]] constexpr int kUnroll = kUnderWay / Loads<T, kTogether, kCount>::kLoads;
    constexpr int kAll = Lanes::kLanes * Lanes::kStep;
    const auto visit_packs = [&](int64_t j, const Packs& packs) {
        wide<T> numbers[Lanes::kOwn][Lanes::kStep];
        Loads<T, kTogether, kCount>::widen_all(packs, numbers);
        visit(j, numbers);
    };
    int64_t j = Lanes::lane() * Lanes::kStep;
#pragma unroll 1
    for (; j + (kUnroll - 1) * kAll < length; j += kUnroll * kAll) {
        Packs packs[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) loads.load_all(j + i * kAll, packs[i]);
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) visit_packs(j + i * kAll, packs[i]);
    }
    if constexpr (kUnroll > 1) {
#pragma unroll 1
        for (; j < length; j += kAll) {
            Packs packs;
            loads.load_all(j, packs);
            visit_packs(j, packs);
        }
    }
}

}  // namespace
}  // namespace wsss::prototype
