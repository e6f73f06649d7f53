// patch_split and patch_merge on CUDA: one pass, one thread per few vectors of a patch.
//
// Shapes: T1 is N16 D1024 32x32 fp32, grid 4x4: 64 MiB in, 64 MiB out; the floor is a plain copy.
// Mapping: a patch is one contiguous run of memory (planes x patch_height rows of patch_row_bytes), so a
// block takes a patch (blockIdx.y) and a chunk of that run (blockIdx.x): patch-side accesses are perfectly
// coalesced, and image-side ones are in pieces of patch_row_bytes, which neighbouring blocks complete to
// whole cache lines in L2. Walking the image instead would only move the same pieces to the writing side.
// Every division is by a number known at launch (Divisor): two multiplications find a vector's row, two more
// a block's patch, against 32 bytes moved. A vector is as wide as all addresses allow, 16 bytes down to 1
// (odd widths in NCHW, odd slices); kUnroll loads are in flight per thread before the first store.
#include <algorithm>

#include "launch.h"
#include "patch/math.h"

namespace wsss::patch {
namespace {

constexpr int kUnroll = 4;
constexpr int kMaxThreads = 256;
constexpr int64_t kMaxVectors =
    (int64_t{1} << 31) - 2 * kUnroll * kMaxThreads;  // per launch and patch, for Divisor
constexpr int64_t kMaxGridY = 65535;

struct Divisors {
    Divisor row_vectors, patch_height, grid_w, grid_h;
};

template <class Vector, bool kSplit>
__global__ void __launch_bounds__(kMaxThreads)
    copy_patches(Params p, Divisors by, uint32_t patches, uint32_t first_row, uint32_t vectors) {
    const uint32_t first = blockIdx.x * (kUnroll * blockDim.x) + threadIdx.x;
    const int64_t patch_bytes = p.planes * p.patch_height * p.patch_row_bytes;
    for (uint32_t patch = blockIdx.y; patch < patches; patch += gridDim.y) {
        const uint32_t band = by.grid_w.quotient(patch);
        const uint32_t grid_column = by.grid_w.remainder(patch, band);
        const uint32_t image = by.grid_h.quotient(band);
        const uint32_t grid_row = by.grid_h.remainder(band, image);

        Vector values[kUnroll];
        const char* from[kUnroll];
        char* to[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            const uint32_t vector = first + i * blockDim.x;
            const uint32_t chunk_row = by.row_vectors.quotient(vector);
            const int64_t column =
                static_cast<int64_t>(sizeof(Vector)) * by.row_vectors.remainder(vector, chunk_row);
            const uint32_t row = first_row + chunk_row;
            const uint32_t plane = by.patch_height.quotient(row);
            const Row at =
                locate(p, image, grid_row, grid_column, plane, by.patch_height.remainder(row, plane));
            const bool inside = vector < vectors && column < at.bytes;
            const int64_t in_patches = patch * patch_bytes + row * p.patch_row_bytes + column;
            const int64_t in_image = at.image_offset + column;
            from[i] = inside ? p.from + (kSplit ? in_image : in_patches) : nullptr;
            to[i] =
                vector < vectors && (kSplit || inside) ? p.to + (kSplit ? in_patches : in_image) : nullptr;
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            values[i] = from[i] != nullptr ? *reinterpret_cast<const Vector*>(from[i]) : Vector{};
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) {
            if (to[i] != nullptr) *reinterpret_cast<Vector*>(to[i]) = values[i];
        }
    }
}

template <class Vector, bool kSplit>
void run_with(const Params& p, const Where& where) {
    const int64_t patches = p.images * p.grid_h * p.grid_w;
    const int64_t rows = p.planes * p.patch_height;
    const int64_t row_vectors = p.patch_row_bytes / static_cast<int64_t>(sizeof(Vector));
    const auto divisor = [](int64_t number) { return Divisor(static_cast<uint32_t>(number)); };
    const Divisors by{divisor(row_vectors), divisor(p.patch_height), divisor(p.grid_w), divisor(p.grid_h)};
    const int64_t rows_per_launch = std::max<int64_t>(1, kMaxVectors / row_vectors);
    for (int64_t first_row = 0; first_row < rows; first_row += rows_per_launch) {
        const int64_t vectors = row_vectors * std::min(rows_per_launch, rows - first_row);
        const int64_t threads =
            std::clamp<int64_t>(ceil_div<int64_t>(vectors, kUnroll * 32) * 32, 32, kMaxThreads);
        const dim3 grid(static_cast<unsigned>(ceil_div(vectors, kUnroll * threads)),
                        static_cast<unsigned>(std::min(patches, kMaxGridY)));
        launch(copy_patches<Vector, kSplit>, grid, dim3(static_cast<unsigned>(threads)), 0, where.stream, p,
               by, static_cast<uint32_t>(patches), static_cast<uint32_t>(first_row),
               static_cast<uint32_t>(vectors));
    }
}

template <bool kSplit>
void run(const Params& p, const Where& where) {
    // The widest vector that divides every address: any set bit below 16 rules out the wider ones.
    const uint64_t bits = reinterpret_cast<uintptr_t>(p.from) | reinterpret_cast<uintptr_t>(p.to) |
                          static_cast<uint64_t>(p.row_bytes | p.patch_row_bytes | p.image_stride |
                                                p.plane_stride | p.row_stride);
    if (bits % 16 == 0) return run_with<uint4, kSplit>(p, where);
    if (bits % 8 == 0) return run_with<uint2, kSplit>(p, where);
    if (bits % 4 == 0) return run_with<uint32_t, kSplit>(p, where);
    if (bits % 2 == 0) return run_with<uint16_t, kSplit>(p, where);
    run_with<uint8_t, kSplit>(p, where);
}

}  // namespace

void split(const Params& p, const Where& where) { run<true>(p, where); }
void merge(const Params& p, const Where& where) { run<false>(p, where); }

}  // namespace wsss::patch
