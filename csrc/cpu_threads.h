// How many threads a loop of a CPU operation takes. Included by cpu.cpp files alone.
#pragma once

#include "common.h"

namespace wsss {
namespace {

// For work as long as the reading and writing of so many float32 numbers.
int count_threads(int64_t numbers, const Where& where) {
    constexpr int64_t kFewNumbers = 1 << 14;  // not worth a second thread
    return numbers < kFewNumbers ? 1 : where.threads;
}

}  // namespace
}  // namespace wsss
