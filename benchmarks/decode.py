"""Greedy generation: our MoEForCausalLM against transformers' MixtralForCausalLM, same shape, same weights.

    python -m benchmarks.decode [--rounds N] [--threads 1 2] [--json FILE]

Prefill is one forward pass over the prompt that keeps keys and values; decoding is what `generate` takes beyond that: a
step for every new token but the first. Before anything is timed it is asserted that all generate the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, MixtralForCausalLM

from benchmarks.timing import Target, finish, measure, parse_arguments, report, torch_threads
from benchmarks.train_step import CONFIG, OURS, their_model
from minimoe.model import MoEForCausalLM

BATCHES = (1, 8)
PROMPT, NEW = 128, 64  # tokens of each sequence: given, and generated


class Peer(NamedTuple):
    """One model with one batch of prompts."""

    prefill: Callable[[], object]
    generate: Callable[[], Tensor]  # [B, PROMPT + NEW]


def make_peers(batch: int) -> dict[str, Peer]:
    """Ours, and transformers with both of its experts implementations, all from the same weights."""
    ids = torch.randint(CONFIG.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    ours = MoEForCausalLM(CONFIG).eval()
    peers = {OURS: Peer(lambda: ours(ids, use_cache=True), lambda: ours.generate(ids, NEW))}
    for implementation in ("eager", "grouped_mm"):
        theirs = their_model(ours, implementation).eval()
        peers[f"transformers {implementation}"] = _their_peer(theirs, ids)
    return peers


def _their_peer(model: MixtralForCausalLM, ids: Tensor) -> Peer:
    greedy = GenerationConfig(do_sample=False, max_new_tokens=NEW, use_cache=True, eos_token_id=None, pad_token_id=0)
    mask = torch.ones_like(ids)
    return Peer(
        lambda: model(ids, use_cache=True),
        lambda: model.generate(ids, attention_mask=mask, generation_config=greedy),
    )


def assert_same_tokens(peers: Mapping[str, Peer]) -> None:
    """Every peer must generate what the first one does.

    Raises:
        AssertionError: naming the peer.
    """
    wanted = next(iter(peers.values())).generate()
    for name, peer in peers.items():
        found = peer.generate()
        assert torch.equal(found, wanted), f"{name}: generated {found.tolist()}, wanted {wanted.tolist()}"


def measure_parts(peers: Mapping[str, Peer], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the prefill and of the decoding of every peer in every round."""
    parts = {(name, part): call for name, peer in peers.items() for part, call in peer._asdict().items()}
    seconds = measure(parts, rounds)
    prefill = {name: seconds[name, "prefill"] for name in peers}
    decode = {
        name: [whole - first for whole, first in zip(seconds[name, "generate"], prefill[name], strict=True)]
        for name in peers
    }
    return {"prefill": prefill, "decode": decode}


def targets(part: str, batch: int, peers: Mapping[str, Peer]) -> list[Target]:
    """Never slower than transformers; one sequence alone decoded 1.5 times as fast."""
    wanted = 1.5 if part == "decode" and batch == 1 else 1.0
    return [Target(name, wanted) for name in peers if name != OURS]


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with the given command line; None: that of the process."""
    arguments = parse_arguments("Time the generation of text.", argv, rounds=20)
    results: list[dict[str, Any]] = []
    for batch in BATCHES:
        peers = make_peers(batch)
        assert_same_tokens(peers)
        for threads in arguments.threads:
            with torch_threads(threads):
                parts = measure_parts(peers, arguments.rounds)
            for part, seconds in parts.items():
                title = f"{part}, batch {batch}, prompt {PROMPT}, new tokens {NEW}, threads {threads}"
                result = report(title, seconds, OURS, targets(part, batch, peers))
                tokens = batch * (PROMPT if part == "prefill" else NEW - 1)
                rates = {name: tokens / median for name, median in result["median_seconds"].items()}
                print("  tokens per second:", ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
                setting = {"part": part, "batch": batch, "threads": threads, "tokens_per_second": rates}
                results.append(setting | result)
    finish("decode", results, arguments.json)


if __name__ == "__main__":
    main()
