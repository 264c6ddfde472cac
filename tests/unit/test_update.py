"""Stage 5: hyperparameters by parameter, carried norms, clipping."""

import numpy as np
import pytest
import torch

from jointspar.hyperparameters import HyperParameters
from jointspar.step.update import LarsUpdate, clip_packed, slice_norms


def test_hyperparameters_follow_their_groups():
    parameters = [torch.zeros(2, 2), torch.zeros(2), torch.zeros(3, 3)]
    groups = [
        {
            "params": [parameters[2], parameters[0]],
            "lr": 0.1,
            "momentum": 0.9,
            "adapt_vectors": False,
            "nesterov": True,
        },
        {"params": [parameters[1]], "lr": 0.2, "momentum": 0.8, "adapt_vectors": False, "nesterov": True},
    ]
    hyper = HyperParameters(groups, parameters, ("lr", "momentum"))
    assert hyper.rows(np.array([0, 1, 2])).tolist() == [[0.1, 0.9], [0.2, 0.8], [0.1, 0.9]]
    assert hyper.treated_as_vectors(np.array([0, 1, 2])).tolist() == [False, True, False]
    groups[0]["lr"] = torch.tensor(0.5, dtype=torch.float64)
    groups[1]["adapt_vectors"] = True
    assert hyper.rows(np.array([2])).tolist() == [[0.1, 0.9]] and hyper.treated_as_vectors(np.array([1])).all()
    hyper.refresh()
    assert hyper.rows(np.array([2, 1])).tolist() == [[0.5, 0.9], [0.2, 0.8]]
    assert not hyper.treated_as_vectors(np.array([1])).any()


def test_slice_norms_are_those_of_the_slices_and_show_non_finite_values():
    packed = torch.tensor([3.0, 4.0, 0.0, 5.0, 12.0])
    assert slice_norms(packed, np.array([2, 1, 2])).tolist() == [5.0, 0.0, 13.0]
    packed[2] = float("nan")
    assert slice_norms(packed, np.array([2, 1, 2])).isfinite().tolist() == [True, False, True]


def test_clipping_scales_to_the_total_norm_or_not_at_all():
    packed = torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64)
    norms = clip_packed(packed, torch.tensor([5.0, 12.0], dtype=torch.float64), 1.3)
    np.testing.assert_allclose(packed.numpy(), np.array([3.0, 4.0, 12.0]) / 10, rtol=1e-6)
    np.testing.assert_allclose(norms, [0.5, 1.2], rtol=1e-6)
    assert clip_packed(packed, norms, 100.0) is norms


@pytest.mark.parametrize("write", ["in_place", "storage"])
def test_a_weight_written_by_somebody_else_is_measured_again(write):
    weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    momentum = torch.zeros(2, 2, dtype=torch.float64)
    group = dict(
        params=[weight],
        lr=1.0,
        momentum=0.0,
        weight_decay=0.0,
        trust_coefficient=1.0,
        eps=0.0,
        nesterov=False,
        adapt_vectors=False,
    )
    hyper = HyperParameters([group], [weight], ("lr", "momentum", "weight_decay", "trust_coefficient", "eps"))
    update = LarsUpdate([weight], [momentum])
    grads = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    everything = np.array([0])
    norm = torch.ones(1, dtype=torch.float64)
    update.apply(everything, grads, norm, hyper, idle=np.array([], dtype=np.int64), skip_nonfinite=False)
    assert weight[0, 0].item() == pytest.approx(1.0 - 2.0)  # local = ||w|| / ||g|| = 2
    with torch.no_grad():
        if write == "in_place":
            weight.fill_(3.0)
        else:
            weight.data = torch.full((2, 2), 3.0, dtype=torch.float64)
    norm = torch.ones(1, dtype=torch.float64)
    update.apply(everything, grads, norm, hyper, idle=np.array([], dtype=np.int64), skip_nonfinite=False)
    assert weight[0, 0].item() == pytest.approx(3.0 - 6.0)
