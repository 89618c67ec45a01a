"""What a correlation of 0.927 is worth: the dispute of 2025 as a case, one number beside several backgrounds.

Nothing here measures the two models of the dispute.
"""

import textwrap
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import combinations

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import binomtest

from minimoe.course.figures.benchmark_results import std_profile_groups
from minimoe.course.figures.drawing import label_rows, new_panels
from minimoe.course.figures.profile import mean_correlation
from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.published import CLAIMED, read_published
from minimoe.course.shipped import zoo_weights
from minimoe.course.style import INK, MAIN, PALE, QUIET, SERIES
from minimoe.fingerprints.norm_profile import read_norms
from minimoe.fingerprints.report import title_of
from minimoe.fingerprints.weights import Weights
from minimoe.fingerprints.zoo_scores import Rows, scores, scores_of, strangers_of
from minimoe.model.config import require

NEAR = 0.025  # a score is "about" the claimed one when it is no further from it
READINGS = {
    f"at least {CLAIMED}": lambda found: found >= CLAIMED,
    f"about {CLAIMED}": lambda found: abs(found - CLAIMED) <= NEAR,
}
_AT_LEAST = next(iter(READINGS))
NOT_DRAWN = ("press", "the method elsewhere")  # kinds of the record that the picture leaves out
CHANCE = ("independent", "wandering", "shared trend")
TRENDS = (0.9, 0.93)  # a little below the claimed value, and a little above it
METHODS = (
    *("std_profile", "norm_profile", "weight_cosine", "aligned_cka", "spectral", "virtual_response_whitened"),
    *("csu", "aligned_neurons", "best_part", "token_agreement"),
)
Range = tuple[float, float, float]  # lower end, estimate, upper end
Similarities = dict[str, dict[str, dict[str, float]]]  # group -> pair -> statistic -> value


@figure(record=partial(read_published, "dispute"))
def dispute_timeline(record: Sequence[Mapping[str, str]]) -> Drawing:
    """What was published, claimed, answered and measured, in order of time; without what has no date, and without the
    kinds in `NOT_DRAWN`.
    Data: date, side ("claim", "answer" or "other"), party, title."""
    lanes = dict(zip(("claim", "answer", "other"), SERIES, strict=False))
    rows = []
    for row in record:
        if row["date"][0].isdigit() and row["kind"] not in NOT_DRAWN:
            side = next((side for side in lanes if row["kind"].startswith(side)), "other")
            rows.append((row["date"], side, row["party"], row["title"]))
    drawn, (axes,) = new_panels(0.41 * len(rows) + 0.6)
    for height, (date, side, party, title) in enumerate(rows):
        place, colour = list(lanes).index(side), lanes[side]["color"]
        axes.text(-0.12, height, date, ha="right", va="center", color=QUIET)
        axes.plot(place, height, lanes[side]["marker"], color=colour, ms=9)
        text = textwrap.fill(f"{party}: {title}", 26 if side == "other" else 44)
        axes.text(place + 0.07, height, text, va="center", linespacing=1)
        axes.axhline(height + 0.5, color=PALE, linewidth=0.8, zorder=0)
    for place, (lane, style) in enumerate(lanes.items()):
        axes.text(place, -0.75, lane, color=style["color"], weight="bold", ha="left")
    axes.set(xlim=(-0.55, 2.95), ylim=(len(rows) - 0.4, -0.9), xticks=[], yticks=[], frame_on=False)
    said = "; ".join(f"{date}, {side}, {party}: {title}" for date, side, party, title in rows)
    alt = f"What was said, in three columns, claim, answer and other. {said}."
    return drawn, columns(("date", "side", "party", "title"), rows), alt


def chance(kind: str, layers: int, *, draws: int = 4000, trend: float = 0.9, seed: int = 0) -> np.ndarray:
    """Scores of the std profile that two models of as many layers have by chance, [draws], under one assumption.

    "independent": every layer of each of the four curves is drawn for itself. "wandering": each layer is the one before
    plus a step, and the four curves of a model are one. "shared trend": both models rise evenly with depth, which is
    the share `trend` of the variance; the rest is drawn for each layer and curve.
    Raises ValueError where there is no such kind.
    """
    require(kind in CHANCE, "kind", kind, f"one of {', '.join(CHANCE)}")
    curves = np.random.default_rng(seed).standard_normal((2, draws, 1 if kind == "wandering" else 4, layers))
    if kind == "wandering":
        curves = curves.cumsum(-1)
    elif kind == "shared trend":
        line = np.linspace(-1, 1, layers)
        curves = np.sqrt(trend) * line / line.std() + np.sqrt(1 - trend) * curves
    return mean_correlation(*curves)


@figure()
def chance_by_depth(trend: float = 0.9, depths: Sequence[int] = (4, 8, 16, 32, 48)) -> Drawing:
    """What two models without a common weight score by chance, under three assumptions, by depth.

    Data: assumption, layers, low, median, high (95 % of the draws lie between low and high), at_least (their share at
    the claimed value or above).
    """
    rows, parts = [], []
    xlabel = "layers (line: median; band: 95 % of the draws)"
    drawn, panels = new_panels(3.6, 1, len(CHANCE), sharey=True, xlabel=xlabel)
    for axes, kind, style in zip(panels, CHANCE, SERIES, strict=False):
        found = [chance(kind, layers, trend=trend) for layers in depths]
        low, median, high = np.quantile(found, (0.025, 0.5, 0.975), axis=1)
        axes.fill_between(range(len(depths)), low, high, color=style["color"], alpha=0.25, linewidth=0)
        axes.plot(median, **style)
        axes.axhline(CLAIMED, color=INK, linestyle="--", linewidth=1)
        axes.set(title=kind, xticks=range(len(depths)), xticklabels=depths)
        shares = np.mean(np.array(found) >= CLAIMED, axis=1)
        rows += [(kind, *row) for row in zip(depths, low, median, high, shares, strict=True)]
        parts.append(f"{kind}: median {median[-1]:.2f}, {shares[-1]:.1%} at {CLAIMED} or above")
    panels[0].set(ylim=(-1, 1.12), ylabel="score by chance")
    panels[0].annotate(f"claimed: {CLAIMED}", (len(depths) - 1, CLAIMED), va="bottom", ha="right")
    alt = f"""Three plots of the score by chance over {depths[0]} to {depths[-1]} layers, band and median, with a dashed
        line at {CLAIMED}. At {depths[-1]} layers, {"; ".join(parts)}."""
    return drawn, columns(("assumption", "layers", "low", "median", "high", "at_least"), rows), alt


@cache
def relatives() -> np.ndarray:
    """Scores of the std profile among relatives of the zoo of which neither was rewritten."""
    return np.array(std_profile_groups(scores())["relatives as they are"])


@cache
def backgrounds() -> dict[str, np.ndarray]:
    """Scores of pairs without common weights, by where they come from."""
    zoo = std_profile_groups(scores())
    others = ("different makers", "same maker, separate runs", "strangers")
    published = [row for row in read_published("profile_correlations") if row["statistic"] == "std profile"]
    return {
        "zoo of 4 layers": np.array(zoo["strangers of 4 layers"]),
        "zoo of 8 layers": np.array(zoo["strangers of 8 layers"]),
        "published pairs": np.array([float(row["score"]) for row in published if row["truth"].startswith(others)]),
        "chance at 48: independent": chance("independent", 48),
        "chance at 48: wandering": chance("wandering", 48),
        **{f"chance at 48: trend {trend:.0%}": chance("shared trend", 48, trend=trend) for trend in TRENDS},
    }


def likelihood_ratio(related: np.ndarray, background: np.ndarray, reading: str = _AT_LEAST) -> Range:
    """How much commoner the claimed value is among relatives than in a background of pairs with nothing in common.

    Returns lowest, estimate, highest; the ends come from the two exact 95 % intervals, which take pairs to be
    independent. Infinite, where the background has no such pair. The reading, a key of `READINGS`, says what counts as
    the claimed value. Raises ValueError where there is no such reading.
    """
    require(reading in READINGS, "reading", reading, f"one of {', '.join(READINGS)}")
    hits = [READINGS[reading](found) for found in (related, background)]
    share, usual = (float(found.mean()) for found in hits)
    (low, high), (least, most) = (binomtest(int(found.sum()), len(found)).proportion_ci() for found in hits)
    return low / most, share / usual if usual else np.inf, high / least if least else np.inf


def posterior(prior: float, ratio: float) -> float:
    """The probability after evidence with this likelihood ratio, from the one before."""
    odds = prior / (1 - prior) * ratio
    return 1 - 1 / (1 + odds)


@figure(related=relatives, backgrounds=backgrounds)
def worth_of_the_number(related: np.ndarray, backgrounds: Mapping[str, np.ndarray]) -> Drawing:
    """Scores of the std profile among relatives and in each background, beside the claimed value.
    Data: group, pairs, low, median, high (95 % of the scores lie between low and high), at_least, about (pairs)."""
    groups = {"relatives in the zoo": related, **backgrounds}
    rows = []
    drawn, (axes,) = new_panels(0.46 * len(groups) + 0.9, title=f"How many pairs reach {CLAIMED}")
    for height, (group, found) in enumerate(groups.items()):
        low, median, high = np.quantile(found, (0.025, 0.5, 0.975))
        colour = MAIN if height == 0 else QUIET if group.startswith("chance") else SERIES[1]["color"]
        axes.hlines(height, low, high, color=colour, linewidth=2)
        if len(found) < 20:
            axes.plot(found, [height] * len(found), "|", color=colour, ms=11)
        axes.plot(median, height, marker="s" if height == 0 else "o", color=colour, ms=7, linestyle="")
        hits = [reading(found).sum() for reading in READINGS.values()]
        axes.text(1.06, height, f"{hits[0]:,} of {len(found):,}", va="center")
        rows.append((group, len(found), low, median, high, *hits))
    axes.axvline(CLAIMED, color=INK, linestyle="--", linewidth=1)
    label_rows(axes, groups)
    axes.set(xlim=(-0.9, 1.02), xlabel="score: median and 95 % of the pairs")
    counts = ", ".join(f"{group} {hits} of {pairs}" for group, pairs, *_, hits, _ in rows)
    alt = f"Ranges of the std profile's score in {len(groups)} groups of pairs. At {CLAIMED} or above: {counts}."
    return drawn, columns(("group", "pairs", "low", "median", "high", "at_least", "about"), rows), alt


@figure(related=relatives, strangers=lambda: backgrounds()["zoo of 4 layers"])
def tail_and_height(related: np.ndarray, strangers: np.ndarray, score: float = CLAIMED) -> Drawing:
    """One score, two questions: how many pairs reach it (the tail), and how many have about it (the height).
    Data: group, reading, pairs, of. A bin is as wide as "about" means, and one of them is around the score."""
    edges = score + NEAR * np.arange(-17, 4, 2)  # the last bin but one is around the score
    groups = {"relatives": related, "strangers": strangers}
    drawn, panels = new_panels(5.0, 2, 2, sharex=True, sharey="row", xlabel="score of the std profile")
    rows = []
    for lower, reading in enumerate(READINGS):
        for axes, (group, found), style in zip(panels[2 * lower :], groups.items(), SERIES, strict=False):
            hits = found[READINGS[reading](found)]
            for some, begin, look in (
                (found, edges[:-1], {"color": "white", "edgecolor": QUIET}),
                (hits, edges[:-1] if lower else np.maximum(edges[:-1], score), {"color": style["color"]}),
            ):
                shares = np.histogram(some, edges)[0] / len(found)
                axes.bar(begin, shares, edges[1:] - begin, align="edge", **look)
            axes.axvline(score, color=INK, linestyle="--", linewidth=1.2)
            title = f"{group}, {reading}:\n{len(hits)} of {len(found)}, {len(hits) / len(found):.0%}"
            axes.set_title(title, color=style["color"], weight="bold")
            rows.append((group, reading, len(hits), len(found)))
    panels[0].set(ylim=(0, 0.9), ylabel="share of the pairs")
    panels[2].set(ylim=(0, 0.16), ylabel="share of the pairs")
    panels[2].annotate("higher", (edges[-2], 0.15), ha="right", va="center")
    told = "; ".join(f"{group}, {reading}, {hits} of {pairs}" for group, reading, hits, pairs in rows)
    alt = f"""Histograms of the std profile's scores among relatives and strangers, above with the tail from {score} on
        filled, below with the bin around {score} filled. {told}."""
    return drawn, columns(("group", "reading", "pairs", "of"), rows), alt


@figure(related=relatives, backgrounds=backgrounds)
def belief(
    prior: float = 0.5,
    background: str = "zoo of 4 layers",
    reading: str = _AT_LEAST,
    *,
    related: np.ndarray,
    backgrounds: Mapping[str, np.ndarray],
) -> Drawing:
    """What a belief that two models share weights becomes by the claimed value, one row for each background.

    `background` is the row to stress; the others are as for `likelihood_ratio`.
    Data: background, prior, low, belief, high: the range comes from that of the likelihood ratio. Where no pair of the
    background has the value, belief is empty: few pairs that lack it are no estimate.
    Raises ValueError where `prior` is not between 0 and 1, or there is no such background or reading.
    """
    require(0 < prior < 1, "prior", prior, "a probability between 0 and 1, without the ends")
    require(background in backgrounds, "background", background, f"one of {', '.join(backgrounds)}")
    rows = []
    drawn, (axes,) = new_panels(0.42 * len(backgrounds) + 1.2, title=f"The score is {reading}")
    for height, (name, found) in enumerate(backgrounds.items()):
        low, middle, high = (posterior(prior, ratio) for ratio in likelihood_ratio(related, found, reading))
        colour, width, size, weight = (MAIN, 9, 7, "bold") if name == background else (PALE, 6, 5, "normal")
        axes.plot([low, high], [height] * 2, solid_capstyle="butt", color=colour, linewidth=width)
        if middle < 1:
            axes.plot(middle, height, "o", color=INK, ms=size)
        axes.text(1.03, height, in_words(low, high), va="center", weight=weight)
        rows.append((name, prior, low, middle if middle < 1 else None, high))
    axes.axvline(prior, color=QUIET, linestyle=":", linewidth=1.5)
    axes.text(prior + 0.01, -0.6, "before", color=QUIET, va="center")
    label_rows(axes, backgrounds, 0.7)
    axes.get_yticklabels()[list(backgrounds).index(background)].set_weight("bold")
    axes.set_xticks(np.linspace(0, 1, 5), ["0%", "25%", "50%", "75%", "100%"])
    axes.set(xlim=(-0.01, 1.01), xlabel="belief after the number, if this background holds")
    described = "; ".join(f"{name} {in_words(low, high)}" for name, _, low, _, high in rows)
    alt = f"From a belief of {prior:.0%}, a score of {reading} leads to these ranges of belief: {described}."
    return drawn, columns(("background", "prior", "low", "belief", "high"), rows), alt


def in_words(low: float, high: float) -> str:
    """A range of belief; its ends are rounded to per cent, never to certainty."""
    ends = [f"{min(max(end, 0.01), 0.99):.0%}" for end in (low, high)]
    if low > 0.99:
        return "over 99%"
    return f"{ends[0]} to {ends[1]}" if high <= 0.99 else f"over {ends[0]}"


def situations() -> dict[str, Rows]:
    """Pairs of the zoo by what is true of their weights, a mixture and a dense model unless there is no such pair."""
    pairs = {use: [row for row in scores() if row["use"] == use] for use in ("positive", "twins", "student")}
    return {
        "reused, then trained": [row for row in pairs["positive"] if row["kind"].endswith("-trained")],
        "reused, trained, rewritten": [row for row in pairs["positive"] if row["kind"].endswith("-trained-gauged")],
        "independent": [row for row in strangers_of(scores()) if row["shapes"] == "dense, mixture, equal depths"],
        "same first weights only": pairs["twins"],
        "taught by the other": pairs["student"],
    }


@figure(situations=situations)
def if_measured(situations: Mapping[str, Rows], methods: Sequence[str] = METHODS) -> Drawing:
    """What each method finds where attention was reused, where nothing is shared, and in between: median and range.
    Data: method, situation, pairs (with a score), low, median, high. Where a method refuses all pairs, no row."""
    rows = []
    drawn, (axes,) = new_panels(0.45 * len(methods) + 1.3)
    for place, ((situation, pairs), style) in enumerate(zip(situations.items(), SERIES, strict=False)):
        found = {method: scores_of(pairs, method) for method in methods if scores_of(pairs, method)}
        heights = [methods.index(method) + 0.15 * (place - 2) for method in found]
        low, median, high = ([end(values) for values in found.values()] for end in (min, np.median, max))
        axes.hlines(heights, low, high, color=style["color"], linewidth=1.5)
        axes.plot(median, heights, style["marker"], color=style["color"], ms=4.5, label=situation)
        counts = map(len, found.values())
        rows += [(method, situation, *row) for method, *row in zip(found, counts, low, median, high, strict=True)]
    for line in range(len(methods) - 1):
        axes.axhline(line + 0.5, color=PALE, linewidth=0.8)
    label_rows(axes, [title_of(method) for method in methods])
    axes.set(xlim=(-0.65, 1.03), xlabel="score in the zoo: median, lowest and highest")
    drawn.legend(loc="outside lower center", ncols=2)
    above = {one: ", ".join(separating(situations, one, methods)) for one in situations if one != "independent"}
    described = "; ".join(f"{situation}, {found or 'none'}" for situation, found in above.items())
    alt = f"""Ranges of {len(methods)} methods in {len(situations)} situations. Every pair has more than all independent
        ones by these methods: {described}."""
    return drawn, columns(("method", "situation", "pairs", "low", "median", "high"), rows), alt


def separating(situations: Mapping[str, Rows], situation: str, methods: Sequence[str] = METHODS) -> list[str]:
    """The methods whose lowest score in a situation is above every pair of the situation "independent"."""
    pairs = situations[situation], situations.get("independent", [])
    scores = {method: [scores_of(rows, method) for rows in pairs] for method in methods}
    return [method for method, (found, usual) in scores.items() if found and usual and min(found) > max(usual)]


def norm_similarities(a: Weights, b: Weights) -> dict[str, float]:
    """Mean cosine and Pearson of the norms of two models: of the same layer, and of other layers."""
    first, second = (read_norms(weights)["layers"].swapaxes(0, 1) for weights in (a, b))  # [2, L, H]
    same = np.eye(first.shape[1], dtype=bool)
    found = {}
    for label, metric in (("cosine", "cosine"), ("Pearson", "correlation")):
        table = np.mean([1 - cdist(x, y, metric) for x, y in zip(first, second, strict=True)], axis=0)
        found |= {f"{label}, same layer": table[same].mean(), f"{label}, other layers": table[~same].mean()}
    return found


def shipped_similarities() -> Similarities:
    """Of strangers and of a fine-tuned model in the zoo, and of a published pair."""
    weights = {name: zoo_weights(name) for name in ("alder", "birch", "stranger-01", "stranger-13")}
    strangers = {f"{a} and {b}": norm_similarities(weights[a], weights[b]) for a, b in combinations(weights, 2)}
    tuned = norm_similarities(weights["alder"], zoo_weights("alder-finetuned"))
    published = [row for row in read_published("profile_correlations") if row["a"].startswith("Solar")]
    solar = {row["statistic"].replace(" of norm weights", ""): float(row["score"]) for row in published}
    return {
        "strangers in the zoo": strangers,
        "fine-tuned in the zoo": {"fine-tuned": tuned},
        "Solar and GLM, published": {"Solar and GLM": solar},
    }


@figure(similarities=shipped_similarities)
def norms_of_strangers(similarities: Similarities) -> Drawing:
    """Cosine and Pearson of norm weights, in up to three groups of pairs, of which the first are strangers."""
    rows = [(pair, *item) for pairs in similarities.values() for pair, found in pairs.items() for item in found.items()]
    statistics = list(dict.fromkeys(statistic for _, statistic, _ in rows))
    drawn, (axes,) = new_panels(3.2)
    for offset, ((label, pairs), style) in enumerate(zip(similarities.items(), SERIES, strict=False), -1):
        found = [item for of_pair in pairs.values() for item in of_pair.items()]
        heights = [statistics.index(statistic) + 0.2 * offset for statistic, _ in found]
        axes.plot([value for _, value in found], heights, label=label, **style | {"linestyle": "", "fillstyle": "none"})
    label_rows(axes, statistics)
    axes.set(xlim=(-0.15, 1.05), xlabel="similarity of norm weights")
    axes.axvline(0, color=QUIET, linewidth=0.8)
    drawn.legend(loc="outside lower center", ncols=3)
    strangers = next(iter(similarities.values())).values()
    means = ", ".join(f"{of} {np.mean([found[of] for found in strangers]):.2f}" for of in statistics)
    alt = f"""Similarity of norm weights by {len(statistics)} statistics. Means of {len(strangers)} pairs of strangers:
        {means}."""
    return drawn, columns(("pair", "statistic", "value"), rows), alt
