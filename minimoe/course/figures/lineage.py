"""What fingerprints find in the zoo, and how far one may believe them: figures of the benchmark's scores."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.style import INK, MAIN, PALE, QUIET, SERIES, describe, new_figure
from minimoe.data_files import data_path
from minimoe.fingerprints import tables
from minimoe.fingerprints.benchmark import P_VALUES, PROMISES, SCORES, read_scores, read_table
from minimoe.fingerprints.compare import METHODS
from minimoe.fingerprints.rates import auc, roc
from minimoe.lineage.tree import FAMILIES, FRAMES

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


@figure()
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
            if row["use"] == "positive" and not is_rewritten(row) and row["std_profile"] is not None
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
    return drawn, columns(("group", "score"), rows)


def is_rewritten(row: dict[str, Any]) -> bool:
    """Whether one of a pair of the benchmark went through gauges."""
    return "gauged" in row["kind"]


def _of_strangers(rows: Rows, method: str, *prefixes: str) -> list[float]:
    """Scores of roots of one kind that share nothing."""
    return [
        row[method]
        for row in rows
        if row["relation"] == "strangers" and row["kind"] in ("roots", "deep") and _both(row, prefixes)
    ]


def _both(row: dict[str, Any], prefixes: tuple[str, ...]) -> bool:
    return row["a"].startswith(prefixes) and row["b"].startswith(prefixes)


@figure()
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
    return drawn, columns(names, rows)


@figure()
def p_values_of_strangers(folder: Path | None = None) -> Drawing:
    """Whether p-values keep their promise: among strangers, a share p of them is at most p.

    Data: method, p_value, share; every p-value in ascending order, and the share of strangers up to it.
    """
    drawn = new_figure(3.6)
    axes, rows, ends = drawn.subplots(), [], []
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, label="what is promised")
    for style, method in zip(SERIES, P_VALUES, strict=False):
        found = sorted(row[f"{method}_p"] for row in tables.strangers_of(scores(folder)) if row[f"{method}_p"])
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
    return drawn, columns(("method", "p_value", "share"), rows)


@figure()
def p_values_by_promise(folder: Path | None = None) -> Drawing:
    """What every p-value of the benchmark says of strangers, by what it is: exact, nominal, or not about lineage.

    A p-value of lineage stays on or below the diagonal: among strangers, a share p of them is at most p.

    Data: promise, test, p_value, share; every p-value in ascending order, and the share of tests up to it.
    """
    tests = _p_values_of_strangers(folder)
    panels = list(dict.fromkeys(PROMISES.values()))
    drawn = new_figure(3.7)
    rows, small = [], []
    for axes, promise in zip(drawn.subplots(1, len(panels), sharey=True), panels, strict=True):
        axes.plot([LEAST_P, 1], [LEAST_P, 1], color=QUIET, linewidth=1)
        shown = [test for test, kind in PROMISES.items() if kind == promise]
        for style, test in zip(SERIES, shown, strict=False):
            found = sorted(tests[test])
            shares = [(place + 1) / len(found) for place in range(len(found))]
            label = f"{test.replace('_', ' ').removeprefix('token agreement, ')}, {len(found)}"
            axes.step([max(p, LEAST_P) for p in found], shares, where="post", label=label, **{**style, "marker": ""})
            rows += [(promise, test, p, share) for p, share in zip(found, shares, strict=True)]
            small.append(f"{test.replace('_', ' ')} ({promise}) {np.mean(np.array(found) <= 0.05):.0%}")
        axes.set(xscale="log", yscale="log", xlim=(LEAST_P, 1), ylim=(LEAST_P, 8), xlabel="p-value")
        axes.set_yticks([1e-3, 1e-2, 1e-1, 1])
        axes.set_title(promise, fontsize=11)
        axes.legend(loc="upper left", frameon=False, fontsize=8)
    drawn.axes[0].set_ylabel("share of strangers up to it")
    describe(
        drawn,
        "Shares of tests of strangers up to each p-value, both on a logarithmic scale, in three panels with a diagonal "
        f"that no p-value of lineage rises above. At most .05 were: {'; '.join(small)}.",
    )
    return drawn, columns(("promise", "test", "p_value", "share"), rows)


LEAST_P = 1e-3


def _p_values_of_strangers(folder: Path | None) -> dict[str, list[float]]:
    """Of the tests in `PROMISES`: those of the scores' own strangers, and those of tests that take a third party."""
    strangers = tables.strangers_of(scores(folder))
    tests = {name: [row[f"{name}_p"] for row in strangers if row[f"{name}_p"]] for name in P_VALUES}
    for row in read_table("p_values", folder):
        tests.setdefault(row["test"], []).append(row["p_value"])
    return tests


@figure()
def orders_remembered(folder: Path | None = None) -> Drawing:
    """Which models tell the order in which alder or birch was trained: palimpsest, beside a reference, within domains.

    Data: order_of, suspect, relation, rho, p_value.
    """
    table = read_table("palimpsest", folder)
    names = list(dict.fromkeys(_seen_from_its_root(row) for row in table))
    drawn = new_figure(1.3 + 0.22 * len(names))
    axes, told = drawn.subplots(), []
    for style, root in zip(SERIES, dict.fromkeys(row["order_of"] for row in table), strict=False):
        some = [row for row in table if row["order_of"] == root]
        places = [names.index(_seen_from_its_root(row)) for row in some]
        rhos = [row["rho_within_domains"] for row in some]
        axes.plot(rhos, places, label=f"order of {root}", **{**style, "linestyle": ""})
        told.append(f"{root} {sum(row['p_value_within_domains'] <= RARE for row in some)} of {len(some)}")
    rare = NormalDist().inv_cdf(1 - RARE) / (EXAMPLES - 1) ** 0.5
    axes.axvline(0, color=QUIET, linewidth=0.8)
    axes.axvline(rare, color=INK, linestyle="--", linewidth=1, label=f"p = {RARE}")
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("rho of order and log-likelihood, beside a reference, within domains")
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    describe(
        drawn,
        f"How well {len(names)} kinds of models tell the order in which two roots were trained, with a dashed line at "
        f"p = {RARE}. Told by: {'; '.join(told)}.",
    )
    kept = ("order_of", "suspect", "relation", "rho_within_domains", "p_value_within_domains")
    return drawn, {name.removesuffix("_within_domains"): [row[name] for row in table] for name in kept}


RARE, EXAMPLES = 0.01, 800


def _seen_from_its_root(row: dict[str, Any]) -> str:
    """The suspect as it is called in both families."""
    suspect, root = row["suspect"], row["order_of"]
    if row["relation"] in ("itself", "strangers") and suspect in FAMILIES:
        return row["relation"] if suspect == root else "the other root"
    return suspect.removeprefix(f"{root}-")


@figure()
def found_by_transformation(folder: Path | None = None) -> Drawing:
    """What share of its relatives each method finds at 1 % false positives, group by group of transformations.

    The table transformations.csv of the benchmark has them one by one.

    Data: transformation, method, found; the second half is of relatives that were rewritten by all gauges afterwards.
    """
    methods = (*METHODS, "score")
    grouped = [{**row, "kind": _group(row)} if row["use"] == "positive" else row for row in scores(folder)]
    table = tables.by_transformation(grouped, methods)
    table.sort(key=lambda row: _PLACES[row["transformation"]])
    cells = [(row["transformation"], row["method"], row["tpr"]) for row in table]
    panels = {
        "as made": [cell for cell in cells if not cell[0].endswith(_REWRITTEN)],
        "rewritten": [cell for cell in cells if cell[0].endswith(_REWRITTEN)],
    }
    return _maps(panels, ("transformation", "method", "found"), "Relatives found at 1 % false positives")


_REWRITTEN = ", gauged"
_GROUPS = {
    "trained further": ("finetuned", "lora", "continued-0.1", "continued-1", "continued-4", "mixture-finetuned"),
    "merged": ("lerp", "slerp", "ties"),
    "rounded; more tokens": ("int8", "int4", "extended"),
    "narrower": ("fewer-neurons", "fewer-heads"),
    "shallower, deeper": ("fewer-layers", "deepened"),
    "upcycled whole": ("copy", "copy-qwen2_moe", "copy-pangu", "noisy"),
    "upcycled in slices": ("sliced", "virtual-groups"),
    "upcycled, partly anew": ("drop-0.25", "drop-0.5", "drop-0.9"),
    "of several parents": ("btx", "transplant"),
    "upcycled, then trained": (),  # all that end in "-trained"
    "donor of one expert": ("transplant, donor", "transplant-trained, donor"),
    "two descendants": ("cousins", "cousins, one gauged", "cousins, both gauged"),
    "nothing else": ("gauged",),
    "before upcycling": ("gauged-copy", "gauged-drop-0.5"),
}
_PLACES = {name + end: place for end in ("", _REWRITTEN) for place, name in enumerate(_GROUPS)}


def _group(row: dict[str, Any]) -> str:
    """The group of a pair's transformation; where one of the pair is rewritten, another one."""
    kind = row["kind"]
    plain, end = kind.removesuffix("-gauged"), _REWRITTEN if is_rewritten(row) else ""
    if plain.endswith("-trained"):
        return "upcycled, then trained" + end
    return next(name for name, kinds in _GROUPS.items() if {kind, plain} & set(kinds)) + end


@figure()
def gauge_map(folder: Path | None = None) -> Drawing:
    """What each gauge leaves of the score of a model with itself: 1 is everything.

    Data: gauge, method, score. Empty where a method refuses.
    """
    rows = [row for row in scores(folder) if row["use"] == "invariance" and row["a"] == "alder"]
    cells = [(row["kind"], method, row[method]) for row in rows for method in METHODS]
    return _maps({"": cells}, ("gauge", "method", "score"), "Score of a model with its rewritten copy")


Cell = tuple[str, str, float | None]  # row, column, number


def _maps(panels: dict[str, list[Cell]], names: tuple[str, str, str], title: str) -> Drawing:
    """Tables of the same columns below each other, each cell with its number; white where there is none."""
    heights = [len({cell[0] for cell in cells}) for cells in panels.values()]
    drawn = new_figure(1.9 + 0.22 * sum(heights) + 0.3 * (len(panels) - 1))
    all_axes = drawn.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    said = []
    for axes, (panel, cells) in zip(all_axes, panels.items(), strict=True):
        lowest = _map(axes, cells)
        said.append(f"{panel or 'in it'}, the lowest row is {lowest}")
        axes.set_title(f"{title}, {panel}" if panel else title)
    describe(drawn, f"{title}, {sum(heights)} rows, a column for each method; {'; '.join(said)}.")
    cells = [cell for cells in panels.values() for cell in cells]
    data = {name: [cell[column] for cell in cells] for column, name in enumerate(names)}
    data[names[2]] = ["" if value is None else float(value) for value in data[names[2]]]
    return drawn, data


def _map(axes: Axes, rows: list[Cell]) -> str:
    """Draw one; returns the name of the row with the lowest mean."""
    down, across = (list(dict.fromkeys(row[column] for row in rows)) for column in (0, 1))
    cells = np.full((len(down), len(across)), np.nan)
    for first, second, value in rows:
        cells[down.index(first), across.index(second)] = np.nan if value is None else value
    axes.imshow(cells.clip(0, 1), cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for row, column in np.argwhere(~np.isnan(cells)):
        value = cells[row, column]
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value > 0.7 else INK
        )
    labels = [name.replace("_", " ") for name in across]
    axes.set_xticks(range(len(across)), labels, rotation=60, ha="right", fontsize=8)
    labels = [name.removesuffix(_REWRITTEN).replace("_", " ") for name in down]
    axes.set_yticks(range(len(down)), labels, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return down[int(np.nanargmin(np.nanmean(cells, axis=1)))]


@figure()
def framed_strangers(folder: Path | None = None) -> Drawing:
    """What frames do to four scores: strangers that imitate a model, beside strangers that do not.

    Data: frame, method, score; one row a pair.
    """
    methods = {"std profile": "std_profile", "norms": "norm_profile", "csu": "csu", "combined": "score"}
    kinds = ("strangers as they are", *(f"framed-{frame}" for frame in FRAMES))
    drawn, rows = new_figure(3.4), []
    drawn.get_layout_engine().set(wspace=0.06)  # the outer tick labels of neighbours need room
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
        axes.set(xlim=(-1.05, 1.05), xticks=(-1, 0, 1), xlabel="score")
    panels[0].set_yticks(range(len(kinds)), [kind.replace("-", ", ") for kind in kinds])
    panels[0].invert_yaxis()
    panels[-1].set(xlim=(-0.03, 1.03), xticks=(0, 0.5, 1))
    panels[-1].axvline(0.5, color=INK, linestyle="--", linewidth=1)
    describe(
        drawn,
        "Scores of strangers and of framed strangers under four methods: the std profile, the norm profile and csu "
        "reach 1 for those that imitate them; the combined score does not cross the dashed line at 0.5.",
    )
    return drawn, columns(("frame", "method", "score"), rows)
