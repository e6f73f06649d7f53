// What the CUDA kernels of the deformable convolution share: which sample a thread has, where it reads, and
// where its channels lie in the columns. Included by cuda.cu alone.
#pragma once

#include "deform/math.h"
#include "launch.h"
#include "packed.h"

namespace wsss::deform {
namespace {

constexpr int kThreads = 256;
// At most so many lanes take a sample's channels, at most 16 bytes each: a line of the caches at a time. More
// lanes would have more of fewer samples' channels in flight, and so less of what neighbouring samples share.
constexpr int kMostLanes = 8;

// A block's threads in groups of a power of two, each of which takes a sample or a pixel.
struct Lanes {
    int bits;

    WSSS_HOST_DEVICE int count() const { return 1 << bits; }
    WSSS_HOST_DEVICE int groups() const { return kThreads >> bits; }
    __device__ int own() const { return static_cast<int>(threadIdx.x) & (count() - 1); }
    __device__ int group() const { return static_cast<int>(threadIdx.x) >> bits; }
};

struct Divisors {
    Divisor taps, kernel_w, offset_groups, out_width, out_height, weight_group;
    // Of an offset group: a GPU takes a hundred instructions to divide 64-bit numbers.
    uint32_t group_channels;

    explicit Divisors(const Params& p)
        : taps(static_cast<uint32_t>(p.taps)),
          kernel_w(static_cast<uint32_t>(p.shape.kernel_w)),
          offset_groups(static_cast<uint32_t>(p.shape.offset_groups)),
          out_width(static_cast<uint32_t>(p.shape.out_width)),
          out_height(static_cast<uint32_t>(p.shape.out_height)),
          weight_group(static_cast<uint32_t>(p.shape.channels / p.shape.groups)),
          group_channels(static_cast<uint32_t>(p.shape.channels / p.shape.offset_groups)) {}
};

// Samples of the chunk are numbered in the order pixel, offset group, tap.
__device__ Place locate(const Params& p, const Divisors& by, uint32_t sample) {
    const uint32_t slot = by.taps.quotient(sample);
    const uint32_t tap = static_cast<uint32_t>(p.first_tap) + by.taps.remainder(sample, slot);
    const uint32_t chunk_pixel = by.offset_groups.quotient(slot);
    const uint32_t pixel = static_cast<uint32_t>(p.first) + chunk_pixel;
    const uint32_t row = by.out_width.quotient(pixel);
    const uint32_t image = by.out_height.quotient(row);
    const uint32_t tap_y = by.kernel_w.quotient(tap);
    Place at;
    at.image = image;
    at.y = by.out_height.remainder(row, image);
    at.x = by.out_width.remainder(pixel, row);
    at.group = by.offset_groups.remainder(slot, chunk_pixel);
    at.tap_y = tap_y;
    at.tap_x = by.kernel_w.remainder(tap, tap_y);
    return at;
}

// Which channels a sample has, and where they lie in `columns`.
struct Row {
    int64_t first;     // channel 0 would lie here
    uint32_t channel;  // the first of the sample's offset group
};

__device__ Row find_row(const Params& p, const Divisors& by, uint32_t sample) {
    const Shape& s = p.shape;
    const uint32_t slot = by.taps.quotient(sample);
    const uint32_t tap = by.taps.remainder(sample, slot);
    const uint32_t pixel = by.offset_groups.quotient(slot);
    const uint32_t group = by.offset_groups.remainder(slot, pixel);
    return {pixel * p.taps * s.channels + static_cast<int64_t>(tap) * by.weight_group.divisor(),
            group * by.group_channels};
}

// In a row each weight group has all its taps before the next group begins.
__device__ int64_t column_of(const Params& p, const Divisors& by, const Row& row, uint32_t channel) {
    const int64_t gap = (p.taps - 1) * by.weight_group.divisor();
    return row.first + channel + by.weight_group.quotient(channel) * gap;
}

// Where a sample's corners lie in a tensor, and the weights that the mask has been multiplied into.
template <class W>
struct Reading {
    int64_t first;  // of corner 0
    W weight[4];
    unsigned inside;
};

template <class W>
__device__ Reading<W> find_reading(const Sample<W>& sample, const Strides& strides) {
    Reading<W> reading;
    reading.first = sample.image * strides.image + sample.y * strides.y + sample.x * strides.x;
    for (int corner = 0; corner < 4; ++corner) reading.weight[corner] = sample.mask * sample.weight(corner);
    reading.inside = sample.inside;
    return reading;
}

__device__ int64_t corner_offset(int corner, const Strides& strides) {
    return (corner & 2 ? strides.y : 0) + (corner & 1 ? strides.x : 0);
}

// The corners of a sample in a channel, or zeros beyond the image.
template <class T, int kVector>
struct Corners {
    Packed<T, kVector> at[4];
};

template <int kVector, class T, class W>
__device__ Corners<T, kVector> load_corners(const T* first, const Reading<W>& reading, const Strides& strides,
                                            bool there = true) {
    const unsigned inside = there ? reading.inside : 0;
    Corners<T, kVector> corners;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
        const T* const from = first + corner_offset(corner, strides);
        corners.at[corner] = load_if<T, kVector>((inside >> corner & 1) != 0, from);
    }
    return corners;
}

// The samples.
template <class T, int kVector, class W>
__device__ Packed<T, kVector> blend(const Corners<T, kVector>& corners, const Reading<W>& reading) {
    W sums[kVector] = {};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
        W numbers[kVector];
        widen(corners.at[corner], numbers);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[i] += reading.weight[corner] * numbers[i];
    }
    return narrow<T, kVector>(sums);
}

uint32_t count_samples(const Params& p) {
    return static_cast<uint32_t>(p.count * p.shape.offset_groups * p.taps);
}

// As many lanes as a sample has vectors, rounded up to a power of two, at most kMostLanes.
Lanes choose_lanes(const Params& p, int vector) {
    Lanes lanes{0};
    while (lanes.count() < kMostLanes && lanes.count() * vector < p.shape.channels / p.shape.offset_groups) {
        ++lanes.bits;
    }
    return lanes;
}

// Calls body(element type, channels a vector) with vectors of 16 bytes where every address allows them, or of
// one element.
template <class T, class Body>
void with_vectors(const Params& p, const Body& body) {
    constexpr int kWide = 16 / static_cast<int>(sizeof(T));
    const Shape& s = p.shape;
    const int64_t elements = s.channels / s.offset_groups | s.channels / s.groups | p.input_strides.image |
                             p.input_strides.y | p.input_strides.x;
    const auto addresses = reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.columns) |
                           reinterpret_cast<uintptr_t>(p.input_gradient);
    if (elements % kWide == 0 && addresses % 16 == 0) {
        body(T(0.0f), std::integral_constant<int, kWide>());
    } else {
        body(T(0.0f), std::integral_constant<int, 1>());
    }
}

template <class Body>
void with_types(const Params& p, const Body& body) {
    with_type(p.dtype, [&](auto type) { with_vectors<typename decltype(type)::type>(p, body); });
}

dim3 blocks(uint32_t items, uint32_t per_block) { return dim3(ceil_div(items, per_block)); }

}  // namespace
}  // namespace wsss::deform
