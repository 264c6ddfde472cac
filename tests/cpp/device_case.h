// Arrays of any dtype at any alignment, and a queue of the host's CUDA, for tests of the *_cuda operations.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <memory>

#include "check.h"
#include "common/visit_dtype.h"

namespace jointspar::test {

const std::vector<DType> kDTypes{DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16};

// Around a vector, a warp's vectors, a block's vectors and a chunk of 4,096 elements; empty ones between them.
const std::vector<int64_t> kSliceSizes{0, 1, 7, 128, 1021, 4095, 4096, 4097, 0, 0, 3 * 4096 + 77, 2 * 4096, 3, 0};

// `size` elements that start `skew` elements after a 16-byte boundary.
class Array {
  public:
    Array(DType dtype, int64_t size, int64_t skew = 0)
        : dtype_(dtype),
          size_(size),
          skew_(skew),
          bytes_(static_cast<std::size_t>((size + skew) * element_bytes(dtype))) {}

    static Array random(DType dtype, int64_t size, unsigned seed, int64_t skew = 0) {
        Array array(dtype, size, skew);
        const std::vector<float> values = random_floats(size, seed);
        for (int64_t i = 0; i < size; ++i) array.set(i, static_cast<double>(values[static_cast<std::size_t>(i)]));
        return array;
    }

    DType dtype() const { return dtype_; }
    int64_t size() const { return size_; }
    void* data() { return bytes_.data() + skew_ * element_bytes(dtype_); }
    const void* data() const { return bytes_.data() + skew_ * element_bytes(dtype_); }
    bool operator==(const Array& other) const { return bytes_ == other.bytes_; }

    void set(int64_t i, double value) {
        visit_dtype(dtype_, [&](auto tag) { static_cast<decltype(tag)*>(data())[i] = convert<decltype(tag)>(value); });
    }
    double operator[](int64_t i) const {
        return visit_dtype(dtype_,
                           [&](auto tag) { return convert<double>(static_cast<const decltype(tag)*>(data())[i]); });
    }
    double squared_norm() const {
        double sum = 0.0;
        for (int64_t i = 0; i < size_; ++i) sum += (*this)[i] * (*this)[i];
        return sum;
    }

  private:
    DType dtype_;
    int64_t size_;
    int64_t skew_;
    std::vector<std::byte> bytes_;  // malloc aligns to 16 bytes
};

inline DType momentum_dtype(DType param_dtype) {
    return param_dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

struct Device {
    std::unique_ptr<CUstream_st> stream{cuda_on_host::new_stream()};
    DeviceQueue queue{0, stream.get()};
    void synchronize() const { cuda_on_host::synchronize(stream.get()); }
};

// What a call used of the runtime.
template <class Call>
cuda_on_host::Counts counts_of(Call call) {
    const cuda_on_host::Counts before = cuda_on_host::counts;
    call();
    const cuda_on_host::Counts& after = cuda_on_host::counts;
    return {after.launches - before.launches, after.copies - before.copies, after.allocations - before.allocations,
            after.waits - before.waits};
}

}  // namespace jointspar::test
