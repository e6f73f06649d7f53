#pragma once

#include <string>
#include <vector>

namespace wsss {

// Index of the instruction set in use; asked by every call of a CPU operation (WSSS_OPERATION in common.h).
int cpu_level();

// The names of the instruction sets that are compiled in and that this processor can run, lowest first.
std::vector<std::string> cpu_levels();
std::string cpu_level_name();

// Throws std::invalid_argument for a name that is not among cpu_levels(). Not for use while operations run.
void set_cpu_level(const std::string& name);

}  // namespace wsss
