#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace wsss::emulation {
namespace {

constexpr size_t guard_bytes = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t stack_bytes = 256 * 1024;  // red zones make frames several times larger
#else
constexpr size_t stack_bytes = 128 * 1024;
#endif

// One block runs at a time (see engine.cpp), so there is one resumer and at most one fiber running.
Context resumer;
Fiber* current = nullptr;

#if defined(__SANITIZE_ADDRESS__)
const void* resumer_stack = nullptr;
size_t resumer_stack_bytes = 0;
#endif

}  // namespace

#if defined(__x86_64__) && !defined(WSSS_EMULATION_UCONTEXT)

// Saves the registers that a call preserves, exchanges the stacks, restores the other's and returns there.
extern "C" void wsss_emulation_switch(Context* from, Context to);
asm(R"(
    .pushsection .text
    .globl wsss_emulation_switch
    .hidden wsss_emulation_switch
    .type wsss_emulation_switch, @function
wsss_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size wsss_emulation_switch, .-wsss_emulation_switch
    .popsection
)");

static void switch_context(Context& from, Context& to) { wsss_emulation_switch(&from, to); }

static void prepare(Context& context, char* /*bottom*/, char* top, void (*entry)()) {
    // From the top: a zero return address, where debuggers stop; entry, which `ret` jumps to with the stack
    // aligned as after a call; six zeros for the registers.
    auto* words = reinterpret_cast<uintptr_t*>(top) - 8;
    for (int i = 0; i < 8; ++i) words[i] = 0;
    words[6] = reinterpret_cast<uintptr_t>(entry);
    context = words;
}

#else

static void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

static void prepare(Context& context, char* bottom, char* top, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = bottom;
    context.uc_stack.ss_size = static_cast<size_t>(top - bottom);
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}

#endif

Fiber::Fiber(size_t index) : offset_(index % 32 * 128) {
    void* memory = mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mapping_ = static_cast<char*>(memory);
    mprotect(mapping_, guard_bytes, PROT_NONE);
}

Fiber::~Fiber() { munmap(mapping_, guard_bytes + stack_bytes); }

void Fiber::start(void (*entry)()) {
    char* bottom = mapping_ + guard_bytes;
#if defined(__SANITIZE_ADDRESS__)
    if (!finished_) __asan_unpoison_memory_region(bottom, stack_bytes);
#endif
    entry_ = entry;
    finished_ = false;
    prepare(context_, bottom, bottom + stack_bytes - offset_, begin);
}

void Fiber::resume() {
    current = this;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, mapping_ + guard_bytes, stack_bytes);
#endif
    switch_context(resumer, context_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
    Fiber* self = current;
#if defined(__SANITIZE_ADDRESS__)
    void** keep = self->finished_ ? nullptr : &self->fake_stack_;
    __sanitizer_start_switch_fiber(keep, resumer_stack, resumer_stack_bytes);
#endif
    switch_context(self->context_, resumer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self->fake_stack_, nullptr, nullptr);
#endif
}

const char* Fiber::stack_begin() const { return mapping_ + guard_bytes; }
const char* Fiber::stack_end() const { return stack_begin() + stack_bytes; }

void Fiber::begin() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &resumer_stack, &resumer_stack_bytes);
#endif
    current->entry_();
    current->finished_ = true;
    suspend();  // never comes back: the next start() begins again at the top
}

}  // namespace wsss::emulation
