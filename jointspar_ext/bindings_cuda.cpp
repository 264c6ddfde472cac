// The Python names of the operations on CUDA arrays. Definitions only: what they do is in dispatch_cuda.cpp.
#include <pybind11/stl.h>

#include "dispatch_cuda.h"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(_cuda, m) {
    m.doc() =
        "CUDA kernels of jointspar, as jointspar.backends.on_device calls them. Everything runs on the given stream; "
        "results are written into arrays of the caller. Loads without a driver; a call then raises RuntimeError.";
    m.attr("build_info") = py::dict("version"_a = JOINTSPAR_VERSION, "compiler"_a = JOINTSPAR_CUDA_COMPILER,
                                    "architectures"_a = JOINTSPAR_CUDA_ARCHITECTURES);
    m.def("sample_layers", &jointspar::sample_layers_on_device, "probabilities"_a, "active"_a, "device"_a, "stream"_a,
          py::kw_only(), "seed"_a, "step"_a, "rank"_a, "world_size"_a, "strategy"_a, "draw"_a,
          "run_length"_a = py::none());
    m.def("project_probabilities", &jointspar::project_probabilities_on_device, "log_weights"_a, "probabilities"_a,
          "device"_a, "stream"_a, py::kw_only(), "budget"_a, "p_min"_a);
    m.def("update_probabilities", &jointspar::update_probabilities_on_device, "probabilities"_a, "squared_norms"_a,
          "active"_a, "drawn_probabilities"_a, "gradient_bound"_a, "updated"_a, "device"_a, "stream"_a, py::kw_only(),
          "budget"_a, "p_min"_a, "bandit_lr"_a, "shift"_a);
    m.def("pack_gradients", &jointspar::pack_gradients_on_device, "grads"_a, "scales"_a, "sizes"_a, "packed"_a,
          "squared_norms"_a, "device"_a, "stream"_a);
    m.def("unpack_gradients", &jointspar::unpack_gradients_on_device, "packed"_a, "outs"_a, "add"_a, "device"_a,
          "stream"_a);
    m.def("add_packed", &jointspar::add_packed_on_device, "out"_a, "packed"_a, "device"_a, "stream"_a);
    m.def("squared_norms", &jointspar::squared_norms_on_device, "grads"_a, "sizes"_a.none(true), "squared_norms"_a,
          "device"_a, "stream"_a);
    m.def("lars_update", &jointspar::lars_update_on_device, "params"_a, "momenta"_a, "grads"_a, py::kw_only(),
          "hyper"_a, "adapt"_a, "nesterov"_a, "skip_nonfinite"_a, "param_norms"_a.none(true), "grad_norms"_a.none(true),
          "used_grad_norms"_a, "param_norms_after"_a, "device"_a, "stream"_a);
    m.def("sgd_update", &jointspar::sgd_update_on_device, "params"_a, "momenta"_a, "grads"_a, py::kw_only(), "hyper"_a,
          "nesterov"_a, "skip_nonfinite"_a, "grad_norms"_a, "device"_a, "stream"_a);
}
