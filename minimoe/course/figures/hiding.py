"""Rewrites that no output shows and fingerprints do, and a stranger that takes on the profile of another model.

Both figures rewrite a model when they are drawn, in float64, where rounding is far below anything else.
"""

from functools import cache, partial
from inspect import signature

import numpy as np
import torch
from scipy.stats import zscore

from minimoe.course.figures.drawing import new_panels, note
from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.style import EXPERT_COLOURS, INK, MAIN, PALE, QUIET, SERIES
from minimoe.fingerprints.compare import METHODS, background_of_the_zoo
from minimoe.fingerprints.report import title_of
from minimoe.fingerprints.std_profile import ATTENTION, read_std_profile, std_profile
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.frame import frame_std_profile
from minimoe.lineage.gauge import GAUGES, fold_norms, obstacle
from minimoe.lineage.zoo import Zoo
from minimoe.model import MoEForCausalLM
from minimoe.model.config import require
from minimoe.training.tokenizer import VOCAB_SIZE

# Fast enough to be redrawn while somebody waits: first those that read coordinates, then those that see through them.
COORDINATES = ("std_profile", "norm_profile", "weight_cosine", "aligned_cka_plain", "csu")
FUNCTIONS = ("aligned_cka", "spectral", "virtual_response")
SUBJECTS = ("alder", "alder-drop-0.5-trained", "alder-copy-pangu")  # a gauge is shown on the first that it applies to
FILLED = EXPERT_COLOURS[0]  # light enough for a black mark on it
NOT_MOVED = 1e-9  # of a logit: what float64 rounds away stays far below
_LOOKS = (
    {"color": QUIET, "linestyle": ":", "marker": "x"},
    SERIES[0] | {"markersize": 11, "markerfacecolor": "white"},  # to be seen below a curve that equals it
    SERIES[1],
)


@cache
def load_double(name: str) -> MoEForCausalLM:
    """A member of the zoo in float64."""
    return Zoo().load(name).double()


_alder, _stranger = partial(load_double, "alder"), partial(load_double, "stranger-13")


@torch.no_grad()
def largest_difference(a: MoEForCausalLM, b: MoEForCausalLM) -> float:
    """How far any logit of two models is apart, over 8 texts of 64 random tokens."""
    ids = torch.randint(VOCAB_SIZE, (8, 64), generator=torch.Generator().manual_seed(0))
    return float((a(ids).logits - b(ids).logits).abs().max())


def rewrite(model: MoEForCausalLM, gauge: str, amount: float = 1.0, *, seed: int = 3) -> MoEForCausalLM:
    """A copy of a model after a gauge that applies to it, one of `GAUGES`, by an amount where the gauge has degrees;
    `rotate_residual` finds the norms folded."""
    if gauge == "rotate_residual":
        model = fold_norms(model)
    degrees = {"amount": amount} if has_degrees(gauge) else {}
    return GAUGES[gauge](model, seed=seed, **degrees)


def has_degrees(gauge: str) -> bool:
    """Whether a gauge can be applied a little."""
    return "amount" in signature(GAUGES[gauge]).parameters


@figure()
def gauge_bench(
    gauge: str = "rotate_residual",
    amount: float = 1.0,
    *,
    model: MoEForCausalLM | None = None,
    name: str = "your model",
) -> Drawing:
    """The largest difference that a rewrite makes to a logit, and what it leaves of each method's score.

    The model is in float64, with our tokenizer; None: alder, or for gauges of mixtures one upcycled from it.
    Data: method, score (empty where the method refuses), highest_stranger (of the zoo's for calibration); the last row
    is the largest difference of a logit.
    Raises ValueError where there is no such gauge, or `amount` is below 0.
    """
    if model is None:
        name = next(name for name in SUBJECTS if obstacle(gauge, load_double(name).config) is None)
        model = load_double(name)
    rewritten = rewrite(model, gauge, amount)
    before, after = (open_weights(one) for one in (model, rewritten))
    found = {method: METHODS[method](before, after).score for method in COORDINATES + FUNCTIONS}
    background = background_of_the_zoo(before, after).scores
    strangers = [max(background[method]) for method in found]
    moved, other = largest_difference(model, rewritten), largest_difference(_alder(), _stranger())

    how = f", amount {amount:g}" if has_degrees(gauge) else " (all or nothing)"
    drawn, (readout, bars) = new_panels(4.8, 2, height_ratios=[1, 9], title=f"{name} after {gauge}{how}")
    readout.set(xscale="log", xlim=(3e-17, 1e3), ylim=(0, 1), yticks=[])
    readout.set_title("largest change of a logit; shaded: rounding")
    readout.spines["left"].set_visible(False)
    readout.axvspan(3e-17, NOT_MOVED, color=PALE)
    readout.axvline(other, color=INK, linestyle="--", linewidth=1.2)
    note(readout, "a stranger", (other, 0.5), -5)
    readout.plot(max(moved, 1e-16), 0.5, "D", color=MAIN, markersize=9, markeredgecolor=INK)

    places = np.arange(len(found)) + 0.5 * (np.arange(len(found)) >= len(COORDINATES))
    outlines = bars.barh(places, 1, color="white", edgecolor=QUIET, linewidth=1)
    labels = ["refuses" if score is None else f"{score:.2f}" for score in found.values()]
    bars.bar_label(outlines, labels, padding=5)
    bars.barh(places, [max(score or 0, 0) for score in found.values()], color=FILLED, edgecolor=INK, linewidth=0.5)
    bars.vlines(strangers, places - 0.45, places + 0.45, color=INK, linewidth=3)
    bars.annotate("highest stranger", (strangers[0], -0.5), ha="right", va="bottom", annotation_clip=False)
    bars.set_title("score with the original: outline before, filled after", pad=18)
    bars.set(xlim=(0, 1.13), xticks=[0, 0.25, 0.5, 0.75, 1])
    bars.set_yticks(places, [title_of(method) for method in found])
    bars.tick_params(axis="y", length=0)
    bars.invert_yaxis()

    low = [f"{method} {score:.2f}" for method, score in found.items() if score is not None and score < 0.995]
    refused = [method for method, score in found.items() if score is None]
    alt = f"""A scale and eight bars for {name} rewritten by {gauge}{how}.
        {"No logit" if moved < NOT_MOVED else "A logit"} moves by more than a billionth. Scores of the model with its
        copy, where 1 is before: {", ".join(low) or "none"} below 1; {", ".join(refused) or "none"} refused; the others
        1."""
    rows = [*zip(found, found.values(), strangers, strict=True), ("largest change of a logit", moved, None)]
    return drawn, columns(("method", "score", "highest_stranger"), rows), alt


@figure(stranger=_stranger, imitated=_alder)
def frame_bench(
    stranger: MoEForCausalLM,
    imitated: MoEForCausalLM,
    degree: float = 1.0,
    *,
    names: tuple[str, str] = ("stranger-13", "alder"),
) -> Drawing:
    """A stranger on the way to another model's std profile: its own at degree 0, the other's at 1; no logit moves.

    Models are in float64; `names` are theirs. Data: role, layer, and the standard deviation there as a z-score over
    the layers: of the stranger, of the other, and of the stranger framed. The last row is the std profile's score of
    stranger and framed stranger with the other.
    Raises ValueError where `degree` is not between 0 and 1.
    """
    require(0 <= degree <= 1, "degree", degree, "0 to 1")
    own, goal = open_weights(stranger), open_weights(imitated)
    start, end = read_std_profile(own), read_std_profile(goal)
    framed = frame_std_profile(stranger, {role: start[role] ** (1 - degree) * end[role] ** degree for role in start})
    after = open_weights(framed)
    moved = largest_difference(stranger, framed)
    before, now = (std_profile(weights, goal).score for weights in (own, after))
    profiles = dict(zip((*names, "framed"), (start, end, read_std_profile(after)), strict=True))

    title = f"std profile of {names[0]} with {names[1]}: r = {before:.2f} as it is, {now:.2f} framed"
    drawn, panels = new_panels(3.4, 1, 4, sharey=True, title=title)
    rows = []
    for axes, role in zip(panels, ATTENTION, strict=True):
        curves = [zscore(profile[role]) for profile in profiles.values()]
        for label, curve, look in zip(profiles, curves, _LOOKS, strict=True):
            axes.plot(curve, **look, label=label)
        axes.set(xticks=range(len(curves[0])), ylim=(-2, 2), xlabel="layer", xmargin=0.12)
        axes.set_title(role.upper(), loc="center")
        rows += [(role, layer, *values) for layer, values in enumerate(zip(*curves, strict=True))]
    panels[0].set_ylabel("spread, z-score over layers")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    alt = f"""Four panels, Q, K, V and O, of the spread of the weights over the layers for {names[0]}, {names[1]} and
        the framed stranger at degree {degree:g}. The mean correlation with {names[1]} is {before:.2f} before and
        {now:.2f} framed; {"no" if moved < NOT_MOVED else "a"} logit moves by more than a billionth."""
    return drawn, columns(("role", "layer", *profiles), [*rows, ("score", "", before, "", now)]), alt
