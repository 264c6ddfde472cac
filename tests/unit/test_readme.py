"""Every Python block of README.md and USAGE.md runs, one after the other in one fresh process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
