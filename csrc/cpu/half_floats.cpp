#include "cpu/half_floats.h"

#include "cpu/simd.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(JOINTSPAR_NO_CLONES)
#include <cpuid.h>
#include <immintrin.h>
#define JOINTSPAR_F16C __attribute__((target("avx,f16c")))
#endif

namespace jointspar {

float* staged_chunk(int which) {
    alignas(64) static thread_local float chunks[2][kChunkSize];
    return chunks[which];
}

#if defined(JOINTSPAR_F16C)

bool has_half_conversions() {
    static const bool is_there = [] {
        unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
        const bool is_known = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0;
        return is_known && (ecx & bit_F16C) != 0 && __builtin_cpu_supports("avx");  // the latter asks the system, too
    }();
    return is_there;
}

JOINTSPAR_F16C void to_floats(const Float16* halves, float* floats, int64_t size) {
    constexpr int64_t kWide = 8;
    int64_t i = 0;
    for (; i + kWide <= size; i += kWide) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i));
        _mm256_storeu_ps(floats + i, _mm256_cvtph_ps(bits));
    }
    for (; i < size; ++i) floats[i] = _cvtsh_ss(halves[i].bits);
}

JOINTSPAR_F16C void to_halves(const float* floats, Float16* halves, int64_t size) {
    constexpr int64_t kWide = 8;
    constexpr int kToNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    int64_t i = 0;
    for (; i + kWide <= size; i += kWide) {
        const __m128i bits = _mm256_cvtps_ph(_mm256_loadu_ps(floats + i), kToNearestEven);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + i), bits);
    }
    for (; i < size; ++i) halves[i].bits = static_cast<uint16_t>(_cvtss_sh(floats[i], kToNearestEven));
}

#else

bool has_half_conversions() { return false; }

void to_floats(const Float16* halves, float* floats, int64_t size) {
    for (int64_t i = 0; i < size; ++i) floats[i] = to_float(halves[i]);
}

void to_halves(const float* floats, Float16* halves, int64_t size) {
    for (int64_t i = 0; i < size; ++i) halves[i] = to_float16(floats[i]);
}

#endif

}  // namespace jointspar
