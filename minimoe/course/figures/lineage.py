"""What fingerprints find in the zoo, and how far one may believe them: figures of the benchmark's scores."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.course.figures.register import Drawing, figure
from minimoe.course.style import INK, MAIN, PALE, QUIET, SERIES, describe, new_figure
from minimoe.data_files import data_path
from minimoe.fingerprints import tables
from minimoe.fingerprints.benchmark import P_VALUES, SCORES, read_scores
from minimoe.fingerprints.compare import METHODS
from minimoe.fingerprints.rates import auc, roc

CLAIMED = 0.927  # the correlation that the claim of July 2025 rests on (arXiv 2507.03014)
CURVES = {
    "std profile": "std_profile",
    "weight cosine": "weight_cosine",
    "spectral": "spectral",
    "whitened response": "virtual_response_whitened",
    "all, combined": "score",
}


Rows = list[dict[str, Any]]


@cache
def scores(folder: Path | None = None) -> Rows:
    """The scores of all pairs that a benchmark left in a folder; None: those that are shipped."""
    return read_scores((folder or data_path("zoo") / "benchmark") / SCORES)


def _of(rows: Rows, use: str, method: str, kind: str | None = None) -> list[float | None]:
    return [row[method] for row in rows if row["use"] == use and kind in (None, row["kind"])]


@figure
def std_profile_of_strangers(folder: Path | None = None) -> Drawing:
    """How alike the std profiles of strangers and of relatives are, beside the value that was claimed to show descent.

    Data: group, score; one row a pair.
    """
    pairs = {
        "strangers of 4 layers": _of_strangers(scores(folder), "std_profile", "stranger-", "alder", "birch"),
        "strangers of 8 layers": _of_strangers(scores(folder), "std_profile", "deep-"),
        "relatives as they are": [
            row["std_profile"]
            for row in scores(folder)
            if row["use"] == "positive" and "gauged" not in row["kind"] and row["std_profile"] is not None
        ],
    }
    drawn = new_figure(4.6)
    panels = drawn.subplots(len(pairs), 1, sharex=True)
    bins = np.linspace(-1, 1, 41)
    for axes, (group, found) in zip(panels, pairs.items(), strict=True):
        above = np.mean(np.array(found) > CLAIMED)
        axes.hist(found, bins, color=MAIN if "relatives" in group else PALE, edgecolor=INK, linewidth=0.5)
        axes.axvline(CLAIMED, color=INK, linestyle="--", linewidth=1.2)
        axes.set_title(f"{group}: {len(found)} pairs, {above:.0%} above {CLAIMED}")
        axes.set_ylabel("pairs")
    panels[-1].set_xlabel("mean correlation of the std profiles")
    describe(
        drawn,
        f"Three histograms of the std profile's score with a dashed line at {CLAIMED}. "
        + ". ".join(f"{group}: median {np.median(found):.2f}" for group, found in pairs.items()),
    )
    rows = [(group, score) for group, found in pairs.items() for score in found]
    return drawn, dict(zip(("group", "score"), map(list, zip(*rows, strict=True)), strict=True))


def _of_strangers(rows: Rows, method: str, *prefixes: str) -> list[float]:
    """Scores of roots of one kind that share nothing."""
    return [
        row[method]
        for row in rows
        if row["relation"] == "strangers" and row["kind"] in ("roots", "deep") and _both(row, prefixes)
    ]


def _both(row: dict[str, Any], prefixes: tuple[str, ...]) -> bool:
    return row["a"].startswith(prefixes) and row["b"].startswith(prefixes)


@figure
def roc_curves(folder: Path | None = None) -> Drawing:
    """How many relatives each method finds for how many strangers taken for relatives, over all transformations.

    Data: method, false_positive_rate, true_positive_rate; the corners of each curve.
    """
    drawn = new_figure(4.2)
    axes, rows, areas = drawn.subplots(), [], []
    for style, (label, method) in zip(SERIES, CURVES.items(), strict=True):
        relatives, strangers = _of(scores(folder), "positive", method), _of(scores(folder), "evaluation", method)
        false, true = roc(relatives, strangers)
        area = auc(relatives, strangers)
        axes.step(false, true, where="post", label=f"{label} (AUC {area:.3f})", **{**style, "marker": ""})
        rows += [(label, float(x), float(y)) for x, y in zip(false, true, strict=True)]
        areas.append(f"{label} {area:.3f}")
    axes.axvline(0.01, color=QUIET, linewidth=0.8, linestyle=":")
    axes.set(
        xscale="symlog", xlim=(0, 1), ylim=(0, 1.02), xlabel="strangers taken for relatives", ylabel="relatives found"
    )
    axes.set_xscale("symlog", linthresh=0.005)
    axes.set_xticks([0, 0.005, 0.01, 0.1, 1], ["0", "0.5 %", "1 %", "10 %", "100 %"])
    axes.legend(loc="lower right", frameon=False)
    describe(drawn, f"ROC curves of five methods over all transformations of the zoo; areas: {', '.join(areas)}.")
    names = ("method", "false_positive_rate", "true_positive_rate")
    return drawn, dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


@figure
def p_values_of_strangers(folder: Path | None = None) -> Drawing:
    """Whether p-values keep their promise: among strangers, a share p of them is at most p.

    Data: method, p_value, share; every p-value in ascending order, and the share of strangers up to it.
    """
    drawn = new_figure(3.6)
    axes, rows, ends = drawn.subplots(), [], []
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, label="what is promised")
    for style, method in zip(SERIES, P_VALUES, strict=False):
        found = sorted(
            row[f"{method}_p"] for row in scores(folder) if row["relation"] == "strangers" and row[f"{method}_p"]
        )
        shares = [(place + 1) / len(found) for place in range(len(found))]
        axes.step(
            found,
            shares,
            where="post",
            label=f"{method.replace('_', ' ')}, {len(found)} pairs",
            **{**style, "marker": ""},
        )
        rows += [(method, p, share) for p, share in zip(found, shares, strict=True)]
        ends.append(f"{method}: {np.mean(np.array(found) <= 0.05):.1%} of strangers at most .05")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="p-value", ylabel="share of strangers up to it")
    axes.legend(loc="lower right", frameon=False)
    describe(drawn, f"Shares of strangers up to each p-value, beside the diagonal. {'; '.join(ends)}.")
    return drawn, dict(zip(("method", "p_value", "share"), map(list, zip(*rows, strict=True)), strict=True))


@figure
def found_by_transformation(folder: Path | None = None) -> Drawing:
    """What share of its relatives each method finds at 1 % false positives, transformation by transformation.

    Data: transformation, method, found; a gauged copy is a transformation of its own.
    """
    methods = (*METHODS, "score")
    table = tables.by_transformation(scores(folder), methods)
    return _map(
        [(row["transformation"], row["method"], row["tpr"]) for row in table],
        ("transformation", "method", "found"),
        "share of relatives found at 1 % false positives",
    )


@figure
def gauge_map(folder: Path | None = None) -> Drawing:
    """What each gauge leaves of the score of a model with itself: 1 is everything.

    Data: gauge, method, score. Empty where a method refuses.
    """
    rows = [row for row in scores(folder) if row["use"] == "invariance" and row["a"] == "alder"]
    return _map(
        [(row["kind"], method, row[method]) for row in rows for method in METHODS],
        ("gauge", "method", "score"),
        "score of a model with its rewritten copy",
    )


def _map(rows: list[tuple[str, str, float | None]], names: tuple[str, str, str], label: str) -> Drawing:
    """Cells of a table, each with its number; white where there is none."""
    down, across = (list(dict.fromkeys(row[column] for row in rows)) for column in (0, 1))
    cells = np.full((len(down), len(across)), np.nan)
    for first, second, value in rows:
        cells[down.index(first), across.index(second)] = np.nan if value is None else value
    drawn = new_figure(1.9 + 0.2 * len(down))
    axes = drawn.subplots()
    axes.imshow(cells.clip(0, 1), cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for row, column in np.argwhere(~np.isnan(cells)):
        value = cells[row, column]
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value > 0.7 else INK
        )
    axes.set_xticks(
        range(len(across)), [name.replace("_", " ") for name in across], rotation=60, ha="right", fontsize=8
    )
    axes.set_yticks(range(len(down)), [name.replace("_", " ") for name in down], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    lowest = np.nanargmin(cells.mean(1)) if not np.isnan(cells.mean(1)).all() else 0
    axes.set_title(label[0].upper() + label[1:])
    describe(
        drawn, f"A table of {len(down)} rows and {len(across)} methods: {label}; the lowest row is {down[lowest]}."
    )
    data = {name: [row[column] for row in rows] for column, name in enumerate(names)}
    data[names[2]] = ["" if value is None else float(value) for value in data[names[2]]]
    return drawn, data


@figure
def framed_strangers(folder: Path | None = None) -> Drawing:
    """What frames do to three scores: strangers that imitate a model, beside strangers that do not.

    Data: frame, method, score; one row a pair.
    """
    methods = {"std profile": "std_profile", "norm profile": "norm_profile", "all, combined": "score"}
    kinds = ("strangers as they are", "framed-std", "framed-norms", "framed-both")
    drawn, rows = new_figure(3.4), []
    panels = drawn.subplots(1, len(methods), sharey=True)
    for axes, (label, method) in zip(panels, methods.items(), strict=True):
        for place, kind in enumerate(kinds):
            found = (
                _of(scores(folder), "evaluation", method, "roots")
                if place == 0
                else _of(scores(folder), "forgery", method, kind)
            )
            known = [score for score in found if score is not None]
            offsets = np.linspace(-0.25, 0.25, len(known))
            axes.plot(
                known,
                place + offsets,
                "o",
                markersize=3,
                color=PALE if place == 0 else MAIN,
                markeredgecolor=INK,
                markeredgewidth=0.3,
            )
            rows += [(kind, label, score) for score in known]
        axes.set_title(label)
        axes.set_xlim(-1.05, 1.05) if method != "score" else axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("score")
    panels[0].set_yticks(range(len(kinds)), [kind.replace("-", ", ") for kind in kinds])
    panels[0].invert_yaxis()
    panels[-1].axvline(0.5, color=INK, linestyle="--", linewidth=1)
    describe(
        drawn,
        "Scores of strangers and of framed strangers under three methods: the std profile and the norm profile reach "
        "1 for those that imitate them, the combined score stays below the dashed line at 0.5.",
    )
    return drawn, dict(zip(("frame", "method", "score"), map(list, zip(*rows, strict=True)), strict=True))
