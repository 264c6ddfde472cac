#include <algorithm>
#include <type_traits>

#include "cpu/half_floats.h"
#include "cpu/non_temporal.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "jointspar/unpack_gradients.h"

namespace jointspar {
namespace {

struct UnpackChunk {
    const void* packed;  // the chunk's first element
    DType packed_dtype;
    void* target;  // where that element goes
    DType target_dtype;
    int64_t size;
    bool add;
    bool streaming;
};

template <class Packed, class Target>
JOINTSPAR_INLINE void add_values(const Packed* __restrict packed, Target* __restrict target, int64_t size) {
    using Acc = accumulator_t<Packed, Target>;
    for (int64_t i = 0; i < size; ++i) {
        target[i] = convert<Target>(convert<Acc>(target[i]) + convert<Acc>(packed[i]));
    }
}

template <class Packed, class Target>
JOINTSPAR_INLINE void copy_values(const Packed* __restrict packed, Target* target, int64_t size, bool streaming) {
    if (std::is_same_v<Packed, Target> && streaming) {
        copy_non_temporal(reinterpret_cast<std::byte*>(target), reinterpret_cast<const std::byte*>(packed),
                          static_cast<std::size_t>(size) * sizeof(Target));
        return;
    }
    constexpr int kGroup = 32;
    write_values<kGroup>(target, size, streaming,
                         [&](int64_t i, int) JOINTSPAR_INLINE_LAMBDA { return convert<Target>(packed[i]); });
}

JOINTSPAR_SIMD_CLONES void unpack_chunk_simd(const UnpackChunk& chunk) {
    visit_dtype(chunk.packed_dtype, [&](auto packed_tag) JOINTSPAR_INLINE_LAMBDA {
        visit_dtype(chunk.target_dtype, [&](auto target_tag) JOINTSPAR_INLINE_LAMBDA {
            const auto* packed = static_cast<const decltype(packed_tag)*>(chunk.packed);
            auto* target = static_cast<decltype(target_tag)*>(chunk.target);
            if (chunk.add) {
                add_values(packed, target, chunk.size);
            } else {
                copy_values(packed, target, chunk.size, chunk.streaming);
            }
        });
    });
}

// By the processor's conversions of float16.
void unpack_through_floats(UnpackChunk chunk) {
    if (chunk.packed_dtype == DType::kFloat16) {
        chunk.packed = staged_floats(chunk.packed, chunk.size, 0);
        chunk.packed_dtype = DType::kFloat32;
    }
    if (chunk.target_dtype != DType::kFloat16) return unpack_chunk_simd(chunk);
    float* const floats = staged_chunk(1);
    auto* const halves = static_cast<Float16*>(chunk.target);
    if (chunk.add) to_floats(halves, floats, chunk.size);
    unpack_chunk_simd({chunk.packed, chunk.packed_dtype, floats, DType::kFloat32, chunk.size, chunk.add, false});
    to_halves(floats, halves, chunk.size);
}

void unpack_chunk(const UnpackChunk& chunk) {
    const bool is_copy = !chunk.add && chunk.packed_dtype == chunk.target_dtype;
    const bool has_halves = chunk.packed_dtype == DType::kFloat16 || chunk.target_dtype == DType::kFloat16;
    if (is_copy || !has_halves || !has_half_conversions()) return unpack_chunk_simd(chunk);
    constexpr int64_t kPiece = 2048;  // floats of both sides stay in the first-level cache
    for (int64_t at = 0; at < chunk.size; at += kPiece) {
        UnpackChunk piece = chunk;
        piece.packed = static_cast<const std::byte*>(chunk.packed) + at * element_bytes(chunk.packed_dtype);
        piece.target = static_cast<std::byte*>(chunk.target) + at * element_bytes(chunk.target_dtype);
        piece.size = std::min(kPiece, chunk.size - at);
        unpack_through_floats(piece);
    }
}

int64_t bytes_moved(const UnpackSlice* slices, int64_t num_slices, DType packed_dtype) {
    int64_t num_bytes = 0;
    for (int64_t k = 0; k < num_slices; ++k) {
        num_bytes += slices[k].size * (element_bytes(packed_dtype) + element_bytes(slices[k].target_dtype));
    }
    return num_bytes;
}

}  // namespace

void unpack_gradients_cpu(const void* packed, DType packed_dtype, const UnpackSlice* slices, std::int64_t num_slices,
                          bool add) {
    const LayerTable table(slices, num_slices, [](const UnpackSlice& slice) { return slice.size; });
    const bool streaming = !add && exceeds_cache(bytes_moved(slices, num_slices, packed_dtype));
    const std::byte* const packed_bytes = static_cast<const std::byte*>(packed);
    for_each_chunk(table, [=](int64_t, const Chunk& chunk) {
        const UnpackSlice& slice = slices[chunk.slice];
        std::byte* target = static_cast<std::byte*>(slice.target);
        unpack_chunk({packed_bytes + (slice.offset + chunk.begin) * element_bytes(packed_dtype), packed_dtype,
                      target + chunk.begin * element_bytes(slice.target_dtype), slice.target_dtype, chunk.size, add,
                      streaming});
    });
}

void add_packed_cpu(void* sum, const void* packed, DType dtype, std::int64_t size) {
    const UnpackSlice whole{sum, dtype, 0, size};
    unpack_gradients_cpu(packed, dtype, &whole, 1, true);
}

}  // namespace jointspar
