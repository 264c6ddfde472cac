// Fixed-width integers, function qualifiers and bit_cast that host compilers, nvcc and NVRTC all accept.
// NVRTC ships no <cstdint> and has the mathematical functions built in, so code that it compiles takes both from here.
#pragma once

#if defined(__CUDACC_RTC__)
namespace jointspar {
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
}  // namespace jointspar
#else
#include <math.h>
#include <string.h>

#include <cstdint>
namespace jointspar {
using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::int8_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;
using std::uint8_t;
}  // namespace jointspar
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define JOINTSPAR_HOST_DEVICE __host__ __device__
// For templates over a block of threads: device code under nvcc; on the host, the tests run it on threads of their own.
#define JOINTSPAR_DEVICE __device__
#define JOINTSPAR_INLINE __forceinline__
#else
#define JOINTSPAR_HOST_DEVICE
#define JOINTSPAR_DEVICE
// Forced: a function that several instruction sets are compiled for passes its set on only to what it inlines.
#define JOINTSPAR_INLINE inline __attribute__((always_inline))
#define JOINTSPAR_INLINE_LAMBDA __attribute__((always_inline))
#endif

namespace jointspar {

constexpr double kLargestDouble = 0x1.fffffffffffffp+1023;  // NVRTC has neither INFINITY nor DBL_MAX

template <class To, class From>
JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

}  // namespace jointspar
