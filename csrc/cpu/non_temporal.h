// Writing around the cache: for results that are larger than it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <fstream>

#include "common/portable.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace jointspar {

// The kernel's figure, in KiB; glibc's sysconf says 320 MiB where a virtual machine has 32.
inline int64_t last_level_cache_bytes() {
    constexpr int64_t kAssumedBytes = int64_t{32} << 20;
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    int64_t kibibytes = 0;
    char unit = '\0';
    return file >> kibibytes >> unit && unit == 'K' && kibibytes > 0 ? kibibytes << 10 : kAssumedBytes;
}

// Data beyond the last-level cache is written around it: nobody could read it back from there.
inline bool exceeds_cache(int64_t bytes) {
    static const int64_t cache_bytes = last_level_cache_bytes();
    return bytes > cache_bytes;
}

JOINTSPAR_INLINE void copy_non_temporal(std::byte* target, const std::byte* source, std::size_t num_bytes) {
#if defined(__SSE2__)
    constexpr std::size_t kWord = sizeof(__m128i);
    const auto load = [source](std::size_t at) JOINTSPAR_INLINE_LAMBDA {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + at));
    };
    const auto word_at = [target](std::size_t at)
                             JOINTSPAR_INLINE_LAMBDA { return reinterpret_cast<__m128i*>(target + at); };
    if (num_bytes < kWord) {
        memcpy(target, source, num_bytes);
        return;
    }
    // Streaming stores must be aligned. What is left at the ends is covered by overlapping unaligned words.
    std::size_t at = (kWord - reinterpret_cast<std::uintptr_t>(target) % kWord) % kWord;
    if (at != 0) _mm_storeu_si128(word_at(0), load(0));
    for (; at + kWord <= num_bytes; at += kWord) _mm_stream_si128(word_at(at), load(at));
    if (at != num_bytes) _mm_storeu_si128(word_at(num_bytes - kWord), load(num_bytes - kWord));
#else
    memcpy(target, source, num_bytes);
#endif
}

// After the last copy_non_temporal of a thread, before others may read.
inline void finish_non_temporal() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Whole cache lines: target, source and num_bytes are multiples of kLineBytes.
constexpr std::size_t kLineBytes = 64;

JOINTSPAR_INLINE void stream_lines(void* target, const void* source, std::size_t num_bytes) {
#if defined(__SSE2__)
    auto* to = static_cast<__m128i*>(target);
    const auto* from = static_cast<const __m128i*>(source);
    for (std::size_t word = 0; word < num_bytes / sizeof(__m128i); ++word) {
        _mm_stream_si128(to + word, _mm_load_si128(from + word));
    }
#else
    memcpy(target, source, num_bytes);
#endif
}

// Writes target[0 .. size): fill(block, begin, count) computes elements [begin, begin + count) into block. Streaming
// goes through a buffer in the first-level cache, so that kernels need no second, non-temporal form. It is aligned as
// the target is, and only whole lines are streamed (a line written in part by plain and in part by streaming stores
// costs more than it saves): what a block begins of a line waits in the buffer for the next block.
template <class T, class Fill>
JOINTSPAR_INLINE void write_blocks(T* target, int64_t size, bool streaming, Fill fill) {
    if (!streaming) {
        fill(target, 0, size);
        return;
    }
    constexpr int64_t kLine = kLineBytes / sizeof(T);
    constexpr int64_t kBlockSize = 1024;  // a multiple of the lanes: blocks do not disturb the lane of an element
    const auto bytes_of = [](int64_t count) { return static_cast<std::size_t>(count) * sizeof(T); };
    alignas(kLineBytes) T buffer[static_cast<std::size_t>(kBlockSize + kLine)];
    // Elements of the target's first line that are not ours. Element i of the target is at i + offset in the buffer.
    const auto offset = static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(target) % kLineBytes / sizeof(T));
    for (int64_t begin = 0; begin < size; begin += kBlockSize) {
        const int64_t count = std::min(kBlockSize, size - begin);
        const int64_t filled = offset + count;
        fill(buffer + offset, begin, count);
        T* const to = target + begin - offset;
        int64_t done = 0;
        if (begin == 0 && offset != 0) {
            done = std::min(kLine, filled);
            memcpy(to + offset, buffer + offset, bytes_of(done - offset));
        }
        const int64_t whole = std::max(done, filled / kLine * kLine);
        stream_lines(to + done, buffer + done, bytes_of(whole - done));
        const bool is_last = begin + count == size;
        memcpy(is_last ? to + whole : buffer, buffer + whole, bytes_of(filled - whole));
    }
}

}  // namespace jointspar
