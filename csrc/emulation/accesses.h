// Checks every access to memory that a kernel compiled with -fsanitize=thread makes (GCC then calls a
// function before each; ours, in accesses.cpp, replace ThreadSanitizer's). They end the launch where
//
// - two threads access the same memory, one of them writes, not both are atomic, and nothing orders the two:
//   neither a __syncthreads between them nor, within a warp, a __syncwarp. Shuffles and votes order nothing.
//   Blocks are ordered by what the last block of a reduction does: the one executes __threadfence and
//   then an atomic operation, the other later one on the same address;
// - a thread reads shared memory that no thread of its block has written;
// - a thread goes on and on without meeting others, which get no turn to write what it waits for.
//
// The schedule hardly matters: two accesses that nothing orders are found though they ran in the right order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wsss::emulation {

// At the start of a launch, whose dynamic shared memory is given, and of each of its blocks.
void start_access_checks(const void* shared, size_t shared_bytes, uint64_t first_block);
void start_block_access_checks(unsigned threads);

// The lanes of a mask, of the warp whose first thread is given, have met at a __syncwarp.
void order_lanes(unsigned first_thread, unsigned lanes);

// The running thread has executed a __threadfence.
void note_fence();

// Accesses of the running thread are atomic while it lives.
class AtomicAccess {
  public:
    explicit AtomicAccess(const void* address);
    ~AtomicAccess();
};

}  // namespace wsss::emulation
