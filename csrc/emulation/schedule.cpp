#include "schedule.h"

#include <numeric>
#include <utility>

namespace wsss::emulation {

// Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
uint64_t Random::next() {
    uint64_t bits = state_ += 0x9e3779b97f4a7c15u;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
    return bits ^ bits >> 31;
}

Strides::Strides(uint64_t count, Random& random) : count_(count), first_(random.below(count)) {
    do step_ = 1 + random.below(count);
    while (std::gcd(step_, count) != 1);
}

uint64_t Strides::operator[](uint64_t i) const {
    return static_cast<uint64_t>((first_ + static_cast<unsigned __int128>(i) * step_) % count_);
}

WarpTurns::WarpTurns(unsigned warps, Random& random)
    : random_(random), manner_(static_cast<Manner>(random.below(3))), warps_(warps) {
    for (unsigned i = 0; i < warps; ++i) {
        order_[i] = static_cast<uint8_t>(i);
        std::swap(order_[i], order_[random.below(i + 1)]);
    }
}

unsigned WarpTurns::next(uint32_t ready) {
    if (manner_ == Manner::far_ahead) turn_ = 0;
    if (manner_ == Manner::any) turn_ = static_cast<unsigned>(random_.below(warps_));
    for (;; ++turn_) {
        const unsigned warp = order_[turn_ % warps_];
        if (ready >> warp & 1) {
            ++turn_;
            return warp;
        }
    }
}

}  // namespace wsss::emulation
