// What the library that this file is linked into says about itself in its symbol table.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace wsss::emulation {

struct Memory {
    void* address;
    size_t bytes;
};

// The demangled name of a function of this library, "unknown" where it has none.
std::string function_name(const void* function);

// Every `__shared__` variable of this library, found by the ABI tag that __shared__ gives its name. Throws
// std::runtime_error where the library was stripped.
const std::vector<Memory>& static_shared_memory();

}  // namespace wsss::emulation
