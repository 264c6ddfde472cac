// Errors that name the argument they are about.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "array_view.h"

namespace jointspar {

[[noreturn]] inline void raise_type(ArgName name, const std::string& problem) {
    throw pybind11::type_error(name.str() + " " + problem);
}

[[noreturn]] inline void raise_value(ArgName name, const std::string& problem) {
    throw pybind11::value_error(name.str() + " " + problem);
}

inline std::string type_name(pybind11::handle object) { return Py_TYPE(object.ptr())->tp_name; }

}  // namespace jointspar
