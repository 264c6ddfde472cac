// Reads torch tensors, NumPy and CuPy arrays and others without copying. Every check that stands between Python and a
// pointer that a kernel uses is made here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "dlpack_abi.h"
#include "jointspar/types.h"

namespace jointspar {

enum class Access { kRead, kWrite };
enum class Kind { kFloat, kFlag };  // floating point of a supported DType; bool

// Which argument an array came from, for messages: "params[3]" or "packed".
struct ArgName {
    const char* name;
    std::int64_t index = -1;

    std::string str() const;
};

constexpr std::int32_t kHost = -1;  // what stands for the CPU among CUDA device numbers

// A dense array in one memory. `data` is null for None and for empty arrays; shape and strides belong to the array.
struct ArrayView {
    void* data = nullptr;
    std::int64_t size = 0;
    DType dtype = DType::kFloat32;  // of a float array
    std::int64_t item_bytes = 0;
    bool is_none = false;
    std::int32_t ndim = 0;
    const std::int64_t* shape = nullptr;
    const std::int64_t* strides = nullptr;  // null: C-contiguous
    std::int64_t stride_unit = 1;           // 1: strides count elements; element size: they count bytes
};

// Keeps alive whatever the views of one call point into. Create, read and destroy it with the GIL held.
class ArrayReader {
  public:
    // Accepts the arrays of one memory: the host's, or that of one CUDA device, there for use on a cudaStream_t.
    explicit ArrayReader(std::int32_t device = kHost, std::uintptr_t stream = 0) : device_(device), stream_(stream) {}
    ~ArrayReader();
    ArrayReader(const ArrayReader&) = delete;
    ArrayReader& operator=(const ArrayReader&) = delete;

    // Raises TypeError for what is no dense-capable array of a supported dtype in this memory, ValueError for a gap,
    // an expanded dimension or a negative stride, or for a read-only array that is to be written. What torch
    // and CuPy have under way on a CUDA array is not waited for, since the operation runs on their stream; other
    // producers are asked for order by DLPack. That the memory reaches as far as the array says is the producer's
    // promise: a torch storage that was shrunk under its tensor is not seen.
    ArrayView read(pybind11::handle object, ArgName name, Access access, Kind kind = Kind::kFloat);
    // One dimension; of `size` elements where that is not negative.
    ArrayView read_flat(pybind11::handle object, ArgName name, Access access, std::int64_t size = -1,
                        Kind kind = Kind::kFloat);
    std::vector<ArrayView> read_list(pybind11::handle list, const char* name, Access access, bool allows_none = false);

    // ValueError when an array that is written shares memory with any other array that was read.
    void check_no_overlap();

  private:
    struct Interval {
        std::uintptr_t begin;
        std::uintptr_t end;
        Access access;
        ArgName name;
    };

    ArrayView read_by_protocol(pybind11::handle object, ArgName name, Access access, Kind kind);
    ArrayView read_buffer(pybind11::handle object, ArgName name, Access access, Kind kind);
    ArrayView read_dlpack(const dlpack::Tensor& tensor, ArgName name, Kind kind);
    ArrayView read_capsule(pybind11::handle object, ArgName name, Kind kind);
    ArrayView read_cuda_array_interface(pybind11::handle object, ArgName name, Access access, Kind kind);
    static bool has_memory(pybind11::handle object, const ArrayView& view);
    void check_place(std::int32_t device_type, std::int32_t device_id, ArgName name) const;

    std::int32_t device_;
    std::uintptr_t stream_;
    std::vector<pybind11::object> owners_;
    std::deque<Py_buffer> buffers_;
    std::deque<std::vector<std::int64_t>> dims_;  // shapes and strides that no array holds
    std::vector<Interval> intervals_;
};

// ValueError unless both have the same shape and the same order in memory.
void check_same_layout(const ArrayView& array, ArgName name, const ArrayView& like, ArgName like_name);

}  // namespace jointspar
