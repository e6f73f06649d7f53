// prototype_cam on the CPU.
//
// P3c: N4 D768 32x32 fp32, 12.6 MB of features; of 21 classes each image has three. The floor is five passes
// over as many bytes: the features read twice forward (prototypes, cosines), twice backward (prototypes'
// gradients, features'), and their gradient written: 2 ms of one core's time at the rate of a copy.
// Arithmetic beforehand: one addition and four multiply-adds a number forward, three and five backward, in
// vectors of 16 about half of that. Got, one core's time, NCHW and channels_last: forward 1.8 and 1.8 ms,
// backward 3.3 and 3.6 ms; the same as two batched products and PyTorch's operators around them 37 and 46 ms.
//
// What is side by side in memory is a lane. So each kind of pass has a form for each layout:
// - sums over the pixels of a class: masked sums of rows, or rows added to those of their class;
// - cosines, sums over channels: multiply_with_columns, or multiply_with_rows;
// - prototypes' gradients, sums over pixels: the other way round;
// - features' gradients: rows scaled and added, in both.
// Only classes that have pixels are walked. Threads share out blocks of kBlock pixels or channels of an
// image, whose sums one thread makes in one order: results do not depend on how many threads there are.
#include <omp.h>

#include "cpu_memory.h"
#include "cpu_threads.h"
#include "prototype/cpu_levels.h"
#include "prototype/cpu_products.h"
#include "prototype/cpu_seeds.h"
#include "with_type.h"

namespace wsss::prototype::WSSS_LEVEL {
namespace {

// The numbers of an image.
template <class T>
struct Image {
    using W = wide<T>;
    const Params& p;
    int64_t index;

    const T* features() const { return static_cast<const T*>(p.features) + index * p.image_stride; }
    T* gradient() const { return static_cast<T*>(p.feature_gradient) + index * p.channels * p.pixels; }
    int32_t count(int64_t c) const { return p.counts[index * p.classes + c]; }
    const int16_t* seeds() const { return p.seeds + index * p.pixels; }
    W* prototype(int64_t c) const { return row(p.prototypes, c, p.channels); }
    W* shares(int64_t c) const { return row(p.shares, c, p.channels); }
    W* cosines(int64_t c) const { return row(p.cosines, c, p.pixels); }
    W* weights(int64_t c) const { return row(p.weights, c, p.pixels); }
    const W* cosine_gradient(int64_t c) const {
        return static_cast<const W*>(p.gradient) + (index * p.classes + c) * p.pixels;
    }
    W prototype_length(int64_t c) const {
        return at_least_epsilon(static_cast<const W*>(p.prototype_lengths)[index * p.classes + c]);
    }
    W* lengths() const { return static_cast<W*>(p.lengths) + index * p.pixels; }
    W* selves() const { return static_cast<W*>(p.selves) + index * p.pixels; }

  private:
    W* row(void* data, int64_t c, int64_t length) const {
        return static_cast<W*>(data) + (index * p.classes + c) * length;
    }
};

// The classes of an image that have pixels.
class Present {
  public:
    static int64_t bytes(const Params& p) { return bytes_for<int16_t>(p.classes); }
    Present(const Params& p, int64_t image, Arena arena) : classes_(arena.take<int16_t>(p.classes)) {
        for (int64_t c = 0; c < p.classes; ++c) {
            if (p.counts[image * p.classes + c] > 0) classes_[count_++] = static_cast<int16_t>(c);
        }
    }
    int64_t count() const { return count_; }
    int16_t operator[](int64_t k) const { return classes_[k]; }
    const int16_t* classes() const { return classes_; }

  private:
    int16_t* classes_;
    int64_t count_ = 0;
};

// visit(image, block, classes present) for blocks of the items of all images, which threads share out.
template <class T, class Visit>
void each_block(const Params& p, int64_t items, const Where& where, const Visit& visit) {
    const int64_t units = p.images * ceil_div(items, kBlock);
    const int threads = count_threads(p.images * p.channels * p.pixels, where);
    const Memory memory(threads, Present::bytes(p));
#pragma omp parallel for num_threads(threads)
    for (int64_t unit = 0; unit < units; ++unit) {
        const Block block(unit, items);
        visit(Image<T>{p, block.image}, block, Present(p, block.image, memory.arena(omp_get_thread_num())));
    }
}

// Of a block of pixels with vectors of channels, or of a block of channels with vectors of pixels.
template <class T>
void multiply(const Image<T>& image, const Block& block, bool of_pixels, Products<wide<T>>& products) {
    const Params& p = image.p;
    const int64_t row = p.channels_last ? p.channels : p.pixels,
                  rows = p.channels_last ? p.pixels : p.channels;
    if (of_pixels != p.channels_last) {
        multiply_with_columns(image.features() + block.first, row, rows, block.count, products);
    } else {
        multiply_with_rows(image.features() + block.first * row, row, row, block.count, products);
    }
}

void count_seeds(const Params& p) {
    std::fill_n(p.counts, p.images * p.classes, 0);
    for (int64_t n = 0; n < p.images; ++n) {
        for (int64_t i = 0; i < p.pixels; ++i) {
            const int16_t c = p.seeds[n * p.pixels + i];
            if (c >= 0) ++p.counts[n * p.classes + c];
        }
    }
}

// Adds up the features of each class's pixels, of a block of channels.
template <class T>
void add_segments(const Image<T>& image, const Block& block, const Present& present) {
    using W = wide<T>;
    const Params& p = image.p;
    W buffer[kChunk];
    if (p.channels_last) {
        for (int64_t i = 0; i < p.pixels; ++i) {
            const int16_t c = image.seeds()[i];
            if (c < 0) continue;
            const W* const row = widen(image.features() + i * p.channels + block.first, block.count, buffer);
            W* const sums = image.prototype(c) + block.first;
#pragma omp simd
            for (int64_t d = 0; d < block.count; ++d) sums[d] += row[d];
        }
        return;
    }
    for (int64_t begin = 0; begin < p.pixels; begin += kChunk) {
        const int64_t count = std::min(kChunk, p.pixels - begin);
        const Segments<W> segments(image.seeds() + begin, count, present.classes(), present.count());
        for (int64_t d = block.first; d < block.first + block.count; ++d) {
            const W* const row = widen(image.features() + d * p.pixels + begin, count, buffer);
            segments.add_to(image.prototype(0) + d, p.channels, row);
        }
    }
}

template <class T>
void find_prototypes(const Params& p, const Where& where) {
    count_seeds(p);
    each_block<T>(p, p.channels, where,
                  [](const Image<T>& image, const Block& block, const Present& present) {
                      for (int64_t c = 0; c < image.p.classes; ++c)
                          std::fill_n(image.prototype(c) + block.first, block.count, wide<T>{0});
                      add_segments(image, block, present);
                      for (int64_t k = 0; k < present.count(); ++k) {
                          wide<T>* const prototype = image.prototype(present[k]) + block.first;
                          const auto pixels = static_cast<wide<T>>(image.count(present[k]));
                          for (int64_t i = 0; i < block.count; ++i) prototype[i] /= pixels;
                      }
                  });
}

template <class W>
void find_prototype_lengths(const Params& p) {
    for (int64_t i = 0; i < p.images * p.classes; ++i) {
        const W* const prototype = static_cast<const W*>(p.prototypes) + i * p.channels;
        static_cast<W*>(p.prototype_lengths)[i] = p.counts[i] > 0 ? find_length(prototype, p.channels) : W{0};
    }
}

// Of a block of pixels.
template <class T>
void compare_block(const Image<T>& image, const Block& block, const Present& present) {
    using W = wide<T>;
    W* const lengths = image.lengths() + block.first;
    for (int64_t c = 0; c < image.p.classes; ++c) {
        if (image.count(c) == 0) std::fill_n(image.cosines(c) + block.first, block.count, W{0});
    }
    Products<W> products;
    int64_t k = 0;
    do {  // once too where no class has pixels, for the lengths
        products.count = std::min<int64_t>(kFew, present.count() - k);
        for (int64_t i = 0; i < products.count; ++i) products.vectors[i] = image.prototype(present[k + i]);
        multiply(image, block, true, products);
        for (int64_t i = 0; i < block.count; ++i) lengths[i] = std::sqrt(products.squares[i]);
        for (int64_t i = 0; i < products.count; ++i) {
            W* const cosines = image.cosines(present[k + i]) + block.first;
            const W length = image.prototype_length(present[k + i]);
            for (int64_t j = 0; j < block.count; ++j) {
                const W cosine = products.sums[i][j] / at_least_epsilon(lengths[j]) / length;
                cosines[j] = passes(cosine) ? cosine : W{0};
            }
        }
        k += kFew;
    } while (k < present.count());
}

// weights and selves, of a block of pixels.
template <class T>
void find_weights(const Image<T>& image, const Block& block, const Present& present) {
    using W = wide<T>;
    const W* const lengths = image.lengths() + block.first;
    W* const selves = image.selves() + block.first;
    std::fill_n(selves, block.count, W{0});
    for (int64_t k = 0; k < present.count(); ++k) {
        const int16_t c = present[k];
        const W* const gradient = image.cosine_gradient(c) + block.first;
        const W* const cosines = image.cosines(c) + block.first;
        W* const weights = image.weights(c) + block.first;
        for (int64_t i = 0; i < block.count; ++i) {
            weights[i] = find_weight(gradient[i], cosines[i], lengths[i]);
            selves[i] += weights[i] * cosines[i];
        }
    }
    for (int64_t i = 0; i < block.count; ++i) selves[i] = divide_by_length(selves[i], lengths[i]);
}

template <class W>
void find_alongs(const Params& p) {
    for (int64_t i = 0; i < p.images * p.classes; ++i) {
        const W* const gradient = static_cast<const W*>(p.gradient) + i * p.pixels;
        const W* const cosines = static_cast<const W*>(p.cosines) + i * p.pixels;
        W along = 0;
        for (int64_t j = 0; j < p.pixels && p.counts[i] > 0; ++j) {
            along += passes(cosines[j]) ? gradient[j] * cosines[j] : W{0};
        }
        static_cast<W*>(p.alongs)[i] = along;
    }
}

// shares, of a block of channels.
template <class T>
void find_shares(const Image<T>& image, const Block& block, const Present& present) {
    using W = wide<T>;
    const Params& p = image.p;
    Products<W> products;
    for (int64_t k = 0; k < present.count(); k += kFew) {
        products.count = std::min<int64_t>(kFew, present.count() - k);
        for (int64_t i = 0; i < products.count; ++i) products.vectors[i] = image.weights(present[k + i]);
        multiply(image, block, false, products);
        for (int64_t i = 0; i < products.count; ++i) {
            const int16_t c = present[k + i];
            const W along = static_cast<const W*>(p.alongs)[image.index * p.classes + c];
            const W length = static_cast<const W*>(p.prototype_lengths)[image.index * p.classes + c];
            const W* const prototype = image.prototype(c) + block.first;
            W* const shares = image.shares(c) + block.first;
            for (int64_t j = 0; j < block.count; ++j) {
                shares[j] = find_share(products.sums[i][j], along, prototype[j], length, image.count(c));
            }
        }
    }
}

// Adds what pixels' own features get, of a chunk of a row: factor(k) and vector(k) say what of each class.
template <class W, class Factor, class Vector>
void add_own(W* to, int64_t length, int64_t classes, const Factor& factor, const Vector& vector) {
    for (int64_t k = 0; k < classes; k += kFew) {
        W factors[kFew];
        const W* vectors[kFew];
        const int64_t count = std::min<int64_t>(kFew, classes - k);
        for (int64_t i = 0; i < count; ++i) {
            factors[i] = factor(k + i);
            vectors[i] = vector(k + i);
        }
        with_count(count, [&](auto number) { add_scaled<number.value>(to, factors, vectors, length); });
    }
}

// A chunk of a row of the gradient, in memory where the types agree.
template <class T, class Fill>
void write_row(T* to, int64_t length, const Fill& fill) {
    if constexpr (std::is_same_v<T, wide<T>>) {
        fill(to);
    } else {
        wide<T> row[kChunk];
        fill(row);
        for (int64_t i = 0; i < length; ++i) to[i] = static_cast<T>(row[i]);
    }
}

// Of a block of channels.
template <class T>
void write_channels(const Image<T>& image, const Block& block, const Present& present) {
    using W = wide<T>;
    const Params& p = image.p;
    W buffer[kChunk];
    for (int64_t begin = 0; begin < p.pixels; begin += kChunk) {
        const int64_t length = std::min(kChunk, p.pixels - begin);
        const Segments<W> segments(image.seeds() + begin, length, present.classes(), present.count());
        for (int64_t d = block.first; d < block.first + block.count; ++d) {
            write_row(image.gradient() + d * p.pixels + begin, length, [&](W* to) {
                if (p.gradient == nullptr) {
                    std::fill_n(to, length, W{0});
                } else {
                    const W* const row = widen(image.features() + d * p.pixels + begin, length, buffer);
                    const W* const selves = image.selves() + begin;
#pragma omp simd
                    for (int64_t i = 0; i < length; ++i) to[i] = -selves[i] * row[i];
                    add_own(
                        to, length, present.count(),
                        [&](int64_t k) {
                            return image.prototype(present[k])[d] / image.prototype_length(present[k]);
                        },
                        [&](int64_t k) { return image.weights(present[k]) + begin; });
                }
                if (p.shares != nullptr) segments.spread(to, image.shares(0) + d, p.channels);
            });
        }
    }
}

// Of a block of pixels, where a pixel's channels are side by side.
template <class T>
void write_pixels(const Image<T>& image, const Block& block, const Present& present) {
    using W = wide<T>;
    const Params& p = image.p;
    W buffer[kChunk];
    for (int64_t i = block.first; i < block.first + block.count; ++i) {
        const int16_t seed = image.seeds()[i];
        for (int64_t begin = 0; begin < p.channels; begin += kChunk) {
            const int64_t length = std::min(kChunk, p.channels - begin);
            write_row(image.gradient() + i * p.channels + begin, length, [&](W* to) {
                if (p.gradient == nullptr) {
                    std::fill_n(to, length, W{0});
                } else {
                    const W* const row = widen(image.features() + i * p.channels + begin, length, buffer);
                    const W self = image.selves()[i];
#pragma omp simd
                    for (int64_t d = 0; d < length; ++d) to[d] = -self * row[d];
                    add_own(
                        to, length, present.count(),
                        [&](int64_t k) {
                            return image.weights(present[k])[i] / image.prototype_length(present[k]);
                        },
                        [&](int64_t k) { return image.prototype(present[k]) + begin; });
                }
                if (p.shares == nullptr || seed < 0) return;
                const W* const shares = image.shares(seed) + begin;
#pragma omp simd
                for (int64_t d = 0; d < length; ++d) to[d] += shares[d];
            });
        }
    }
}

template <class T>
void find_gradient(const Params& p, const Where& where) {
    if (p.gradient != nullptr) {
        each_block<T>(p, p.pixels, where, find_weights<T>);
        if (p.shares != nullptr) {
            find_alongs<wide<T>>(p);
            each_block<T>(p, p.channels, where, find_shares<T>);
        }
    }
    if (p.channels_last) {
        each_block<T>(p, p.pixels, where, write_pixels<T>);
    } else {
        each_block<T>(p, p.channels, where, write_channels<T>);
    }
}

}  // namespace

void find_seeds(const SeedParams& p, const Where& where) {
    const int threads = count_threads(p.images * p.classes * p.height * p.width, where);
    with_type(p.dtype, [&](auto type) { find_classes<typename decltype(type)::type>(p, threads); });
}
void average(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) { find_prototypes<typename decltype(type)::type>(p, where); });
}
void compare(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        find_prototype_lengths<wide<T>>(p);
        each_block<T>(p, p.pixels, where, compare_block<T>);
    });
}
void differentiate(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) { find_gradient<typename decltype(type)::type>(p, where); });
}
void resize_level(const LevelParams& p, const Where& where) {
    const int threads = count_threads(p.images * p.channels * p.out_height * p.out_width, where);
    with_type(p.dtype, [&](auto type) { resize<typename decltype(type)::type>(p, threads); });
}
void differentiate_level(const LevelParams& p, const Where& where) {
    const int threads = count_threads(p.images * p.channels * p.out_height * p.out_width, where);
    with_type(p.dtype, [&](auto type) { find_level_gradients<typename decltype(type)::type>(p, threads); });
}

}  // namespace wsss::prototype::WSSS_LEVEL
