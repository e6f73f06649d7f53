// A fiber: a stack of its own on the calling OS thread, switched to and from by hand.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(WSSS_EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

namespace wsss::emulation {

// Where a suspended stack goes on. On x86-64 the saved registers lie on the stack itself, and its top says it
// all; ucontext does the same everywhere, with a system call (for the signal mask) at each switch.
#if defined(__x86_64__) && !defined(WSSS_EMULATION_UCONTEXT)
using Context = void*;
#else
using Context = ucontext_t;
#endif

class Fiber {
  public:
    explicit Fiber(size_t index);
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // The next resume() begins entry on an empty stack; what was suspended there is dropped, not unwound.
    void start(void (*entry)());
    // Runs the fiber until it suspends or its entry returns.
    void resume();
    // From inside a fiber: back to whoever resumed it.
    static void suspend();

    const char* stack_begin() const;
    const char* stack_end() const;

  private:
    static void begin();

    Context context_{};
    char* mapping_ = nullptr;  // a guard page, then the stack
    size_t offset_;            // keeps the tops of the stacks from sharing one set of the cache
    void (*entry_)() = nullptr;
    void* fake_stack_ = nullptr;  // AddressSanitizer's
    bool finished_ = true;
};

}  // namespace wsss::emulation
