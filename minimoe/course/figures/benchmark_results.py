"""What fingerprints find in the zoo, and how far one may believe them: figures of the benchmark's tables.

Each argument is the table of that name, as `read_table` gives it.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import NormalDist

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import auc, roc_curve

from minimoe.course.figures.drawing import heatmap, label_rows, new_panels
from minimoe.course.figures.profile import BINS, CLAIM_LINE
from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.published import CLAIMED
from minimoe.course.style import INK, MAIN, PALE, QUIET, SERIES
from minimoe.data_files import data_path
from minimoe.fingerprints.report import title_of
from minimoe.fingerprints.verdict import CORRELATION, SAME, SHARED
from minimoe.fingerprints.zoo_scores import Row, Rows, is_rewritten, read_table, scores, scores_of, strangers_of
from minimoe.lineage.tree import FAMILIES, FRAMES, PLANTS

CURVES = {
    "std profile": "std_profile",
    "weight cosine": "weight_cosine",
    "spectral": "spectral",
    "whitened response": "virtual_response_whitened",
    "all, combined": "score",
}
# Of the methods, those that maps show: what reads coordinates, then what sees through them.
MAPPED = (
    *("std_profile", "norm_profile", "weight_cosine", "csu"),
    *("aligned_cka", "virtual_response_whitened", "aligned_neurons", "best_part"),
)
LOWEST = -2.0  # below every score: a method that refuses a pair has found nothing in it
REMEMBERING = (  # the kinds of models in the figure of orders
    *("itself", "gauged", "continued-0.1", "continued-1", "continued-4", "lora", "finetuned"),
    *("copy-trained", "drop-0.5-trained", "distilled", "the other root", "stranger-13"),
)
LEAST_P = 1e-3  # where the axes of p-values by promise begin
RARE, EXAMPLES = 0.01, 800  # a p-value that is marked; examples in the order of a root, one from each step
GRAFTED = ("", "-gauged", "-trained", "-trained-gauged")
ANEW, BEFORE = ("drop-0.25", "drop-0.5", "drop-0.9"), ("gauged-copy", "gauged-drop-0.5")
GROUPS = {
    "trained further": ("finetuned", "lora", "continued-0.1", "continued-1", "continued-4", "mixture-finetuned"),
    "merged": ("lerp", "slerp", "ties"),
    "nothing; rounded; more tokens": ("gauged", "int8", "int4", "extended"),
    "narrower": ("fewer-neurons", "fewer-heads"),
    "shallower, deeper": ("fewer-layers", "deepened"),
    "upcycled": ("copy", "copy-qwen2_moe", "copy-pangu", "noisy", "sliced", "virtual-groups", *ANEW, *BEFORE),
    "of several parents": ("btx", "transplant"),
    "upcycled, then trained": (),  # all that end in "-trained"
    "donor of one expert": ("transplant, donor", "transplant-trained, donor"),
    "two descendants": ("cousins", "cousins, one gauged", "cousins, both gauged"),
    "new embeddings": ("fresh", "fresh-only"),
    "MLPs under another's attention": ("grafted", *(f"grafted{end}, donor" for end in GRAFTED)),
    "behind planted parts": tuple(f"planted-{kind}-gauged" for kind in (*PLANTS, "both", "rows")),
}


def std_profile_groups(scores: Rows) -> dict[str, list[float]]:
    """Scores of the std profile among strangers of two depths, and among relatives of which none was rewritten."""
    roots = [row for row in scores if row["relation"] == "strangers" and row["kind"] in ("roots", "deep")]
    groups = {
        "strangers of 4 layers": [row for row in roots if row["kind"] == "roots"],
        "strangers of 8 layers": [row for row in roots if row["a"][:5] == row["b"][:5] == "deep-"],
        "relatives as they are": [row for row in scores if row["use"] == "positive" and not is_rewritten(row)],
    }
    return {group: scores_of(rows, "std_profile") for group, rows in groups.items()}


@figure(scores=scores)
def std_profile_of_strangers(scores: Rows) -> Drawing:
    """How alike the std profiles of strangers and of relatives are, beside the value that was claimed to show descent.
    Data: group, score; one row a pair."""
    groups = std_profile_groups(scores)
    drawn, panels = new_panels(4.6, len(groups), sharex=True)
    for axes, (group, found) in zip(panels, groups.items(), strict=True):
        axes.hist(found, BINS, color=MAIN if "relatives" in group else PALE, edgecolor=INK, linewidth=0.5)
        axes.axvline(CLAIMED, **CLAIM_LINE)
        above = np.mean(np.array(found) > CLAIMED)
        axes.set(title=f"{group}: {len(found)} pairs, {above:.0%} above {CLAIMED}", ylabel="pairs")
    panels[0].annotate(f" {CLAIMED}", (CLAIMED, 0.85), xycoords=("data", "axes fraction"))
    panels[-1].set_xlabel("mean correlation of the std profiles")
    medians = ". ".join(f"{group}: median {np.median(found):.2f}" for group, found in groups.items())
    alt = f"Three histograms of the std profile's score with a dashed line at {CLAIMED}. {medians}"
    rows = [(group, score) for group, found in groups.items() for score in found]
    return drawn, columns(("group", "score"), rows), alt


@figure(scores=scores)
def roc_curves(scores: Rows, methods: Mapping[str, str] = CURVES) -> Drawing:
    """How many relatives each method finds for how many strangers taken for relatives, over all transformations.
    Data: method, false_positive_rate, true_positive_rate; the corners of each curve."""
    rows, areas = [], []
    drawn, (axes,) = new_panels(4.2)
    asked = [row for row in scores if row["use"] in ("positive", "evaluation")]
    for style, (label, method) in zip(SERIES, methods.items(), strict=False):
        found = [LOWEST if row[method] is None else row[method] for row in asked]
        false, true, _ = roc_curve([row["use"] == "positive" for row in asked], found, drop_intermediate=False)
        area = auc(false, true)
        look = style | {"marker": "", "linewidth": 2}
        axes.step(false, true, where="post", label=f"{label} (AUC {area:.3f})", **look)
        rows += [(label, *corner) for corner in zip(false, true, strict=True)]
        areas.append(f"{label} {area:.3f}")
    axes.set(xlim=(-0.0004, 1.1), ylim=(-0.03, 1.05), xlabel="strangers taken for relatives", ylabel="relatives found")
    axes.set_xscale("symlog", linthresh=0.005)
    axes.set_xticks([0, 0.005, 0.01, 0.1, 1], ["0", "0.5 %", "1 %", "10 %", "100 %"])
    axes.grid(color=PALE, linewidth=0.8)
    axes.legend(loc="lower right", fontsize=11)
    alt = f"ROC curves of {len(methods)} methods over all transformations of the zoo; areas: {', '.join(areas)}."
    return drawn, columns(("method", "false_positive_rate", "true_positive_rate"), rows), alt


@figure(scores=scores)
def framed_strangers(scores: Rows) -> Drawing:
    """What frames do to four scores: strangers that imitate a model, beside strangers that do not.
    Data: frame, method, score; one row a pair."""
    methods = {"std profile": "std_profile", "norms": "norm_profile", "csu": "csu", "combined": "score"}
    drawn, panels, rows = _draw_strangers(scores, [f"framed-{frame}" for frame in FRAMES], methods)
    for axes in panels:
        axes.set(xlim=(-1.05, 1.05), xticks=(-1, 0, 1), xlabel="score")
    panels[-1].set(xlim=(-0.03, 1.03), xticks=(0, 0.5, 1))
    panels[-1].axvline(0.5, color=INK, linestyle="--", linewidth=1)
    alt = """Scores of strangers and of framed strangers under four methods: the std profile, the norm profile and csu
        reach 1 for those that imitate them; the combined score does not cross the dashed line at 0.5."""
    return drawn, columns(("frame", "method", "score"), rows), alt


@figure(scores=scores)
def planted_strangers(scores: Rows) -> Drawing:
    """What planted neurons do to four scores: the first two count all parts, the last two those that do something.
    Data: plant, method, score; one row a pair."""
    methods = {name.replace("_", " "): name for name in ("match", "expert_attribution", "aligned_neurons", "best_part")}
    kinds = [f"planted-{kind}" for kind in ("dead", "opposite", "sums", "products", "squares", "spans")]
    drawn, panels, rows = _draw_strangers(scores, kinds, methods)
    for axes in panels:
        axes.set(xlim=(-0.25, 1.1), xticks=(0, 0.5, 1), xlabel="score")
    told = [
        f"{label} {max(score for kind, method, score in rows if method == label and kind in kinds):.2f}"
        for label in methods
    ]
    alt = f"""Scores of strangers, and of strangers with planted neurons that do nothing with the model that these are
        from, under four methods. The highest of those with planted neurons: {", ".join(told)}."""
    return drawn, columns(("plant", "method", "score"), rows), alt


def _draw_strangers(
    scores: Rows, kinds: Sequence[str], methods: Mapping[str, str]
) -> tuple[Figure, list[Axes], list[tuple[str, str, float]]]:
    """A panel for each method with a row of dots for plain strangers, and for each kind of made ones; and the dots."""
    groups = {
        "strangers as they are": [row for row in scores if row["use"] == "evaluation" and row["kind"] == "roots"],
        **{kind: [row for row in scores if row["kind"] == kind and row["use"] != "positive"] for kind in kinds},
    }
    drawn, panels = new_panels(1.2 + 0.45 * len(groups), 1, len(methods), sharey=True)
    drawn.get_layout_engine().set(wspace=0.06)  # the outer tick labels of neighbours need room
    rows = []
    for axes, (label, method) in zip(panels, methods.items(), strict=True):
        axes.set_title(label.replace(" ", "\n"))
        for place, (kind, pairs) in enumerate(groups.items()):
            found = scores_of(pairs, method)
            draw_strip(axes, found, place, PALE if place == 0 else MAIN)
            rows += [(kind, label, score) for score in found]
    label_rows(panels[0], [kind.replace("-", ", ") for kind in groups])
    return drawn, panels, rows


@figure(sizes=partial(read_table, "scores", data_path("zoo/sizes")))
def strangers_by_width(
    sizes: Rows, methods: Sequence[str] = ("virtual_response_whitened", "aligned_neurons")
) -> Drawing:
    """Scores of strangers and of relatives of many sizes, against the width of the narrower one of each pair, and
    where evidence begins if one level is to serve all of them. Donors of a single expert are left out.
    Data: method, use, width, score; one row a pair."""
    pairs = [row for row in sizes if not row["kind"].endswith("donor")]
    rows, told = [], []
    drawn, panels = new_panels(3.6, 1, len(methods), sharey=True)
    for axes, method in zip(panels, methods, strict=True):
        for style, use, aside in zip(SERIES, ("stranger", "relative"), (0.95, 1.05), strict=False):
            found = [
                (use, min(row["width_a"], row["width_b"]), row[method])
                for row in pairs
                if row["use"] == use and row[method] is not None
            ]
            places, heights = [aside * width for _, width, _ in found], [score for *_, score in found]
            look = style | {"linestyle": "", "markersize": 4, "alpha": 0.5}
            axes.plot(places, heights, label=f"{use}s", **look)
            rows += [(method, *pair) for pair in found]
            told.append(f"{method} of {len(found)} {use}s {min(heights):.2f} to {max(heights):.2f}")
        level = CORRELATION.level([score for name, use, _, score in rows if (name, use) == (method, "stranger")])
        axes.axhline(level, color=INK, linestyle="--", linewidth=1, label="evidence begins")
        widths = sorted({width for _, _, width, _ in rows})
        axes.set_xscale("log", base=2)
        apart = [width for width, wider in zip(widths, [*widths[1:], np.inf], strict=True) if wider > 1.21 * width]
        axes.set_xticks(apart, [f"{width:.0f}" for width in apart])
        axes.minorticks_off()
        axes.set(title=title_of(method), xlabel="width of the narrower model")
    panels[0].set(ylabel="score", ylim=(-0.1, 1.05))
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    alt = f"Scores against the width of models, strangers low and relatives high at each: {'; '.join(told)}."
    return drawn, columns(("method", "use", "width", "score"), rows), alt


def draw_strip(axes: Axes, values: list[float], height: float, colour: str) -> None:
    """A dot for each value, one beside the other around a height."""
    heights = height + np.linspace(-0.25, 0.25, len(values))
    axes.plot(values, heights, "o", markersize=3, color=colour, markeredgecolor=INK, markeredgewidth=0.3)


@figure(scores=scores)
def p_values_of_strangers(scores: Rows, tests: Iterable[str] = ("csu", "permutation_test")) -> Drawing:
    """Whether p-values keep their promise: among strangers, a share p of them is at most p.
    Data: method, p_value, share; every p-value in ascending order, and the share of strangers up to it."""
    rows, small = [], []
    drawn, (axes,) = new_panels(3.6)
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, label="what is promised")
    for style, test in zip(SERIES, tests, strict=False):
        found = sorted(scores_of(strangers_of(scores), f"{test}_p"))
        shares = np.arange(1, len(found) + 1) / len(found)
        label = f"{test.replace('_', ' ')}, {len(found)} pairs"
        axes.step(found, shares, where="post", label=label, **style | {"marker": ""})
        rows += [(test, *step) for step in zip(found, shares, strict=True)]
        small.append(f"{test}: {np.mean(np.array(found) <= 0.05):.1%} of strangers at most .05")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="p-value", ylabel="share of strangers up to it")
    axes.legend(loc="lower right")
    alt = f"Shares of strangers up to each p-value, beside the diagonal. {'; '.join(small)}."
    return drawn, columns(("method", "p_value", "share"), rows), alt


@figure(scores=scores, p_values=partial(read_table, "p_values"), calibration=partial(read_table, "calibration"))
def p_values_by_promise(scores: Rows, p_values: Rows, calibration: Rows) -> Drawing:
    """What every p-value of the benchmark says of strangers, by what it is: exact, nominal, or not about lineage.

    A p-value that keeps its promise stays on the diagonal or below it, give or take chance: among strangers, a share p
    of them is at most p.

    Data: promise, test, p_value, share; every p-value in ascending order, and the share of tests up to it.
    """
    promises = {}  # promise -> test -> p-values
    for row in calibration:
        test, column = row["method"], f"{row['method']}_p"
        found = [one["p_value"] for one in p_values if one["test"] == test]
        if column in scores[0]:
            found = scores_of(strangers_of(scores), column)
        promises.setdefault(row["p_value"], {})[test] = sorted(found)
    rows, small = [], []
    xlabel = "p-value"
    drawn, panels = new_panels(3.9, 1, len(promises), sharey=True, xlabel=xlabel)
    for axes, (promise, tests) in zip(panels, promises.items(), strict=True):
        axes.plot([LEAST_P, 1], [LEAST_P, 1], color=QUIET, linewidth=1)
        for style, (test, found) in zip(SERIES, tests.items(), strict=False):
            label = test.removeprefix("token_agreement, ").replace("_", " ")
            shares = np.arange(1, len(found) + 1) / len(found)
            axes.step(np.maximum(found, LEAST_P), shares, where="post", label=label, **style | {"marker": ""})
            rows += [(promise, test, *step) for step in zip(found, shares, strict=True)]
            small.append(f"{test.replace('_', ' ')} ({promise}) {np.mean(np.array(found) <= 0.05):.0%}")
        axes.set(title=promise, xscale="log", yscale="log", xlim=(LEAST_P, 1), ylim=(LEAST_P, 8))
        axes.set_yticks([1e-3, 1e-2, 1e-1, 1])
        axes.legend(loc="upper left", fontsize=10, handlelength=1.2, borderpad=0)
    panels[0].set_ylabel("share of strangers up to it")
    alt = f"""Shares of tests of strangers up to each p-value, both on a logarithmic scale, in three panels with a
        diagonal, on or below which a p-value that keeps its promise stays. At most .05 were: {"; ".join(small)}."""
    return drawn, columns(("promise", "test", "p_value", "share"), rows), alt


@figure(palimpsest=partial(read_table, "palimpsest"))
def orders_remembered(palimpsest: Rows, shown: Sequence[str] = REMEMBERING) -> Drawing:
    """Which models tell the order in which a root was trained: palimpsest, beside a reference, within domains.
    `shown`: the kinds of models that are drawn. Data: of all rows that are given."""
    names = [name for name in shown if name in map(_seen_from_its_root, palimpsest)]
    told = []
    drawn, (axes,) = new_panels(1.3 + 0.36 * len(names))
    for style, root in zip(SERIES, dict.fromkeys(row["order_of"] for row in palimpsest), strict=False):
        rows = [row for row in palimpsest if row["order_of"] == root]
        kept = [row for row in rows if _seen_from_its_root(row) in names]
        heights = [names.index(_seen_from_its_root(row)) for row in kept]
        rhos = [row["rho_within_domains"] for row in kept]
        axes.plot(rhos, heights, label=f"order of {root}", **style | {"linestyle": "", "markersize": 8})
        told.append(f"{root} {sum(row['p_value_within_domains'] <= RARE for row in rows)} of {len(rows)}")
    rare = NormalDist().inv_cdf(1 - RARE) / (EXAMPLES - 1) ** 0.5
    axes.axvline(0, color=QUIET, linewidth=0.8)
    axes.axvline(rare, color=INK, linestyle="--", linewidth=1)
    axes.annotate(f" p = {RARE}", (rare, -0.42), va="center")
    label_rows(axes, names)
    axes.set_xlabel("rho of order and log-likelihood, within kinds of text")
    drawn.legend(loc="outside lower center", ncols=2)
    alt = f"""How well {len(names)} kinds of models tell the order in which two roots were trained, with a dashed line
        at p = {RARE}. Told, of all kinds, by: {"; ".join(told)}."""
    fields = ("order_of", "suspect", "relation", "rho_within_domains", "p_value_within_domains")
    return drawn, {name.removesuffix("_within_domains"): [row[name] for row in palimpsest] for name in fields}, alt


def _seen_from_its_root(row: Row) -> str:
    """The suspect as it is called in both families."""
    suspect, root = row["suspect"], row["order_of"]
    if row["relation"] in ("itself", "strangers") and suspect in FAMILIES:
        return row["relation"] if suspect == root else "the other root"
    return suspect.removeprefix(f"{root}-")


def group_of(row: Row) -> str:
    """The group of transformations that a pair of relatives belongs to, whether or not it was rewritten besides."""
    kind, plain = row["kind"], row["kind"].removesuffix("-gauged")
    if plain.endswith("-trained"):
        return "upcycled, then trained"
    return next(name for name, kinds in GROUPS.items() if {kind, plain} & set(kinds))


def share_found(relatives: Rows, strangers: Rows, method: str) -> float:
    """The share of relatives with a score above that of all but 1 % of the strangers; a refused pair has the lowest.
    NaN where the method refuses all relatives. Of "verdict", the share that is called related."""
    if method == "verdict":
        return float(np.mean([row["verdict"] in (SAME, SHARED) for row in relatives]))
    if not scores_of(relatives, method):
        return np.nan
    high, low = ([LOWEST if row[method] is None else row[method] for row in rows] for rows in (relatives, strangers))
    return float(np.mean(np.array(high) > sorted(low, reverse=True)[len(low) // 100]))


@figure(scores=scores)
def found_by_transformation(
    scores: Rows, rewritten: bool = False, methods: Sequence[str] = (*MAPPED[:1], *MAPPED[2:], "verdict")
) -> Drawing:
    """What share of its relatives each method finds at 1 % false positives, group by group of transformations.

    Strangers are those whose shapes differ as those of the group. The table transformations.csv of the benchmark has
    the transformations one by one, for all methods.

    rewritten: of relatives that were rewritten by all gauges besides, not of those as they were made.
    Data: transformation, method, found; empty where the method refuses all.
    """
    relatives = [row for row in scores if row["use"] == "positive" and is_rewritten(row) == rewritten]
    table = {}  # group -> shares
    for name in sorted({group_of(row) for row in relatives}, key=list(GROUPS).index):
        some = [row for row in relatives if group_of(row) == name]
        shapes = {row["shapes"] for row in some}
        alike = [row for row in scores if row["use"] == "evaluation" and row["shapes"] in shapes]
        table[name] = [share_found(some, alike, method) for method in methods]
    title = f"Relatives found, {'rewritten by all gauges' if rewritten else 'as made'}"
    return _draw_table(title, ("transformation", "method", "found"), table, methods)


@figure(scores=scores)
def gauge_map(scores: Rows, model: str = "alder", methods: Sequence[str] = MAPPED) -> Drawing:
    """What each gauge leaves of the score of a model with itself: 1 is everything.
    Data: gauge, method, score. Empty where a method refuses."""
    rows = [row for row in scores if row["use"] == "invariance" and row["a"] == model]
    table = {row["kind"]: [row[method] for method in methods] for row in rows}
    return _draw_table("Score of a model with its rewritten copy", ("gauge", "method", "score"), table, methods)


def _draw_table(title: str, names: Sequence[str], table: Mapping[str, list], methods: Sequence[str]) -> Drawing:
    """A table with a column for each method, given as row -> numbers; `names` of the data."""
    drawn, (axes,) = new_panels(1.9 + 0.34 * len(table), title=title, xlabel="empty: the method refuses")
    values = np.array(list(table.values()), dtype=float)
    heatmap(axes, values, "z.2f", rows=[name.replace("_", " ") for name in table], size=11)
    axes.set_xticks(range(len(methods)), [title_of(method).replace(" ", "\n", 1) for method in methods], rotation=45)
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0, labelsize=11)
    for label in axes.get_xticklabels():
        label.set(ha="left", va="bottom", rotation_mode="anchor")
    lowest = list(table)[np.nanmean(values, axis=1).argmin()]
    rows = [(name, *cell) for name, line in table.items() for cell in zip(methods, line, strict=True)]
    alt = f"{title}, {len(table)} rows, a column for each of {len(methods)} methods; the lowest row is {lowest}."
    return drawn, columns(names, rows), alt
