// Levels of features, normalised and resized, and their gradient, on CUDA: one launch each.
//
// P1: N20, levels of 168, 42, 21 and 21 MB fp32 and 63 MB of result. Forward only the corners of the result's
// pixels are read, half of the first level's rows; backward the same, beside the gradient, which is written
// once. Nothing has been timed on a GPU yet; counted in sm_90's machine code, a warp takes 46 instructions
// for 32 numbers of the result and 30 for 32 of a level's gradient, 8e7 in all, where the bytes of
// the whole operator leave time for 2e8; the latter were above 500, as each number searched for its readers.
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

    template <class Lanes>
    static Map of(int64_t height, int64_t width) {
        return {Items::of<Lanes>(height * width), Divisor(static_cast<uint32_t>(width))};
    }
};

// Of a pixel of channel 0, in elements.
__device__ inline int64_t offset_of(const Strides& strides, int64_t image, int64_t y, int64_t x) {
    return image * strides.image + y * strides.y + x * strides.x;
}

// A pixel of the result reads its four corners twice, first for their norms: what is read the second time, in
// the other direction, is for the most part in caches. A corner without weight is not read, so that NaN stays
// with those that have it in their blend.
template <class T, bool kTogether, int kCount>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 2)
    write_resized(LevelParams p, Map map, Axes<wide<T>> axes) {
    using W = wide<T>;
    using Lanes = Group<kTogether, 1, 1>;
    constexpr int kStep = Lanes::kLanes * kCount;
    __shared__ W sums[Lanes::kParts * Lanes::kPacks * 4];
    const Place<Lanes> place(map.items, blockIdx.x);
    const uint32_t pixel = place.readable(0);
    const uint32_t y = map.width.quotient(pixel), x = map.width.remainder(pixel, y);
    const Tap<W> row = axes.y.at(y), column = axes.x.at(x);
    const T* from[4];
    W weights[4];
    bool is_read[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        weights[i] =
            (i < 2 ? 1 - row.fraction : row.fraction) * (i % 2 == 0 ? 1 - column.fraction : column.fraction);
        is_read[i] = weights[i] != 0;
        from[i] = static_cast<const T*>(p.level) +
                  offset_of(p.strides, place.image, row.index + i / 2, column.index + i % 2);
    }
    const auto corner = [&](int i, int64_t d, W(&numbers)[kCount]) {
        widen(load_if<T, kCount>(is_read[i], from[i] + d * p.strides.channel), numbers);
    };
    const int64_t first = Lanes::lane() * kCount;
    if (p.normalise) {
        W squares[4] = {};
#pragma unroll 4
        for (int64_t d = first; d < p.channels; d += kStep) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                W numbers[kCount];
                corner(i, d, numbers);
#pragma unroll
                for (int j = 0; j < kCount; ++j) squares[i] += numbers[j] * numbers[j];
            }
        }
        Lanes::add(squares, sums);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (is_read[i]) weights[i] *= find_scale(sums[Lanes::at(i, Lanes::pack())]);
        }
    }
    if (place.own(0) >= place.count || first >= p.channels) return;
    T* const to = static_cast<T*>(p.resized) + offset_of(p.resized_strides, place.image, y, x);
#pragma unroll 4
    for (int64_t d = first + (p.channels - 1 - first) / kStep * kStep; d >= 0; d -= kStep) {
        W blended[kCount] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            W numbers[kCount];
            corner(i, d, numbers);
#pragma unroll
            for (int j = 0; j < kCount; ++j) blended[j] += weights[i] * numbers[j];
        }
        store(to + d * p.resized_strides.channel, narrow<T, kCount>(blended));
    }
}

// Coordinates of the result that read a coordinate of the level, those without weight left out.
template <class W>
struct Span {
    int64_t index;
    int begin, end;

    Span() = default;
    __device__ Span(const Axis<W>& axis, int64_t index, int64_t outputs)
        : index(index),
          begin(static_cast<int>(axis.first_output(index - 1, outputs))),
          end(static_cast<int>(axis.first_output(index + 1, outputs))) {
        while (begin < end && weight(axis, begin) == 0) ++begin;
        while (begin < end && weight(axis, end - 1) == 0) --end;
    }
    __device__ W weight(const Axis<W>& axis, int64_t out) const {
        const Tap<W> tap = axis.at(out);
        return tap.index == index ? 1 - tap.fraction : tap.fraction;
    }
};

// Pixels of the result that read a pixel of the level: most often one or none, with `weight` and at `offset`.
template <class W>
struct Readers {
    Span<W> rows, columns;
    int64_t offset;
    W weight;

    Readers() = default;
    __device__ Readers(const LevelParams& p, const Axes<W>& axes, int64_t image, int64_t y, int64_t x)
        : rows(axes.y, y, p.out_height),
          columns(axes.x, x, p.out_width),
          offset(offset_of(p.resized_strides, image, rows.begin, columns.begin)),
          weight(count() > 0 ? rows.weight(axes.y, rows.begin) * columns.weight(axes.x, columns.begin)
                             : W{0}) {}
    __device__ int count() const { return (rows.end - rows.begin) * (columns.end - columns.begin); }

    // What they give to it, of the channels that the first reader has at `gradient`.
    template <class T, int kStep>
    __device__ void gather(const Axes<W>& axes, const T* gradient, const Strides& strides,
                           W (&sums)[kStep]) const {
#pragma unroll
        for (int s = 0; s < kStep; ++s) sums[s] = 0;
        for (int i = rows.begin; i < rows.end; ++i) {
            const W of_row = rows.weight(axes.y, i);
            for (int j = columns.begin; j < columns.end; ++j) {
                const W both = of_row * columns.weight(axes.x, j);
                if (both == 0) continue;
                W numbers[kStep];
                widen(
                    load<T, kStep>(gradient + (i - rows.begin) * strides.y + (j - columns.begin) * strides.x),
                    numbers);
#pragma unroll
                for (int s = 0; s < kStep; ++s) sums[s] += both * numbers[s];
            }
        }
    }
};

template <bool kTogether, int kCount>
using LevelLanes = Group<kTogether, kCount, 2>;

// What a thread of write_level_gradients reads: numbers of its pixels, and the gradients they get.
template <class T, bool kTogether, int kCount, bool kMany>
struct LevelWalk {
    using W = wide<T>;
    using Lanes = LevelLanes<kTogether, kCount>;
    using Numbers = W[Lanes::kOwn][Lanes::kStep];
    using LevelLoads = Loads<T, kTogether, kCount, Lanes>;

    const LevelParams& p;
    const Axes<W>& axes;
    const Readers<W>* readers;  // of the thread's pixels
    const T* from[LevelLoads::kLoads];
    const T* gradients[Lanes::kOwn];
    T* to[LevelLoads::kLoads];
    bool exists[LevelLoads::kLoads], is_read[LevelLoads::kLoads];
    W weights[Lanes::kOwn];

    __device__ LevelWalk(const LevelParams& p, const Axes<W>& axes, const Readers<W>* readers, const Map& map,
                         const Place<Lanes>& place)
        : p(p), axes(axes), readers(readers) {
#pragma unroll
        for (int i = 0; i < LevelLoads::kLoads; ++i) {
            const uint32_t pixel = min(place.own(i), place.count - (kTogether ? kCount : 1));
            const uint32_t y = map.width.quotient(pixel), x = map.width.remainder(pixel, y);
            from[i] = static_cast<const T*>(p.level) + offset_of(p.strides, place.image, y, x);
            to[i] = static_cast<T*>(p.level_gradient) + offset_of(p.gradient_strides, place.image, y, x);
            exists[i] = place.own(i) < place.count;
            is_read[i] = false;
        }
#pragma unroll
        for (int i = 0; i < Lanes::kOwn; ++i) {
            weights[i] = readers[i].weight;
            gradients[i] = static_cast<const T*>(p.resized_gradient) + readers[i].offset;
            if (readers[i].count() > 0) is_read[kTogether ? 0 : i] = true;
        }
    }

    template <class Visit>
    __device__ __forceinline__ void each(bool reads, const Visit& visit) const {
        [[maybe_unused]] constexpr int kUnroll = kMany || kCount == 8 ? 1 : 2;
        constexpr int kFirst = Lanes::kStep, kAll = Lanes::kLanes * Lanes::kStep;
#pragma unroll kUnroll
        for (int64_t d = Lanes::lane() * kFirst; d < p.channels; d += kAll) {
            Packed<T, kCount> packs[LevelLoads::kLoads];
#pragma unroll
            for (int i = 0; i < LevelLoads::kLoads; ++i)
                packs[i] = load_if<T, kCount>(reads && is_read[i], from[i] + d * p.strides.channel);
            Numbers numbers, given;
            LevelLoads::widen_all(packs, numbers);
            find_gradients(d, given);
            visit(d, numbers, given);
        }
    }

    __device__ __forceinline__ void find_gradients(int64_t d, Numbers& given) const {
        const int64_t offset = d * p.resized_strides.channel;
#pragma unroll
        for (int i = 0; i < Lanes::kOwn; ++i) {
            if constexpr (kMany) {
                // Seldom, and there are no registers for all pixels' pointers.
                const T* const first = static_cast<const T*>(p.resized_gradient) + readers[i].offset;
                readers[i].gather(axes, first + offset, p.resized_strides, given[i]);
            } else {
                constexpr int kStep = Lanes::kStep;
                widen(load_if<T, kStep>(weights[i] != 0, gradients[i] + offset), given[i]);
#pragma unroll
                for (int s = 0; s < kStep; ++s) given[i][s] *= weights[i];
            }
        }
    }

    __device__ __forceinline__ void write(int64_t d, const Numbers& numbers) const {
        const int64_t offset = d * p.gradient_strides.channel;
        if constexpr (kTogether) {
            W flat[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) flat[i] = numbers[i][0];
            if (exists[0]) store_once(to[0] + offset, narrow<T, kCount>(flat));
        } else {
#pragma unroll
            for (int i = 0; i < Lanes::kOwn; ++i) {
                if (exists[i]) store_once(to[i] + offset, narrow<T, kCount>(numbers[i]));
            }
        }
    }

    // `sums`: shared memory, for 2 sums of each pixel.
    __device__ void run(W* sums) const {
        W scales[Lanes::kOwn], shifts[Lanes::kOwn];
        if (p.normalise) find_factors(sums, scales, shifts);
        each(p.normalise, [&](int64_t d, Numbers& numbers, Numbers& given) {
#pragma unroll
            for (int i = 0; i < Lanes::kOwn; ++i) {
#pragma unroll
                for (int s = 0; s < Lanes::kStep; ++s) {
                    numbers[i][s] =
                        p.normalise ? scales[i] * given[i][s] - shifts[i] * numbers[i][s] : given[i][s];
                }
            }
            write(d, numbers);
        });
    }

    // find_level_gradient's, as scale * what is given - shift * the number.
    __device__ void find_factors(W* sums, W (&scales)[Lanes::kOwn], W (&shifts)[Lanes::kOwn]) const {
        W own[2 * Lanes::kOwn] = {};
        each(true, [&](int64_t, const Numbers& numbers, const Numbers& given) {
#pragma unroll
            for (int i = 0; i < Lanes::kOwn; ++i) {
#pragma unroll
                for (int s = 0; s < Lanes::kStep; ++s) {
                    own[i] += numbers[i][s] * numbers[i][s];
                    own[Lanes::kOwn + i] += numbers[i][s] * given[i][s];
                }
            }
        });
        Lanes::add(own, sums);
#pragma unroll
        for (int i = 0; i < Lanes::kOwn; ++i) {
            const W squares = sums[Lanes::at(i, Lanes::pack())];
            const W dot = sums[Lanes::at(Lanes::kOwn + i, Lanes::pack())];
            scales[i] = weights[i] != 0 ? find_scale(squares) : W{0};
            shifts[i] = divide_by_length(dot * scales[i] * scales[i], sqrt(squares));
        }
    }
};

// Gathered, so there are no atomics. A block finds the readers of its pixels once for all channels, and goes
// twice through them, first for the sums that the norm's derivative needs.
template <class T, bool kTogether, int kCount>
__global__ void __launch_bounds__(kThreads, blocks_at_once(true, kCount))
    write_level_gradients(LevelParams p, Map map, Axes<wide<T>> axes) {
    using W = wide<T>;
    using Lanes = LevelLanes<kTogether, kCount>;
    __shared__ Readers<W> readers[Lanes::kItems];
    __shared__ W sums[Lanes::kParts * Lanes::kPacks * 2 * Lanes::kOwn];
    const Place<Lanes> place(map.items, blockIdx.x);
    bool many = false;
    if (threadIdx.x < Lanes::kItems) {
        const uint32_t pixel = min(place.first + threadIdx.x, place.count - 1);
        const uint32_t y = map.width.quotient(pixel), x = map.width.remainder(pixel, y);
        readers[threadIdx.x] = Readers<W>(p, axes, place.image, y, x);
        many = readers[threadIdx.x].count() > 1;
    }
    const Readers<W>* const own = readers + Lanes::pack() * Lanes::kOwn;
    if (__syncthreads_or(many) != 0) {
        LevelWalk<T, kTogether, kCount, true>(p, axes, own, map, place).run(sums);
    } else {
        LevelWalk<T, kTogether, kCount, false>(p, axes, own, map, place).run(sums);
    }
}

// Whether packs of kCount numbers can be moved: what is side by side is so in every map, and aligned.
template <class T>
bool are_aligned(const void* data, const Strides& strides, bool channels_last) {
    const int64_t side = channels_last ? strides.channel : strides.x;
    const int64_t other = channels_last ? strides.x : strides.channel;
    const uint64_t bits = static_cast<uint64_t>(strides.image | strides.y | other) * sizeof(T);
    return side == 1 && (bits | reinterpret_cast<uintptr_t>(data)) % 16 == 0;
}

template <class T, bool kTogether, int kCount>
void launch_resize(const LevelParams& p, const Where& where) {
    using Lanes = Group<kTogether, 1, 1>;
    launch(write_resized<T, kTogether, kCount>, group_blocks<Lanes>(p.images, p.out_height * p.out_width),
           dim3(kThreads), 0, where.stream, p, Map::of<Lanes>(p.out_height, p.out_width), Axes<wide<T>>(p));
}

template <class T, bool kTogether>
void run_resize(const LevelParams& p, const Where& where) {
    constexpr int kCount = 16 / sizeof(T);
    if constexpr (!kTogether) {
        if (p.channels % kCount == 0 && are_aligned<T>(p.level, p.strides, true) &&
            are_aligned<T>(p.resized, p.resized_strides, true)) {
            return launch_resize<T, kTogether, kCount>(p, where);
        }
    }
    launch_resize<T, kTogether, 1>(p, where);
}

template <class T, bool kTogether, int kCount>
void launch_differentiate(const LevelParams& p, const Where& where) {
    using Lanes = LevelLanes<kTogether, kCount>;
    launch(write_level_gradients<T, kTogether, kCount>, group_blocks<Lanes>(p.images, p.height * p.width),
           dim3(kThreads), 0, where.stream, p, Map::of<Lanes>(p.height, p.width), Axes<wide<T>>(p));
}

template <class T, bool kTogether>
void run_differentiate(const LevelParams& p, const Where& where) {
    constexpr int kCount = 16 / sizeof(T);
    if ((kTogether ? p.width : p.channels) % kCount == 0 && are_aligned<T>(p.level, p.strides, !kTogether) &&
        are_aligned<T>(p.level_gradient, p.gradient_strides, !kTogether) &&
        (kTogether || are_aligned<T>(p.resized_gradient, p.resized_strides, true))) {
        return launch_differentiate<T, kTogether, kCount>(p, where);
    }
    launch_differentiate<T, kTogether, 1>(p, where);
}

}  // namespace
}  // namespace wsss::prototype
