"""`make test-gpu`: build in place, run tests/cuda, then a selection of it under each tool of compute-sanitizer.

Exit code 0 where all passed, 1 where something failed, 2 where the machine cannot run it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time

from bench.gpu import in_place

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
SANITIZED = ("tests/cuda/test_sanitized.py",)
TESTS_SHARE = 0.6  # of the time that the build leaves; each tool may then take an equal part of the rest
SANITIZER_FAILED = 86  # told apart from pytest's own exit codes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", default="", metavar="DIR", help="wheels of packages that this Python lacks")
    parser.add_argument("--architectures", default="native", help="CUDA architectures to build for, as CMake says them")
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS), help="of compute-sanitizer")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything; what does not fit is cut off")
    parser.add_argument("--pytest-args", default="", help="for tests/cuda, as one string: '-x -k lars'")
    return parser.parse_args()


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """What to run, by the name that the summary gives it."""
    wanted = {"tests": [*PYTEST, "-m", "cuda", "tests/cuda", *options.pytest_args.split()]}
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if options.tools and sanitizer is None:
        raise in_place.CannotRun("no compute-sanitizer on the PATH; --tools without a name leaves it out")
    for tool in options.tools:
        checked = [str(sanitizer), "--tool", tool, f"--error-exitcode={SANITIZER_FAILED}", "--print-limit=20"]
        wanted[tool] = [*checked, *PYTEST, *SANITIZED]
    return wanted


def outcome(name: str, command: list[str], seconds: float) -> tuple[bool, str]:
    """Whether a command passed, and a line for the summary."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    environment = os.environ | {"PYTHONPATH": in_place.search_path(), "JOINTSPAR_REQUIRE_CUDA": "1"}
    if name in TOOLS:  # one allocation per tensor, so that what lies between tensors is nobody's
        environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "JOINTSPAR_BACKEND": "native"}
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=in_place.ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(max(1.0, seconds))
        result = {0: "passed", SANITIZER_FAILED: "found errors"}.get(code, f"failed with exit code {code}")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the sanitizer's target too
        code, result = process.wait(), "cut off: its time was up"
    return code == 0, f"{name:10s} {result} ({time.monotonic() - start:.0f} s)"


def main() -> int:
    options = parse()
    end = time.monotonic() + 60 * options.minutes
    try:
        packages = in_place.PACKAGES | in_place.TEST_PACKAGES
        wanted = commands(options)
        in_place.prepare(packages, wheels=options.wheels, architectures=options.architectures)
    except in_place.CannotRun as problem:
        print(f"test-gpu: {problem}", file=sys.stderr)
        return 2
    outcomes = []
    for index, (name, command) in enumerate(wanted.items()):
        left = end - time.monotonic()
        share = TESTS_SHARE * left if name == "tests" and options.tools else left / (len(wanted) - index)
        outcomes.append(outcome(name, command, share))
    print("== summary", *(line for _, line in outcomes), sep="\n")
    return 0 if all(passed for passed, _ in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
