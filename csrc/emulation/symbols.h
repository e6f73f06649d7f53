// What the library that this file is linked into says of itself: symbol table and debugging information.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace wsss::emulation {

struct Memory {
    void* address;
    size_t bytes;
};

struct Kernel {
    std::string name = "unknown";  // demangled
    unsigned most_threads = 1024;  // of a block, by __launch_bounds__
    size_t shared_bytes = 0;       // `__shared__` variables in its own body
};

// A kernel of this library. Throws std::runtime_error where the library was stripped.
const Kernel& describe(const void* kernel);

// Every `__shared__` variable of this library, told by the ABI tag of its name. Throws as describe().
const std::vector<Memory>& static_shared_memory();

// file:line of the call that returns to `code`; of one inlined from the emulation's headers, the kernel's.
std::string source_line(const void* code);

}  // namespace wsss::emulation
