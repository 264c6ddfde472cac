// What the machine can move, with no arithmetic worth the name: the limits that the operations are measured against.
// Independent of the library: it includes none of its headers and shares no code with its kernels.
// Compiled by limits.py for this machine; the number of threads is that of torch's OpenMP runtime.
#include <omp.h>

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr int64_t kParallelBytes = 256 << 10;  // below this a second thread costs more than it saves
constexpr int64_t kWordBytes = 16;

struct Word {
    uint64_t low, high;
};

// Calls work(begin, end) on each thread's share of `count` units of `unit_bytes`.
template <class Work>
void in_parallel(int64_t count, int64_t unit_bytes, Work work) {
#pragma omp parallel if (count * unit_bytes >= kParallelBytes)
    {
        const int64_t thread = omp_get_thread_num();
        const int64_t num_threads = omp_get_num_threads();
        work(count * thread / num_threads, count * (thread + 1) / num_threads);
    }
}

void store(Word* target, Word word, bool streaming) {
#if defined(__SSE2__)
    if (streaming) {
        __m128i value;
        std::memcpy(&value, &word, sizeof value);
        _mm_stream_si128(reinterpret_cast<__m128i*>(target), value);
        return;
    }
#endif
    *target = word;
}

// Reads `in` words and writes `out` words per step: 1 and 1 is a copy, 2 and 1 narrows, 1 and 2 widens.
template <int in, int out, bool streaming>
void copy_words(const Word* source, Word* target, int64_t num_steps) {
    in_parallel(num_steps, (in + out) * kWordBytes, [=](int64_t begin, int64_t end) {
        for (int64_t step = begin; step < end; ++step) {
            Word word = source[step * in];
            for (int more = 1; more < in; ++more) {
                word.low ^= source[step * in + more].low;
                word.high ^= source[step * in + more].high;
            }
            for (int copy = 0; copy < out; ++copy) store(target + step * out + copy, word, streaming);
        }
#if defined(__SSE2__)
        if (streaming) _mm_sfence();
#endif
    });
}

template <bool streaming>
void copy(const Word* source, Word* target, int64_t source_bytes, int64_t target_bytes) {
    if (source_bytes > target_bytes) {
        copy_words<2, 1, streaming>(source, target, target_bytes / kWordBytes);
    } else if (source_bytes < target_bytes) {
        copy_words<1, 2, streaming>(source, target, source_bytes / kWordBytes);
    } else {
        copy_words<1, 1, streaming>(source, target, source_bytes / kWordBytes);
    }
}

template <class Value>
void update(Value* params, uint32_t* momenta, const Value* grads, int64_t size) {
    in_parallel(size, 2 * sizeof(Value) + sizeof(uint32_t), [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            momenta[i] += grads[i];
            params[i] = static_cast<Value>(params[i] ^ momenta[i]);
        }
    });
}

}  // namespace

extern "C" {

// Sizes of which one is the other, its half or its double; both multiples of 16 bytes, both arrays aligned to 16.
void limit_copy(const void* source, void* target, int64_t source_bytes, int64_t target_bytes, int streaming) {
    const auto* from = static_cast<const Word*>(source);
    auto* to = static_cast<Word*>(target);
    if (streaming != 0) {
        copy<true>(from, to, source_bytes, target_bytes);
    } else {
        copy<false>(from, to, source_bytes, target_bytes);
    }
}

// Reads and writes params and momenta (4 bytes an element), reads grads; params and grads have 2 or 4 bytes an element.
void limit_update(void* params, void* momenta, const void* grads, int64_t size, int64_t element_bytes) {
    auto* velocities = static_cast<uint32_t*>(momenta);
    if (element_bytes == 2) {
        update(static_cast<uint16_t*>(params), velocities, static_cast<const uint16_t*>(grads), size);
    } else {
        update(static_cast<uint32_t*>(params), velocities, static_cast<const uint32_t*>(grads), size);
    }
}

// sum += values, as integers.
void limit_add(uint64_t* sum, const uint64_t* values, int64_t size) {
    in_parallel(size, 2 * sizeof(uint64_t), [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sum[i] += values[i];
    });
}

// The sum of all values, so that no read can be left out.
uint64_t limit_read(const uint64_t* values, int64_t size) {
    uint64_t total = 0;
#pragma omp parallel for reduction(+ : total) if (size * 8 >= kParallelBytes)
    for (int64_t i = 0; i < size; ++i) total += values[i];
    return total;
}
}
