// The gradient of prototype_cam on CUDA: weights of an image's classes, what the prototypes hand on to their
// pixels, and the features' gradient. Included by cuda.cu alone, whose head says what it costs.
#pragma once

#include "prototype/cuda_present.h"

namespace wsss::prototype {
namespace {

constexpr int kManyThreads = 512;

// Of all threads' values, to each of them.
template <class W>
__device__ W add_block(W value) {
    __shared__ W of_warp[kManyThreads / kWarp];
    for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = of_warp[0];
    for (int warp = 1; warp < kManyThreads / kWarp; ++warp) value += of_warp[warp];
    return value;
}

template <class W>
__device__ W prototype_length(const Params& p, int64_t image, int64_t c) {
    return at_least_epsilon(static_cast<const W*>(p.prototype_lengths)[image * p.classes + c]);
}

// weights, here divided by the prototypes' lengths too, selves and alongs; a block for each image.
template <class W>
__global__ void __launch_bounds__(kManyThreads) find_weights(Params p) {
    WSSS_DYNAMIC_SHARED(int16_t, shared);
    const int64_t image = blockIdx.x;
    const Present present(p.counts + image * p.classes, p.classes, shared);
    W* const selves = static_cast<W*>(p.selves) + image * p.pixels;
    int first = 0;
    do {  // once too where no class has pixels, for the selves
        const int count = min(kFew, present.count() - first);
        W alongs[kFew] = {}, inverses[kFew];
#pragma unroll
        for (int k = 0; k < kFew; ++k)
            inverses[k] = k < count ? 1 / prototype_length<W>(p, image, present[first + k]) : W{0};
        for (int64_t pixel = threadIdx.x; pixel < p.pixels; pixel += kManyThreads) {
            const W length = static_cast<const W*>(p.lengths)[image * p.pixels + pixel];
            W gradients[kFew], cosines[kFew], self = first == 0 ? W{0} : selves[pixel];
#pragma unroll
            for (int k = 0; k < kFew; ++k) {
                if (k >= count) continue;
                const int64_t at = (image * p.classes + present[first + k]) * p.pixels + pixel;
                gradients[k] = static_cast<const W*>(p.gradient)[at];
                cosines[k] = static_cast<const W*>(p.cosines)[at];
            }
#pragma unroll
            for (int k = 0; k < kFew; ++k) {
                if (k >= count) continue;
                const W weight = find_weight(gradients[k], cosines[k], length);
                row<W>(p.weights, p, image, present[first + k], p.pixels)[pixel] = weight * inverses[k];
                self += divide_by_length(weight * cosines[k], length);
                if (passes(cosines[k])) alongs[k] += gradients[k] * cosines[k];
            }
            selves[pixel] = self;
        }
#pragma unroll
        for (int k = 0; k < kFew; ++k) {
            if (k >= count) continue;
            const W along = add_block(alongs[k]);
            if (threadIdx.x == 0) static_cast<W*>(p.alongs)[image * p.classes + present[first + k]] = along;
        }
        first += kFew;
    } while (first < present.count());
}

template <class T, bool kTogether, int kCount>
__global__ void __launch_bounds__(kThreads, blocks_at_once(kTogether, kCount))
    find_shares(Params p, Items channels) {
    using W = wide<T>;
    using Lanes = Group<kTogether, kCount>;
    WSSS_DYNAMIC_SHARED(int16_t, shared);
    [[maybe_unused]] __shared__ W sums[Shared<W, Lanes, 0>::kCount];
    const Place<Lanes> place(channels, blockIdx.x);
    const int64_t image = place.image;
    const Present present(p.counts + image * p.classes, p.classes, shared);
    const Loads<T, kTogether, kCount> loads(features_of<T>(p, image), place, static_cast<uint32_t>(p.pixels));
    for (int first = 0; first < present.count(); first += kFew) {
        with_few(present.count() - first, [&](auto few) {
            constexpr int kClasses = decltype(few)::kCount;
            const W* weights[kClasses];
            W own[kClasses * Lanes::kOwn] = {};
#pragma unroll
            for (int k = 0; k < kClasses; ++k)
                weights[k] = row<W>(p.weights, p, image, present[first + k], p.pixels);
            each_number<4>(loads, p.pixels, [&](int64_t j, const W(&numbers)[Lanes::kOwn][Lanes::kStep]) {
#pragma unroll
                for (int k = 0; k < kClasses; ++k) {
                    W others[Lanes::kStep];
                    load_wide(weights[k] + j, others);
#pragma unroll
                    for (int s = 0; s < Lanes::kStep; ++s) {
#pragma unroll
                        for (int i = 0; i < Lanes::kOwn; ++i)
                            own[k * Lanes::kOwn + i] += numbers[i][s] * others[s];
                    }
                }
            });
            Lanes::add(own, sums);
            const int count = min(kClasses, present.count() - first);
            for (int i = static_cast<int>(threadIdx.x); i < count * Lanes::kItems; i += kThreads) {
                const int k = i / Lanes::kItems, item = i % Lanes::kItems;
                const uint32_t channel = place.first + static_cast<uint32_t>(item);
                if (channel >= place.count) continue;
                const int64_t c = present[first + k], at = image * p.classes + c;
                const W sum = sums[Lanes::at(k * Lanes::kOwn + item % Lanes::kOwn, item / Lanes::kOwn)];
                const W prototype = row<W>(p.prototypes, p, image, c, p.channels)[channel];
                row<W>(p.shares, p, image, c, p.channels)[channel] =
                    find_share(sum * prototype_length<W>(p, image, c), static_cast<const W*>(p.alongs)[at],
                               prototype, static_cast<const W*>(p.prototype_lengths)[at], p.counts[at]);
            }
        });
    }
}

// What the pixels of a thread get through their prototypes.
template <class W, class Lanes>
struct SharesOf {
    const W* rows;             // of the image's classes
    int offsets[Lanes::kOwn];  // of the pixels' rows; negative: nothing

    __device__ SharesOf(const Params& p, const Place<Lanes>& place)
        : rows(row<W>(p.shares, p, place.image, 0, p.channels)) {
#pragma unroll
        for (int i = 0; i < Lanes::kOwn; ++i) {
            const int seed = p.seeds[place.image * p.pixels + place.readable(i)];
            offsets[i] = p.shares != nullptr && seed >= 0 ? seed * static_cast<int>(p.channels) : -1;
        }
    }
    __device__ void add_to(W (&numbers)[Lanes::kStep], int i, int64_t d) const {
        constexpr int kVector = Lanes::kStep == 1 ? 1 : 16 / sizeof(W);
#pragma unroll
        for (int s = 0; s < Lanes::kStep; s += kVector) {
            W shares[kVector];
            widen(load_if<W, kVector>(offsets[i] >= 0, rows + d + s + offsets[i]), shares);
#pragma unroll
            for (int j = 0; j < kVector; ++j) numbers[s + j] += shares[j];
        }
    }
};

// Where a thread writes the gradients of its pixels.
template <class T, bool kTogether, int kCount>
struct Stores {
    using Lanes = Group<kTogether, kCount>;
    T* to;
    int64_t step;
    uint32_t existing;  // of the thread's pixels

    __device__ Stores(const Params& p, const Place<Lanes>& place)
        : to(static_cast<T*>(p.feature_gradient) + place.image * p.channels * p.pixels +
             place.own(0) * (kTogether ? 1 : p.channels)),
          step(kTogether ? p.pixels : p.channels),
          existing(place.own(0) < place.count ? place.count - place.own(0) : 0) {}

    __device__ void write(int64_t d, const wide<T> (&numbers)[Lanes::kOwn][Lanes::kStep]) const {
        if constexpr (kTogether) {
            wide<T> flat[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) flat[i] = numbers[i][0];
            if (existing != 0) store_once(to + d * step, narrow<T, kCount>(flat));
        } else {
#pragma unroll
            for (uint32_t i = 0; i < Lanes::kOwn; ++i) {
                if (i < existing) store_once(to + i * step + d, narrow<T, kCount>(numbers[i]));
            }
        }
    }
};

// Gradients of the features; backwards, as in find_cosines.
template <class T, bool kTogether, int kCount>
__global__ void __launch_bounds__(kThreads, 2) write_gradients(Params p, Items pixels) {
    using W = wide<T>;
    using Lanes = Group<kTogether, kCount>;
    WSSS_DYNAMIC_SHARED(int16_t, shared);
    const Place<Lanes> place(pixels, gridDim.x - 1 - blockIdx.x);
    const int64_t image = place.image;
    const Present present(p.counts + image * p.classes, p.classes, shared);
    const SharesOf<W, Lanes> shares(p, place);
    const Stores<T, kTogether, kCount> stores(p, place);
    const Loads<T, kTogether, kCount> loads(features_of<T>(p, image), place,
                                            static_cast<uint32_t>(p.channels));
    const auto weight = [&](int k, int i) {
        return row<W>(p.weights, p, image, present[k], p.pixels)[place.readable(i)];
    };
    const auto add_class = [&](W(&numbers)[Lanes::kOwn][Lanes::kStep], const W* prototype,
                               const W(&factors)[Lanes::kOwn]) {
        W others[Lanes::kStep];
        load_wide(prototype, others);
#pragma unroll
        for (int i = 0; i < Lanes::kOwn; ++i) {
#pragma unroll
            for (int s = 0; s < Lanes::kStep; ++s) numbers[i][s] += factors[i] * others[s];
        }
    };
    W selves[Lanes::kOwn];
#pragma unroll
    for (int i = 0; i < Lanes::kOwn; ++i)
        selves[i] = -static_cast<const W*>(p.selves)[image * p.pixels + place.readable(i)];
    const auto write = [&](const auto& add_classes) {
        each_number<kCount == 8 ? 2 : 4>(loads, p.channels,
                                         [&](int64_t d, W(&numbers)[Lanes::kOwn][Lanes::kStep]) {
#pragma unroll
                                             for (int i = 0; i < Lanes::kOwn; ++i) {
#pragma unroll
                                                 for (int s = 0; s < Lanes::kStep; ++s)
                                                     numbers[i][s] *= selves[i];
                                             }
                                             add_classes(d, numbers);
#pragma unroll
                                             for (int i = 0; i < Lanes::kOwn; ++i)
                                                 shares.add_to(numbers[i], i, d);
                                             stores.write(d, numbers);
                                         });
    };
    constexpr int kMost = kCount == 8 ? 3 : kFew;  // for which there are registers
    if (present.count() > kMost) {                 // seldom
        write([&](int64_t d, W(&numbers)[Lanes::kOwn][Lanes::kStep]) {
#pragma unroll 1
            for (int k = 0; k < present.count(); ++k) {
                W factors[Lanes::kOwn];
#pragma unroll
                for (int i = 0; i < Lanes::kOwn; ++i) factors[i] = weight(k, i);
                add_class(numbers, row<W>(p.prototypes, p, image, present[k], p.channels) + d, factors);
            }
        });
        return;
    }
    with_few<kMost>(present.count(), [&](auto few) {
        constexpr int kClasses = decltype(few)::kCount;
        const W* prototypes[kClasses];
        W factors[kClasses][Lanes::kOwn];
#pragma unroll
        for (int k = 0; k < kClasses; ++k) {
            prototypes[k] = row<W>(p.prototypes, p, image, present.count() > 0 ? present[k] : 0, p.channels);
#pragma unroll
            for (int i = 0; i < Lanes::kOwn; ++i) factors[k][i] = k < present.count() ? weight(k, i) : W{0};
        }
        write([&](int64_t d, W(&numbers)[Lanes::kOwn][Lanes::kStep]) {
#pragma unroll
            for (int k = 0; k < kClasses; ++k) add_class(numbers, prototypes[k] + d, factors[k]);
        });
    });
}

// What pixels get through their prototypes, alone.
template <class T, bool kTogether, int kCount>
__global__ void __launch_bounds__(kThreads, 2) spread_shares(Params p, Items pixels) {
    using Lanes = Group<kTogether, kCount>;
    const Place<Lanes> place(pixels, blockIdx.x);
    const SharesOf<wide<T>, Lanes> shares(p, place);
    const Stores<T, kTogether, kCount> stores(p, place);
    for (int d = Lanes::lane() * Lanes::kStep; d < p.channels; d += Lanes::kLanes * Lanes::kStep) {
        wide<T> numbers[Lanes::kOwn][Lanes::kStep] = {};
#pragma unroll
        for (int i = 0; i < Lanes::kOwn; ++i) shares.add_to(numbers[i], i, d);
        stores.write(d, numbers);
    }
}

}  // namespace
}  // namespace wsss::prototype
