// common/block.h on the host: one thread, or a team of OpenMP threads in lockstep at every sync.
#pragma once

#include <omp.h>

#include <vector>

#include "common/block.h"

namespace jointspar::test {

class SerialBlock {
  public:
    explicit SerialBlock(int64_t index = 0) : index_(index) {}

    int64_t index() const { return index_; }
    int thread() const { return 0; }
    int num_threads() const { return 1; }
    void sync() const {}

    template <class T, class Combine>
    T reduce(const T& value, Combine) const {
        ++num_reductions_;
        return value;
    }
    int num_reductions() const { return num_reductions_; }

  private:
    int64_t index_;
    mutable int num_reductions_ = 0;
};

// A power of two of threads; combines halves, as the lanes of a warp do.
class TeamBlock {
  public:
    struct Scratch {
        explicit Scratch(int num_threads) : values(static_cast<std::size_t>(num_threads)) {}
        struct alignas(8) Value {
            unsigned char bytes[32];
        };
        std::vector<Value> values;
    };

    TeamBlock(Scratch& scratch, int64_t index) : scratch_(scratch), index_(index) {}

    int64_t index() const { return index_; }
    int thread() const { return omp_get_thread_num(); }
    int num_threads() const { return omp_get_num_threads(); }
    void sync() const {
#pragma omp barrier
    }

    template <class T, class Combine>
    T reduce(const T& value, Combine combine) const {
        static_assert(sizeof(T) <= sizeof(Scratch::Value));
        memcpy(at(thread()), &value, sizeof(T));
        sync();
        std::vector<T> values(static_cast<std::size_t>(num_threads()));
        for (int i = 0; i < num_threads(); ++i) memcpy(&values[static_cast<std::size_t>(i)], at(i), sizeof(T));
        sync();
        for (std::size_t distance = values.size() / 2; distance > 0; distance /= 2) {
            for (std::size_t i = 0; i < distance; ++i) values[i] = combine(values[i], values[i + distance]);
        }
        return values[0];
    }

  private:
    unsigned char* at(int thread) const { return scratch_.values[static_cast<std::size_t>(thread)].bytes; }

    Scratch& scratch_;
    int64_t index_;
};

// body(block) by every thread of one block after the other.
template <class Body>
void run_blocks(int64_t num_blocks, int num_threads, Body body) {
    TeamBlock::Scratch scratch(num_threads);
#pragma omp parallel num_threads(num_threads)
    for (int64_t index = 0; index < num_blocks; ++index) {
        body(TeamBlock(scratch, index));
#pragma omp barrier
    }
}

}  // namespace jointspar::test
