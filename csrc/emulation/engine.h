// Runs one kernel launch: a fiber for each thread of a block, block after block, and the places where threads
// meet.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "vector_types.h"

// The running thread's; the engine sets them at every switch.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

namespace wsss::emulation {

struct Launch {
    const void* kernel;
    dim3 grid;
    dim3 block;
    size_t shared_bytes;
};

// Runs `thread` once per thread of the launch on the calling OS thread. Throws std::runtime_error for a
// launch that no GPU would accept and for threads that wait for what cannot come; the memory is then left as
// the threads left it.
void run(const Launch& launch, const std::function<void()>& thread);

void* dynamic_shared();

// A line of a kernel. As a default argument, `Site site = Site::here()` is the line of the call.
struct Site {
    const char* file = "";
    int line = 0;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// Ends the launch with an error that names kernel, block, thread and site.
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

}  // namespace wsss::emulation
