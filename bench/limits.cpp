// What the machine can move, with no arithmetic worth the name: the limits that the operations are measured against.
// Independent of the library: it includes none of its headers and shares no code with its kernels.
// Compiled by limits.py for this machine; the number of threads is that of torch's OpenMP runtime.
//
// Each thread walks several parts of its share side by side, since that moves more than one part after another
// (NOTES.md). All arrays are multiples of a block long.
#include <omp.h>

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr int64_t kParallelBytes = 256 << 10;  // below this a second thread costs more than it saves
constexpr int64_t kWordBytes = 16;
constexpr int64_t kBlockWords = 4;      // of a copy, on its smaller side
constexpr int64_t kBlockElements = 32;  // of an update or an addition

struct Word {
    uint64_t low, high;
};

// Calls work(begin, end) on each thread's share of `count` blocks.
template <class Work>
void in_parallel(int64_t count, int64_t block_bytes, Work work) {
#pragma omp parallel if (count * block_bytes >= kParallelBytes)
    {
        const int64_t thread = omp_get_thread_num();
        const int64_t num_threads = omp_get_num_threads();
        work(count * thread / num_threads, count * (thread + 1) / num_threads);
    }
}

// Calls visit(block) for all blocks, `streams` parts side by side.
template <int streams, class Visit>
void in_streams(int64_t begin, int64_t end, Visit visit) {
    const int64_t part = (end - begin) / streams;
    for (int64_t block = begin; block < begin + part; ++block) {
        for (int stream = 0; stream < streams; ++stream) visit(block + stream * part);
    }
    for (int64_t block = begin + streams * part; block < end; ++block) visit(block);
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
    const auto copy_block = [=](int64_t block) {
        for (int64_t step = block * kBlockWords; step < (block + 1) * kBlockWords; ++step) {
            Word word = source[step * in];
            for (int more = 1; more < in; ++more) {
                word.low ^= source[step * in + more].low;
                word.high ^= source[step * in + more].high;
            }
            for (int copy = 0; copy < out; ++copy) store(target + step * out + copy, word, streaming);
        }
    };
    in_parallel(num_steps / kBlockWords, (in + out) * kBlockWords * kWordBytes, [=](int64_t begin, int64_t end) {
        in_streams<4>(begin, end, copy_block);
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
void update_block(Value* __restrict params, uint32_t* __restrict momenta, const Value* __restrict grads) {
    for (int64_t i = 0; i < kBlockElements; ++i) {
        momenta[i] += grads[i];
        params[i] = static_cast<Value>(params[i] ^ momenta[i]);
    }
}

template <class Value>
void update(Value* params, uint32_t* momenta, const Value* grads, int64_t size) {
    constexpr int64_t kBlockBytes = kBlockElements * (2 * sizeof(Value) + sizeof(uint32_t));
    in_parallel(size / kBlockElements, kBlockBytes, [=](int64_t begin, int64_t end) {
        in_streams<2>(begin, end, [=](int64_t block) {
            const int64_t at = block * kBlockElements;
            update_block(params + at, momenta + at, grads + at);
        });
    });
}

void add_block(uint16_t* __restrict sum, const uint16_t* __restrict values) {
    for (int64_t i = 0; i < kBlockElements; ++i) sum[i] = static_cast<uint16_t>(sum[i] + values[i]);
}

uint64_t read_share(const uint64_t* values, int64_t size) {
    constexpr int kStreams = 4;
    const int64_t part = size / kStreams;
    uint64_t totals[kStreams] = {};
    for (int64_t i = 0; i < part; ++i) {
        for (int stream = 0; stream < kStreams; ++stream) totals[stream] += values[i + stream * part];
    }
    uint64_t total = totals[0] + totals[1] + totals[2] + totals[3];
    for (int64_t i = kStreams * part; i < size; ++i) total += values[i];
    return total;
}

}  // namespace

extern "C" {

// Sizes of which one is the other, its half or its double; the smaller one a multiple of 64 bytes.
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

// sum += values, as integers of 2 bytes.
void limit_add(uint16_t* sum, const uint16_t* values, int64_t size) {
    in_parallel(size / kBlockElements, 2 * kBlockElements * sizeof(uint16_t), [=](int64_t begin, int64_t end) {
        in_streams<2>(begin, end,
                      [=](int64_t block) { add_block(sum + block * kBlockElements, values + block * kBlockElements); });
    });
}

// The sum of all values as integers of 8 bytes, so that no read can be left out.
uint64_t limit_read(const uint64_t* values, int64_t size) {
    uint64_t total = 0;
    in_parallel(size, sizeof(uint64_t), [&total, values](int64_t begin, int64_t end) {
        const uint64_t share = read_share(values + begin, end - begin);
#pragma omp atomic
        total += share;
    });
    return total;
}
}
