// Reads torch tensors, NumPy arrays and other arrays without copying. Every check that stands between Python and a
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

// Which argument an array came from, for messages: "params[3]" or "packed".
struct ArgName {
    const char* name;
    std::int64_t index = -1;

    std::string str() const;
};

// A dense array on the CPU. `data` is null for None and for empty arrays; shape and strides belong to the array.
struct ArrayView {
    void* data = nullptr;
    std::int64_t size = 0;
    DType dtype = DType::kFloat32;
    bool is_none = false;
    std::int32_t ndim = 0;
    const std::int64_t* shape = nullptr;
    const std::int64_t* strides = nullptr;  // null: C-contiguous
    std::int64_t stride_unit = 1;           // 1: strides count elements; element size: they count bytes
};

// Keeps alive whatever the views of one call point into. Create, read and destroy it with the GIL held.
class ArrayReader {
  public:
    ArrayReader() = default;
    ~ArrayReader();
    ArrayReader(const ArrayReader&) = delete;
    ArrayReader& operator=(const ArrayReader&) = delete;

    // Raises TypeError for what is no dense-capable CPU array of a supported dtype, ValueError for a gap, an
    // expanded dimension or a negative stride, or for a read-only array that is to be written.
    ArrayView read(pybind11::handle object, ArgName name, Access access);
    ArrayView read_flat(pybind11::handle object, ArgName name, Access access);  // one dimension
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

    ArrayView read_buffer(pybind11::handle object, ArgName name, Access access);
    ArrayView read_dlpack(const dlpack::Tensor& tensor, ArgName name);
    ArrayView read_capsule(pybind11::handle object, ArgName name);

    std::vector<pybind11::object> owners_;
    std::deque<Py_buffer> buffers_;
    std::vector<Interval> intervals_;
};

// ValueError unless both have the same shape and the same order in memory.
void check_same_layout(const ArrayView& array, ArgName name, const ArrayView& like, ArgName like_name);

}  // namespace jointspar
