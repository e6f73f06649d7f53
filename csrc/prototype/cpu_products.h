// Sums over rows of features: products with vectors of classes, and sums over the pixels of a class.
// For cpu.cpp alone.
//
// A row is what is contiguous: an image's pixels of one channel, or with channels_last a pixel's channels.
#pragma once

#include <algorithm>
#include <type_traits>

#include "multiply.h"
#include "prototype/math.h"

namespace wsss::prototype::WSSS_LEVEL {
namespace {

constexpr int64_t kBlock = 128;   // pixels or channels whose sums are made at once
constexpr int64_t kChunk = 1024;  // numbers of a row
constexpr int kFew = 4;           // classes or rows at once: as many as leave room in the registers

// A block of the pixels or channels of an image, the unit of a thread's work.
struct Block {
    int64_t image, first, count;
    Block(int64_t unit, int64_t items)
        : image(unit / ceil_div(items, kBlock)),
          first(unit % ceil_div(items, kBlock) * kBlock),
          count(std::min(kBlock, items - first)) {}
};

template <class W>
using Vec = typename VectorOf<W>::type;
template <class W>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(W));

template <class W>
WSSS_HOST_DEVICE Vec<W> load(const W* from) {
    return *reinterpret_cast<const Vec<W>*>(from);
}

template <class W>
WSSS_HOST_DEVICE W add_lanes(const Vec<W>& vector) {
    W lanes[kLanes<W>];
    for (int64_t i = 0; i < kLanes<W>; ++i) lanes[i] = vector[i];
    for (int64_t half = kLanes<W> / 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

// Numbers in the wide type: those in memory, or converted ones in the buffer.
template <class T>
const wide<T>* widen(const T* from, int64_t count, wide<T>* buffer) {
    if constexpr (std::is_same_v<T, wide<T>>) return from;
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<wide<T>>(from[i]);
    return buffer;
}

// run(std::integral_constant<int, count>) for 1 <= count <= kFew.
template <class Run>
void with_count(int64_t count, const Run& run) {
    if (count == 1) return run(std::integral_constant<int, 1>());
    if (count == 2) return run(std::integral_constant<int, 2>());
    if (count == 3) return run(std::integral_constant<int, 3>());
    run(std::integral_constant<int, kFew>());
}

// to[i] += sum over k of factors[k] * rows[k][i]
template <int kCount, class W>
void add_scaled(W* to, const W* factors, const W* const* rows, int64_t length) {
    W factor[kCount];
    const W* row[kCount];
    std::copy_n(factors, kCount, factor);
    std::copy_n(rows, kCount, row);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
        W sum = to[i];
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k) sum += factor[k] * row[k][i];
        to[i] = sum;
    }
}

template <int kCount, class W>
void add_squares(W* to, const W* const* rows, int64_t length) {
    const W* row[kCount];
    std::copy_n(rows, kCount, row);
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
        W sum = to[i];
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k) sum += row[k][i] * row[k][i];
        to[i] = sum;
    }
}

// sums[k] = sum over i of row[i] * vectors[k][i], and sums[kCount] that of the row with itself.
template <int kCount, class W>
void find_dots(const W* row, const W* const* vectors, int64_t length, W* sums) {
    Vec<W> parts[kCount + 1] = {};
    int64_t i = 0;
    for (; i + kLanes<W> <= length; i += kLanes<W>) {
        const Vec<W> numbers = load(row + i);
#pragma GCC unroll 4
        for (int k = 0; k < kCount; ++k) parts[k] += numbers * load(vectors[k] + i);
        parts[kCount] += numbers * numbers;
    }
#pragma GCC unroll 5
    for (int k = 0; k <= kCount; ++k) sums[k] = add_lanes<W>(parts[k]);
    for (; i < length; ++i) {
        for (int k = 0; k < kCount; ++k) sums[k] += row[i] * vectors[k][i];
        sums[kCount] += row[i] * row[i];
    }
}

template <class W>
W find_length(const W* row, int64_t count) {
    W squares;
    find_dots<0, W>(row, nullptr, count, &squares);
    return std::sqrt(squares);
}

// Up to kFew classes' vectors, and the products of kBlock pixels or channels with them and with themselves.
template <class W>
struct Products {
    const W* vectors[kFew];
    int64_t count = 0;
    W sums[kFew][kBlock];
    W squares[kBlock];
};

// Of `items` columns, over all rows, which lie row_stride apart.
template <class T>
void multiply_with_columns(const T* from, int64_t row_stride, int64_t rows, int64_t items,
                           Products<wide<T>>& products) {
    using W = wide<T>;
    W buffer[kFew][kBlock];
    for (int64_t k = 0; k < products.count; ++k) std::fill_n(products.sums[k], items, W{0});
    std::fill_n(products.squares, items, W{0});
    for (int64_t row = 0; row < rows; row += kFew) {
        const int64_t count = std::min<int64_t>(kFew, rows - row);
        const W* lines[kFew];
        for (int64_t i = 0; i < count; ++i) lines[i] = widen(from + (row + i) * row_stride, items, buffer[i]);
        with_count(count, [&](auto number) {
            add_squares<number.value>(products.squares, lines, items);
            for (int64_t k = 0; k < products.count; ++k) {
                add_scaled<number.value>(products.sums[k], products.vectors[k] + row, lines, items);
            }
        });
    }
}

// Of `items` rows, which lie row_stride apart.
template <class T>
void multiply_with_rows(const T* from, int64_t row_stride, int64_t length, int64_t items,
                        Products<wide<T>>& products) {
    using W = wide<T>;
    W buffer[kChunk];
    const int64_t chunk = std::is_same_v<T, W> ? length : kChunk;
    for (int64_t item = 0; item < items; ++item) {
        W sums[kFew + 1] = {}, squares = 0;
        for (int64_t begin = 0; begin < length; begin += chunk) {
            const int64_t count = std::min(chunk, length - begin);
            const W* const row = widen(from + item * row_stride + begin, count, buffer);
            const W* vectors[kFew];
            for (int64_t k = 0; k < products.count; ++k) vectors[k] = products.vectors[k] + begin;
            W parts[kFew + 1];
            if (products.count == 0) {
                find_dots<0, W>(row, vectors, count, parts);
            } else {
                with_count(products.count,
                           [&](auto number) { find_dots<number.value>(row, vectors, count, parts); });
            }
            for (int64_t k = 0; k < products.count; ++k) sums[k] += parts[k];
            squares += parts[products.count];
        }
        for (int64_t k = 0; k < products.count; ++k) products.sums[k][item] = sums[k];
        products.squares[item] = squares;
    }
}

// A chunk of an image's pixels by class: which vectors of lanes hold pixels of a class. Neighbours mostly
// belong to one class, so there are few more of these than vectors, however many classes there are.
template <class W>
class Segments {
  public:
    Segments(const int16_t* seeds, int64_t pixels, const int16_t* classes, int64_t class_count)
        : pixels_(pixels) {
        for (int64_t i = 0; i < pixels; ++i) labels_[i] = seeds[i];
        for (int64_t k = 0; k < class_count; ++k) {
            for (int64_t at = 0; at < whole(); at += kLanes<W>) {
                int matches = 0;
                for (int64_t i = at; i < at + kLanes<W>; ++i) matches += labels_[i] == classes[k];
                if (matches == 0) continue;
                classes_[count_] = classes[k];
                places_[count_++] = static_cast<int16_t>(at);
            }
        }
    }

    // sums[class * stride] += the numbers of the row at the class's pixels.
    void add_to(W* sums, int64_t stride, const W* row) const {
        for (int64_t i = 0; i < count_;) {
            const int16_t label = classes_[i];
            Vec<W> sum = {};
            for (; i < count_ && classes_[i] == label; ++i) {
                sum += matches(i) ? load(row + places_[i]) : Vec<W>{};
            }
            sums[label * stride] += add_lanes<W>(sum);
        }
        for (int64_t i = whole(); i < pixels_; ++i) {
            if (labels_[i] >= 0) sums[labels_[i] * stride] += row[i];
        }
    }

    // row += at each class's pixels shares[class * stride].
    void spread(W* row, const W* shares, int64_t stride) const {
        for (int64_t i = 0; i < count_; ++i) {
            const Vec<W> share = shares[classes_[i] * stride] - Vec<W>{};
            *reinterpret_cast<Vec<W>*>(row + places_[i]) += matches(i) ? share : Vec<W>{};
        }
        for (int64_t i = whole(); i < pixels_; ++i) {
            if (labels_[i] >= 0) row[i] += shares[labels_[i] * stride];
        }
    }

  private:
    using Label = std::conditional_t<std::is_same_v<W, double>, int64_t, int32_t>;
    typedef Label Labels __attribute__((vector_size(kVectorBytes), aligned(sizeof(Label)), may_alias));

    int64_t whole() const { return pixels_ / kLanes<W> * kLanes<W>; }
    WSSS_HOST_DEVICE auto matches(int64_t i) const {
        return *reinterpret_cast<const Labels*>(labels_ + places_[i]) == Label{classes_[i]} - Labels{};
    }

    int64_t pixels_, count_ = 0;
    Label labels_[kChunk];
    int16_t classes_[kChunk], places_[kChunk];  // each holds a pixel at least, so no more than those
};

}  // namespace
}  // namespace wsss::prototype::WSSS_LEVEL
