// Kernels with one planted fault each, to show that the emulation finds it.
#pragma once

#include <cstddef>

#pragma GCC visibility push(default)
extern "C" {

// Runs the kernel of that name on `memory`, 1024 ints that are zero. Returns nullptr, or the message of the
// error, which stays valid until the thread's next call.
const char* selftest_fault(const char* name, int* memory, void* stream);
}
#pragma GCC visibility pop
