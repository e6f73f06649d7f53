// msdw_loss on the CPU: a thread takes whole maps, so that each sum has one order.
//
// At N4 C21 32x32 (86 000 numbers a cam) the work is small beside the network's: what counts is that there is
// one pass forward, after that for the maximum, and one back, in place of PyTorch's twenty.
#include <omp.h>

#include <algorithm>

#include "cpu_memory.h"
#include "cpu_threads.h"
#include "msdw/math.h"
#include "with_type.h"

namespace wsss::msdw::WSSS_LEVEL {
namespace {

// visit(y, x) for each pixel.
template <class Visit>
WSSS_HOST_DEVICE void each_pixel(int64_t height, int64_t width, const Visit& visit) {
    for (int64_t y = 0; y < height; ++y) {
        for (int64_t x = 0; x < width; ++x) visit(y, x);
    }
}

template <class T>
void find_loss(const Params& p, const Axes<wide<T>>& axes, int64_t image, int64_t c) {
    using W = wide<T>;
    const Map<T> w(p.cam_w, image, c), q(p.cam_p, image, c), v(p.cam_w_small, image, c);
    const Factors<W> factors(p, image, c);
    W maximum = -static_cast<W>(INFINITY);
    each_pixel(p.height, p.width,
               [&](int64_t y, int64_t x) { maximum = larger_or_nan(maximum, q.at(y, x)); });
    double prototype = 0, scale = 0;
    each_pixel(p.height, p.width, [&](int64_t y, int64_t x) {
        prototype += static_cast<double>(std::abs(w.at(y, x) - divide_by_maximum(q.at(y, x), maximum)));
    });
    if (factors.scale != 0) {
        each_pixel(p.small_height, p.small_width, [&](int64_t y, int64_t x) {
            scale += static_cast<double>(std::abs(w.at(axes.y.at(y), axes.x.at(x)) - v.at(y, x)));
        });
    }
    static_cast<W*>(p.maxima)[image * p.classes + c] = maximum;
    p.parts[image * p.classes + c] = factors.prototype * prototype + factors.scale * scale;
}

// cam_w's gradient is summed in `sums`, as wide numbers.
template <class T>
void find_gradients(const Params& p, const Axes<wide<T>>& axes, int64_t image, int64_t c, wide<T>* sums) {
    using W = wide<T>;
    const Map<T> w(p.cam_w, image, c), q(p.cam_p, image, c), v(p.cam_w_small, image, c);
    const Factors<W> factors(p, image, c);
    const W gradient = *static_cast<const W*>(p.loss_gradient);
    const W prototype = gradient * factors.prototype, scale = gradient * factors.scale;
    const W maximum = static_cast<const W*>(p.maxima)[image * p.classes + c];

    double along = 0;
    int64_t maxima = 0;
    each_pixel(p.height, p.width, [&](int64_t y, int64_t x) {
        const W part = divide_by_maximum(q.at(y, x), maximum), of = sign(w.at(y, x) - part);
        along += static_cast<double>(of * part);
        maxima += q.at(y, x) == maximum;
        sums[y * p.width + x] = prototype * of;
        *pointer<T>(p.cam_p_gradient, image, c, y, x) =
            static_cast<T>(divide_by_maximum(-prototype * of, maximum));
    });
    const W of_maximum =
        divide_by_maximum(prototype * static_cast<W>(along), maximum) / static_cast<W>(maxima);
    each_pixel(p.height, p.width, [&](int64_t y, int64_t x) {
        if (q.at(y, x) != maximum) return;
        const W of =
            divide_by_maximum(-prototype * sign(w.at(y, x) - divide_by_maximum(maximum, maximum)), maximum);
        *pointer<T>(p.cam_p_gradient, image, c, y, x) = static_cast<T>(of + of_maximum);
    });

    each_pixel(p.small_height, p.small_width, [&](int64_t y, int64_t x) {
        const Tap<W> row = axes.y.at(y), column = axes.x.at(x);
        const W of = factors.scale != 0 ? scale * sign(w.at(row, column) - v.at(y, x)) : W{0};
        *pointer<T>(p.cam_w_small_gradient, image, c, y, x) = static_cast<T>(-of);
        W* const upper = sums + row.index * p.width + column.index;
        W* const lower = upper + (row.fraction > 0 ? p.width : 0);
        const int64_t right = column.fraction > 0;
        upper[0] += of * (1 - row.fraction) * (1 - column.fraction);
        upper[right] += of * (1 - row.fraction) * column.fraction;
        lower[0] += of * row.fraction * (1 - column.fraction);
        lower[right] += of * row.fraction * column.fraction;
    });
    each_pixel(p.height, p.width, [&](int64_t y, int64_t x) {
        *pointer<T>(p.cam_w_gradient, image, c, y, x) = static_cast<T>(sums[y * p.width + x]);
    });
}

template <class T, bool kForward>
void run(const Params& p, const Where& where) {
    using W = wide<T>;
    const int threads = count_threads(p.images * p.classes * p.height * p.width, where);
    const Axes<W> axes(p);
    const Memory memory(threads, kForward ? 0 : bytes_for<W>(p.height * p.width));
#pragma omp parallel for num_threads(threads)
    for (int64_t map = 0; map < p.images * p.classes; ++map) {
        const int64_t image = map / p.classes, c = map % p.classes;
        if constexpr (kForward) {
            find_loss<T>(p, axes, image, c);
        } else {
            W* const sums = memory.arena(omp_get_thread_num()).template take<W>(p.height * p.width);
            find_gradients<T>(p, axes, image, c, sums);
        }
    }
}

template <bool kForward>
void dispatch(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) { run<typename decltype(type)::type, kForward>(p, where); });
}

}  // namespace

void forward(const Params& p, const Where& where) { dispatch<true>(p, where); }
void backward(const Params& p, const Where& where) { dispatch<false>(p, where); }

}  // namespace wsss::msdw::WSSS_LEVEL
