// The deformable convolution as one product on tensor cores, for 16-bit types and float32: samples go to
// shared memory and never to the device's. Included by cuda.cu alone.
//
// D2: N16 C256 64x64 3x3, 256 outputs. 77 GFLOP; through columns 302 MB would be written and read again in
// 16-bit types, which takes as long as the product at 4.8 TB/s. Here 34 MB are read, 34 MB written, and the
// weight's 1.2 MB once a tile from L2, 0.6 GB; of float32 twice as much. A block computes 128 pixels by all
// outputs (128 or 256 of them: with more, columns pay, since every tile of outputs would take the same
// samples), in steps of one tap and 128 bytes of channels. A step moves 128 KB of fragments and 48 KB of new
// operands through shared memory and 64 KB of corners through L1, 1900 cycles at 128 bytes each.
//
// 16 bits: a step's product takes 1600 cycles by `mma`; and its warps issue 8 * 850 instructions in 1700, by
// count (3100 at first, with 16-bit numbers in arrays and branches at the border). So 0.16 to 0.2 ms are
// expected on 132 multiprocessors against 0.12 ms of a bare product. (`wgmma`, which reads operands once,
// would do with 1500 cycles: not written, as it is for one architecture alone.)
//
// float32 takes three products in TF32 (Tf32Thrice): 4800 cycles a step, and 4400 to issue 8 * 2200
// instructions. Twice as many steps make 0.8 ms, where the arithmetic of float alone needs 1.3 for the bare
// product. Where TF32 is allowed it is one product, 0.3 ms. Nothing here has been timed on a GPU yet.
//
// Each of 8 warps has 64 pixels by a quarter of the outputs. Within a step, four times: the corners of the
// next step's samples are loaded, 16 channels are multiplied, and the samples are blended and stored; so
// loads have the time of a product to arrive. The weight comes by asynchronous copies two steps ahead, and
// the coordinates of the samples two changes of tap or offset group ahead. One barrier a step.
#pragma once

#include "deform/cuda_samples.h"
#include "tensor_core.h"

namespace wsss::deform {
namespace {

constexpr int kRows = 128;      // of a tile: output pixels
constexpr int kRowBytes = 128;  // of a step's channels
constexpr int kStages = 3;      // of the weight
constexpr int kWarpRows = 64;   // of the tile, by a quarter of the outputs
constexpr int kWarp = 32;
constexpr int kChunks = kRowBytes / 16;        // of a row; as many threads have one each
constexpr int kRowsEach = kThreads / kChunks;  // that all threads have at a time
constexpr int kParts = kRows / kRowsEach;      // of a step: rows to sample, and channels to multiply
constexpr int kPartChunks = kChunks / kParts;
static_assert(kPartChunks == 2 && kRowsEach % 8 == 0 && kThreads == 8 * kWarp);

template <class T>
constexpr int kChunk = 16 / sizeof(T);  // channels in 16 bytes
template <class T>
constexpr int kDepth = kChunks * kChunk<T>;  // of a step

// Matrices of kDepth columns in shared memory, the chunks of each row exchanged so that neither the eight
// rows that one instruction reads nor the eight chunks of a row share a bank.
template <class T>
__device__ T* chunk_of(T* matrix, int row, int chunk) {
    return matrix + (row * kChunks + (chunk ^ row % 8)) * kChunk<T>;
}

template <int kOutputs, class T, class W>
struct ProductMemory {
    T samples[2][kRows * kDepth<T>];
    T weight[kStages][kOutputs * kDepth<T>];
    Reading<W> readings[2][kRows];
};

// The channels that one step is about.
struct Step {
    uint32_t tap = 0, group = 0;  // which have samples of their own
    uint32_t slice = 0;           // of the offset group's channels, its first

    __device__ void advance(const Params& p, uint32_t group_channels, uint32_t depth) {
        slice += depth;
        if (slice < group_channels) return;
        slice = 0;
        if (++group < p.shape.offset_groups) return;
        group = 0;
        ++tap;
    }
    // In the input.
    __device__ uint32_t channel(uint32_t group_channels) const { return group * group_channels + slice; }
};

template <class Arithmetic, int kOutputs>
class Product {
  public:
    using T = typename Arithmetic::T;
    using W = wide<T>;
    static constexpr int kTiles = kOutputs / 32;  // of 8 outputs, a warp's
    // Parts at a time: with three products each, more would spill registers.
    static constexpr int kUnrolled = std::is_same_v<Arithmetic, Tf32Thrice> ? 1 : kParts;
    using Memory = ProductMemory<kOutputs, T, W>;

    __device__ Product(const Params& p, const Divisors& by, Memory& memory)
        : p_(p),
          memory_(memory),
          group_channels_(by.group_channels),
          steps_(static_cast<uint32_t>(p.taps * p.shape.offset_groups) *
                 ((group_channels_ + kDepth<T> - 1) / kDepth<T>)),
          pixel_(blockIdx.x * kRows + threadIdx.x) {
        if (threadIdx.x >= kRows || pixel_ >= p.count) return;
        const uint32_t row = by.out_width.quotient(pixel_);
        at_.image = by.out_height.quotient(row);
        at_.y = by.out_height.remainder(row, static_cast<uint32_t>(at_.image));
        at_.x = by.out_width.remainder(pixel_, row);
    }

    __device__ void run() {
        find_displacement();
        place_samples();
        copy_weight(0);
        copy_weight(1);
        __syncthreads();
        find_displacement();
        for (int part = 0; part < kParts; ++part) store_samples(0, part, load_chunk(part));
        place_samples();
        sampled_.advance(p_, group_channels_, kDepth<T>);
        for (uint32_t step = 0; step < steps_; ++step) {
            __pipeline_wait_prior(1);
            __syncthreads();
            copy_weight(step + 2);
            const bool more = step + 1 < steps_;
            const bool changes = more && sampled_.slice == 0;
            if (changes) find_displacement();
#pragma unroll kUnrolled
            for (int part = 0; part < kParts; ++part) {
                Corners<T, kChunk<T>> corners;
                if (more) corners = load_chunk(part);
                multiply(step, part);
                if (more) store_samples(step + 1, part, corners);
            }
            if (changes) place_samples();
            sampled_.advance(p_, group_channels_, kDepth<T>);
        }
        write();
    }

  private:
    // Of the next tap or offset group, for one pixel of the tile a thread.
    __device__ void find_displacement() {
        if (threadIdx.x >= kRows || pixel_ >= p_.count || placed_.tap >= p_.taps) return;
        at_.group = placed_.group;
        at_.tap_y = placed_.tap / static_cast<uint32_t>(p_.shape.kernel_w);
        at_.tap_x = placed_.tap - at_.tap_y * p_.shape.kernel_w;
        displacement_ = load_displacement<W>(p_, at_);
    }
    __device__ void place_samples() {
        if (threadIdx.x < kRows && placed_.tap < p_.taps) {
            const auto sample = pixel_ < p_.count ? find_sample<W>(p_, at_, displacement_) : Sample<W>{};
            memory_.readings[placings_ % 2][threadIdx.x] = find_reading(sample, p_.input_strides);
        }
        ++placings_;
        placed_.slice = group_channels_;
        placed_.advance(p_, group_channels_, kDepth<T>);
    }

    // A chunk of one of 32 rows a thread; `part` of four.
    __device__ Corners<T, kChunk<T>> load_chunk(int part) const {
        const uint32_t own = sampled_.slice + kChunk<T> * (threadIdx.x % kChunks);
        const Reading<W>& reading = readings()[row_of(part)];
        const T* const first =
            static_cast<const T*>(p_.input) + reading.first + sampled_.group * group_channels_ + own;
        return load_corners<kChunk<T>>(first, reading, p_.input_strides, own < group_channels_);
    }
    __device__ void store_samples(uint32_t step, int part, const Corners<T, kChunk<T>>& corners) {
        const int row = row_of(part);
        store(chunk_of(memory_.samples[step % 2], row, static_cast<int>(threadIdx.x) % kChunks),
              blend(corners, readings()[row]));
    }
    __device__ static int row_of(int part) {
        return kRowsEach * part + static_cast<int>(threadIdx.x) / kChunks;
    }
    // Those that are sampled from.
    __device__ const Reading<W>* readings() const {
        return memory_
            .readings[(sampled_.tap * static_cast<uint32_t>(p_.shape.offset_groups) + sampled_.group) % 2];
    }

    // A chunk of kOutputs / 32 rows a thread. A group of copies, be it empty, for every step.
    __device__ void copy_weight(uint32_t step) {
        if (step < steps_) {
            const int chunk = static_cast<int>(threadIdx.x) % kChunks;
            const int first_row = static_cast<int>(threadIdx.x) / kChunks;
            const uint32_t own = copied_.slice + kChunk<T> * chunk;
            const int64_t columns = p_.taps * p_.shape.channels;
            const T* from = static_cast<const T*>(p_.weight) + first_row * columns +
                            copied_.tap * p_.shape.channels + copied_.group * group_channels_ + own;
            const int rows = own < group_channels_ ? static_cast<int>(p_.outputs) : 0;
            T* const to = chunk_of(memory_.weight[step % kStages], first_row, chunk);
#pragma unroll
            for (int row = 0; row < kOutputs; row += kRowsEach) {
                const bool there = first_row + row < rows;
                __pipeline_memcpy_async(to + row * kDepth<T>, from, 16, there ? 0 : 16);
                from += kRowsEach * columns;
            }
            copied_.advance(p_, group_channels_, kDepth<T>);
        }
        __pipeline_commit();
    }

    // A part of the step's channels: those of two chunks.
    __device__ void multiply(uint32_t step, int part) {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        const T* const samples = memory_.samples[step % 2];
        const T* const weight = memory_.weight[step % kStages];
        typename Arithmetic::template Operand<4> left[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            uint32_t words[4];
            load_matrices(
                words, chunk_of(samples, first_row() + 16 * m + lane % 16, kPartChunks * part + lane / 16));
            left[m] = typename Arithmetic::template Operand<4>(words);
        }
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
            uint32_t words[4];
            load_matrices(words, chunk_of(weight, first_output() + 8 * n + lane / 16 * 8 + lane % 8,
                                          kPartChunks * part + lane / 8 % 2));
            const typename Arithmetic::template Operand<2> right_0(words), right_1(words + 2);
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                Arithmetic::add(sums_[m][n], left[m], right_0);
                Arithmetic::add(sums_[m][n + 1], left[m], right_1);
            }
        }
    }

    __device__ void write() const {
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        const T* const bias = static_cast<const T*>(p_.bias);
        using Pair = decltype(narrow_pair(T(0.0f), 0.0f, 0.0f));  // stored by one instruction
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            const int output = first_output() + 8 * n + lane % 4 * 2;
            if (output >= p_.outputs) continue;
            const W bias_0 = bias == nullptr ? W{0} : static_cast<W>(bias[output]);
            const W bias_1 = bias == nullptr ? W{0} : static_cast<W>(bias[output + 1]);
#pragma unroll
            for (int i = 0; i < 8; ++i) {  // sets of 8 rows
                const int64_t pixel =
                    static_cast<int64_t>(blockIdx.x) * kRows + first_row() + 8 * i + lane / 4;
                if (pixel >= p_.count) continue;
                const float* const sums = sums_[i / 2][n] + i % 2 * 2;
                T* const to = static_cast<T*>(p_.output) + pixel * p_.outputs + output;
                *reinterpret_cast<Pair*>(to) = narrow_pair(T(0.0f), sums[0] + bias_0, sums[1] + bias_1);
            }
        }
    }

    // Of the warp.
    __device__ int first_row() const { return static_cast<int>(threadIdx.x) / (4 * kWarp) * kWarpRows; }
    __device__ int first_output() const { return static_cast<int>(threadIdx.x) / kWarp % 4 * (kOutputs / 4); }

    const Params& p_;
    Memory& memory_;
    const uint32_t group_channels_, steps_;
    const uint32_t pixel_;
    Place at_{};  // of the thread's pixel
    Displacement<W> displacement_{};
    Step placed_, sampled_, copied_;  // what comes next of each
    uint32_t placings_ = 0;
    float sums_[4][kTiles][4] = {};
};

template <class Arithmetic, int kOutputs>
__global__ void __launch_bounds__(kThreads) multiply_samples(Params p, Divisors by) {
    using Tile = Product<Arithmetic, kOutputs>;
    WSSS_DYNAMIC_SHARED(typename Tile::Memory, memory);
    Tile(p, by, *memory).run();
}

}  // namespace
}  // namespace wsss::deform
