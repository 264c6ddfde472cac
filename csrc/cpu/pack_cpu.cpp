#include <cstring>
#include <vector>

#include "cpu/half_floats.h"
#include "cpu/non_temporal.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "jointspar/pack_gradients.h"

namespace jointspar {
namespace {

struct PackChunk {
    const void* source;  // the chunk's first element
    DType source_dtype;
    void* packed;  // where that element goes
    DType packed_dtype;
    int64_t size;
    double scale;
    bool streaming;
};

template <class Source, class Packed>
JOINTSPAR_INLINE double pack_values(const Source* source, Packed* packed, const PackChunk& chunk) {
    using Acc = accumulator_t<Source>;
    using Product = accumulator_t<Source, Packed>;
    const Product scale = static_cast<Product>(chunk.scale);
    SquareLanes<Acc> squares{};
    const int64_t shift = write_values<SquareLanes<Acc>::kLanes>(
        packed, chunk.size, chunk.streaming, [&](int64_t i, int lane) JOINTSPAR_INLINE_LAMBDA {
            const Acc value = convert<Acc>(source[i]);
            squares.lanes[lane] += value * value;
            return convert<Packed>(static_cast<Product>(value) * scale);
        });
    return checked_total(squares, source, chunk.size, shift);
}

// Returns the sum of squares of the source.
JOINTSPAR_SIMD_CLONES double pack_chunk_simd(const PackChunk& chunk) {
    return visit_dtype(chunk.source_dtype, [&](auto source) JOINTSPAR_INLINE_LAMBDA {
        return visit_dtype(chunk.packed_dtype, [&](auto packed) JOINTSPAR_INLINE_LAMBDA {
            return pack_values(static_cast<const decltype(source)*>(chunk.source),
                               static_cast<decltype(packed)*>(chunk.packed), chunk);
        });
    });
}

double pack_chunk(PackChunk chunk) {
    const bool has_halves = chunk.source_dtype == DType::kFloat16 || chunk.packed_dtype == DType::kFloat16;
    if (!has_halves || !has_half_conversions()) return pack_chunk_simd(chunk);
    if (chunk.source_dtype == DType::kFloat16) {
        chunk.source = staged_floats(chunk.source, chunk.size, 0);
        chunk.source_dtype = DType::kFloat32;
    }
    if (chunk.packed_dtype != DType::kFloat16) return pack_chunk_simd(chunk);
    float* const floats = staged_chunk(1);
    const double sum =
        pack_chunk_simd({chunk.source, chunk.source_dtype, floats, DType::kFloat32, chunk.size, chunk.scale, false});
    to_halves(floats, static_cast<Float16*>(chunk.packed), chunk.size);
    return sum;
}

int64_t bytes_moved(const PackSlice* slices, int64_t num_slices, DType packed_dtype) {
    int64_t num_bytes = 0;
    for (int64_t k = 0; k < num_slices; ++k) {
        num_bytes += slices[k].size * (element_bytes(slices[k].source_dtype) + element_bytes(packed_dtype));
    }
    return num_bytes;
}

}  // namespace

void pack_gradients_cpu(const PackSlice* slices, std::int64_t num_slices, void* packed, DType packed_dtype,
                        double* squared_norms) {
    const LayerTable table(slices, num_slices, [](const PackSlice& slice) { return slice.size; });
    const bool streaming = exceeds_cache(bytes_moved(slices, num_slices, packed_dtype));
    std::vector<double> chunk_sums(static_cast<std::size_t>(table.num_chunks()));
    double* const sums = chunk_sums.data();
    std::byte* const packed_bytes = static_cast<std::byte*>(packed);
    for_each_chunk(table, [=](int64_t index, const Chunk& chunk) {
        const PackSlice& slice = slices[chunk.slice];
        std::byte* target = packed_bytes + (slice.offset + chunk.begin) * element_bytes(packed_dtype);
        if (slice.source == nullptr) {  // all bits zero is zero in every dtype
            std::memset(target, 0, static_cast<std::size_t>(chunk.size * element_bytes(packed_dtype)));
            sums[index] = 0.0;
            return;
        }
        const std::byte* source =
            static_cast<const std::byte*>(slice.source) + chunk.begin * element_bytes(slice.source_dtype);
        sums[index] =
            pack_chunk({source, slice.source_dtype, target, packed_dtype, chunk.size, slice.scale, streaming});
    });
    if (squared_norms == nullptr) return;
    for (int64_t k = 0; k < num_slices; ++k) squared_norms[k] = table.sum_of(k, sums);
}

}  // namespace jointspar
