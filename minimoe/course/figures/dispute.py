"""What a correlation of 0.927 is worth: the dispute of 2025 as a case, one number beside several backgrounds.

Nothing here measures the two models of the dispute. Scores come from the zoo, from data/published, or from a model of
chance whose assumptions are stated where it is made.
"""

from __future__ import annotations

import textwrap
from functools import cache

import numpy as np

from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.published import CLAIMED, read_published
from minimoe.course.style import INK, MAIN, PALE, QUIET, SERIES, describe, new_figure
from minimoe.data_files import data_path
from minimoe.fingerprints.norm_profile import read_norms
from minimoe.fingerprints.rates import interval
from minimoe.fingerprints.weights import open_weights
from minimoe.fingerprints.zoo_scores import Rows, is_rewritten, scores

NEAR = 0.025  # a score is "about" the claimed one when it is no further from it
READINGS = {
    f"at least {CLAIMED}": lambda found: found >= CLAIMED,
    f"about {CLAIMED}": lambda found: abs(found - CLAIMED) <= NEAR,
}
_AT_LEAST = next(iter(READINGS))
CHANCE = ("independent", "wandering", "shared trend")
TRENDS = (0.9, 0.93)  # a little below the claimed value, and a little above it
METHODS = (
    "std_profile",
    "norm_profile",
    "weight_cosine",
    "aligned_cka",
    "spectral",
    "virtual_response_whitened",
    "csu",
    "match",
    "expert_attribution",
    "token_agreement",
)
_ZOO = ("alder", "birch", "stranger-01", "stranger-13")  # four roots of one shape, all shipped

Range = tuple[float, float, float]  # lower end, estimate, upper end


# --- who said what ----------------------------------------------------------------------------------------


@figure()
def dispute_timeline() -> Drawing:
    """What was published, claimed, answered and measured, in order of time.

    Data: date, side ("claim", "answer" or "other"), party, title.
    """
    rows = [row for row in read_published("dispute") if row["date"][0].isdigit()]
    sides = [next((side for side in ("claim", "answer") if row["kind"].startswith(side)), "other") for row in rows]
    drawn = new_figure(0.42 * len(rows) + 0.6)
    axes = drawn.subplots()
    lanes = dict(zip(("claim", "answer", "other"), SERIES, strict=False))
    for place, (side, style) in enumerate(lanes.items()):
        axes.axvline(place, color=QUIET, linewidth=0.8, zorder=0)
        heights = [height for height, of in enumerate(sides) if of == side]
        axes.plot([place] * len(heights), heights, color=style["color"], marker=style["marker"], ms=9, linestyle="")
    for height, row in enumerate(rows):
        axes.text(-0.5, height, row["date"], ha="right", va="center", color=QUIET)
        axes.text(2.5, height, textwrap.fill(f"{row['party']}: {row['title']}", 46), va="center")
    axes.set(xlim=(-2.3, 9), ylim=(len(rows) - 0.4, -0.6), yticks=[])
    axes.set_xticks(range(len(lanes)), lanes, rotation=25)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    said = "; ".join(
        f"{row['date']}, {side}, {row['party']}: {row['title']}" for row, side in zip(rows, sides, strict=True)
    )
    describe(drawn, f"A timeline with three lanes, claim, answer and other. {said}.")
    return drawn, {
        "date": [row["date"] for row in rows],
        "side": sides,
        "party": [row["party"] for row in rows],
        "title": [row["title"] for row in rows],
    }


# --- chance -----------------------------------------------------------------------------------------------


def chance(kind: str, layers: int, *, draws: int = 4000, trend: float = 0.9, seed: int = 0) -> np.ndarray:
    """Scores of the std profile that two models have by chance, [draws], under one of three assumptions.

    Args:
        kind: "independent": every layer of each of the four curves is drawn for itself. "wandering": each layer is the
            one before plus a step, and the four curves of a model are one. "shared trend": both models rise evenly with
            depth, which is the share `trend` of the variance; the rest is drawn for each layer and curve.
        layers: of both models.

    Raises:
        ValueError: there is no such kind.
    """
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((2, draws, 1 if kind == "wandering" else 4, layers))
    if kind == "wandering":
        curves = noise.cumsum(-1)
    elif kind == "shared trend":
        line = np.linspace(-1, 1, layers)
        curves = np.sqrt(trend) * line / line.std() + np.sqrt(1 - trend) * noise
    elif kind == "independent":
        curves = noise
    else:
        raise ValueError(f"kind={kind!r}: wanted one of {', '.join(CHANCE)}")
    z = (curves - curves.mean(-1, keepdims=True)) / curves.std(-1, keepdims=True)
    return (z[0] * z[1]).mean((-1, -2))


@figure()
def chance_by_depth(trend: float = 0.9) -> Drawing:
    """What two models without a common weight score by chance, under three assumptions, from 4 to 48 layers.

    Data: assumption, layers, low, median, high (95 % of the draws lie between low and high), at_least (their share at
    the claimed value or above).
    """
    drawn = new_figure(3.6)
    panels = drawn.subplots(1, len(CHANCE), sharey=True)
    data: dict[str, list] = {name: [] for name in ("assumption", "layers", "low", "median", "high", "at_least")}
    depths = (4, 8, 16, 32, 48)
    parts = []
    for axes, kind, style in zip(panels, CHANCE, SERIES, strict=False):
        found = [chance(kind, layers, trend=trend) for layers in depths]
        low, median, high = np.quantile(found, (0.025, 0.5, 0.975), axis=1)
        axes.fill_between(range(len(depths)), low, high, color=style["color"], alpha=0.25, linewidth=0)
        axes.plot(median, **style)
        axes.axhline(CLAIMED, color=INK, linestyle="--", linewidth=1)
        axes.set_xticks(range(len(depths)), depths)
        axes.set_xlabel("layers")
        axes.set_title(kind, weight="normal")
        share = [float(np.mean(one >= CLAIMED)) for one in found]
        for row in zip([kind] * len(depths), depths, low.tolist(), median.tolist(), high.tolist(), share, strict=True):
            for column, cell in zip(data.values(), row, strict=True):
                column.append(cell)
        parts.append(f"{kind}: median {median[-1]:.2f}, {share[-1]:.1%} at {CLAIMED} or above")
    panels[0].set(ylim=(-1, 1.03), ylabel="score by chance")
    describe(
        drawn,
        f"Three plots of the score by chance over 4 to 48 layers, band and median, with a dashed line at {CLAIMED}. At "
        f"48 layers, {'; '.join(parts)}.",
    )
    return drawn, data


# --- what the number is worth -----------------------------------------------------------------------------


@cache
def relatives() -> np.ndarray:
    """Scores of the std profile among relatives of the zoo of which neither was rewritten."""
    return _scores_of([row for row in scores() if row["use"] == "positive" and not is_rewritten(row)])


@cache
def backgrounds() -> dict[str, np.ndarray]:
    """Scores of pairs without common weights, by where they come from."""
    strangers = [row for row in scores() if row["relation"] == "strangers"]
    deep = [row for row in strangers if all(row[side].startswith("deep-") for side in "ab")]
    others = ("different makers", "same maker, separate runs", "not stated")
    published = [
        float(row["score"])
        for row in read_published("profile_correlations")
        if row["statistic"] == "std profile" and row["truth"] in others
    ]
    return {
        "zoo of 4 layers": _scores_of([row for row in strangers if row["kind"] == "roots"]),
        "zoo of 8 layers": _scores_of(deep),
        "published pairs": np.array(published),
        "chance at 48: independent": chance("independent", 48),
        "chance at 48: wandering": chance("wandering", 48),
        **{f"chance at 48: trend {trend:.0%}": chance("shared trend", 48, trend=trend) for trend in TRENDS},
    }


def _scores_of(rows: Rows) -> np.ndarray:
    return np.array(_known(rows, "std_profile"))


def likelihood_ratio(background: str, reading: str = _AT_LEAST) -> Range:
    """How much commoner the claimed value is among relatives of the zoo than in a background.

    Args:
        background: a key of `backgrounds()`.
        reading: a key of `READINGS`: what counts as the claimed value.

    Returns:
        lowest, estimate, highest; the ends come from the two exact 95 % intervals, which take pairs to be independent.
        Infinite, where the background has no such pair.

    Raises:
        ValueError: there is no such background or reading.
    """
    if background not in backgrounds():
        raise ValueError(f"background={background!r}: wanted one of {', '.join(backgrounds())}")
    if reading not in READINGS:
        raise ValueError(f"reading={reading!r}: wanted one of {', '.join(READINGS)}")
    (low, share, high), (least, usual, most) = (
        _share(READINGS[reading](found)) for found in (relatives(), backgrounds()[background])
    )
    return low / most, share / usual if usual else np.inf, high / least if least else np.inf


def _share(hits: np.ndarray) -> Range:
    low, high = interval(int(hits.sum()), len(hits))
    return low, float(hits.mean()), high


def posterior(prior: float, ratio: float) -> float:
    """The probability after evidence with this likelihood ratio, from the one before."""
    odds = prior / (1 - prior) * ratio
    return 1 - 1 / (1 + odds)


@figure()
def worth_of_the_number() -> Drawing:
    """Scores of the std profile among relatives and in each background, beside the claimed value.

    Data: group, pairs, low, median, high (95 % of the scores lie between low and high), at_least, about (pairs).
    """
    groups = {"relatives in the zoo": relatives(), **backgrounds()}
    drawn = new_figure(0.46 * len(groups) + 0.9)
    axes = drawn.subplots()
    data: dict[str, list] = {name: [] for name in ("group", "pairs", "low", "median", "high", "at_least", "about")}
    for height, (group, found) in enumerate(groups.items()):
        low, median, high = np.quantile(found, (0.025, 0.5, 0.975)).tolist()
        colour = MAIN if height == 0 else QUIET if group.startswith("chance") else SERIES[1]["color"]
        axes.plot([low, high], [height, height], color=colour, linewidth=2)
        if len(found) < 20:
            axes.plot(found, [height] * len(found), "|", color=colour, ms=11)
        axes.plot(median, height, marker="s" if height == 0 else "o", color=colour, ms=7, linestyle="")
        hits = [int(reading(found).sum()) for reading in READINGS.values()]
        axes.text(1.06, height, f"{hits[0]:,} of {len(found):,}", va="center", color=INK)
        for column, cell in zip(data.values(), (group, len(found), low, median, high, *hits), strict=True):
            column.append(cell)
    axes.axvline(CLAIMED, color=INK, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(groups)), groups)
    axes.set(xlim=(-0.9, 1.02), ylim=(len(groups) - 0.5, -0.6), xlabel="score: median and 95 % of the pairs")
    axes.set_title(f"How many pairs reach {CLAIMED}", loc="left")
    counts = ", ".join(
        f"{group} {hits} of {pairs}"
        for group, hits, pairs in zip(data["group"], data["at_least"], data["pairs"], strict=True)
    )
    describe(
        drawn, f"Ranges of the std profile's score in {len(groups)} groups of pairs. At {CLAIMED} or above: {counts}."
    )
    return drawn, data


@figure()
def belief(prior: float = 0.5, background: str = "zoo of 4 layers", reading: str = _AT_LEAST) -> Drawing:
    """What a belief that two models share weights becomes by the claimed value, one row for each background.

    Args:
        prior: the belief before, as a probability.
        background: the row to stress, a key of `backgrounds()`.
        reading: a key of `READINGS`: what counts as the claimed value.

    Data: background, prior, low, belief, high: the range comes from that of the likelihood ratio. Where no pair of the
    background has the value, belief is empty: few pairs that lack it are no estimate.

    Raises:
        ValueError: `prior` is not between 0 and 1, or there is no such background or reading.
    """
    if not 0 < prior < 1:
        raise ValueError(f"prior={prior}: wanted a probability between 0 and 1, without the ends")
    likelihood_ratio(background, reading)  # refuses what is unknown
    names = list(backgrounds())
    ranges = [[posterior(prior, ratio) for ratio in likelihood_ratio(name, reading)] for name in names]
    drawn = new_figure(0.42 * len(names) + 1.2)
    axes = drawn.subplots()
    for height, (name, (low, middle, high)) in enumerate(zip(names, ranges, strict=True)):
        stressed = name == background
        look = {"color": MAIN, "linewidth": 9} if stressed else {"color": PALE, "linewidth": 6}
        axes.plot([low, high], [height] * 2, solid_capstyle="butt", **look)
        if middle < 1:
            axes.plot(middle, height, "o", color=INK, ms=7 if stressed else 5)
        axes.text(1.03, height, in_words(low, high), va="center", weight="bold" if stressed else "normal")
    axes.axvline(prior, color=QUIET, linestyle=":", linewidth=1.5)
    axes.text(prior + 0.01, -0.6, "before", color=QUIET, va="center")
    axes.set_title(f"The score is {reading}")
    axes.set_yticks(range(len(names)), names)
    axes.get_yticklabels()[names.index(background)].set_weight("bold")
    axes.set_xticks(np.linspace(0, 1, 5), [f"{share:.0%}" for share in np.linspace(0, 1, 5)])
    axes.set(
        xlim=(-0.01, 1.01), ylim=(len(names) - 0.5, -0.7), xlabel="belief after the number, if this background holds"
    )
    described = "; ".join(f"{name} {in_words(low, high)}" for name, (low, _, high) in zip(names, ranges, strict=True))
    describe(drawn, f"From a belief of {prior:.0%}, a score of {reading} leads to these ranges of belief: {described}.")
    low, middle, high = map(list, zip(*ranges, strict=True))
    middle = [belief if belief < 1 else "" for belief in middle]
    return drawn, {"background": names, "prior": [prior] * len(names), "low": low, "belief": middle, "high": high}


def in_words(low: float, high: float) -> str:
    """A range of belief; its ends are rounded to per cent, never to certainty."""
    ends = [f"{min(max(end, 0.01), 0.99):.0%}" for end in (low, high)]
    if low > 0.99:
        return "over 99%"
    return f"{ends[0]} to {ends[1]}" if high <= 0.99 else f"over {ends[0]}"


# --- what other measurements would show -------------------------------------------------------------------


def situations() -> dict[str, Rows]:
    """Pairs of the zoo by what is true of their weights, a mixture and a dense model unless there is no such pair."""
    rows = scores()
    trained = [row for row in rows if row["use"] == "positive"]
    return {
        "reused, then trained": [row for row in trained if row["kind"].endswith("-trained")],
        "reused, trained, rewritten": [row for row in trained if row["kind"].endswith("-trained-gauged")],
        "independent": [
            row
            for row in rows
            if row["use"] in ("calibration", "evaluation") and row["shapes"] == "dense, mixture, equal depths"
        ],
        "same first weights only": [row for row in rows if row["use"] == "twins"],
        "taught by the other": [row for row in rows if row["use"] == "student"],
    }


@figure()
def if_measured() -> Drawing:
    """What each method finds where attention was reused, where nothing is shared, and in between: median and range.

    Data: method, situation, pairs (with a score), low, median, high. Where a method refuses all pairs, no row.
    """
    drawn = new_figure(0.45 * len(METHODS) + 1.3)
    axes = drawn.subplots()
    data: dict[str, list] = {name: [] for name in ("method", "situation", "pairs", "low", "median", "high")}
    for place, (situation, rows) in enumerate(situations().items()):
        style = SERIES[place]
        for line, method in enumerate(METHODS):
            found = _known(rows, method)
            if not found:
                continue
            height = line + 0.15 * (place - 2)
            low, median, high = min(found), float(np.median(found)), max(found)
            axes.plot([low, high], [height] * 2, color=style["color"], linewidth=1.5)
            axes.plot(
                median,
                height,
                color=style["color"],
                marker=style["marker"],
                linestyle="",
                ms=4.5,
                label=situation if line == 0 else None,
            )
            for column, cell in zip(data.values(), (method, situation, len(found), low, median, high), strict=True):
                column.append(cell)
    for line in range(len(METHODS) - 1):
        axes.axhline(line + 0.5, color=PALE, linewidth=0.8)
    axes.set_yticks(range(len(METHODS)), [method.replace("_", " ") for method in METHODS])
    axes.set(ylim=(len(METHODS) - 0.5, -0.5), xlim=(-0.65, 1.03), xlabel="score in the zoo: median, lowest and highest")
    drawn.legend(loc="outside lower center", ncols=2, frameon=False)
    describe(
        drawn,
        f"Ranges of {len(METHODS)} methods in five situations. Reused and trained lies wholly above independent for "
        f"{', '.join(separating('reused, then trained'))}; after a rewrite for "
        f"{', '.join(separating('reused, trained, rewritten'))}.",
    )
    return drawn, data


def separating(situation: str) -> list[str]:
    """The methods whose lowest score in a situation, a key of `situations()`, is above every independent pair."""
    found, usual = (situations()[name] for name in (situation, "independent"))
    return [method for method in METHODS if min(_known(found, method), default=-1) > max(_known(usual, method))]


def _known(rows: Rows, method: str) -> list[float]:
    return [row[method] for row in rows if row[method] is not None]


# --- the lesson of another dispute ------------------------------------------------------------------------


def norm_similarities(a: str, b: str) -> dict[str, float]:
    """Mean cosine and Pearson of the norms of two members of the zoo: of the same layer, and of other layers."""
    first, second = (read_norms(open_weights(data_path("zoo") / name))["layers"] for name in (a, b))
    same = np.eye(len(first), dtype=bool)
    found = {}
    for label, taken_off in (("cosine", 0), ("Pearson", 1)):
        x, y = (norms - taken_off * norms.mean(-1, keepdims=True) for norms in (first, second))
        x, y = (norms / np.linalg.norm(norms, axis=-1, keepdims=True) for norms in (x, y))
        table = np.einsum("irh,jrh->ij", x, y) / x.shape[1]
        found[f"{label}, same layer"] = float(table[same].mean())
        found[f"{label}, other layers"] = float(table[~same].mean())
    return found


@figure()
def norms_of_strangers() -> Drawing:
    """Cosine and Pearson of norm weights: strangers and a fine-tuned model of the zoo, and a published pair.

    Data: pair, statistic, value.
    """
    pairs = [(a, b) for place, a in enumerate(_ZOO) for b in _ZOO[place + 1 :]]
    rows = [(f"{a} and {b}", *item) for a, b in pairs for item in norm_similarities(a, b).items()]
    rows += [("fine-tuned", *item) for item in norm_similarities("alder", "alder-finetuned").items()]
    rows += [
        ("Solar and GLM", row["statistic"].replace(" of norm weights", ""), float(row["score"]))
        for row in read_published("profile_correlations")
        if row["a"].startswith("Solar")
    ]
    statistics = list(dict.fromkeys(statistic for _, statistic, _ in rows))
    drawn = new_figure(3.2)
    axes = drawn.subplots()
    looks = {
        "strangers in the zoo": {"marker": "o", "color": PALE, "markeredgecolor": INK, "ms": 7},
        "fine-tuned in the zoo": {"marker": "s", "color": MAIN, "ms": 7},
        "Solar and GLM, published": {"marker": "D", "color": SERIES[1]["color"], "ms": 7},
    }
    for offset, (label, look) in enumerate(looks.items()):
        shown = [row for row in rows if _group(row[0]) == label]
        heights = [statistics.index(statistic) + 0.2 * (offset - 1) for _, statistic, _ in shown]
        axes.plot([value for *_, value in shown], heights, linestyle="", label=label, **look)
    axes.set_yticks(range(len(statistics)), statistics)
    axes.set(ylim=(len(statistics) - 0.5, -0.5), xlim=(-0.15, 1.05), xlabel="similarity of norm weights")
    axes.axvline(0, color=QUIET, linewidth=0.8)
    drawn.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    means = {
        statistic: np.mean([value for pair, of, value in rows if of == statistic and "stranger" in _group(pair)])
        for statistic in statistics
    }
    described = ", ".join(f"{statistic} {mean:.2f}" for statistic, mean in means.items())
    describe(
        drawn, f"Similarity of norm weights by four statistics. Means of {len(pairs)} pairs of strangers: {described}."
    )
    return drawn, columns(("pair", "statistic", "value"), rows)


def _group(pair: str) -> str:
    """Which of the three groups of `norms_of_strangers` a pair belongs to."""
    return {"fine-tuned": "fine-tuned in the zoo", "Solar and GLM": "Solar and GLM, published"}.get(
        pair, "strangers in the zoo"
    )
