// ocr_loss on CUDA: a thread per pixel.
//
// Shapes: O1 is N16 C21 512x512 fp32, 352 MB of logits; O2 has 81 classes and 1.36 GB. The floor is three
// passes over the logits at the speed of a copy; what is kept for the backward, 6 bytes a pixel written and
// read, adds 5 % (O1) or 1 % (O2). Nothing here has been timed on a GPU yet.
//
// What an H200 can issue is the other bound: 1770 instructions a pixel for O1 and 6860 for O2, both
// directions together, in the time of a copy at 85 %. Counted in sm_90 code, neither prior nor threshold: 12
// for each class in the forward; in the backward 13, and 10 to 13 more for a tagged one, which is read twice
// (bf16: 13, 16 and 11 to 14). With three classes tagged that is about 1050 a pixel for O1, a third of them
// whatever the number of classes, and 2600 for O2. bf16, with half the bytes and half the time, takes 85 % of
// it for O2, but for O1 130 %: that one is bound by issue.
//
// What led there, in instructions a class (forward, backward of one that is not tagged), fp32:
//   43, 43   a list for each group, expf, and for each class a choice whether it is the largest; for up to 24
//            classes scores in registers and 3200 and 3500 instructions of code for a pixel
//   14, 25   batches of eight: their largest first, then one rescaling of the sum; NaN told by the largest;
//            powers of 2 instead of expf; four places of a list in one read
//   12, 15   steps in bytes, computed before the launch; no branch around a write
//   12, 13   no branch around a read and its address
//
// NCHW: neighbouring threads are neighbouring pixels, so each class is one coalesced read. channels_last: a
// block copies its pixels to shared memory and back, 16 bytes a thread, neighbouring threads reading
// neighbouring classes (Stage): 3 instructions for each number and copy, 10 for an even number of classes, 22
// where the pixels are not one run. Classes are read in batches of eight of one group, all reads of a batch
// under way at once (Classes): few registers, so that many threads wait together, and neither a stack nor a
// second read of a score in the forward, unless a prior or threshold chooses among the tagged classes. Warps
// without an out-of-candidate pixel read nothing in the backward. Sums go over fixed parts of 512 pixels:
// they are the same in every run.
#include <type_traits>

#include "ocr/cuda_pixel.h"
#include "ocr/cuda_resized.h"
#include "with_type.h"

namespace wsss::ocr {
namespace {

enum class Kind { kDirect, kStaged, kResized };

// Blocks of kThreads on a multiprocessor, at least: with 5, eight reads each of 1280 pixels are under way. As
// many as no kernel spills registers for.
template <class T, Kind kKind, bool kSelective>
constexpr int kBlocks = sizeof(T) == 8            ? 1
                        : kKind == Kind::kResized ? (kSelective ? 2 : 3)
                        : kSelective              ? 4
                                                  : 5;

template <class T, Kind kKind, bool kSelective>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kKind, kSelective>)
    find_losses(Params p, Part part, Factors<T> factors, Axes<wide<T>> axes) {
    using W = wide<T>;
    WSSS_DYNAMIC_SHARED(unsigned char, shared);
    const uint32_t image = part.image(), end = part.end();
    const int count = static_cast<int>(p.classes);
    const Stage<W> stage(shared, part.classes);
    const Classes classes(p.tags + image * p.classes, count, kKind == Kind::kStaged ? stage.end() : shared);
    const T* const logits = static_cast<const T*>(p.logits) + image * p.strides.image;
    const W rate = factors.rate;
    double loss = 0;
    int candidates = 0;
    for (uint32_t first = part.first(); first < end; first += blockDim.x) {
        const uint32_t pixel = first + threadIdx.x;
        const int64_t at = static_cast<int64_t>(image) * part.pixels + pixel;
        const Place place = part.place(pixel);
        const int64_t offset = offset_of(p.strides, place);
        const bool exists = pixel < end;
        if constexpr (kKind == Kind::kStaged) {
            if (classes.any_inside()) stage.load(logits, offset, end - first, factors.logits_run);
        }
        PixelLoss<W> result;
        if (exists && classes.any_inside() && !(p.ignore != nullptr && p.ignore[at])) {
            const auto find = [&](const auto& source) {
                using Source = std::decay_t<decltype(source)>;
                const Scores<W, Source> scores{classes, source};
                return find_loss<kSelective>(p, scores, rate);
            };
            if constexpr (kKind == Kind::kDirect) {
                result = find(FromMemory<T>{logits + offset, factors.logits_step});
            } else if constexpr (kKind == Kind::kStaged) {
                result = find(FromStage<W>{stage.own()});
            } else {
                result = find(Resized<T>(logits, p.strides, axes, place, factors.logits_step));
            }
        }
        loss += static_cast<double>(result.loss);
        candidates += result.winner >= 0;
        if (exists && p.winner != nullptr) {
            p.winner[at] = static_cast<int16_t>(result.winner);
            static_cast<W*>(p.outside_sum)[at] = result.outside_sum;
            if (p.loss != nullptr) static_cast<W*>(p.loss)[at] = result.loss;
        }
    }
    const BlockSum sum = add_block(loss, candidates);
    if (threadIdx.x == 0) {
        p.part_loss[blockIdx.x] = sum.loss;
        p.part_count[blockIdx.x] = sum.count;
    }
}

// One block, whose threads take every kThreads-th part: the same order of additions in every run.
template <class W>
__global__ void __launch_bounds__(kThreads, 2) add_parts(Params p, int64_t parts) {
    double loss = 0;
    int64_t count = 0;
    for (int64_t part = threadIdx.x; part < parts; part += kThreads) {
        loss += p.part_loss[part];
        count += p.part_count[part];
    }
    const BlockSum sum = add_block(loss, count);
    if (threadIdx.x != 0) return;
    *p.count = sum.count;
    if (p.total == nullptr) return;
    const double divisor = p.mean && sum.count > 0 ? static_cast<double>(sum.count) : 1;
    *static_cast<W*>(p.total) = static_cast<W>(sum.loss / divisor);
}

// The gradients of a pixel's scores by write(class, gradient).
template <bool kSelective, class W, class Source, class Write>
__device__ void write_gradients(const Params& p, const Scores<W, Source>& scores, const Slopes<W>& slopes,
                                int winner, W rate, const Write& write) {
    scores.each_outside([&](const auto& batch) {
#pragma unroll
        for (int i = 0; i < batch.kSize; ++i) {
            if (!batch.has(i)) break;
            write(batch.classes[i], slopes.of_outside(batch.scores[i], rate));
        }
    });
    scores.each_inside([&](const auto& batch) {
#pragma unroll
        for (int i = 0; i < batch.kSize; ++i) {
            if (!batch.has(i)) break;
            W gradient = slopes.of_inside(batch.scores[i], rate);
            if constexpr (kSelective) {
                gradient = slopes.if_selected(p, batch.classes[i], winner, batch.scores[i], gradient);
            }
            write(batch.classes[i], gradient);
        }
    });
}

template <class T, Kind kKind, bool kSelective>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kKind, kSelective>)
    find_gradients(Params p, Part part, Factors<T> factors) {
    using W = wide<T>;
    constexpr bool kStaged = kKind == Kind::kStaged;
    WSSS_DYNAMIC_SHARED(unsigned char, shared);
    const uint32_t image = part.image(), end = part.end();
    const int count = static_cast<int>(p.classes);
    const Stage<W> stage(shared, part.classes);
    const Classes classes(p.tags + image * p.classes, count, kStaged ? stage.end() : shared);
    const T* const logits = static_cast<const T*>(p.logits) + image * p.strides.image;
    T* const gradient = static_cast<T*>(p.gradient) + image * p.gradient_strides.image;
    const W rate = factors.rate;
    const LossGradient<W> loss_gradient(p);
    for (uint32_t first = part.first(); first < end; first += blockDim.x) {
        const uint32_t pixel = first + threadIdx.x;
        const int64_t at = static_cast<int64_t>(image) * part.pixels + pixel;
        const Place place = part.place(pixel);
        const int64_t offset = offset_of(p.strides, place), to = offset_of(p.gradient_strides, place);
        const bool exists = pixel < end;
        const int winner = exists ? p.winner[at] : -1;
        const bool wanted = winner >= 0;
        if constexpr (kStaged) {
            if (__syncthreads_or(wanted)) stage.load(logits, offset, end - first, factors.logits_run);
        }
        const auto write = [&](int c, W value) {
            const W gradient_or_zero = wanted ? value : W{0};
            if constexpr (kStaged) {
                stage.own()[c] = gradient_or_zero;
            } else {
                *step(gradient + to, c, factors.gradient_step) = static_cast<T>(gradient_or_zero);
            }
        };
        // Pixels without a gradient go along with their neighbours, for reads and writes of whole sectors.
        const bool any_wanted = __any_sync(0xffffffffu, wanted);
        if (exists && any_wanted) {
            const auto find = [&](const auto& source) {
                const Scores<W, std::decay_t<decltype(source)>> scores{classes, source};
                const int known = wanted ? winner : 0;
                const Inside<W> in = find_inside<kSelective>(p, scores, known, rate);
                const Slopes<W> slopes(p, in, scores, known, static_cast<const W*>(p.outside_sum)[at],
                                       loss_gradient.at(at));
                write_gradients<kSelective>(p, scores, slopes, known, rate, write);
            };
            if constexpr (kStaged) {
                find(FromStage<W>{stage.own()});
            } else {
                find(FromMemory<T>{logits + offset, factors.logits_step});
            }
        } else if (exists) {
            for (int c = 0; c < count; ++c) write(c, W{0});
        }
        if constexpr (kStaged) stage.store(gradient, to, end - first, factors.gradient_run);
    }
}

struct Staging {
    int threads;
    size_t bytes;  // 0: without
};

constexpr size_t kStaticBytes = 128;  // of `add_block`

// For classes side by side: as many threads as have pixels that fit 48 KiB, at least a warp; none where not
// even a warp's fit what the smallest GPU has.
template <class W>
Staging choose_staging(const Params& p, bool side_by_side) {
    int threads = kThreads;
    while (threads > 32 && Stage<W>::shared_bytes(p.classes, threads) > (48 << 10)) threads /= 2;
    const size_t bytes = Stage<W>::shared_bytes(p.classes, threads);
    const bool fits = bytes + Classes::shared_bytes(p.classes) + kStaticBytes <= (99 << 10);
    return side_by_side && fits ? Staging{threads, bytes} : Staging{kThreads, 0};
}

dim3 part_blocks(const Params& p) { return dim3(static_cast<unsigned>(p.images * blocks_per_image(p))); }

template <class T>
void run_forward(const Params& p, const Where& where) {
    using W = wide<T>;
    const Staging staging = choose_staging<W>(p, p.strides.channel == 1 && !is_resized(p));
    with_selection(p, [&](auto selective) {
        constexpr bool kSelective = decltype(selective)::value;
        const auto kernel = is_resized(p)       ? find_losses<T, Kind::kResized, kSelective>
                            : staging.bytes > 0 ? find_losses<T, Kind::kStaged, kSelective>
                                                : find_losses<T, Kind::kDirect, kSelective>;
        launch(kernel, part_blocks(p), dim3(static_cast<unsigned>(staging.threads)),
               staging.bytes + Classes::shared_bytes(p.classes), where.stream, p, Part(p), Factors<T>(p),
               Axes<W>(p));
    });
    launch(add_parts<W>, dim3(1), dim3(kThreads), 0, where.stream, p, p.images * blocks_per_image(p));
}

template <class T>
void run_backward(const Params& p, const Where& where) {
    if (is_resized(p)) return run_resized<T>(p, where);
    const bool side_by_side = p.strides.channel == 1 && p.gradient_strides.channel == 1;
    const Staging staging = choose_staging<wide<T>>(p, side_by_side);
    with_selection(p, [&](auto selective) {
        constexpr bool kSelective = decltype(selective)::value;
        const auto kernel = staging.bytes > 0 ? find_gradients<T, Kind::kStaged, kSelective>
                                              : find_gradients<T, Kind::kDirect, kSelective>;
        launch(kernel, part_blocks(p), dim3(static_cast<unsigned>(staging.threads)),
               staging.bytes + Classes::shared_bytes(p.classes), where.stream, p, Part(p), Factors<T>(p));
    });
}

}  // namespace

void forward(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) { run_forward<typename decltype(type)::type>(p, where); });
}
void backward(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) { run_backward<typename decltype(type)::type>(p, where); });
}

}  // namespace wsss::ocr
