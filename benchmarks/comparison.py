"""A full comparison of two checkpoints: the time at the size of the zoo, the memory at 500 M parameters.

    python -m benchmarks.comparison [--rounds N] [--json FILE]

Every comparison runs all methods in a process of its own, on one thread, from two folders. The large pair is two dense
models of random weights in bfloat16, made on the spot with the zoo's tokenizer, so that every method has something to
do. The peer is reading both checkpoints whole into float32: less than that no method that looks at them can do.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.fingerprints import in_fresh_process, peak_memory
from benchmarks.timing import finish
from minimoe.data_files import data_path
from minimoe.fingerprints.compare import compare
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.model.checkpoint import Checkpoint

MOST_SECONDS, MOST_MEMORY = 5.0, 4000.0  # of the zoo's pair; MB for the large one
LARGE = MoEConfig(
    vocab_size=1024,
    hidden_size=1280,
    num_hidden_layers=24,
    num_attention_heads=20,
    num_key_value_heads=4,
    intermediate_size=4352,
    num_experts=0,
)


def make_large(folder: Path, seed: int) -> None:
    """A model of random weights with the tokenizer of the zoo."""
    MoEForCausalLM(LARGE, seed=seed).bfloat16().save_pretrained(folder, model_type="llama")
    (folder / "tokenizer.json").write_bytes(data_path("tokenizer.json").read_bytes())


class Cost(NamedTuple):
    """What one process needed."""

    seconds: float
    megabytes: float  # at most, Python and torch included


def run_compare(a: Path, b: Path) -> Cost:
    """Of a comparison by all methods."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    compare(a, b, methods="all")
    return Cost(time.perf_counter() - start, peak_memory())


def read_whole(a: Path, b: Path) -> Cost:
    """Of reading every tensor of both in float32."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    for folder in (a, b):
        checkpoint = Checkpoint(folder)
        for name in checkpoint:
            checkpoint[name].float()
    return Cost(time.perf_counter() - start, peak_memory())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with the given command line; None: that of the process."""
    parser = argparse.ArgumentParser(description="Time a full comparison, and see how much memory it takes.")
    parser.add_argument("--rounds", type=int, default=3, help="comparisons of the zoo's pair (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every single number there, too")
    arguments = parser.parse_args(argv)
    small = data_path("zoo") / "alder", data_path("zoo") / "alder-drop-0.5-trained"
    of_zoo = [in_fresh_process(run_compare, *small) for _ in range(arguments.rounds)]
    with tempfile.TemporaryDirectory() as temporary:
        large = Path(temporary, "a"), Path(temporary, "b")
        for seed, folder in enumerate(large):
            in_fresh_process(make_large, folder, seed)
        of_large, of_reading = (in_fresh_process(way, *large) for way in (run_compare, read_whole))
    results = [
        {"pair": "alder and alder-drop-0.5-trained", "runs": [cost._asdict() for cost in of_zoo]},
        {"pair": f"two of {LARGE.num_parameters():,} parameters"}
        | {"compared": of_large._asdict(), "read in float32": of_reading._asdict()},
    ]
    _judge("a pair of the zoo", median(cost.seconds for cost in of_zoo), MOST_SECONDS, "seconds")
    print(f"reading two models of {LARGE.num_parameters():,} parameters takes {of_reading.seconds:.1f} s,", end=" ")
    print(f"comparing them {of_large.seconds:.1f} s: {of_large.seconds / of_reading.seconds:.0f} times as long")
    _judge("two large models", of_large.megabytes, MOST_MEMORY, "MB")
    finish("comparison", results, arguments.json)


def _judge(what: str, found: float, most: float, unit: str) -> None:
    print(f"  {'reached    ' if found < most else 'NOT REACHED'}  {what}: {found:.1f} {unit}; wanted below {most:.0f}")


if __name__ == "__main__":
    main()
