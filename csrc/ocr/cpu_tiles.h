// Between tensors and tiles, where classes lie apart and pixels side by side. For cpu.cpp alone.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "ocr/cpu_pixels.h"

namespace wsss::ocr::WSSS_LEVEL {
namespace {

// 4x4 numbers, to be transposed. Loaded whole: from loads of single numbers gcc builds the columns one by
// one, twice as slow.
template <class W>
class Square {
  public:
    template <class T>
    WSSS_HOST_DEVICE void load_row(int i, const T* from) {
        if constexpr (std::is_same_v<T, W>) {
            std::memcpy(&rows_[i], from, sizeof(Row));
        } else {
            for (int j = 0; j < 4; ++j) rows_[i][j] = static_cast<W>(from[j]);
        }
    }
    WSSS_HOST_DEVICE void store_row(int i, W* to) const { std::memcpy(to, &rows_[i], sizeof(Row)); }
    WSSS_HOST_DEVICE void transpose() {
        constexpr Index low{0, 4, 1, 5}, high{2, 6, 3, 7}, first{0, 1, 4, 5}, second{2, 3, 6, 7};
        const Row a = __builtin_shuffle(rows_[0], rows_[1], low);
        const Row b = __builtin_shuffle(rows_[2], rows_[3], low);
        const Row c = __builtin_shuffle(rows_[0], rows_[1], high);
        const Row d = __builtin_shuffle(rows_[2], rows_[3], high);
        rows_[0] = __builtin_shuffle(a, b, first);
        rows_[1] = __builtin_shuffle(a, b, second);
        rows_[2] = __builtin_shuffle(c, d, first);
        rows_[3] = __builtin_shuffle(c, d, second);
    }

  private:
    typedef W Row __attribute__((vector_size(4 * sizeof(W))));
    typedef Integer<W> Index __attribute__((vector_size(4 * sizeof(W))));
    Row rows_[4];
};

// Asks for numbers needed soon: hardware follows neither a stream per class nor the steps of a Square.
template <bool kWritten, class T>
WSSS_HOST_DEVICE void prefetch(const T* from, int64_t numbers) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < numbers; i += kLine) __builtin_prefetch(from + i, kWritten);
}

constexpr int64_t kAhead = 8;  // classes

// How many classes and pixels, where a pixel's classes lie side by side, make up whole squares.
struct Squares {
    int64_t classes, pixels;
    Squares(int64_t channel, int64_t all_classes, int64_t all_pixels)
        : classes(channel == 1 ? all_classes / 4 * 4 : 0), pixels(classes > 0 ? all_pixels / 4 * 4 : 0) {}
};

// scores[c][i] = from[c * channel + i * x]
template <class T, class W>
void load_scores(W* scores, const T* from, int64_t channel, int64_t x, int64_t classes, int64_t pixels) {
    const Squares squares(channel, classes, pixels);
    for (int64_t c = 0; c < squares.classes; c += 4) {
        const int64_t share = pixels * x * 4 / squares.classes;  // of the next tile
        prefetch<false>(from + pixels * x + c / 4 * share, share);
        for (int64_t i = 0; i < squares.pixels; i += 4) {
            Square<W> square;
            for (int k = 0; k < 4; ++k) square.load_row(k, from + (i + k) * x + c);
            square.transpose();
            for (int k = 0; k < 4; ++k) square.store_row(k, scores + (c + k) * kPitch + i);
        }
    }
    for (int64_t c = 0; c < classes; ++c) {
        const T* const row = from + c * channel;
        W* const to = scores + c * kPitch;
        const int64_t first = c < squares.classes ? squares.pixels : 0;
        if (x == 1) {
            prefetch<false>(c + kAhead < classes ? row + kAhead * channel
                                                 : from + (c + kAhead - classes) * channel + pixels,
                            pixels);
            for (int64_t i = first; i < pixels; ++i) to[i] = static_cast<W>(row[i]);
        } else {
            for (int64_t i = first; i < pixels; ++i) to[i] = static_cast<W>(row[i * x]);
        }
    }
}

// The inverse. Classes side by side are written pixel by pixel, four at a time: through `scratch`, 4 *
// classes numbers, where they have another type, for whole rows convert several times faster than squares.
template <class T, class W>
void store_gradient(T* to, const W* gradient, int64_t channel, int64_t x, int64_t classes, int64_t pixels,
                    W* scratch) {
    const Squares squares(channel, classes, pixels);
    for (int64_t i = 0; i < squares.pixels; i += 4) {
        prefetch<true>(to + (pixels + i) * x, 4 * x);
        const auto transpose = [&](W* const rows, int64_t pitch) {
            for (int64_t c = 0; c < squares.classes; c += 4) {
                Square<W> square;
                for (int k = 0; k < 4; ++k) square.load_row(k, gradient + (c + k) * kPitch + i);
                square.transpose();
                for (int k = 0; k < 4; ++k) square.store_row(k, rows + k * pitch + c);
            }
        };
        if constexpr (std::is_same_v<T, W>) {
            transpose(to + i * x, x);
        } else {
            transpose(scratch, classes);
            for (int k = 0; k < 4; ++k) {
                T* const row = to + (i + k) * x;
                const W* const source = scratch + k * classes;
                for (int64_t c = 0; c < squares.classes; ++c) row[c] = static_cast<T>(source[c]);
            }
        }
    }
    for (int64_t c = 0; c < classes; ++c) {
        const W* const from = gradient + c * kPitch;
        T* const row = to + c * channel;
        const int64_t first = c < squares.classes ? squares.pixels : 0;
        if (x == 1) {
            for (int64_t i = first; i < pixels; ++i) row[i] = static_cast<T>(from[i]);
        } else {
            for (int64_t i = first; i < pixels; ++i) row[i * x] = static_cast<T>(from[i]);
        }
    }
}

// Where the columns of a resized image read.
template <class W>
struct Columns {
    int64_t* index;          // the left one of two columns of the logits
    int64_t *offset, *next;  // of both from the row's first number; the last column is its own next
    W *weight, *next_weight;

    static int64_t bytes(int64_t count) { return 3 * bytes_for<int64_t>(count) + 2 * bytes_for<W>(count); }
    Columns(const Params& p, Arena arena)
        : index(arena.take<int64_t>(p.out_width)),
          offset(arena.take<int64_t>(p.out_width)),
          next(arena.take<int64_t>(p.out_width)),
          weight(arena.take<W>(p.out_width)),
          next_weight(arena.take<W>(p.out_width)) {
        const Axis<W> axis(p.width, p.out_width, p.align_corners);
        for (int64_t x = 0; x < p.out_width; ++x) {
            const Tap<W> tap = axis.at(x);
            index[x] = tap.index;
            offset[x] = tap.index * p.strides.x;
            next[x] = std::min(tap.index + 1, p.width - 1) * p.strides.x;
            weight[x] = 1 - tap.fraction;
            next_weight[x] = tap.fraction;
        }
    }
};

// scores[c][i]: a row of the logits at column first + i of the loss.
template <class T, class W>
void blend_columns(W* scores, const T* row, int64_t channel, const Columns<W>& columns, int64_t first,
                   int64_t classes, int64_t pixels) {
    const int64_t* const offset = columns.offset + first;
    const int64_t* const next = columns.next + first;
    const W* const weight = columns.weight + first;
    const W* const next_weight = columns.next_weight + first;
    for (int64_t c = 0; c < classes; ++c) {
        const T* const from = row + c * channel;
        W* const to = scores + c * kPitch;
        for (int64_t i = 0; i < pixels; ++i) {
            to[i] =
                static_cast<W>(from[offset[i]]) * weight[i] + static_cast<W>(from[next[i]]) * next_weight[i];
        }
    }
}

// The transpose: adds to share[c][column of the logits].
template <class W>
void spread_columns(W* share, const W* gradient, const Columns<W>& columns, int64_t first, int64_t classes,
                    int64_t pixels, int64_t width) {
    const int64_t* const index = columns.index + first;
    const W* const weight = columns.weight + first;
    const W* const next_weight = columns.next_weight + first;
    for (int64_t c = 0; c < classes; ++c) {
        const W* const from = gradient + c * kPitch;
        W* const to = share + c * width;
        for (int64_t i = 0; i < pixels;) {
            const int64_t column = index[i];
            W left = 0, right = 0;
            for (; i < pixels && index[i] == column; ++i) {
                left += from[i] * weight[i];
                right += from[i] * next_weight[i];
            }
            to[column] += left;
            if (column + 1 < width) to[column + 1] += right;
        }
    }
}

}  // namespace
}  // namespace wsss::ocr::WSSS_LEVEL
