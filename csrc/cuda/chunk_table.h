// What a call's kernels read: one record per slice, those of equal dtypes next to each other so that one launch serves
// them, and the numbers of their chunks. One block of bytes, one upload.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/device_chunks.h"
#include "cuda/launch.cuh"

namespace jointspar {

// Slices [begin, end) of a table, all of the same two dtypes.
struct SliceGroup {
    DType left;
    DType right;
    int64_t begin;
    int64_t end;
};

// Record: trivially copyable, without padding (tables are compared by their bytes).
template <class Record>
class ChunkTable {
    static_assert(std::is_trivially_copyable_v<Record> && sizeof(Record) % alignof(int64_t) == 0);

  public:
    explicit ChunkTable(int64_t num_slices) { entries_.reserve(static_cast<std::size_t>(num_slices)); }

    // A slice of `size` elements. One without a dtype, as its array is missing, joins those of the first dtype there
    // is, so that it costs no launch of its own.
    void add(const Record& record, int64_t size, std::optional<DType> left, std::optional<DType> right) {
        if (!any_left_) any_left_ = left;
        if (!any_right_) any_right_ = right;
        entries_.push_back({record, size, left, right});
    }

    // After the last add.
    void finish() {
        for (Entry& entry : entries_) {
            if (!entry.left) entry.left = any_left_.value_or(DType::kFloat32);
            if (!entry.right) entry.right = any_right_.value_or(DType::kFloat32);
        }
        const auto key = [](const Entry& entry) {
            return static_cast<int>(*entry.left) * 256 + static_cast<int>(*entry.right);
        };
        std::stable_sort(entries_.begin(), entries_.end(),
                         [key](const Entry& a, const Entry& b) { return key(a) < key(b); });
        first_chunk_.assign(1, 0);
        for (const Entry& entry : entries_) {
            const auto at = static_cast<int64_t>(first_chunk_.size()) - 1;
            if (groups_.empty() || groups_.back().left != entry.left || groups_.back().right != entry.right) {
                groups_.push_back({*entry.left, *entry.right, at, at});
            }
            ++groups_.back().end;
            first_chunk_.push_back(first_chunk_.back() + num_device_chunks_of(entry.size));
        }
    }

    int64_t num_slices() const { return static_cast<int64_t>(entries_.size()); }
    int64_t num_chunks() const { return first_chunk_.back(); }
    const std::vector<SliceGroup>& groups() const { return groups_; }
    // For kernels that take any dtype.
    SliceGroup all() const { return {DType::kFloat32, DType::kFloat32, 0, num_slices()}; }

    GridShape grid(const SliceGroup& group, int64_t max_blocks = kMaxBlocks) const {
        return grid_of(
            first_chunk_[static_cast<std::size_t>(group.end)] - first_chunk_[static_cast<std::size_t>(group.begin)],
            max_blocks);
    }

    // [records][first_chunk]
    std::vector<std::byte> bytes() const {
        std::vector<std::byte> bytes(entries_.size() * sizeof(Record) + first_chunk_.size() * sizeof(int64_t));
        std::byte* at = bytes.data();
        for (const Entry& entry : entries_) {
            std::memcpy(at, &entry.record, sizeof(Record));
            at += sizeof(Record);
        }
        std::memcpy(at, first_chunk_.data(), first_chunk_.size() * sizeof(int64_t));
        return bytes;
    }

    // Where a group's records and chunk numbers are, given where the bytes were put.
    const Record* records(const std::byte* bytes, const SliceGroup& group) const {
        return reinterpret_cast<const Record*>(bytes) + group.begin;
    }
    const int64_t* first_chunk(const std::byte* bytes, const SliceGroup& group) const {
        return reinterpret_cast<const int64_t*>(bytes + entries_.size() * sizeof(Record)) + group.begin;
    }

  private:
    struct Entry {
        Record record;
        int64_t size;
        std::optional<DType> left;
        std::optional<DType> right;
    };
    std::optional<DType> any_left_;
    std::optional<DType> any_right_;
    std::vector<Entry> entries_;
    std::vector<SliceGroup> groups_;
    std::vector<int64_t> first_chunk_;
};

}  // namespace jointspar
