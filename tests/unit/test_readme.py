"""Every Python block of README.md and USAGE.md runs, one after the other in one fresh process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jointspar as js

ROOT = Path(__file__).parents[2]
README, USAGE = ROOT / "README.md", ROOT / "USAGE.md"


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_python_blocks_are_found() -> None:
    assert python_blocks("a\n```python\nx = 1\n```\n```sh\nls\n```\n```python\ny = 2\n```\n") == ["x = 1\n", "y = 2\n"]


@pytest.mark.skipif(not README.exists(), reason="there is no README.md")
def test_python_blocks_of_the_readme_run(tmp_path: Path) -> None:
    blocks = [python_blocks(path.read_text()) for path in (README, USAGE)]
    assert all(blocks), "one of them shows no Python"
    script = tmp_path / "readme.py"
    script.write_text("\n".join(block for of_file in blocks for block in of_file))
    search_path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr


FLOOR = (
    "With `share` the budget over the number of layers it is `min(0.1, share / 2.5)`, but, with the default "
    "distribution, at least `min(share, 1 / world_size)` for `stratified` (at 1 / world_size some rank computes each "
    "layer) and `share` for `shared`."
)


@pytest.mark.skipif(not README.exists(), reason="there is no README.md")
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 16, 64, 1000])
@pytest.mark.parametrize("budget", [0.01, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.9, 1.0, 1, 7, 100])
def test_the_floor_of_probabilities_is_what_the_readme_says(world_size: int, budget: int | float) -> None:
    assert FLOOR in " ".join(README.read_text().split())
    share = budget if isinstance(budget, float) else budget / 100
    at_least = {"stratified": min(share, 1 / world_size), "shared": share, "independent": 0.0}
    for strategy, least in at_least.items():
        _, floor = js.Sampling(budget, strategy=strategy).constraints(100, world_size=world_size)
        assert floor == pytest.approx(max(min(0.1, share / 2.5), least), rel=1e-12)
        if strategy != "shared":
            other = js.Sampling(budget, strategy=strategy, distribution="bandit")
            assert other.constraints(100, world_size=world_size)[1] == pytest.approx(min(0.1, share / 2.5), rel=1e-12)
