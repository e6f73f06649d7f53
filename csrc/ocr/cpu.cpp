// ocr_loss on the CPU: tiles of 128 pixels, a pixel in each lane of a vector.
//
// Shapes: O1c is N2 C21 256x256 fp32 (11 MB), O2c the same with 81 classes (42 MB). The floor is three passes
// over the logits at the speed of a copy: 0.9 and 3.4 ms on two cores. Expected beforehand: one exponential
// of about 15 instructions per number, forward and backward, 0.5 and 2 ms in vectors of 16, so about twice
// the floor. Measured: forward 0.75 and 2.9, backward 0.95 and 3.6, NCHW and channels_last alike (AVX-512,
// kernels alone, memory that is there and not in the caches).
//
// A tile is copied class by class to scratch that the caches hold (channels_last is transposed on the way);
// there each vector of pixels walks its classes: the prediction, then sums over tagged and other classes. Two
// numbers a pixel are kept for the backward, the predicted class and the sum over O; it computes the
// exponentials again, and skips tiles without candidates. A gradient formed in the forward would still have
// to be divided by the count of candidates: a pass over memory of 0.6 and 2.2 ms, hardly less than the whole
// forward, and a second tensor of the logits' size held meanwhile.
//
// Tried (O1c, O2c, forward + backward in ms, none prefetching): tiles of 64 pixels 2.4 and 8.4, of 128 2.2
// and 7.7, of 256 2.3 and 8.4. A pitch of a power of two: 5 % slower. Prefetching the rows of classes 8
// ahead: 10 % faster; the next tile of channels_last: 8 in place of 15 (O2c).
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>

#include "cpu_threads.h"
#include "ocr/cpu_tiles.h"
#include "with_type.h"

namespace wsss::ocr::WSSS_LEVEL {
namespace {

// With its exponential a number is worth two.
int count_threads(const Params& p, const Where& where) {
    return wsss::count_threads(2 * p.images * p.out_height * p.out_width * p.classes, where);
}

// A gradient of 32 MiB or more comes fresh from the system each time (so glibc has it), page by page as it is
// written. In pages of 2 MiB instead of 4 KiB, O2c with its allocation took 9 to 14 ms in place of 19 to 26
// on a virtual machine, where faults are dear.
void ask_for_large_pages(void* memory, int64_t bytes) {
    constexpr uintptr_t kPage = 2 << 20;
    if (bytes < (32 << 20)) return;
    const auto address = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
    const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
    madvise(static_cast<char*>(memory) + (begin - address), end - begin, MADV_HUGEPAGE);
}

int64_t round_to_lanes(int64_t pixels, int64_t lanes) { return ceil_div(pixels, lanes) * lanes; }

struct Sum {
    double loss = 0;
    int64_t count = 0;
};

// Loss of a tile's scores, which are the pixels from `at` on.
template <class W>
void finish_loss(const Image<W>& image, Tile<W>& tile, int64_t at, int64_t pixels, Sum& sum) {
    const Params& p = image.p;
    const int64_t lanes = round_to_lanes(pixels, kLanes<W>);
    std::fill_n(tile.counted, lanes, Integer<W>{0});
    for (int64_t i = 0; i < pixels && image.inside.count > 0; ++i) {
        tile.counted[i] = p.ignore != nullptr && p.ignore[at + i] ? 0 : -1;
    }
    for (int64_t i = 0; i < lanes; i += kLanes<W>) find_loss(image, tile, i);
    double parts[8] = {};  // one alone would make each addition wait for the one before
    for (int64_t i = 0; i < lanes; ++i) {
        parts[i % 8] += static_cast<double>(tile.loss[i]);
        sum.count += tile.winner[i] >= 0;
    }
    for (const double part : parts) sum.loss += part;
    if (p.winner == nullptr) return;
    for (int64_t i = 0; i < pixels; ++i) p.winner[at + i] = static_cast<int16_t>(tile.winner[i]);
    std::copy_n(tile.outside_sum, pixels, static_cast<W*>(p.outside_sum) + at);
    if (p.loss != nullptr) std::copy_n(tile.loss, pixels, static_cast<W*>(p.loss) + at);
}

bool any_candidate(const Params& p, int64_t at, int64_t pixels) {
    return std::any_of(p.winner + at, p.winner + at + pixels, [](int16_t winner) { return winner >= 0; });
}

// Turns a tile's scores into their gradients.
template <class W>
void finish_gradient(const Image<W>& image, Tile<W>& tile, int64_t at, int64_t pixels, W factor) {
    const Params& p = image.p;
    const int64_t lanes = round_to_lanes(pixels, kLanes<W>);
    std::fill_n(tile.winner, lanes, Integer<W>{-1});
    std::fill_n(tile.outside_sum, lanes, W{0});
    std::fill_n(tile.loss_gradient, lanes, factor);
    for (int64_t i = 0; i < pixels; ++i) tile.winner[i] = p.winner[at + i];
    std::copy_n(static_cast<const W*>(p.outside_sum) + at, pixels, tile.outside_sum);
    if (p.gradient_per_pixel) {
        std::copy_n(static_cast<const W*>(p.loss_gradient) + at, pixels, tile.loss_gradient);
    }
    for (int64_t i = 0; i < lanes; i += kLanes<W>) find_gradient(image, tile, i);
}

template <class W>
W find_factor(const Params& p) {
    if (p.gradient_per_pixel) return 0;
    const W gradient = *static_cast<const W*>(p.loss_gradient);
    if (!p.mean) return gradient;
    return *p.count > 0 ? gradient / static_cast<W>(*p.count) : W{0};
}

template <class W>
void add_parts(const Params& p, int64_t parts) {
    Sum sum;
    for (int64_t part = 0; part < parts; ++part) {
        sum.loss += p.part_loss[part];
        sum.count += p.part_count[part];
    }
    *p.count = sum.count;
    if (p.total == nullptr) return;
    if (p.mean) sum.loss = sum.count > 0 ? sum.loss / static_cast<double>(sum.count) : 0;
    *static_cast<W*>(p.total) = static_cast<W>(sum.loss);
}

int64_t offset(const Strides& s, int64_t image, int64_t y, int64_t x) {
    return image * s.image + y * s.y + x * s.x;
}

// Pixels that can be walked as one row: all, where each row follows the one before.
int64_t find_row(const Params& p, bool forward) {
    const bool follow = p.strides.y == p.width * p.strides.x &&
                        (forward || p.gradient_strides.y == p.width * p.gradient_strides.x);
    return follow ? p.height * p.width : p.width;
}

// Logits and loss of one size.
template <class T, bool kForward>
void run_direct(const Params& p, const Where& where) {
    using W = wide<T>;
    const int64_t pixels = p.height * p.width, blocks = blocks_per_image(p), row = find_row(p, kForward);
    const int threads = count_threads(p, where);
    const W factor = kForward ? W{0} : find_factor<W>(p);
    const Memory memory(threads, Image<W>::bytes(p.classes) + Tile<W>::bytes(p.classes));
    if constexpr (!kForward) {
        ask_for_large_pages(p.gradient, p.images * p.classes * pixels * static_cast<int64_t>(sizeof(T)));
    }
#pragma omp parallel num_threads(threads)
    {
        Arena arena = memory.arena(omp_get_thread_num());
        Image<W> image(p, arena);
        Tile<W> tile(p.classes, arena);
#pragma omp for
        for (int64_t block = 0; block < p.images * blocks; ++block) {
            const int64_t n = block / blocks, begin = (block - n * blocks) * kBlockPixels;
            const int64_t end = std::min(begin + kBlockPixels, pixels);
            image.select(n);
            Sum sum;
            for (int64_t i = begin, count = 0; i < end; i += count) {
                const int64_t y = i / row, x = i - y * row, at = n * pixels + i;
                count = std::min({kTilePixels, end - i, row - x});
                const T* const from = static_cast<const T*>(p.logits) + offset(p.strides, n, y, x);
                if constexpr (kForward) {
                    load_scores(tile.scores, from, p.strides.channel, p.strides.x, p.classes, count);
                    finish_loss(image, tile, at, count, sum);
                } else {
                    if (any_candidate(p, at, count)) {
                        load_scores(tile.scores, from, p.strides.channel, p.strides.x, p.classes, count);
                        finish_gradient(image, tile, at, count, factor);
                    } else {
                        std::fill_n(tile.scores, p.classes * kPitch, W{0});
                    }
                    store_gradient(static_cast<T*>(p.gradient) + offset(p.gradient_strides, n, y, x),
                                   tile.scores, p.gradient_strides.channel, p.gradient_strides.x, p.classes,
                                   count, tile.relevance);
                }
            }
            if constexpr (kForward) {
                p.part_loss[block] = sum.loss;
                p.part_count[block] = sum.count;
            }
        }
    }
    if constexpr (kForward) add_parts<W>(p, p.images * blocks);
}

// Adds what the rows of the loss gave to the two rows of logits that each reads.
template <class T>
void add_shares(const Params& p, int threads) {
    using W = wide<T>;
    const int64_t numbers = p.classes * p.width;
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < p.images * p.height; ++row) {
        const int64_t n = row / p.height, y = row - n * p.height;
        const W* const own = static_cast<const W*>(p.scratch) + row * 2 * numbers;
        T* const to = static_cast<T*>(p.gradient) + offset(p.gradient_strides, n, y, 0);
        for (int64_t c = 0; c < p.classes; ++c) {
            for (int64_t x = 0; x < p.width; ++x) {
                const int64_t i = c * p.width + x;
                to[c * p.gradient_strides.channel + x * p.gradient_strides.x] =
                    static_cast<T>(y > 0 ? own[i] + own[i - numbers] : own[i]);
            }
        }
    }
}

// Logits resized to the loss's size. A thread takes the rows of the loss that read the same two rows of
// logits: it resizes those along x once and blends them for each row; the gradient goes back the same way,
// along y first. So what is resized costs little more than reading it would: O3c with 21 and 81 classes
// takes 2.5 and 7 ms.
template <class T, bool kForward>
void run_resized(const Params& p, const Where& where) {
    using W = wide<T>;
    const Memory tables(1, Columns<W>::bytes(p.out_width));
    const Columns<W> columns(p, tables.arena(0));
    const Axis<W> axis(p.height, p.out_height, p.align_corners);
    const int threads = count_threads(p, where);
    const W factor = kForward ? W{0} : find_factor<W>(p);
    const int64_t numbers = p.classes * kPitch;
    const Memory memory(threads, Image<W>::bytes(p.classes) + Tile<W>::bytes(p.classes) +
                                     (kForward ? 2 : 4) * bytes_for<W>(numbers));
#pragma omp parallel num_threads(threads)
    {
        Arena arena = memory.arena(omp_get_thread_num());
        Image<W> image(p, arena);
        Tile<W> tile(p.classes, arena);
        W* const upper = arena.take<W>(numbers);
        W* const lower = arena.take<W>(numbers);
        W* const to_upper = kForward ? nullptr : arena.take<W>(numbers);
        W* const to_lower = kForward ? nullptr : arena.take<W>(numbers);
#pragma omp for
        for (int64_t unit = 0; unit < p.images * p.height; ++unit) {
            const int64_t n = unit / p.height, row = unit - n * p.height;
            const int64_t begin = axis.first_output(row, p.out_height);
            const int64_t end = axis.first_output(row + 1, p.out_height);
            const T* const from = static_cast<const T*>(p.logits) + offset(p.strides, n, row, 0);
            W* const share = kForward ? nullptr : static_cast<W*>(p.scratch) + unit * 2 * p.classes * p.width;
            if constexpr (!kForward) std::fill_n(share, 2 * p.classes * p.width, W{0});
            image.select(n);
            Sum sum;
            for (int64_t x = 0; x < p.out_width && begin < end; x += kTilePixels) {
                const int64_t count = std::min(kTilePixels, p.out_width - x);
                blend_columns(upper, from, p.strides.channel, columns, x, p.classes, count);
                blend_columns(lower, row + 1 < p.height ? from + p.strides.y : from, p.strides.channel,
                              columns, x, p.classes, count);
                if constexpr (!kForward) {
                    std::fill_n(to_upper, numbers, W{0});
                    std::fill_n(to_lower, numbers, W{0});
                }
                for (int64_t y = begin; y < end; ++y) {
                    const int64_t at = (n * p.out_height + y) * p.out_width + x;
                    if (!kForward && !any_candidate(p, at, count)) continue;
                    const W below = axis.at(y).fraction, above = 1 - below;
                    for (int64_t i = 0; i < numbers; ++i) {
                        tile.scores[i] = upper[i] * above + lower[i] * below;
                    }
                    if constexpr (kForward) {
                        finish_loss(image, tile, at, count, sum);
                    } else {
                        finish_gradient(image, tile, at, count, factor);
                        for (int64_t i = 0; i < numbers; ++i) {
                            to_upper[i] += tile.scores[i] * above;
                            to_lower[i] += tile.scores[i] * below;
                        }
                    }
                }
                if constexpr (!kForward) {
                    spread_columns(share, to_upper, columns, x, p.classes, count, p.width);
                    spread_columns(share + p.classes * p.width, to_lower, columns, x, p.classes, count,
                                   p.width);
                }
            }
            if constexpr (kForward) {
                p.part_loss[unit] = sum.loss;
                p.part_count[unit] = sum.count;
            }
        }
    }
    if constexpr (kForward) {
        add_parts<W>(p, p.images * p.height);
    } else {
        add_shares<T>(p, threads);
    }
}

template <class T, bool kForward>
void run(const Params& p, const Where& where) {
    is_resized(p) ? run_resized<T, kForward>(p, where) : run_direct<T, kForward>(p, where);
}

template <bool kForward>
void dispatch(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) { run<typename decltype(type)::type, kForward>(p, where); });
}

}  // namespace

void forward(const Params& p, const Where& where) { dispatch<true>(p, where); }
void backward(const Params& p, const Where& where) { dispatch<false>(p, where); }

}  // namespace wsss::ocr::WSSS_LEVEL
