// Deformable convolution on the CPU, for whatever instruction set this file is compiled for: a convolution
// whose samples are multiplied tile by tile as they are taken, so that no columns are ever stored.
//
// D3 (N2 C256 32x32 3x3, fp32, 256 outputs): 2.4 GFLOP forward, twice that backward (once where only offsets
// learn). Laid out in columns the samples would be 19 MB, written and read again through pages that the
// system has to map for nearly every call.
// Got, in times of the best library's products alone: forward 1.14, with the offset's gradient 1.23, with all
// gradients 1.07 (channels_last; the same library on columns: 1.2 to 1.6, 1.4 and 1.5).
//
// Mapping: a tile of output pixels and one tap at a time. Coordinates and weights are found once a tap; all
// channels of a sample are blended in vectors into a block of kBlock channels, which multiply.h multiplies:
// - Forward: tile [pixels][channels] x weight [channels][outputs]; threads share the tiles out.
// - Offset, mask: gradient [pixels][outputs] x weight [outputs][channels], then dot products with corners.
// - Input: the same block is added to the corners. Threads share out images and blocks of channels, so that
//   no two add to the same number.
// - Weight: gradient [outputs][pixels] x tile [pixels][channels]; threads share out taps and blocks.
//
// The order of a sum depends on the shapes (and, where fewer images than threads are cut into blocks of
// channels, on the thread count), never on chance: all of it is deterministic.
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu_threads.h"
#include "deform/tile.h"
#include "multiply.h"
#include "with_type.h"

namespace wsss::deform::WSSS_LEVEL {
namespace {

constexpr int64_t kBlock = 256;      // channels of a tile: a panel of that depth fits the first-level cache
constexpr int64_t kRowPadding = 16;  // numbers between rows of a tile, which would otherwise share cache sets
constexpr int64_t kTileRow = kBlock + kRowPadding;

int64_t clamp(int64_t value, int64_t low, int64_t high) {
    return value < low ? low : value > high ? high : value;
}

// Memory that is not initialised.
template <class T>
class Memory {
  public:
    explicit Memory(int64_t count)
        : data_(static_cast<T*>(std::aligned_alloc(64, ceil_div<int64_t>(count * sizeof(T) + 1, 64) * 64))) {
        if (data_ == nullptr) throw std::bad_alloc();
    }
    ~Memory() { std::free(data_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    T* data() const { return data_; }

  private:
    T* data_;
};

// What each thread has to itself.
template <class W>
class Scratch {
  public:
    Scratch(int threads, int64_t numbers, int64_t samples)
        : numbers_each_(ceil_div<int64_t>(numbers, 16) * 16),
          samples_each_(samples),
          numbers_(threads * numbers_each_),
          samples_(threads * samples_each_) {}
    W* numbers() const { return numbers_.data() + omp_get_thread_num() * numbers_each_; }
    Sample<W>* samples() const { return samples_.data() + omp_get_thread_num() * samples_each_; }

  private:
    int64_t numbers_each_, samples_each_;
    Memory<W> numbers_;
    Memory<Sample<W>> samples_;
};

// The weight in panels, a matrix per (group, tap): forward [channels][outputs], backward [outputs][channels].
template <class T, class W>
Panels<W> pack_weight(const Params& p, bool forward, int threads) {
    const Shape& s = p.shape;
    const int64_t taps = s.kernel_h * s.kernel_w;
    const int64_t inputs = s.channels / s.groups, outputs = p.outputs / s.groups;
    const int64_t depth = forward ? inputs : outputs, width = forward ? outputs : inputs;
    const int64_t panels = ceil_div(width, kPanel<W>);
    auto* const packed = static_cast<W*>(p.packed);
    const auto* const weight = static_cast<const T*>(p.weight);
    const Strides& strides = p.weight_strides;
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
    for (int64_t matrix = 0; matrix < s.groups * taps; ++matrix) {
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t group = matrix / taps, tap = matrix % taps;
            const T* const from = weight + group * outputs * strides.image + tap / s.kernel_w * strides.y +
                                  tap % s.kernel_w * strides.x;
            W* to = packed + (matrix * panels + panel) * depth * kPanel<W>;
            const int64_t first = panel * kPanel<W>, count = std::min(kPanel<W>, width - first);
            for (int64_t k = 0; k < depth; ++k, to += kPanel<W>) {
                for (int64_t n = 0; n < kPanel<W>; ++n) {
                    const int64_t output = forward ? first + n : k, input = forward ? k : first + n;
                    to[n] = n < count ? static_cast<W>(from[output * strides.image + input * strides.channel])
                                      : W{0};
                }
            }
        }
    }
    return {packed, depth * kPanel<W>, kPanel<W>};
}

// Pixels of a tile: enough to pay for streaming the weight, few enough for every thread to have some.
int64_t tile_size(int64_t pixels, int64_t row_numbers, int threads) {
    const int64_t fits = clamp((1 << 16) / std::max<int64_t>(1, row_numbers) / 16 * 16, 32, 128);
    return clamp(ceil_div<int64_t>(pixels, 4 * threads) / 16 * 16, 16, fits);
}

// output = the tile's sums [pixel][row], for `outputs` channels from `first_output` on.
template <class T, class W>
void write_output(const Params& p, const Tile& tile, int64_t first_output, int64_t outputs, const W* sums,
                  int64_t row) {
    const Shape& s = p.shape;
    const Strides& strides = p.output_strides;
    auto* const output = static_cast<T*>(p.output) + first_output * strides.channel;
    for (int64_t i = 0; i < tile.count;) {
        const int64_t pixel = tile.first + i;
        const int64_t x = pixel % s.out_width, y = pixel / s.out_width % s.out_height;
        const int64_t image = pixel / (s.out_width * s.out_height);
        const int64_t length = std::min(tile.count - i, s.out_width - x);  // pixels of one image row
        T* const to = output + image * strides.image + y * strides.y + x * strides.x;
        if (strides.channel == 1) {
            for (int64_t j = 0; j < length; ++j) {
                for (int64_t o = 0; o < outputs; ++o) to[j * strides.x + o] = T(sums[(i + j) * row + o]);
            }
        } else {
            for (int64_t o = 0; o < outputs; ++o) {
                for (int64_t j = 0; j < length; ++j) {
                    to[o * strides.channel + j * strides.x] = T(sums[(i + j) * row + o]);
                }
            }
        }
        i += length;
    }
}

template <class T>
void convolve_all(const Params& p, const Where& where) {
    using W = wide<T>;
    const Shape& s = p.shape;
    const int64_t taps = s.kernel_h * s.kernel_w, pixels = s.images * s.out_height * s.out_width;
    const int64_t outputs = p.outputs / s.groups, width = round_to_panel<W>(outputs);
    const int threads = count_threads(pixels * taps * s.channels, where);
    const int64_t tile_pixels = tile_size(pixels, width, threads);
    const int64_t sum_row = width + kRowPadding;
    const Panels<W> weight = pack_weight<T, W>(p, true, threads);
    const Scratch<W> scratch(threads, tile_pixels * (kTileRow + sum_row), s.offset_groups * tile_pixels);
    const auto* const bias = static_cast<const W*>(p.bias);
#pragma omp parallel for schedule(dynamic) num_threads(threads) collapse(2)
    for (int64_t group = 0; group < s.groups; ++group) {
        for (int64_t first = 0; first < pixels; first += tile_pixels) {
            const Tile tile{first, std::min(tile_pixels, pixels - first)};
            W* const block_samples = scratch.numbers();
            W* const sums = block_samples + tile_pixels * kTileRow;
            Sample<W>* const samples = scratch.samples();
            for (int64_t i = 0; i < tile.count; ++i) {
                for (int64_t o = 0; o < width; ++o) {
                    sums[i * sum_row + o] = bias != nullptr && o < outputs ? bias[group * outputs + o] : W{0};
                }
            }
            for (int64_t tap = 0; tap < taps; ++tap) {
                find_samples(p, tile, tap, samples);
                const int64_t channels = s.channels / s.groups;
                const W* const matrix = weight.data + (group * taps + tap) * (width / kPanel<W>)*weight.panel;
                for (int64_t channel = 0; channel < channels; channel += kBlock) {
                    const Block block{group, channel, std::min(kBlock, channels - channel)};
                    sample_block<T>(p, tile, samples, block, block_samples, kTileRow);
                    const Panels<W> panels{matrix + channel * weight.row, weight.panel, weight.row};
                    multiply_add<W>(tile.count, outputs, block.count, {block_samples, kTileRow, 1}, panels,
                                    sums, sum_row);
                }
            }
            write_output<T>(p, tile, group * outputs, outputs, sums, sum_row);
        }
    }
}

// How the channels of a backward pass are cut: into blocks within a group, of `width` channels, and the
// blocks into slices.
struct Slices {
    int64_t width, blocks, count;

    Slices(const Shape& s, int64_t panel, int64_t wanted)
        : width(clamp(ceil_div(ceil_div(s.channels, wanted), panel) * panel, panel, kBlock)),
          blocks(s.groups * ceil_div(s.channels / s.groups, width)),
          count(std::min(wanted, blocks)) {}
    int64_t first_block(int64_t slice) const { return blocks * slice / count; }
};

// to [pixel][kTileRow] = the gradient of a block's samples at a tap.
template <class W>
void find_block_gradient(const Params& p, const Tile& tile, int64_t tap, const Block& block,
                         const Panels<W>& weight, W* to) {
    const Shape& s = p.shape;
    const int64_t outputs = p.outputs / s.groups, panels = ceil_div(s.channels / s.groups, kPanel<W>);
    const int64_t matrix = block.group * s.kernel_h * s.kernel_w + tap;
    const W* const gradient =
        static_cast<const W*>(p.gradient) + tile.first * p.outputs + block.group * outputs;
    const W* const from = weight.data + (matrix * panels + block.first / kPanel<W>)*weight.panel;
    std::memset(to, 0, tile.count * kTileRow * sizeof(W));
    for (int64_t depth = 0; depth < outputs; depth += kBlock) {
        multiply_add<W>(tile.count, block.count, std::min(kBlock, outputs - depth),
                        {gradient + depth, p.outputs, 1},
                        {from + depth * weight.row, weight.panel, weight.row}, to, kTileRow);
    }
}

// The gradients of offsets and masks: the sums over slices of what each has found.
template <class W>
void add_slices(const Params& p, const Derivatives<W>* found, int64_t slices, int threads) {
    const Shape& s = p.shape;
    const int64_t taps = s.kernel_h * s.kernel_w, pixels = s.images * s.out_height * s.out_width;
    const int64_t samples = pixels * s.offset_groups * taps;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < samples; ++i) {
        const int64_t tap = i % taps, slot = i / taps, pixel = slot / s.offset_groups;
        Place at;
        at.image = pixel / (s.out_width * s.out_height);
        at.y = pixel / s.out_width % s.out_height;
        at.x = pixel % s.out_width;
        at.group = slot % s.offset_groups;
        at.tap_y = tap / s.kernel_w;
        at.tap_x = tap % s.kernel_w;
        Derivatives<W> sum = found[i];
        for (int64_t slice = 1; slice < slices; ++slice) {
            const Derivatives<W>& other = found[slice * samples + i];
            sum.y += other.y;
            sum.x += other.x;
            sum.mask += other.mask;
        }
        write_gradients(p, at, sum.y, sum.x, sum.mask);
    }
}

template <class T>
void differentiate_all(const Params& p, const Where& where) {
    using W = wide<T>;
    const Shape& s = p.shape;
    const int64_t taps = s.kernel_h * s.kernel_w, image_pixels = s.out_height * s.out_width;
    const int64_t pixels = s.images * image_pixels;
    const int threads = count_threads(pixels * taps * s.channels, where);
    const bool derives = p.offset_gradient != nullptr || p.mask_gradient != nullptr;
    const bool scatters = p.input_gradient != nullptr;
    // Threads that scatter need images, or else slices of channels, of their own; otherwise they take tiles.
    const int64_t wanted =
        !scatters || s.images % threads == 0 ? 1 : ceil_div<int64_t>(4 * threads, s.images);
    const Slices slices(s, kPanel<W>, wanted);
    const int64_t tile_pixels = tile_size(pixels, kTileRow, threads);
    const int64_t range = scatters ? image_pixels : tile_pixels;
    const int64_t sums_size = 4 * s.offset_groups * tile_pixels;
    const Panels<W> weight = pack_weight<T, W>(p, false, threads);
    const Scratch<W> scratch(threads, tile_pixels * kTileRow + sums_size, s.offset_groups * tile_pixels);
    const int64_t samples_all = pixels * s.offset_groups * taps;
    // [slice][pixel][offset group][tap]
    const Memory<Derivatives<W>> derivatives(derives ? slices.count * samples_all : 0);
#pragma omp parallel for schedule(dynamic) num_threads(threads) collapse(2)
    for (int64_t begin = 0; begin < pixels; begin += range) {
        for (int64_t slice = 0; slice < slices.count; ++slice) {
            const int64_t end = std::min(pixels, begin + range);
            W* const gradient = scratch.numbers();
            W* const sums = gradient + tile_pixels * kTileRow;
            Sample<W>* const samples = scratch.samples();
            Derivatives<W>* const found = derivatives.data() + slice * samples_all;
            // Tiles of an image begin anew at its first pixel.
            for (Tile tile{begin, 0}; tile.first < end; tile.first += tile_pixels) {
                tile.count = std::min(tile_pixels, end - tile.first);
                for (int64_t tap = 0; tap < taps; ++tap) {
                    find_samples(p, tile, tap, samples);
                    std::memset(sums, 0, sums_size * sizeof(W));
                    for (int64_t i = slices.first_block(slice); i < slices.first_block(slice + 1); ++i) {
                        const Block block = find_block(s, slices.width, i);
                        find_block_gradient(p, tile, tap, block, weight, gradient);
                        if (derives) multiply_corners<T>(p, tile, samples, block, gradient, kTileRow, sums);
                        if (scatters) scatter_block(p, tile, samples, block, gradient, kTileRow);
                    }
                    for (int64_t i = 0; derives && i < tile.count * s.offset_groups; ++i) {
                        const int64_t at = (i % s.offset_groups) * tile.count + i / s.offset_groups;
                        found[(tile.first * s.offset_groups + i) * taps + tap] =
                            Derivatives<W>(samples[at], sums + 4 * at);
                    }
                }
            }
        }
    }
    if (derives) add_slices(p, derivatives.data(), slices.count, threads);
}

template <class T>
void differentiate_weight_all(const Params& p, const Where& where) {
    using W = wide<T>;
    const Shape& s = p.shape;
    const int64_t taps = s.kernel_h * s.kernel_w, pixels = s.images * s.out_height * s.out_width;
    const int64_t outputs = p.outputs / s.groups, parts = ceil_div(outputs, kBlock);
    const int threads = count_threads(pixels * taps * s.channels, where);
    const int64_t tile_pixels = std::min<int64_t>(pixels, 256);
    // Each thread has some of (block of channels, outputs, tap); wide blocks find the fewest coordinates.
    const int64_t wanted = ceil_div<int64_t>(4 * threads, taps * parts);
    const Slices slices(s, kPanel<W>, std::max<int64_t>(1, wanted));
    const Scratch<W> scratch(threads, (tile_pixels + kBlock) * kTileRow, s.offset_groups * tile_pixels);
    const Strides& strides = p.weight_gradient_strides;
#pragma omp parallel for schedule(dynamic) num_threads(threads) collapse(3)
    for (int64_t index = 0; index < slices.blocks; ++index) {
        for (int64_t part = 0; part < parts; ++part) {
            for (int64_t tap = 0; tap < taps; ++tap) {
                const Block block = find_block(s, slices.width, index);
                const int64_t first_output = block.group * outputs + part * kBlock;
                const int64_t count = std::min(kBlock, outputs - part * kBlock);
                W* const block_samples = scratch.numbers();
                W* const sums = block_samples + tile_pixels * kTileRow;
                std::memset(sums, 0, count * kTileRow * sizeof(W));
                for (Tile tile{0, 0}; tile.first < pixels; tile.first += tile_pixels) {
                    tile.count = std::min(tile_pixels, pixels - tile.first);
                    find_samples(p, tile, tap, scratch.samples());
                    sample_block<T>(p, tile, scratch.samples(), block, block_samples, kTileRow);
                    const W* const gradient =
                        static_cast<const W*>(p.gradient) + tile.first * p.outputs + first_output;
                    multiply_add<W>(count, block.count, tile.count, {gradient, 1, p.outputs},
                                    {block_samples, kPanel<W>, kTileRow}, sums, kTileRow);
                }
                W* const to = static_cast<W*>(p.weight_gradient) + first_output * strides.image +
                              block.first * strides.channel + tap / s.kernel_w * strides.y +
                              tap % s.kernel_w * strides.x;
                for (int64_t o = 0; o < count; ++o) {
                    for (int64_t c = 0; c < block.count; ++c) {
                        to[o * strides.image + c * strides.channel] = sums[o * kTileRow + c];
                    }
                }
            }
        }
    }
}

}  // namespace

void convolve(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) { convolve_all<typename decltype(type)::type>(p, where); });
}
void differentiate(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) { differentiate_all<typename decltype(type)::type>(p, where); });
}
void differentiate_weight(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) { differentiate_weight_all<typename decltype(type)::type>(p, where); });
}

}  // namespace wsss::deform::WSSS_LEVEL
