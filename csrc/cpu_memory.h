// Scratch memory for the CPU sources, which can use no container of the standard library: the members that
// the compiler does not inline would be one symbol for all instruction sets. Included by cpu.cpp files alone.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace wsss {
namespace {

constexpr int64_t kLineBytes = 64;

template <class N>
constexpr int64_t bytes_for(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(N)) + kLineBytes - 1) / kLineBytes * kLineBytes;
}

// Hands out arrays, each on cache lines of its own, that take bytes_for(count).
class Arena {
  public:
    explicit Arena(char* next) : next_(next) {}

    template <class N>
    N* take(int64_t count) {
        char* const taken = next_;
        next_ += bytes_for<N>(count);
        return reinterpret_cast<N*>(taken);
    }

  private:
    char* next_;
};

class Memory {  // zeros
  public:
    Memory(int64_t arenas, int64_t bytes)
        : bytes_(bytes), data_(static_cast<char*>(std::aligned_alloc(kLineBytes, size(arenas * bytes)))) {
        if (data_ == nullptr) throw std::bad_alloc();
        std::memset(data_, 0, size(arenas * bytes));
    }
    ~Memory() { std::free(data_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    Arena arena(int64_t i) const { return Arena(data_ + i * bytes_); }

  private:
    static size_t size(int64_t bytes) { return static_cast<size_t>(bytes_for<char>(bytes)); }
    int64_t bytes_;
    char* data_;
};

}  // namespace
}  // namespace wsss
