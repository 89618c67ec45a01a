"""A mixture at scale: fine-grained experts, what serving reads, experts in a cache, and what two processes exchange."""

import csv
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from minimoe.course.exchange import RULES, Exchanged
from minimoe.course.figures.drawing import heatmap, label_rows, new_panels, note, span
from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.published import LARGE_MODELS, REAL_MODELS
from minimoe.course.shipped import planted_trace
from minimoe.course.style import INK, MAIN, PALE, QUIET, SERIES
from minimoe.data_files import data_path
from minimoe.inspection import RoutingTrace
from minimoe.inspection.serving import POLICIES, cache_bytes, distinct_experts, distinct_in, hit_rates, step
from minimoe.model.config import require

NAMES = ("DeepSeek-V3", "gpt-oss-20b", "Qwen3-30B-A3B", "Pangu Pro MoE")
AT_SCALE = {name: (REAL_MODELS | LARGE_MODELS)[name] for name in NAMES}  # the four that notebook 13 reads
BATCHES = [2**power for power in range(9)]
GB = 1e9


def read_grain() -> dict[str, list[float]]:
    """Held-out nats per token of data/runs/grain.csv, one number a seed, by model."""
    nats: dict[str, list[float]] = {}
    with open(data_path("runs/grain.csv"), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            nats.setdefault(row["model"], []).append(float(row["nats"]))
    return nats


@figure(nats=read_grain)
def grain_sweep(nats: Mapping[str, Sequence[float]]) -> Drawing:
    """Held-out loss of experts cut fine and shared, a dot for each seed. Data: model, seed, nats."""
    drawn, (axes,) = new_panels(2.6, xlabel="held-out loss, nats per token")
    for place, values in enumerate(nats.values()):
        axes.plot([min(values), max(values)], [place, place], color=PALE, linewidth=6, solid_capstyle="round")
        for seed, (value, style) in enumerate(zip(values, SERIES, strict=False)):
            label = f"seed {seed}" if place == 0 else None
            axes.plot(value, place, label=label, color=style["color"], marker=style["marker"], linestyle="")
    label_rows(axes, list(nats))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    rows = [(model, seed, value) for model, values in nats.items() for seed, value in enumerate(values)]
    found = "; ".join(f"{model} {span(values)}" for model, values in nats.items())
    return drawn, columns(("model", "seed", "nats"), rows), f"Dots on a line for each of {len(nats)} models: {found}."


@figure(trace=planted_trace)
def experts_touched(trace: RoutingTrace) -> Drawing:
    """The share of a layer's experts that a batch touches: published shapes under even routing, and a recorded trace.

    Data: of (a model, "ours, even" or "ours, counted"), tokens, share (of the experts of a layer; the mean of ours).
    """
    drawn, panels = new_panels(3.0, 1, 2, sharey=True, xlabel="tokens in the batch")
    rows = []
    for style, (name, real) in zip(SERIES, AT_SCALE.items(), strict=False):
        experts, k = real.config.num_experts, real.config.num_experts_per_tok
        rows += [(name, tokens, distinct_experts(experts, k, tokens) / experts) for tokens in BATCHES]
        panels[0].plot(BATCHES, [row[2] for row in rows[-len(BATCHES) :]], label=f"{name}: {k} of {experts}", **style)
    experts, k = trace.num_experts, trace.k
    even = [distinct_experts(experts, k, tokens) / experts for tokens in BATCHES]
    counted = [distinct_in(trace, tokens).mean() / experts for tokens in BATCHES]
    for label, style, values in zip(("even", "counted"), SERIES, (even, counted), strict=False):
        panels[1].plot(BATCHES, values, label=label, **style)
        rows += [(f"ours, {label}", tokens, value) for tokens, value in zip(BATCHES, values, strict=True)]
    for axes, title in zip(panels, ("Even routing", f"Ours, {k} of {experts}"), strict=True):
        axes.set(title=title, ylim=(0, 1.6), yticks=[0, 0.25, 0.5, 0.75, 1])
        axes.legend(loc="upper left", fontsize=9)
        _count_in_powers(axes)
    panels[0].set_ylabel("share of the experts")
    at = BATCHES.index(32)
    sparse = {name: distinct_experts(real.config.num_experts, real.config.num_experts_per_tok, 32)
              / real.config.num_experts for name, real in AT_SCALE.items()}  # fmt: skip
    said = ", ".join(f"{name} {share:.0%}" for name, share in sparse.items())
    alt = f"""Two plots of the share of a layer's experts that a batch touches, from 1 to {BATCHES[-1]} tokens. At 32
        tokens, under even routing: {said}. Our model: {even[at]:.0%} by the formula, {counted[at]:.0%} counted."""
    return drawn, columns(("of", "tokens", "share"), rows), alt


def _count_in_powers(axes: Axes) -> None:
    """An axis of numbers that double, with plain numbers below it."""
    axes.set_xscale("log")
    axes.set_xticks(BATCHES[::2], list(map(str, BATCHES[::2])))
    axes.minorticks_off()


@figure()
def serving_cost(
    model: str = "gpt-oss-20b", sequences: int = 16, context: int = 4096, memory_gb: int = 80, bandwidth_gb: int = 2000
) -> Drawing:
    """Does a model fit into a memory, and how fast can it generate at most: weights and cache in 16 bits.

    Data: what ("weights", "cache": GB in memory; "tokens a second at", at most, of all sequences), sequences, value.
    Raises ValueError: the model is none of `AT_SCALE`.
    """
    require(model in AT_SCALE, "model", model, f"one of {', '.join(AT_SCALE)}")
    config = AT_SCALE[model].config
    weights, cache = 2 * config.num_parameters() / GB, sequences * cache_bytes(config, context) / GB
    counts = sorted({*BATCHES, sequences})
    speeds = [n / (step(config, sequences=n, past=context).read / (bandwidth_gb * GB)) for n in counts]
    fits = weights + cache <= memory_gb
    drawn, (left, right) = new_panels(3.0, 1, 2, title=f"{model}, {sequences} sequences of {context:,} tokens")
    for label, width, start, colour in (("weights", weights, 0, MAIN), ("cache", cache, weights, PALE)):
        left.barh(0, width, 0.5, left=start, color=colour, edgecolor=INK, label=f"{label} {width:,.1f} GB")
    left.axvline(memory_gb, color=INK, linestyle="--", linewidth=1)
    note(left, "memory", (memory_gb, 0.6), 4)
    left.set(title="It fits" if fits else "It does not fit", xlabel="GB", yticks=[], ylim=(-1.2, 0.8))
    left.set_xlim(0, 1.25 * max(memory_gb, weights + cache))
    left.legend(loc="lower left")
    right.plot(counts, speeds, **SERIES[0])
    here = speeds[counts.index(sequences)]
    right.axvline(sequences, color=QUIET, linestyle=":", linewidth=1)
    right.set(title=f"At most {here:,.0f} tokens a second", xlabel="sequences", ylim=(0, 1.1 * max(speeds)))
    _count_in_powers(right)
    rows = [("weights", sequences, weights), ("cache", sequences, cache)]
    rows += [("tokens a second at", n, speed) for n, speed in zip(counts, speeds, strict=True)]
    alt = f"""{model} in 16 bits takes {weights:,.1f} GB for its weights and {cache:,.1f} GB for the cache of
        {sequences} sequences of {context:,} tokens; {"that fits" if fits else "that does not fit"} into
        {memory_gb:,} GB. At {bandwidth_gb:,} GB a second it generates at most {here:,.0f} tokens a second."""
    return drawn, columns(("what", "sequences", "value"), rows), alt


@figure(trace=planted_trace)
def experts_in_a_cache(trace: RoutingTrace) -> Drawing:
    """How often a token finds its expert in a cache of some of a layer's experts, by two policies and by luck.

    Data: policy ("lru", "load", or "luck": held / E), held (experts of each layer), hits (share; mean over layers).
    """
    held = list(range(1, trace.num_experts + 1))
    rates = {policy: [hit_rates(trace, size, policy).mean() for size in held] for policy in POLICIES}
    rates["luck"] = [size / trace.num_experts for size in held]
    drawn, (axes,) = new_panels(2.8, xlabel="experts of a layer that fit", ylabel="share found there")
    for style, (policy, values) in zip(SERIES, rates.items(), strict=False):
        axes.plot(held, values, label=policy, **style)
    axes.set(ylim=(0, 1.05), xticks=held)
    axes.legend(loc="upper left")
    rows = [(policy, size, rate) for policy, values in rates.items() for size, rate in zip(held, values, strict=True)]
    half = trace.num_experts // 2
    said = ", ".join(f"{policy} {values[half - 1]:.0%}" for policy, values in rates.items())
    alt = f"Curves of the share of requests that a cache answers. With {half} of {trace.num_experts} experts: {said}."
    return drawn, columns(("policy", "held", "hits"), rows), alt


@figure(listed=False)
def all_to_all(processes: Sequence[Mapping[str, Exchanged]]) -> Drawing:
    """Who gave how many rows to whom, one table for each rule, of what `exchange_both` returned in every process.

    Data: rule, of, to, rows.
    """
    drawn, panels = new_panels(2.4, 1, len(RULES))
    rows, said = [], []
    for axes, rule in zip(panels, RULES, strict=True):
        table = np.array([process[rule].given for process in processes])
        ranks = [f"rank {rank}" for rank in range(len(table))]
        heatmap(axes, table, ",.0f", rows=ranks, columns=ranks, top=1.5 * table.max(), size=12)
        axes.set(title=rule, xlabel="to the experts of", ylabel="tokens of")
        rows += [(rule, of, to, int(number)) for (of, to), number in np.ndenumerate(table)]
        said.append(f"with {rule}, {' and '.join(f'{number:,}' for number in table.sum(0))}")
    alt = f"Tables of the rows that each process gave to each. In all the ranks compute, {'; '.join(said)}."
    return drawn, columns(("rule", "of", "to", "rows"), rows), alt
