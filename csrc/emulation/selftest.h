// Small kernels that use each part of the CUDA language that the emulation provides. They are real CUDA too:
// nvcc compiles the same file. Pointers are to memory that the kernels can reach. Each function returns
// nullptr, or the message of the error, which stays valid until the thread's next call; on a GPU the work is
// left on the stream.
#pragma once

#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// sums[b] = sum of what block b of 256 threads reads, in float32. type: 0 float, 1 half, 2 bfloat16.
const char* selftest_sum(const void* x, float* sums, int n, int blocks, int type, void* stream);
// out [columns, rows] = in [rows, columns]. type: 0 float, 1 double.
const char* selftest_transpose(const void* in, void* out, int rows, int columns, int type, void* stream);
// Inclusive sums of each row of at most 1024 elements; one block of `length` threads a row.
const char* selftest_scan(const int* in, int* out, int rows, int length, void* stream);
// Per warp of 32: ballot, any, all, number of true values in the block of 96, whether all and any are.
const char* selftest_votes(const int* in, unsigned* out, int warps, void* stream);
// Per element: __shfl_sync, up, down and xor by `step` in segments of `width`, and the segment's sum by a
// mask of its own. type: 0 int, 1 unsigned long long, 2 double, 3 half.
const char* selftest_shuffle(const void* in, void* out, int n, int step, int width, int type, void* stream);
// Per element of a warp: lanes with the same value; of the warp sum, minimum, maximum, bits or-ed.
const char* selftest_warp(const int* in, unsigned* out, int n, void* stream);
// counts[v] += 1 for each v = in[i] in [0, bins); also the minimum and maximum.
const char* selftest_histogram(const int* in, int n, unsigned* counts, int bins, int* range, void* stream);
// sums[i % m] += x[i] for float, double, half and bfloat16 and pairs of the two (m even).
const char* selftest_atomic_add(const float* x, int n, int m, float* f, double* d, void* h, void* b, void* h2,
                                void* b2, void* stream);
// y = a * x in groups of four and one by one at the end.
const char* selftest_scale(const float* x, float* y, int n, float a, void* stream);
// Bit patterns to float and floats to bit patterns, of half and bfloat16.
const char* selftest_to_float(const uint16_t* bits, float* half, float* bfloat16, int n, void* stream);
const char* selftest_from_float(const float* x, uint16_t* half, uint16_t* bfloat16, int n, void* stream);
// Integer and bit functions of a pair of ints, ten results each.
const char* selftest_integers(const int* a, const int* b, int* out, int n, void* stream);
// Per element: sum, difference, product, quotient, a * b + c, c * a + b and a + c by pairs, minimum, maximum,
// -a, |a|, and bits for a < b, a >= b, a == b, a is NaN. type: 0 half, 1 bfloat16.
const char* selftest_half(const uint16_t* a, const uint16_t* b, const uint16_t* c, uint16_t* out, int n,
                          int type, void* stream);
// total += sum of x, 64 elements a block, by way of of_block [blocks]; count is 0 before and after.
const char* selftest_last_block(const int* x, int blocks, int* of_block, unsigned* count, int* total,
                                void* stream);
// Per thread: how many moments of any thread came before its start, its leaving a __syncwarp and its leaving
// a __syncthreads.
const char* selftest_order(int* clock, int* out, int blocks, int threads, void* stream);
// Threads beyond n leave before the barrier; the rest count themselves.
const char* selftest_early_exit(int* count, int n, void* stream);
// out [16, 8] = left [16, k] * right [k, 8] by tensor cores, both operands copied to shared memory
// asynchronously, right transposed [8, k]. type: 0 half, 1 bfloat16, with k = 16; 2 float in TF32, k = 8.
const char* selftest_product(const void* left, const void* right, float* out, int type, void* stream);
// Of each of n floats the nearest in TF32, and the two that stand for it.
const char* selftest_tf32(const float* x, float* nearest, float* high, float* low, int n, void* stream);
// Writes out[i] for the flat index of each thread of a three-dimensional launch.
const char* selftest_indices(int* out, const unsigned* grid, const unsigned* block, void* stream);

#if defined(WSSS_EMULATED)
void selftest_set_seed(uint64_t seed);
#endif
// Launches with an empty body, for the limits.
const char* selftest_empty(const unsigned* grid, const unsigned* block, size_t shared_bytes, void* stream);
// out[i] = shared memory that nobody wrote, static then dynamic, n floats each.
const char* selftest_unwritten(float* out, int n, void* stream);
}
#pragma GCC visibility pop
