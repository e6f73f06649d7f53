// clip_features on the CPU: each image's maximum, then its numbers clipped, one pass each.
//
// Traffic: x is read twice and the result written once; the floor is a plain copy. A thread takes a
// contiguous share of all chunks. An image that lies wholly in it is clipped at once, while the caches still
// hold it; one that several threads share waits for their one barrier.
#include <omp.h>

#include <algorithm>

#include "clip/math.h"
#include "cpu_threads.h"
#include "with_type.h"

namespace wsss::clip::WSSS_LEVEL {
namespace {

struct Chunks {  // counted over all images
    int64_t begin, end;
};

// The calling thread's.
Chunks find_share(const Params& p) {
    const int64_t all = p.images * p.chunks, threads = omp_get_num_threads(), thread = omp_get_thread_num();
    return {all * thread / threads, all * (thread + 1) / threads};
}

struct Run {  // of numbers of one image
    int64_t image, begin, length;
};

Run run_of(const Params& p, int64_t image, const Chunks& chunks) {
    const int64_t begin = (chunks.begin - image * p.chunks) * p.chunk_elements;
    const int64_t end = std::min((chunks.end - image * p.chunks) * p.chunk_elements, p.elements);
    return {image, begin, end - begin};
}

// visit(image, its chunks in the share).
template <class Visit>
void each_image(const Params& p, const Chunks& share, const Visit& visit) {
    for (int64_t image = share.begin / p.chunks; image * p.chunks < share.end; ++image) {
        visit(image,
              Chunks{std::max(share.begin, image * p.chunks), std::min(share.end, (image + 1) * p.chunks)});
    }
}

// How numbers lie in memory and what they are compared by. 16-bit floats have integers of the same order: so
// they need no conversion, and vectors hold twice as many.
template <class T>
struct Order {
    using Bits = T;
    using Key = T;
    static WSSS_HOST_DEVICE Bits bits(T number) { return number; }
    static WSSS_HOST_DEVICE T number(Key key) { return key; }
    static WSSS_HOST_DEVICE Key key(Bits bits) { return bits; }
};
template <class T>
struct HalfOrder {
    using Bits = uint16_t;
    using Key = int16_t;
    static WSSS_HOST_DEVICE Bits bits(T number) { return number.code; }
    static WSSS_HOST_DEVICE T number(Key key) {
        T number;
        number.code = static_cast<Bits>(flip(key));
        return number;
    }
    static WSSS_HOST_DEVICE Key key(Bits bits) {
        const Key key = flip(static_cast<Key>(bits)), infinity = static_cast<Key>(T(INFINITY).code);
        return key > infinity ? Key{INT16_MIN} : key;  // NaN of either sign: below all
    }

  private:
    // From sign and magnitude to an integer, and back.
    static WSSS_HOST_DEVICE Key flip(Key bits) { return static_cast<Key>(bits ^ (bits >> 15 & 0x7fff)); }
};
template <>
struct Order<Float16> : HalfOrder<Float16> {};
template <>
struct Order<BFloat16> : HalfOrder<BFloat16> {};

template <class T>
using BitsOf = typename Order<T>::Bits;

template <class T>
T find_maximum(const BitsOf<T>* x, int64_t length) {
    using Key = typename Order<T>::Key;
    constexpr int64_t kLanes = 256 / sizeof(Key);  // several vectors, which do not wait for each other
    Key lanes[kLanes];
    std::fill_n(lanes, kLanes, Order<T>::key(Order<T>::bits(T(lowest<wide<T>>()))));
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) {
#pragma omp simd
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            lanes[lane] = larger_number(lanes[lane], Order<T>::key(x[i + lane]));
        }
    }
    Key maximum = lanes[0];
    for (const Key key : lanes) maximum = larger_number(maximum, key);
    for (; i < length; ++i) maximum = larger_number(maximum, Order<T>::key(x[i]));
    return Order<T>::number(maximum);
}

template <class Number>
Number* at(Number* numbers, int64_t stride, const Run& run) {
    return numbers + run.image * stride + run.begin;
}

template <class T>
void find_maxima(const Params& p, int64_t image, const Chunks& chunks) {
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
        const Run run = run_of(p, image, {chunk, chunk + 1});
        static_cast<wide<T>*>(p.maxima)[chunk] =
            find_maximum<T>(at(static_cast<const BitsOf<T>*>(p.x), p.image_stride, run), run.length);
    }
}

template <class T>
void clip_chunks(const Params& p, int64_t image, const Chunks& chunks) {
    const wide<T>* maxima = static_cast<const wide<T>*>(p.maxima) + image * p.chunks;
    const BitsOf<T> limit = Order<T>::bits(find_limit<T>(p.beta, find_maximum<wide<T>>(maxima, p.chunks)));
    if (chunks.begin == image * p.chunks) static_cast<BitsOf<T>*>(p.limits)[image] = limit;

    const Run run = run_of(p, image, chunks);
    const BitsOf<T>* x = at(static_cast<const BitsOf<T>*>(p.x), p.image_stride, run);
    BitsOf<T>* clipped = at(static_cast<BitsOf<T>*>(p.clipped), p.elements, run);
    const auto bar = Order<T>::key(limit);
#pragma omp simd
    for (int64_t i = 0; i < run.length; ++i) clipped[i] = Order<T>::key(x[i]) > bar ? limit : x[i];
}

template <class T>
void clip_images(const Params& p, const Where& where) {
    const int threads = count_threads(p.images * p.elements, where);
#pragma omp parallel num_threads(threads)
    {
        const Chunks share = find_share(p);
        const auto is_whole = [&](const Chunks& chunks) { return chunks.end - chunks.begin == p.chunks; };
        each_image(p, share, [&](int64_t image, const Chunks& chunks) {
            find_maxima<T>(p, image, chunks);
            if (is_whole(chunks)) clip_chunks<T>(p, image, chunks);
        });
#pragma omp barrier
        each_image(p, share, [&](int64_t image, const Chunks& chunks) {
            if (!is_whole(chunks)) clip_chunks<T>(p, image, chunks);
        });
    }
}

template <class T>
void differentiate_images(const Params& p, const Where& where) {
    const int threads = count_threads(p.images * p.elements, where);
#pragma omp parallel num_threads(threads)
    each_image(p, find_share(p), [&](int64_t image, const Chunks& chunks) {
        const Run run = run_of(p, image, chunks);
        const BitsOf<T>* x = at(static_cast<const BitsOf<T>*>(p.x), p.image_stride, run);
        const BitsOf<T>* gradient = at(static_cast<const BitsOf<T>*>(p.gradient), p.gradient_stride, run);
        BitsOf<T>* x_gradient = at(static_cast<BitsOf<T>*>(p.x_gradient), p.elements, run);
        const auto bar = Order<T>::key(static_cast<const BitsOf<T>*>(p.limits)[image]);
#pragma omp simd
        for (int64_t i = 0; i < run.length; ++i) {
            x_gradient[i] = Order<T>::key(x[i]) > bar ? BitsOf<T>{0} : gradient[i];
        }
    });
}

}  // namespace

void clip(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) { clip_images<typename decltype(type)::type>(p, where); });
}

void differentiate(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) { differentiate_images<typename decltype(type)::type>(p, where); });
}

}  // namespace wsss::clip::WSSS_LEVEL
