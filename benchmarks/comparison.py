"""Comparing and fingerprinting checkpoints: the time at the size of the zoo, time and memory at that of large models.

    python -m benchmarks.comparison [--rounds N] [--large KIND ...] [--modeldna PYTHON] [--json FILE]

Everything runs in a process of its own, on one thread, from folders. The large models are random weights in bfloat16,
made on the spot with a tokenizer of words, so that every method has something to do. The peer is reading both
checkpoints whole into float32: less than that no method that looks at all of them can do. Both are timed by the
processor seconds of their process, which other programs disturb less than the clock. With `--modeldna`, an interpreter
that has modelDNA, this tool is asked about the same two folders, import of Python and all (benchmarks/modeldna.py).
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.fingerprints import in_fresh_process, peak_memory
from benchmarks.large_models import make_model
from benchmarks.modeldna import ask
from benchmarks.timing import finish
from minimoe.data_files import data_path
from minimoe.fingerprints.compare import compare
from minimoe.fingerprints.fingerprint import fingerprint
from minimoe.model.checkpoint import Checkpoint

MOST_SECONDS = 5.0  # of the zoo's pair, by all methods
TIMES_A_READ, FIXED_SECONDS, TIMES_A_READ_OF_ONE = 12, 10, 6  # of a large comparison; of a fingerprint
PAIRS = {  # the kinds of two models, and MB at most
    "half": ("half a billion", "half a billion", 1500.0),
    "three": ("three billion", "three billion", 3000.0),
    "mixture": ("dense parent", "mixture of 60", 3000.0),
}


class Cost(NamedTuple):
    """What one process needed."""

    seconds: float  # of the processor
    by_the_clock: float
    megabytes: float  # at most, Python and torch included


def cost_of(call: Callable[..., object], *paths: Path) -> Cost:
    """Of a call with folders, in this process."""
    torch.set_num_threads(1)
    clock, start = time.perf_counter(), time.process_time()
    call(*paths)
    return Cost(time.process_time() - start, time.perf_counter() - clock, peak_memory())


def cost_of_modeldna(python: str, *paths: Path) -> Cost:
    """The same of modelDNA, in the process that this one starts."""
    clock = time.perf_counter()
    list(ask(python, [paths]))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(used.ru_utime + used.ru_stime, time.perf_counter() - clock, used.ru_maxrss * 1024 / 1e6)


def read_whole(*folders: Path) -> None:
    """Read every tensor of each in float32."""
    for folder in folders:
        checkpoint = Checkpoint(folder)
        for name in checkpoint:
            checkpoint[name].float()


WAYS: dict[str, Callable[..., object]] = {
    "reading both": read_whole,
    "a quick look": partial(compare, methods="quick"),
    "comparing them": compare,
    "comparing them by all methods": partial(compare, methods="all"),
}


def measure_large(pair: str, modeldna: str | None) -> dict[str, dict[str, float]]:
    """Time and memory of every way, of a pair, and of reading and fingerprinting its second model."""
    *kinds, most_memory = PAIRS[pair]
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, f"{number}") for number in range(2)]
        counts = [in_fresh_process(make_model, folders[seed], kind, seed) for seed, kind in enumerate(kinds)]
        costs = {name: in_fresh_process(cost_of, way, *folders) for name, way in WAYS.items()}
        if modeldna:
            costs["modelDNA"] = in_fresh_process(cost_of_modeldna, modeldna, *folders)
        one = {"reading the second": read_whole, "its fingerprint": fingerprint}
        costs |= {name: in_fresh_process(cost_of, way, folders[1]) for name, way in one.items()}
    print(f"\nmodels of {counts[0]:,} and {counts[1]:,} parameters, random weights in bfloat16")
    for name, cost in costs.items():
        print(f"  {name}: {cost.seconds:.1f} s ({cost.by_the_clock:.1f} by the clock), {cost.megabytes:.0f} MB")
    most = TIMES_A_READ * costs["reading both"].seconds + FIXED_SECONDS
    for way in list(WAYS)[1:]:
        _judge(way, costs[way].seconds, most, "s")
        _judge(way, costs[way].megabytes, most_memory, "MB")
    most = TIMES_A_READ_OF_ONE * costs["reading the second"].seconds
    _judge("its fingerprint", costs["its fingerprint"].seconds, most, "s")
    return {name: cost._asdict() for name, cost in costs.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with the given command line; None: that of the process."""
    parser = argparse.ArgumentParser(
        description="Time comparisons and fingerprints, and see how much memory they take."
    )
    parser.add_argument("--rounds", type=int, default=3, help="comparisons of the zoo's pair (default 3)")
    parser.add_argument(
        "--large", nargs="*", choices=PAIRS, default=list(PAIRS), help="which large pairs (default all)"
    )
    parser.add_argument("--modeldna", metavar="PYTHON", help="an interpreter that has it, to be asked too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single number there, too")
    arguments = parser.parse_args(argv)
    small = data_path("zoo") / "alder", data_path("zoo") / "alder-drop-0.5-trained"
    by_all = WAYS["comparing them by all methods"]
    of_zoo = [in_fresh_process(cost_of, by_all, *small) for _ in range(arguments.rounds)]
    _judge("a pair of the zoo by all methods", median(cost.seconds for cost in of_zoo), MOST_SECONDS, "s")
    results = [{"pair": "alder and alder-drop-0.5-trained", "runs": [cost._asdict() for cost in of_zoo]}]
    for pair in arguments.large:
        results.append({"pair": " and ".join(PAIRS[pair][:2])} | measure_large(pair, arguments.modeldna))
    finish("comparison", results, arguments.json)


def _judge(what: str, found: float, most: float, unit: str) -> None:
    reached = "reached    " if found < most else "NOT REACHED"
    print(f"  {reached}  {what}: {found:.1f} {unit}; wanted below {most:.1f}", flush=True)


if __name__ == "__main__":
    main()
