// The input's gradient of the deformable convolution, from the columns' gradient and in any order. Included
// by cuda.cu alone.
//
// A pixel of the image gets 4 * taps additions a channel: for D1 of cuda.cu 1.2e9, 4.8 GB of fp32 atomics if
// each went to device memory. So a block adds up first. It takes a tile of 8x8 output pixels, nine taps and
// one offset group; finds the 576 samples; sorts their 2304 corners by pixel, into a list for each; and
// groups of lanes take a list each, sum in registers, and add to device memory once. Tiles overlap by what
// taps and offsets reach: offsets of standard deviation 1, as in the benchmark, give some 12x12 pixels a
// tile, an addition for 15 corners.
//
// Traffic of D1 in bf16: 0.6 GB of columns, and 0.3 GB of additions, 0.1 to 0.2 ms each. The four reads of a
// sample have to meet in L1: lists are in the order of the image's rows, and what two rows have in common is
// some 20 KB a block. A corner takes 29 instructions for 8 channels, 0.15 ms on 132 multiprocessors at
// 1.7 GHz, and sorting a third as long. So 0.3 to 0.5 ms are expected; nothing has been timed on a GPU yet.
//
// Sorting takes more than half as long as the lists of one slice of channels (a line of the caches, 64 in
// bf16), so a block does several slices where there are more blocks than occupy a GPU. A chunk of D1 has only
// 40 tiles, of 32 slices: two a block. One of D2 has 256, of 4: two again.
//
// Lists are found by a table of kSlots pixels, which is laid over the image again and again: four times the
// tile's height by four times its width. Pixels that are so far apart share a slot. It goes to the corners of
// the pixel that comes first; those of others stay by themselves, in lists of one. That is right wherever
// offsets lead, and costs nothing unless the samples of one tile are 32 pixels apart.
#pragma once

#include <algorithm>

#include "deform/cuda_samples.h"

namespace wsss::deform {
namespace {

constexpr int kTilePixels = 64;
constexpr int kTileTaps = 9;
constexpr int kTileSamples = kTilePixels * kTileTaps;
constexpr int kTileCorners = 4 * kTileSamples;
constexpr int kSlots = 16 * kTilePixels;
constexpr int kSamplesEach = ceil_div(kTileSamples, kThreads);  // of the threads
constexpr int kSlotsEach = kSlots / kThreads;
constexpr int32_t kNobody = -1;
// That occupy a GPU: a few for each multiprocessor.
constexpr uint32_t kEnoughBlocks = 512;
constexpr uint32_t kMostParts = 65535;  // CUDA's limit on gridDim.y

// How a chunk's pixels are divided. Rows are those of all images, one below the other, in the output as in
// the input: a tile may begin in one image and end in the next.
struct Tiling {
    int width_bits;  // a tile is 2^width_bits wide
    int64_t first_row;
    uint32_t across, down, deep;  // tiles side by side, below each other, and for the taps of a pixel

    explicit Tiling(const Params& p)
        : width_bits(0),
          first_row(p.first / p.shape.out_width),
          deep(static_cast<uint32_t>(ceil_div<int64_t>(p.taps, kTileTaps))) {
        while (width_bits < 3 && 1 << width_bits < p.shape.out_width) ++width_bits;
        const int64_t rows = ceil_div(p.first + p.count, p.shape.out_width) - first_row;
        across = static_cast<uint32_t>(ceil_div<int64_t>(p.shape.out_width, width()));
        down = static_cast<uint32_t>(ceil_div<int64_t>(rows, height()));
    }
    WSSS_HOST_DEVICE int width() const { return 1 << width_bits; }
    WSSS_HOST_DEVICE int height() const { return kTilePixels >> width_bits; }
    // Of a pixel of the image.
    WSSS_HOST_DEVICE int slot(int32_t row, int32_t x) const {
        return (row & (4 * height() - 1)) << (width_bits + 2) | (x & (4 * width() - 1));
    }
};

// A block's share. Its samples are numbered in the order tap, row, pixel: neighbouring threads then read
// neighbouring offsets.
struct Tile {
    int64_t row, x;
    uint32_t tap, taps, group;
};

__device__ Tile find_tile(const Params& p, const Tiling& tiling) {
    const auto offset_groups = static_cast<uint32_t>(p.shape.offset_groups);
    uint32_t rest = blockIdx.x;
    Tile tile;
    tile.group = rest % offset_groups;
    rest /= offset_groups;
    tile.tap = rest % tiling.deep * kTileTaps;
    rest /= tiling.deep;
    tile.taps = min(static_cast<uint32_t>(p.taps) - tile.tap, static_cast<uint32_t>(kTileTaps));
    tile.x = static_cast<int64_t>(rest % tiling.across) * tiling.width();
    tile.row = tiling.first_row + static_cast<int64_t>(rest / tiling.across) * tiling.height();
    return tile;
}

// The number in the chunk of a block's sample, or -1 where it has none.
__device__ int64_t sample_number(const Params& p, const Tiling& tiling, const Tile& tile, int own) {
    const int pixel_here = own % kTilePixels;
    const auto tap = static_cast<uint32_t>(own / kTilePixels);
    const int64_t x = tile.x + (pixel_here & (tiling.width() - 1));
    const int64_t row = tile.row + (pixel_here >> tiling.width_bits);
    const int64_t pixel = row * p.shape.out_width + x - p.first;
    const bool exists = tap < tile.taps && x < p.shape.out_width && pixel >= 0 && pixel < p.count;
    return exists ? (pixel * p.shape.offset_groups + tile.group) * p.taps + tile.tap + tap : -1;
}

// In shared memory: which corners go to which pixel.
template <class W>
struct CornerLists {
    W weights[kTileCorners];
    int64_t rows[kTileSamples];      // channel 0 of a sample would lie here in `columns`
    int32_t pixels[kTileSamples];    // of the image, corner 0
    int32_t owners[kSlots];          // pixels of the image
    uint32_t ends[kSlots];           // of the slots' lists, of which each begins where the one before ends
    uint16_t corners[kTileCorners];  // 4 * sample + corner, by slot; then those that found theirs taken
    uint16_t slots[kSlots];          // that have corners
    uint32_t used, sorted, others;   // slots that have corners, those corners, and corners by themselves
    uint32_t warp_sums[kThreads / 32];
};

template <class W>
__device__ int32_t target_of(const Params& p, const CornerLists<W>& lists, int code) {
    return lists.pixels[code / 4] + (code & 2 ? static_cast<int32_t>(p.shape.width) : 0) + (code & 1);
}

// Calls body(code, corner, slot, pixel of the image) for the corners of a sample that lie in the image.
template <class W, class Body>
__device__ void for_corners(const Params& p, const Tiling& tiling, const CornerLists<W>& lists, int own,
                            const Sample<W>& sample, const Body& body) {
    const auto first_row = static_cast<int32_t>(sample.image * p.shape.height) + sample.y;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
        if ((sample.inside >> corner & 1) == 0) continue;
        const int code = 4 * own + corner;
        const int slot = tiling.slot(first_row + (corner >> 1), sample.x + (corner & 1));
        body(code, corner, slot, target_of(p, lists, code));
    }
}

// Of `value`, over the threads before.
__device__ uint32_t sum_before(uint32_t value, uint32_t* warp_sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t sum = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const uint32_t below = __shfl_up_sync(0xffffffffu, sum, distance);
        if (lane >= distance) sum += below;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    for (int i = 0; i < warp; ++i) sum += warp_sums[i];
    return sum - value;
}

// From counts in `ends` to where each slot's list begins, which its corners then advance.
template <class W>
__device__ void place_lists(CornerLists<W>& lists) {
    // Lists in the upper half of the sums, their corners in the lower.
    const auto both = [](uint32_t count) { return count == 0 ? 0 : 1u << 16 | count; };
    uint32_t counts[kSlotsEach], sum = 0;
#pragma unroll
    for (int i = 0; i < kSlotsEach; ++i) {
        counts[i] = lists.ends[kSlotsEach * threadIdx.x + i];
        sum += both(counts[i]);
    }
    uint32_t before = sum_before(sum, lists.warp_sums);
#pragma unroll
    for (int i = 0; i < kSlotsEach; ++i) {
        const uint32_t slot = kSlotsEach * threadIdx.x + i;
        if (counts[i] != 0) lists.slots[before >> 16] = static_cast<uint16_t>(slot);
        lists.ends[slot] = before & 0xffff;
        before += both(counts[i]);
    }
    if (threadIdx.x == kThreads - 1) {
        lists.used = before >> 16;
        lists.sorted = before & 0xffff;
    }
}

template <class W>
__device__ void sort_corners(const Params& p, const Divisors& by, const Tiling& tiling, const Tile& tile,
                             CornerLists<W>& lists) {
    for (int slot = threadIdx.x; slot < kSlots; slot += kThreads) {
        lists.owners[slot] = kNobody;
        lists.ends[slot] = 0;
    }
    if (threadIdx.x == 0) lists.others = 0;
    __syncthreads();

    Sample<W> samples[kSamplesEach];
#pragma unroll
    for (int i = 0; i < kSamplesEach; ++i) {
        const int own = threadIdx.x + i * kThreads;
        const int64_t number = sample_number(p, tiling, tile, own);
        samples[i] = Sample<W>{};
        if (number < 0) continue;
        const auto sample = static_cast<uint32_t>(number);
        samples[i] = find_sample<W>(p, locate(p, by, sample));
        lists.rows[own] = find_row(p, by, sample).first;
        lists.pixels[own] = static_cast<int32_t>(
            (samples[i].image * p.shape.height + samples[i].y) * p.shape.width + samples[i].x);
        for_corners(p, tiling, lists, own, samples[i], [&](int, int, int slot, int32_t target) {
            const int32_t owner = atomicCAS(&lists.owners[slot], kNobody, target);
            if (owner == kNobody || owner == target) atomicAdd(&lists.ends[slot], 1);
        });
    }
    __syncthreads();
    place_lists(lists);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSamplesEach; ++i) {
        const auto fill = [&](int code, int corner, int slot, int32_t target) {
            const bool owned = lists.owners[slot] == target;
            const uint32_t place =
                owned ? atomicAdd(&lists.ends[slot], 1) : lists.sorted + atomicAdd(&lists.others, 1);
            lists.corners[place] = static_cast<uint16_t>(code);
            lists.weights[place] = samples[i].mask * samples[i].weight(corner);
        };
        for_corners(p, tiling, lists, threadIdx.x + i * kThreads, samples[i], fill);
    }
    __syncthreads();
}

// *to += values, in any order.
template <int kCount>
__device__ void add(double* to, const double* values) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) atomicAdd(to + i, values[i]);
}

__device__ void add_four(float* to, const float* values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
        "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
        : "memory");
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) atomicAdd(to + i, values[i]);
#endif
}

template <int kCount>
__device__ void add(float* to, const float* values) {
    if constexpr (kCount % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kCount; i += 4) add_four(to + i, values + i);
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) atomicAdd(to + i, values[i]);
    }
}

// blockIdx.x: tile, part of the taps, offset group; blockIdx.y: the first of the slices of channels.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) scatter_tiles(Params p, Divisors by, Tiling tiling, Lanes lanes) {
    using W = wide<T>;
    __shared__ CornerLists<W> lists;
    const Tile tile = find_tile(p, tiling);
    sort_corners(p, by, tiling, tile, lists);

    // In registers: after each addition the compiler would read shared memory again.
    const uint32_t used = lists.used, sorted = lists.sorted, all = used + lists.others;
    const uint32_t step = lanes.groups();
    for (uint32_t c = kVector * (blockIdx.y * lanes.count() + lanes.own()); c < by.group_channels;
         c += kVector * lanes.count() * gridDim.y) {
        const uint32_t channel = tile.group * by.group_channels + c;
        const T* __restrict__ const from =
            static_cast<const T*>(p.columns) + column_of(p, by, Row{}, channel);
        W* const to = static_cast<W*>(p.input_gradient) + channel;
        for (uint32_t list = lanes.group(); list < all; list += step) {
            uint32_t begin = sorted + list - used, end = begin + 1;
            if (list < used) {
                const uint32_t slot = lists.slots[list];
                begin = slot == 0 ? 0 : lists.ends[slot - 1];
                end = lists.ends[slot];
            }
            W sums[kVector] = {};
#pragma unroll 2
            for (uint32_t i = begin; i < end; ++i) {
                const W weight = lists.weights[i];
                W gradient[kVector];
                widen(load<T, kVector>(from + lists.rows[lists.corners[i] / 4]), gradient);
#pragma unroll
                for (int j = 0; j < kVector; ++j) sums[j] += weight * gradient[j];
            }
            add<kVector>(to + target_of(p, lists, lists.corners[begin]) * p.shape.channels, sums);
        }
    }
}

// How many blocks share the slices of channels of a tile: each of them sorts.
uint32_t count_parts(const Params& p, uint32_t tiles, int slice) {
    const auto slices =
        static_cast<uint32_t>(ceil_div<int64_t>(p.shape.channels / p.shape.offset_groups, slice));
    const auto each = static_cast<uint32_t>(static_cast<uint64_t>(tiles) * slices / kEnoughBlocks);
    return std::min(each <= 1 ? slices : ceil_div(slices, each), kMostParts);
}

}  // namespace
}  // namespace wsss::deform
