// Levels of features, normalised and resized, and their gradient. For cpu.cpp alone.
//
// A thread makes a row of the result, or of a level's gradient: it loads the rows that this reads, channels
// apart and pixels side by side whatever the layout, into memory of its own that its caches hold. Norms are
// found there, and no two threads write to one number. Rows that nothing reads, as half of them where a level
// is four times the size, are not loaded.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "cpu_memory.h"
#include "prototype/math.h"

namespace wsss::prototype::WSSS_LEVEL {
namespace {

// rows[c * width + x] = a row of an image.
template <class T>
void load_row(wide<T>* rows, const T* from, const Strides& strides, int64_t channels, int64_t width) {
    constexpr int64_t kStep = 16;  // channels side by side that are read at once
    if (strides.channel != 1) {
        for (int64_t c = 0; c < channels; ++c) {
            for (int64_t x = 0; x < width; ++x) {
                rows[c * width + x] = static_cast<wide<T>>(from[c * strides.channel + x * strides.x]);
            }
        }
        return;
    }
    for (int64_t begin = 0; begin < channels; begin += kStep) {
        const int64_t end = std::min(begin + kStep, channels);
        for (int64_t x = 0; x < width; ++x) {
            for (int64_t c = begin; c < end; ++c) {
                rows[c * width + x] = static_cast<wide<T>>(from[x * strides.x + c]);
            }
        }
    }
}

template <class T>
void store_row(T* to, const wide<T>* rows, const Strides& strides, int64_t channels, int64_t width) {
    constexpr int64_t kStep = 16;
    if (strides.channel != 1) {
        for (int64_t c = 0; c < channels; ++c) {
            for (int64_t x = 0; x < width; ++x) {
                to[c * strides.channel + x * strides.x] = static_cast<T>(rows[c * width + x]);
            }
        }
        return;
    }
    for (int64_t begin = 0; begin < channels; begin += kStep) {
        const int64_t end = std::min(begin + kStep, channels);
        for (int64_t x = 0; x < width; ++x) {
            for (int64_t c = begin; c < end; ++c) to[x * strides.x + c] = static_cast<T>(rows[c * width + x]);
        }
    }
}

// to[x] += sum over channels of a * b
template <class W>
void add_products(W* to, const W* a, const W* b, int64_t channels, int64_t width) {
    for (int64_t c = 0; c < channels; ++c) {
#pragma omp simd
        for (int64_t x = 0; x < width; ++x) to[x] += a[c * width + x] * b[c * width + x];
    }
}

// to += rows, pixel x times scales[x]
template <class W>
void add_with_scales(W* to, const W* rows, const W* scales, int64_t channels, int64_t width) {
    for (int64_t c = 0; c < channels; ++c) {
#pragma omp simd
        for (int64_t x = 0; x < width; ++x) to[c * width + x] += rows[c * width + x] * scales[x];
    }
}

// Where the columns of the result read; made once, for all threads.
template <class W>
struct Columns {
    int32_t *left, *right;
    W* fraction;  // of the right one

    static int64_t bytes(const LevelParams& p) {
        return 2 * bytes_for<int32_t>(p.out_width) + bytes_for<W>(p.out_width);
    }
    Columns(const LevelParams& p, Arena arena)
        : left(arena.take<int32_t>(p.out_width)),
          right(arena.take<int32_t>(p.out_width)),
          fraction(arena.take<W>(p.out_width)) {
        const Axis<W> axis(p.width, p.out_width, false);
        for (int64_t x = 0; x < p.out_width; ++x) {
            const Tap<W> tap = axis.at(x);
            left[x] = static_cast<int32_t>(tap.index);
            right[x] = left[x] + (tap.fraction > 0);  // NaN stays with those that have it in their blend
            fraction[x] = tap.fraction;
        }
    }
};

// What a thread has to itself.
template <class W>
struct Rows {
    W *level, *blended;  // [channels][width]
    W* resized;          // [channels][out_width]
    W *squares, *dots;   // [width]

    static int64_t bytes(const LevelParams& p) {
        return 2 * bytes_for<W>(p.channels * p.width) + bytes_for<W>(p.channels * p.out_width) +
               2 * bytes_for<W>(p.width);
    }
    Rows(const LevelParams& p, Arena arena)
        : level(arena.take<W>(p.channels * p.width)),
          blended(arena.take<W>(p.channels * p.width)),
          resized(arena.take<W>(p.channels * p.out_width)),
          squares(arena.take<W>(p.width)),
          dots(arena.take<W>(p.width)) {}
};

// Adds weight * a row of the level, normalised, to `blended`.
template <class T>
void blend_row(const LevelParams& p, const Rows<wide<T>>& rows, const T* from, wide<T> weight) {
    using W = wide<T>;
    load_row(rows.level, from, p.strides, p.channels, p.width);
    W* const scales = rows.squares;
    std::fill_n(scales, p.width, p.normalise ? W{0} : weight);
    if (p.normalise) {
        add_products(scales, rows.level, rows.level, p.channels, p.width);
        for (int64_t x = 0; x < p.width; ++x) scales[x] = weight * find_scale(scales[x]);
    }
    add_with_scales(rows.blended, rows.level, scales, p.channels, p.width);
}

template <class T>
void resize(const LevelParams& p, int threads) {
    using W = wide<T>;
    const Axis<W> axis(p.height, p.out_height, false);
    const Memory tables(1, Columns<W>::bytes(p)), memory(threads, Rows<W>::bytes(p));
    const Columns<W> columns(p, tables.arena(0));
#pragma omp parallel for num_threads(threads)
    for (int64_t unit = 0; unit < p.images * p.out_height; ++unit) {
        const Rows<W> rows(p, memory.arena(omp_get_thread_num()));
        const int64_t n = unit / p.out_height, y = unit % p.out_height;
        const Tap<W> tap = axis.at(y);
        const T* const from = static_cast<const T*>(p.level) + n * p.strides.image + tap.index * p.strides.y;
        std::fill_n(rows.blended, p.channels * p.width, W{0});
        blend_row(p, rows, from, 1 - tap.fraction);
        if (tap.fraction > 0) blend_row(p, rows, from + p.strides.y, tap.fraction);
        for (int64_t c = 0; c < p.channels && p.width != p.out_width; ++c) {
            const W* const blended = rows.blended + c * p.width;
            for (int64_t x = 0; x < p.out_width; ++x) {
                rows.resized[c * p.out_width + x] = blended[columns.left[x]] * (1 - columns.fraction[x]) +
                                                    blended[columns.right[x]] * columns.fraction[x];
            }
        }
        T* const to = static_cast<T*>(p.resized) + n * p.resized_strides.image + y * p.resized_strides.y;
        store_row(to, p.width == p.out_width ? rows.blended : rows.resized, p.resized_strides, p.channels,
                  p.out_width);
    }
}

// Adds to `blended` what a row of the level gets from the result's rows that read it; whether there are any.
template <class T>
bool gather_rows(const LevelParams& p, const Rows<wide<T>>& rows, const Columns<wide<T>>& columns,
                 const Axis<wide<T>>& axis, int64_t n, int64_t y) {
    using W = wide<T>;
    bool any = false;
    const int64_t end = axis.first_output(y + 1, p.out_height);
    for (int64_t out = axis.first_output(y - 1, p.out_height); out < end; ++out) {
        const Tap<W> tap = axis.at(out);
        const W weight = tap.index == y ? 1 - tap.fraction : tap.fraction;
        if (weight == 0) continue;
        any = true;
        const T* const from = static_cast<const T*>(p.resized_gradient) + n * p.resized_strides.image +
                              out * p.resized_strides.y;
        load_row(rows.resized, from, p.resized_strides, p.channels, p.out_width);
        for (int64_t c = 0; c < p.channels; ++c) {
            const W* const gradient = rows.resized + c * p.out_width;
            W* const to = rows.blended + c * p.width;
            if (p.width == p.out_width) {
#pragma omp simd
                for (int64_t x = 0; x < p.width; ++x) to[x] += weight * gradient[x];
                continue;
            }
            for (int64_t x = 0; x < p.out_width; ++x) {
                to[columns.left[x]] += weight * gradient[x] * (1 - columns.fraction[x]);
                to[columns.right[x]] += weight * gradient[x] * columns.fraction[x];
            }
        }
    }
    return any;
}

template <class T>
void find_level_gradients(const LevelParams& p, int threads) {
    using W = wide<T>;
    const Axis<W> axis(p.height, p.out_height, false);
    const Memory tables(1, Columns<W>::bytes(p)), memory(threads, Rows<W>::bytes(p));
    const Columns<W> columns(p, tables.arena(0));
#pragma omp parallel for num_threads(threads)
    for (int64_t unit = 0; unit < p.images * p.height; ++unit) {
        const Rows<W> rows(p, memory.arena(omp_get_thread_num()));
        const int64_t n = unit / p.height, y = unit % p.height;
        std::fill_n(rows.blended, p.channels * p.width, W{0});
        if (gather_rows<T>(p, rows, columns, axis, n, y) && p.normalise) {
            const T* const from = static_cast<const T*>(p.level) + n * p.strides.image + y * p.strides.y;
            load_row(rows.level, from, p.strides, p.channels, p.width);
            std::fill_n(rows.squares, p.width, W{0});
            std::fill_n(rows.dots, p.width, W{0});
            add_products(rows.squares, rows.level, rows.level, p.channels, p.width);
            add_products(rows.dots, rows.level, rows.blended, p.channels, p.width);
            for (int64_t c = 0; c < p.channels; ++c) {
                for (int64_t x = 0; x < p.width; ++x) {
                    W& gradient = rows.blended[c * p.width + x];
                    const W number = rows.level[c * p.width + x];
                    gradient = find_level_gradient(gradient, number, rows.dots[x], rows.squares[x]);
                }
            }
        }
        T* const to =
            static_cast<T*>(p.level_gradient) + n * p.gradient_strides.image + y * p.gradient_strides.y;
        store_row(to, rows.blended, p.gradient_strides, p.channels, p.width);
    }
}

}  // namespace
}  // namespace wsss::prototype::WSSS_LEVEL
