// Which of the instruction sets compiled into the CPU backend is in use: the best that the processor has, or
// the one that WSSS_OPS_CPU_LEVEL names.
#include "cpu_level.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace wsss {
namespace {

#if defined(__x86_64__)
constexpr const char* kNames[] = {"x86_64", "x86_64_v3", "x86_64_v4"};

int best_level() {
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? 2 : v3 ? 1 : 0;
}
#else
constexpr const char* kNames[] = {"generic"};

int best_level() { return 0; }
#endif

int checked_level(const char* name) {
    for (int level = 0; level <= best_level(); ++level) {
        if (std::strcmp(name, kNames[level]) == 0) return level;
    }
    std::string message = std::string("instruction set \"") + name + "\" is not one this processor can run:";
    for (int level = 0; level <= best_level(); ++level) message += std::string(" ") + kNames[level];
    throw std::invalid_argument(message);
}

int initial_level() {
    const char* name = std::getenv("WSSS_OPS_CPU_LEVEL");
    return name != nullptr && *name != '\0' ? checked_level(name) : best_level();
}

int& current_level() {
    static int level = initial_level();
    return level;
}

}  // namespace

int cpu_level() { return current_level(); }

void set_cpu_level(const std::string& name) { current_level() = checked_level(name.c_str()); }

std::vector<std::string> cpu_levels() { return {kNames, kNames + best_level() + 1}; }

std::string cpu_level_name() { return kNames[cpu_level()]; }

}  // namespace wsss
