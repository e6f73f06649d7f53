#include "accesses.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine.h"
#include "symbols.h"

namespace wsss::emulation {
namespace {

struct Access {
    uint64_t block;
    const void* code;  // where it was made; null before the first
    unsigned barriers;
    unsigned clock;  // of the thread, see clocks
    uint16_t thread;
    bool atomic;
};

struct Cell {
    Access write;
    Access reads[2];  // by two different threads, the latest first
};

struct Free {
    void operator()(Cell* cells) const { std::free(cells); }
};
using Cells = std::unique_ptr<Cell[], Free>;

// An access belongs to the cell of its first byte and to that of each multiple of four after it. Accesses of
// different sizes that share no such byte are not compared.
struct Page {
    static constexpr size_t bytes = 4096;
    Cells words;  // of multiples of four
    Cells others;
};
constexpr size_t most_pages = 4096;  // kept from one launch to the next

constexpr unsigned most_accesses = 1u << 25;  // of one thread before it meets others again

struct KnownPage {
    uintptr_t number = 0;
    Page* page = nullptr;
};

// A stretch of memory in which shared memory lies.
struct Shared {
    uintptr_t begin = 0;
    std::vector<bool> foreign;  // bytes of something else
    std::vector<bool> written;  // bytes that the block has written, and foreign ones

    bool holds(uintptr_t address) const {
        return address - begin < foreign.size() && !foreign[address - begin];
    }
};

using Clocks = std::array<unsigned, warpSize>;

std::unordered_map<uintptr_t, Page> pages;
std::array<KnownPage, 64> known_pages;
uint64_t first_block = 0;  // of the launch; what earlier ones did is past
Shared variables;
Shared dynamic;
bool atomic = false;  // the running thread's accesses are

// Each thread counts the __syncwarps that it has been to and knows of every lane of its warp the count up to
// which that lane's accesses are past.
std::vector<Clocks> clocks;

std::vector<bool> fenced;                                         // threads that have executed a fence
std::unordered_map<const void*, std::vector<uint64_t>> released;  // blocks, by the address of their atomic
std::vector<const void*> acquired;                                // such addresses, by the running block

Cells make_cells(size_t count) {
    void* memory = std::calloc(count, sizeof(Cell));  // takes no memory before it is touched
    if (memory == nullptr) throw std::bad_alloc();
    return Cells(static_cast<Cell*>(memory));
}

Cell& cell_of(uintptr_t address) {
    const uintptr_t number = address / Page::bytes;
    KnownPage& known = known_pages[number % known_pages.size()];
    if (known.number != number) known = {number, &pages[number]};
    Page& page = *known.page;
    const size_t offset = address % Page::bytes;
    if (offset % 4 == 0) {
        if (!page.words) page.words = make_cells(Page::bytes / 4);
        return page.words[offset / 4];
    }
    if (!page.others) page.others = make_cells(Page::bytes);
    return page.others[offset];
}

bool ordered_by_atomics(uint64_t block) {
    return std::any_of(acquired.begin(), acquired.end(), [&](const void* address) {
        const std::vector<uint64_t>& blocks = released[address];
        return std::find(blocks.begin(), blocks.end(), block) != blocks.end();
    });
}

// Whether nothing orders an earlier access before one that the running thread makes now.
bool clashes(const Access& earlier, bool shared) {
    if (earlier.code == nullptr || earlier.block < first_block || (earlier.atomic && atomic)) return false;
    if (earlier.block != running.block) return !shared && !ordered_by_atomics(earlier.block);
    if (earlier.thread == running.thread || earlier.barriers < running.barriers) return false;
    if (earlier.thread / warpSize != running.thread / warpSize) return true;
    return clocks[running.thread][earlier.thread % warpSize] < earlier.clock;
}

[[noreturn]] void report(const char* verb, const char* earlier_verb, const Access& earlier, bool shared,
                         const void* code) {
    const char* missing = earlier.block != running.block ? "no order between blocks"
                          : earlier.thread / warpSize == running.thread / warpSize
                              ? "no __syncwarp or __syncthreads between"
                              : "no __syncthreads between";
    fail(std::string(verb) + (shared ? " shared" : " global") + " memory that " +
             thread_name(earlier.thread, earlier.block) + " " + earlier_verb + " at " +
             source_line(earlier.code) + ", with " + missing + ",",
         source_line(code));
}

// Keeps the marks of what the block has written; false where the access reads something else.
bool mark_or_check(Shared& memory, uintptr_t address, size_t size, bool write) {
    const size_t first = address - memory.begin;
    const size_t end = std::min(first + size, memory.written.size());
    bool known = true;
    for (size_t i = first; i < end; ++i) {
        if (write) memory.written[i] = true;
        known = known && memory.written[i];
    }
    return known;
}

void check(const void* memory, size_t size, bool write, const void* code) {
    if (!running.is_caller() || running.stack_holds(memory)) return;
    if (++running.accesses == most_accesses) {
        fail("made " + std::to_string(most_accesses) +
                 " accesses without meeting others: does it wait for one of them to write?",
             source_line(code));
    }
    const auto address = reinterpret_cast<uintptr_t>(memory);
    bool shared = false;
    for (Shared* where : {&variables, &dynamic}) {
        if (!where->holds(address)) continue;
        shared = true;
        if (!mark_or_check(*where, address, size, write)) {
            fail(
                "reads shared memory that no thread of its block has written (yet: is a __syncthreads "
                "missing, or an "
                "index too large?)",
                source_line(code));
        }
    }
    const unsigned clock = clocks[running.thread][running.thread % warpSize];
    const Access now{running.block, code, running.barriers, clock, static_cast<uint16_t>(running.thread),
                     atomic};
    for (uintptr_t at = address; at < address + size; at = at / 4 * 4 + 4) {
        Cell& cell = cell_of(at);
        if (clashes(cell.write, shared))
            report(write ? "writes" : "reads", "wrote", cell.write, shared, code);
        if (!write) {
            if (cell.reads[0].thread != now.thread || cell.reads[0].block != now.block)
                cell.reads[1] = cell.reads[0];
            cell.reads[0] = now;
            continue;
        }
        for (const Access& read : cell.reads) {
            if (clashes(read, shared)) report("writes", "read", read, shared, code);
        }
        cell.write = now;
    }
}

// The stretch from the first to the last `__shared__` variable of the library.
Shared find_variables() {
    Shared found;
    uintptr_t end = 0;
    for (const Memory& variable : static_shared_memory()) {
        const auto begin = reinterpret_cast<uintptr_t>(variable.address);
        found.begin = end == 0 ? begin : std::min(found.begin, begin);
        end = std::max(end, begin + variable.bytes);
    }
    found.foreign.assign(end - found.begin, true);
    for (const Memory& variable : static_shared_memory()) {
        const size_t first = reinterpret_cast<uintptr_t>(variable.address) - found.begin;
        for (size_t i = 0; i < variable.bytes; ++i) found.foreign[first + i] = false;
    }
    return found;
}

}  // namespace

void start_access_checks(const void* shared, size_t shared_bytes, uint64_t first_block_) {
    if (pages.size() > most_pages) {
        pages.clear();
        known_pages = {};
    }
    first_block = first_block_;
    if (variables.foreign.empty()) variables = find_variables();
    dynamic.begin = reinterpret_cast<uintptr_t>(shared);
    dynamic.foreign.assign(shared_bytes, false);
    released.clear();
}

void start_block_access_checks(unsigned threads) {
    for (Shared* memory : {&variables, &dynamic}) memory->written = memory->foreign;
    clocks.assign(threads, {});
    for (unsigned thread = 0; thread < threads; ++thread) clocks[thread][thread % warpSize] = 1;
    fenced.assign(threads, false);
    acquired.clear();
    atomic = false;
}

void order_lanes(unsigned first_thread, unsigned lanes) {
    Clocks latest{};
    for (unsigned lane = 0; lane < warpSize; ++lane) {
        if ((lanes >> lane & 1) == 0) continue;
        for (unsigned i = 0; i < warpSize; ++i) {
            latest[i] = std::max(latest[i], clocks[first_thread + lane][i]);
        }
    }
    for (unsigned lane = 0; lane < warpSize; ++lane) {
        if ((lanes >> lane & 1) == 0) continue;
        clocks[first_thread + lane] = latest;
        ++clocks[first_thread + lane][lane];
    }
}

void note_fence() { fenced[running.thread] = true; }

AtomicAccess::AtomicAccess(const void* address) {
    atomic = true;
    if (fenced[running.thread]) released[address].push_back(running.block);
    if (!released.empty() && released.count(address) > 0) acquired.push_back(address);
}

AtomicAccess::~AtomicAccess() { atomic = false; }

}  // namespace wsss::emulation

// What GCC calls.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void* /*caller*/) {}
void __tsan_func_exit() {}
// Of the guard of a static variable in a function.
char __tsan_atomic8_load(const volatile char* memory, int /*order*/) { return *memory; }
#define WSSS_ACCESS(name, bytes, write)                                            \
    void __tsan_##name(const void* memory) {                                       \
        wsss::emulation::check(memory, bytes, write, __builtin_return_address(0)); \
    }
#define WSSS_ACCESSES(bytes)                         \
    WSSS_ACCESS(read##bytes, bytes, false)           \
    WSSS_ACCESS(write##bytes, bytes, true)           \
    WSSS_ACCESS(unaligned_read##bytes, bytes, false) \
    WSSS_ACCESS(unaligned_write##bytes, bytes, true)
WSSS_ACCESSES(1)
WSSS_ACCESSES(2)
WSSS_ACCESSES(4)
WSSS_ACCESSES(8)
WSSS_ACCESSES(16)
void __tsan_read_range(const void* memory, size_t bytes) {
    wsss::emulation::check(memory, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(const void* memory, size_t bytes) {
    wsss::emulation::check(memory, bytes, true, __builtin_return_address(0));
}
}
