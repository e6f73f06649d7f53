#include <exception>
#include <string>

#include "launch.h"
#include "selftest.h"
#include "tensor_core.h"

namespace wsss {
namespace {

constexpr unsigned full_mask = 0xffffffffu;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__global__ void __launch_bounds__(256) sum_kernel(const T* __restrict__ x, float* __restrict__ sums, int n) {
    __shared__ float of_warp[8];
    float sum = 0.0f;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        sum += to_float(x[i]);
#pragma unroll
    for (int delta = warpSize / 2; delta > 0; delta /= 2) sum += __shfl_down_sync(full_mask, sum, delta);
    if (threadIdx.x % warpSize == 0) of_warp[threadIdx.x / warpSize] = sum;
    __syncthreads();
    if (threadIdx.x < 8) {
        sum = of_warp[threadIdx.x];
        for (int delta = 4; delta > 0; delta /= 2) sum += __shfl_xor_sync(0xffu, sum, delta, 8);
        if (threadIdx.x == 0) sums[blockIdx.x] = sum;
    }
}

template <class T>
__global__ void transpose_kernel(const T* in, T* out, int rows, int columns) {
    WSSS_DYNAMIC_SHARED(T, tile);  // [blockDim.y][blockDim.x + 1]
    const int stride = blockDim.x + 1;
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    int row = blockIdx.y * blockDim.y + threadIdx.y;
    if (row < rows && column < columns) tile[threadIdx.y * stride + threadIdx.x] = in[row * columns + column];
    __syncthreads();
    column = blockIdx.x * blockDim.x + threadIdx.y;
    row = blockIdx.y * blockDim.y + threadIdx.x;
    if (row < rows && column < columns) out[column * rows + row] = tile[threadIdx.x * stride + threadIdx.y];
}

template <class T>
__global__ void product_kernel(const T* left, const T* right, float* out) {
    constexpr int kChunk = 16 / sizeof(T);
    __shared__ __align__(16) T rows[24][2 * kChunk];  // of the left operand, then columns of the right one
    const int lane = threadIdx.x;
    const int row = lane / 2, column = lane % 2 * kChunk;
    __pipeline_memcpy_async(&rows[row][column], left + row * 2 * kChunk + column, 16);
    __pipeline_commit();
    if (lane < 16) __pipeline_memcpy_async(&rows[16 + row][column], right + row * 2 * kChunk + column, 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncwarp();
    uint32_t parts[4], columns[4];
    load_matrices(parts, &rows[lane % 16][lane / 16 * kChunk]);
    load_matrices(columns, &rows[16 + lane % 8][lane / 8 % 2 * kChunk]);
    float sums[4] = {};
    multiply_add<T>(sums, parts, columns[0], columns[1]);
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// A float to the nearest TF32, and to two that add up to it.
__global__ void tf32_kernel(const float* x, float* nearest, float* high, float* low, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const uint32_t word = __float_as_uint(x[i]);
    nearest[i] = __uint_as_float(Tf32::Operand<1>(&word).words[0]);
    const Tf32Thrice::Operand<1> two(&word);
    high[i] = __uint_as_float(two.high[0]);
    low[i] = __uint_as_float(two.low[0]);
}

template <class T>
void product(const void* left, const void* right, float* out, void* stream) {
    launch(product_kernel<T>, 1, 32, 0, stream, static_cast<const T*>(left), static_cast<const T*>(right),
           out);
}

__global__ void scan_kernel(const int* in, int* out) {
    WSSS_DYNAMIC_SHARED(int, sums);
    const int i = threadIdx.x;
    const int length = blockDim.x;
    sums[i] = in[blockIdx.x * length + i];
    __syncthreads();
    for (int step = 1; step < length; step *= 2) {
        const int before = i >= step ? sums[i - step] : 0;
        __syncthreads();
        sums[i] += before;
        __syncthreads();
    }
    out[blockIdx.x * length + i] = sums[i];
}

__global__ void votes_kernel(const int* in, unsigned* out) {
    const int predicate = in[blockIdx.x * blockDim.x + threadIdx.x];
    unsigned results[6];
    results[0] = __ballot_sync(full_mask, predicate);
    results[1] = __any_sync(full_mask, predicate) != 0;
    results[2] = __all_sync(full_mask, predicate) != 0;
    results[3] = __syncthreads_count(predicate);
    results[4] = __syncthreads_and(predicate) != 0;
    results[5] = __syncthreads_or(predicate) != 0;
    const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / warpSize;
    if (threadIdx.x % warpSize == 0) {
        for (int k = 0; k < 6; ++k) out[warp * 6 + k] = results[k];
    }
}

template <class T>
__global__ void shuffle_kernel(const T* in, T* out, int step, int width) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const int lane = threadIdx.x % warpSize;
    const T value = in[i];
    out[i * 5 + 0] = __shfl_sync(full_mask, value, step, width);
    out[i * 5 + 1] = __shfl_up_sync(full_mask, value, step, width);
    out[i * 5 + 2] = __shfl_down_sync(full_mask, value, step, width);
    out[i * 5 + 3] = __shfl_xor_sync(full_mask, value, step, width);
    const unsigned of_segment = (width == 32 ? full_mask : (1u << width) - 1) << (lane / width * width);
    T sum = value;
    for (int bit = 1; bit < width; bit *= 2) sum = sum + __shfl_xor_sync(of_segment, sum, bit);
    out[i * 5 + 4] = sum;
}

__global__ void warp_kernel(const int* in, unsigned* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const int value = in[i];
    unsigned* results = out + i * 6;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    results[0] = __match_any_sync(full_mask, value);
    results[1] = __reduce_add_sync(full_mask, value);
    results[2] = __reduce_min_sync(full_mask, value);
    results[3] = __reduce_max_sync(full_mask, value);
    results[4] = __reduce_or_sync(full_mask, static_cast<unsigned>(value));
#endif
    __shared__ int reversed[32];
    reversed[31 - threadIdx.x] = value;
    __syncwarp();
    results[5] = reversed[threadIdx.x];
}

__global__ void histogram_kernel(const int* in, int n, unsigned* counts, int bins, int* range) {
    __shared__ unsigned local[64];
    __shared__ int low;
    __shared__ int high;
    for (int i = threadIdx.x; i < bins; i += blockDim.x) local[i] = 0;
    if (threadIdx.x == 0) {
        low = bins;
        high = -1;
    }
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        atomicAdd(&local[in[i]], 1u);
        atomicMin(&low, in[i]);
        atomicMax(&high, in[i]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < bins; i += blockDim.x) atomicAdd(&counts[i], local[i]);
    if (threadIdx.x == 0) {
        atomicMin(&range[0], low);
        atomicMax(&range[1], high);
    }
}

__global__ void atomic_add_kernel(const float* x, int n, int m, float* f, double* d, __half* h,
                                  __nv_bfloat16* b, __half2* h2, __nv_bfloat162* b2) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float value = __ldg(x + i);
    atomicAdd(f + i % m, value);
    atomicAdd(d + i % m, static_cast<double>(value));
    atomicAdd(h + i % m, __float2half(value));
    atomicAdd(b + i % m, __float2bfloat16(value));
    const float even = i % 2 == 0 ? value : 0.0f;
    const float odd = i % 2 == 0 ? 0.0f : value;
    atomicAdd(h2 + i % m / 2, __floats2half2_rn(even, odd));
    atomicAdd(b2 + i % m / 2, __floats2bfloat162_rn(even, odd));
}

__global__ void scale_kernel(const float* x, float* y, int n, float a) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n / 4) {
        const float4 v = __ldcs(reinterpret_cast<const float4*>(x) + i);
        __stcs(reinterpret_cast<float4*>(y) + i, make_float4(a * v.x, a * v.y, a * v.z, a * v.w));
    } else if (const int j = n / 4 * 4 + i - n / 4; j < n) {
        y[j] = a * x[j];
    }
}

__global__ void to_float_kernel(const uint16_t* bits, float* half, float* bfloat16, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    half[i] = __half2float(__ushort_as_half(bits[i]));
    bfloat16[i] = __bfloat162float(__ushort_as_bfloat16(bits[i]));
}

__global__ void from_float_kernel(const float* x, uint16_t* half, uint16_t* bfloat16, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    half[i] = __half_as_ushort(__float2half_rn(x[i]));
    bfloat16[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
}

__global__ void integers_kernel(const int* as, const int* bs, int* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int a = as[i];
    const int b = bs[i];
    int* results = out + i * 10;
    results[0] = __clz(a);
    results[1] = __popc(a);
    results[2] = __ffs(a);
    results[3] = static_cast<int>(__brev(a));
    results[4] = __mulhi(a, b);
    results[5] = static_cast<int>(__umulhi(a, b));
    results[6] = min(a, b);
    results[7] = max(a, b);
    results[8] = __float_as_int(__int_as_float(a));
    results[9] = __float2int_rn(__fmaf_rn(2.0f, __saturatef(0.25f), static_cast<float>(a % 1024)));
}

__global__ void early_exit_kernel(int* count, int n) {
    __shared__ int here;
    const int i = threadIdx.x;
    if (i >= n) return;
    if (i == 0) here = 0;
    __syncthreads();
    atomicAdd(&here, 1);
    __syncthreads();
    if (i == 0) *count = here;
}

__global__ void indices_kernel(int* out) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const int i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
    out[i] = i;
}

__device__ __half from_bits(__half, uint16_t bits) { return __ushort_as_half(bits); }
__device__ __nv_bfloat16 from_bits(__nv_bfloat16, uint16_t bits) { return __ushort_as_bfloat16(bits); }
__device__ uint16_t to_bits(__half v) { return __half_as_ushort(v); }
__device__ uint16_t to_bits(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }
__device__ __half2 pair(__half x, __half y) { return __halves2half2(x, y); }
__device__ __nv_bfloat162 pair(__nv_bfloat16 x, __nv_bfloat16 y) { return __halves2bfloat162(x, y); }

template <class T>
__global__ void half_kernel(const uint16_t* as, const uint16_t* bs, const uint16_t* cs, uint16_t* out,
                            int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const T a = from_bits(T(), as[i]);
    const T b = from_bits(T(), bs[i]);
    const T c = from_bits(T(), cs[i]);
    const auto fused = __hfma2(pair(a, c), pair(b, a), pair(c, b));
    const auto sum = __hadd2(pair(a, a), pair(b, c));
    const T results[] = {__hadd(a, b), __hsub(a, b), __hmul(a, b), __hdiv(a, b), __hfma(a, b, c), fused.y,
                         sum.y,        __hmin(a, b), __hmax(a, b), __hneg(a),    __habs(a)};
    for (int k = 0; k < 11; ++k) out[i * 12 + k] = to_bits(results[k]);
    out[i * 12 + 11] = __hlt(a, b) + 2 * __hge(a, b) + 4 * __heq(a, b) + 8 * __hisnan(a);
}

// The last block to come adds up what each has written.
__global__ void last_block_kernel(const int* x, int* of_block, unsigned* blocks, int* total) {
    __shared__ bool last;
    __shared__ int sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    atomicAdd(&sum, x[blockIdx.x * blockDim.x + threadIdx.x]);
    __syncthreads();
    if (threadIdx.x == 0) {
        of_block[blockIdx.x] = sum;
        __threadfence();
        last = atomicInc(blocks, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x < gridDim.x) atomicAdd(total, of_block[threadIdx.x]);
}

__global__ void order_kernel(int* clock, int* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[3 * i] = atomicAdd(clock, 1);
    __syncwarp();
    out[3 * i + 1] = atomicAdd(clock, 1);
    __syncthreads();
    out[3 * i + 2] = atomicAdd(clock, 1);
}

__global__ void empty_kernel() {}

__global__ void unwritten_kernel(float* out, int n) {
    __shared__ float fixed[128];
    WSSS_DYNAMIC_SHARED(float, dynamic);
    const int i = threadIdx.x;
    if (n < 0) fixed[i] = dynamic[i] = 1.0f;
    if (i < n) out[i] = fixed[i];
    if (i < n) out[n + i] = dynamic[i];
}

dim3 as_dim3(const unsigned* v) { return dim3(v[0], v[1], v[2]); }

int blocks_for(int n, int threads) { return (n + threads - 1) / threads; }

template <class Body>
const char* message_of(Body&& body) {
    static thread_local std::string message;
    try {
        body();
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

template <class T>
void sum(const void* x, float* sums, int n, int blocks, void* stream) {
    launch(sum_kernel<T>, blocks, 256, 0, stream, static_cast<const T*>(x), sums, n);
}

template <class T>
void transpose(const void* in, void* out, int rows, int columns, void* stream) {
    constexpr int tile = 16;
    const dim3 grid(blocks_for(columns, tile), blocks_for(rows, tile));
    launch(transpose_kernel<T>, grid, dim3(tile, tile), tile * (tile + 1) * sizeof(T), stream,
           static_cast<const T*>(in), static_cast<T*>(out), rows, columns);
}

template <class T>
void shuffle(const void* in, void* out, int n, int step, int width, void* stream) {
    launch(shuffle_kernel<T>, n / 64, 64, 0, stream, static_cast<const T*>(in), static_cast<T*>(out), step,
           width);
}

}  // namespace
}  // namespace wsss

using namespace wsss;

const char* selftest_sum(const void* x, float* sums, int n, int blocks, int type, void* stream) {
    constexpr decltype(&sum<float>) of_type[] = {sum<float>, sum<__half>, sum<__nv_bfloat16>};
    return message_of([&] { of_type[type](x, sums, n, blocks, stream); });
}

const char* selftest_transpose(const void* in, void* out, int rows, int columns, int type, void* stream) {
    constexpr decltype(&transpose<float>) of_type[] = {transpose<float>, transpose<double>};
    return message_of([&] { of_type[type](in, out, rows, columns, stream); });
}

const char* selftest_product(const void* left, const void* right, float* out, int type, void* stream) {
    constexpr decltype(&product<__half>) of_type[] = {product<__half>, product<__nv_bfloat16>,
                                                      product<float>};
    return message_of([&] { of_type[type](left, right, out, stream); });
}

const char* selftest_tf32(const float* x, float* nearest, float* high, float* low, int n, void* stream) {
    return message_of(
        [&] { launch(tf32_kernel, (n + 255) / 256, 256, 0, stream, x, nearest, high, low, n); });
}

const char* selftest_scan(const int* in, int* out, int rows, int length, void* stream) {
    return message_of([&] { launch(scan_kernel, rows, length, length * sizeof(int), stream, in, out); });
}

const char* selftest_votes(const int* in, unsigned* out, int warps, void* stream) {
    return message_of([&] { launch(votes_kernel, warps / 3, 96, 0, stream, in, out); });
}

const char* selftest_shuffle(const void* in, void* out, int n, int step, int width, int type, void* stream) {
    constexpr decltype(&shuffle<int>) of_type[] = {shuffle<int>, shuffle<unsigned long long>, shuffle<double>,
                                                   shuffle<__half>};
    return message_of([&] { of_type[type](in, out, n, step, width, stream); });
}

const char* selftest_warp(const int* in, unsigned* out, int n, void* stream) {
    return message_of([&] { launch(warp_kernel, n / 32, 32, 0, stream, in, out); });
}

const char* selftest_histogram(const int* in, int n, unsigned* counts, int bins, int* range, void* stream) {
    return message_of([&] { launch(histogram_kernel, 3, 128, 0, stream, in, n, counts, bins, range); });
}

const char* selftest_atomic_add(const float* x, int n, int m, float* f, double* d, void* h, void* b, void* h2,
                                void* b2, void* stream) {
    return message_of([&] {
        launch(atomic_add_kernel, blocks_for(n, 128), 128, 0, stream, x, n, m, f, d, static_cast<__half*>(h),
               static_cast<__nv_bfloat16*>(b), static_cast<__half2*>(h2), static_cast<__nv_bfloat162*>(b2));
    });
}

const char* selftest_scale(const float* x, float* y, int n, float a, void* stream) {
    return message_of([&] { launch(scale_kernel, blocks_for(n / 4 + 3, 64), 64, 0, stream, x, y, n, a); });
}

const char* selftest_to_float(const uint16_t* bits, float* half, float* bfloat16, int n, void* stream) {
    return message_of(
        [&] { launch(to_float_kernel, blocks_for(n, 256), 256, 0, stream, bits, half, bfloat16, n); });
}

const char* selftest_from_float(const float* x, uint16_t* half, uint16_t* bfloat16, int n, void* stream) {
    return message_of(
        [&] { launch(from_float_kernel, blocks_for(n, 256), 256, 0, stream, x, half, bfloat16, n); });
}

const char* selftest_integers(const int* a, const int* b, int* out, int n, void* stream) {
    return message_of([&] { launch(integers_kernel, blocks_for(n, 64), 64, 0, stream, a, b, out, n); });
}

const char* selftest_half(const uint16_t* a, const uint16_t* b, const uint16_t* c, uint16_t* out, int n,
                          int type, void* stream) {
    constexpr decltype(&half_kernel<__half>) of_type[] = {half_kernel<__half>, half_kernel<__nv_bfloat16>};
    return message_of([&] { launch(of_type[type], blocks_for(n, 256), 256, 0, stream, a, b, c, out, n); });
}

const char* selftest_last_block(const int* x, int blocks, int* of_block, unsigned* count, int* total,
                                void* stream) {
    return message_of([&] { launch(last_block_kernel, blocks, 64, 0, stream, x, of_block, count, total); });
}

const char* selftest_order(int* clock, int* out, int blocks, int threads, void* stream) {
    return message_of([&] { launch(order_kernel, blocks, threads, 0, stream, clock, out); });
}

#if defined(WSSS_EMULATED)
void selftest_set_seed(uint64_t seed) { emulation::set_seed(seed); }
#endif

const char* selftest_early_exit(int* count, int n, void* stream) {
    return message_of([&] { launch(early_exit_kernel, 1, 128, 0, stream, count, n); });
}

const char* selftest_indices(int* out, const unsigned* grid, const unsigned* block, void* stream) {
    return message_of([&] { launch(indices_kernel, as_dim3(grid), as_dim3(block), 0, stream, out); });
}

const char* selftest_empty(const unsigned* grid, const unsigned* block, size_t shared_bytes, void* stream) {
    return message_of([&] { launch(empty_kernel, as_dim3(grid), as_dim3(block), shared_bytes, stream); });
}

const char* selftest_unwritten(float* out, int n, void* stream) {
    return message_of([&] { launch(unwritten_kernel, 1, 128, 128 * sizeof(float), stream, out, n); });
}
