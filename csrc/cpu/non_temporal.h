// Writing around the cache: for results that are larger than it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdio>

#include "common/portable.h"
#include "cpu/simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace jointspar {

// The kernel's figure, in KiB; glibc's sysconf says 320 MiB where a virtual machine has 32. No stream of C++: where
// this module has a libstdc++ linked in and the process another, their locales mix and reading a number crashes.
inline int64_t last_level_cache_bytes() {
    constexpr int64_t kAssumedBytes = int64_t{32} << 20;
    std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r");
    if (file == nullptr) return kAssumedBytes;
    long long kibibytes = 0;
    char unit = '\0';
    const bool is_read = std::fscanf(file, "%lld%c", &kibibytes, &unit) == 2;
    std::fclose(file);
    return is_read && unit == 'K' && kibibytes > 0 ? int64_t{kibibytes} << 10 : kAssumedBytes;
}

// Data beyond the last-level cache is written around it: nobody could read it back from there.
inline bool exceeds_cache(int64_t bytes) {
#if defined(__SSE2__)
    static const int64_t cache_bytes = last_level_cache_bytes();
    return bytes > cache_bytes;
#else
    static_cast<void>(bytes);  // no such stores here
    return false;
#endif
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

// How many of `size` elements lie before the first whole cache line of the target.
template <class T>
JOINTSPAR_INLINE int64_t elements_before_line(const T* target, int64_t size) {
    const std::uintptr_t past_line = reinterpret_cast<std::uintptr_t>(target) % kLineBytes;
    return past_line == 0 ? 0 : std::min(size, static_cast<int64_t>((kLineBytes - past_line) / sizeof(T)));
}

// Writes target[i] = value_of(i, lane) for i = 0 .. size - 1, `streaming` around the cache, in a shape that compilers
// turn into vector code. Only whole lines are streamed: a line written in part by plain and in part by streaming stores
// costs more than it saves. Returns how many elements came before the first of them, the shift of the lanes: element
// i's is (i - shift) mod kLanes.
template <int kLanes, class T, class Value>
JOINTSPAR_INLINE int64_t write_values(T* __restrict target, int64_t size, bool streaming, Value value_of) {
    static_assert(kLanes * sizeof(T) % kLineBytes == 0, "a group of lanes must fill whole lines");
    if (!streaming) {
        for_each_lane<kLanes>(size,
                              [&](int64_t i, int lane) JOINTSPAR_INLINE_LAMBDA { target[i] = value_of(i, lane); });
        return 0;
    }
    const int64_t shift = elements_before_line(target, size);
    for (int64_t i = 0; i < shift; ++i) target[i] = value_of(i, static_cast<int>(kLanes - shift + i));
    int64_t begin = shift;
    for (; begin + kLanes <= size; begin += kLanes) {
        alignas(kLineBytes) T group[static_cast<std::size_t>(kLanes)];
        for (int lane = 0; lane < kLanes; ++lane) group[lane] = value_of(begin + lane, lane);
        stream_lines(target + begin, group, sizeof group);
    }
    for (int lane = 0; begin + lane < size; ++lane) target[begin + lane] = value_of(begin + lane, lane);
    return shift;
}

}  // namespace jointspar
