#include "cpu/parallel.h"

#include <pthread.h>

#include <atomic>

namespace jointspar {

namespace {

std::atomic<bool> has_threads{false};
std::atomic<bool> threads_are_the_parents{false};

void after_fork() { threads_are_the_parents = has_threads.load(); }

const int kIsRegistered = pthread_atfork(nullptr, nullptr, after_fork);

}  // namespace

bool is_parallel(int64_t num_elements) {
    static_cast<void>(kIsRegistered);
    if (num_elements < kParallelElements || threads_are_the_parents.load(std::memory_order_relaxed)) return false;
    if (omp_get_max_threads() > 1) has_threads.store(true, std::memory_order_relaxed);
    return true;
}

}  // namespace jointspar
