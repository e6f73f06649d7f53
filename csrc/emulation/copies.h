// Asynchronous copies to shared memory. In half of the blocks they happen at once, in the others when their
// thread waits for them: so a wait that is missing shows (nobody has written what is read), and so does a
// copy into memory that others still read.
#pragma once

#include <cstddef>

#include "engine.h"
#include "memory.h"

namespace wsss::emulation {

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    bool zeros;  // nothing is read
};

// Whether the running thread shall copy now; if not, it will get the copy from due_copy.
bool is_due(const Copy& copy);
void commit_copies();
// The next copy of the running thread that is not among its last `prior` groups.
bool due_copy(size_t prior, Copy* copy);

template <class Vector>
WSSS_INLINE void carry_out(const Copy& copy) {
    *static_cast<Vector*>(copy.to) = copy.zeros ? Vector{} : *static_cast<const Vector*>(copy.from);
}
WSSS_INLINE void carry_out(const Copy& copy) {
    if (copy.bytes == 16) carry_out<uint4>(copy);
    if (copy.bytes == 8) carry_out<uint2>(copy);
    if (copy.bytes == 4) carry_out<unsigned>(copy);
}

}  // namespace wsss::emulation

// zeros: so many bytes at the end are not read and become zero; here all or none.
WSSS_INLINE void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0,
                                         wsss::emulation::Site site = wsss::emulation::Site::here()) {
    if (bytes != 4 && bytes != 8 && bytes != 16) {
        wsss::emulation::fail("__pipeline_memcpy_async of bytes other than 4, 8 or 16", site);
    }
    if (zeros != 0 && zeros != bytes) wsss::emulation::fail("__pipeline_memcpy_async of a part", site);
    const wsss::emulation::Copy copy{to, from, bytes, zeros != 0};
    if (wsss::emulation::is_due(copy)) wsss::emulation::carry_out(copy);
}
inline void __pipeline_commit() { wsss::emulation::commit_copies(); }
WSSS_INLINE void __pipeline_wait_prior(size_t prior) {
    wsss::emulation::Copy copy{};
    while (wsss::emulation::due_copy(prior, &copy)) wsss::emulation::carry_out(copy);
}
