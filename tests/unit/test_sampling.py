"""Settings of the draws."""

import numpy as np
import pytest

from jointspar.step.sampling import Sampling, draw_layers, probabilities_to_draw


def test_a_fraction_and_a_count_are_told_apart():
    assert Sampling(budget=1.0).constraints(60)[0] == 60.0
    assert Sampling(budget=1).constraints(60)[0] == 1.0
    assert Sampling(budget=0.25).constraints(60)[0] == 15.0


@pytest.mark.parametrize(
    ("sampling", "world_size", "p_min"),
    [
        (Sampling(budget=0.5), 1, 0.5),
        (Sampling(budget=0.5), 2, 0.5),
        (Sampling(budget=0.25), 2, 0.25),
        (Sampling(budget=0.5), 8, 0.125),
        (Sampling(budget=0.5), 16, 0.1),
        (Sampling(budget=0.125), 64, 0.05),
        (Sampling(budget=0.5, strategy="independent"), 2, 0.1),
        (Sampling(budget=0.5, strategy="shared"), 16, 0.5),
        (Sampling(budget=0.5, distribution="bandit"), 2, 0.1),
        (Sampling(budget=0.125, distribution="bandit"), 2, 0.05),
    ],
)
def test_p_min_defaults_as_documented(sampling, world_size, p_min):
    """A stratified draw gives a layer to floor or ceil of world_size * p ranks, so to one at least from 1 on."""
    assert sampling.constraints(64, world_size=world_size) == (sampling.budget * 64, pytest.approx(p_min))


def test_frozen_layers_stand_outside_a_fraction():
    assert Sampling(budget=0.5).constraints(60, num_frozen=20)[0] == 20.0
    assert Sampling(budget=50).constraints(60, num_frozen=20)[0] == 40.0


def test_paper_is_the_paper_s_literal_reading():
    sampling = Sampling.paper(0.5, seed=3)
    assert (sampling.strategy, sampling.draw, sampling.distribution) == ("independent", "bernoulli", "bandit")
    assert sampling.shift and sampling.grouping == "tensor" and sampling.seed == 3


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (dict(budget=0.0), "budget"),
        (dict(budget=1.5), "budget"),
        (dict(budget=float("nan")), "budget"),
        (dict(budget=0), "budget"),
        (dict(budget=-3), "budget"),
        (dict(p_min=0.0), "p_min"),
        (dict(p_min=1.1), "p_min"),
        (dict(strategy="both"), "strategy"),
        (dict(draw="poisson"), "draw"),
        (dict(distribution="flat"), "distribution"),
        (dict(grouping="block"), "grouping"),
        (dict(distribution="bandit", bandit_lr=-1.0), "bandit_lr"),
        (dict(distribution="bandit", bandit_lr=float("inf")), "bandit_lr"),
        (dict(bandit_lr=0.1), "bandit_lr: does not act"),
        (dict(distribution="uniform", bandit_lr=0.05), "bandit_lr: does not act"),
        (dict(lag=2), "lag"),
        (dict(dense_steps=-1), "dense_steps"),
        (dict(distribution="uniform", p_min=0.1), "p_min"),
        (dict(strategy="shared", distribution="norm", shift=True), "shift: does not act"),
        (dict(strategy="stratified", distribution="bandit", shift=True), "shift: is for strategy"),
        (dict(strategy="shared", distribution="bandit", shift=True, dense_steps=1), "shift: .* without dense_steps"),
        (dict(seed=-1), "seed"),
        (dict(seed=2**64), "seed"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, name):
    with pytest.raises(ValueError, match=name):
        Sampling(**settings)


@pytest.mark.parametrize("name", ["lag", "dense_steps", "seed"])
def test_what_is_no_count_is_refused_by_name(name):
    for value in (1.5, True, "1", None):
        with pytest.raises(TypeError, match=name):
            Sampling(**{name: value})


def test_numbers_of_numpy_are_numbers():
    """As of an array of settings to try."""
    given = dict(budget=np.int64(3), p_min=np.float32(0.25), seed=np.int64(5), lag=np.uint8(1), shift=np.bool_(True))
    sampling = Sampling(**given, distribution="bandit", strategy="shared")
    same = Sampling(budget=3, p_min=0.25, seed=5, lag=1, distribution="bandit", strategy="shared", shift=True)
    assert sampling == same and repr(sampling) == repr(same)  # the ranks compare hashes of the fields
    assert repr(Sampling(dense_steps=np.int32(2))) == repr(Sampling(dense_steps=2))
    with pytest.raises(ValueError, match="fraction"):
        Sampling(budget=np.float32(1.5))


def test_a_budget_that_is_no_number_is_refused():
    for budget in ("0.5", True, None):
        with pytest.raises(TypeError, match="budget"):
            Sampling(budget=budget)


def test_infeasible_constraints_are_refused():
    with pytest.raises(ValueError, match="budget"):
        Sampling(budget=61).constraints(60)
    with pytest.raises(ValueError, match="p_min"):
        Sampling(budget=0.25, p_min=0.5).constraints(60)


def test_layers_of_probability_zero_are_never_drawn():
    probabilities = np.array([0.0, 1.0, 0.0, 0.5, 0.5])
    for step in range(200):
        active = draw_layers(probabilities, Sampling(), sizes=np.arange(5), step=step, rank=0, world_size=1)
        assert not active[[0, 2]].any() and active[1] and active[3:].sum() == 1


@pytest.mark.parametrize("strategy", ["stratified", "independent", "shared"])
def test_layers_are_drawn_with_their_probabilities_whatever_their_sizes(strategy, rng):
    probabilities, sizes = np.array([0.9, 0.2, 0.5, 0.7, 0.4, 0.3]), np.array([5, 100, 7, 1, 100, 30])
    sampling, num_steps = Sampling(strategy=strategy), 20_000
    counts = sum(
        draw_layers(probabilities, sampling, sizes=sizes, step=step, rank=1, world_size=3) for step in range(num_steps)
    )
    deviations = np.sqrt(probabilities * (1 - probabilities) / num_steps)
    assert (np.abs(counts / num_steps - probabilities) < 4.5 * deviations).all()


def test_two_ranks_share_the_layers_nearly_by_size(rng):
    """Of each two neighbours in size they take one each, so they differ by at most the largest layer."""
    sizes = np.round(np.exp(rng.normal(8, 3, 30))).astype(np.int64)
    shares = set()
    for step in range(300):
        first, second = (
            draw_layers(np.full(30, 0.5), Sampling(), sizes=sizes, step=step, rank=rank, world_size=2)
            for rank in range(2)
        )
        assert (first ^ second).all()
        assert abs(int(sizes[first].sum()) - int(sizes[second].sum())) <= sizes.max()
        shares.add(tuple(first))
    assert len(shares) > 290  # of 2**15 sets


def test_the_first_steps_are_dense_where_that_is_wanted():
    probabilities = np.array([0.25, 0.0, 0.75])
    sampling = Sampling(budget=0.5, dense_steps=2)
    assert probabilities_to_draw(probabilities, sampling, 1).tolist() == [1.0, 0.0, 1.0]
    assert probabilities_to_draw(probabilities, sampling, 2).tolist() == [0.25, 0.0, 0.75]
