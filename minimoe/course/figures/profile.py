"""The std profile: what it reads, and why the profiles of strangers look alike.

A profile is the standard deviation of Q, K, V and O in every layer. Two are compared by Pearson's r over the layers,
mean of the four, as in `minimoe.fingerprints.std_profile`. Shapes: M models, L layers.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from scipy.stats import zscore

from minimoe.course.figures.drawing import new_panels
from minimoe.course.figures.register import Drawing, cell_columns, columns, figure
from minimoe.course.published import CLAIMED
from minimoe.course.runs import Table, read_run, where
from minimoe.course.shipped import zoo_weights
from minimoe.course.style import INK, MAIN, PALE, QUIET, SERIES
from minimoe.fingerprints.result import Features
from minimoe.fingerprints.std_profile import ATTENTION, LEAST_SPREAD, compare_std_profiles, read_std_profile
from minimoe.model.config import require

MODELS = 26  # as many as the zoo has roots of one shape: 325 pairs
BINS = np.linspace(-1, 1, 41)  # of a score
CLAIM_LINE = {"color": INK, "linestyle": "--", "linewidth": 1.2}
_LABELS = {"alder-continued-4": "a descendant of alder", "birch": "birch, a stranger"}
_TITLES = {
    "4 layers": "4 layers,\nbegun alike",
    "8 layers": "8 layers,\nbegun alike",
    "8 layers by depth": "8 layers,\nscaled by depth",
}


def mean_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The score of profiles [..., 4, L]: Pearson's r over the layers, mean of the four curves."""
    return (zscore(a, axis=-1) * zscore(b, axis=-1)).mean((-1, -2))


@figure(profiles=lambda: {name: read_std_profile(zoo_weights(name)) for name in ("alder", *_LABELS)})
def profile_curves(profiles: Mapping[str, Features], *, labels: Mapping[str, str] = _LABELS) -> Drawing:
    """The z-scored profiles of models of one depth, as `read_std_profile` gives them; in words, each beside the first.
    Data: role, model, layer, std and z, the standard deviation after z-scoring over the layers."""
    rows = []
    ylabel = "standard deviation, z-scored over the layers"
    drawn, panels = new_panels(4.6, 2, 2, sharex=True, sharey=True, ylabel=ylabel)
    for axes, role in zip(panels, ATTENTION, strict=True):
        for style, (name, profile) in zip(SERIES, profiles.items(), strict=False):
            z = zscore(profile[role])
            axes.plot(z, **style, label=labels.get(name, name))
            rows += [(role, name, *values) for values in zip(range(len(z)), profile[role], z, strict=True)]
        axes.set(title=role.upper(), xticks=range(len(z)), xlabel="layer" if axes in panels[2:] else "")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    first, *others = profiles
    scores = {name: compare_std_profiles(profiles[first], profiles[name]).score for name in others}
    described = ", ".join(f"{labels.get(name, name)} {score:.2f}" for name, score in scores.items())
    alt = f"""Four panels, Q, K, V and O, with the curves of {len(profiles)} models over {len(z)} layers. Mean
        correlation with {first}: {described}."""
    return drawn, columns(("role", "model", "layer", "std", "z"), rows), alt


@figure(trainings=lambda: {name: read_run(f"profiles/{name.replace(' ', '-')}", "std") for name in _TITLES})
def strangers_over_training(trainings: Mapping[str, Table]) -> Drawing:
    """How alike the profiles of strangers are before training, and after some steps of it.

    Drawn of what the strangers of a panel have in common -> table of seed, step, layer, and the standard deviations
    q, k, v and o.
    Data: strangers, a, b (their seeds), step, score, and spread, the least spread sd / mean of the eight curves.
    """
    rows, ends = [], []
    drawn, panels = new_panels(4.0, 1, len(trainings), sharey=True)
    for axes, (strangers, table) in zip(panels, trainings.items(), strict=True):
        steps, seeds = (np.unique(table[name]) for name in ("step", "seed"))
        found = []
        for pair in combinations(seeds, 2):
            for step in steps:
                both = (where(table, seed=seed, step=step) for seed in pair)
                result = compare_std_profiles(*({role: each[role] for role in ATTENTION} for each in both))
                spread = min(value for name, value in result.details.items() if "spread" in name)
                found.append((strangers, *pair, step, result.score, spread))
        rows += found
        scores, spreads = np.reshape([row[-2:] for row in found], (-1, len(steps), 2)).transpose(2, 0, 1)
        axes.plot(steps, scores.T, color=QUIET, linewidth=0.8, label=["each pair", *[""] * (len(scores) - 1)])
        axes.plot(steps, scores.mean(0), **SERIES[0], linewidth=2.2, label="mean")
        flat = spreads < LEAST_SPREAD
        axes.plot(np.broadcast_to(steps, flat.shape)[flat], scores[flat], "x", color=INK, label="too flat to read")
        axes.axhline(CLAIMED, **CLAIM_LINE, label=f"claimed: {CLAIMED}")
        axes.set(title=_TITLES.get(strangers, strangers), xlabel="training steps")
        axes.set_xticks([0, steps[-1] // 2, steps[-1]])
        begin, *_, end = scores.mean(0)
        ends.append(f"{strangers}, mean {begin:.2f} at the beginning and {end:.2f} at the end")
    panels[0].set(ylabel="score of two strangers", ylim=(None, 1.05))
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    alt = f"""Panels with the scores of pairs of strangers over training, and a dashed line at {CLAIMED}.
        {"; ".join(ends)}. Crosses mark pairs with a curve that is too flat to read."""
    return drawn, columns(("strangers", "a", "b", "step", "score", "spread"), rows), alt


@figure()
def monotone_curves(depths: Sequence[int] = (4, 8, 48), pairs: int = 1000) -> Drawing:
    """What curves score that nothing made but chance: in any order, and sorted, so that they rise or fall throughout.
    Data: layers, order ("as drawn" or "sorted"), low (of a bin of the score) and share of the pairs in it."""
    rng = np.random.default_rng(0)
    shares, medians = [], []
    drawn, panels = new_panels(4.6, len(depths), sharex=True, sharey=True)
    for axes, layers in zip(panels, depths, strict=True):
        curves = rng.random((2, pairs, len(ATTENTION), layers))
        in_order, by_size = mean_correlation(*curves), mean_correlation(*np.sort(curves))
        for scores, label, colour, hatch in ((in_order, "as drawn", PALE, ""), (by_size, "sorted", MAIN, "///")):
            look = {"color": colour, "edgecolor": INK, "linewidth": 0.5, "hatch": hatch, "alpha": 0.85, "label": label}
            shares.append(axes.hist(scores, BINS, weights=np.full(pairs, 1 / pairs), **look)[0])
        axes.axvline(CLAIMED, **CLAIM_LINE)
        above = np.mean(by_size > CLAIMED)
        axes.set(title=f"{layers} layers: {above:.0%} of the sorted pairs above {CLAIMED}", ylabel="share")
        medians.append(f"{layers} layers, {np.median(in_order):.2f} and {np.median(by_size):.2f}")
    panels[0].legend(loc="upper left")
    panels[-1].set_xlabel("mean of four correlations")
    alt = f"""Histograms of the scores of random curves, as drawn and sorted, with a dashed line at {CLAIMED}. Medians:
        {"; ".join(medians)}."""
    places = {"layers": depths, "order": ("as drawn", "sorted"), "low": BINS[:-1].round(3)}
    return drawn, cell_columns(places, share=np.array(shares)), alt


@figure()
def random_strangers(layers: int = 8, width: int = 96, fall: float = 4.0) -> Drawing:
    """What models score that are nothing but random numbers, when their initialisation falls a little with depth.

    Matrices are square, and their standard deviation falls by `fall` per cent from the first to the last of L layers,
    in equal steps. Data: a, b, score; and refused, 1 where the package refuses as a curve is too flat.
    Raises ValueError where there are fewer than 3 layers, or the width is below 2, or fall is not from 0 to below 100.
    """
    require(layers >= 3, "layers", layers, "at least 3")
    require(width >= 2, "width", width, "at least 2")
    require(0 <= fall < 100, "fall", fall, "0 to below 100")
    stds = random_stds(layers, width, fall)
    flat = (stds.std(-1) / stds.mean(-1) < LEAST_SPREAD).any(-1)  # [M]
    first, second = np.triu_indices(MODELS, k=1)
    scores, refused = mean_correlation(stds[first], stds[second]), flat[first] | flat[second]
    above = np.mean(scores > CLAIMED)
    title = f"{layers} layers, width {width}, fall {fall:g} %: {above:.0%} of {len(scores)} pairs above {CLAIMED}"
    drawn, (axes,) = new_panels(3.2, title=title)
    looks = {"label": ("readable", "too flat: refused"), "color": (MAIN, PALE), "hatch": ("", "///")}
    axes.hist([scores[~refused], scores[refused]], BINS, stacked=True, ec=INK, lw=0.5, **looks)
    axes.axvline(CLAIMED, **CLAIM_LINE)
    axes.set(xlabel="score of two random models", ylabel="pairs")
    axes.legend(loc="upper left")
    alt = f"""A histogram of the scores of random models. {title}; median {np.median(scores):.2f}; the package refuses
        {refused.mean():.0%}."""
    rows = zip(first, second, scores, refused.astype(int), strict=True)
    return drawn, columns(("a", "b", "score", "refused"), rows), alt


def random_stds(layers: int, width: int, fall: float) -> np.ndarray:
    """The standard deviations of matrices of normal numbers, [M, 4, L], without drawing the numbers: of n numbers, n
    times the sample variance over the true one follows chi-squared with n - 1 degrees of freedom."""
    rng, n = np.random.default_rng(0), width**2
    true = np.linspace(1, 1 - fall / 100, layers)
    return true * np.sqrt(rng.chisquare(n - 1, (MODELS, len(ATTENTION), layers)) / n)
