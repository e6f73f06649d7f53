// The order in which blocks, warps and lanes take their turns. CUDA promises none, so each launch draws
// its own from a seed, and a kernel that lacks a barrier or an atomic gives itself away in some of them.
#pragma once

#include <array>
#include <cstdint>

namespace wsss::emulation {

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next();
    uint64_t below(uint64_t end) { return next() % end; }

  private:
    uint64_t state_;
};

// 0 .. count - 1, each once, in an order that takes no memory: steps of a length that has no divisor in
// common with count, the ascending and the descending order among them.
class Strides {
  public:
    Strides(uint64_t count, Random& random);
    uint64_t operator[](uint64_t i) const;

  private:
    uint64_t count_, first_, step_;
};

// Which warp of a block runs next. Each block draws one of three manners: the first warp of a random order
// that can run, so that one runs as far ahead of the others as barriers let it; each in its turn; any.
class WarpTurns {
  public:
    WarpTurns(unsigned warps, Random& random);
    // One of the warps in `ready`, a bit for each; not empty.
    unsigned next(uint32_t ready);

  private:
    enum class Manner { far_ahead, in_turn, any };

    Random& random_;
    Manner manner_;
    unsigned warps_;
    unsigned turn_ = 0;
    std::array<uint8_t, 32> order_{};
};

}  // namespace wsss::emulation
