"""Streaming standard deviations of a checkpoint: against torch on whole tensors, and against reading and no more.

    python -m benchmarks.fingerprints [--gigabytes G] [--rounds N] [--threads 1 2] [--json FILE]

A bfloat16 checkpoint of random weights is made in a temporary folder, and lies in the page cache when it is timed. Ours
reads its matrices in pieces; the peer reads them whole and calls `tensor.float().std()`, asserted to give the same
numbers; a plain read gives the tensors as they are stored. The read into one buffer is the most that the memory can do,
and has no target.

Every pass runs in a process of its own, as a comparison does: a process that has already freed gigabytes gives whole
matrices memory that is mapped already, which makes the peers two to three times as fast, and ours no faster. At the end
another process shows how much memory ours needs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Target, finish, parse_arguments, report
from minimoe.fingerprints.weights import PIECE, open_weights
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.model.checkpoint import Checkpoint

OURS, PEER = "minimoe, in pieces", "torch, tensor.float().std()"
READ, BUFFER = "a plain read", "a read into one buffer"
TARGETS = (Target(PEER, 4.0), Target(READ, 0.6))
MOST_MEMORY = 100.0  # MB
HIDDEN_SIZE = 2048
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """A dense model with as many layers as come closest to the size."""
    shape = {"vocab_size": 64, "hidden_size": HIDDEN_SIZE, "num_attention_heads": 16, "num_experts": 0}
    one, two = (MoEConfig(**shape, num_hidden_layers=layers).num_parameters() for layers in (1, 2))
    config = MoEConfig(**shape, num_hidden_layers=max(1, round(gigabytes * 1e9 / 2 / (two - one))))
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(like.shape, generator=generator).mul_(0.02).bfloat16()
        for name, like in model.state_dict().items()
    }
    model.load_state_dict(tensors, assign=True)
    model.save_pretrained(folder, model_type="llama")


def ways(folder: Path) -> dict[str, Callable[[], list[float]]]:
    """Each way to go through all matrices, by name; those that compute return the standard deviations."""
    weights, checkpoint = open_weights(folder), Checkpoint(folder)
    parts = {role: "self_attn" if role in "qkvo" else "mlp" for role in ROLES}
    places = [(role, layer) for layer in range(weights.num_layers) for role in ROLES]
    names = [f"model.layers.{layer}.{parts[role]}.{role}_proj.weight" for role, layer in places]

    def read() -> list[float]:
        for name in names:
            checkpoint[name]
        return []

    def read_into_one_buffer() -> list[float]:
        for name in names:
            for _ in checkpoint.pieces(name, PIECE):
                pass
        return []

    return {
        OURS: lambda: [weights.statistics(*place).std for place in places],
        PEER: lambda: [float(checkpoint[name].float().std()) for name in names],
        READ: read,
        BUFFER: read_into_one_buffer,
    }


def assert_same_results(calls: dict[str, Callable[[], list[float]]]) -> None:
    """Torch divides by n - 1 and sums in float32: as close as that.

    Raises:
        AssertionError: naming the place.
    """
    for place, (ours, peer) in enumerate(zip(calls[OURS](), calls[PEER](), strict=True)):
        assert abs(ours / peer - 1) < 1e-3, f"matrix {place}: {ours}, wanted {peer}"


def measure(folder: Path, threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round, each time in a fresh process. The order rotates, so that nobody is always
    first."""
    names = [OURS, PEER, READ, BUFFER]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(in_fresh_process(_seconds, folder, name, threads))
    return seconds


def _seconds(folder: Path, way: str, threads: int) -> float:
    torch.set_num_threads(threads)
    call = ways(folder)[way]
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def extra_memory(folder: Path, way: str) -> float:
    """MB by which one pass raises the largest memory of a fresh process, over what a first small tensor takes."""
    return in_fresh_process(_extra_memory, folder, way)


def in_fresh_process(call: Callable[..., Any], *arguments: object) -> Any:
    """What `call` returns in a process that has done nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, arguments)


def _extra_memory(folder: Path, way: str) -> float:
    torch.set_num_threads(1)
    open_weights(folder).statistics("norm1", 0)
    call, before = ways(folder)[way], peak_memory()
    call()
    return peak_memory() - before


def peak_memory() -> float:
    """The largest memory of this process so far in MB.

    Read from Linux: `getrusage` would count that of the process which started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with the given command line; None: that of the process."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint (default 1)")
    arguments = parse_arguments("Time the statistics of a checkpoint.", argv, rounds=5, own=[own])
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder, arguments.gigabytes)
        size = sum(file.stat().st_size for file in Checkpoint(folder).files) / 1e9
        assert_same_results(ways(folder))
        for threads in arguments.threads:
            seconds = measure(folder, threads, arguments.rounds)
            title = f"standard deviations of a checkpoint of {size:.2f} GB, threads {threads}"
            results.append({"gigabytes": size, "threads": threads} | report(title, seconds, OURS, TARGETS))
        memory = {way: extra_memory(folder, way) for way in (OURS, PEER)}
    reached = memory[OURS] < MOST_MEMORY
    print(f"\nmemory: {memory[OURS]:.0f} MB; {PEER} {memory[PEER]:.0f} MB")
    print(f"  {'reached    ' if reached else 'NOT REACHED'}  wanted below {MOST_MEMORY:.0f} MB")
    results.append({"gigabytes": size, "extra_megabytes": memory, "limit": MOST_MEMORY, "reached": reached})
    finish("fingerprints", results, arguments.json)


if __name__ == "__main__":
    main()
