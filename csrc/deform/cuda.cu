// The deformable convolution's samples on CUDA: 16-byte accesses along channels, which lie side by side.
//
// Shapes: D1 is N16 C2048 32x32 3x3, D2 N16 C256 64x64 3x3: 147456 and 589824 samples. Traffic of `sample`:
// each sample writes its channels once (1.2 GB for D1 in fp32) and reads four corners, four times as much.
// The floor is a fill of the columns, so the corners have to come from L1: a block takes kSamples samples, in
// the order pixel, offset group, tap (seven pixels of D1), and walks their channels in slices of a line, the
// samples within a slice. The 256 corners of undisplaced samples are 40 pixels, 5 KB a slice, so that L2
// delivers 1/6 of what is read. (Channels within samples, as it was at first, had 64 KB a block under way.)
// Coordinates are found once, by one thread each, and shared. A vector of 16 bytes takes 130 instructions in
// bf16 and 80 in fp32, by count: 0.17 and 0.2 ms for D1 on an H200, about as long as its bytes take. (It was
// half as many again before 16-bit numbers moved as words, see packed.h, and loads beyond the border became
// predicates.)
// `differentiate` gives a sample to at most kMostLanes lanes, which keep four sums, one per corner, turn them
// into the derivatives, and add those up by shuffles; nothing but the result is written. It takes 130
// instructions a vector, too. `scatter`, the input's gradient, is in cuda_scatter.h, `multiply`, which needs
// no columns, in cuda_product.h. `gather` does without atomics, for determinism: a group of lanes takes a
// target pixel and adds its corners in the order of a stable sort. Nothing here has been timed on a GPU yet.
#include "deform/cuda_product.h"
#include "deform/cuda_samples.h"
#include "deform/cuda_scatter.h"
#include "with_type.h"

namespace wsss::deform {
namespace {

constexpr int kSamples = 64;

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads)
    sample_columns(Params p, Divisors by, uint32_t samples, Lanes lanes) {
    using W = wide<T>;
    __shared__ Reading<W> readings[kSamples];
    __shared__ Row rows[kSamples];
    const uint32_t first = blockIdx.x * kSamples;
    const uint32_t here = min(static_cast<uint32_t>(kSamples), samples - first);
    if (threadIdx.x < here) {
        const uint32_t sample = first + threadIdx.x;
        readings[threadIdx.x] = find_reading(find_sample<W>(p, locate(p, by, sample)), p.input_strides);
        rows[threadIdx.x] = find_row(p, by, sample);
    }
    __syncthreads();

    const T* __restrict__ const input = static_cast<const T*>(p.input);
    T* __restrict__ const columns = static_cast<T*>(p.columns);
    for (uint32_t c = kVector * lanes.own(); c < by.group_channels; c += kVector * lanes.count()) {
#pragma unroll 2
        for (uint32_t own = lanes.group(); own < here; own += lanes.groups()) {
            const Reading<W>& reading = readings[own];
            const uint32_t channel = rows[own].channel + c;
            const auto corners =
                load_corners<kVector>(input + reading.first + channel, reading, p.input_strides);
            store(columns + column_of(p, by, rows[own], channel), blend(corners, reading));
        }
    }
}

// A group of `lanes` (a power of two) takes a sample.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads)
    differentiate_samples(Params p, Divisors by, uint32_t samples, Lanes lanes) {
    using W = wide<T>;
    const uint32_t own = blockIdx.x * lanes.groups() + lanes.group();
    const bool active = own < samples;
    const Sample<W> sample = active ? find_sample<W>(p, locate(p, by, own)) : Sample<W>{};
    const Reading<W> from = find_reading(sample, p.input_strides);
    const T* __restrict__ const input = static_cast<const T*>(p.input);
    const T* __restrict__ const columns = static_cast<const T*>(p.columns);

    W sums[4] = {};  // over channels, of the gradient times the corner
    const Row row = find_row(p, by, own);
    for (uint32_t c = kVector * lanes.own(); sample.inside != 0 && c < by.group_channels;
         c += kVector * lanes.count()) {
        const uint32_t channel = row.channel + c;
        const auto corners = load_corners<kVector>(input + from.first + channel, from, p.input_strides);
        W gradient[kVector];
        widen(load<T, kVector>(columns + column_of(p, by, row, channel)), gradient);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
            W numbers[kVector];
            widen(corners.at[corner], numbers);
#pragma unroll
            for (int i = 0; i < kVector; ++i) sums[corner] += gradient[i] * numbers[i];
        }
    }
    W by_y = 0, by_x = 0, by_mask = 0;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
        by_y += sample.weight_y(corner) * sums[corner];
        by_x += sample.weight_x(corner) * sums[corner];
        by_mask += sample.weight(corner) * sums[corner];
    }
    for (int distance = lanes.count() / 2; distance > 0; distance /= 2) {
        by_y += __shfl_xor_sync(0xffffffffu, by_y, distance);
        by_x += __shfl_xor_sync(0xffffffffu, by_x, distance);
        by_mask += __shfl_xor_sync(0xffffffffu, by_mask, distance);
    }
    if (active && lanes.own() == 0) {
        write_gradients(p, locate(p, by, own), sample.mask * by_y, sample.mask * by_x, by_mask);
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
    gather_corners(Params p, Divisors by, uint32_t targets, Lanes lanes) {
    using W = wide<T>;
    const uint32_t target = blockIdx.x * lanes.groups() + lanes.group();
    if (target >= targets) return;
    const T* __restrict__ const columns = static_cast<const T*>(p.columns);
    const W* __restrict__ const weights = static_cast<const W*>(p.weights);
    for (uint32_t c = kVector * lanes.own(); c < by.group_channels; c += kVector * lanes.count()) {
        struct alignas(kVector == 1 ? sizeof(W) : 16) Sums {
            W at[kVector];
        };
        // Target (pixel, group) begins at pixel * channels + group * group_channels.
        auto* const to = reinterpret_cast<Sums*>(static_cast<W*>(p.input_gradient) +
                                                 static_cast<int64_t>(target) * by.group_channels + c);
        Sums sums = *to;
        for (int64_t i = p.starts[target]; i < p.starts[target + 1]; ++i) {
            const int64_t corner = p.order[i];
            const W weight = weights[corner];
            const Row row = find_row(p, by, static_cast<uint32_t>(corner / 4));
            W gradient[kVector];
            widen(load<T, kVector>(columns + column_of(p, by, row, row.channel + c)), gradient);
#pragma unroll
            for (int j = 0; j < kVector; ++j) sums.at[j] += weight * gradient[j];
        }
        *to = sums;
    }
}

}  // namespace

int64_t product_bytes(int64_t outputs) {
    return outputs <= 128 ? sizeof(ProductMemory<128, uint16_t, float>)
                          : sizeof(ProductMemory<256, uint16_t, float>);
}

void multiply(const Params& p, const Where& where) {
    const auto with = [&](auto arithmetic) {
        using Arithmetic = decltype(arithmetic);
        const auto kernel =
            p.outputs <= 128 ? multiply_samples<Arithmetic, 128> : multiply_samples<Arithmetic, 256>;
        launch(kernel, blocks(static_cast<uint32_t>(p.count), kRows), dim3(kThreads),
               static_cast<size_t>(product_bytes(p.outputs)), where.stream, p, Divisors(p));
    };
    if (p.dtype == DType::kFloat16) with(Plain<__half>());
    if (p.dtype == DType::kBFloat16) with(Plain<__nv_bfloat16>());
    if (p.dtype == DType::kFloat32 && p.as_tf32) with(Tf32());
    if (p.dtype == DType::kFloat32 && !p.as_tf32) with(Tf32Thrice());
}

void sample(const Params& p, const Where& where) {
    with_types(p, [&](auto element, auto vector) {
        const uint32_t samples = count_samples(p);
        launch(sample_columns<decltype(element), vector.value>, blocks(samples, kSamples), dim3(kThreads), 0,
               where.stream, p, Divisors(p), samples, choose_lanes(p, vector.value));
    });
}

void differentiate(const Params& p, const Where& where) {
    with_types(p, [&](auto element, auto vector) {
        const uint32_t samples = count_samples(p);
        const Lanes lanes = choose_lanes(p, vector.value);
        launch(differentiate_samples<decltype(element), vector.value>,
               blocks(samples, static_cast<uint32_t>(lanes.groups())), dim3(kThreads), 0, where.stream, p,
               Divisors(p), samples, lanes);
    });
}

void scatter(const Params& p, const Where& where) {
    const Tiling tiling(p);
    const uint32_t tiles =
        tiling.across * tiling.down * tiling.deep * static_cast<uint32_t>(p.shape.offset_groups);
    with_types(p, [&](auto element, auto vector) {
        const Lanes lanes = choose_lanes(p, vector.value);
        launch(scatter_tiles<decltype(element), vector.value>,
               dim3(tiles, count_parts(p, tiles, lanes.count() * vector.value)), dim3(kThreads), 0,
               where.stream, p, Divisors(p), tiling, lanes);
    });
}

void find_targets(const Params& p, const Where& where) {
    const uint32_t samples = count_samples(p);
    launch(p.dtype == DType::kFloat64 ? find_sample_targets<double> : find_sample_targets<float>,
           blocks(samples, kThreads), dim3(kThreads), 0, where.stream, p, Divisors(p), samples);
}

void gather(const Params& p, const Where& where) {
    const auto targets =
        static_cast<uint32_t>(p.shape.images * p.shape.height * p.shape.width * p.shape.offset_groups);
    with_types(p, [&](auto element, auto vector) {
        const Lanes lanes = choose_lanes(p, vector.value);
        launch(gather_corners<decltype(element), vector.value>,
               blocks(targets, static_cast<uint32_t>(lanes.groups())), dim3(kThreads), 0, where.stream, p,
               Divisors(p), targets, lanes);
    });
}

}  // namespace wsss::deform
