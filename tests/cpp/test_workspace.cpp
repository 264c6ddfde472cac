#include "device_case.h"
#include "jointspar/squared_norms.h"

namespace jointspar {
namespace {

using test::Array;
using test::counts_of;
using test::Device;

// Arrays of 3 chunks, with one norm each.
struct Norms {
    std::vector<Array> arrays;
    std::vector<double> norms;

    explicit Norms(int64_t count, unsigned seed = 0) : norms(static_cast<std::size_t>(count), -1.0) {
        for (int64_t k = 0; k < count; ++k) {
            arrays.push_back(Array::random(DType::kFloat32, 9000, seed + static_cast<unsigned>(k)));
        }
    }
    void find(const Device& device) {
        std::vector<NormSlice> slices;
        for (const Array& array : arrays) slices.push_back({array.data(), array.dtype(), array.size()});
        squared_norms_cuda(slices.data(), static_cast<int64_t>(slices.size()), norms.data(), device.queue);
    }
    void check() const {
        for (std::size_t k = 0; k < arrays.size(); ++k) CHECK_CLOSE(norms[k], arrays[k].squared_norm(), 1e-6);
    }
};

TEST(calls_with_the_same_arguments_neither_copy_nor_allocate_nor_wait) {
    const Device device;
    Norms norms(5);
    norms.find(device);
    device.synchronize();
    const cuda_on_host::Counts counts = counts_of([&] { norms.find(device); });
    CHECK(counts.launches == 1 && counts.copies == 0 && counts.allocations == 0 && counts.waits == 0);
    device.synchronize();
    norms.check();
}

TEST(tables_of_several_calls_may_wait_in_the_queue) {
    const Device device;
    std::vector<Norms> calls;
    for (unsigned call = 0; call < 10; ++call) calls.emplace_back(1 + call % 3, 10 * call);
    const cuda_on_host::Counts counts = counts_of([&] {
        for (Norms& call : calls) call.find(device);
    });
    CHECK(counts.launches == 10 && counts.copies == 10 && counts.waits == 0);
    device.synchronize();
    for (const Norms& call : calls) call.check();
}

TEST(other_arguments_are_copied_through_the_same_pinned_memory) {
    const Device device;
    Norms first(5);
    Norms second(5, 50);
    first.find(device);
    device.synchronize();
    const cuda_on_host::Counts counts = counts_of([&] { second.find(device); });
    CHECK(counts.copies == 1 && counts.allocations == 0 && counts.waits == 0);
    device.synchronize();
    second.check();
}

TEST(a_queue_of_very_many_calls_waits_for_the_oldest_copy) {
    const Device device;
    std::vector<Norms> calls;
    for (unsigned call = 0; call < 70; ++call) calls.emplace_back(1, call);
    const cuda_on_host::Counts counts = counts_of([&] {
        for (Norms& call : calls) call.find(device);
    });
    CHECK(counts.waits > 0);
    device.synchronize();
    for (const Norms& call : calls) call.check();
}

TEST(workspaces_grow_while_earlier_calls_wait) {
    const Device device;
    Norms small(2);
    Norms large(700, 100);
    small.find(device);
    large.find(device);
    Norms small_again(2, 900);
    small_again.find(device);
    device.synchronize();
    small.check();
    large.check();
    small_again.check();
}

TEST(a_captured_call_is_replayed_whatever_was_called_since) {
    const Device device;
    Norms captured(4);
    Norms other(4, 40);
    device.stream->is_capturing = true;
    captured.find(device);
    device.stream->is_capturing = false;
    other.find(device);
    device.synchronize();
    other.check();
    for (unsigned seed : {70u, 80u}) {
        const std::vector<Array> fresh = Norms(4, seed).arrays;
        for (std::size_t k = 0; k < fresh.size(); ++k) std::memcpy(captured.arrays[k].data(), fresh[k].data(), 36000);
        cuda_on_host::replay(device.stream.get());
        captured.check();
        other.find(device);
        device.synchronize();
        other.check();
    }
}

TEST(streams_have_workspaces_of_their_own) {
    const Device first_device;
    const Device second_device;
    Norms first(3);
    Norms second(3, 30);
    first.find(first_device);
    second.find(second_device);
    second_device.synchronize();
    first_device.synchronize();
    first.check();
    second.check();
}

}  // namespace
}  // namespace jointspar
