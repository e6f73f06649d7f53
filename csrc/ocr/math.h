// What all backends share: the loss of a pixel from the sums over its groups.
//
// Notation of wsss_ops.ocr_loss, with e_O = sum over i in O of exp(scale (s_i - max s)), max s being the
// predicted class's and so in O, and e_I = sum over j in I of exp(scale (min s_j - s_j)): no exponent is
// positive. Then exp(z) = e_O e_I exp(gap) with gap = scale (max s - min s_j + margin), and
//   loss = log(1 + exp(z)),  d loss / d s_i = scale slope e_I exp(scale (s_i - max s)),
//   slope = sigmoid(z) / (e_O e_I),  d loss / d s_j = -scale slope e_O exp(scale (min s_j - s_j)).
#pragma once

#include <cmath>

#include "ocr/op.h"
#include "resize.h"

namespace wsss::ocr {

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
