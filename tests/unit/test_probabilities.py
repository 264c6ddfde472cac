"""The distribution of one rank: constraints, norms, bandit, frozen layers, state."""

import numpy as np
import pytest

from jointspar import ops
from jointspar.device_arrays import Reading
from jointspar.learning import Lesson
from jointspar.step.probabilities import LayerDistribution, observation_chance, observed_norms
from jointspar.step.sampling import Sampling


def make(num_layers=6, **settings):
    return LayerDistribution(Sampling(**settings), num_layers, np.ones(num_layers, dtype=bool))


def test_starts_uniform():
    assert make(budget=0.5).probabilities.tolist() == [0.5] * 6
    assert make(budget=1.0).probabilities.tolist() == [1.0] * 6


def test_norm_distribution_is_proportional_to_the_norms():
    distribution = make(num_layers=4, budget=1, distribution="norm", p_min=0.01)
    distribution.update(np.array([1.0, 4.0, 9.0, 16.0]), np.ones(4, dtype=bool))
    np.testing.assert_allclose(distribution.probabilities, np.array([1, 2, 3, 4]) / 10, rtol=1e-12)


def test_norm_distribution_corrects_its_bias_and_puts_unseen_layers_at_the_mean():
    distribution = make(num_layers=3, budget=1, distribution="norm", p_min=0.01)
    seen = np.array([True, True, False])
    distribution.update(np.array([4.0, 1.0, np.nan]), seen)
    distribution.update(np.array([1.0, 1.0, np.nan]), seen)
    first = (0.9 * 0.1 * 4.0 + 0.1 * 1.0) / (1 - 0.81)  # by hand
    mean_squares = np.array([first, 1.0, (first + 1.0) / 2])
    np.testing.assert_allclose(
        distribution.probabilities, np.sqrt(mean_squares) / np.sqrt(mean_squares).sum(), rtol=1e-12
    )


def test_norm_distribution_minimises_the_sampling_noise():
    squared_norms = np.array([1.0, 0.25, 9.0, 4.0, 16.0])
    distribution = make(num_layers=5, budget=2, distribution="norm", p_min=0.01)
    distribution.update(squared_norms, np.ones(5, dtype=bool))
    best = (squared_norms / distribution.probabilities).sum()
    rng = np.random.default_rng(0)
    for _ in range(500):
        other = distribution.probabilities + rng.normal(0, 0.02, 5)
        other += (2.0 - other.sum()) / 5
        if other.min() >= 0.01 and other.max() <= 1.0:
            assert (squared_norms / other).sum() >= best - 1e-9


def test_uniform_never_moves():
    distribution = make(distribution="uniform")
    distribution.update(np.arange(6.0), np.ones(6, dtype=bool))
    assert distribution.probabilities.tolist() == [0.5] * 6


def test_bandit_raises_layers_of_large_norm():
    distribution = make(distribution="bandit", bandit_lr=0.5)
    for _ in range(20):
        distribution.update(np.array([9.0, 1.0, 1.0, 1.0, 1.0, 1.0]), np.ones(6, dtype=bool))
    assert distribution.probabilities[0] > distribution.probabilities[1:].max()
    assert distribution.probabilities.sum() == pytest.approx(3.0, abs=1e-9)
    assert distribution.gradient_bound == pytest.approx(3.0)


def test_bandit_reaches_the_least_sampling_noise_with_a_stratified_draw():
    num_layers, world_size = 60, 8
    squared_norms = np.where(np.arange(num_layers) < 30, 100.0, 1.0)
    rng = np.random.default_rng(0)
    distribution = make(num_layers, budget=30, distribution="bandit", p_min=0.05)
    for step in range(300):
        drawn = distribution.probabilities.copy()
        active = [
            ops.sample_layers(drawn, seed=1, step=step, rank=rank, world_size=world_size, strategy="stratified")
            for rank in range(world_size)
        ]
        counts = np.sum(active, axis=0)
        noisy = squared_norms * np.exp(0.5 * rng.standard_normal((world_size, num_layers)))
        mean = (noisy * active).sum(axis=0) / np.maximum(counts, 1)
        chance = observation_chance("stratified", drawn, world_size)
        distribution.update(mean, counts > 0, chance=chance)
    noise = (squared_norms / distribution.probabilities).sum()
    best = (squared_norms / np.where(squared_norms > 1, 10 / 11, 1 / 11)).sum()  # p proportional to the norm, sum 30
    assert noise <= 1.02 * best


def test_bandit_gains_by_hand_where_a_layer_is_observed_more_often_than_it_is_drawn():
    """log p gains bandit_lr * (n2 / L^2) * (s / D)^2 / (q^2 * chance), and L is of the norms themselves."""
    distribution = make(2, budget=1, distribution="bandit", bandit_lr=0.2, p_min=0.1)
    distribution.probabilities[:] = [0.4, 0.6]
    chance = observation_chance("stratified", distribution.probabilities, 2)  # 0.8 and 1
    distribution.update(np.array([4.0, 1.0]), np.ones(2, dtype=bool), chance=chance)
    assert distribution.gradient_bound == pytest.approx(2.0, rel=1e-12)
    gains = [0.2 * 0.25 / (0.16 * 0.8), 0.2 * 0.25 * 0.25 / (0.36 * 1.0)]
    weights = np.array([0.4, 0.6]) * np.exp(gains)
    np.testing.assert_allclose(distribution.probabilities, weights / weights.sum(), rtol=1e-12)


def test_norms_below_the_range_of_logarithms_are_taken_as_alike():
    distribution = make(3, budget=1, distribution="norm", p_min=0.1)
    for _ in range(2):
        distribution.update(np.array([1e-313, 0.0, 2e-313]), np.ones(3, dtype=bool))
    np.testing.assert_allclose(distribution.probabilities, 1 / 3, rtol=1e-12)


@pytest.mark.parametrize("budget", [0.25, 0.5, 1.0])
def test_uniform_does_not_keep_what_another_distribution_has_learnt(budget):
    learnt = make(distribution="norm", p_min=0.1)
    learnt.update(np.arange(1.0, 7.0), np.ones(6, dtype=bool))
    uniform = make(budget=budget, distribution="uniform")
    uniform.load_state_dict(learnt.state_dict())
    np.testing.assert_allclose(uniform.probabilities, budget, rtol=1e-12)


def test_a_layer_is_seen_by_somebody_with_the_chance_of_its_strategy():
    p = np.array([0.1, 0.5, 1.0])
    assert observation_chance("stratified", p, 4).tolist() == [0.4, 1.0, 1.0]
    assert observation_chance("independent", p, 4).tolist() == observation_chance("shared", p, 4).tolist() == p.tolist()


def test_all_zero_norms_change_nothing():
    for name in ("norm", "bandit"):
        distribution = make(distribution=name)
        distribution.update(np.zeros(6), np.ones(6, dtype=bool))
        assert distribution.probabilities.tolist() == [0.5] * 6


def test_frozen_layers_have_probability_zero_and_return_at_the_mean():
    distribution = make(budget=0.5)
    distribution.set_eligible(np.array([True, True, False, True, True, False]))
    assert distribution.probabilities.tolist() == [0.5, 0.5, 0.0, 0.5, 0.5, 0.0]
    distribution.set_eligible(np.ones(6, dtype=bool))
    np.testing.assert_allclose(distribution.probabilities, 0.5)
    distribution.set_eligible(np.zeros(6, dtype=bool))
    distribution.update(np.ones(6), np.ones(6, dtype=bool))
    assert distribution.probabilities.tolist() == [0.0] * 6


def test_state_round_trip_and_other_sizes_refused():
    distribution = make(distribution="bandit")
    distribution.update(np.arange(1.0, 7.0), np.ones(6, dtype=bool))
    other = make(distribution="bandit")
    other.load_state_dict(distribution.state_dict())
    for twin in (distribution, other):
        twin.update(np.arange(6.0, 0.0, -1.0), np.ones(6, dtype=bool))
    assert np.array_equal(distribution.probabilities, other.probabilities)
    with pytest.raises(ValueError, match="layers"):
        make(num_layers=5).check_state(distribution.state_dict())


def test_what_each_strategy_learns_from_by_hand():
    arguments = dict(
        active=np.array([True, False, True]),
        counts=np.array([2, 1, 0]),
        local=np.array([1.0, 0.0, 3.0]),
        gathered=np.array([[1.0, 0.0, 0.0], [5.0, 4.0, 0.0]]),
        mean_grad=np.array([8.0, 12.0, 16.0]),
        drawn_probabilities=np.array([0.5, 0.25, 1.0]),
    )
    norms, observed = observed_norms("independent", **arguments)
    assert norms.tolist() == [1.0, 0.0, 3.0] and observed.tolist() == [True, False, True]
    norms, observed = observed_norms("stratified", **arguments)
    assert norms.tolist() == [3.0, 4.0, 0.0] and observed.tolist() == [True, True, False]
    norms, observed = observed_norms("shared", **arguments)
    assert norms[[0, 2]].tolist() == [2.0, 16.0] and observed.tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["norm", "bandit"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_norms_that_are_not_finite_teach_nothing_where_an_exchange_has_mended_the_sum(name, value):
    distribution = make(2, strategy="independent", distribution=name, p_min=0.1)
    before, both = distribution.state_dict(), np.ones(2, dtype=bool)
    local = Reading(np.array([value, 1.0]))
    half, counts = np.full(2, 0.5), np.ones(2, dtype=np.int64)
    lesson = Lesson(both, half, half, counts, 1, local, mean=Reading(np.ones(2)))
    lesson.teach(distribution, np.array([[value, 1.0]]))
    assert all(np.array_equal(before[key], after) for key, after in distribution.state_dict().items())


def test_norms_whose_squares_add_up_to_infinity_are_learnt_from():
    """A layer that nobody has seen stands at the mean of the others."""
    distribution = make(3, budget=1, distribution="norm", p_min=0.01)
    distribution.update(np.array([1.5e308, 1.5e308, np.nan]), np.array([True, True, False]))
    np.testing.assert_allclose(distribution.probabilities, np.full(3, 1 / 3), rtol=1e-12)


@pytest.mark.parametrize("strategy", ["independent", "stratified", "shared"])
def test_the_bandit_learns_the_best_distribution_while_every_layer_is_computed(strategy):
    """Then the chance of seeing a layer is 1, but the loss is that of the distribution: sum ||g||^2 / p."""
    squared_norms = np.array([1.0, 1.0, 1.0, 0.25, 0.25, 0.25])
    distribution = make(budget=0.5, distribution="bandit", strategy=strategy)
    ones, everything = np.ones(6), np.ones(6, dtype=bool)
    for _ in range(400):
        lesson = Lesson(
            everything, ones, distribution.probabilities.copy(), np.ones(6, dtype=np.int64), 1,
            Reading(squared_norms), mean=Reading(squared_norms),
        )  # fmt: skip
        lesson.teach(distribution, squared_norms[None])
    best = np.sqrt(squared_norms) * 3.0 / np.sqrt(squared_norms).sum()
    assert (squared_norms / distribution.probabilities).sum() <= 1.02 * (squared_norms / best).sum()


def test_where_one_distribution_is_feasible_it_stays():
    """As with one rank by default: what is learnt acts when p_min, the budget or the frozen layers change."""
    distribution = make(4, budget=0.5)
    for _ in range(3):
        distribution.update(np.array([1.0, 4.0, 9.0, 16.0]), np.ones(4, dtype=bool))
    assert distribution.probabilities.tolist() == [0.5] * 4
    other = make(4, budget=0.5, p_min=0.1)
    other.load_state_dict(distribution.state_dict())
    other.update(np.array([1.0, 4.0, 9.0, 16.0]), np.ones(4, dtype=bool))
    np.testing.assert_allclose(other.probabilities, np.array([1, 2, 3, 4]) / 5, rtol=1e-12)
