// patch_split and patch_merge on the CPU: one pass, rows of the image in memory order.
//
// Traffic: the tensor is read once and written once, the floor is a plain copy. Walking the image row by row,
// and the grid's columns within a row, reads the image as one stream and writes grid_w streams, each
// sequential (a split; a merge the other way round). Walking patch by patch would visit every cache line of
// an NCHW image once per grid column that shares it.
#include <omp.h>

#include <cstring>

#include "patch/math.h"

namespace wsss::patch::WSSS_LEVEL {
namespace {

template <int64_t kVector>
WSSS_HOST_DEVICE void copy_vectors(char* to, const char* from, int64_t bytes) {
    for (int64_t i = 0; i + kVector < bytes; i += kVector) std::memcpy(to + i, from + i, kVector);
    std::memcpy(to + bytes - kVector, from + bytes - kVector, kVector);  // may overlap the one before
}

// The rows of NCHW patches are a few vectors long, where a call to memcpy would cost more than the copy.
WSSS_HOST_DEVICE void copy_row(char* to, const char* from, int64_t bytes) {
    if (bytes < 16 || bytes > 512) {
        std::memcpy(to, from, static_cast<size_t>(bytes));
    } else if (bytes < 32) {
        copy_vectors<16>(to, from, bytes);
    } else if (bytes < 64) {
        copy_vectors<32>(to, from, bytes);
    } else {
        copy_vectors<64>(to, from, bytes);
    }
}

template <bool kSplit>
void run(const Params& p, const Where& where) {
    const int64_t band = p.grid_h * p.planes * p.patch_height;  // rows of patches per image and grid column
    const int64_t rows = p.images * band;
    const int64_t patch_bytes = p.planes * p.patch_height * p.patch_row_bytes;
    const bool worth_threads = rows * p.grid_w * p.patch_row_bytes >= (64 << 10);

#pragma omp parallel num_threads(worth_threads ? where.threads : 1)
    {
        // A contiguous share of the rows for each thread, walked by carrying instead of dividing.
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const int64_t begin = rows * thread / threads, end = rows * (thread + 1) / threads;
        int64_t y = begin % p.patch_height;
        int64_t plane = begin / p.patch_height % p.planes;
        int64_t grid_row = begin / (p.patch_height * p.planes) % p.grid_h;
        int64_t image = begin / band;
        for (int64_t row = begin; row < end; ++row) {
            int64_t patch = (image * p.grid_h + grid_row) * p.grid_w * patch_bytes +
                            (plane * p.patch_height + y) * p.patch_row_bytes;
            for (int64_t column = 0; column < p.grid_w; ++column, patch += patch_bytes) {
                const Row at = locate(p, image, grid_row, column, plane, y);
                if (kSplit) {
                    copy_row(p.to + patch, p.from + at.image_offset, at.bytes);
                    std::memset(p.to + patch + at.bytes, 0,
                                static_cast<size_t>(p.patch_row_bytes - at.bytes));
                } else {
                    copy_row(p.to + at.image_offset, p.from + patch, at.bytes);
                }
            }
            if (++y < p.patch_height) continue;
            y = 0;
            if (++plane < p.planes) continue;
            plane = 0;
            if (++grid_row < p.grid_h) continue;
            grid_row = 0;
            ++image;
        }
    }
}

}  // namespace

void split(const Params& p, const Where& where) { run<true>(p, where); }
void merge(const Params& p, const Where& where) { run<false>(p, where); }

}  // namespace wsss::patch::WSSS_LEVEL
