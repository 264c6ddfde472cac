"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An int of at least 1. Raises ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


positive.__name__ = "positive number"  # what argparse calls the type when it refuses a value


def refuse_beside_quick(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """Where --quick is given, which has sizes of its own, end with an error for an option that would not act."""
    given = [name for name in names if getattr(options, name) != parser.get_default(name)]
    if options.quick and given:
        parser.error(f"--{given[0].replace('_', '-')} does not act with --quick: leave one of them out")
