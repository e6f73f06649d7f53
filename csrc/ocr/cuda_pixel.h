// A thread's pixel on CUDA: where its scores come from, how they are walked, and the sums over its groups.
#pragma once

#include "ocr/cuda_block.h"

namespace wsss::ocr {
namespace {

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float log_plus_one(float x) { return log1pf(x); }
__device__ inline double log_plus_one(double x) { return log1p(x); }

template <class W>
__device__ W infinity() {
    return static_cast<W>(INFINITY);
}
template <class W>
__device__ W lowest() {
    return sizeof(W) == 4 ? static_cast<W>(-3.402823466e38f) : static_cast<W>(-1.7976931348623157e308);
}

// Where scores come from: the tensor, shared memory, or four numbers of the tensor each.
template <class T>
struct FromMemory {
    const T* first;
    int64_t channel;
    __device__ wide<T> get(int c) const { return static_cast<wide<T>>(first[c * channel]); }
};

template <class T>
struct Resized {
    const T* corner[4];
    int64_t channel;
    wide<T> below, right;

    __device__ Resized(const T* image, const Strides& strides, const Axes<wide<T>>& axes, const Place& place)
        : channel(strides.channel) {
        const Tap<wide<T>> row = axes.y.at(place.y), column = axes.x.at(place.x);
        corner[0] = image + row.index * strides.y + column.index * strides.x;
        corner[1] = corner[0] + (column.index + 1 < axes.x.size ? strides.x : 0);
        const int64_t down = row.index + 1 < axes.y.size ? strides.y : 0;
        corner[2] = corner[0] + down;
        corner[3] = corner[1] + down;
        below = row.fraction;
        right = column.fraction;
    }
    __device__ wide<T> get(int c) const {
        const auto read = [&](int i) { return static_cast<wide<T>>(corner[i][c * channel]); };
        const wide<T> upper = read(0) * (1 - right) + read(1) * right;
        const wide<T> lower = read(2) * (1 - right) + read(3) * right;
        return upper * (1 - below) + lower * below;
    }
};

// The classes of a block's image, for as many as fit a warp's ballot, which every warp takes itself.
class FewClasses {
  public:
    static constexpr int kMost = 24;
    static size_t shared_bytes(int64_t /*classes*/) { return 0; }

    __device__ FewClasses(const bool* tags, int classes, void* /*shared*/) : classes_(classes) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        inside_ = __ballot_sync(0xffffffffu, lane < classes && tags[lane]);
    }
    __device__ bool any_inside() const { return inside_ != 0; }

    // A pixel's scores, in registers.
    template <class W, class Source>
    class Scores {
      public:
        __device__ Scores(const FewClasses& classes, const Source& source) : of_(classes) {
#pragma unroll
            for (int c = 0; c < kMost; ++c) held_[c] = c < of_.classes_ ? source.get(c) : W{0};
        }
        __device__ W at(int wanted) const {
            W found = held_[0];
#pragma unroll
            for (int c = 1; c < kMost; ++c) found = c == wanted ? held_[c] : found;
            return found;
        }
        template <class Body>
        __device__ void each_outside(const Body& body) const {
            each<false>(body);
        }
        template <class Body>
        __device__ void each_inside(const Body& body) const {
            each<true>(body);
        }

      private:
        template <bool kInside, class Body>
        __device__ void each(const Body& body) const {
#pragma unroll
            for (int c = 0; c < kMost; ++c) {
                if (c < of_.classes_ && (of_.inside_ >> c & 1) == kInside) body(c, held_[c]);
            }
        }
        const FewClasses& of_;
        W held_[kMost];
    };

  private:
    int classes_;
    unsigned inside_;
};

// The classes of a block's image as two lists in shared memory, ascending.
class ManyClasses {
  public:
    static size_t shared_bytes(int64_t classes) { return static_cast<size_t>(classes) * 2 * sizeof(int16_t); }

    __device__ ManyClasses(const bool* tags, int classes, void* shared)
        : outside_(static_cast<int16_t*>(shared)), inside_(outside_ + classes) {
        __shared__ int counts[2];
        if (threadIdx.x < 32) {
            const int lane = static_cast<int>(threadIdx.x);
            int outside = 0, inside = 0;
            for (int first = 0; first < classes; first += 32) {
                const int c = first + lane;
                const bool exists = c < classes, tagged = exists && tags[c];
                const unsigned all = __ballot_sync(0xffffffffu, exists);
                const unsigned in = __ballot_sync(0xffffffffu, tagged);
                const unsigned before = (1u << lane) - 1;
                if (tagged) inside_[inside + __popc(in & before)] = static_cast<int16_t>(c);
                const unsigned out = all & ~in;
                if (exists && !tagged) outside_[outside + __popc(out & before)] = static_cast<int16_t>(c);
                inside += __popc(in);
                outside += __popc(out);
            }
            if (lane == 0) {
                counts[0] = outside;
                counts[1] = inside;
            }
        }
        __syncthreads();
        outside_count_ = counts[0];
        inside_count_ = counts[1];
    }
    __device__ bool any_inside() const { return inside_count_ > 0; }

    // A pixel's scores, fetched each time they are walked, kBatch at once.
    template <class W, class Source>
    class Scores {
      public:
        __device__ Scores(const ManyClasses& classes, const Source& source) : of_(classes), source_(source) {}
        __device__ W at(int c) const { return source_.get(c); }
        template <class Body>
        __device__ void each_outside(const Body& body) const {
            each(of_.outside_, of_.outside_count_, body);
        }
        template <class Body>
        __device__ void each_inside(const Body& body) const {
            each(of_.inside_, of_.inside_count_, body);
        }

      private:
        static constexpr int kBatch = 8;
        template <class Body>
        __device__ void each(const int16_t* list, int count, const Body& body) const {
            for (int first = 0; first < count; first += kBatch) {
                W scores[kBatch];
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    scores[i] = first + i < count ? source_.get(list[first + i]) : W{0};
                }
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    if (first + i < count) body(list[first + i], scores[i]);
                }
            }
        }
        const ManyClasses& of_;
        Source source_;
    };

  private:
    int16_t* outside_;
    int16_t* inside_;
    int outside_count_, inside_count_;
};

// sum of exp(scale * (x - largest)) over numbers as they come, each exponent at most 0.
template <class W>
struct RunningSum {
    W largest = lowest<W>(), sum = 0;

    __device__ bool add(W x, W scale) {  // whether x is the largest so far
        const bool larger = x > largest;
        const W fade = exponential(scale * (larger ? largest - x : x - largest));
        sum = larger ? sum * fade + 1 : sum + fade;
        largest = larger ? x : largest;
        return larger;
    }
};

__device__ inline bool is_selective(const Params& p) {
    return p.log_prior != nullptr || p.log_threshold > -INFINITY;
}

template <class W>
__device__ W relevance_of(const Params& p, int c, int winner, W score) {
    if (p.log_prior == nullptr) return score;
    return score + static_cast<const W*>(p.log_prior)[c * p.classes + winner];
}

template <class W>
struct Inside {  // the group I: the sum over -s_j, and what decides who belongs to it
    RunningSum<W> sum;
    W cutoff;
};

template <class W, class Scores>
__device__ Inside<W> find_inside(const Params& p, const Scores& scores, int winner) {
    Inside<W> in;
    in.cutoff = -infinity<W>();
    if (is_selective(p)) {
        W best = -infinity<W>();
        scores.each_inside([&](int c, W score) {
            const W relevance = relevance_of(p, c, winner, score);
            best = relevance > best ? relevance : best;
        });
        in.cutoff = find_relevance_cutoff(best, static_cast<W>(p.log_threshold), lowest<W>(), infinity<W>());
    }
    scores.each_inside([&](int c, W score) {
        if (relevance_of(p, c, winner, score) >= in.cutoff) in.sum.add(-score, static_cast<W>(p.scale));
    });
    return in;
}

template <class W>
struct Ranking {  // the arguments of loss_of and slope_of
    W both, gap, fade;

    __device__ Ranking(const Params& p, W best, W outside_sum, const RunningSum<W>& inside)
        : both(outside_sum * inside.sum),
          gap((best + inside.largest + static_cast<W>(p.margin)) * static_cast<W>(p.scale)),
          fade(exponential(gap > 0 ? -gap : gap)) {}
};

template <class W>
struct PixelLoss {
    int winner = -1;  // -1: no out-of-candidate pixel
    W loss = 0, outside_sum = 0;
};

// Reads each score once, those of tagged classes again where a prior or threshold chooses among them.
template <class W, class Scores>
__device__ PixelLoss<W> find_loss(const Params& p, const Scores& scores) {
    const W scale = static_cast<W>(p.scale);
    RunningSum<W> outside;
    int winner = -1, candidate_class = 0;
    bool broken = false;
    scores.each_outside([&](int c, W score) {
        broken |= score != score;
        if (outside.add(score, scale)) winner = c;
    });
    W largest = lowest<W>();
    Inside<W> in;
    const bool selective = is_selective(p);
    scores.each_inside([&](int c, W score) {
        broken |= score != score;
        candidate_class = score > largest ? c : candidate_class;
        largest = score > largest ? score : largest;
        if (!selective) in.sum.add(-score, scale);
    });
    const bool first = outside.largest > largest || (outside.largest == largest && winner < candidate_class);
    PixelLoss<W> result;
    if (!broken && (winner < 0 || !first)) return result;
    result.winner = winner < 0 ? 0 : winner;
    if (p.winner == nullptr) return result;
    if (selective) in = find_inside<W>(p, scores, result.winner);
    const Ranking<W> ranking(p, outside.largest, outside.sum, in.sum);
    const W nan = static_cast<W>(NAN);
    result.loss =
        broken ? nan : loss_of(ranking.both, ranking.gap, ranking.fade, [](W x) { return log_plus_one(x); });
    result.outside_sum = broken ? nan : outside.sum;
    return result;
}

// What the gradient of an out-of-candidate pixel's scores is made of.
template <class W>
struct Slopes {
    W best, smallest, cutoff;
    W outside, inside;  // factors of the exponentials

    // loss_gradient: of the pixel's loss
    template <class Scores>
    __device__ Slopes(const Params& p, const Scores& scores, int winner, W outside_sum, W loss_gradient) {
        const Inside<W> in = find_inside<W>(p, scores, winner);
        best = scores.at(winner);
        smallest = -in.sum.largest;
        cutoff = in.cutoff;
        const Ranking<W> ranking(p, best, outside_sum, in.sum);
        const W slope =
            slope_of(ranking.both, ranking.gap, ranking.fade) * static_cast<W>(p.scale) * loss_gradient;
        outside = in.sum.sum * slope;
        inside = -outside_sum * slope;
    }
    Slopes() = default;

    __device__ W of_outside(const Params& p, W score) const {
        return exponential(static_cast<W>(p.scale) * (score - best)) * outside;
    }
    __device__ W of_inside(const Params& p, int c, int winner, W score) const {
        if (relevance_of(p, c, winner, score) >= cutoff) {
            return exponential(static_cast<W>(p.scale) * (smallest - score)) * inside;
        }
        return outside != outside ? outside : W{0};  // NaN for all classes of a pixel with NaN
    }
};

template <class W>
__device__ W find_loss_gradient(const Params& p, int64_t at) {
    const auto* gradient = static_cast<const W*>(p.loss_gradient);
    if (p.gradient_per_pixel) return gradient[at];
    return p.mean ? *gradient / static_cast<W>(*p.count) : *gradient;
}

}  // namespace
}  // namespace wsss::ocr
