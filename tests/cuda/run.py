"""`make test-gpu`: build in place, run tests/cuda and, beside it, a selection under each tool of compute-sanitizer.

All of them at once, since each mostly waits for its host, the tests in several processes where pytest-xdist is
installed; at last the tests marked `alone`. What each printed is in build/gpu-logs/<name>.log; the end is shown of
what failed, and of what passed the tests that were skipped.
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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.gpu import in_place

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider")
ALONE = "alone"  # a marker, and the name of the command that runs what has it
SANITIZED = ("tests/cuda/test_sanitized.py",)
LOGS = in_place.ROOT / "build" / "gpu-logs"
SHOWN = 8000  # characters of the log of what failed
SANITIZER_FAILED = 86  # told apart from pytest's own exit codes
NONE_CHOSEN = 5  # pytest's, where a selection leaves no test


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", default="", metavar="DIR", help="wheels of packages that this Python lacks")
    parser.add_argument("--architectures", default="native", help="CUDA architectures to build for, as CMake says them")
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS), help="of compute-sanitizer")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes of the tests")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything; what does not fit is cut off")
    parser.add_argument("--pytest-args", default="", help="for tests/cuda, as one string: '-x -k lars'")
    return parser.parse_args()


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """What to run, by the name that the summary gives it."""
    workers = ("-n", str(options.workers)) if options.workers > 1 and find_spec("xdist") else ()
    chosen = ["tests/cuda", *options.pytest_args.split()]
    wanted = {"tests": [*PYTEST, *workers, "-m", "cuda and not alone", *chosen]}
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if options.tools and sanitizer is None:
        raise in_place.CannotRun("no compute-sanitizer on the PATH; --tools without a name leaves it out")
    for tool in options.tools:
        checked = [str(sanitizer), "--tool", tool, f"--error-exitcode={SANITIZER_FAILED}", "--print-limit=20"]
        wanted[tool] = [*checked, *PYTEST, *SANITIZED]
    wanted[ALONE] = [*PYTEST, "-m", "cuda and alone", *chosen]
    return wanted


@dataclass
class Job:
    """A command under way, or over."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    began: float
    result: str = ""  # empty while it runs


def start(name: str, command: list[str]) -> Job:
    print(f"== {name}: {' '.join(command)}", flush=True)
    environment = os.environ | {"PYTHONPATH": in_place.search_path(), "JOINTSPAR_REQUIRE_CUDA": "1"}
    environment.setdefault("OMP_NUM_THREADS", "2")  # of each process
    if name in TOOLS:  # one allocation per tensor, so that what lies between tensors is nobody's
        environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "JOINTSPAR_BACKEND": "native"}
    log = LOGS / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=in_place.ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    return Job(name, process, log, time.monotonic())


def look_at(job: Job, end: float) -> None:
    """Note what became of a job that is over, or whose time is up."""
    code = job.process.poll()
    if code is None and time.monotonic() < end:
        return
    if code is None:
        os.killpg(job.process.pid, signal.SIGKILL)  # the sanitizer's target too
        job.process.wait()
    results = {None: "cut off: its time was up", 0: "passed"}
    results |= {SANITIZER_FAILED: "found errors", NONE_CHOSEN: "no test was chosen"}
    job.result = f"{results.get(code, f'failed with exit code {code}')} ({time.monotonic() - job.began:.0f} s)"
    text = job.log.read_text(errors="replace")
    *lines, last = text.rstrip().splitlines() or [""]
    passed = [*(line for line in lines if line.startswith("SKIPPED")), last]
    print(f"== {job.name}", *([text[-SHOWN:]] if code != 0 else passed), sep="\n", flush=True)


def run_together(wanted: dict[str, list[str]], end: float) -> list[Job]:
    jobs = [start(name, command) for name, command in wanted.items()]
    while running := [job for job in jobs if not job.result]:
        for job in running:
            look_at(job, end)
        time.sleep(0.05)
    return jobs


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
    LOGS.mkdir(parents=True, exist_ok=True)
    jobs = run_together({name: command for name, command in wanted.items() if name != ALONE}, end)
    jobs += run_together({ALONE: wanted[ALONE]}, end)
    print("== summary", *(f"{job.name:10s} {job.result}" for job in jobs), sep="\n")
    codes = {job.name: job.process.returncode for job in jobs}
    if {codes["tests"], codes[ALONE]} == {0, NONE_CHOSEN}:  # --pytest-args chose among one kind of tests
        codes = {name: code for name, code in codes.items() if code != NONE_CHOSEN}
    return 0 if not any(codes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
