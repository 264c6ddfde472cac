"""The compiled backend: the functions of `jointspar_ext._core` as they are."""

from jointspar_ext._core import (
    add_packed,
    lars_update,
    pack_gradients,
    project_probabilities,
    sample_layers,
    sgd_update,
    squared_norms,
    unpack_gradients,
    update_probabilities,
)

__all__ = [
    "add_packed",
    "lars_update",
    "pack_gradients",
    "project_probabilities",
    "sample_layers",
    "sgd_update",
    "squared_norms",
    "unpack_gradients",
    "update_probabilities",
]
