"""Timing several ways to do one thing on a machine that may be busy.

All of them take their turn in every round, so that a slow minute slows them all. What is reported is the median
over the rounds, and how the speeds compare.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers

from minimoe.atomic import write_atomically

WARM_UP = 3  # rounds that are run but not kept


class Target(NamedTuple):
    """Reach at least `wanted` times the speed of `peer`; `aim` is what we would like."""

    peer: str
    wanted: float
    aim: float | None = None


class Speed(NamedTuple):
    """How many times as fast as a peer we are: the peer's time divided by ours."""

    of_medians: float  # median over the rounds first, then the ratio
    of_rounds: float  # the ratio in every round first, then the median

    @classmethod
    def compare(cls, ours: Sequence[float], peer: Sequence[float]) -> Speed:
        """Of two lists of seconds, one entry per round."""
        ratios = [theirs / own for own, theirs in zip(ours, peer, strict=True)]
        return cls(median(peer) / median(ours), median(ratios))


def measure(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round. The order rotates, so that nobody is always first."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-WARM_UP, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            calls[name]()
            elapsed = time.perf_counter() - start
            if turn >= 0:
                seconds[name].append(elapsed)
    return seconds


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def report(title: str, seconds: Mapping[str, Sequence[float]], ours: str, targets: Sequence[Target]) -> dict[str, Any]:
    """Print the times, the speed of `ours` against every peer and whether it reaches the targets; return it all."""
    speeds = {name: Speed.compare(seconds[ours], times) for name, times in seconds.items()}
    verdicts = [_judge(target, speeds[target.peer]) for target in targets]
    load = os.getloadavg()[0]
    _print_table(f"{title} (load average {load:.1f} on {os.cpu_count()} cores)", seconds, speeds, ours)
    for verdict in verdicts:
        _print_verdict(verdict)
    return {
        "seconds": dict(seconds),
        "median_seconds": {name: median(times) for name, times in seconds.items()},
        "ours": ours,
        "speed_against": {name: speed._asdict() for name, speed in speeds.items()},
        "targets": verdicts,
        "load_average": load,
    }


def _judge(target: Target, speed: Speed) -> dict[str, Any]:
    """A target is reached when both ways to form the ratio reach it."""
    found = min(speed)
    return target._asdict() | {"found": found, "reached": found >= target.wanted}


def _print_table(title: str, seconds: Mapping[str, Sequence[float]], speeds: Mapping[str, Speed], ours: str) -> None:
    width = max(len(name) for name in seconds)
    print(f"\n{title}")
    print(f"{'':{width}}     median        best    speed of {ours} against it:")
    print(f"{'':{width}}         ms          ms    ratio of medians   median of ratios")
    for name, times in seconds.items():
        row = f"{name:{width}} {1000 * median(times):10.2f}  {1000 * min(times):10.2f}"
        speed = "" if name == ours else f"{speeds[name].of_medians:20.3f}{speeds[name].of_rounds:19.3f}"
        print(row + speed)


def _print_verdict(verdict: Mapping[str, Any]) -> None:
    aim = f" (aim {verdict['aim']:.2f})" if verdict["aim"] else ""
    mark = "reached    " if verdict["reached"] else "NOT REACHED"
    print(f"  {mark}  {verdict['found']:.3f} times the speed of {verdict['peer']}; wanted {verdict['wanted']:.2f}{aim}")


def parse_arguments(
    description: str, argv: Sequence[str] | None, rounds: int, own: Sequence[argparse.ArgumentParser] = ()
) -> argparse.Namespace:
    """The options that all benchmarks share, and those in `own`; `rounds` is the default number."""
    parser = argparse.ArgumentParser(description=description, parents=own)
    parser.add_argument("--rounds", type=_at_least_one, default=rounds, help=f"rounds to keep (default {rounds})")
    parser.add_argument("--threads", type=_at_least_one, nargs="+", default=[1, 2], help="of torch (default 1 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single time there, too")
    return parser.parse_args(argv)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a whole number of at least 1")
    return int(text)


def finish(benchmark: str, results: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """Write the results, and what they were measured with, to `path` if there is one."""
    if path is None:
        return
    measured_with = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    document = {"benchmark": benchmark, "measured_with": measured_with, "results": results}
    write_atomically(path, json.dumps(document, indent=1).encode())
