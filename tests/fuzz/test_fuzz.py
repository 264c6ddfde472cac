"""A short run of each fuzz target; `make fuzz` runs them longer."""

import pytest

from fuzz import TARGETS, run


@pytest.mark.parametrize("target", TARGETS)
def test_random_input_is_a_result_or_a_named_error(target):
    assert run(target, 0, lambda done: done >= 60) == 60
