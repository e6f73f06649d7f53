// Runs one kernel launch: a fiber for each thread of a block, block after block, and where threads meet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "vector_types.h"

// The running thread's. Constant to kernels, as in CUDA; the engine sets them at every switch.
#if !defined(WSSS_EMULATION_ENGINE)
extern const uint3 threadIdx;
extern const uint3 blockIdx;
extern const dim3 blockDim;
extern const dim3 gridDim;
#endif
constexpr int warpSize = 32;

namespace wsss::emulation {

struct Launch {
    const void* kernel;
    dim3 grid;
    dim3 block;
    size_t shared_bytes;
};

// Runs `thread` once per thread of the launch on the calling OS thread. Throws std::runtime_error for a
// launch that no GPU would accept, for threads that wait for what cannot come and for accesses that a check
// refuses; the memory is then left as the threads left it.
void run(const Launch& launch, const std::function<void()>& thread);

// Every launch from here on draws its schedule from seed and the number of launches since. 0 at first.
void set_seed(uint64_t seed);

void* dynamic_shared();

// A line of a kernel. As a default argument, `Site site = Site::here()` is the line of the call.
struct Site {
    const char* file = "";
    int line = 0;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// End the launch with an error that names kernel, block, thread and where in its code that was.
[[noreturn]] void fail(const std::string& what, const std::string& where);
[[noreturn]] void fail(const std::string& what, Site site);

// Waits for every thread of the block that has not exited. All must come to the same line.
struct Count {
    int yes;
    int all;
};
Count meet_block(const char* operation, bool predicate, Site site);

// Waits for the lanes of mask, each of which must come to the same line with the same mask, and returns what
// they brought; to be read before the next meeting. Lanes that have exited, or that the block does not have,
// are an error. (CUDA lets a mask name exited lanes as long as nothing is read from them; code that does so
// works by luck more often than by design.) only_waits is for __syncwarp, which exchanges nothing: there
// lanes may come from different lines, and those that are gone are not waited for.
struct Exchange {
    const char* operation = "";
    unsigned mask = 0;
    Site site;
    bool only_waits = false;
    bool open = false;     // lanes may still come
    unsigned arrived = 0;  // lanes that have come
    int users = 0;         // lanes that have come and not yet gone on
    uint64_t values[warpSize];
};
const Exchange& meet_warp(const char* operation, unsigned mask, uint64_t value, Site site,
                          bool only_waits = false);

int lane();
unsigned lanes_not_exited();

// What the checks of single accesses (accesses.cpp, undefined.cpp) need to know of the thread that runs.
struct Running {
    unsigned thread = 0;       // within the block, x fastest
    unsigned barriers = 0;     // that the block has passed
    uint64_t block = 0;        // counts blocks since the program began, in the order in which they ran
    bool copies_late = false;  // of the block: asynchronous copies happen at the wait, not at once
    unsigned accesses = 0;     // that the thread has made since it last met others
    const char* stack_begin = nullptr;  // the thread's own
    const char* stack_end = nullptr;

    bool stack_holds(const void* address) const { return address >= stack_begin && address < stack_end; }
    // Whether the caller is code of a kernel, rather than of a launch, perhaps on another OS thread.
    __attribute__((always_inline)) bool is_caller() const { return stack_holds(__builtin_frame_address(0)); }
};
extern Running running;

// "thread (3, 0, 0)" of the launch that runs, with "of block (1, 0, 0)" where that is not the running one.
std::string thread_name(unsigned thread, uint64_t block);

}  // namespace wsss::emulation
