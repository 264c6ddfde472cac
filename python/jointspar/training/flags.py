"""The flags of `jointspar train`: one for each field of `TrainConfig`, in groups as --help shows them."""

from __future__ import annotations

import argparse
from pathlib import Path

from jointspar.training.config import DATASETS, METHODS, MODELS

DATA_DIR_HELP = "folder of the data files (default $JOINTSPAR_DATA/<dataset>, or data/<dataset>, or a system package's)"


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of `jointspar train`; a flag that is not given leaves nothing, so that TrainConfig's default holds."""
    _add_run_flags(parser.add_argument_group("run"))
    _add_rate_flags(parser.add_argument_group("optimizer and schedule"))
    _add_sampling_flags(parser.add_argument_group("layer sampling (jointspar, jointspar-lars)"))
    _add_exchange_flags(parser.add_argument_group("exchange"))
    _add_peer_flags(parser.add_argument_group("methods to compare with"))


def _add_run_flags(run: argparse._ArgumentGroup) -> None:
    run.add_argument("--out", type=Path, required=True, help="folder for the results; made if needed")
    run.add_argument("--dataset", metavar="D", help=f"{', '.join(DATASETS)} (default digits)")
    run.add_argument("--data-dir", type=Path, metavar="DIR", help=DATA_DIR_HELP)
    run.add_argument("--model", metavar="M", help=f"{', '.join(MODELS)} (default lenet5)")
    run.add_argument("--method", metavar="M", help=f"{', '.join(METHODS)} (default jointspar-lars)")
    run.add_argument("--epochs", type=int, metavar="E", help="default 30")
    run.add_argument("--batch-size", type=int, metavar="N", help="samples per rank and step (default 64)")
    run.add_argument("--seed", type=int, help="of weights, data order and layer draws (default 0)")
    run.add_argument(
        "--threads", type=int, help="torch threads per rank (default OMP_NUM_THREADS, else its share of the cores)"
    )
    run.add_argument("--device", metavar="D", help="cpu (default), cuda: a GPU for each rank of a host, in turn")
    run.add_argument(
        "--simulate-workers",
        type=int,
        metavar="M",
        help="play M ranks in this one process, one after the other, without a launcher: the same statistics, not the "
        "times, of M machines",
    )
    run.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    run.add_argument(
        "--log-every", type=int, metavar="N", help="steps between two step lines in metrics.jsonl (default 10)"
    )
    run.add_argument("--max-steps", type=int, metavar="N", help="stop after N steps; --resume continues from there")


def _add_rate_flags(rate: argparse._ArgumentGroup) -> None:
    rate.add_argument(
        "--base-lr",
        type=float,
        metavar="LR",
        help=f"rate per 256 samples of the global batch (default {_default_rates()})",
    )
    rate.add_argument("--lr", type=float, help="rate after the warm-up, not scaled by the batch (instead of --base-lr)")
    rate.add_argument(
        "--warmup-epochs",
        type=float,
        metavar="E",
        help="linear warm-up from the base rate (default 5, at most a sixth of --epochs)",
    )
    rate.add_argument(
        "--milestones",
        type=float,
        nargs="*",
        metavar="E",
        help="epochs at which the rate falls tenfold; none: never (default: 30, 50, 70 of 90, in proportion)",
    )
    rate.add_argument("--momentum", type=float, help="default 0.9")
    rate.add_argument("--nesterov", action="store_true")
    rate.add_argument("--weight-decay", type=float, metavar="W", help="default 1e-4")
    rate.add_argument("--trust-coefficient", type=float, metavar="T", help="of the LARS methods (default 0.02)")


def _add_sampling_flags(sampling: argparse._ArgumentGroup) -> None:
    sampling.add_argument(
        "--budget",
        type=_budget,
        metavar="B",
        help="active layers per step: 0.5 is half of them, 3 is three, 1 is one, 1.0 is all (default 0.5)",
    )
    sampling.add_argument("--strategy", metavar="S", help="stratified (default), independent, shared")
    sampling.add_argument("--draw", metavar="D", help="systematic (default), bernoulli")
    sampling.add_argument("--distribution", metavar="D", help="norm (default), bandit, uniform")
    sampling.add_argument(
        "--bandit-lr", type=float, metavar="LR", help="step size of --distribution bandit (default 0.05)"
    )
    sampling.add_argument(
        "--shift",
        action="store_true",
        help="with --distribution bandit, --strategy independent or shared: the paper's losses, shifted above 0",
    )
    sampling.add_argument(
        "--p-min",
        type=float,
        metavar="P",
        help="smallest probability of a layer (default 0.1, or less at small budgets; with --distribution norm at "
        "least 1 over the ranks if --strategy is stratified, the budget's share if it is shared: all layers alike)",
    )
    sampling.add_argument(
        "--inactive", metavar="I", help="what happens to layers that nobody computed: skip (default), decay"
    )
    sampling.add_argument(
        "--lag", type=int, metavar="L", help="0 (default); 1 draws from the probabilities of the step before"
    )
    sampling.add_argument("--grouping", metavar="G", help="what a layer is: module (default), tensor")
    sampling.add_argument(
        "--dense-epochs", type=float, metavar="E", help="so many first epochs compute every layer (default 0)"
    )


def _add_exchange_flags(wire: argparse._ArgumentGroup) -> None:
    wire.add_argument(
        "--wire-dtype",
        metavar="T",
        help="of gradients in transit: float32, bfloat16, float16 (default: as the weights)",
    )
    wire.add_argument(
        "--exchange",
        metavar="X",
        help="how gradients are summed over the ranks: auto (default), allreduce, ring, two_shot",
    )
    wire.add_argument(
        "--overlap", action="store_true", help="exchange gradients while backward computes the next (for slow links)"
    )


def _add_peer_flags(peers: argparse._ArgumentGroup) -> None:
    peers.add_argument(
        "--compression-ratio",
        type=float,
        metavar="R",
        help="share of each tensor that randomk (default 0.1) and topk (default 0.01) send",
    )
    peers.add_argument(
        "--qsgd-levels", type=int, metavar="N", help="of qsgd beside zero and sign (default 7, which take 4 bits)"
    )
    peers.add_argument("--powersgd-rank", type=int, metavar="R", help="of powersgd's matrices (default 2)")


def _default_rates() -> str:
    by_rate: dict[float, list[str]] = {}
    for name, method in METHODS.items():
        by_rate.setdefault(method.base_lr, []).append(name)
    return "; ".join(f"{rate:g} for {', '.join(names)}" for rate, names in by_rate.items())


def _budget(text: str) -> int | float:
    """An integer is a number of layers; anything with a dot or exponent is a fraction."""
    try:
        return int(text)
    except ValueError:
        return float(text)


_budget.__name__ = "number"  # what argparse calls the type when it refuses a value
