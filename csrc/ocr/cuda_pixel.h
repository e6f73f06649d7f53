// A thread's pixel on CUDA: the sums over its groups, its loss and what its gradient is made of.
#pragma once

#include <type_traits>

#include "ocr/cuda_scores.h"

namespace wsss::ocr {
namespace {

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float log_plus_one(float x) { return log1pf(x); }
__device__ inline double log_plus_one(double x) { return log1p(x); }

// exp(difference * scale) for each class, as power(difference * rate): for float32 one multiplication and one
// instruction for 2 to a power, where expf takes eight. Subtraction and two multiplications leave an exponent
// x wrong by 2^-23 |x|, and exp(x) by 2^-23 |x| exp(x): at most 5e-8, beside sums that are at least 1.
// Results below 2^-126 become 0.
template <class W>
W rate_of(const Params& p) {
    return static_cast<W>(sizeof(W) == 4 ? p.scale * 1.4426950408889634 : p.scale);
}
__device__ inline float power(float x) {
#if defined(__CUDACC__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}
__device__ inline double power(double x) { return exp(x); }

template <class W>
__device__ W infinity() {
    return static_cast<W>(INFINITY);
}
template <class W>
__device__ W lowest() {
    return sizeof(W) == 4 ? static_cast<W>(-3.402823466e38f) : static_cast<W>(-1.7976931348623157e308);
}

// The larger one; NaN where one is.
template <class W>
__device__ W larger_or_nan(W x, W y) {
#if defined(__CUDACC__)
    if constexpr (sizeof(W) == 4) {
        W result;
        asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
        return result;
    }
#endif
    return y > x || y != y ? y : x;
}

// What is computed before the launch: the rate of powers, whether a Stage copies runs, and the steps from one
// class's number to the next one's. These in bytes: the address of a class is then a multiplication of 32 by
// 64 bits, two instructions, without two more for the size of a number.
template <class T>
struct Factors {
    wide<T> rate;
    uint64_t logits_step, gradient_step;
    bool logits_run, gradient_run;

    explicit Factors(const Params& p)
        : rate(rate_of<wide<T>>(p)),
          logits_step(static_cast<uint64_t>(p.strides.channel) * sizeof(T)),
          gradient_step(static_cast<uint64_t>(p.gradient_strides.channel) * sizeof(T)),
          logits_run(is_run(p, p.strides)),
          gradient_run(is_run(p, p.gradient_strides)) {}
};

// sum of exp(scale * (x - largest)) over numbers as they come, each exponent at most 0. `largest` is NaN as
// soon as a number is.
template <class W>
struct RunningSum {
    W largest = lowest<W>(), sum = 0;

    template <int kCount>
    __device__ bool add(const W (&x)[kCount], W rate) {  // whether one is the largest so far
        const W before = largest;
#pragma unroll
        for (int i = 0; i < kCount; ++i) largest = larger_or_nan(largest, x[i]);
        sum *= power((finite(before) - finite(largest)) * rate);
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum += power((x[i] - finite(largest)) * rate);
        return largest > before;
    }
    __device__ W total() const { return sum == infinity<W>() ? W{1} : sum; }

  private:
    // inf - inf would be NaN: with this, the sum is infinite where a number is, and 1 in total().
    __device__ static W finite(W x) { return min(x, -lowest<W>()); }
};

// run(std::bool_constant): whether a prior or threshold chooses among the tagged classes. Kernels of their
// own, for what choosing takes would cost the others registers.
template <class Run>
void with_selection(const Params& p, const Run& run) {
    if (p.log_prior != nullptr || p.log_threshold > -INFINITY) return run(std::true_type());
    run(std::false_type());
}

template <class W>
__device__ W relevance_of(const Params& p, int c, int winner, W score) {
    if (p.log_prior == nullptr) return score;
    return score + static_cast<const W*>(p.log_prior)[c * p.classes + winner];
}

template <class W>
struct Inside {  // the group I: the sum over -s_j, and what decides who belongs to it
    RunningSum<W> sum;
    W cutoff = -infinity<W>();

    template <class Batch, class Belongs>
    __device__ void add(const Batch& batch, W rate, const Belongs& belongs) {
        W opposite[Batch::kSize];
#pragma unroll
        for (int i = 0; i < Batch::kSize; ++i) {
            opposite[i] = batch.has(i) && belongs(i) ? -batch.scores[i] : -infinity<W>();
        }
        sum.add(opposite, rate);
    }
};

// Where a prior or threshold chooses among the tagged classes.
template <class W, class Scores>
__device__ Inside<W> select_inside(const Params& p, const Scores& scores, int winner, W rate) {
    Inside<W> in;
    W best = -infinity<W>();
    scores.each_inside([&](const auto& batch) {
#pragma unroll
        for (int i = 0; i < batch.kSize; ++i) {
            if (!batch.has(i)) break;
            const W relevance = relevance_of(p, batch.classes[i], winner, batch.scores[i]);
            best = relevance > best ? relevance : best;
        }
    });
    in.cutoff = find_relevance_cutoff(best, static_cast<W>(p.log_threshold), lowest<W>(), infinity<W>());
    scores.each_inside([&](const auto& batch) {
        in.add(batch, rate, [&](int i) {
            return relevance_of(p, batch.classes[i], winner, batch.scores[i]) >= in.cutoff;
        });
    });
    return in;
}

template <bool kSelective, class W, class Scores>
__device__ Inside<W> find_inside(const Params& p, const Scores& scores, int winner, W rate) {
    if constexpr (kSelective) return select_inside<W>(p, scores, winner, rate);
    Inside<W> in;
    scores.each_inside([&](const auto& batch) { in.add(batch, rate, [](int) { return true; }); });
    return in;
}

template <class W>
struct Ranking {  // the arguments of loss_of and slope_of
    W both, gap, fade;

    __device__ Ranking(const Params& p, W best, W outside_sum, const RunningSum<W>& inside)
        : both(outside_sum * inside.total()),
          gap((best + inside.largest + static_cast<W>(p.margin)) * static_cast<W>(p.scale)),
          fade(exponential(gap > 0 ? -gap : gap)) {}
};

template <class W>
struct PixelLoss {
    int winner = -1;  // -1: no out-of-candidate pixel
    W loss = 0, outside_sum = 0;
};

// The group O: its sum, and the first class with the largest score; -1 where all are -inf.
template <class W>
struct Outside {
    RunningSum<W> sum;
    int winner = -1;

    template <class Scores>
    __device__ Outside(const Scores& scores, W rate) {
        scores.each_outside([&](const auto& batch) { add(batch, rate); });
        if (winner >= 0) winner = scores.classes.outside(winner);
    }

  private:
    template <class Batch>
    __device__ void add(const Batch& batch, W rate) {  // of the winner the place in the list
        W x[Batch::kSize];
#pragma unroll
        for (int i = 0; i < Batch::kSize; ++i) x[i] = batch.has(i) ? batch.scores[i] : -infinity<W>();
        if (!sum.add(x, rate)) return;
        int place = Batch::kSize - 1;
#pragma unroll
        for (int i = Batch::kSize - 2; i >= 0; --i) place = x[i] == sum.largest ? i : place;
        winner = batch.first + place;
    }
};

// Whether a tagged class before this one has the same score.
template <class W, class Scores>
__device__ bool is_later(const Scores& scores, int winner, W score) {
    bool later = false;
    scores.each_inside([&](const auto& batch) {
#pragma unroll
        for (int i = 0; i < batch.kSize; ++i) {
            later |= batch.has(i) && batch.classes[i] < winner && batch.scores[i] == score;
        }
    });
    return later;
}

// Reads each score once, those of tagged classes again where a prior or threshold chooses among them and
// where the largest one of them equals the largest one of the others.
template <bool kSelective, class W, class Scores>
__device__ PixelLoss<W> find_loss(const Params& p, const Scores& scores, W rate) {
    const Outside<W> out(scores, rate);
    const W best = out.sum.largest;
    W largest = lowest<W>();
    Inside<W> in;
    scores.each_inside([&](const auto& batch) {
#pragma unroll
        for (int i = 0; i < batch.kSize; ++i) {
            largest = larger_or_nan(largest, batch.has(i) ? batch.scores[i] : -infinity<W>());
        }
        if constexpr (!kSelective) in.add(batch, rate, [](int) { return true; });
    });
    const bool broken = best != best || largest != largest;
    PixelLoss<W> result;
    if (!broken && (out.winner < 0 || best < largest)) return result;
    if (best == largest && is_later(scores, out.winner, best)) return result;
    result.winner = out.winner < 0 ? 0 : out.winner;
    if (p.winner == nullptr) return result;
    if constexpr (kSelective) in = select_inside<W>(p, scores, result.winner, rate);
    const Ranking<W> ranking(p, best, out.sum.total(), in.sum);
    const W nan = static_cast<W>(NAN);
    result.loss =
        broken ? nan : loss_of(ranking.both, ranking.gap, ranking.fade, [](W x) { return log_plus_one(x); });
    result.outside_sum = broken ? nan : out.sum.total();
    return result;
}

// What the gradient of an out-of-candidate pixel's scores is made of.
template <class W>
struct Slopes {
    W best, smallest, cutoff;
    W outside, inside;  // factors of the exponentials

    // loss_gradient: of the pixel's loss
    template <class Scores>
    __device__ Slopes(const Params& p, const Inside<W>& in, const Scores& scores, int winner, W outside_sum,
                      W loss_gradient) {
        best = scores.at(winner);
        smallest = -in.sum.largest;
        cutoff = in.cutoff;
        const Ranking<W> ranking(p, best, outside_sum, in.sum);
        const W slope =
            slope_of(ranking.both, ranking.gap, ranking.fade) * static_cast<W>(p.scale) * loss_gradient;
        outside = in.sum.total() * slope;
        inside = -outside_sum * slope;
    }
    Slopes() = default;

    __device__ W of_outside(W score, W rate) const { return power((score - best) * rate) * outside; }
    __device__ W of_inside(W score, W rate) const { return power((smallest - score) * rate) * inside; }
    // Where a prior or threshold chooses: the gradient of a tagged class, if it was chosen.
    __device__ W if_selected(const Params& p, int c, int winner, W score, W gradient) const {
        if (relevance_of(p, c, winner, score) >= cutoff) return gradient;
        return outside != outside ? outside : W{0};  // NaN for all classes of a pixel with NaN
    }
};

// Of the pixels' losses: one for each, or one of all.
template <class W>
struct LossGradient {
    const W* each;  // or null
    W all = 0;

    __device__ explicit LossGradient(const Params& p) : each(static_cast<const W*>(p.loss_gradient)) {
        if (p.gradient_per_pixel) return;
        all = p.mean ? *each / static_cast<W>(*p.count) : *each;
        each = nullptr;
    }
    __device__ W at(int64_t pixel) const { return each != nullptr ? each[pixel] : all; }
};

}  // namespace
}  // namespace wsss::ocr
