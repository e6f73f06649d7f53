// The class of each pixel. For cpu.cpp alone.
#pragma once

#include "prototype/cpu_products.h"

namespace wsss::prototype::WSSS_LEVEL {
namespace {

template <class T>
void find_classes(const SeedParams& p, int threads) {
    using W = wide<T>;
    const int64_t pixels = p.height * p.width, blocks = ceil_div(pixels, kBlock);
#pragma omp parallel for num_threads(threads)
    for (int64_t unit = 0; unit < p.images * blocks; ++unit) {
        const Block block(unit, pixels);
        const T* const cam = static_cast<const T*>(p.cam) + block.image * p.strides.image;
        int64_t offsets[kBlock], places[kBlock];
        for (int64_t i = 0; i < block.count; ++i) {
            const int64_t pixel = block.first + i;
            const int64_t y = nearest(pixel / p.width, p.cam_height, p.height);
            const int64_t x = nearest(pixel % p.width, p.cam_width, p.width);
            offsets[i] = y * p.strides.y + x * p.strides.x;
            places[i] = (block.image * p.cam_height + y) * p.cam_width + x;
        }
        W best[kBlock];
        int16_t winners[kBlock] = {};
        for (int64_t i = 0; i < block.count; ++i) {
            best[i] = static_cast<W>(cam[offsets[i]]) * static_cast<W>(p.background_scale);
        }
        for (int64_t c = 1; c < p.classes; ++c) {
            const T* const map = cam + c * p.strides.channel;
            for (int64_t i = 0; i < block.count; ++i) {
                const W number = static_cast<W>(map[offsets[i]]);
                const bool larger = is_larger(number, best[i]);
                best[i] = larger ? number : best[i];
                winners[i] = larger ? static_cast<int16_t>(c) : winners[i];
            }
        }
        for (int64_t i = 0; i < block.count; ++i) {
            const bool known =
                p.tags[block.image * p.classes + winners[i]] && (p.valid == nullptr || p.valid[places[i]]);
            p.seeds[block.image * pixels + block.first + i] = known ? winners[i] : int16_t{-1};
        }
    }
}

}  // namespace
}  // namespace wsss::prototype::WSSS_LEVEL
