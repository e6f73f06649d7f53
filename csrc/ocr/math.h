// What all backends share: where a resized pixel reads, and the loss of a pixel from the sums over its
// groups.
//
// Notation of wsss_ops.ocr_loss, with e_O = sum over i in O of exp(scale (s_i - max s)), max s being the
// predicted class's and so in O, and e_I = sum over j in I of exp(scale (min s_j - s_j)): no exponent is
// positive. Then exp(z) = e_O e_I exp(gap) with gap = scale (max s - min s_j + margin), and
//   loss = log(1 + exp(z)),  d loss / d s_i = scale slope e_I exp(scale (s_i - max s)),
//   slope = sigmoid(z) / (e_O e_I),  d loss / d s_j = -scale slope e_O exp(scale (min s_j - s_j)).
#pragma once

#include <cmath>

#include "ocr/op.h"

namespace wsss::ocr {

// An output coordinate's two inputs, index and index + 1, as torch.nn.functional.interpolate has them.
template <class W>
struct Tap {
    int64_t index;
    W fraction;  // the weight of index + 1, 0 where that would lie outside
};

template <class W>
struct Axis {
    W scale;
    int64_t size;  // of the input
    bool align_corners;

    Axis(int64_t in, int64_t out, bool align)
        : scale(!align    ? static_cast<W>(in) / static_cast<W>(out)
                : out > 1 ? static_cast<W>(in - 1) / static_cast<W>(out - 1)
                          : W{0}),
          size(in),
          align_corners(align) {}

    WSSS_HOST_DEVICE Tap<W> at(int64_t out) const {
        const W middle = scale * (static_cast<W>(out) + W(0.5)) - W(0.5);
        const W place = align_corners ? scale * static_cast<W>(out) : middle > 0 ? middle : W{0};
        int64_t index = static_cast<int64_t>(place);
        index = index < size - 1 ? index : size - 1;
        const W fraction = index < size - 1 ? place - static_cast<W>(index) : W{0};
        return {index, fraction < 1 ? fraction : W{1}};
    }

    // The first output coordinate whose index is at least `index`; `outputs` where there is none.
    WSSS_HOST_DEVICE int64_t first_output(int64_t index, int64_t outputs) const {
        int64_t low = 0, high = outputs;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (at(middle).index < index) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }
};

// The two from both = e_O e_I, gap and fade = exp(-|gap|). Number: a number or a vector of them.
template <class Number, class Log>
WSSS_HOST_DEVICE Number loss_of(Number both, Number gap, Number fade, const Log& log_plus_one) {
    const Number rest = gap > 0 ? both - 1 + fade : both * fade;
    return log_plus_one(rest) + (gap > 0 ? gap : Number{});
}
template <class Number>
WSSS_HOST_DEVICE Number slope_of(Number both, Number gap, Number fade) {
    return gap > 0 ? 1 / (both + fade) : fade / (1 + both * fade);
}

// What score + log prior a class needs to be in the group I, given the largest of the tagged classes:
// anything where all have prior 0, else something finite, which the logarithm of a prior of 0 is not.
template <class Number, class W>
WSSS_HOST_DEVICE Number find_relevance_cutoff(Number best, W log_threshold, Number lowest, Number infinity) {
    const Number cutoff = best + log_threshold;
    return best == -infinity ? -infinity : cutoff > lowest ? cutoff : lowest;
}

}  // namespace wsss::ocr
