"""`make bench-gpu`: build in place, then measure. Options that are not listed go to `python -m bench.gpu`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from bench.gpu import in_place


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", default="", metavar="DIR", help="wheels of packages that this Python lacks")
    parser.add_argument("--architectures", default="native", help="CUDA architectures to build for, as CMake says them")
    options, measure_options = parser.parse_known_args()
    try:
        in_place.prepare(in_place.PACKAGES, wheels=options.wheels, architectures=options.architectures)
    except in_place.CannotRun as problem:
        print(f"bench-gpu: {problem}", file=sys.stderr)
        return 2
    environment = os.environ | {"PYTHONPATH": in_place.search_path()}
    command = [sys.executable, "-m", "bench.gpu", *measure_options]
    return subprocess.run(command, cwd=in_place.ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
