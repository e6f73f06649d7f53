// msdw_loss on CUDA: a block for each map, one launch forward and one backward for both terms.
//
// N20 C21 32x32 fp32 (SFC's batch): three cams of 1.7 MB. All of it is in L2, so that the second walk over a
// map costs little; what is saved are PyTorch's twenty launches and tensors. The gradient that comes back
// through the resize is gathered: no atomics, and sums in a fixed order, so all runs have the same results.
#include "block.h"
#include "launch.h"
#include "msdw/math.h"
#include "with_type.h"

namespace wsss::msdw {
namespace {

constexpr int kThreads = 256;

struct LargerOrNan {
    template <class W>
    __device__ W operator()(W a, W b) const {
        return larger_or_nan(a, b);
    }
};
struct Sum {
    template <class W>
    __device__ W operator()(W a, W b) const {
        return a + b;
    }
};

// visit(y, x) for the thread's share of pixels.
template <class Visit>
__device__ void each_pixel(int64_t height, int64_t width, const Divisor& by_width, const Visit& visit) {
    for (int64_t i = threadIdx.x; i < height * width; i += kThreads) {
        const uint32_t y = by_width.quotient(static_cast<uint32_t>(i));
        visit(static_cast<int64_t>(y), static_cast<int64_t>(by_width.remainder(static_cast<uint32_t>(i), y)));
    }
}

struct Divisors {
    Divisor classes, width, small_width;
    explicit Divisors(const Params& p)
        : classes(static_cast<uint32_t>(p.classes)),
          width(static_cast<uint32_t>(p.width)),
          small_width(static_cast<uint32_t>(p.small_width)) {}
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) find_losses(Params p, Axes<wide<T>> axes, Divisors by) {
    using W = wide<T>;
    const uint32_t image = by.classes.quotient(blockIdx.x), c = by.classes.remainder(blockIdx.x, image);
    const Map<T> w(p.cam_w, image, c), q(p.cam_p, image, c), v(p.cam_w_small, image, c);
    const Factors<W> factors(p, image, c);
    W maximum = -static_cast<W>(INFINITY);
    each_pixel(p.height, p.width, by.width,
               [&](int64_t y, int64_t x) { maximum = larger_or_nan(maximum, q.at(y, x)); });
    maximum = fold_block<kThreads>(maximum, LargerOrNan());
    W prototype = 0, scale = 0;
    each_pixel(p.height, p.width, by.width, [&](int64_t y, int64_t x) {
        prototype += fabs(w.at(y, x) - divide_by_maximum(q.at(y, x), maximum));
    });
    if (factors.scale != 0) {
        each_pixel(p.small_height, p.small_width, by.small_width, [&](int64_t y, int64_t x) {
            scale += fabs(w.at(axes.y.at(y), axes.x.at(x)) - v.at(y, x));
        });
    }
    const double loss =
        fold_block<kThreads>(static_cast<double>(factors.prototype) * static_cast<double>(prototype) +
                                 static_cast<double>(factors.scale) * static_cast<double>(scale),
                             Sum());
    if (threadIdx.x != 0) return;
    static_cast<W*>(p.maxima)[blockIdx.x] = maximum;
    p.parts[blockIdx.x] = loss;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) find_gradients(Params p, Axes<wide<T>> axes, Divisors by) {
    using W = wide<T>;
    const uint32_t image = by.classes.quotient(blockIdx.x), c = by.classes.remainder(blockIdx.x, image);
    const Map<T> w(p.cam_w, image, c), q(p.cam_p, image, c), v(p.cam_w_small, image, c);
    const Factors<W> factors(p, image, c);
    const W gradient = *static_cast<const W*>(p.loss_gradient);
    const W prototype = gradient * factors.prototype, scale = gradient * factors.scale;
    const W maximum = static_cast<const W*>(p.maxima)[blockIdx.x];
    const auto of_small = [&](int64_t y, int64_t x) {
        return factors.scale != 0 ? scale * sign(w.at(axes.y.at(y), axes.x.at(x)) - v.at(y, x)) : W{0};
    };

    W along = 0, maxima = 0;
    each_pixel(p.height, p.width, by.width, [&](int64_t y, int64_t x) {
        const W part = divide_by_maximum(q.at(y, x), maximum);
        along += sign(w.at(y, x) - part) * part;
        maxima += q.at(y, x) == maximum ? W{1} : W{0};
    });
    along = fold_block<kThreads>(along, Sum());
    maxima = fold_block<kThreads>(maxima, Sum());
    const W of_maximum = divide_by_maximum(prototype * along, maximum) / maxima;

    each_pixel(p.height, p.width, by.width, [&](int64_t y, int64_t x) {
        const W own = prototype * sign(w.at(y, x) - divide_by_maximum(q.at(y, x), maximum));
        const W to_p = divide_by_maximum(-own, maximum) + (q.at(y, x) == maximum ? of_maximum : W{0});
        *pointer<T>(p.cam_p_gradient, image, c, y, x) = static_cast<T>(to_p);

        W sum = own;
        const int64_t bottom = axes.y.first_output(y + 1, p.small_height);
        const int64_t right = axes.x.first_output(x + 1, p.small_width);
        for (int64_t i = axes.y.first_output(y - 1, p.small_height); i < bottom && factors.scale != 0; ++i) {
            const Tap<W> row = axes.y.at(i);
            const W of_row = row.index == y ? 1 - row.fraction : row.fraction;
            if (of_row == 0) continue;
            for (int64_t j = axes.x.first_output(x - 1, p.small_width); j < right; ++j) {
                const Tap<W> column = axes.x.at(j);
                const W both = of_row * (column.index == x ? 1 - column.fraction : column.fraction);
                if (both != 0) sum += both * of_small(i, j);
            }
        }
        *pointer<T>(p.cam_w_gradient, image, c, y, x) = static_cast<T>(sum);
    });
    each_pixel(p.small_height, p.small_width, by.small_width, [&](int64_t y, int64_t x) {
        *pointer<T>(p.cam_w_small_gradient, image, c, y, x) = static_cast<T>(-of_small(y, x));
    });
}

template <class T, bool kForward>
void run(const Params& p, const Where& where) {
    const auto kernel = kForward ? find_losses<T> : find_gradients<T>;
    launch(kernel, dim3(static_cast<unsigned>(p.images * p.classes)), dim3(kThreads), 0, where.stream, p,
           Axes<wide<T>>(p), Divisors(p));
}

template <bool kForward>
void dispatch(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) { run<typename decltype(type)::type, kForward>(p, where); });
}

}  // namespace

void forward(const Params& p, const Where& where) { dispatch<true>(p, where); }
void backward(const Params& p, const Where& where) { dispatch<false>(p, where); }

}  // namespace wsss::msdw
