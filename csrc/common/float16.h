// The two 16-bit float formats as storage types; arithmetic happens in float. Conversions are branch-free integer and
// float operations, so that compilers vectorise them and every device gives the same bits, but for a NaN's payload.
#pragma once

#include "common/portable.h"

namespace jointspar {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

// which ? yes : no. Compilers make branches of some ?: and then no vector code.
JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE uint32_t select_bits(bool which, uint32_t yes, uint32_t no) {
    const uint32_t mask = 0u - static_cast<uint32_t>(which);
    return (yes & mask) | (no & ~mask);
}

JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE float to_float(BFloat16 value) {
    return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE float to_float(Float16 value) {
    constexpr uint32_t kSign = 0x80000000u;
    constexpr uint32_t kSubnormalEnd = 1u << 27;  // doubled bits below this: exponent field 0
    const uint32_t word = static_cast<uint32_t>(value.bits) << 16;
    const uint32_t doubled = word << 1;
    // Normal numbers, Inf and NaN: raise the exponent by 224, then scale by 2^-112; the field of Inf stays all ones.
    const float normal = bit_cast<float>((doubled >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    // Subnormals: put the mantissa behind the exponent of 0.5, then take 0.5 off.
    const float subnormal = bit_cast<float>((doubled >> 17) | (126u << 23)) - 0.5f;
    const uint32_t magnitude =
        select_bits(doubled < kSubnormalEnd, bit_cast<uint32_t>(subnormal), bit_cast<uint32_t>(normal));
    return bit_cast<float>((word & kSign) | magnitude);
}

// The upper half is `value` in bfloat16, to nearest even. NaN becomes all ones, as in PyTorch's vector code on x86.
JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE uint32_t round_to_upper_half(float value) {
    const uint32_t word = bit_cast<uint32_t>(value);
    const uint32_t all_ones_if_nan = 0u - static_cast<uint32_t>(value != value);
    return (word + 0x7FFFu + ((word >> 16) & 1u)) | all_ones_if_nan;
}

JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE BFloat16 to_bfloat16(float value) {
    return BFloat16{static_cast<uint16_t>(round_to_upper_half(value) >> 16)};
}

// To nearest even. NaN stays NaN, quiet, with its sign and the upper bits of its payload, as the F16C instructions do.
JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE Float16 to_float16(float value) {
    const uint32_t word = bit_cast<uint32_t>(value);
    const uint32_t sign = (word >> 16) & 0x8000u;
    const uint32_t magnitude = word & 0x7FFFFFFFu;
    // Adding a power of two chosen by the exponent makes the float adder round at the right bit; too large gives Inf.
    const float scaled = (bit_cast<float>(magnitude) * 0x1.0p+112f) * 0x1.0p-110f;
    const uint32_t exponent = (magnitude << 1) & 0xFF000000u;
    const uint32_t bias = select_bits(exponent < 0x71000000u, 0x71000000u, exponent);
    const uint32_t sum = bit_cast<uint32_t>(bit_cast<float>((bias >> 1) + 0x07800000u) + scaled);
    const uint32_t finite = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
    const uint32_t nan = 0x7E00u | ((magnitude >> 13) & 0x03FFu);
    return Float16{static_cast<uint16_t>(sign | select_bits(magnitude > 0x7F800000u, nan, finite))};
}

// convert<To>(from): the only conversion that kernels use. Through float unless both ends are float or double.
template <class To>
struct Convert {
    JOINTSPAR_HOST_DEVICE static JOINTSPAR_INLINE To from(float value) { return static_cast<To>(value); }
    JOINTSPAR_HOST_DEVICE static JOINTSPAR_INLINE To from(double value) { return static_cast<To>(value); }
    JOINTSPAR_HOST_DEVICE static JOINTSPAR_INLINE To from(BFloat16 value) { return static_cast<To>(to_float(value)); }
    JOINTSPAR_HOST_DEVICE static JOINTSPAR_INLINE To from(Float16 value) { return static_cast<To>(to_float(value)); }
};

template <>
struct Convert<BFloat16> {
    JOINTSPAR_HOST_DEVICE static JOINTSPAR_INLINE BFloat16 from(float value) { return to_bfloat16(value); }
    JOINTSPAR_HOST_DEVICE static JOINTSPAR_INLINE BFloat16 from(double value) {
        return to_bfloat16(static_cast<float>(value));
    }
    JOINTSPAR_HOST_DEVICE static JOINTSPAR_INLINE BFloat16 from(BFloat16 value) { return value; }
    JOINTSPAR_HOST_DEVICE static JOINTSPAR_INLINE BFloat16 from(Float16 value) { return to_bfloat16(to_float(value)); }
};

template <>
struct Convert<Float16> {
    JOINTSPAR_HOST_DEVICE static JOINTSPAR_INLINE Float16 from(float value) { return to_float16(value); }
    JOINTSPAR_HOST_DEVICE static JOINTSPAR_INLINE Float16 from(double value) {
        return to_float16(static_cast<float>(value));
    }
    JOINTSPAR_HOST_DEVICE static JOINTSPAR_INLINE Float16 from(BFloat16 value) { return to_float16(to_float(value)); }
    JOINTSPAR_HOST_DEVICE static JOINTSPAR_INLINE Float16 from(Float16 value) { return value; }
};

template <class To, class From>
JOINTSPAR_HOST_DEVICE JOINTSPAR_INLINE To convert(From value) {
    return Convert<To>::from(value);
}

// The type that arithmetic on two stored types happens in: double where either is double, else float.
template <class A, class B = A>
struct Accumulator {
    using type = float;
};
template <class B>
struct Accumulator<double, B> {
    using type = double;
};
template <class A>
struct Accumulator<A, double> {
    using type = double;
};
template <>
struct Accumulator<double, double> {
    using type = double;
};
template <class A, class B = A>
using accumulator_t = typename Accumulator<A, B>::type;

}  // namespace jointspar
