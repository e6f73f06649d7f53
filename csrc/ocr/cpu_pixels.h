// The loss of a vector of pixels and its gradient, over a tile whose classes lie kPitch numbers apart.
// For cpu.cpp alone.
#pragma once

#include <limits>

#include "cpu_memory.h"
#include "ocr/cpu_vector.h"
#include "ocr/math.h"

namespace wsss::ocr::WSSS_LEVEL {
namespace {

constexpr int64_t kTilePixels = 128;
// Not a power of two: a pixel's classes fall into different cache sets.
constexpr int64_t kPitch = kTilePixels + 16;

template <class W>
using Integer = typename Vectors<W>::Integer;
template <class W>
constexpr W kInfinity = std::numeric_limits<W>::infinity();

struct List {
    int64_t* numbers;
    int64_t count = 0;
    const int64_t* begin() const { return numbers; }
    const int64_t* end() const { return numbers + count; }
};

// What is the same for all pixels of an image.
template <class W>
struct Image {
    const Params& p;
    const bool selective;  // whether a tagged class may be outside the group I
    const Exponential<W> exponential;
    List inside, outside;  // tagged classes, and the others
    Integer<W>* codes;     // an untagged class's number, -1 for a tagged one

    static int64_t bytes(int64_t classes) {
        return 2 * bytes_for<int64_t>(classes) + bytes_for<Integer<W>>(classes);
    }
    Image(const Params& params, Arena& arena)
        : p(params),
          selective(p.log_prior != nullptr || p.log_threshold > -INFINITY),
          exponential(p.scale),
          inside{arena.take<int64_t>(p.classes)},
          outside{arena.take<int64_t>(p.classes)},
          codes(arena.take<Integer<W>>(p.classes)) {}

    void select(int64_t image) {
        if (image == selected_) return;
        selected_ = image;
        inside.count = outside.count = 0;
        for (int64_t c = 0; c < p.classes; ++c) {
            const bool tagged = p.tags[image * p.classes + c];
            List& list = tagged ? inside : outside;
            list.numbers[list.count++] = c;
            codes[c] = tagged ? -1 : static_cast<Integer<W>>(c);
        }
    }

  private:
    int64_t selected_ = -1;
};

template <class W>
struct Tile {
    W* scores;     // [classes][kPitch]; the backward leaves gradients there
    W* relevance;  // [tagged classes][lanes]: score + log prior of the vector at hand
    alignas(64) Integer<W> counted[kTilePixels];  // -1, or 0 for pixels that are ignored or do not exist
    alignas(64) Integer<W> winner[kTilePixels];
    alignas(64) W outside_sum[kTilePixels];
    alignas(64) W loss[kTilePixels];
    alignas(64) W loss_gradient[kTilePixels];

    static int64_t bytes(int64_t classes) {
        return bytes_for<W>(classes * kPitch) + bytes_for<W>(classes * kLanes<W>);
    }
    Tile(int64_t classes, Arena& arena)
        : scores(arena.take<W>(classes * kPitch)), relevance(arena.take<W>(classes * kLanes<W>)) {}
};

template <class W>
WSSS_HOST_DEVICE Vec<W> gather(const W* from, int64_t stride, const Integer<W>* index, int64_t step) {
    alignas(64) W found[kLanes<W>];
    for (int lane = 0; lane < kLanes<W>; ++lane) found[lane] = from[index[lane] * stride + lane * step];
    return load(found);
}

// The group I: which tagged classes belong to it, and the sum over them.
template <class W>
class Inside {
  public:
    Vec<W> smallest, sum{};

    WSSS_HOST_DEVICE Inside(const Image<W>& image, const Tile<W>& tile, const W* scores,
                            const Integer<W>* winner)
        : smallest(all_lanes(kInfinity<W>)), relevance_(tile.relevance), selective_(image.selective) {
        if (selective_) find_cutoff(image, scores, winner);
        for (int64_t i = 0; i < image.inside.count; ++i) {
            Vec<W> score = load(scores + image.inside.numbers[i] * kPitch);
            if (selective_) score = holds(i) ? score : smallest;
            smallest = score < smallest ? score : smallest;
        }
        for (int64_t i = 0; i < image.inside.count; ++i) {
            Vec<W> e = image.exponential(smallest - load(scores + image.inside.numbers[i] * kPitch));
            if (selective_) e = holds(i) ? e : Vec<W>{};
            sum += e;
        }
    }

    // Whether the i-th tagged class is in I.
    WSSS_HOST_DEVICE Mask<W> holds(int64_t i) const {
        if (!selective_) return ~Mask<W>{};
        return load(relevance_ + i * kLanes<W>) >= cutoff_;
    }

  private:
    WSSS_HOST_DEVICE void find_cutoff(const Image<W>& image, const W* scores, const Integer<W>* winner) {
        const auto* log_prior = static_cast<const W*>(image.p.log_prior);
        Vec<W> best = all_lanes(-kInfinity<W>);
        for (int64_t i = 0; i < image.inside.count; ++i) {
            Vec<W> relevance = load(scores + image.inside.numbers[i] * kPitch);
            if (log_prior != nullptr) {
                relevance += gather(log_prior + image.inside.numbers[i] * image.p.classes, 1, winner, 0);
            }
            store(relevance_ + i * kLanes<W>, relevance);
            best = relevance > best ? relevance : best;
        }
        cutoff_ = find_relevance_cutoff(best, static_cast<W>(image.p.log_threshold),
                                        all_lanes(std::numeric_limits<W>::lowest()), all_lanes(kInfinity<W>));
    }

    W* relevance_;
    bool selective_;
    Vec<W> cutoff_{};
};

template <class W>
struct Ranking {  // the arguments of loss_of and slope_of
    Vec<W> both, gap, fade;

    WSSS_HOST_DEVICE Ranking(const Params& p, const Vec<W>& best, const Vec<W>& outside_sum,
                             const Inside<W>& inside)
        : both(outside_sum * inside.sum),
          gap((best - inside.smallest + static_cast<W>(p.margin)) * static_cast<W>(p.scale)),
          fade(Exponential<W>(1)(gap > 0 ? -gap : gap)) {}

    WSSS_HOST_DEVICE Vec<W> loss() const {
        return loss_of(both, gap, fade, [](const Vec<W>& x) { return log_plus_one(x); });
    }
    WSSS_HOST_DEVICE Vec<W> slope() const { return slope_of(both, gap, fade); }
};

// From scores to winner, outside_sum and loss, for the lanes from `first` on. Without p.winner, winner alone,
// and any number for an out-of-candidate pixel.
template <class W>
void find_loss(const Image<W>& image, Tile<W>& tile, int64_t first) {
    using V = Vec<W>;
    using M = Mask<W>;
    const W* const scores = tile.scores + first;
    V best = load(scores);
    M winner = M{} + image.codes[0], broken = best != best;
    for (int64_t c = 1; c < image.p.classes; ++c) {
        const V score = load(scores + c * kPitch);
        const M larger = score > best;
        best = larger ? score : best;
        winner = larger ? M{} + image.codes[c] : winner;
        broken |= score != score;
    }
    const M candidate = ((winner >= 0) | broken) & load_mask<W>(tile.counted + first);
    winner = winner >= 0 ? winner : M{};
    store_mask<W>(tile.winner + first, winner);
    V loss{}, sum{};
    if (any<W>(candidate) && image.p.winner != nullptr) {
        const Inside<W> inside(image, tile, scores, tile.winner + first);
        for (const int64_t c : image.outside) sum += image.exponential(load(scores + c * kPitch) - best);
        const V nan = all_lanes(std::numeric_limits<W>::quiet_NaN());
        loss = broken ? nan : Ranking<W>(image.p, best, sum, inside).loss();
        sum = broken ? nan : sum;
    }
    store_mask<W>(tile.winner + first, candidate ? winner : ~M{});
    store(tile.loss + first, candidate ? loss : V{});
    store(tile.outside_sum + first, candidate ? sum : V{});
}

// From scores, winner, outside_sum and loss_gradient to the scores' gradient, in their place.
template <class W>
void find_gradient(const Image<W>& image, Tile<W>& tile, int64_t first) {
    using V = Vec<W>;
    using M = Mask<W>;
    W* const scores = tile.scores + first;
    const M candidate = load_mask<W>(tile.winner + first) >= 0;
    if (!any<W>(candidate)) {
        for (int64_t c = 0; c < image.p.classes; ++c) store(scores + c * kPitch, V{});
        return;
    }
    alignas(64) Integer<W> winner[kLanes<W>];
    store_mask<W>(winner, candidate ? load_mask<W>(tile.winner + first) : M{});
    const V best = gather(scores, kPitch, winner, 1);
    const V sum = load(tile.outside_sum + first);
    const Inside<W> inside(image, tile, scores, winner);
    const V slope = Ranking<W>(image.p, best, sum, inside).slope() * static_cast<W>(image.p.scale) *
                    load(tile.loss_gradient + first);
    for (const int64_t c : image.outside) {
        W* const row = scores + c * kPitch;
        const V gradient = image.exponential(load(row) - best) * (inside.sum * slope);
        store(row, candidate ? gradient : V{});
    }
    const V others = sum != sum ? sum : V{};  // NaN for all classes of a pixel with NaN
    for (int64_t i = 0; i < image.inside.count; ++i) {
        W* const row = scores + image.inside.numbers[i] * kPitch;
        const V gradient = image.exponential(inside.smallest - load(row)) * -(sum * slope);
        const V own = inside.holds(i) ? gradient : others;
        store(row, candidate ? own : V{});
    }
}

}  // namespace
}  // namespace wsss::ocr::WSSS_LEVEL
