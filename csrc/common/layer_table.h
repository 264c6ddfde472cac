// Slices (one per tensor) cut into chunks of a fixed size, numbered through all slices: the unit of work and of
// partial sums. The cut depends on the sizes alone, so sums over chunks in index order are the same bits for every
// number of threads.
#pragma once

#include "common/portable.h"
#if !defined(__CUDACC_RTC__)
#include <vector>
#endif

namespace jointspar {

constexpr int64_t kChunkSize = 16384;  // of the CPU kernels; common/device_chunks.h has the device's

struct Chunk {
    int64_t slice;
    int64_t begin;  // first element, counted within the slice
    int64_t size;
};

JOINTSPAR_HOST_DEVICE inline int64_t num_chunks_of(int64_t size, int64_t chunk_size = kChunkSize) {
    return (size + chunk_size - 1) / chunk_size;
}

// Chunk `number` of a slice of `size` elements, 0 <= number. Past the slice's last element: a chunk of size <= 0.
JOINTSPAR_HOST_DEVICE inline Chunk chunk_of_slice(int64_t slice, int64_t number, int64_t size,
                                                  int64_t chunk_size = kChunkSize) {
    const int64_t begin = number * chunk_size;
    const int64_t rest = size - begin;
    return Chunk{slice, begin, rest < chunk_size ? rest : chunk_size};
}

// Index of the last entry <= value in a non-decreasing array with starts[0] <= value.
JOINTSPAR_HOST_DEVICE inline int64_t last_not_above(const int64_t* starts, int64_t count, int64_t value) {
    int64_t low = 0;
    int64_t high = count;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (starts[middle] <= value) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// first_chunk [num_slices + 1], sizes [num_slices];  0 <= chunk < first_chunk[num_slices]. Empty slices own no chunk.
JOINTSPAR_HOST_DEVICE inline Chunk locate_chunk(const int64_t* first_chunk, const int64_t* sizes, int64_t num_slices,
                                                int64_t chunk) {
    const int64_t slice = last_not_above(first_chunk, num_slices, chunk);
    return chunk_of_slice(slice, chunk - first_chunk[slice], sizes[slice]);
}

#if !defined(__CUDACC_RTC__)
class LayerTable {
  public:
    template <class Slices, class SizeOf>
    LayerTable(const Slices* slices, int64_t num_slices, SizeOf size_of) {
        const auto count = static_cast<std::size_t>(num_slices);
        sizes_.reserve(count);
        first_chunk_.reserve(count + 1);
        first_element_.reserve(count + 1);
        first_chunk_.push_back(0);
        first_element_.push_back(0);
        for (int64_t slice = 0; slice < num_slices; ++slice) {
            const int64_t size = size_of(slices[slice]);
            sizes_.push_back(size);
            first_chunk_.push_back(first_chunk_.back() + num_chunks_of(size));
            first_element_.push_back(first_element_.back() + size);
        }
    }

    int64_t num_slices() const { return static_cast<int64_t>(sizes_.size()); }
    int64_t num_chunks() const { return first_chunk_.back(); }
    int64_t num_elements() const { return first_element_.back(); }
    int64_t size(int64_t slice) const { return sizes_[static_cast<std::size_t>(slice)]; }
    // Both accept slice == num_slices().
    int64_t first_chunk(int64_t slice) const { return first_chunk_[static_cast<std::size_t>(slice)]; }
    int64_t first_element(int64_t slice) const { return first_element_[static_cast<std::size_t>(slice)]; }

    Chunk locate(int64_t chunk) const { return locate_chunk(first_chunk_.data(), sizes_.data(), num_slices(), chunk); }

    // The first chunk that starts at or after an element, 0 <= element <= num_elements().
    int64_t chunk_at_or_after(int64_t element) const {
        if (element >= num_elements()) return num_chunks();
        const int64_t slice = last_not_above(first_element_.data(), num_slices(), element);
        return first_chunk(slice) + num_chunks_of(element - first_element(slice));
    }

    // chunk_sums [num_chunks()] added up in index order.
    double sum_of(int64_t slice, const double* chunk_sums) const {
        double sum = 0.0;
        for (int64_t chunk = first_chunk(slice); chunk < first_chunk(slice + 1); ++chunk) sum += chunk_sums[chunk];
        return sum;
    }

  private:
    std::vector<int64_t> sizes_;
    std::vector<int64_t> first_chunk_;
    std::vector<int64_t> first_element_;
};
#endif

}  // namespace jointspar
