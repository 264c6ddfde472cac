// Algorithms for a block of threads are templates over a Block: what one thread sees of its block. On a GPU that is
// cuda/thread_block.cuh; tests run the same code on threads of the host.
//
//   index()                  of the block in its grid
//   thread(), num_threads()  of the block
//   sync()                   waits for all threads; what they wrote before is visible after it
//   reduce(value, combine)   called by all threads, syncs them, and gives each the same combination of all values;
//                            combine(a, b) must equal combine(b, a) to the bit
#pragma once

#include "common/portable.h"

namespace jointspar {

struct Add {
    template <class T>
    JOINTSPAR_HOST_DEVICE T operator()(const T& a, const T& b) const {
        return a + b;
    }
};

struct Largest {
    JOINTSPAR_HOST_DEVICE double operator()(double a, double b) const { return fmax(a, b); }
};

}  // namespace jointspar
