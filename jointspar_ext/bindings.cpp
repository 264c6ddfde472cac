// The Python names of the operations. Definitions only: what they do is in dispatch.cpp.
#include <omp.h>
#include <pybind11/stl.h>

#include "dispatch.h"
#include "watchdog.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

const char* instruction_set() {
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(JOINTSPAR_NO_CLONES)
    return __builtin_cpu_supports("avx2") ? "avx2" : "x86-64 baseline";
#else
    return "compiler default";
#endif
}

py::dict build_info() {
    return py::dict("version"_a = JOINTSPAR_VERSION, "compiler"_a = JOINTSPAR_COMPILER, "openmp"_a = _OPENMP,
                    "simd"_a = instruction_set());
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "Kernels of jointspar. Arrays are torch tensors or NumPy arrays; see jointspar.ops for their meaning.";
    m.attr("build_info") = build_info();
    m.def("sample_layers", &jointspar::sample_layers, "probabilities"_a, py::kw_only(), "seed"_a, "step"_a, "rank"_a,
          "world_size"_a, "strategy"_a, "draw"_a, "run_length"_a = py::none(),
          "The layers that this rank computes: bool [num_layers].");
    m.def("project_probabilities", &jointspar::project_probabilities, "log_weights"_a, py::kw_only(), "budget"_a,
          "p_min"_a, "The nearest distribution with sum budget and entries in [p_min, 1]: float64 [num_layers].");
    m.def("update_probabilities", &jointspar::update_probabilities, "probabilities"_a, "squared_norms"_a, "active"_a,
          py::kw_only(), "drawn_probabilities"_a, "gradient_bound"_a, "budget"_a, "p_min"_a, "bandit_lr"_a, "shift"_a,
          "One bandit step: (probabilities float64 [num_layers], gradient_bound).");
    m.def("pack_gradients", &jointspar::pack_gradients, "grads"_a, "scales"_a, "sizes"_a, "packed"_a,
          "Writes the scaled gradients into packed; their squared norms before scaling: float64 [num_grads].");
    m.def("unpack_gradients", &jointspar::unpack_gradients, "packed"_a, "outs"_a, "add"_a,
          "Writes the slices of packed into outs, or adds them.");
    m.def("add_packed", &jointspar::add_packed, "out"_a, "packed"_a, "Adds packed to out.");
    m.def("squared_norms", &jointspar::squared_norms, "grads"_a, "sizes"_a.none(true) = py::none(),
          "Sums of squares of each array of a list, or of each slice of a packed array: float64 [num_grads].");
    m.def("lars_update", &jointspar::lars_update, "params"_a, "momenta"_a, "grads"_a, py::kw_only(), "hyper"_a,
          "adapt"_a, "nesterov"_a, "param_norms"_a, "grad_norms"_a, "skip_nonfinite"_a = false,
          "Updates params and momenta; (grad_norms, param_norms_after), float64 [num_params] each.");
    m.def("sgd_update", &jointspar::sgd_update, "params"_a, "momenta"_a, "grads"_a, py::kw_only(), "hyper"_a,
          "nesterov"_a, "skip_nonfinite"_a = false,
          "Updates params and momenta; the gradients' norms: float64 [num_params].");
    m.def(
        "start_watch",
        [](double seconds, const std::string& message) {
            return jointspar::Watchdog::instance().start(seconds, message);
        },
        "seconds"_a, "message"_a,
        "From now on the process ends by _exit(1), with the message on stderr, unless end_watch comes in time.");
    m.def(
        "end_watch", [](std::uint64_t watch) { jointspar::Watchdog::instance().end(watch); }, "watch"_a,
        "Takes a watch away.");
}
