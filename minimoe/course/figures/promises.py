"""What a verdict is worth, what behaviour says, and which expert came from where: figures of notebook 10."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from minimoe.course.benchmark_tables import scores
from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.style import INK, MAIN, PALE, QUIET, describe, new_figure
from minimoe.fingerprints.anchors import read_anchors, shared_tokens
from minimoe.fingerprints.expert_attribution import attribute_experts
from minimoe.fingerprints.folded import mean_up, mlps
from minimoe.fingerprints.matching import assign, similarities, token_features
from minimoe.fingerprints.rates import interval
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.lineage.zoo import Zoo
from minimoe.training.tokenizer import load_tokenizer

PARENT, CONTROL = "alder", "birch"
ORDERED = {"strangers": "stranger-13", "fine-tuned": "alder-finetuned", "same first weights": "alder-twin"}
SUSPECTS = (
    "alder-drop-0.5-trained",
    "alder-copy-trained",
    "alder-sliced-trained",
    "alder-btx-trained",
    "mixture-1",
)
TICKS = tuple(10**power for power in range(1, 7))
ONE_IN = sorted({2, 5, *TICKS, *(half * tick for tick in TICKS[:-1] for half in (2, 5))})
BEHAVED = {
    "distilled": "student: no weight shared",
    "lora": "LoRA, other text",
    "finetuned": "fine-tuned, other text",
    "continued-0.1": "trained further, 0.1 times",
    "continued-1": "trained further, once",
    "continued-4": "trained further, 4 times",
}


@cache
def zoo_weights(name: str) -> Weights:
    """The weights of a member of the zoo, with the zoo's tokens."""
    return open_weights(Zoo().load(name), tokenizer=load_tokenizer())


# --- the order of neurons ---------------------------------------------------------------------------------


@figure()
def neuron_order(layer: int = 1) -> Drawing:
    """Which neuron of three other models each neuron of alder is assigned to, by the cosine of their up rows.

    Data: pair, neuron, partner, cosine.
    """
    drawn = new_figure(2.9)
    panels, rows, in_place = drawn.subplots(1, len(ORDERED), sharey=True), [], []
    for axes, (pair, name) in zip(panels, ORDERED.items(), strict=True):
        left, right = (F.normalize(mean_up(zoo_weights(model), layer), dim=1) for model in (PARENT, name))
        cosines = left @ right.mT
        partners = assign(cosines).tolist()
        axes.plot(partners, "o", markersize=2, color=MAIN)
        axes.set(xlabel=f"neuron of {PARENT}", box_aspect=1)
        axes.set_title(pair, fontsize=11)
        rows += [(pair, *place, float(cosines[place])) for place in enumerate(partners)]
        in_place.append(f"{pair} {sum(neuron == partner for neuron, partner in enumerate(partners))}")
    panels[0].set_ylabel("its partner")
    describe(
        drawn,
        f"Three scatter plots of the partner of each neuron of {PARENT}, layer {layer}. How many of {len(partners)} "
        f"have the partner of their own number: {', '.join(in_place)}.",
    )
    return drawn, columns(("pair", "neuron", "partner", "cosine"), rows)


# --- what a verdict is worth ------------------------------------------------------------------------------


@figure()
def worth_of_a_verdict(one_in: int = 1_000, found: int = 486, flagged: int = 0) -> Drawing:
    """How many of the pairs that a method calls related are related, if one in so many pairs is.

    Bayes' rule, with the rates counted in the zoo: of its relatives the method found some, of its evaluation strangers
    it flagged some. The band lets both rates lie anywhere in their 95 % intervals.

    Args:
        one_in: of how many pairs one is related, marked in the figure.
        found: of the relatives of the zoo.
        flagged: of its evaluation strangers.

    Data: one_in, low, right, high.

    Raises:
        ValueError: a count is impossible, or the method never says "related".
    """
    relatives, strangers = (sum(row["use"] == use for row in scores()) for use in ("positive", "evaluation"))
    for name, count, most in (("found", found, relatives), ("flagged", flagged, strangers)):
        if not 0 <= count <= most:
            raise ValueError(f"{name}={count}: wanted 0 to {most}")
    if one_in < 2:
        raise ValueError(f"one_in={one_in}: wanted at least 2")
    if not found + flagged:
        raise ValueError("found=0 and flagged=0: such a method never says that a pair is related")
    priors = sorted({*ONE_IN, one_in})
    (found_low, found_high), (flagged_low, flagged_high) = interval(found, relatives), interval(flagged, strangers)
    corners = {
        "low": (found_low, flagged_high),
        "right": (found / relatives, flagged / strangers),
        "high": (found_high, flagged_low),
    }
    curves = {end: [_right_of_called(1 / prior, *rates) for prior in priors] for end, rates in corners.items()}
    low, right, high = (curve[priors.index(one_in)] for curve in curves.values())
    drawn = new_figure(3.9)
    axes = drawn.subplots()
    axes.fill_between(priors, curves["low"], curves["high"], color=PALE, label="both rates within 95 %")
    axes.plot(priors, curves["right"], color=MAIN, label="rates as counted")
    axes.plot([one_in] * 2, [low, high], color=INK, linewidth=2.5, label=f"one in {one_in:,}")
    axes.plot(one_in, right, "D", color=INK, markersize=6)
    axes.set(xscale="log", ylim=(-0.02, 1.04), xlabel="one pair in so many is related")
    axes.set_ylabel("verdicts that are right")
    axes.set_xticks(TICKS, [f"{tick:,}" for tick in TICKS])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    drawn.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    axes.set_title(f"{found} of {relatives} relatives found, {flagged} of {strangers} strangers flagged")
    describe(
        drawn,
        f"The share of right verdicts against how rare related pairs are, for {found} of {relatives} relatives found "
        f"and {flagged} of {strangers} strangers flagged. If one pair in {one_in:,} is related, {right:.0%} of the "
        f"verdicts are right, between {low:.0%} and {high:.0%} if the rates lie anywhere in their intervals.",
    )
    return drawn, {"one_in": priors, **curves}


def _right_of_called(prior: float, true: float, false: float) -> float:
    """The share of related pairs among those that are called so (Bayes), from the rates of true and false calls."""
    return prior * true / (prior * true + (1 - prior) * false)


# --- behaviour --------------------------------------------------------------------------------------------


@figure()
def behaviour_misleads() -> Drawing:
    """How much relatives and students of alder and birch agree with them, beside strangers trained on the same text.

    Data: group, model, token_agreement, hidden_cka; strangers are called by their pair.
    """
    methods = {"token_agreement": "equal next tokens", "hidden_cka": "CKA of hidden states"}
    strangers = [row for row in scores() if row["relation"] == "strangers" and row["kind"] == "roots"]
    rows = [("strangers", f"{row['a']} {row['b']}", *(row[method] for method in methods)) for row in strangers]
    pairs = {(row["a"], row["b"]): row for row in scores()}
    for kind, group in BEHAVED.items():
        for root in (PARENT, CONTROL):
            row = pairs[root, f"{root}-{kind}"]
            rows.append((group, row["b"], *(row[method] for method in methods)))
    groups = list(dict.fromkeys(row[0] for row in rows))
    drawn = new_figure(3.4)
    panels = drawn.subplots(1, len(methods), sharey=True)
    for column, (axes, title) in enumerate(zip(panels, methods.values(), strict=True), 2):
        for place, group in enumerate(groups):
            found = [row[column] for row in rows if row[0] == group]
            spread = np.linspace(-0.3, 0.3, len(found)) if place == 0 else np.zeros(len(found))
            colour = PALE if place == 0 else "white" if "student" in group else MAIN
            axes.plot(
                found, place + spread, "s" if "student" in group else "o", color=colour,
                markersize=3 if place == 0 else 7, markeredgecolor=INK, markeredgewidth=0.3 if place == 0 else 1,
            )  # fmt: skip
        for end in (min, max):
            axes.axvline(end(row[column] for row in rows if row[0] == "strangers"), color=QUIET, linewidth=0.8, ls=":")
        axes.set_title(title, fontsize=11)
        axes.set(xlim=(0, 1), xticks=[0, 0.5, 1])
    panels[0].set_yticks(range(len(groups)), groups)
    panels[0].invert_yaxis()
    drawn.supxlabel("score with the parent or teacher (dotted: where strangers lie)", size=11)
    middle = {group: [np.median([row[c] for row in rows if row[0] == group]) for c in (2, 3)] for group in groups}
    parts = [f"{group} {tokens:.2f} and {cka:.2f}" for group, (tokens, cka) in middle.items()]
    describe(
        drawn,
        f"Two strip plots: the share of equal next tokens, and CKA of hidden states. Medians: {'; '.join(parts)}. "
        "Dotted lines: the lowest and the highest stranger.",
    )
    return drawn, columns(("group", "model", *methods), rows)


# --- where experts come from ------------------------------------------------------------------------------


@figure()
def attribution_map(suspect: str = SUSPECTS[0]) -> Drawing:
    """Which neurons of a parent are found in which expert of a mixture; below it the same for a stranger to both.

    A neuron of the parent is drawn where it is nearest to one of the expert by gate, by up and by down. At the right
    the share of the experts' neurons that did not come from there, estimated by recapture.

    Args:
        suspect: one of `SUSPECTS`.

    Data: parent, layer and expert of the suspect, parent_layer, agreeing, neurons, and drop_rate, of the expert.

    Raises:
        ValueError: `suspect` is another one.
    """
    if suspect not in SUSPECTS:
        raise ValueError(f"suspect={suspect!r}: wanted one of {', '.join(SUSPECTS)}")
    drawn, rows, parts = new_figure(5.4), [], []
    for axes, parent in zip(drawn.subplots(2, 1, sharex=True), (PARENT, CONTROL), strict=True):
        partners, rates = _traced(parent, suspect)
        rows += _counts(parent, partners, rates)
        _draw_partners(axes, partners, rates)
        axes.set_title(f"{suspect}, traced to {parent}")
        kept = np.mean([(found >= 0).any(0).mean() for found in partners.values()])
        parts.append(f"{parent}: {kept:.0%} of the neurons found in one layer or another, drop rate {_mean(rates):.2f}")
    drawn.axes[-1].set_xlabel("neuron of the parent, layer after layer")
    drawn.supylabel("experts of the suspect", size=11)
    describe(
        drawn,
        f"Two maps of the experts of {suspect} (rows) to the neurons of a parent (columns), marks where a neuron is "
        f"found again. {'; '.join(parts)}.",
    )
    return drawn, columns(("parent", "layer", "expert", "parent_layer", "agreeing", "neurons", "drop_rate"), rows)


Place = tuple[int, str]  # layer and expert


@cache
def _traced(parent: str, suspect: str) -> tuple[dict[Place, np.ndarray], dict[Place, float]]:
    """Of each expert, what its neurons are in each layer of a dense parent [L, I], -1 for none; and its drop rate."""
    a, b = zoo_weights(parent), zoo_weights(suspect)
    tokens = shared_tokens(a, b)
    sources, experts = (dict(_features(weights, tokens)) for weights in (a, b))
    partners = {
        place: np.stack([found_again(similarities(expert, source)).numpy() for source in sources.values()])
        for place, expert in experts.items()
    }
    return partners, {(found.layer, found.expert): found.drop_rate for found in attribute_experts(a, b)}


def _features(weights: Weights, tokens: list[str]) -> Iterator[tuple[Place, Tensor]]:
    anchors = read_anchors(weights, tokens)
    for layer in range(weights.num_layers):
        for name, neurons in mlps(weights, layer).items():
            yield (layer, name), token_features(neurons, anchors)


def found_again(table: Tensor) -> Tensor:
    """The column of [3, I, I'] that is the largest of a row in all three tables, or -1: [I].

    Assignments, as `attribute_experts` makes them to the most likely layer, would take seconds for all layers.
    """
    gate, up, down = table.argmax(-1)
    return gate.where((gate == up) & (up == down), -1)


def _counts(parent: str, partners: dict[Place, np.ndarray], rates: dict[Place, float]) -> Iterator[tuple]:
    for (layer, expert), found in partners.items():
        for parent_layer, of_layer in enumerate(found):
            agreeing = int((of_layer >= 0).sum())
            yield parent, layer, expert, parent_layer, agreeing, len(of_layer), rates[layer, expert]


def _draw_partners(axes: Axes, partners: dict[Place, np.ndarray], rates: dict[Place, float]) -> None:
    """One row an expert, a mark at each neuron of the parent that it has; layers of both are parted by lines."""
    width = zoo_weights(PARENT).config.intermediate_size
    for row, found in enumerate(partners.values()):
        layers, neurons = np.nonzero(found >= 0)
        axes.vlines(layers * width + found[layers, neurons], row - 0.45, row + 0.45, color=MAIN, linewidth=0.5)
    layers = sorted({layer for layer, _ in partners})
    each = len(partners) // len(layers)
    for layer in layers:
        rate = _mean({place: rates[place] for place in partners if place[0] == layer})
        axes.text(width * len(layers) * 1.02, (layer + 0.5) * each - 0.5, f"{rate:.2f}", va="center")
    axes.text(width * len(layers) * 1.02, -0.5, "new", va="bottom", color=QUIET, fontsize=10)
    for line in layers[1:]:
        axes.axhline(line * each - 0.5, color=QUIET, linewidth=0.8)
        axes.axvline(line * width - 0.5, color=QUIET, linewidth=0.8)
    axes.set(xlim=(-0.5, width * len(layers) - 0.5), ylim=(len(partners) - 0.5, -0.5))
    axes.set_xticks([(layer + 0.5) * width for layer in layers], [f"layer {layer}" for layer in layers])
    axes.set_yticks([(layer + 0.5) * each - 0.5 for layer in layers], [f"layer {layer}" for layer in layers])
    axes.tick_params(length=0)


def _mean(rates: dict[Place, float]) -> float:
    return sum(rates.values()) / len(rates)
