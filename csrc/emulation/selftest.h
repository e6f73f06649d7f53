// Small kernels that use each part of the CUDA language that the emulation provides. They are real CUDA too:
// nvcc compiles the same file. Pointers are to memory that the kernels can reach. Each function returns
// nullptr, or the message of the error, which stays valid until the thread's next call; on a GPU the work is
// left on the stream.
#pragma once

#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// sums[b] = sum of the elements that block b of 256 threads reads, in float32. type: 0 float, 1 half, 2
// bfloat16.
const char* selftest_sum(const void* x, float* sums, int n, int blocks, int type, void* stream);
// out [columns, rows] = in [rows, columns]. type: 0 float, 1 double.
const char* selftest_transpose(const void* in, void* out, int rows, int columns, int type, void* stream);
// Inclusive sums of each row of at most 1024 elements; one block of `length` threads a row.
const char* selftest_scan(const int* in, int* out, int rows, int length, void* stream);
// Per warp of 32: ballot, any, all, number of true values in the block of 96, whether all and any are true
// there.
const char* selftest_votes(const int* in, unsigned* out, int warps, void* stream);
// Per element: __shfl_sync, up, down and xor by `step` in segments of `width`, and the segment's sum by a
// mask of its own. type: 0 int, 1 unsigned long long, 2 double, 3 half.
const char* selftest_shuffle(const void* in, void* out, int n, int step, int width, int type, void* stream);
// Per element of a warp: lanes with the same value, sum, minimum and maximum of the warp, bits or-ed
// together.
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
// Threads beyond n leave before the barrier; the rest count themselves.
const char* selftest_early_exit(int* count, int n, void* stream);
// Writes out[i] for the flat index of each thread of a three-dimensional launch.
const char* selftest_indices(int* out, const unsigned* grid, const unsigned* block, void* stream);

// Launches with an empty body, for the limits.
const char* selftest_empty(const unsigned* grid, const unsigned* block, size_t shared_bytes, void* stream);
// Faults, each of which has to end in an error: two barriers in two branches; half a warp missing at a
// shuffle, having exited or waiting elsewhere; a shuffle past the end of the block; a read of a lane outside
// the mask; __trap. The last three, accesses beyond static and dynamic shared memory and beyond a local
// array, are for AddressSanitizer.
enum SelftestFault {
    two_barriers,
    lanes_exited,
    lanes_elsewhere,
    lanes_absent,
    lane_outside_mask,
    trap,
    beyond_static,
    beyond_dynamic,
    beyond_local
};
const char* selftest_fault(int fault, int* out, void* stream);
// out[i] = shared memory that nobody wrote, static then dynamic, n floats each.
const char* selftest_unwritten(float* out, int n, void* stream);
}
#pragma GCC visibility pop
