// prototype_cam on CUDA, without atomics on numbers that round: the same results in every run.
//
// P3: N16 D768 32x32 fp32, 50 MB of features; P1 and P2: N20 D768 of the same size, from levels
// (cuda_levels.h). Of 21 or 81 classes an image has two to four. The floor is the features read twice forward
// (prototypes, cosines) and twice backward (prototypes' gradients, features'), and their gradient written:
// 250 MB, of which L2 keeps a part; for P1 and P2 beside it 2 * 168 + 252 MB: what is read of levels, forward
// and backward, and their gradient written. Nothing here has been timed on a GPU yet.
//
// Sums over pixels and sums over channels have one form (Group), for what lies side by side in one layout is
// apart in the other. A thread keeps the sums of up to kFew classes, so that features are read once for them;
// more classes take another walk for each kFew, past features that caches hold. A block lists its image's
// classes that have pixels in shared memory and walks only those.
//
// Instructions of a warp for 32 numbers, read from sm_90's machine code, in the loops of an image of three
// classes, fp32, NCHW (channels_last), and what they were when threads loaded one number at a time and loops
// ran over eight classes, skipping those that an image has not:
//   prototypes 6 (6), were 14 (17);       cosines 8 (8), were 74 (52);
//   shares 6 (7), were 51 (68);           gradients 15 (13), were about 70 (75).
// What is done once for a block adds 2 or 3 to each. An H200 has time for 142 in all while the five passes
// move their bytes at 85 % of its bandwidth. Each thread has four loads of 16 bytes under way; P3 has 384 to
// 512 blocks of 256 threads, two or three of which a multiprocessor holds: 32 to 48 KB under way in each.
//
// At this size a launch costs as much as a tenth of a pass, so there are six: seeds; prototypes, whose blocks
// count pixels for themselves and write zeros too; cosines, whose blocks find the prototypes' lengths for
// themselves from what they read anyway; weights of all kinds, a block for each image; shares; gradients. Of
// two passes over the features the second goes backwards, as what was read last is still in L2.
#include "prototype/cuda_gradients.h"
#include "prototype/cuda_levels.h"
#include "with_type.h"

namespace wsss::prototype {
namespace {

constexpr int kSeedThreads = 128;

template <class T>
__global__ void __launch_bounds__(kSeedThreads) find_classes(SeedParams p, Divisor pixels, Divisor width) {
    using W = wide<T>;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kSeedThreads + threadIdx.x;
    if (at >= p.images * p.height * p.width) return;
    const uint32_t image = pixels.quotient(static_cast<uint32_t>(at));
    const uint32_t pixel = pixels.remainder(static_cast<uint32_t>(at), image), row = width.quotient(pixel);
    const int64_t y = nearest(row, p.cam_height, p.height);
    const int64_t x = nearest(width.remainder(pixel, row), p.cam_width, p.width);
    const T* const cam =
        static_cast<const T*>(p.cam) + image * p.strides.image + y * p.strides.y + x * p.strides.x;
    W best = static_cast<W>(cam[0]) * static_cast<W>(p.background_scale);
    int winner = 0;
#pragma unroll 8
    for (int c = 1; c < p.classes; ++c) {
        const W number = static_cast<W>(cam[c * p.strides.channel]);
        if (!is_larger(number, best)) continue;
        best = number;
        winner = c;
    }
    const bool known = p.tags[image * p.classes + winner] &&
                       (p.valid == nullptr || p.valid[(image * p.cam_height + y) * p.cam_width + x]);
    p.seeds[at] = static_cast<int16_t>(known ? winner : -1);
}

// Means of the channels of a block. Each block counts its image's pixels for itself; the first of an image
// writes what it finds. Classes without pixels get zeros.
template <class T, bool kTogether, int kCount>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kTogether, kCount))
    find_prototypes(Params p, Items channels) {
    using W = wide<T>;
    using Lanes = Group<kTogether, kCount>;
    WSSS_DYNAMIC_SHARED(int32_t, counts);
    [[maybe_unused]] __shared__ W sums[Shared<W, Lanes, 0>::kCount];
    const Place<Lanes> place(channels, blockIdx.x);
    const int64_t image = place.image;
    const int16_t* const seeds = p.seeds + image * p.pixels;
    count_pixels(seeds, p.pixels, p.classes, counts);
    const Present present(counts, p.classes, reinterpret_cast<int16_t*>(counts + p.classes));
    if (place.first == 0) {
        for (int64_t c = threadIdx.x; c < p.classes; c += kThreads)
            p.counts[image * p.classes + c] = counts[c];
    }
    for (int64_t i = threadIdx.x; i < p.classes * Lanes::kItems; i += kThreads) {
        const int64_t c = i / Lanes::kItems;
        const uint32_t channel = place.first + static_cast<uint32_t>(i % Lanes::kItems);
        if (channel < place.count && counts[c] == 0)
            row<W>(p.prototypes, p, image, c, p.channels)[channel] = 0;
    }
    const Loads<T, kTogether, kCount> loads(features_of<T>(p, image), place, static_cast<uint32_t>(p.pixels));
    for (int first = 0; first < present.count(); first += kFew) {
        with_few(present.count() - first, [&](auto few) {
            constexpr int kClasses = decltype(few)::kCount;
            int classes[kClasses];
            W own[kClasses * Lanes::kOwn] = {};
#pragma unroll
            for (int k = 0; k < kClasses; ++k) classes[k] = present[first + k];
            each_number<4>(loads, p.pixels, [&](int64_t j, const W(&numbers)[Lanes::kOwn][Lanes::kStep]) {
                int of_pixels[Lanes::kStep];
                load_seeds(seeds + j, of_pixels);
#pragma unroll
                for (int s = 0; s < Lanes::kStep; ++s) {
#pragma unroll
                    for (int k = 0; k < kClasses; ++k) {
                        if (of_pixels[s] != classes[k]) continue;
#pragma unroll
                        for (int i = 0; i < Lanes::kOwn; ++i) own[k * Lanes::kOwn + i] += numbers[i][s];
                    }
                }
            });
            Lanes::add(own, sums);
            const int count = min(kClasses, present.count() - first);
            for (int i = static_cast<int>(threadIdx.x); i < count * Lanes::kItems; i += kThreads) {
                const int k = i / Lanes::kItems, item = i % Lanes::kItems;
                const uint32_t channel = place.first + static_cast<uint32_t>(item);
                if (channel >= place.count) continue;
                const int c = present[first + k];
                const W sum = sums[Lanes::at(k * Lanes::kOwn + item % Lanes::kOwn, item / Lanes::kOwn)];
                row<W>(p.prototypes, p, image, c, p.channels)[channel] = sum / static_cast<W>(counts[c]);
            }
        });
    }
}

// Cosines of the pixels of a block. Each finds the lengths of the prototypes, which it reads, for itself; the
// first of an image writes them. Blocks go backwards, as what was read last is still in L2.
template <class T, bool kTogether, int kCount>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kTogether, kCount))
    find_cosines(Params p, Items pixels) {
    using W = wide<T>;
    using Lanes = Group<kTogether, kCount>;
    constexpr int kUnderWay = kTogether || kCount < 8 ? 4 : 2;  // for which there are registers
    WSSS_DYNAMIC_SHARED(int16_t, shared);
    [[maybe_unused]] __shared__ W sums[Shared<W, Lanes, 1>::kCount];
    const Place<Lanes> place(pixels, gridDim.x - 1 - blockIdx.x);
    const int64_t image = place.image;
    const int32_t* const counts = p.counts + image * p.classes;
    const Present present(counts, p.classes, shared);
    for (int64_t i = threadIdx.x; i < p.classes * Lanes::kItems; i += kThreads) {
        const int64_t c = i / Lanes::kItems;
        const uint32_t pixel = place.first + static_cast<uint32_t>(i % Lanes::kItems);
        if (pixel < place.count && counts[c] == 0) row<W>(p.cosines, p, image, c, p.pixels)[pixel] = 0;
    }
    W* const prototype_lengths = static_cast<W*>(p.prototype_lengths) + image * p.classes;
    for (int64_t c = threadIdx.x; c < p.classes && place.first == 0; c += kThreads) {
        if (counts[c] == 0) prototype_lengths[c] = 0;
    }
    const Loads<T, kTogether, kCount> loads(features_of<T>(p, image), place,
                                            static_cast<uint32_t>(p.channels));
    int first = 0;
    do {  // once too where no class has pixels, for the lengths
        with_few(present.count() - first, [&](auto few) {
            constexpr int kClasses = decltype(few)::kCount;
            constexpr int kSquares = kClasses * Lanes::kOwn, kLengths = kSquares + Lanes::kOwn;
            const int count = min(kClasses, present.count() - first);
            const W* prototypes[kClasses];
            W own[kLengths + kClasses] = {};
#pragma unroll
            for (int k = 0; k < kClasses; ++k) {
                prototypes[k] =
                    row<W>(p.prototypes, p, image, count > 0 ? present[first + k] : 0, p.channels);
            }
            each_number<kUnderWay>(loads, p.channels,
                                   [&](int64_t d, const W(&numbers)[Lanes::kOwn][Lanes::kStep]) {
                                       W others[kClasses][Lanes::kStep];
#pragma unroll
                                       for (int k = 0; k < kClasses; ++k)
                                           load_wide(prototypes[k] + d, others[k]);
#pragma unroll
                                       for (int s = 0; s < Lanes::kStep; ++s) {
#pragma unroll
                                           for (int k = 0; k < kClasses; ++k)
                                               own[kLengths + k] += others[k][s] * others[k][s];
#pragma unroll
                                           for (int i = 0; i < Lanes::kOwn; ++i) {
                                               own[kSquares + i] += numbers[i][s] * numbers[i][s];
#pragma unroll
                                               for (int k = 0; k < kClasses; ++k)
                                                   own[k * Lanes::kOwn + i] += numbers[i][s] * others[k][s];
                                           }
                                       }
                                   });
            Lanes::add(own, sums);
            const auto length_of = [&](int k, int pack) { return sqrt(sums[Lanes::at(kLengths + k, pack)]); };
            for (int i = static_cast<int>(threadIdx.x); i < max(count, 1) * Lanes::kItems; i += kThreads) {
                const int k = i / Lanes::kItems, item = i % Lanes::kItems, pack = item / Lanes::kOwn;
                const uint32_t pixel = place.first + static_cast<uint32_t>(item);
                if (pixel >= place.count) continue;
                const W length = sqrt(sums[Lanes::at(kSquares + item % Lanes::kOwn, pack)]);
                if (k == 0) static_cast<W*>(p.lengths)[image * p.pixels + pixel] = length;
                if (k >= count) continue;
                const W dot = sums[Lanes::at(k * Lanes::kOwn + item % Lanes::kOwn, pack)];
                const W cosine = dot / at_least_epsilon(length) / at_least_epsilon(length_of(k, pack));
                row<W>(p.cosines, p, image, present[first + k], p.pixels)[pixel] =
                    passes(cosine) ? cosine : W{0};
            }
            const int k = static_cast<int>(threadIdx.x);
            if (place.first == 0 && k < count) prototype_lengths[present[first + k]] = length_of(k, 0);
        });
        first += kFew;
    } while (first < present.count());
}

// run(type, std::bool_constant) with whether pixels are side by side.
template <class Run>
void with_layout(bool channels_last, const Run& run) {
    if (channels_last) return run(Type<std::false_type>());
    run(Type<std::true_type>());
}

// run(std::integral_constant) with how many numbers a load has: 16 bytes where all addresses allow that.
template <class T, class Run>
void with_count(const Params& p, const Run& run) {
    constexpr int kCount = 16 / sizeof(T);
    uint64_t bits =
        static_cast<uint64_t>(p.image_stride | (p.channels_last ? p.channels : p.pixels)) * sizeof(T);
    const void* const pointers[] = {p.features, p.feature_gradient, p.prototypes,
                                    p.weights,  p.shares,           p.seeds};
    for (const void* pointer : pointers) {
        bits |= reinterpret_cast<uintptr_t>(pointer);
    }
    if (bits % 16 == 0) return run(std::integral_constant<int, kCount>());
    run(std::integral_constant<int, 1>());
}

// run(type, layout, count) for the kernels of features.
template <class Run>
void with_kernels(const Params& p, const Run& run) {
    with_type(p.dtype, [&](auto type) {
        with_layout(p.channels_last, [&](auto layout) {
            with_count<typename decltype(type)::type>(p, [&](auto count) { run(type, layout, count); });
        });
    });
}

// A kernel for the items of all images.
template <class Lanes>
void launch_group(void (*kernel)(Params, Items), const Params& p, int64_t items, size_t shared_bytes,
                  const Where& where) {
    launch(kernel, group_blocks<Lanes>(p.images, items), dim3(kThreads), shared_bytes, where.stream, p,
           Items::of<Lanes>(items));
}

}  // namespace

void find_seeds(const SeedParams& p, const Where& where) {
    const int64_t blocks = ceil_div<int64_t>(p.images * p.height * p.width, kSeedThreads);
    with_type(p.dtype, [&](auto type) {
        launch(find_classes<typename decltype(type)::type>, dim3(static_cast<unsigned>(blocks)),
               dim3(kSeedThreads), 0, where.stream, p, Divisor(static_cast<uint32_t>(p.height * p.width)),
               Divisor(static_cast<uint32_t>(p.width)));
    });
}

void average(const Params& p, const Where& where) {
    with_kernels(p, [&](auto type, auto layout, auto count) {
        using T = typename decltype(type)::type;
        constexpr bool kTogether = !decltype(layout)::type::value;
        constexpr int kCount = decltype(count)::value;
        launch_group<Group<kTogether, kCount>>(find_prototypes<T, kTogether, kCount>, p, p.channels,
                                               Present::counting_bytes(p), where);
    });
}

void compare(const Params& p, const Where& where) {
    with_kernels(p, [&](auto type, auto layout, auto count) {
        using T = typename decltype(type)::type;
        constexpr bool kTogether = decltype(layout)::type::value;
        constexpr int kCount = decltype(count)::value;
        launch_group<Group<kTogether, kCount>>(find_cosines<T, kTogether, kCount>, p, p.pixels,
                                               Present::shared_bytes(p), where);
    });
}

void differentiate(const Params& p, const Where& where) {
    with_kernels(p, [&](auto type, auto layout, auto count) {
        using T = typename decltype(type)::type;
        constexpr bool kPixels = decltype(layout)::type::value;
        constexpr int kCount = decltype(count)::value;
        using Pixels = Group<kPixels, kCount>;
        if (p.gradient == nullptr) {
            launch_group<Pixels>(spread_shares<T, kPixels, kCount>, p, p.pixels, 0, where);
            return;
        }
        launch(find_weights<wide<T>>, dim3(static_cast<unsigned>(p.images)), dim3(kManyThreads),
               Present::shared_bytes(p), where.stream, p);
        if (p.shares != nullptr) {
            launch_group<Group<!kPixels, kCount>>(find_shares<T, !kPixels, kCount>, p, p.channels,
                                                  Present::shared_bytes(p), where);
        }
        launch_group<Pixels>(write_gradients<T, kPixels, kCount>, p, p.pixels, Present::shared_bytes(p),
                             where);
    });
}

void resize_level(const LevelParams& p, const Where& where) {
    with_type(p.dtype, [&](auto type) {
        with_layout(p.resized_strides.channel == 1, [&](auto layout) {
            run_resize<typename decltype(type)::type, decltype(layout)::type::value>(p, where);
        });
    });
}

void differentiate_level(const LevelParams& p, const Where& where) {
    with_type(p.dtype, [&](auto type) {
        with_layout(p.gradient_strides.channel == 1, [&](auto layout) {
            run_differentiate<typename decltype(type)::type, decltype(layout)::type::value>(p, where);
        });
    });
}

}  // namespace wsss::prototype
