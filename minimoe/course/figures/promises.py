"""What a verdict is worth, what behaviour says, and which expert came from where: figures of notebook 10."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from scipy.stats import binomtest

from minimoe.course.figures.benchmark_results import draw_strip
from minimoe.course.figures.drawing import label_right, label_rows, new_panels
from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.shipped import zoo_weights
from minimoe.course.style import INK, MAIN, PALE, QUIET
from minimoe.fingerprints.expert_attribution import Place, trace_experts
from minimoe.fingerprints.folded import mean_up
from minimoe.fingerprints.matching import assign
from minimoe.fingerprints.weights import Weights
from minimoe.fingerprints.zoo_scores import Rows, scores
from minimoe.model.config import require

_COMPARED = {"strangers": "stranger-13", "fine-tuned": "alder-finetuned", "same first weights": "alder-twin"}


@figure(
    parent=partial(zoo_weights, "alder"),
    others=lambda: {pair: zoo_weights(name) for pair, name in _COMPARED.items()},
)
def neuron_order(parent: Weights, others: Mapping[str, Weights], layer: int = 1, *, name: str = "alder") -> Drawing:
    """Which neuron of other models each neuron of a model is assigned to, by the cosine of their up rows."""
    rows, in_place = [], []
    drawn, panels = new_panels(2.9, 1, len(others), sharey=True)
    for axes, (pair, other) in zip(panels, others.items(), strict=True):
        left, right = (F.normalize(mean_up(weights, layer), dim=1) for weights in (parent, other))
        cosines = left @ right.mT
        partners = assign(cosines).tolist()
        axes.plot(partners, "o", markersize=2, color=MAIN)
        axes.set(title=pair, xlabel=f"neuron of {name}", box_aspect=1)
        rows += [(pair, *place, float(cosines[place])) for place in enumerate(partners)]
        in_place.append(f"{pair} {sum(neuron == partner for neuron, partner in enumerate(partners))}")
    panels[0].set_ylabel("its partner")
    alt = f"""Scatter plots of the partner of each neuron of {name}, layer {layer}. How many of {len(partners)} have the
        partner of their own number: {", ".join(in_place)}."""
    return drawn, columns(("pair", "neuron", "partner", "cosine"), rows), alt


_TICKS = [10**power for power in range(1, 7)]
_ONE_IN = {2, 5, *_TICKS, *(half * tick for tick in _TICKS[:-1] for half in (2, 5))}


def count_of(use: str) -> int:
    """How many pairs of the benchmark are there for a use."""
    return sum(row["use"] == use for row in scores())


@figure(relatives=partial(count_of, "positive"), strangers=partial(count_of, "evaluation"))
def worth_of_a_verdict(
    one_in: int = 1_000, found: int = 486, flagged: int = 0, *, relatives: int, strangers: int
) -> Drawing:
    """How many of the pairs that a method calls related are related, if one in so many pairs is.

    Bayes' rule, with the rates counted in a benchmark: of its relatives the method found some, of its strangers it
    flagged some. The band lets both rates lie anywhere in their 95 % intervals (Clopper and Pearson).

    Args:
        one_in: of how many pairs one is related, marked in the figure.
        found, flagged: how many of the relatives, and of the strangers, the method calls related.
        relatives, strangers: how many there are in the benchmark.

    Raises ValueError where a count is impossible, or the method never says "related".
    """
    require(0 <= found <= relatives, "found", found, f"0 to {relatives}")
    require(0 <= flagged <= strangers, "flagged", flagged, f"0 to {strangers}")
    require(one_in >= 2, "one_in", one_in, "at least 2")
    require(found + flagged > 0, "found and flagged", 0, "one of them above 0: else no pair is called related")
    priors = np.array(sorted({*_ONE_IN, one_in}))
    true, false = (binomtest(*counts).proportion_ci() for counts in ((found, relatives), (flagged, strangers)))
    low = share_related(1 / priors, true.low, false.high)
    right = share_related(1 / priors, found / relatives, flagged / strangers)
    high = share_related(1 / priors, true.high, false.low)
    marked = priors == one_in
    (worst,), (usual,), (best,) = low[marked], right[marked], high[marked]
    title = f"{found} of {relatives} relatives found, {flagged} of {strangers} strangers flagged"
    drawn, (axes,) = new_panels(3.9, title=title)
    axes.fill_between(priors, low, high, color=PALE, label="both rates within 95 %")
    axes.plot(priors, right, color=MAIN, label="rates as counted")
    axes.plot([one_in] * 2, [worst, best], color=INK, linewidth=2.5, label=f"one in {one_in:,}")
    axes.plot(one_in, usual, "D", color=INK, markersize=6)
    axes.set(xscale="log", ylim=(-0.02, 1.04), ylabel="verdicts that are right")
    axes.set_xlabel("one pair in so many is related")
    axes.set_xticks(_TICKS, [f"{tick:,}" for tick in _TICKS])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    drawn.legend(loc="outside lower center", ncols=3)
    alt = f"""The share of right verdicts against how rare related pairs are, for {found} of {relatives} relatives found
        and {flagged} of {strangers} strangers flagged. If one pair in {one_in:,} is related, {usual:.0%} of the
        verdicts are right, between {worst:.0%} and {best:.0%} if the rates lie anywhere in their intervals."""
    return drawn, columns(("one_in", "low", "right", "high"), zip(priors, low, right, high, strict=True)), alt


def share_related(prior: np.ndarray, true: float, false: float) -> np.ndarray:
    """The share of related pairs among those that are called so (Bayes), from the rates of true and false calls."""
    return prior * true / (prior * true + (1 - prior) * false)


BEHAVED = {
    "distilled": "student: no weight shared",
    "lora": "LoRA, other text",
    "finetuned": "fine-tuned, other text",
    "continued-0.1": "trained further, 0.1 times",
    "continued-1": "trained further, once",
    "continued-4": "trained further, 4 times",
}


@figure(scores=scores)
def behaviour_misleads(scores: Rows) -> Drawing:
    """How much relatives and students of alder and birch agree with them, beside strangers trained on the same text.

    Data: group, model, token_agreement, hidden_cka; strangers are called by their pair.
    """
    methods = {"token_agreement": "equal next tokens", "hidden_cka": "CKA of hidden states"}
    pairs = {(row["a"], row["b"]): row for row in scores}
    groups = {"strangers": [row for row in scores if row["relation"] == "strangers" and row["kind"] == "roots"]}
    groups |= {group: [pairs[root, f"{root}-{kind}"] for root in ("alder", "birch")] for kind, group in BEHAVED.items()}
    xlabel = "score with the parent or teacher (dotted: where strangers lie)"
    drawn, panels = new_panels(3.4, 1, len(methods), sharey=True, xlabel=xlabel)
    for axes, (method, title) in zip(panels, methods.items(), strict=True):
        found = [[row[method] for row in rows] for rows in groups.values()]
        draw_strip(axes, found[0], 0, PALE)
        for end in (min(found[0]), max(found[0])):
            axes.axvline(end, color=QUIET, linewidth=0.8, linestyle=":")
        for place, group in enumerate(BEHAVED.values(), 1):
            marker, colour = ("s", "white") if "student" in group else ("o", MAIN)
            axes.plot(found[place], [place] * 2, marker, color=colour, markersize=7, markeredgecolor=INK)
        axes.set(title=title, xlim=(0, 1), xticks=[0, 0.5, 1])
    label_rows(panels[0], groups)
    rows, medians = [], []
    for group, of_group in groups.items():
        found = [[row[method] for method in methods] for row in of_group]
        names = [f"{row['a']} {row['b']}" if group == "strangers" else row["b"] for row in of_group]
        rows += [(group, name, *values) for name, values in zip(names, found, strict=True)]
        medians.append("{} {:.2f} and {:.2f}".format(group, *np.median(found, axis=0)))
    alt = f"""Two strip plots: the share of equal next tokens, and CKA of hidden states. Medians: {"; ".join(medians)}.
        Dotted lines: the lowest and the highest stranger."""
    return drawn, columns(("group", "model", *methods), rows), alt


@figure(
    suspect=partial(zoo_weights, "alder-drop-0.5-trained"),
    parents=lambda: {name: zoo_weights(name) for name in ("alder", "birch")},  # birch: a stranger
)
def attribution_map(
    suspect: Weights, parents: Mapping[str, Weights], *, name: str = "alder-drop-0.5-trained"
) -> Drawing:
    """Which neurons of dense models are found in which expert of a mixture.

    A neuron of the parent is drawn where it is nearest to one of the expert by gate, by up and by down. At the right
    the share of the experts' neurons that did not come from there, estimated by recapture.

    Args:
        suspect: the mixture, called `name`.
        parents: dense models with tokens in common with it, by name.
    """
    rows, parts = [], []
    drawn, panels = new_panels(2.7 * len(parents), len(parents), sharex=True, ylabel="experts of the suspect")
    for axes, (parent, weights) in zip(panels, parents.items(), strict=True):
        partners, rates = trace_experts(weights, suspect)
        _draw_partners(axes, partners, rates, weights.config.intermediate_size)
        axes.set_title(f"{name}, traced to {parent}")
        kept = np.mean([(found >= 0).any(0).mean() for found in partners.values()])
        drop_rate = np.mean([*rates.values()])
        parts.append(f"{parent}: {kept:.0%} of the neurons found in one layer or another, drop rate {drop_rate:.2f}")
        rows += [
            (parent, *place, layer, (of_layer >= 0).sum(), len(of_layer), rates[place])
            for place, found in partners.items()
            for layer, of_layer in enumerate(found)
        ]
    panels[-1].set_xlabel("neuron of the parent, layer after layer")
    alt = f"""Maps of the experts of {name} (rows) to the neurons of a parent (columns), marks where a neuron is found
        again. {"; ".join(parts)}."""
    names = ("parent", "layer", "expert", "parent_layer", "agreeing", "neurons", "drop_rate")
    return drawn, columns(names, rows), alt


def _draw_partners(axes: Axes, partners: dict[Place, np.ndarray], rates: dict[Place, float], width: int) -> None:
    """One row an expert, a mark at each neuron of the parent that it has; layers of both are parted by lines."""
    for row, found in enumerate(partners.values()):
        layers, neurons = np.nonzero(found >= 0)
        axes.vlines(layers * width + found[layers, neurons], row - 0.45, row + 0.45, color=MAIN, linewidth=0.5)
    depth, of_row = len(found), np.array([layer for layer, _ in partners])
    layers, first, counts = np.unique(of_row, return_index=True, return_counts=True)
    middles, rates = first + (counts - 1) / 2, np.array([*rates.values()])
    axes.set(xlim=(-0.5, width * depth - 0.5), ylim=(len(of_row) - 0.5, -0.5))
    axes.set_xticks((np.arange(depth) + 0.5) * width, [f"layer {layer}" for layer in range(depth)])
    axes.set_yticks(middles, [f"layer {layer}" for layer in layers])
    label_right(axes, middles, [f"{rates[of_row == layer].mean():.2f}" for layer in layers], "share that is new")
    axes.tick_params(length=0, which="both")
    axes.set_xticks(np.arange(1, depth) * width - 0.5, minor=True)
    axes.set_yticks(first[1:] - 0.5, minor=True)
    axes.grid(which="minor", color=QUIET, linewidth=0.8)
