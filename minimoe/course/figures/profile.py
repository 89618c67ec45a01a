"""The std profile: what it reads, and why the profiles of strangers look alike.

A profile is the standard deviation of Q, K, V and O in every layer. Two are compared by Pearson's r over the layers,
mean of the four, as in `minimoe.fingerprints.std_profile`. Shapes: M models, L layers.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from minimoe.course.figures.lineage import CLAIMED
from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.runs import PROFILES, Table, profile_at, read_run
from minimoe.course.style import INK, MAIN, PALE, QUIET, SERIES, describe, new_figure
from minimoe.fingerprints.std_profile import ATTENTION, LEAST_SPREAD, compare_std_profiles, read_std_profile
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.zoo import Zoo

MODELS = 26  # as many as the zoo has roots of one shape: 325 pairs
_BINS = np.linspace(-1, 1, 41)
_TITLES = dict(
    zip(PROFILES, ("4 layers,\nbegun alike", "8 layers,\nbegun alike", "8 layers,\nscaled by depth"), strict=True)
)
_READ = ("readable", "too flat: refused")
_SHOWN = {"alder": "alder", "alder-continued-4": "a descendant of alder", "birch": "birch, a stranger"}


@figure
def profile_curves() -> Drawing:
    """The z-scored profiles of a model, of one that descends from it, and of a stranger.

    Data: role, model, layer, std and z, the standard deviation after z-scoring over the layers.
    """
    profiles = {name: read_std_profile(open_weights(Zoo().load(name))) for name in _SHOWN}
    drawn = new_figure(4.6)
    panels = drawn.subplots(2, 2, sharex=True, sharey=True)
    rows = []
    for axes, role in zip(panels.flat, ATTENTION, strict=True):
        for style, (name, label) in zip(SERIES, _SHOWN.items(), strict=False):
            std = profiles[name][role]
            z = (std - std.mean()) / std.std()
            axes.plot(z, **style, label=label)
            rows += [(role, name, layer, float(std[layer]), float(z[layer])) for layer in range(len(std))]
        axes.set_title(role.upper())
        axes.set_xticks(range(len(std)))
    for axes in panels[1]:
        axes.set_xlabel("layer")
    drawn.supylabel("standard deviation, z-scored over the layers", size=11)
    drawn.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
    ours, *others = profiles
    scores = [f"{_SHOWN[name]} {compare_std_profiles(profiles[ours], profiles[name]).score:.2f}" for name in others]
    describe(
        drawn,
        f"Four panels, Q, K, V and O, with the curves of three models over {len(std)} layers. Mean correlation with "
        f"{ours}: {', '.join(scores)}.",
    )
    return drawn, columns(("role", "model", "layer", "std", "z"), rows)


@figure
def strangers_over_training() -> Drawing:
    """How alike the profiles of strangers are before training, and after some steps of it.

    Data: strangers, a, b (their seeds), step, score, and spread, the least spread sd / mean of the eight curves.
    """
    drawn = new_figure(4.0)
    panels = drawn.subplots(1, len(PROFILES), sharey=True)
    rows, ends = [], []
    for axes, name in zip(panels, PROFILES, strict=True):
        table, label = read_run(name, "std"), name.removeprefix("profiles/").replace("-", " ")
        steps, pairs = np.unique(table["step"]).tolist(), list(combinations(np.unique(table["seed"]).tolist(), 2))
        found = np.array([[_compared(table, step, *pair) for step in steps] for pair in pairs])  # [pairs, steps, 2]
        scores, flat = found[..., 0], found[..., 1] < LEAST_SPREAD
        axes.plot(steps, scores.T, color=QUIET, linewidth=0.8)
        axes.plot(steps, scores.mean(0), **SERIES[0], linewidth=2.2)
        axes.plot(np.broadcast_to(steps, flat.shape)[flat], scores[flat], "x", color=INK)
        axes.axhline(CLAIMED, color=INK, linestyle="--", linewidth=1)
        axes.set(title=_TITLES[name], xlabel="training steps", xticks=(0, steps[-1] // 2, steps[-1]))
        for pair, of_pair in zip(pairs, found.tolist(), strict=True):
            rows += [(label, *pair, step, *values) for step, values in zip(steps, of_pair, strict=True)]
        ends.append(
            f"{label}, mean {scores[:, 0].mean():.2f} at the beginning and {scores[:, -1].mean():.2f} at the end"
        )
    panels[0].set(ylabel="score of two strangers", ylim=(None, 1.05))
    describe(
        drawn,
        f"Three panels with the scores of pairs of strangers over training, and a dashed line at {CLAIMED}. "
        f"{'; '.join(ends)}. Crosses mark pairs with a curve that is too flat to read.",
    )
    return drawn, columns(("strangers", "a", "b", "step", "score", "spread"), rows)


def _compared(table: Table, step: int, a: int, b: int) -> tuple[float, float]:
    """The score of two seeds, and the least spread of their curves."""
    result = compare_std_profiles(profile_at(table, seed=a, step=step), profile_at(table, seed=b, step=step))
    return result.score, min(value for name, value in result.details.items() if "spread" in name)


@figure
def monotone_curves(pairs: int = 1000) -> Drawing:
    """What curves score that nothing made but chance: in any order, and sorted, so that they rise or fall throughout.

    Data: layers, order ("as drawn" or "sorted"), low (of a bin of the score) and share of the pairs in it.
    """
    rng = np.random.default_rng(0)
    drawn, rows, medians = new_figure(4.6), [], []
    panels = drawn.subplots(3, 1, sharex=True, sharey=True)
    for axes, layers in zip(panels, (4, 8, 48), strict=True):
        curves = rng.random((2, pairs, len(ATTENTION), layers))
        kinds = {"as drawn": _score(*_z_score(curves)), "sorted": _score(*_z_score(np.sort(curves)))}
        for (order, scores), colour, hatch in zip(kinds.items(), (PALE, MAIN), ("", "///"), strict=True):
            share, edges, _ = axes.hist(
                scores, _BINS, weights=np.full(pairs, 1 / pairs), color=colour, edgecolor=INK, linewidth=0.5,
                hatch=hatch, alpha=0.85, label=order,
            )  # fmt: skip
            rows += [(layers, order, *bin) for bin in zip(edges[:-1].round(3).tolist(), share.tolist(), strict=True)]
        axes.axvline(CLAIMED, color=INK, linestyle="--", linewidth=1.2)
        axes.set_title(f"{layers} layers: {np.mean(kinds['sorted'] > CLAIMED):.0%} of the sorted pairs above {CLAIMED}")
        axes.set_ylabel("share")
        medians.append(f"{layers} layers, {np.median(kinds['as drawn']):.2f} and {np.median(kinds['sorted']):.2f}")
    panels[0].legend(frameon=False, loc="upper left")
    panels[-1].set_xlabel("mean of four correlations")
    describe(
        drawn,
        f"Histograms of the scores of random curves, as drawn and sorted, with a dashed line at {CLAIMED}. Medians: "
        f"{'; '.join(medians)}.",
    )
    return drawn, columns(("layers", "order", "low", "share"), rows)


@figure
def random_strangers(layers: int = 8, width: int = 96, fall: float = 4.0) -> Drawing:
    """What models score that are nothing but random numbers, when their initialisation falls a little with depth.

    Data: a, b, score; and refused, 1 where the package refuses as a curve is too flat.

    Args:
        layers: L, at least 3.
        width: of a square matrix.
        fall: by how many per cent the standard deviation falls from the first to the last layer, in equal steps.

    Raises:
        ValueError: there are fewer than 3 layers, or the width is below 2, or fall is not from 0 to below 100.
    """
    if layers < 3 or width < 2 or not 0 <= fall < 100:
        raise ValueError(f"layers={layers}, width={width}, fall={fall}: wanted at least 3, at least 2, 0 to below 100")
    stds = _random_stds(layers, width, fall)
    flat = (stds.std(-1) / stds.mean(-1) < LEAST_SPREAD).any(-1)  # [M]
    first, second = np.triu_indices(MODELS, k=1)
    z = _z_score(stds)
    scores, refused = _score(z[first], z[second]), flat[first] | flat[second]
    drawn = new_figure(3.2)
    axes = drawn.subplots()
    bars = axes.hist([scores[~refused], scores[refused]], _BINS, stacked=True, edgecolor=INK, linewidth=0.5)[2]
    for patches, colour, hatch, label in zip(bars, (MAIN, PALE), ("", "///"), _READ, strict=True):
        for patch in patches:
            patch.set(facecolor=colour, hatch=hatch)
        patches.set_label(label)
    axes.axvline(CLAIMED, color=INK, linestyle="--", linewidth=1.2)
    above = np.mean(scores > CLAIMED)
    title = f"{layers} layers, width {width}, fall {fall:g} %: {above:.0%} of {len(scores)} pairs above {CLAIMED}"
    axes.set_title(title)
    axes.set(xlabel="score of two random models", ylabel="pairs")
    axes.legend(frameon=False, loc="upper left")
    describe(
        drawn,
        f"A histogram of the scores of random models. {title}; median {np.median(scores):.2f}; the package refuses "
        f"{refused.mean():.0%}.",
    )
    return drawn, columns(
        ("a", "b", "score", "refused"),
        list(zip(first.tolist(), second.tolist(), scores.tolist(), refused.astype(int).tolist(), strict=True)),
    )


def _random_stds(layers: int, width: int, fall: float) -> np.ndarray:
    """The standard deviations of matrices of normal numbers, [M, 4, L], without drawing the numbers.

    Of n numbers, n times the sample variance over the true one follows chi-squared with n - 1 degrees of freedom.
    """
    rng, n = np.random.default_rng(0), width**2
    true = np.linspace(1, 1 - fall / 100, layers)
    return true * np.sqrt(rng.chisquare(n - 1, (MODELS, len(ATTENTION), layers)) / n)


def _z_score(curves: np.ndarray) -> np.ndarray:
    return (curves - curves.mean(-1, keepdims=True)) / curves.std(-1, keepdims=True)


def _score(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of profiles [..., 4, L] that are z-scored: Pearson's r over the layers, mean of the four."""
    return (a * b).mean((-1, -2))
