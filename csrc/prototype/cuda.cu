// prototype_cam on CUDA, without atomics on numbers that round: the same results in every run.
//
// P3: N16 D768 32x32 fp32, 50 MB of features; P1 and P2: N20 D768 of the same size, from levels
// (cuda_levels.h). Of 21 or 81 classes an image has two to four. The floor is the features read twice forward
// (prototypes, cosines) and twice backward (prototypes' gradients, features'), and their gradient written:
// 250 MB, of which L2 keeps a part; for P1 and P2 beside it 3 * 252 MB: levels read forward and backward, and
// their gradient written. Nothing here has been timed on a GPU yet.
//
// Sums over pixels and sums over channels have one form (Group), for what lies side by side in one layout is
// apart in the other. A thread keeps the sums of up to kFew classes, so that features are read once for them;
// more classes take another walk for each kFew, past features that L1 and L2 hold. A block lists its image's
// classes that have pixels in shared memory and walks only those.
#include "prototype/cuda_group.h"
#include "prototype/cuda_levels.h"
#include "with_type.h"

namespace wsss::prototype {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 2) find_classes(SeedParams p, Divisor pixels, Divisor width) {
    using W = wide<T>;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= p.images * p.height * p.width) return;
    const uint32_t image = pixels.quotient(static_cast<uint32_t>(at));
    const uint32_t pixel = pixels.remainder(static_cast<uint32_t>(at), image), row = width.quotient(pixel);
    const int64_t y = nearest(row, p.cam_height, p.height);
    const int64_t x = nearest(width.remainder(pixel, row), p.cam_width, p.width);
    const T* const cam =
        static_cast<const T*>(p.cam) + image * p.strides.image + y * p.strides.y + x * p.strides.x;
    W best = static_cast<W>(cam[0]) * static_cast<W>(p.background_scale);
    int winner = 0;
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

// Whole warps; one addition for all of a warp's pixels of a class.
__global__ void __launch_bounds__(kThreads, 2) count_pixels(Params p, Divisor blocks) {
    const uint32_t image = blocks.quotient(blockIdx.x);
    const int64_t pixel = static_cast<int64_t>(blocks.remainder(blockIdx.x, image)) * kThreads + threadIdx.x;
    const int seed = pixel < p.pixels ? p.seeds[image * p.pixels + pixel] : -1;
    unsigned left = __ballot_sync(0xffffffffu, seed >= 0);
    while (left != 0) {
        const int leader = __ffs(static_cast<int>(left)) - 1;
        const int c = __shfl_sync(0xffffffffu, seed, leader);
        const unsigned same = __ballot_sync(0xffffffffu, seed == c);
        if (static_cast<int>(threadIdx.x) % kWarp == leader)
            atomicAdd(p.counts + image * p.classes + c, __popc(same));
        left &= ~same;
    }
}

// The classes of an image that have pixels.
class Present {
  public:
    static size_t shared_bytes(const Params& p) { return sizeof(int16_t) * static_cast<size_t>(p.classes); }

    // By a block of kWarp x kGroups threads, all of which call it.
    __device__ Present(const Params& p, int64_t image, int16_t* shared) : classes_(shared) {
        __shared__ int total;
        if (threadIdx.y == 0) {
            int found = 0;
            for (int64_t first = 0; first < p.classes; first += kWarp) {
                const int64_t c = first + threadIdx.x;
                const bool here = c < p.classes && p.counts[image * p.classes + c] > 0;
                const unsigned all = __ballot_sync(0xffffffffu, here);
                if (here) shared[found + __popc(all & ((1u << threadIdx.x) - 1))] = static_cast<int16_t>(c);
                found += __popc(all);
            }
            if (threadIdx.x == 0) total = found;
        }
        __syncthreads();
        count_ = total;
    }
    __device__ int count() const { return count_; }
    __device__ int64_t operator[](int k) const { return classes_[k]; }

  private:
    const int16_t* classes_;
    int count_;
};

// visit(j, number) for this lane's share of an item's numbers.
template <class T, bool kTogether, class Visit>
__device__ void each_number(const T* features, uint32_t item, int64_t items, int64_t length,
                            const Visit& visit) {
    const T* const from = kTogether ? features + item : features + item * length;
    const int64_t step = kTogether ? items : 1;
    for (int64_t j = Group<kTogether>::lane(); j < length; j += Group<kTogether>::kLanes) {
        visit(j, static_cast<wide<T>>(from[j * step]));
    }
}

template <class W>
__device__ W* row(void* data, const Params& p, int64_t image, int64_t c, int64_t length) {
    return static_cast<W*>(data) + (image * p.classes + c) * length;
}
template <class T>
__device__ const T* features_of(const Params& p, int64_t image) {
    return static_cast<const T*>(p.features) + image * p.image_stride;
}

template <class T, bool kTogether>
__global__ void __launch_bounds__(kThreads, 2) find_prototypes(Params p, Items channels) {
    using W = wide<T>;
    using Lanes = Group<kTogether>;
    WSSS_DYNAMIC_SHARED(int16_t, shared);
    const int64_t image = channels.image();
    const uint32_t channel = channels.item<kTogether>();
    const bool exists = channel < channels.count;
    const Present present(p, image, shared);
    const int16_t* const seeds = p.seeds + image * p.pixels;
    for (int first = 0; first < present.count(); first += kFew) {
        const int count = min(kFew, present.count() - first);
        int classes[kFew];
        W sums[kFew] = {};
#pragma unroll
        for (int k = 0; k < kFew; ++k) classes[k] = k < count ? static_cast<int>(present[first + k]) : -2;
        if (exists) {
            each_number<T, kTogether>(features_of<T>(p, image), channel, p.channels, p.pixels,
                                      [&](int64_t j, W number) {
                                          const int seed = seeds[j];
#pragma unroll
                                          for (int k = 0; k < kFew; ++k) {
                                              if (k < count && seed == classes[k]) sums[k] += number;
                                          }
                                      });
        }
#pragma unroll
        for (int k = 0; k < kFew; ++k) {
            if (k >= count) continue;
            const W sum = Lanes::sum(sums[k]);
            if (!exists || Lanes::lane() != 0) continue;
            const W pixels = static_cast<W>(p.counts[image * p.classes + classes[k]]);
            row<W>(p.prototypes, p, image, classes[k], p.channels)[channel] = sum / pixels;
        }
    }
}

// A warp for each class of each image.
template <class W>
__global__ void __launch_bounds__(kThreads, 2) find_lengths(Params p) {
    using Lanes = Group<false>;
    const int64_t at = blockIdx.x * static_cast<int64_t>(kGroups) + threadIdx.y;
    const bool exists = at < p.images * p.classes;
    W squares = 0;
    if (exists && p.counts[at] > 0) {
        const W* const prototype = static_cast<const W*>(p.prototypes) + at * p.channels;
        for (int64_t d = threadIdx.x; d < p.channels; d += kWarp) squares += prototype[d] * prototype[d];
    }
    squares = Lanes::sum(squares);
    if (exists && threadIdx.x == 0) static_cast<W*>(p.prototype_lengths)[at] = sqrt(squares);
}

template <class T, bool kTogether>
__global__ void __launch_bounds__(kThreads, 2) find_cosines(Params p, Items pixels) {
    using W = wide<T>;
    using Lanes = Group<kTogether>;
    WSSS_DYNAMIC_SHARED(int16_t, shared);
    const int64_t image = pixels.image();
    const uint32_t pixel = pixels.item<kTogether>();
    const bool exists = pixel < pixels.count;
    const Present present(p, image, shared);
    for (int64_t c = Lanes::lane(); exists && c < p.classes; c += Lanes::kLanes) {
        if (p.counts[image * p.classes + c] == 0) row<W>(p.cosines, p, image, c, p.pixels)[pixel] = 0;
    }
    int first = 0;
    do {  // once too where no class has pixels, for the lengths
        const int count = min(kFew, present.count() - first);
        const W* prototypes[kFew];
        W sums[kFew] = {}, squares = 0;
#pragma unroll
        for (int k = 0; k < kFew; ++k) {
            prototypes[k] = row<W>(p.prototypes, p, image, k < count ? present[first + k] : 0, p.channels);
        }
        if (exists) {
            each_number<T, kTogether>(features_of<T>(p, image), pixel, p.pixels, p.channels,
                                      [&](int64_t d, W number) {
                                          squares += number * number;
#pragma unroll
                                          for (int k = 0; k < kFew; ++k) {
                                              if (k < count) sums[k] += number * prototypes[k][d];
                                          }
                                      });
        }
        const W length = sqrt(Lanes::sum(squares));
        const bool writes = exists && Lanes::lane() == 0;
        if (writes) static_cast<W*>(p.lengths)[image * p.pixels + pixel] = length;
#pragma unroll
        for (int k = 0; k < kFew; ++k) {
            if (k >= count) continue;
            const W dot = Lanes::sum(sums[k]);
            const int64_t c = present[first + k];
            const W other = static_cast<const W*>(p.prototype_lengths)[image * p.classes + c];
            const W cosine = dot / at_least_epsilon(length) / at_least_epsilon(other);
            if (writes) row<W>(p.cosines, p, image, c, p.pixels)[pixel] = passes(cosine) ? cosine : W{0};
        }
        first += kFew;
    } while (first < present.count());
}

// weights and selves; a thread for each pixel.
template <class W>
__global__ void __launch_bounds__(kThreads, 2) find_weights(Params p, Divisor blocks) {
    const uint32_t image = blocks.quotient(blockIdx.x);
    const int64_t pixel = static_cast<int64_t>(blocks.remainder(blockIdx.x, image)) * kThreads + threadIdx.x;
    if (pixel >= p.pixels) return;
    const W length = static_cast<const W*>(p.lengths)[image * p.pixels + pixel];
    W self = 0;
    for (int64_t c = 0; c < p.classes; ++c) {
        if (p.counts[image * p.classes + c] == 0) continue;
        const int64_t at = (image * p.classes + c) * p.pixels + pixel;
        const W cosine = static_cast<const W*>(p.cosines)[at];
        const W weight = find_weight(static_cast<const W*>(p.gradient)[at], cosine, length);
        static_cast<W*>(p.weights)[at] = weight;
        self += weight * cosine;
    }
    static_cast<W*>(p.selves)[image * p.pixels + pixel] = divide_by_length(self, length);
}

// alongs; a warp for each class of each image.
template <class W>
__global__ void __launch_bounds__(kThreads, 2) find_alongs(Params p) {
    using Lanes = Group<false>;
    const int64_t at = blockIdx.x * static_cast<int64_t>(kGroups) + threadIdx.y;
    const bool exists = at < p.images * p.classes;
    W along = 0;
    if (exists && p.counts[at] > 0) {
        for (int64_t i = threadIdx.x; i < p.pixels; i += kWarp) {
            const W cosine = static_cast<const W*>(p.cosines)[at * p.pixels + i];
            if (passes(cosine)) along += static_cast<const W*>(p.gradient)[at * p.pixels + i] * cosine;
        }
    }
    along = Lanes::sum(along);
    if (exists && threadIdx.x == 0) static_cast<W*>(p.alongs)[at] = along;
}

template <class T, bool kTogether>
__global__ void __launch_bounds__(kThreads, 2) find_shares(Params p, Items channels) {
    using W = wide<T>;
    using Lanes = Group<kTogether>;
    WSSS_DYNAMIC_SHARED(int16_t, shared);
    const int64_t image = channels.image();
    const uint32_t channel = channels.item<kTogether>();
    const bool exists = channel < channels.count;
    const Present present(p, image, shared);
    for (int first = 0; first < present.count(); first += kFew) {
        const int count = min(kFew, present.count() - first);
        const W* weights[kFew];
        W sums[kFew] = {};
#pragma unroll
        for (int k = 0; k < kFew; ++k) {
            weights[k] = row<W>(p.weights, p, image, k < count ? present[first + k] : 0, p.pixels);
        }
        if (exists) {
            each_number<T, kTogether>(features_of<T>(p, image), channel, p.channels, p.pixels,
                                      [&](int64_t j, W number) {
#pragma unroll
                                          for (int k = 0; k < kFew; ++k) {
                                              if (k < count) sums[k] += number * weights[k][j];
                                          }
                                      });
        }
#pragma unroll
        for (int k = 0; k < kFew; ++k) {
            if (k >= count) continue;
            const W sum = Lanes::sum(sums[k]);
            if (!exists || Lanes::lane() != 0) continue;
            const int64_t c = present[first + k], at = image * p.classes + c;
            const W prototype = row<W>(p.prototypes, p, image, c, p.channels)[channel];
            row<W>(p.shares, p, image, c, p.channels)[channel] =
                find_share(sum, static_cast<const W*>(p.alongs)[at], prototype,
                           static_cast<const W*>(p.prototype_lengths)[at], p.counts[at]);
        }
    }
}

template <class T, bool kTogether>
__global__ void __launch_bounds__(kThreads, 2) write_gradients(Params p, Items pixels) {
    using W = wide<T>;
    WSSS_DYNAMIC_SHARED(int16_t, shared);
    const int64_t image = pixels.image();
    const uint32_t pixel = pixels.item<kTogether>();
    const Present present(p, image, shared);
    if (pixel >= pixels.count) return;
    const int seed = p.seeds[image * p.pixels + pixel];
    const W* const shares =
        p.shares != nullptr && seed >= 0 ? row<W>(p.shares, p, image, seed, p.channels) : nullptr;
    const int count = p.gradient == nullptr ? 0 : present.count();
    const auto factor = [&](int k) {
        const int64_t c = present[k];
        return row<W>(p.weights, p, image, c, p.pixels)[pixel] /
               at_least_epsilon(static_cast<const W*>(p.prototype_lengths)[image * p.classes + c]);
    };
    const W* prototypes[kFew];
    W factors[kFew];
#pragma unroll
    for (int k = 0; k < kFew; ++k) {
        prototypes[k] = row<W>(p.prototypes, p, image, k < count ? present[k] : 0, p.channels);
        factors[k] = k < count ? factor(k) : W{0};
    }
    const W self = p.gradient == nullptr ? W{0} : static_cast<const W*>(p.selves)[image * p.pixels + pixel];
    const int64_t start = image * p.channels * p.pixels + (kTogether ? pixel : pixel * p.channels);
    T* const to = static_cast<T*>(p.feature_gradient) + start;
    const int64_t step = kTogether ? p.pixels : 1;
    const auto write = [&](int64_t d, W own) {
#pragma unroll
        for (int k = 0; k < kFew; ++k) {
            if (k < count) own += factors[k] * prototypes[k][d];
        }
        for (int k = kFew; k < count; ++k)
            own += factor(k) * row<W>(p.prototypes, p, image, present[k], p.channels)[d];
        to[d * step] = static_cast<T>(shares == nullptr ? own : own + shares[d]);
    };
    if (p.gradient == nullptr) {
        for (int64_t d = Group<kTogether>::lane(); d < p.channels; d += Group<kTogether>::kLanes)
            write(d, W{0});
        return;
    }
    each_number<T, kTogether>(features_of<T>(p, image), pixel, p.pixels, p.channels,
                              [&](int64_t d, W number) { write(d, -self * number); });
}

// run(type, std::bool_constant) with whether pixels are side by side.
template <class Run>
void with_layout(bool channels_last, const Run& run) {
    if (channels_last) return run(Type<std::false_type>());
    run(Type<std::true_type>());
}

Divisor pixel_blocks(const Params& p) {
    return Divisor(static_cast<uint32_t>(ceil_div<int64_t>(p.pixels, kThreads)));
}
dim3 per_pixel(const Params& p) {
    return dim3(static_cast<unsigned>(p.images * ceil_div<int64_t>(p.pixels, kThreads)));
}
dim3 per_class(const Params& p) {
    return dim3(static_cast<unsigned>(ceil_div<int64_t>(p.images * p.classes, kGroups)));
}

// A kernel whose blocks list the classes, for the items of all images.
template <bool kTogether>
void launch_group(void (*kernel)(Params, Items), const Params& p, int64_t items, const Where& where) {
    launch(kernel, group_blocks<kTogether>(p.images, items), group_threads(), Present::shared_bytes(p),
           where.stream, p, Items::of<kTogether>(items));
}

template <class T, bool kPixelsTogether>
void run_differentiate(const Params& p, const Where& where) {
    using W = wide<T>;
    if (p.gradient != nullptr) {
        launch(find_weights<W>, per_pixel(p), dim3(kThreads), 0, where.stream, p, pixel_blocks(p));
        if (p.shares != nullptr) {
            launch(find_alongs<W>, per_class(p), group_threads(), 0, where.stream, p);
            launch_group<!kPixelsTogether>(find_shares<T, !kPixelsTogether>, p, p.channels, where);
        }
    }
    launch_group<kPixelsTogether>(write_gradients<T, kPixelsTogether>, p, p.pixels, where);
}

}  // namespace

void find_seeds(const SeedParams& p, const Where& where) {
    const int64_t blocks = ceil_div<int64_t>(p.images * p.height * p.width, kThreads);
    with_type(p.dtype, [&](auto type) {
        launch(find_classes<typename decltype(type)::type>, dim3(static_cast<unsigned>(blocks)),
               dim3(kThreads), 0, where.stream, p, Divisor(static_cast<uint32_t>(p.height * p.width)),
               Divisor(static_cast<uint32_t>(p.width)));
    });
}

void average(const Params& p, const Where& where) {
    launch(count_pixels, per_pixel(p), dim3(kThreads), 0, where.stream, p, pixel_blocks(p));
    with_type(p.dtype, [&](auto type) {
        with_layout(p.channels_last, [&](auto layout) {
            constexpr bool kTogether = !decltype(layout)::type::value;
            launch_group<kTogether>(find_prototypes<typename decltype(type)::type, kTogether>, p, p.channels,
                                    where);
        });
    });
}

void compare(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        launch(find_lengths<wide<T>>, per_class(p), group_threads(), 0, where.stream, p);
        with_layout(p.channels_last, [&](auto layout) {
            constexpr bool kTogether = decltype(layout)::type::value;
            launch_group<kTogether>(find_cosines<T, kTogether>, p, p.pixels, where);
        });
    });
}

void differentiate(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) {
        with_layout(p.channels_last, [&](auto layout) {
            run_differentiate<typename decltype(type)::type, decltype(layout)::type::value>(p, where);
        });
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
        with_layout(p.resized_strides.channel == 1, [&](auto layout) {
            run_differentiate<typename decltype(type)::type, decltype(layout)::type::value>(p, where);
        });
    });
}

}  // namespace wsss::prototype
