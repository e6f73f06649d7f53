// The deformable convolution's samples on the CPU, for whatever instruction set this file is compiled for.
//
// D3 (N2 C256 32x32 3x3, fp32): 18432 samples of 256 channels, 19 MB of columns written, four rows of 1 KB
// read for each from 2 MB that the caches hold; the product beside it takes 5 ms on two cores.
// Mapping: a thread takes output pixels; coordinates and weights once per sample, then all its channels in
// vectors. The input's gradient is split over images and slices of channels instead, so that no two threads
// add to the same number and the order of additions never changes: it is deterministic without atomics.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "deform/math.h"

namespace wsss::deform::WSSS_LEVEL {
namespace {

constexpr int64_t kFewNumbers = 1 << 14;  // not worth a second thread

// The corners of a sample that lie in the image.
template <class T>
struct Corners {
    int count = 0;
    int which[4];
    T* row[4];

    // base: the first channel of image 0, pixel (0, 0).
    template <class W>
    Corners(const Sample<W>& sample, T* base, const Strides& strides) {
        T* const first = base + sample.image * strides.image + sample.y * strides.y + sample.x * strides.x;
        for (int corner = 0; corner < 4; ++corner) {
            if ((sample.inside >> corner & 1) == 0) continue;
            which[count] = corner;
            row[count++] = first + (corner >> 1) * strides.y + (corner & 1) * strides.x;
        }
    }
};

// A run of channels that is dense in the input and in the columns: one per sample, or more where a group of
// the weight ends within an offset group.
struct Run {
    int64_t channel, column, length;
};

Run find_run(const Shape& s, int64_t tap, int64_t channel, int64_t end) {
    const int64_t width = s.channels / s.groups;
    const int64_t group = channel / width;
    return {channel, column_of(s, tap, channel, group), std::min(end, (group + 1) * width) - channel};
}

// The loops over channels, for a known number of corners.
template <int kCount, class T, class W>
void blend(T* to, const Corners<const T>& corners, const W* weight, int64_t begin, int64_t length) {
#pragma omp simd
    for (int64_t c = 0; c < length; ++c) {
        W sum = 0;
        for (int i = 0; i < kCount; ++i) sum += weight[i] * static_cast<W>(corners.row[i][begin + c]);
        to[c] = T(sum);
    }
}

template <int kCount, class T, class W>
void multiply(W* sums, const Corners<const T>& corners, const T* gradient, int64_t begin, int64_t length) {
    W sum[4] = {};
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < length; ++c) {
        const W factor = static_cast<W>(gradient[c]);
        for (int i = 0; i < kCount; ++i) sum[i] += factor * static_cast<W>(corners.row[i][begin + c]);
    }
    for (int i = 0; i < kCount; ++i) sums[i] += sum[i];
}

template <int kCount, class T, class W>
void scatter(const Corners<W>& corners, const W* weight, const T* gradient, int64_t begin, int64_t length) {
#pragma omp simd
    for (int64_t c = 0; c < length; ++c) {
        const W factor = static_cast<W>(gradient[c]);
        for (int i = 0; i < kCount; ++i) corners.row[i][begin + c] += weight[i] * factor;
    }
}

// Calls body(place, sample, tap) for each sample of an output pixel.
template <class W, class Body>
WSSS_HOST_DEVICE void for_each_sample(const Params& p, int64_t pixel, const Body& body) {
    const Shape& s = p.shape;
    Place at{};
    at.x = pixel % s.out_width;
    at.y = pixel / s.out_width % s.out_height;
    at.image = pixel / (s.out_width * s.out_height);
    for (at.group = 0; at.group < s.offset_groups; ++at.group) {
        for (at.tap_y = 0; at.tap_y < s.kernel_h; ++at.tap_y) {
            for (at.tap_x = 0; at.tap_x < s.kernel_w; ++at.tap_x) {
                body(at, find_sample<W>(p, at), at.tap_y * s.kernel_w + at.tap_x);
            }
        }
    }
}

template <class T>
void sample_all(const Params& p, const Where& where) {
    using W = wide<T>;
    const Shape& s = p.shape;
    const int64_t group_channels = s.channels / s.offset_groups;
    const int64_t row = s.kernel_h * s.kernel_w * s.channels;
    const auto* const input = static_cast<const T*>(p.input);
#pragma omp parallel for schedule(static) num_threads(p.count* row < kFewNumbers ? 1 : where.threads)
    for (int64_t i = 0; i < p.count; ++i) {
        T* const columns = static_cast<T*>(p.columns) + i * row;
        for_each_sample<W>(p, p.first + i, [&](const Place& at, const Sample<W>& sample, int64_t tap) {
            const Corners<const T> corners(sample, input, p.input_strides);
            W weight[4];
            for (int j = 0; j < corners.count; ++j) weight[j] = sample.mask * sample.weight(corners.which[j]);
            const int64_t end = (at.group + 1) * group_channels;
            for (int64_t channel = at.group * group_channels; channel < end;) {
                const Run run = find_run(s, tap, channel, end);
                T* const to = columns + run.column;
                switch (corners.count) {
                    case 0:
                        std::memset(static_cast<void*>(to), 0, run.length * sizeof(T));
                        break;
                    case 1:
                        blend<1>(to, corners, weight, channel, run.length);
                        break;
                    case 2:
                        blend<2>(to, corners, weight, channel, run.length);
                        break;
                    case 3:
                        blend<3>(to, corners, weight, channel, run.length);
                        break;
                    default:
                        blend<4>(to, corners, weight, channel, run.length);
                }
                channel += run.length;
            }
        });
    }
}

template <class T>
void differentiate_samples(const Params& p, const Where& where) {
    using W = wide<T>;
    const Shape& s = p.shape;
    const int64_t group_channels = s.channels / s.offset_groups;
    const int64_t row = s.kernel_h * s.kernel_w * s.channels;
    const auto* const input = static_cast<const T*>(p.input);
#pragma omp parallel for schedule(static) num_threads(p.count* row < kFewNumbers ? 1 : where.threads)
    for (int64_t i = 0; i < p.count; ++i) {
        const T* const columns = static_cast<const T*>(p.columns) + i * row;
        for_each_sample<W>(p, p.first + i, [&](const Place& at, const Sample<W>& sample, int64_t tap) {
            const Corners<const T> corners(sample, input, p.input_strides);
            W sums[4] = {};  // over channels, of the gradient times the corner
            const int64_t end = (at.group + 1) * group_channels;
            for (int64_t channel = at.group * group_channels; channel < end;) {
                const Run run = find_run(s, tap, channel, end);
                const T* const gradient = columns + run.column;
                switch (corners.count) {
                    case 1:
                        multiply<1>(sums, corners, gradient, channel, run.length);
                        break;
                    case 2:
                        multiply<2>(sums, corners, gradient, channel, run.length);
                        break;
                    case 3:
                        multiply<3>(sums, corners, gradient, channel, run.length);
                        break;
                    case 4:
                        multiply<4>(sums, corners, gradient, channel, run.length);
                        break;
                    default:
                        break;
                }
                channel += run.length;
            }
            W by_y = 0, by_x = 0, by_mask = 0;
            for (int j = 0; j < corners.count; ++j) {
                by_y += sample.weight_y(corners.which[j]) * sums[j];
                by_x += sample.weight_x(corners.which[j]) * sums[j];
                by_mask += sample.weight(corners.which[j]) * sums[j];
            }
            write_gradients(p, at, sample.mask * by_y, sample.mask * by_x, by_mask);
        });
    }
}

template <class T>
void differentiate_input(const Params& p, const Where& where) {
    using W = wide<T>;
    const Shape& s = p.shape;
    const int64_t group_channels = s.channels / s.offset_groups;
    const int64_t row = s.kernel_h * s.kernel_w * s.channels;
    const Strides strides{s.height * s.width * s.channels, 1, s.width * s.channels, s.channels};
    const int64_t pixels = s.out_height * s.out_width;
    const int64_t first_image = p.first / pixels, images = (p.first + p.count - 1) / pixels + 1 - first_image;
    // More slices than threads even them out; a slice is at least two cache lines wide.
    const int threads = p.count * row < kFewNumbers ? 1 : where.threads;
    const int64_t slices =
        std::clamp<int64_t>(ceil_div<int64_t>(4 * threads, images), 1, std::max<int64_t>(1, s.channels / 32));
#pragma omp parallel for schedule(dynamic) num_threads(threads) collapse(2)
    for (int64_t image = first_image; image < first_image + images; ++image) {
        for (int64_t slice = 0; slice < slices; ++slice) {
            const int64_t slice_begin = s.channels * slice / slices;
            const int64_t slice_end = s.channels * (slice + 1) / slices;
            const int64_t begin = std::max(p.first, image * pixels);
            const int64_t end = std::min(p.first + p.count, (image + 1) * pixels);
            for (int64_t pixel = begin; pixel < end; ++pixel) {
                const T* const columns = static_cast<const T*>(p.columns) + (pixel - p.first) * row;
                for_each_sample<W>(p, pixel, [&](const Place& at, const Sample<W>& sample, int64_t tap) {
                    const Corners<W> corners(sample, static_cast<W*>(p.input_gradient), strides);
                    W weight[4];
                    for (int j = 0; j < corners.count; ++j) {
                        weight[j] = sample.mask * sample.weight(corners.which[j]);
                    }
                    const int64_t stop = std::min(slice_end, (at.group + 1) * group_channels);
                    for (int64_t channel = std::max(slice_begin, at.group * group_channels);
                         channel < stop;) {
                        const Run run = find_run(s, tap, channel, stop);
                        const T* const gradient = columns + run.column;
                        switch (corners.count) {
                            case 1:
                                scatter<1>(corners, weight, gradient, channel, run.length);
                                break;
                            case 2:
                                scatter<2>(corners, weight, gradient, channel, run.length);
                                break;
                            case 3:
                                scatter<3>(corners, weight, gradient, channel, run.length);
                                break;
                            case 4:
                                scatter<4>(corners, weight, gradient, channel, run.length);
                                break;
                            default:
                                break;
                        }
                        channel += run.length;
                    }
                });
            }
        }
    }
}

template <class T>
void differentiate_all(const Params& p, const Where& where) {
    if (p.offset_gradient != nullptr || p.mask_gradient != nullptr) differentiate_samples<T>(p, where);
    if (p.input_gradient != nullptr) differentiate_input<T>(p, where);
}

}  // namespace

void sample(const Params& p, const Where& where) {
    switch (p.dtype) {
        case DType::kFloat64:
            return sample_all<double>(p, where);
        case DType::kFloat32:
            return sample_all<float>(p, where);
        case DType::kFloat16:
            return sample_all<Float16>(p, where);
        case DType::kBFloat16:
            return sample_all<BFloat16>(p, where);
    }
}

void differentiate(const Params& p, const Where& where) {
    switch (p.dtype) {
        case DType::kFloat64:
            return differentiate_all<double>(p, where);
        case DType::kFloat32:
            return differentiate_all<float>(p, where);
        case DType::kFloat16:
            return differentiate_all<Float16>(p, where);
        case DType::kBFloat16:
            return differentiate_all<BFloat16>(p, where);
    }
}

}  // namespace wsss::deform::WSSS_LEVEL
