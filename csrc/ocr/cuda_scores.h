// A pixel's scores on CUDA: where they come from, and how the classes of each group are walked.
#pragma once

#include <type_traits>

#include "ocr/cuda_block.h"

namespace wsss::ocr {
namespace {

// The number of class c, from the first class's; bytes: from one class's to the next one's.
template <class T>
__device__ T* step(T* first, int c, uint64_t bytes) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + static_cast<uint32_t>(c) * bytes);
}

// Where scores come from: the tensor, shared memory, or four numbers of the tensor each.
template <class T>
struct FromMemory {
    const T* first;
    uint64_t bytes;  // to the next class
    __device__ wide<T> get(int c) const { return static_cast<wide<T>>(*step(first, c, bytes)); }
};

template <class W>
struct FromStage {
    const W* first;
    __device__ W get(int c) const { return first[c]; }
};

template <class T>
struct Resized {
    const T* corner;
    uint64_t bytes;  // to the next class
    int64_t across, down;
    wide<T> below, right;

    __device__ Resized(const T* image, const Strides& strides, const Axes<wide<T>>& axes, const Place& place,
                       uint64_t step)
        : bytes(step) {
        const Tap<wide<T>> row = axes.y.at(place.y), column = axes.x.at(place.x);
        corner = image + row.index * strides.y + column.index * strides.x;
        across = column.index + 1 < axes.x.size ? strides.x : 0;
        down = row.index + 1 < axes.y.size ? strides.y : 0;
        below = row.fraction;
        right = column.fraction;
    }
    __device__ wide<T> get(int c) const {
        const T* const first = step(corner, c, bytes);
        const auto read = [&](int64_t offset) { return static_cast<wide<T>>(first[offset]); };
        const wide<T> upper = read(0) * (1 - right) + read(across) * right;
        const wide<T> lower = read(down) * (1 - right) + read(down + across) * right;
        return upper * (1 - below) + lower * below;
    }
};

// Scores of a few classes of one group, whose reads are all under way at once. Those of kWhole classes are
// all there; a walk's last ones come in batches that may not be full, and class 0 takes the other places:
// read once more, without branches around the reads and their addresses.
constexpr int kWhole = 8, kRest = 4;

template <class W, int kCount>
struct Batch {
    static constexpr int kSize = kCount;
    int first, count;  // in its group; how many are there
    int classes[kCount];
    W scores[kCount];

    __device__ bool has(int i) const { return kCount == kWhole || i < count; }
};

// The classes of a block's image in shared memory, ascending: a list of those not tagged, one of the tagged.
class Classes {
  public:
    static size_t shared_bytes(int64_t classes) {
        return sizeof(int) * static_cast<size_t>(length(classes) + ceil_div<int64_t>(classes, 32));
    }

    // All threads call this.
    __device__ Classes(const bool* tags, int classes, void* shared) : list_(static_cast<int*>(shared)) {
        auto* const words = reinterpret_cast<unsigned*>(list_ + length(classes));  // bit c: whether tagged
        const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
        const int lane = thread % 32, count = (classes + 31) / 32;
        for (int i = thread; i < length(classes); i += threads) list_[i] = 0;
        for (int word = thread / 32; word < count; word += threads / 32) {
            const int c = word * 32 + lane;
            const unsigned bits = __ballot_sync(0xffffffffu, c < classes && tags[c]);
            if (lane == 0) words[word] = bits;
        }
        __syncthreads();
        inside_count_ = 0;
#pragma unroll 1
        for (int word = 0; word < count; ++word) inside_count_ += __popc(words[word]);
        outside_count_ = classes - inside_count_;
        int before = 0;  // tagged ones in the words before c's
        for (int c = thread, word = 0; c < classes; c += threads) {
#pragma unroll 1
            for (; word < c / 32; ++word) before += __popc(words[word]);
            const int tagged = before + __popc(words[word] & ((1u << lane) - 1));
            const bool inside = (words[word] >> lane & 1) != 0;
            list_[inside ? padded(outside_count_) + tagged : c - tagged] = c;
        }
        __syncthreads();
    }
    __device__ bool any_inside() const { return inside_count_ > 0; }
    __device__ int outside(int i) const { return list_[i]; }

    // body(Batch) for all classes of a group.
    template <class W, class Source, class Body>
    __device__ void each_outside(const Source& source, const Body& body) const {
        each<W>(list_, outside_count_, source, body);
    }
    template <class W, class Source, class Body>
    __device__ void each_inside(const Source& source, const Body& body) const {
        each<W>(list_ + padded(outside_count_), inside_count_, source, body);
    }

  private:
    struct alignas(16) Four {
        int classes[4];
    };
    WSSS_HOST_DEVICE static int padded(int count) { return (count + 3) / 4 * 4; }
    WSSS_HOST_DEVICE static int length(int64_t classes) { return static_cast<int>((classes + 6) / 4 * 4); }

    template <class W, class Source, class Body>
    __device__ static void each(const int* list, int count, const Source& source, const Body& body) {
        int first = 0;
#pragma unroll 1
        for (; first + kWhole <= count; first += kWhole) {
            body(read<W, kWhole>(list, first, kWhole, source));
        }
#pragma unroll 1
        for (; first < count; first += kRest) {
            body(read<W, kRest>(list, first, count - first, source));
        }
    }
    template <class W, int kCount, class Source>
    __device__ static Batch<W, kCount> read(const int* list, int first, int count, const Source& source) {
        Batch<W, kCount> batch;
        batch.first = first;
        batch.count = count;
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
            const Four four = *reinterpret_cast<const Four*>(list + first + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) batch.classes[i + j] = four.classes[j];
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) batch.scores[i] = source.get(batch.classes[i]);
        return batch;
    }

    int* list_;
    int outside_count_, inside_count_;
};

// A pixel's scores, fetched each time they are walked.
template <class W, class Source>
struct Scores {
    const Classes& classes;
    Source source;

    __device__ W at(int c) const { return source.get(c); }
    template <class Body>
    __device__ void each_outside(const Body& body) const {
        classes.each_outside<W>(source, body);
    }
    template <class Body>
    __device__ void each_inside(const Body& body) const {
        classes.each_inside<W>(source, body);
    }
};

}  // namespace
}  // namespace wsss::ocr
