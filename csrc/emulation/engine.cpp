#define WSSS_EMULATION_ENGINE
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

#include "accesses.h"
#include "fiber.h"
#include "schedule.h"
#include "symbols.h"

uint3 threadIdx{};
uint3 blockIdx{};
dim3 blockDim;
dim3 gridDim;

namespace wsss::emulation {

Running running;

namespace {

enum class State { ready, at_barrier, in_warp, exited };

struct Thread {
    explicit Thread(unsigned number_) : number(number_), fiber(number_) {}

    unsigned number;  // within the block, x fastest
    Fiber fiber;
    State state = State::exited;
    // Where it waits, for reports.
    const char* operation = "";
    unsigned mask = 0;
    Site site;
};

struct Warp {
    unsigned ready = 0;  // lanes that can run
    unsigned gone = 0;   // lanes that exited or that the block does not have
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
uint64_t seed = 0;
uint64_t launches = 0;  // since the seed was set
uint64_t blocks = 0;    // begun since the program began
const Launch* launch = nullptr;
const std::function<void()>* body = nullptr;
const Strides* block_order = nullptr;
uint64_t first_block = 0;  // of the launch
std::vector<std::unique_ptr<Thread>>
    threads;  // kept with their stacks from block to block and launch to launch
std::vector<Warp> warps;
Barrier barrier;
std::unique_ptr<unsigned char[]> dynamic_memory;
unsigned block_size = 0;
unsigned live = 0;
Thread* current = nullptr;
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

uint3 split(uint64_t number, const dim3& size) {
    return {static_cast<unsigned>(number % size.x), static_cast<unsigned>(number / size.x % size.y),
            static_cast<unsigned>(number / (uint64_t{size.x} * size.y))};
}

std::string where() {
    return "kernel " + describe(launch->kernel).name + ", block " + text(blockIdx) + " of grid " +
           text(gridDim);
}
std::string schedule_name() {
    return "\n  schedule: WSSS_EMULATION_SEED=" + std::to_string(seed) + ", launch " +
           std::to_string(launches);
}

unsigned warp_number(const Thread& thread) { return thread.number / warpSize; }
Warp& warp_of(const Thread& thread) { return warps[warp_number(thread)]; }
unsigned lane_bit(const Thread& thread) { return 1u << thread.number % warpSize; }

void make_ready(Thread& thread) {
    thread.state = State::ready;
    warp_of(thread).ready |= lane_bit(thread);
}

// Notes what the running thread waits for; it runs on until it suspends.
void wait(State state, const char* operation, unsigned mask, Site site) {
    current->state = state;
    current->operation = operation;
    current->mask = mask;
    current->site = site;
}

void release_barrier_if_complete() {
    if (barrier.arrived == 0 || barrier.arrived < live) return;
    barrier.result = {barrier.yes, static_cast<int>(barrier.arrived)};
    barrier.arrived = 0;
    barrier.yes = 0;
    ++running.barriers;
    for (unsigned i = 0; i < block_size; ++i) {
        if (threads[i]->state == State::at_barrier) make_ready(*threads[i]);
    }
}

void close_if_complete(Exchange& exchange, const Thread& member) {
    const Warp& warp = warp_of(member);
    const unsigned here = exchange.arrived | (exchange.only_waits ? warp.gone : 0);
    if ((exchange.mask & ~here) != 0) return;
    exchange.open = false;
    const unsigned first = warp_number(member) * warpSize;
    if (exchange.only_waits) order_lanes(first, exchange.arrived);
    for (unsigned lane = 0; lane < warpSize; ++lane) {
        if (exchange.arrived >> lane & 1) make_ready(*threads[first + lane]);
    }
}

void leave() {
    current->state = State::exited;
    --live;
    release_barrier_if_complete();
    Warp& warp = warp_of(*current);
    warp.gone |= lane_bit(*current);
    for (Exchange& exchange : warp.exchanges) {
        if (!exchange.open || (exchange.mask & lane_bit(*current)) == 0) continue;
        if (!exchange.only_waits) {
            fail(std::string("exited, but other lanes wait for it at ") + exchange.operation + " with mask " +
                     hex(exchange.mask),
                 exchange.site);
        }
        close_if_complete(exchange, *current);
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

// Runs a thread until it meets others or exits.
void resume(Thread& thread) {
    current = &thread;
    threadIdx = split(thread.number, blockDim);
    running.thread = thread.number;
    running.accesses = 0;
    running.stack_begin = thread.fiber.stack_begin();
    running.stack_end = thread.fiber.stack_end();
    thread.fiber.resume();
    if (thrown) std::rethrow_exception(std::exchange(thrown, nullptr));
    if (!failure.empty()) throw std::runtime_error(std::exchange(failure, {}));
}

// NaN in every floating type, -1 in every signed one: what nobody has written does not look like a result.
void poison_shared_memory() {
    constexpr int poison = 0xff;
    if (launch->shared_bytes > 0) std::memset(dynamic_memory.get(), poison, launch->shared_bytes);
    for (const Memory& variable : static_shared_memory())
        std::memset(variable.address, poison, variable.bytes);
}

void run_block(Random& random) {
    poison_shared_memory();
    running.block = blocks++;
    running.barriers = 0;
    start_block_access_checks(block_size);
    barrier = {};
    for (Warp& warp : warps) {
        warp.ready = ~0u;
        warp.gone = 0;
        for (Exchange& exchange : warp.exchanges) {
            exchange.open = false;
            exchange.users = 0;
        }
    }
    if (const unsigned rest = block_size % warpSize; rest != 0) {
        warps.back().gone = ~0u << rest;
        warps.back().ready = ~warps.back().gone;
    }
    live = block_size;
    for (unsigned i = 0; i < block_size; ++i) {
        threads[i]->state = State::ready;
        threads[i]->fiber.start(thread_main);
    }
    running.copies_late = random.below(2) == 1;
    WarpTurns turns(static_cast<unsigned>(warps.size()), random);
    while (live > 0) {
        uint32_t ready_warps = 0;
        for (size_t w = 0; w < warps.size(); ++w) ready_warps |= uint32_t{warps[w].ready != 0} << w;
        if (ready_warps == 0) {
            throw std::runtime_error(where() + ": threads wait for others that never come" +
                                     waiting_threads() + schedule_name());
        }
        const unsigned number = turns.next(ready_warps);
        const unsigned lanes = std::exchange(warps[number].ready, 0);
        const Strides order(warpSize, random);
        for (unsigned i = 0; i < warpSize; ++i) {
            const auto lane = static_cast<unsigned>(order[i]);
            if (lanes >> lane & 1) resume(*threads[number * warpSize + lane]);
        }
    }
}

// Why no GPU would accept the launch; empty where one would.
std::string refusal(const Launch& asked, const Kernel& kernel) {
    constexpr uint64_t most_shared = 227 * 1024;
    const dim3 grid = asked.grid;
    const dim3 block = asked.block;
    const uint64_t size = uint64_t{block.x} * block.y * block.z;
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        return "a grid is at most 2147483647 x 65535 x 65535";
    }
    if (size == 0) return "a block needs at least one thread";
    if (size > 1024) return "a block has at most 1024 threads";
    if (block.z > 64) return "a block is at most 1024 x 1024 x 64";
    if (size > kernel.most_threads) {
        return "its __launch_bounds__ allow " + std::to_string(kernel.most_threads) + " threads";
    }
    if (kernel.shared_bytes > 48 * 1024) return "its __shared__ variables are over 49152 bytes";
    if (kernel.shared_bytes + asked.shared_bytes > most_shared) {
        return "with " + std::to_string(kernel.shared_bytes) +
               " bytes of __shared__ variables that is over " + std::to_string(most_shared);
    }
    return "";
}

void check_limits(const Launch& asked) {
    const Kernel& kernel = describe(asked.kernel);
    const std::string what = refusal(asked, kernel);
    if (what.empty()) return;
    throw std::runtime_error("cannot launch " + kernel.name + " with grid " + text(asked.grid) + ", block " +
                             text(asked.block) + " and " + std::to_string(asked.shared_bytes) +
                             " bytes of dynamic shared memory: " + what);
}

}  // namespace

void run(const Launch& asked, const std::function<void()>& thread) {
    const std::lock_guard<std::mutex> lock(turn);
    check_limits(asked);
    launch = &asked;
    body = &thread;
    gridDim = asked.grid;
    blockDim = asked.block;
    block_size = blockDim.x * blockDim.y * blockDim.z;
    while (threads.size() < block_size) threads.push_back(std::make_unique<Thread>(threads.size()));
    warps.resize((block_size + warpSize - 1) / warpSize);
    dynamic_memory.reset(new unsigned char[asked.shared_bytes]);
    first_block = blocks;
    start_access_checks(dynamic_memory.get(), asked.shared_bytes, first_block);

    Random random(Random(seed).next() + launches++);
    const uint64_t count = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
    const Strides order(count, random);
    block_order = &order;
    for (uint64_t i = 0; i < count; ++i) {
        blockIdx = split(order[i], gridDim);
        run_block(random);
    }
}

void set_seed(uint64_t seed_) {
    const std::lock_guard<std::mutex> lock(turn);
    seed = seed_;
    launches = 0;
}

void* dynamic_shared() { return dynamic_memory.get(); }

void fail(const std::string& what, const std::string& at) {
    failure = where() + ", thread " + text(threadIdx) + " of block " + text(blockDim) + ": " + what + " at " +
              at + schedule_name();
    for (;;) Fiber::suspend();
}

void fail(const std::string& what, Site site) { fail(what, text(site)); }

std::string thread_name(unsigned thread, uint64_t block) {
    std::string name = "thread " + text(split(thread, blockDim));
    if (block != running.block) {
        name += " of block " + text(split((*block_order)[block - first_block], gridDim));
    }
    return name;
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
    Fiber::suspend();
    return barrier.result;
}

const Exchange& meet_warp(const char* operation, unsigned mask, uint64_t value, Site site, bool only_waits) {
    Warp& warp = warp_of(*current);
    const auto asked = [&] { return std::string(operation) + " with mask " + hex(mask); };
    if ((mask & lane_bit(*current)) == 0) fail(asked() + ", which does not name the calling lane", site);
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
    mine->arrived |= lane_bit(*current);
    mine->values[lane()] = value;
    ++mine->users;
    wait(State::in_warp, operation, mask, site);
    close_if_complete(*mine, *current);
    Fiber::suspend();
    --mine->users;  // nobody else runs until the caller meets again, so it can still read
    return *mine;
}

int lane() { return static_cast<int>(current->number % warpSize); }

unsigned lanes_not_exited() { return ~warp_of(*current).gone; }

}  // namespace wsss::emulation
