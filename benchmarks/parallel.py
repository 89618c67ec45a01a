"""Experts over processes: one process against two, what they send, and what it would take on many nodes.

    python -m benchmarks.parallel [--rounds N] [--steps N] [--json FILE]

Every measurement runs in new processes of one thread each. The first tables are training, in turn alone and over two
processes, with the same global batch, for ever more work in each exchange, and what two processes sent in a step; then
MoGE against top-k, with the simulation of notebook 03 beside what real processes were given; the last is no measurement
but arithmetic: what DeepSeek-V3's dispatch and combine take on 1 to 64 nodes at published link speeds, beside the
speeds that were reported.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.timing import Target, finish, parse_arguments, report
from minimoe.course.cost import crossings, place_experts
from minimoe.course.exchange import RULES, exchange_both
from minimoe.course.published import LARGE_MODELS, REAL_MODELS, read_published
from minimoe.inspection.serving import step
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.training.corpus import Corpus
from minimoe.training.loop import Settings
from minimoe.training.parallel import ParallelRun
from minimoe.training.processes import Ranks, run_processes

WANTED = 1.6  # times as fast with two processes, where two cores are idle
SHAPE = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "num_experts": 8}
SEQ_LEN = 128
LARGE = {"moe_intermediate_size": 768}
SETTINGS = {  # what differs: of the configuration, and sequences in a batch
    "8 experts of 256, top-2": ({"moe_intermediate_size": 256}, 16),
    "8 experts of 768, top-2": (LARGE, 16),
    "8 experts of 768, MoGE": (LARGE | {"router": "grouped", "n_group": 2}, 16),
    "8 experts of 768, MoGE, twice the batch": (LARGE | {"router": "grouped", "n_group": 2}, 32),
}
ALONE, TWO = "1 process", "2 processes"


def train_some(ranks: Ranks, steps: int, setting: str) -> dict[str, Any]:
    """Seconds by the clock and of the processor for `steps` steps after two, and what was sent in them."""
    special, sequences = SETTINGS[setting]
    config = MoEConfig(**SHAPE, **special, num_experts_per_tok=2, router_aux_loss_coef=0.01)
    settings = Settings(steps=steps + 2, batch_size=sequences, seq_len=SEQ_LEN)
    corpus = Corpus.planted(documents_per_domain=100)
    run = ParallelRun(MoEForCausalLM(config), corpus, settings, None, 10**6, None, (), ranks)
    run.model.train()
    for _ in range(2):
        run.advance()
    ranks.sent.clear()
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        run.advance()
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    return {"clock": clock, "processor": processor, "sent": {kind: asdict(sent) for kind, sent in ranks.sent.items()}}


def one_against_two(setting: str, rounds: int, steps: int) -> dict[str, Any]:
    """Time both in turn; print clock and processor time of a step."""
    found: dict[str, list[list[dict[str, Any]]]] = {ALONE: [], TWO: []}
    for turn in range(rounds):
        for name in (ALONE, TWO) if turn % 2 == 0 else (TWO, ALONE):
            found[name].append(run_processes(1 if name == ALONE else 2, train_some, steps, setting))
    clock = {name: [max(one["clock"] for one in of_all) / steps for of_all in turns] for name, turns in found.items()}
    result = report(
        f"{setting}: a training step of {SETTINGS[setting][1] * SEQ_LEN} tokens", clock, TWO, [Target(ALONE, WANTED)]
    )
    busy = {name: [[one["processor"] / steps for one in of_all] for of_all in turns] for name, turns in found.items()}
    alone, busier, both = (
        1000 * median(map(pick, busy[name])) for name, pick in ((ALONE, max), (TWO, max), (TWO, sum))
    )
    print(
        f"\nprocessor time of a step: {alone:.0f} ms alone; {both:.0f} ms of both, {busier:.0f} ms of the busier one:"
    )
    print(f"{alone / busier:.2f} times as fast where each has a core of its own and nothing is waited for")
    result["processor"] = busy
    return result | {"two": found[TWO][-1][0]}


def print_sent(two: dict[str, Any], steps: int) -> None:
    """What one process of two sent, of a kind of collective and step."""
    print("\nwhat rank 0 sends in a step of training over two processes")
    print(f"{'':20}    calls       bytes    share of the time of a step")
    for kind, sent in two["sent"].items():
        calls, size, share = sent["calls"] / steps, sent["bytes"] / steps, sent["seconds"] / two["clock"]
        print(f"{kind:20} {calls:8.0f} {size:11,.0f}   {share:6.1%}")


def exchange_repeatedly(ranks: Ranks, times: int, *arguments: Any) -> list[dict[str, Any]]:
    """`exchange_both`, with the waiting for each other counted apart."""
    ranks.meets = True
    return [exchange_both(ranks, *arguments, hidden=256) for _ in range(times)]


def placed(skew: float, times: int, experts: int = 32, k: int = 8, tokens: int = 4096) -> dict[str, Any]:
    """Print MoGE against top-k on two devices: simulated, and with two processes."""
    simulated = place_experts(experts, k, 2, skew, tokens)
    rounds = run_processes(2, exchange_repeatedly, times, experts, k, skew, tokens)
    result = {}
    for rule in RULES:
        computed = [of_rank[0][rule].computed for of_rank in rounds]
        expected = [round(work.item() * tokens * k / 2) for work in simulated[rule].work.sum(1)]
        assert computed == expected, f"{rule}: processes computed {computed} rows, the simulation says {expected}"
        waited = [median(sum(sent.waited for sent in one[rule].sent.values()) for one in of_rank) for of_rank in rounds]
        result[rule] = {"rows": computed, "simulated": simulated[rule].time, "waited": waited}
        text = f"{rule:6} skew {skew:g}: rows {computed[0]:6,} and {computed[1]:6,}, simulated time"
        print(f"{text} {simulated[rule].time:.2f}; waited {1000 * waited[0]:6.1f} and {1000 * waited[1]:6.1f} ms")
    return result


def on_paper(tokens: int = 4096, devices: int = 8) -> list[dict[str, float]]:
    """Print dispatch and combine of one layer of DeepSeek-V3 on 1 to 64 nodes of 8 devices.

    A token goes once to each other node, in 8 bits, and comes back in 16; within a node once to each device.
    """
    config, rows = LARGE_MODELS["DeepSeek-V3"].config, read_published("links")
    within, between = (float(row["value"]) for row in rows[:2])
    reached = {(row["quantity"], int(row["devices"])): float(row["value"]) for row in rows if row["devices"]}
    print(f"\nDeepSeek-V3, one layer, {tokens} tokens on each device; links {within:g} and {between:g} GB/s")
    print("                  other nodes      at these speeds, ms     at the reported speeds, ms")
    print("nodes  devices   of a token     dispatch     combine     dispatch     combine")
    found = []
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        crossing = crossings(config, nodes, devices=devices, tokens=tokens)
        copies, speed = (crossing.devices, within) if nodes == 1 else (crossing.nodes, between)
        row = {"nodes": nodes, "crossing": crossing.nodes}
        for part, size in (("dispatch", 1), ("combine", 2)):
            gigabytes = copies * tokens * config.hidden_size * size / 1e9
            said = reached.get((f"{part} reached", nodes * devices))
            row |= {part: gigabytes / speed, f"{part} as reported": gigabytes / said if said else None}
        names = ("dispatch", "combine", "dispatch as reported", "combine as reported")
        times = "".join(f"{'-' if row[name] is None else f'{1000 * row[name]:.2f}':>12}" for name in names)
        print(f"{nodes:5} {nodes * devices:8} {crossing.nodes:12.2f} {times}")
        found.append(row)
    return found


def pangu_on_paper() -> list[dict[str, float]]:
    """Print what must be read to generate as fast as was reported of Pangu Pro MoE, in 8 bits."""
    config = REAL_MODELS["Pangu Pro MoE"].config
    rate = next(float(row["value"]) for row in read_published("links") if row["unit"] == "tokens/s per card")
    print(f"\nPangu Pro MoE: {rate:g} tokens/s per card were reported. What a card then reads of weights of 8 bits,")
    print("however many cards share the model, by the number of sequences that they serve at once:")
    found = []
    for sequences in (16, 64, 256, 1024):
        bandwidth = rate * step(config, sequences=sequences, bits=8).read / sequences
        print(f"{sequences:6} sequences: {bandwidth / 1e9:8,.0f} GB/s")
        found.append({"sequences": sequences, "bytes_per_second": bandwidth})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with the given command line; None: that of the process."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--steps", type=int, default=10, help="steps of a round (default 10)")
    arguments = parse_arguments("Time training over one and two processes.", argv, rounds=5, own=[own])
    results = [one_against_two(setting, arguments.rounds, arguments.steps) for setting in SETTINGS]
    print_sent(results[0]["two"], arguments.steps)
    print("\nMoGE against top-k: the experts of a layer on two devices")
    results += [placed(skew, 2 * arguments.rounds) for skew in (0.0, 1.0)]
    results += [{"on_paper": on_paper(), "pangu": pangu_on_paper()}]
    finish("parallel", results, arguments.json)


if __name__ == "__main__":
    main()
