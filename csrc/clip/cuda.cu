// clip_features on CUDA: the maxima of chunks, then the chunks clipped to their images' maxima.
//
// Shapes: N16 D2048 32x32 fp32 (ESOL's features at a crop of 512): 128 MiB, read twice and written once; the
// floor is a plain copy. A block takes a chunk, at most kThreads * kUnroll vectors of 16 bytes, more only in
// the forward of images beyond 4 MiB, which have 256 chunks: every access is coalesced, and kUnroll loads are
// in flight per thread. Nothing has to be set before, and no block waits for another: each block of the
// second launch folds the maxima of its image for itself, at most 256 numbers from L2. It goes through the
// chunks backwards, as what was read last is still in L2. No result depends on an order, so all are the same
// each time.
#include "block.h"
#include "clip/math.h"
#include "launch.h"
#include "packed.h"
#include "with_type.h"

namespace wsss::clip {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr int kVectorBytes = 16;

// The numbers of an image that a block works on.
struct Chunk {
    int64_t image, begin, end;
};

__device__ Chunk find_chunk(const Params& p, uint32_t block) {
    const uint32_t chunks = static_cast<uint32_t>(p.chunks);
    const uint32_t image = block / chunks;
    const int64_t begin = (block - image * chunks) * p.chunk_elements;
    const int64_t end = begin + p.chunk_elements;
    return {image, begin, end < p.elements ? end : p.elements};
}

template <class W>
__device__ W find_block_maximum(W value) {
    return fold_block<kThreads>(value, [](W x, W y) { return larger_number(x, y); });
}

template <class T, int kLength>
__global__ void __launch_bounds__(kThreads) find_maxima(Params p) {
    constexpr int kStep = kThreads * kLength;
    const Chunk chunk = find_chunk(p, blockIdx.x);
    const T* x = static_cast<const T*>(p.x) + chunk.image * p.image_stride;
    wide<T> maximum = lowest<wide<T>>();
    for (int64_t at = chunk.begin + threadIdx.x * kLength; at < chunk.end; at += kUnroll * kStep) {
        Packed<T, kLength> packed[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int64_t there = at + i * kStep;
            packed[i] = load<T, kLength>(x + (there < chunk.end ? there : at));  // twice does no harm
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            wide<T> numbers[kLength];
            widen(packed[i], numbers);
#pragma unroll
            for (int j = 0; j < kLength; ++j) maximum = larger_number(maximum, numbers[j]);
        }
    }
    maximum = find_block_maximum(maximum);
    if (threadIdx.x == 0) static_cast<wide<T>*>(p.maxima)[blockIdx.x] = maximum;
}

template <class T, int kLength>
__global__ void __launch_bounds__(kThreads) clip_chunks(Params p) {
    constexpr int kStep = kThreads * kLength;
    const Chunk chunk = find_chunk(p, gridDim.x - 1 - blockIdx.x);
    const wide<T>* maxima = static_cast<const wide<T>*>(p.maxima) + chunk.image * p.chunks;
    wide<T> maximum = lowest<wide<T>>();
    for (int64_t i = threadIdx.x; i < p.chunks; i += kThreads) maximum = larger_number(maximum, maxima[i]);
    const T limit = find_limit<T>(p.beta, find_block_maximum(maximum));
    if (chunk.begin == 0 && threadIdx.x == 0) static_cast<T*>(p.limits)[chunk.image] = limit;
    const wide<T> bar = static_cast<wide<T>>(limit);

    const T* x = static_cast<const T*>(p.x) + chunk.image * p.image_stride;
    T* clipped = static_cast<T*>(p.clipped) + chunk.image * p.elements;
    for (int64_t at = chunk.begin + threadIdx.x * kLength; at < chunk.end; at += kUnroll * kStep) {
        Packed<T, kLength> packed[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int64_t there = at + i * kStep;
            if (there < chunk.end) packed[i] = load<T, kLength>(x + there);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int64_t there = at + i * kStep;
            if (there >= chunk.end) continue;
            wide<T> numbers[kLength];
            widen(packed[i], numbers);
#pragma unroll
            for (int j = 0; j < kLength; ++j) numbers[j] = numbers[j] > bar ? bar : numbers[j];
            store(clipped + there, narrow<T, kLength>(numbers));
        }
    }
}

template <class T, int kLength>
__global__ void __launch_bounds__(kThreads) differentiate_chunks(Params p) {
    constexpr int kStep = kThreads * kLength;
    const Chunk chunk = find_chunk(p, blockIdx.x);
    const wide<T> bar = static_cast<wide<T>>(static_cast<const T*>(p.limits)[chunk.image]);
    const T* x = static_cast<const T*>(p.x) + chunk.image * p.image_stride;
    const T* gradient = static_cast<const T*>(p.gradient) + chunk.image * p.gradient_stride;
    T* x_gradient = static_cast<T*>(p.x_gradient) + chunk.image * p.elements;
    for (int64_t at = chunk.begin + threadIdx.x * kLength; at < chunk.end; at += kUnroll * kStep) {
        Packed<T, kLength> packed[kUnroll], packed_gradients[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int64_t there = at + i * kStep;
            if (there >= chunk.end) continue;
            packed[i] = load<T, kLength>(x + there);
            packed_gradients[i] = load<T, kLength>(gradient + there);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const int64_t there = at + i * kStep;
            if (there >= chunk.end) continue;
            wide<T> numbers[kLength], gradients[kLength];
            widen(packed[i], numbers);
            widen(packed_gradients[i], gradients);
#pragma unroll
            for (int j = 0; j < kLength; ++j) gradients[j] = numbers[j] > bar ? wide<T>{0} : gradients[j];
            store(x_gradient + there, narrow<T, kLength>(gradients));
        }
    }
}

dim3 blocks(const Params& p) { return dim3(static_cast<unsigned>(p.images * p.chunks)); }

struct Clip {
    template <class T, int kLength>
    static void run(const Params& p, const Where& where) {
        launch(find_maxima<T, kLength>, blocks(p), dim3(kThreads), 0, where.stream, p);
        launch(clip_chunks<T, kLength>, blocks(p), dim3(kThreads), 0, where.stream, p);
    }
};

struct Differentiate {
    template <class T, int kLength>
    static void run(const Params& p, const Where& where) {
        launch(differentiate_chunks<T, kLength>, blocks(p), dim3(kThreads), 0, where.stream, p);
    }
};

// Whole vectors where every image starts at a multiple of their size, single numbers elsewhere.
template <class Operation, class T>
void run_with(const Params& p, const Where& where) {
    constexpr int kLength = kVectorBytes / sizeof(T);
    uintptr_t bits = static_cast<uintptr_t>((p.elements | p.image_stride | p.gradient_stride) * sizeof(T));
    for (const void* pointer :
         {p.x, static_cast<const void*>(p.clipped), p.gradient, static_cast<const void*>(p.x_gradient)}) {
        bits |= reinterpret_cast<uintptr_t>(pointer);
    }
    if (bits % kVectorBytes == 0) return Operation::template run<T, kLength>(p, where);
    Operation::template run<T, 1>(p, where);
}

template <class Operation>
void run(const Params& p, const Where& where) {
    with_type(p.dtype, [&](auto type) { run_with<Operation, typename decltype(type)::type>(p, where); });
}

}  // namespace

void clip(const Params& p, const Where& where) { run<Clip>(p, where); }
void differentiate(const Params& p, const Where& where) { run<Differentiate>(p, where); }

}  // namespace wsss::clip
