// Where a pixel of a bilinearly resized map reads, and what reads a pixel.
#pragma once

#include "common.h"

namespace wsss {

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

    WSSS_HOST_DEVICE Axis(int64_t in, int64_t out, bool align)
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

    // The first output coordinate whose index is at least `index`; `outputs` where there is none. Steps to it
    // from where it is without rounding, so it is one or two away.
    WSSS_HOST_DEVICE int64_t first_output(int64_t index, int64_t outputs) const {
        const W exact =
            align_corners ? static_cast<W>(index) / scale : (static_cast<W>(index) + W(0.5)) / scale - W(0.5);
        int64_t out = !(exact > 0)                      ? 0
                      : exact < static_cast<W>(outputs) ? static_cast<int64_t>(exact)
                                                        : outputs;
        while (out > 0 && at(out - 1).index >= index) --out;
        while (out < outputs && at(out).index < index) ++out;
        return out;
    }
};

}  // namespace wsss
