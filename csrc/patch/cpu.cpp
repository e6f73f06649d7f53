// patch_split and patch_merge on the CPU: one pass, planes of the image in memory order.
//
// Traffic: the tensor is read once and written once; the floor is a plain copy. Within a band (the rows of an
// image's plane that one row of patches shares) the work goes column by column: the patch's side is then a
// run of patch_height rows, the image's side a few rows that stay in the first-level cache. T1c (N8 D512
// 32x32, grid 4x4, NCHW, rows of 32 bytes), two threads, as multiples of a copy's time: split 1.11,
// merge 1.15. Tried: without prefetching, 1.28 and 1.27; row by row, 1.2 and 1.5; eight loads before eight
// stores, 1.4 and 1.2; all planes of a row of patches before the next, 2.2 (each page of the image is visited
// once per row of patches); stores past the caches, 0.9 to 1.4 and 1.8.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "cpu_threads.h"
#include "patch/math.h"

namespace wsss::patch::WSSS_LEVEL {
namespace {

// How to copy a row, by its length: the rows of NCHW patches are a few vectors long, where a call to memcpy
// costs more than the copy. Whole is for rows of just kVector bytes, the common case (8 or 16 pixels), Longer
// for rows of at least kVector bytes, Any for all. A merge fills kColumns columns together, so that a cache
// line is written at once; kPrefetch bytes a row are asked for ahead.
template <int64_t kVector>
struct Whole {
    static constexpr int64_t kColumns = 64 / kVector, kPrefetch = kVector;
    static WSSS_HOST_DEVICE void copy(char* to, const char* from, int64_t) { std::memcpy(to, from, kVector); }
};
template <int64_t kVector>
struct Longer {
    static constexpr int64_t kColumns = 1, kPrefetch = kVector;
    static WSSS_HOST_DEVICE void copy(char* to, const char* from, int64_t bytes) {
        for (int64_t i = 0; i + kVector < bytes; i += kVector) std::memcpy(to + i, from + i, kVector);
        std::memcpy(to + bytes - kVector, from + bytes - kVector, kVector);  // may overlap the one before
    }
};
struct Any {
    static constexpr int64_t kColumns = 1, kPrefetch = 0;
    static WSSS_HOST_DEVICE void copy(char* to, const char* from, int64_t bytes) {
        std::memcpy(to, from, static_cast<size_t>(bytes));
    }
};

// Hardware follows neither the columns of a band nor a stream per patch; these distances measured best.
constexpr int64_t kSplitAhead = 8192, kMergeAhead = 1024;

WSSS_HOST_DEVICE void prefetch(const char* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

void zero(char* to, int64_t bytes) {
    if (bytes > 0) std::memset(to, 0, static_cast<size_t>(bytes));
}

template <bool kSplit, class Rows>
void copy_patches(const Params& p, const Where& where) {
    const int64_t patch_bytes = p.planes * p.patch_height * p.patch_row_bytes;
    const int64_t whole_columns = std::min(p.grid_w, p.row_bytes / p.patch_row_bytes);
    constexpr int64_t kTogether = kSplit ? 1 : Rows::kColumns;
    const int64_t bands = p.images * p.planes * p.grid_h;
    const int wanted = count_threads(bands * p.grid_w * p.patch_height * p.patch_row_bytes / 4, where);
    // Bands are cut into pieces where there are too few to keep threads busy (channels_last has one plane).
    const int64_t piece_rows =
        std::max<int64_t>(1, std::min(p.patch_height, bands * p.patch_height / (4 * wanted)));
    const int64_t pieces = ceil_div(p.patch_height, piece_rows);

#pragma omp parallel num_threads(wanted)
    {
        // A contiguous share of the pieces for each thread, walked by carrying instead of dividing.
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const int64_t begin = bands * pieces * thread / threads,
                      end = bands * pieces * (thread + 1) / threads;
        int64_t piece = begin % pieces;
        int64_t grid_row = begin / pieces % p.grid_h;
        int64_t plane = begin / (pieces * p.grid_h) % p.planes;
        int64_t image = begin / (pieces * p.grid_h * p.planes);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = piece * piece_rows, last = std::min(first + piece_rows, p.patch_height);
            const Row at = locate(p, image, grid_row, 0, plane, first);
            const int64_t inside =
                std::clamp<int64_t>(p.height - (grid_row * p.patch_height + first), 0, last - first);
            int64_t patch = (image * p.grid_h + grid_row) * p.grid_w * patch_bytes +
                            (plane * p.patch_height + first) * p.patch_row_bytes;
            int64_t left = at.image_offset;
            if (kSplit) prefetch(p.from + left + kSplitAhead, Rows::kPrefetch * inside * p.grid_w);
            int64_t column = 0;
            for (; column + kTogether <= whole_columns; column += kTogether) {
                for (int64_t c = 0; !kSplit && c < kTogether; ++c) {
                    prefetch(p.from + patch + c * patch_bytes + kMergeAhead, Rows::kPrefetch * inside);
                }
                for (int64_t y = 0; y < inside; ++y) {
                    for (int64_t c = 0; c < kTogether; ++c) {
                        const int64_t in_image = left + y * p.row_stride + c * p.patch_row_bytes;
                        const int64_t in_patches = patch + c * patch_bytes + y * p.patch_row_bytes;
                        Rows::copy(p.to + (kSplit ? in_patches : in_image),
                                   p.from + (kSplit ? in_image : in_patches), p.patch_row_bytes);
                    }
                }
                patch += kTogether * patch_bytes;
                left += kTogether * p.patch_row_bytes;
            }
            for (; column < p.grid_w; ++column, patch += patch_bytes, left += p.patch_row_bytes) {
                const int64_t bytes = locate(p, image, grid_row, column, plane, first).bytes;
                for (int64_t y = 0; y < inside; ++y) {
                    const int64_t in_image = left + y * p.row_stride;
                    const int64_t in_patches = patch + y * p.patch_row_bytes;
                    Any::copy(p.to + (kSplit ? in_patches : in_image),
                              p.from + (kSplit ? in_image : in_patches), bytes);
                    if (kSplit) zero(p.to + in_patches + bytes, p.patch_row_bytes - bytes);
                }
            }
            for (int64_t c = 1; kSplit && c <= p.grid_w; ++c) {  // the patches' rows below the image
                zero(p.to + patch - c * patch_bytes + inside * p.patch_row_bytes,
                     (last - first - inside) * p.patch_row_bytes);
            }
            if (++piece < pieces) continue;
            piece = 0;
            if (++grid_row < p.grid_h) continue;
            grid_row = 0;
            if (++plane < p.planes) continue;
            plane = 0;
            ++image;
        }
    }
}

template <bool kSplit>
void run(const Params& p, const Where& where) {
    const int64_t bytes = p.patch_row_bytes;
    if (bytes == 16) return copy_patches<kSplit, Whole<16>>(p, where);
    if (bytes == 32) return copy_patches<kSplit, Whole<32>>(p, where);
    if (bytes == 64) return copy_patches<kSplit, Whole<64>>(p, where);
    if (bytes < 16 || bytes > 1024) return copy_patches<kSplit, Any>(p, where);
    if (bytes < 32) return copy_patches<kSplit, Longer<16>>(p, where);
    if (bytes < 64) return copy_patches<kSplit, Longer<32>>(p, where);
    copy_patches<kSplit, Longer<64>>(p, where);
}

}  // namespace

void split(const Params& p, const Where& where) { run<true>(p, where); }
void merge(const Params& p, const Where& where) { run<false>(p, where); }

}  // namespace wsss::patch::WSSS_LEVEL
