#include "engine.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fiber.h"
#include "symbols.h"

uint3 threadIdx{};
uint3 blockIdx{};
dim3 blockDim;
dim3 gridDim;

namespace wsss::emulation {
namespace {

enum class State { ready, at_barrier, in_warp, exited };

struct Thread {
    explicit Thread(unsigned number_) : number(number_), fiber(number_) {}

    unsigned number;  // within the block, x fastest
    Fiber fiber;
    uint3 index{};
    State state = State::exited;
    // Where it waits, for reports.
    const char* operation = "";
    unsigned mask = 0;
    Site site;
};

struct Warp {
    unsigned gone = 0;  // lanes that exited or that the block does not have
    // A lane is in one exchange at a time, so there is always a free one.
    Exchange exchanges[warpSize];
};

struct Barrier {
    unsigned arrived = 0;
    int yes = 0;
    Site site;
    Count result{};
};

// One launch runs at a time in the process: Python threads take turns. So the state can be plain variables,
// which costs less per access than thread-local ones, and so can `__shared__` variables, which only as such
// get red zones from AddressSanitizer.
std::mutex turn;
const Launch* launch = nullptr;
const std::function<void()>* body = nullptr;
std::vector<std::unique_ptr<Thread>>
    threads;  // kept with their stacks from block to block and launch to launch
std::vector<Warp> warps;
Barrier barrier;
std::unique_ptr<unsigned char[]> dynamic_memory;
unsigned block_size = 0;
unsigned live = 0;
Thread* running = nullptr;
std::string failure;
std::exception_ptr thrown;

std::string text(const uint3& v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}
std::string text(const dim3& v) { return text(uint3{v.x, v.y, v.z}); }
std::string text(const Site& site) { return std::string(site.file) + ":" + std::to_string(site.line); }
bool operator==(const Site& a, const Site& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }
std::string hex(unsigned mask) {
    char buffer[16];
    std::snprintf(buffer, sizeof buffer, "0x%08x", mask);
    return buffer;
}

std::string where() {
    return "kernel " + function_name(launch->kernel) + ", block " + text(blockIdx) + " of grid " +
           text(gridDim);
}

Warp& warp_of(const Thread& thread) { return warps[thread.number / warpSize]; }
unsigned lane_bit(const Thread& thread) { return 1u << thread.number % warpSize; }

void wait(State state, const char* operation, unsigned mask, Site site) {
    running->state = state;
    running->operation = operation;
    running->mask = mask;
    running->site = site;
}

void release_barrier_if_complete() {
    if (barrier.arrived == 0 || barrier.arrived < live) return;
    barrier.result = {barrier.yes, static_cast<int>(barrier.arrived)};
    barrier.arrived = 0;
    barrier.yes = 0;
    for (unsigned i = 0; i < block_size; ++i) {
        if (threads[i]->state == State::at_barrier) threads[i]->state = State::ready;
    }
}

void close_if_complete(Exchange& exchange, const Thread& member) {
    const Warp& warp = warp_of(member);
    const unsigned here = exchange.arrived | (exchange.only_waits ? warp.gone : 0);
    if ((exchange.mask & ~here) != 0) return;
    exchange.open = false;
    const unsigned first = member.number / warpSize * warpSize;
    for (unsigned lane = 0; lane < warpSize; ++lane) {
        if (exchange.arrived >> lane & 1) threads[first + lane]->state = State::ready;
    }
}

void leave() {
    running->state = State::exited;
    --live;
    release_barrier_if_complete();
    Warp& warp = warp_of(*running);
    warp.gone |= lane_bit(*running);
    for (Exchange& exchange : warp.exchanges) {
        if (!exchange.open || (exchange.mask & lane_bit(*running)) == 0) continue;
        if (!exchange.only_waits) {
            fail(std::string("exited, but other lanes wait for it at ") + exchange.operation + " with mask " +
                     hex(exchange.mask),
                 {});
        }
        close_if_complete(exchange, *running);
    }
}

void thread_main() {
    try {
        (*body)();
    } catch (...) {
        thrown = std::current_exception();
    }
    leave();
}

// Threads that wait at the same place are one line: "threads 0-31, 64: __syncthreads at file:line".
std::string waiting_threads() {
    std::string report;
    std::vector<bool> told(block_size);
    for (unsigned i = 0; i < block_size; ++i) {
        if (told[i]) continue;
        const Thread& example = *threads[i];
        const auto alike = [&](unsigned j) {
            const Thread& other = *threads[j];
            return other.state == example.state &&
                   (example.state == State::exited ||
                    (other.operation == example.operation && other.mask == example.mask &&
                     other.site == example.site));
        };
        std::string numbers;
        for (unsigned j = i; j < block_size; ++j) {
            if (!alike(j)) continue;
            unsigned last = j;
            while (last + 1 < block_size && alike(last + 1)) ++last;
            numbers += (numbers.empty() ? "" : ", ") + std::to_string(j);
            if (last > j) numbers += "-" + std::to_string(last);
            for (; j <= last; ++j) told[j] = true;
        }
        report += "\n  threads " + numbers + ": ";
        if (example.state == State::exited) {
            report += "exited";
        } else {
            report += std::string(example.operation);
            if (example.state == State::in_warp) report += " with mask " + hex(example.mask);
            report += " at " + text(example.site);
        }
    }
    return report;
}

// Runs one warp as far ahead of the others as it goes; returns whether it got anywhere.
bool run_warp(unsigned first) {
    const unsigned end = std::min(first + warpSize, block_size);
    bool any = false;
    for (bool again = true; again;) {
        again = false;
        for (unsigned i = first; i < end; ++i) {
            if (threads[i]->state != State::ready) continue;
            again = any = true;
            running = threads[i].get();
            threadIdx = running->index;
            running->fiber.resume();
            if (thrown) std::rethrow_exception(std::exchange(thrown, nullptr));
            if (!failure.empty()) throw std::runtime_error(std::exchange(failure, {}));
        }
    }
    return any;
}

// NaN in every floating type, -1 in every signed one: what nobody has written does not look like a result.
void poison_shared_memory() {
    constexpr int poison = 0xff;
    if (launch->shared_bytes > 0) std::memset(dynamic_memory.get(), poison, launch->shared_bytes);
    for (const Memory& variable : static_shared_memory())
        std::memset(variable.address, poison, variable.bytes);
}

void run_block() {
    poison_shared_memory();
    barrier = {};
    for (Warp& warp : warps) {
        warp.gone = 0;
        for (Exchange& exchange : warp.exchanges) {
            exchange.open = false;
            exchange.users = 0;
        }
    }
    if (const unsigned rest = block_size % warpSize; rest != 0) warps.back().gone = ~0u << rest;
    live = block_size;
    for (unsigned i = 0; i < block_size; ++i) {
        threads[i]->index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        threads[i]->state = State::ready;
        threads[i]->fiber.start(thread_main);
    }
    while (live > 0) {
        bool any = false;
        for (unsigned first = 0; first < block_size; first += warpSize) any |= run_warp(first);
        if (!any && live > 0) {
            throw std::runtime_error(where() + ": threads wait for others that never come" +
                                     waiting_threads());
        }
    }
}

void check_limits(const Launch& asked) {
    const dim3 grid = asked.grid;
    const dim3 block = asked.block;
    const uint64_t size = uint64_t{block.x} * block.y * block.z;
    std::string what;
    if (block.x == 0 || block.y == 0 || block.z == 0) what = "a block needs at least one thread";
    if (block.x > 1024 || block.y > 1024 || block.z > 64) what = "a block is at most 1024 x 1024 x 64";
    if (size > 1024) what = "a block has at most 1024 threads";
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        what = "a grid is at most 2147483647 x 65535 x 65535";
    }
    if (asked.shared_bytes > 227 * 1024) what = "a block has at most 232448 bytes of shared memory";
    if (what.empty()) return;
    throw std::runtime_error("cannot launch " + function_name(asked.kernel) + " with grid " + text(grid) +
                             ", block " + text(block) + " and " + std::to_string(asked.shared_bytes) +
                             " bytes of shared memory: " + what);
}

}  // namespace

void run(const Launch& asked, const std::function<void()>& thread) {
    check_limits(asked);
    const std::lock_guard<std::mutex> lock(turn);
    launch = &asked;
    body = &thread;
    gridDim = asked.grid;
    blockDim = asked.block;
    block_size = blockDim.x * blockDim.y * blockDim.z;
    while (threads.size() < block_size) threads.push_back(std::make_unique<Thread>(threads.size()));
    warps.resize((block_size + warpSize - 1) / warpSize);
    dynamic_memory.reset(new unsigned char[asked.shared_bytes]);
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block();
        }
    }
}

void* dynamic_shared() { return dynamic_memory.get(); }

void fail(const std::string& what, Site site) {
    failure = where() + ", thread " + text(running->index) + " of block " + text(blockDim) + ": " + what;
    if (site.line != 0) failure += " at " + text(site);
    for (;;) Fiber::suspend();
}

Count meet_block(const char* operation, bool predicate, Site site) {
    if (barrier.arrived > 0 && !(barrier.site == site)) {
        fail(std::string(operation) + ", but other threads of the block are at the barrier at " +
                 text(barrier.site),
             site);
    }
    barrier.site = site;
    ++barrier.arrived;
    barrier.yes += predicate;
    wait(State::at_barrier, operation, 0, site);
    release_barrier_if_complete();
    if (running->state != State::ready) Fiber::suspend();
    return barrier.result;
}

const Exchange& meet_warp(const char* operation, unsigned mask, uint64_t value, Site site, bool only_waits) {
    Warp& warp = warp_of(*running);
    const auto asked = [&] { return std::string(operation) + " with mask " + hex(mask); };
    if ((mask & lane_bit(*running)) == 0) fail(asked() + ", which does not name the calling lane", site);
    if (!only_waits && (mask & warp.gone) != 0) {
        fail(asked() + ", which names lanes that have exited or that the block does not have: " +
                 hex(mask & warp.gone),
             site);
    }
    Exchange* mine = nullptr;
    for (Exchange& exchange : warp.exchanges) {
        if (exchange.open && exchange.mask == mask) {
            mine = &exchange;
            break;
        }
        if (mine == nullptr && !exchange.open && exchange.users == 0) mine = &exchange;
    }
    if (!mine->open) {
        mine->operation = operation;
        mine->mask = mask;
        mine->site = site;
        mine->arrived = 0;
        mine->open = true;
        mine->only_waits = only_waits;
    } else if (std::strcmp(mine->operation, operation) != 0 || (!only_waits && !(mine->site == site))) {
        fail(asked() + ", but another lane of the mask is at " + mine->operation + " at " + text(mine->site),
             site);
    }
    mine->arrived |= lane_bit(*running);
    mine->values[lane()] = value;
    ++mine->users;
    wait(State::in_warp, operation, mask, site);
    close_if_complete(*mine, *running);
    if (running->state != State::ready) Fiber::suspend();
    --mine->users;  // nobody else runs until the caller meets again, so it can still read
    return *mine;
}

int lane() { return static_cast<int>(running->number % warpSize); }

unsigned lanes_not_exited() { return ~warp_of(*running).gone; }

}  // namespace wsss::emulation
