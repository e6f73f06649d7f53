// The deformable convolution's samples on CUDA: 16-byte accesses along channels, which lie side by side.
//
// Shapes: D1 is N16 C2048 32x32 3x3, D2 N16 C256 64x64 3x3: 147456 and 589824 samples. Traffic of `sample`:
// each sample writes its channels once (1.2 GB for D1 in fp32) and reads four corners, of which L1 and L2
// serve all but the first reader: neighbouring taps and pixels share them. The floor is a fill of the
// columns. Mapping: a block takes kSamples samples, in the order pixel, offset group, tap. Their coordinates
// are found once, by one thread each, and shared; then all threads walk the block's vectors, neighbours along
// channels, so that each warp reads and writes whole lines. `differentiate` gives a sample to as many lanes
// (up to a warp) as it has vectors: lanes keep four sums, one per corner, turn them into the derivatives, and
// add those up by shuffles; nothing but the result is written. The same pass adds the input's gradient by
// vector atomics. `gather` does without atomics, for determinism: a group of lanes takes a target pixel and
// adds its corners in the order of a stable sort.
#include <algorithm>

#include "deform/math.h"
#include "launch.h"
#include "with_type.h"

namespace wsss::deform {
namespace {

constexpr int kThreads = 256;
constexpr int kSamples = 64;

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
    T at[kCount];
};

struct Divisors {
    Divisor taps, kernel_w, offset_groups, out_width, out_height, vectors, weight_group;
};

// Samples of the chunk are numbered in the order pixel, offset group, tap.
__device__ Place locate(const Params& p, const Divisors& by, uint32_t sample) {
    const uint32_t slot = by.taps.quotient(sample);
    const uint32_t tap = by.taps.remainder(sample, slot);
    const uint32_t chunk_pixel = by.offset_groups.quotient(slot);
    const uint32_t pixel = static_cast<uint32_t>(p.first) + chunk_pixel;
    const uint32_t row = by.out_width.quotient(pixel);
    const uint32_t image = by.out_height.quotient(row);
    const uint32_t tap_y = by.kernel_w.quotient(tap);
    Place at;
    at.image = image;
    at.y = by.out_height.remainder(row, image);
    at.x = by.out_width.remainder(pixel, row);
    at.group = by.offset_groups.remainder(slot, chunk_pixel);
    at.tap_y = tap_y;
    at.tap_x = by.kernel_w.remainder(tap, tap_y);
    return at;
}

// Where the channels of a vector lie.
struct Span {
    int64_t channel;  // in the input
    int64_t column;   // in `columns`
};

__device__ Span find_span(const Params& p, const Divisors& by, uint32_t sample, uint32_t first_channel) {
    const Shape& s = p.shape;
    const uint32_t slot = by.taps.quotient(sample);
    const uint32_t tap = by.taps.remainder(sample, slot);
    const uint32_t pixel = by.offset_groups.quotient(slot);
    const uint32_t group = by.offset_groups.remainder(slot, pixel);
    const uint32_t channel = group * static_cast<uint32_t>(s.channels / s.offset_groups) + first_channel;
    const int64_t row = s.kernel_h * s.kernel_w * s.channels;
    return {channel, pixel * row + column_of(s, tap, channel, by.weight_group.quotient(channel))};
}

// Where a sample's corners lie in a tensor, and the weights that the mask has been multiplied into.
template <class W>
struct Reading {
    int64_t first;  // of corner 0
    W weight[4];
    unsigned inside;
};

template <class W>
__device__ Reading<W> find_reading(const Sample<W>& sample, const Strides& strides) {
    Reading<W> reading;
    reading.first = sample.image * strides.image + sample.y * strides.y + sample.x * strides.x;
    for (int corner = 0; corner < 4; ++corner) reading.weight[corner] = sample.mask * sample.weight(corner);
    reading.inside = sample.inside;
    return reading;
}

__device__ int64_t corner_offset(int corner, const Strides& strides) {
    return (corner & 2 ? strides.y : 0) + (corner & 1 ? strides.x : 0);
}

template <class T, int kVector>
__device__ Vector<T, kVector> load(const T* from) {
    return *reinterpret_cast<const Vector<T, kVector>*>(from);
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) sample_columns(Params p, Divisors by, uint32_t samples) {
    using W = wide<T>;
    using Channels = Vector<T, kVector>;
    __shared__ Reading<W> readings[kSamples];
    const uint32_t first = blockIdx.x * kSamples;
    const uint32_t here = min(static_cast<uint32_t>(kSamples), samples - first);
    if (threadIdx.x < here) {
        readings[threadIdx.x] =
            find_reading(find_sample<W>(p, locate(p, by, first + threadIdx.x)), p.input_strides);
    }
    __syncthreads();

    const T* __restrict__ const input = static_cast<const T*>(p.input);
    T* __restrict__ const columns = static_cast<T*>(p.columns);
    const auto vectors = static_cast<uint32_t>(p.shape.channels / p.shape.offset_groups / kVector);
#pragma unroll 2
    for (uint32_t i = threadIdx.x; i < here * vectors; i += kThreads) {
        const uint32_t own = by.vectors.quotient(i);
        const Reading<W>& reading = readings[own];
        const Span span = find_span(p, by, first + own, kVector * by.vectors.remainder(i, own));
        const T* const from = input + reading.first + span.channel;
        Channels corners[4];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
            const bool inside = (reading.inside >> corner & 1) != 0;
            corners[corner] =
                inside ? load<T, kVector>(from + corner_offset(corner, p.input_strides)) : Channels{};
        }
        Channels blended;
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
            W sum = 0;
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
                sum += reading.weight[corner] * static_cast<W>(corners[corner].at[c]);
            }
            blended.at[c] = static_cast<T>(sum);
        }
        *reinterpret_cast<Channels*>(columns + span.column) = blended;
    }
}

// *to += values, in any order.
template <int kCount>
__device__ void add(double* to, const double* values) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) atomicAdd(to + i, values[i]);
}

__device__ void add_four(float* to, const float* values) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
        "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
        : "memory");
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) atomicAdd(to + i, values[i]);
#endif
}

template <int kCount>
__device__ void add(float* to, const float* values) {
    if constexpr (kCount % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kCount; i += 4) add_four(to + i, values + i);
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) atomicAdd(to + i, values[i]);
    }
}

// A group of `lanes` (a power of two, at most a warp) takes a sample.
template <class T, int kVector, bool kSums, bool kScatter>
__global__ void __launch_bounds__(kThreads)
    differentiate_samples(Params p, Divisors by, uint32_t samples, int lanes) {
    using W = wide<T>;
    const uint32_t own = blockIdx.x * (kThreads / lanes) + threadIdx.x / lanes;
    const bool active = own < samples;
    const Sample<W> sample = active ? find_sample<W>(p, locate(p, by, own)) : Sample<W>{};
    const Reading<W> from = find_reading(sample, p.input_strides);
    const Strides dense{p.shape.height * p.shape.width * p.shape.channels, 1,
                        p.shape.width * p.shape.channels, p.shape.channels};
    const Reading<W> to = find_reading(sample, dense);
    const T* __restrict__ const input = static_cast<const T*>(p.input);
    const T* __restrict__ const columns = static_cast<const T*>(p.columns);

    W sums[4] = {};  // over channels, of the gradient times the corner
    const auto vectors = static_cast<int>(p.shape.channels / p.shape.offset_groups / kVector);
    for (int vector = threadIdx.x % lanes; sample.inside != 0 && vector < vectors; vector += lanes) {
        const Span span = find_span(p, by, own, static_cast<uint32_t>(kVector * vector));
        const Vector<T, kVector> gradient = load<T, kVector>(columns + span.column);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
            if ((sample.inside >> corner & 1) == 0) continue;
            if constexpr (kSums) {
                const auto read = load<T, kVector>(input + from.first + span.channel +
                                                   corner_offset(corner, p.input_strides));
#pragma unroll
                for (int c = 0; c < kVector; ++c) {
                    sums[corner] += static_cast<W>(gradient.at[c]) * static_cast<W>(read.at[c]);
                }
            }
            if constexpr (kScatter) {
                W shares[kVector];
#pragma unroll
                for (int c = 0; c < kVector; ++c) {
                    shares[c] = to.weight[corner] * static_cast<W>(gradient.at[c]);
                }
                add<kVector>(static_cast<W*>(p.input_gradient) + to.first + span.channel +
                                 corner_offset(corner, dense),
                             shares);
            }
        }
    }
    if constexpr (kSums) {
        W by_y = 0, by_x = 0, by_mask = 0;
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
            by_y += sample.weight_y(corner) * sums[corner];
            by_x += sample.weight_x(corner) * sums[corner];
            by_mask += sample.weight(corner) * sums[corner];
        }
        for (int distance = lanes / 2; distance > 0; distance /= 2) {
            by_y += __shfl_xor_sync(0xffffffffu, by_y, distance);
            by_x += __shfl_xor_sync(0xffffffffu, by_x, distance);
            by_mask += __shfl_xor_sync(0xffffffffu, by_mask, distance);
        }
        if (active && threadIdx.x % lanes == 0) {
            write_gradients(p, locate(p, by, own), sample.mask * by_y, sample.mask * by_x, by_mask);
        }
    }
}

template <class W>
__global__ void __launch_bounds__(kThreads) find_sample_targets(Params p, Divisors by, uint32_t samples) {
    const uint32_t own = blockIdx.x * kThreads + threadIdx.x;
    if (own >= samples) return;
    const Shape& s = p.shape;
    const Place at = locate(p, by, own);
    const Sample<W> sample = find_sample<W>(p, at);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
        const int64_t y = sample.y + (corner >> 1), x = sample.x + (corner & 1);
        const bool inside = (sample.inside >> corner & 1) != 0;
        const int64_t pixel =
            inside ? (at.image * s.height + y) * s.width + x : s.images * s.height * s.width;
        p.targets[4 * static_cast<int64_t>(own) + corner] = pixel * s.offset_groups + (inside ? at.group : 0);
        static_cast<W*>(p.weights)[4 * static_cast<int64_t>(own) + corner] =
            sample.mask * sample.weight(corner);
    }
}

// A group of `lanes` takes a target.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads)
    gather_corners(Params p, Divisors by, uint32_t targets, int lanes) {
    using W = wide<T>;
    const uint32_t target = blockIdx.x * (kThreads / lanes) + threadIdx.x / lanes;
    if (target >= targets) return;
    const T* __restrict__ const columns = static_cast<const T*>(p.columns);
    const W* __restrict__ const weights = static_cast<const W*>(p.weights);
    const auto group_channels = static_cast<int>(p.shape.channels / p.shape.offset_groups);
    for (int channel = kVector * (threadIdx.x % lanes); channel < group_channels;
         channel += kVector * lanes) {
        using Sums = Vector<W, kVector>;
        // Target (pixel, group) begins at pixel * channels + group * group_channels.
        auto* const to = reinterpret_cast<Sums*>(static_cast<W*>(p.input_gradient) +
                                                 static_cast<int64_t>(target) * group_channels + channel);
        Sums sums = *to;
        for (int64_t i = p.starts[target]; i < p.starts[target + 1]; ++i) {
            const int64_t corner = p.order[i];
            const W weight = weights[corner];
            const Span span =
                find_span(p, by, static_cast<uint32_t>(corner / 4), static_cast<uint32_t>(channel));
            const auto gradient = load<T, kVector>(columns + span.column);
#pragma unroll
            for (int c = 0; c < kVector; ++c) sums.at[c] += weight * static_cast<W>(gradient.at[c]);
        }
        *to = sums;
    }
}

Divisors find_divisors(const Params& p, int vector) {
    const Shape& s = p.shape;
    const auto divisor = [](int64_t number) { return Divisor(static_cast<uint32_t>(number)); };
    return {divisor(s.kernel_h * s.kernel_w),
            divisor(s.kernel_w),
            divisor(s.offset_groups),
            divisor(s.out_width),
            divisor(s.out_height),
            divisor(s.channels / s.offset_groups / vector),
            divisor(s.channels / s.groups)};
}

uint32_t count_samples(const Params& p) {
    return static_cast<uint32_t>(p.count * p.shape.offset_groups * p.shape.kernel_h * p.shape.kernel_w);
}

// Calls body(element type, channels a vector) with vectors of 16 bytes where every address allows them, or of
// one element.
template <class T, class Body>
void with_vectors(const Params& p, const Body& body) {
    constexpr int kWide = 16 / static_cast<int>(sizeof(T));
    const Shape& s = p.shape;
    const int64_t elements = s.channels / s.offset_groups | s.channels / s.groups | p.input_strides.image |
                             p.input_strides.y | p.input_strides.x;
    const auto addresses = reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.columns) |
                           reinterpret_cast<uintptr_t>(p.input_gradient);
    if (elements % kWide == 0 && addresses % 16 == 0) {
        body(T(0.0f), std::integral_constant<int, kWide>());
    } else {
        body(T(0.0f), std::integral_constant<int, 1>());
    }
}

template <class Body>
void with_types(const Params& p, const Body& body) {
    with_type(p.dtype, [&](auto type) { with_vectors<typename decltype(type)::type>(p, body); });
}

// As many lanes as a sample has vectors, rounded up to a power of two, at most a warp.
int count_lanes(const Params& p, int vector) {
    int lanes = 1;
    while (lanes < 32 && lanes * vector < p.shape.channels / p.shape.offset_groups) lanes *= 2;
    return lanes;
}

dim3 blocks(uint32_t items, uint32_t per_block) { return dim3(ceil_div(items, per_block)); }

}  // namespace

void sample(const Params& p, const Where& where) {
    with_types(p, [&](auto element, auto vector) {
        const uint32_t samples = count_samples(p);
        launch(sample_columns<decltype(element), vector.value>, blocks(samples, kSamples), dim3(kThreads), 0,
               where.stream, p, find_divisors(p, vector.value), samples);
    });
}

void differentiate(const Params& p, const Where& where) {
    const bool sums = p.offset_gradient != nullptr || p.mask_gradient != nullptr;
    const bool scatters = p.input_gradient != nullptr;
    with_types(p, [&](auto element, auto vector) {
        using T = decltype(element);
        constexpr int kVector = vector.value;
        const auto kernel = sums && scatters ? differentiate_samples<T, kVector, true, true>
                            : sums           ? differentiate_samples<T, kVector, true, false>
                                             : differentiate_samples<T, kVector, false, true>;
        const uint32_t samples = count_samples(p);
        const int lanes = count_lanes(p, kVector);
        launch(kernel, blocks(samples, static_cast<uint32_t>(kThreads / lanes)), dim3(kThreads), 0,
               where.stream, p, find_divisors(p, kVector), samples, lanes);
    });
}

void find_targets(const Params& p, const Where& where) {
    const uint32_t samples = count_samples(p);
    launch(p.dtype == DType::kFloat64 ? find_sample_targets<double> : find_sample_targets<float>,
           blocks(samples, kThreads), dim3(kThreads), 0, where.stream, p, find_divisors(p, 1), samples);
}

void gather(const Params& p, const Where& where) {
    const auto targets =
        static_cast<uint32_t>(p.shape.images * p.shape.height * p.shape.width * p.shape.offset_groups);
    with_types(p, [&](auto element, auto vector) {
        const int lanes = count_lanes(p, vector.value);
        launch(gather_corners<decltype(element), vector.value>,
               blocks(targets, static_cast<uint32_t>(kThreads / lanes)), dim3(kThreads), 0, where.stream, p,
               find_divisors(p, vector.value), targets, lanes);
    });
}

}  // namespace wsss::deform
