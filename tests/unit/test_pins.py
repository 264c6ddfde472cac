"""The versions that a build server installs: those of constraints.txt, each with hashes, and nothing missing."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text):
    """Version by name, of lines such as "numpy==2.4.6; python_version > '3'"."""
    found = re.findall(r"^([\w.-]+)==([\w.+]+)", text, re.MULTILINE)
    return {normal(name): version for name, version in found}


def hashed():
    """Each pin of .ci/requirements.txt with what stands after it."""
    text = (ROOT / ".ci" / "requirements.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return re.split(r"\n(?=\S)", "\n".join(lines))


def test_every_pin_is_that_of_the_constraints_and_has_hashes():
    constraints = pins((ROOT / "constraints.txt").read_text())
    for pin in hashed():
        ((name, version),) = pins(pin).items()
        assert constraints.get(name) == version, f"{name}: renew .ci/requirements.txt, which says how"
        rest = [line.strip(" \\") for line in pin.splitlines()[1:]]
        assert rest and all(HASH.fullmatch(line) for line in rest), pin


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_everything_that_tests_and_build_need_is_pinned():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += [*extras["mpi"], *extras["train"], *extras["test"]]
    names = {normal(re.match(r"[\w.-]+", item)[0]) for item in wanted if "python_version <" not in item}
    assert names <= pins("\n".join(hashed())).keys()


def test_the_build_server_installs_them_by_hash_before_anything_else():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.index("--require-hashes --no-deps -r .ci/requirements.txt") < script.index("make test")
