#include "copies.h"

#include <deque>
#include <vector>

namespace wsss::emulation {
namespace {

// Of one thread; groups.back() is the one that copies still join.
struct Queue {
    uint64_t block = 0;
    std::deque<std::deque<Copy>> groups;
};
std::vector<Queue> queues;  // by thread of the block

Queue& own_queue() {
    if (queues.size() <= running.thread) queues.resize(running.thread + 1);
    Queue& queue = queues[running.thread];
    if (queue.block != running.block || queue.groups.empty()) {
        queue.block = running.block;
        queue.groups.assign(1, {});
    }
    return queue;
}

}  // namespace

bool is_due(const Copy& copy) {
    if (!running.copies_late) return true;
    own_queue().groups.back().push_back(copy);
    return false;
}

void commit_copies() { own_queue().groups.emplace_back(); }

bool due_copy(size_t prior, Copy* copy) {
    auto& groups = own_queue().groups;
    while (groups.size() > prior + 1) {
        if (!groups.front().empty()) {
            *copy = groups.front().front();
            groups.front().pop_front();
            return true;
        }
        groups.pop_front();
    }
    return false;
}

}  // namespace wsss::emulation
