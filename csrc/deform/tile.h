// What the CPU does with a tile of output pixels at one tap: take samples of a block of channels, and bring
// gradients back to corners, offsets and masks. Included by cpu.cpp alone.
#pragma once

#include <algorithm>
#include <cstring>

#include "deform/math.h"

namespace wsss::deform {
namespace {

// The corners of a sample that lie in the image.
template <class T>
struct Corners {
    int count = 0;
    int which[4];
    T* row[4];

    // base: the channel at hand of image 0, pixel (0, 0).
    template <class W>
    Corners(const Sample<W>& sample, T* base, const Strides& strides) {
        T* const first = base + sample.image * strides.image + sample.y * strides.y + sample.x * strides.x;
        for (int corner = 0; corner < 4; ++corner) {
            if ((sample.inside >> corner & 1) == 0) continue;
            which[count] = corner;
            row[count++] = first + (corner >> 1) * strides.y + (corner & 1) * strides.x;
        }
    }
};

// The loops over channels, for a known number of corners.
template <int kCount, class T, class W>
void blend(W* to, const Corners<const T>& corners, const W* weight, int64_t length) {
#pragma omp simd
    for (int64_t c = 0; c < length; ++c) {
        W sum = 0;
        for (int i = 0; i < kCount; ++i) sum += weight[i] * static_cast<W>(corners.row[i][c]);
        to[c] = sum;
    }
}

template <int kCount, class T, class W>
void multiply(W* sums, const Corners<const T>& corners, const W* gradient, int64_t length) {
    W sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;  // an array of sums would not be vectorised
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
    for (int64_t c = 0; c < length; ++c) {
        const W factor = gradient[c];
        sum0 += factor * static_cast<W>(corners.row[0][c]);
        if (kCount > 1) sum1 += factor * static_cast<W>(corners.row[1][c]);
        if (kCount > 2) sum2 += factor * static_cast<W>(corners.row[2][c]);
        if (kCount > 3) sum3 += factor * static_cast<W>(corners.row[3][c]);
    }
    const W sum[] = {sum0, sum1, sum2, sum3};
    for (int i = 0; i < kCount; ++i) sums[corners.which[i]] += sum[i];
}

template <int kCount, class W>
void scatter(const Corners<W>& corners, const W* weight, const W* gradient, int64_t length) {
#pragma omp simd
    for (int64_t c = 0; c < length; ++c) {
        for (int i = 0; i < kCount; ++i) corners.row[i][c] += weight[i] * gradient[c];
    }
}

template <class W>
struct CornerWeights {
    W at[4];

    template <class T>
    CornerWeights(const Sample<W>& sample, const Corners<T>& corners) {
        for (int i = 0; i < corners.count; ++i) at[i] = sample.mask * sample.weight(corners.which[i]);
    }
};

struct Tile {  // of output pixels
    int64_t first, count;
};

// Channels of one group of the weight.
struct Block {
    int64_t group, first, count;  // first: within the group
};

// Blocks of at most `width` channels, a multiple of a panel: block number `index` of them.
Block find_block(const Shape& s, int64_t width, int64_t index) {
    const int64_t group_channels = s.channels / s.groups, blocks = ceil_div(group_channels, width);
    const int64_t first = index % blocks * width;
    return {index / blocks, first, std::min(width, group_channels - first)};
}

// The samples of a tile at a tap, [offset group][pixel of the tile].
template <class W>
void find_samples(const Params& p, const Tile& tile, int64_t tap, Sample<W>* samples) {
    const Shape& s = p.shape;
    Place at{};
    at.tap_y = tap / s.kernel_w;
    at.tap_x = tap % s.kernel_w;
    for (int64_t i = 0; i < tile.count; ++i) {
        const int64_t pixel = tile.first + i;
        at.x = pixel % s.out_width;
        at.y = pixel / s.out_width % s.out_height;
        at.image = pixel / (s.out_width * s.out_height);
        for (at.group = 0; at.group < s.offset_groups; ++at.group) {
            samples[at.group * tile.count + i] = find_sample<W>(p, at);
        }
    }
}

// Calls body(offset group, channel, channels) for the runs of a block that one offset group moves.
template <class Body>
WSSS_HOST_DEVICE void for_each_run(const Shape& s, const Block& block, const Body& body) {
    const int64_t width = s.channels / s.offset_groups;
    int64_t channel = block.group * (s.channels / s.groups) + block.first;
    const int64_t end = channel + block.count;
    while (channel < end) {
        const int64_t group = channel / width;
        const int64_t length = std::min(end, (group + 1) * width) - channel;
        body(group, channel, length);
        channel += length;
    }
}

// to [pixel][row]: the block's channels of each sample of a tile.
template <class T, class W>
void sample_block(const Params& p, const Tile& tile, const Sample<W>* samples, const Block& block, W* to,
                  int64_t row) {
    for_each_run(p.shape, block, [&](int64_t group, int64_t channel, int64_t length) {
        const T* const input = static_cast<const T*>(p.input) + channel;
        for (int64_t i = 0; i < tile.count; ++i) {
            const Sample<W>& sample = samples[group * tile.count + i];
            const Corners<const T> corners(sample, input, p.input_strides);
            const CornerWeights<W> weight(sample, corners);
            W* const out = to + i * row;
            switch (corners.count) {
                case 0:
                    std::memset(out, 0, length * sizeof(W));
                    break;
                case 1:
                    blend<1>(out, corners, weight.at, length);
                    break;
                case 2:
                    blend<2>(out, corners, weight.at, length);
                    break;
                case 3:
                    blend<3>(out, corners, weight.at, length);
                    break;
                default:
                    blend<4>(out, corners, weight.at, length);
            }
        }
        to += length;
    });
}

// sums [offset group][pixel][corner] += the block's gradient [pixel][row] times the corners.
template <class T, class W>
void multiply_corners(const Params& p, const Tile& tile, const Sample<W>* samples, const Block& block,
                      const W* gradient, int64_t row, W* sums) {
    for_each_run(p.shape, block, [&](int64_t group, int64_t channel, int64_t length) {
        const T* const input = static_cast<const T*>(p.input) + channel;
        for (int64_t i = 0; i < tile.count; ++i) {
            const int64_t at = group * tile.count + i;
            const Corners<const T> corners(samples[at], input, p.input_strides);
            const W* const from = gradient + i * row;
            switch (corners.count) {
                case 1:
                    multiply<1>(sums + 4 * at, corners, from, length);
                    break;
                case 2:
                    multiply<2>(sums + 4 * at, corners, from, length);
                    break;
                case 3:
                    multiply<3>(sums + 4 * at, corners, from, length);
                    break;
                case 4:
                    multiply<4>(sums + 4 * at, corners, from, length);
                    break;
                default:
                    break;
            }
        }
        gradient += length;
    });
}

template <class W>
void scatter_block(const Params& p, const Tile& tile, const Sample<W>* samples, const Block& block,
                   const W* gradient, int64_t row) {
    const Shape& s = p.shape;
    const Strides strides{s.height * s.width * s.channels, 1, s.width * s.channels, s.channels};
    for_each_run(s, block, [&](int64_t group, int64_t channel, int64_t length) {
        W* const base = static_cast<W*>(p.input_gradient) + channel;
        for (int64_t i = 0; i < tile.count; ++i) {
            const Sample<W>& sample = samples[group * tile.count + i];
            const Corners<W> corners(sample, base, strides);
            const CornerWeights<W> weight(sample, corners);
            const W* const from = gradient + i * row;
            switch (corners.count) {
                case 1:
                    scatter<1>(corners, weight.at, from, length);
                    break;
                case 2:
                    scatter<2>(corners, weight.at, from, length);
                    break;
                case 3:
                    scatter<3>(corners, weight.at, from, length);
                    break;
                case 4:
                    scatter<4>(corners, weight.at, from, length);
                    break;
                default:
                    break;
            }
        }
        gradient += length;
    });
}

// A sample's gradients by its own coordinates and mask, over some of its channels.
template <class W>
struct Derivatives {
    W y, x, mask;

    Derivatives() = default;
    Derivatives(const Sample<W>& sample, const W* sums) : y(0), x(0), mask(0) {
        for (int corner = 0; corner < 4; ++corner) {
            y += sample.mask * sample.weight_y(corner) * sums[corner];
            x += sample.mask * sample.weight_x(corner) * sums[corner];
            mask += sample.weight(corner) * sums[corner];
        }
    }
};

}  // namespace
}  // namespace wsss::deform
