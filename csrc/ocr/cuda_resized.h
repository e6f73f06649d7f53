// The gradient of resized logits on CUDA, in three kernels and without atomics: statistics of each pixel of
// the loss; sums of the gradient over the pixels that read the same two rows of logits, chunk by chunk of
// columns; and the logits' gradient from those.
//
// O3, N16 C21 64x64 -> 512x512: 4.2 million pixels, 16 bytes of statistics each (20 with a prior or
// threshold), written once and read by a third of the blocks; the resized logits (352 MB) exist in registers
// alone. Counted in sm_90 code, fp32: 29 instructions for each class of a pixel in the forward, 17 of them to
// resize; 25 to 30 for a tagged one in find_statistics and 17 for each in find_shares (before: 68, 80 and 61,
// a few of them jumped over). A thread per number of the logits that gathers its pixels would compute each
// gradient four times.
#pragma once

#include "ocr/cuda_pixel.h"

namespace wsss::ocr {
namespace {

constexpr int kSpread = 8;  // classes of a thread

// What find_shares needs of a pixel whatever the class; pixels: of all images.
template <bool kSelective, class W>
__device__ void save(W* statistics, int64_t pixels, int64_t at, const Slopes<W>& slopes) {
    statistics[at] = slopes.best;
    statistics[at + pixels] = slopes.smallest;
    statistics[at + 2 * pixels] = slopes.outside;
    statistics[at + 3 * pixels] = slopes.inside;
    if constexpr (kSelective) statistics[at + 4 * pixels] = slopes.cutoff;
}
template <bool kSelective, class W>
__device__ Slopes<W> restore(const W* statistics, int64_t pixels, int64_t at) {
    Slopes<W> slopes;
    slopes.best = statistics[at];
    slopes.smallest = statistics[at + pixels];
    slopes.outside = statistics[at + 2 * pixels];
    slopes.inside = statistics[at + 3 * pixels];
    if constexpr (kSelective) slopes.cutoff = statistics[at + 4 * pixels];
    return slopes;
}

template <class T, bool kSelective>
__global__ void __launch_bounds__(kThreads, 2)
    find_statistics(Params p, Part part, Factors<T> factors, Axes<wide<T>> axes, wide<T>* statistics,
                    int64_t pixels) {
    using W = wide<T>;
    WSSS_DYNAMIC_SHARED(unsigned char, shared);
    const uint32_t image = part.image();
    const Classes classes(p.tags + image * p.classes, static_cast<int>(p.classes), shared);
    const T* const logits = static_cast<const T*>(p.logits) + image * p.strides.image;
    const W rate = factors.rate;
    const LossGradient<W> loss_gradient(p);
    for (uint32_t pixel = part.first() + threadIdx.x; pixel < part.end(); pixel += blockDim.x) {
        const int64_t at = static_cast<int64_t>(image) * part.pixels + pixel;
        const int winner = p.winner[at];
        if (winner < 0) continue;
        const Resized<T> source(logits, p.strides, axes, part.place(pixel), factors.logits_step);
        const Scores<W, Resized<T>> scores{classes, source};
        const Inside<W> in = find_inside<kSelective>(p, scores, winner, rate);
        const Slopes<W> slopes(p, in, scores, winner, static_cast<const W*>(p.outside_sum)[at],
                               loss_gradient.at(at));
        save<kSelective>(statistics, pixels, at, slopes);
    }
}

// How `shares` is walked: a band is a row of the logits, of all images.
struct Bands {
    Divisor height, chunks;
    int64_t slots, pitch, numbers;  // of a chunk, a row of all chunks, a band

    explicit Bands(const Params& p)
        : height(static_cast<uint32_t>(p.height)),
          chunks(static_cast<uint32_t>(ceil_div(p.out_width, kChunk))),
          slots(slots_per_chunk(p)),
          pitch(count_slots(p)),
          numbers(2 * p.classes * pitch) {}
};

// The first of ascending numbers that is at least `wanted`.
__device__ inline int lower_bound(const int* numbers, int count, int wanted) {
    int low = 0, high = count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (numbers[middle] < wanted) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// A block takes a band, a chunk of the loss's columns (one for each thread) and kSpread classes. A thread
// walks down the rows of the loss that read the band's row of logits and the next, both resized along x in
// registers; then what belongs to one column of the logits is added up.
template <class T, bool kSelective>
__global__ void __launch_bounds__(kChunk) find_shares(Params p, Factors<T> factors, Axes<wide<T>> axes,
                                                      Bands by, const wide<T>* statistics, int64_t pixels) {
    using W = wide<T>;
    __shared__ W gathered[2][2][kSpread][kChunk];  // of the upper, lower row; for the left, right column
    __shared__ int columns[kChunk];                // the left one of each thread
    __shared__ int rows[2];
    const int thread = static_cast<int>(threadIdx.x), first_class = static_cast<int>(blockIdx.y) * kSpread;
    const uint32_t band = by.chunks.quotient(blockIdx.x), chunk = by.chunks.remainder(blockIdx.x, band);
    const uint32_t image = by.height.quotient(band), row = by.height.remainder(band, image);
    const int64_t first = static_cast<int64_t>(chunk) * kChunk, x = first + thread;
    const int count = static_cast<int>(min(kChunk, p.out_width - first));
    const bool exists = thread < count;
    const Tap<W> column = axes.x.at(exists ? x : first);
    columns[thread] = static_cast<int>(column.index);
    if (thread < 2) rows[thread] = static_cast<int>(axes.y.first_output(row + thread, p.out_height));
    __syncthreads();

    const T* const from = static_cast<const T*>(p.logits) + image * p.strides.image + row * p.strides.y +
                          column.index * p.strides.x;
    const int64_t right = column.index + 1 < p.width ? p.strides.x : 0;
    const int64_t down = row + 1 < p.height ? p.strides.y : 0;
    const bool* const tags = p.tags + image * p.classes;
    const int classes = min(kSpread, static_cast<int>(p.classes) - first_class);
    unsigned inside = 0;
    W upper[kSpread], lower[kSpread], to_upper[kSpread], to_lower[kSpread];
    W rate[kSpread];  // negative for tagged classes, whose exponents are the other way round
#pragma unroll
    for (int k = 0; k < kSpread; ++k) {
        const int c = first_class + min(k, classes - 1);
        const auto read = [&](int64_t offset) {
            return static_cast<W>(from[c * p.strides.channel + offset]);
        };
        upper[k] = read(0) * (1 - column.fraction) + read(right) * column.fraction;
        lower[k] = read(down) * (1 - column.fraction) + read(down + right) * column.fraction;
        to_upper[k] = 0;
        to_lower[k] = 0;
        inside |= static_cast<unsigned>(tags[c]) << k;
        rate[k] = tags[c] ? -factors.rate : factors.rate;
    }
    const int last_row = exists ? rows[1] : 0;
#pragma unroll 1
    for (int y = rows[0]; y < last_row; ++y) {
        const int64_t at = (image * p.out_height + y) * p.out_width + x;
        const int winner = p.winner[at];
        if (winner < 0) continue;
        const Slopes<W> slopes = restore<kSelective>(statistics, pixels, at);
        const W below = axes.y.at(y).fraction;
#pragma unroll
        for (int k = 0; k < kSpread; ++k) {
            const W score = upper[k] * (1 - below) + lower[k] * below;
            const bool tagged = (inside >> k & 1) != 0;
            W gradient = power((score - (tagged ? slopes.smallest : slopes.best)) * rate[k]) *
                         (tagged ? slopes.inside : slopes.outside);
            if constexpr (kSelective) {
                const int c = first_class + min(k, classes - 1);
                if (tagged) gradient = slopes.if_selected(p, c, winner, score, gradient);
            }
            to_upper[k] += gradient * (1 - below);
            to_lower[k] += gradient * below;
        }
    }
#pragma unroll
    for (int k = 0; k < kSpread; ++k) {
        gathered[0][0][k][thread] = to_upper[k] * (1 - column.fraction);
        gathered[0][1][k][thread] = to_upper[k] * column.fraction;
        gathered[1][0][k][thread] = to_lower[k] * (1 - column.fraction);
        gathered[1][1][k][thread] = to_lower[k] * column.fraction;
    }
    __syncthreads();

    // Slot i of the chunk is column columns[0] + i of the logits.
    const int last = static_cast<int>(min(static_cast<int64_t>(columns[count - 1]) + 1, p.width - 1));
    const int slots = last - columns[0] + 1;
    W* const shares = static_cast<W*>(p.scratch) + band * by.numbers + chunk * by.slots;
    // Lanes are neighbouring slots and search for where the threads of each begin, once for all classes.
    const int lane = thread % 32, warp = thread / 32;
    constexpr int kSlots = 30;  // of a warp at once: two more lanes search for those beside them
    for (int first_slot = 0; first_slot < slots; first_slot += kSlots) {
        const int slot = first_slot + lane;
        const int begin = lower_bound(columns, count, columns[0] + slot - 1);
        const int middle = __shfl_down_sync(0xffffffffu, begin, 1);
        const int end = __shfl_down_sync(0xffffffffu, begin, 2);
        if (lane >= kSlots || slot >= slots) continue;
#pragma unroll 1
        for (int item = warp; item < 2 * classes; item += kChunk / 32) {
            const int k = item / 2, lower_row = item % 2;
            W sum = 0;
            for (int i = begin; i < middle; ++i) sum += gathered[lower_row][1][k][i];
            for (int i = middle; i < end; ++i) sum += gathered[lower_row][0][k][i];
            shares[(lower_row * p.classes + first_class + k) * by.pitch + slot] = sum;
        }
    }
}

constexpr int kAddColumns = 64, kAddClasses = 4;  // threads of a block

// A column of a row of the logits for each thread: its shares in all chunks that read it, its row's own and
// the ones that the row above has for it.
template <class T>
__global__ void __launch_bounds__(kAddColumns* kAddClasses)
    add_shares(Params p, Axes<wide<T>> axes, Bands by, Divisor blocks) {
    using W = wide<T>;
    const uint32_t band = blocks.quotient(blockIdx.x);
    const int64_t x = static_cast<int64_t>(blocks.remainder(blockIdx.x, band)) * kAddColumns + threadIdx.x;
    if (x >= p.width) return;
    const uint32_t image = by.height.quotient(band), y = by.height.remainder(band, image);
    const int64_t begin = axes.x.first_output(x - 1, p.out_width);
    const int64_t end = axes.x.first_output(x + 1, p.out_width);
    const W* const own = static_cast<const W*>(p.scratch) + band * by.numbers;
    T* const to = static_cast<T*>(p.gradient) + image * p.gradient_strides.image +
                  offset_of(p.gradient_strides, {y, x});
    for (int64_t c = threadIdx.y; c < p.classes; c += kAddClasses) {
        W sum = 0;
        for (int64_t chunk = begin / kChunk; begin < end && chunk * kChunk < end; ++chunk) {
            const int64_t slot = chunk * by.slots + x - axes.x.at(chunk * kChunk).index;
            sum += own[c * by.pitch + slot];
            if (y > 0) sum += own[(c - p.classes) * by.pitch + slot];  // the lower row of the band before
        }
        to[c * p.gradient_strides.channel] = static_cast<T>(sum);
    }
}

template <class T>
void run_resized(const Params& p, const Where& where) {
    using W = wide<T>;
    const int64_t pixels = p.images * p.out_height * p.out_width, bands = p.images * p.height;
    W* const statistics = static_cast<W*>(p.scratch) + count_shares(p);
    const Axes<W> axes(p);
    const Bands by(p);
    const auto blocks = [](int64_t count) { return static_cast<unsigned>(count); };
    with_selection(p, [&](auto selective) {
        constexpr bool kSelective = decltype(selective)::value;
        launch(find_statistics<T, kSelective>, dim3(blocks(p.images * blocks_per_image(p))), dim3(kThreads),
               Classes::shared_bytes(p.classes), where.stream, p, Part(p), Factors<T>(p), axes, statistics,
               pixels);
        launch(find_shares<T, kSelective>,
               dim3(blocks(bands * ceil_div(p.out_width, kChunk)),
                    blocks(ceil_div<int64_t>(p.classes, kSpread))),
               dim3(kChunk), 0, where.stream, p, Factors<T>(p), axes, by, statistics, pixels);
    });
    const int64_t column_blocks = ceil_div<int64_t>(p.width, kAddColumns);
    launch(add_shares<T>, dim3(blocks(bands * column_blocks)), dim3(kAddColumns, kAddClasses), 0,
           where.stream, p, axes, by, Divisor(static_cast<uint32_t>(column_blocks)));
}

}  // namespace
}  // namespace wsss::ocr
