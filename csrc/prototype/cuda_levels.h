// Levels of features, normalised and resized, and their gradient, on CUDA.
//
// P1: N20, levels of 168, 42, 21 and 21 MB fp32 and 63 MB of result. A level is read once for the norms of
// its pixels and once more, from L2 where it fits, for the result, which is written once. The gradient is
// gathered, so there are no atomics: a thread takes a pixel of the level and goes twice through its channels,
// first for the sums that the norm's derivative needs.
#pragma once

#include "prototype/cuda_group.h"

namespace wsss::prototype {
namespace {

template <class W>
struct Axes {
    Axis<W> y, x;
    explicit Axes(const LevelParams& p) : y(p.height, p.out_height, false), x(p.width, p.out_width, false) {}
};

// Pixels of maps of one size, and where a block's thread finds its own.
struct Map {
    Items items;
    Divisor width;

    template <bool kTogether>
    static Map of(int64_t height, int64_t width) {
        return {Items::of<kTogether>(height * width), Divisor(static_cast<uint32_t>(width))};
    }
};

template <class T, bool kTogether>
__global__ void __launch_bounds__(kThreads, 2) find_scales(LevelParams p, Map map) {
    using W = wide<T>;
    using Lanes = Group<kTogether>;
    const int64_t image = map.items.image();
    const uint32_t pixel = map.items.item<kTogether>(), y = map.width.quotient(pixel);
    const bool exists = pixel < map.items.count;
    const T* const from = static_cast<const T*>(p.level) + image * p.strides.image + y * p.strides.y +
                          map.width.remainder(pixel, y) * p.strides.x;
    W squares = 0;
    for (int64_t d = Lanes::lane(); exists && d < p.channels; d += Lanes::kLanes) {
        const W number = static_cast<W>(from[d * p.strides.channel]);
        squares += number * number;
    }
    squares = Lanes::sum(squares);
    if (exists && Lanes::lane() == 0) {
        static_cast<W*>(p.scales)[image * map.items.count + pixel] = p.normalise ? find_scale(squares) : W{1};
    }
}

template <class T, bool kTogether>
__global__ void __launch_bounds__(kThreads, 2) write_resized(LevelParams p, Map map, Axes<wide<T>> axes) {
    using W = wide<T>;
    using Lanes = Group<kTogether>;
    const int64_t image = map.items.image();
    const uint32_t pixel = map.items.item<kTogether>();
    if (pixel >= map.items.count) return;
    const uint32_t y = map.width.quotient(pixel), x = map.width.remainder(pixel, y);
    const Tap<W> row = axes.y.at(y), column = axes.x.at(x);
    // A corner without weight is not read apart: NaN stays with those that have it in their blend.
    const int64_t down = row.fraction > 0, right = column.fraction > 0;
    const T* const from = static_cast<const T*>(p.level) + image * p.strides.image + row.index * p.strides.y +
                          column.index * p.strides.x;
    const W* const scales =
        static_cast<const W*>(p.scales) + (image * p.height + row.index) * p.width + column.index;
    W weights[2][2];
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
            weights[i][j] = (i == 0 ? 1 - row.fraction : row.fraction) *
                            (j == 0 ? 1 - column.fraction : column.fraction) *
                            scales[i * down * p.width + j * right];
        }
    }
    T* const to = static_cast<T*>(p.resized) + image * p.resized_strides.image + y * p.resized_strides.y +
                  x * p.resized_strides.x;
    for (int64_t d = Lanes::lane(); d < p.channels; d += Lanes::kLanes) {
        const T* const numbers = from + d * p.strides.channel;
        W sum = 0;
        for (int i = 0; i < 2; ++i) {
            for (int j = 0; j < 2; ++j) {
                sum +=
                    weights[i][j] * static_cast<W>(numbers[i * down * p.strides.y + j * right * p.strides.x]);
            }
        }
        to[d * p.resized_strides.channel] = static_cast<T>(sum);
    }
}

// Pixels of the result that read a pixel of the level.
template <class W>
struct Readers {
    const Axes<W>& axes;
    int64_t y, x, top, bottom, left, right;

    __device__ Readers(const LevelParams& p, const Axes<W>& axes, int64_t y, int64_t x)
        : axes(axes),
          y(y),
          x(x),
          top(axes.y.first_output(y - 1, p.out_height)),
          bottom(axes.y.first_output(y + 1, p.out_height)),
          left(axes.x.first_output(x - 1, p.out_width)),
          right(axes.x.first_output(x + 1, p.out_width)) {}

    static __device__ W weight(const Tap<W>& tap, int64_t index) {
        return tap.index == index ? 1 - tap.fraction : tap.fraction;
    }

    // What they give to it, of one channel.
    template <class T>
    __device__ W gather(const T* gradient, const Strides& strides) const {
        W sum = 0;
        for (int64_t i = top; i < bottom; ++i) {
            const W of_row = weight(axes.y.at(i), y);
            if (of_row == 0) continue;
            for (int64_t j = left; j < right; ++j) {
                const W both = of_row * weight(axes.x.at(j), x);
                if (both != 0) sum += both * static_cast<W>(gradient[i * strides.y + j * strides.x]);
            }
        }
        return sum;
    }
};

template <class T, bool kTogether>
__global__ void __launch_bounds__(kThreads, 2)
    write_level_gradients(LevelParams p, Map map, Axes<wide<T>> axes) {
    using W = wide<T>;
    using Lanes = Group<kTogether>;
    const int64_t image = map.items.image();
    const uint32_t pixel = map.items.item<kTogether>(), y = map.width.quotient(pixel);
    const uint32_t x = map.width.remainder(pixel, y);
    const bool exists = pixel < map.items.count;
    const T* const numbers =
        static_cast<const T*>(p.level) + image * p.strides.image + y * p.strides.y + x * p.strides.x;
    const T* const gradient = static_cast<const T*>(p.resized_gradient) + image * p.resized_strides.image;
    T* const to = static_cast<T*>(p.level_gradient) + image * p.gradient_strides.image +
                  y * p.gradient_strides.y + x * p.gradient_strides.x;
    const Readers<W> readers(p, axes, exists ? y : 0, exists ? x : 0);
    W squares = 0, dot = 0;
    for (int64_t d = Lanes::lane(); p.normalise && exists && d < p.channels; d += Lanes::kLanes) {
        const W number = static_cast<W>(numbers[d * p.strides.channel]);
        squares += number * number;
        dot += number * readers.gather(gradient + d * p.resized_strides.channel, p.resized_strides);
    }
    squares = Lanes::sum(squares);
    dot = Lanes::sum(dot);
    const bool is_read = readers.top < readers.bottom && readers.left < readers.right;
    for (int64_t d = Lanes::lane(); exists && d < p.channels; d += Lanes::kLanes) {
        W value = readers.gather(gradient + d * p.resized_strides.channel, p.resized_strides);
        if (p.normalise && is_read) {
            value = find_level_gradient(value, static_cast<W>(numbers[d * p.strides.channel]), dot, squares);
        }
        to[d * p.gradient_strides.channel] = static_cast<T>(value);
    }
}

template <class T, bool kTogether>
void run_resize(const LevelParams& p, const Where& where) {
    const Map level = Map::of<kTogether>(p.height, p.width),
              resized = Map::of<kTogether>(p.out_height, p.out_width);
    launch(find_scales<T, kTogether>, group_blocks<kTogether>(p.images, p.height * p.width), group_threads(),
           0, where.stream, p, level);
    launch(write_resized<T, kTogether>, group_blocks<kTogether>(p.images, p.out_height * p.out_width),
           group_threads(), 0, where.stream, p, resized, Axes<wide<T>>(p));
}

template <class T, bool kTogether>
void run_differentiate(const LevelParams& p, const Where& where) {
    launch(write_level_gradients<T, kTogether>, group_blocks<kTogether>(p.images, p.height * p.width),
           group_threads(), 0, where.stream, p, Map::of<kTogether>(p.height, p.width), Axes<wide<T>>(p));
}

}  // namespace
}  // namespace wsss::prototype
