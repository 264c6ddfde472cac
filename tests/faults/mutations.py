"""Shows that tests can fail: takes out one check at a time, in a copy, and runs the test that watches over it.

python tests/faults/mutations.py [--only 0 3] [--out tests/faults]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import report

ROOT = Path(__file__).parents[2]
FOLDERS = ("python", "jointspar_ext", "tests")
PACKAGE = "python/jointspar"
EXITS = "tests/mpi/test_failures.py::test_a_rank_that_exits_early_ends_the_job_in_every_phase"
EARLY = "tests/unit/test_early_exchange.py::test_what_was_sent_is_void_where_gradients_change_before_the_step"
SURVIVED = "tests/faults/test_faults.py::test_differences_are_named_and_the_rest_is_survived_with_right_sums"
INTERRUPTS = "tests/unit/test_interrupts.py::test_an_interrupted_iteration_can_be_made_again"


class Mutation(NamedTuple):
    """`old` becomes `new` in `file`; then `test` must fail."""

    what: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    Mutation(
        "ranks' steps and operations are not compared",
        f"{PACKAGE}/comm/heads.py",
        "if (heads != heads[0]).any():",
        "if False:",
        "tests/unit/test_header.py::test_a_plan_that_meets_a_go_is_refused_on_both_sides",
    ),
    Mutation(
        "layouts and settings are not compared at the start",
        f"{PACKAGE}/comm/header.py",
        "if (rows != rows[0]).any():",
        "if False:",
        "tests/unit/test_header.py::test_a_differing_setting_is_named_with_its_ranks",
    ),
    Mutation(
        "header sizes depend on the optimizer",
        f"{PACKAGE}/comm/heads.py",
        "max(NUM_FIXED + num_words, _num_words.get(transport, 0))",
        "NUM_FIXED + num_words",
        "tests/unit/test_header.py::test_optimizers_of_different_sizes_meet_in_headers_of_one_size",
    ),
    Mutation(
        "weight digests are not compared",
        f"{PACKAGE}/pipeline.py",
        "self._check_weights()\n        self.draw_next()",
        "pass\n        self.draw_next()",
        "tests/mpi/test_failures.py::test_a_flipped_weight_bit_is_found_and_named",
    ),
    Mutation(
        "a process does not meet the others at exit",
        f"{PACKAGE}/comm/process.py",
        "self._meet_at_exit()\n",
        "pass\n",
        f"{EXITS}[mpirun-leave_before_an_optimizer_is_built]",
    ),
    Mutation(
        "an uncaught exception does not abort",
        f"{PACKAGE}/comm/failure.py",
        "sys.excepthook, threading.excepthook = hook, thread_hook",
        "del hook, thread_hook",
        "tests/mpi/test_transports.py::test_an_exception_on_one_rank_ends_the_job",
    ),
    Mutation(
        "a wait has no deadline",
        f"{PACKAGE}/comm/process.py",
        "if waited > self.timeout:",
        "if False:",
        "tests/mpi/test_transports.py::test_a_stopped_rank_is_a_timeout_that_ends_the_job",
    ),
    Mutation(
        "nobody watches a wait natively",
        f"{PACKAGE}/comm/watchdog.py",
        "if _core is None:",
        "if True:",
        "tests/mpi/test_failures.py::test_a_wait_ends_the_job_though_a_thread_holds_the_gil_for_ever",
    ),
    Mutation(
        "a closed gloo group is still referred to",
        f"{PACKAGE}/comm/torch_dist.py",
        "del self._headers, self._payload",
        "pass",
        "tests/mpi/test_failures.py::test_closing_ends_the_threads_of_the_groups",
    ),
    Mutation(
        "a checkpoint's SHA-256 is not compared",
        f"{PACKAGE}/checkpoint_files.py",
        "if sha256(folder / name) != expected:",
        "if False:",
        "tests/unit/test_checkpoint.py::test_every_single_bit_flip_is_refused",
    ),
    Mutation(
        "a manifest's digest is not compared",
        f"{PACKAGE}/checkpoint_files.py",
        "if content != _sealed(manifest):",
        "if False:",
        "tests/unit/test_checkpoint.py::test_every_single_bit_flip_is_refused",
    ),
    Mutation(
        "a manifest may name any file",
        f"{PACKAGE}/checkpoint_files.py",
        "        _check_names(folder, manifest)\n",
        "",
        "tests/unit/test_hostile_checkpoints.py::test_a_hostile_checkpoint_is_refused_and_changes_nothing",
    ),
    Mutation(
        "data files are not compared with SHA256SUMS",
        f"{PACKAGE}/training/data/readers.py",
        "        check_sum(path)\n",
        "",
        "tests/app/test_sums.py::test_a_file_with_another_bit_is_not_opened",
    ),
    Mutation(
        "the death of a rank is an error like any other",
        f"{PACKAGE}/comm/mpi.py",
        'if self._options.on_failure == "shrink" and error',
        "if False and error",
        "tests/mpi/test_survivors.py::test_the_ranks_that_are_left_go_on_with_their_means[2-victims1-3]",
    ),
    Mutation(
        "simulated ranks go on after one has failed",
        f"{PACKAGE}/comm/simulated.py",
        "if self._world.errors:",
        "if False:",
        "tests/unit/test_simulated.py::test_after_a_failure_no_rank_starts_what_would_be_in_vain",
    ),
    Mutation(
        "a step with a NaN is applied",
        f"{PACKAGE}/pipeline.py",
        "exchanged.is_finite = exchanged.has_finite_norms()\n        exchanged.lesson",
        "exchanged.is_finite = True\n        exchanged.lesson",
        SURVIVED,
    ),
    Mutation(
        "a draw that all ranks must share is not compared",
        f"{PACKAGE}/pipeline.py",
        '"shared": [self.drawn, self.active]',
        '"shared": [self.drawn]',
        SURVIVED,
    ),
    Mutation(
        "the plan is forgotten when a step raises",
        f"{PACKAGE}/comm/header.py",
        "        return self._plan\n",
        "        plan, self._plan = self._plan, None\n        return plan\n",
        "tests/unit/test_optimizers.py::test_a_step_that_was_refused_says_the_same_again_and_can_be_made_right",
    ),
    Mutation(
        "gradients that were changed after they were sent count as they were",
        f"{PACKAGE}/early_exchange.py",
        "now._version != version",
        "False",
        EARLY,
    ),
    Mutation(
        "another rank's void exchange during backward counts",
        f"{PACKAGE}/gradient_exchange.py",
        "if is_finite and self._agreement.is_wished(Wish.EXCHANGE_ANEW):",
        "if is_finite and early is None:",
        EARLY,
    ),
    Mutation(
        "a transport that is lent to a thread is used all the same",
        "python/jointspar/comm/refusals.py",
        "            self._give_back()\n",
        "            pass\n",
        "tests/mpi/test_early_exchange.py::test_another_meeting_between_backward_and_step_costs_time_only",
    ),
    Mutation(
        "what an exception from outside left of a step stays as it is",
        f"{PACKAGE}/base_optimizer.py",
        "            self._pipeline.draw_what_was_left()\n",
        "            pass\n",
        INTERRUPTS,
    ),
    Mutation(
        "an exchange during backward goes on after an exception",
        f"{PACKAGE}/early_exchange.py",
        "            self._note(position)\n        except BaseException:\n            self._is_left = True\n",
        "            self._note(position)\n        except BaseException:\n",
        INTERRUPTS,
    ),
    Mutation(
        "a state goes into parameters of another order",
        f"{PACKAGE}/optimizer_state.py",
        "if place_of.get(name, place) != place:",
        "if False:",
        "tests/unit/test_torch_habits.py::test_a_state_of_parameters_in_another_order_is_refused_and_one_of_other_names_loads",
    ),
    Mutation(
        "torch's default device takes the memory of exchanges along",
        f"{PACKAGE}/step/exchange/scratch.py",
        'torch.empty(num_slots * stride, dtype=torch.uint8, device="cpu")',
        "torch.empty(num_slots * stride, dtype=torch.uint8)",
        "tests/mpi/test_default_device.py::test_training_is_the_same_whatever_torchs_default_device",
    ),
    Mutation(
        "ranks do not hear that another one cannot save",
        f"{PACKAGE}/checkpoint.py",
        "    if rows[:, 0].any():\n",
        "    if False:\n",
        "tests/unit/test_model_state.py::test_where_one_rank_cannot_save_none_does_and_all_go_on",
    ),
)


def outcome(mutation: Mutation) -> str:
    """ "found" where the test fails with the mutation, and only with it."""
    if (code := pytest_code(mutation.test)) != 0:
        return f"not tried: without it pytest ended with {code}"
    code = pytest_code(mutation.test, mutation)
    return {0: "NOT FOUND", 1: "found"}.get(code, f"pytest ended with {code}")


@cache
def pytest_code(test: str, mutation: Mutation | None = None) -> int:
    """Of the test in a copy of the sources, with the mutation in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in FOLDERS:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutation is not None:
            file = copy / mutation.file
            source = file.read_text()
            if source.count(mutation.old) != 1:
                raise SystemExit(f"{mutation.what}: not one place in {mutation.file}, but {source.count(mutation.old)}")
            file.write_text(source.replace(mutation.old, mutation.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy / "python"), str(copy)])}
        return subprocess.run(command, cwd=copy, env=env, capture_output=True, check=False, timeout=900).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER")
    parser.add_argument("--out", type=Path, help="folder of report.json and REPORT.md")
    options = parser.parse_args()
    commit, is_good = report.commit(), True
    for number, mutation in enumerate(MUTATIONS):
        if options.only is None or number in options.only:
            found = outcome(mutation)
            is_good &= found == "found"
            print(f"{number}: {mutation.what}: {found}", flush=True)
            if options.out:
                figures = {"test": mutation.test, "outcome": found, "commits": [commit]}
                report.add(options.out, report.MUTATIONS, mutation.what, figures)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
