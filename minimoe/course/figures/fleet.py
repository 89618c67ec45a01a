"""Relatives among many models: how often they are found, what a search takes, and forests: figures of notebook 12."""

import math
from functools import partial

from minimoe.course.figures.drawing import new_panels, note
from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.style import INK, MAIN, QUIET, SERIES, WIDTH, new_figure
from minimoe.fingerprints.zoo_scores import Rows, read_table
from minimoe.fleet.forest import Forest

WANTED = 0.99
_LINE = 0.2  # inches a model


@figure(scale=partial(read_table, "fleet_scale"))
def fleet_recall(scale: Rows) -> Drawing:
    """How often the true parent of a model is among the twenty nearest of a store, by what its strangers are like, and
    what a query takes. Which change hides parents best, and how often they are found after it, stands in the data.
    Data: law, size, recall_20, worst, worst_recall_20, processor_seconds, megabytes; one row a store."""
    drawn, (left, right) = new_panels(3.8, 1, 2, xlabel="models in the store")
    laws = list(dict.fromkeys(row["law"] for row in scale))
    for style, law in zip(SERIES, laws, strict=False):
        rows = [row for row in scale if row["law"] == law]
        sizes = [row["size"] for row in rows]
        left.plot(sizes, [row["recall_20"] for row in rows], **style, label=law.replace(", ", ",\n"))
    timed = [row for row in scale if row["processor_seconds"] is not None]
    right.plot([row["size"] for row in timed], [row["processor_seconds"] for row in timed], **SERIES[0])
    for row in timed:
        to_the_left = row is timed[-1]
        note(right, f"{row['megabytes']:,.0f} MB", (row["size"], row["processor_seconds"]), -8 if to_the_left else 8)
    left.axhline(WANTED, color=INK, linestyle="--", linewidth=1)
    left.set(xscale="log", ylim=(0.98, 1.001), title="parents in the first 20")
    left.legend(loc="lower left", fontsize=8)
    right.set(xscale="log", yscale="log", title="processor seconds a query")
    right.axhline(1, color=INK, linestyle="--", linewidth=1)
    largest = max(row["size"] for row in scale)
    found = "; ".join(
        f"{row['law']}: {row['recall_20']:.3f}, after the worst change, {row['worst']}, {row['worst_recall_20']:.2f}"
        for row in scale
        if row["size"] == largest
    )
    slowest = max(timed, key=lambda row: row["size"])["processor_seconds"]
    alt = f"""Share of parents among the twenty nearest of {largest:,.0f} models. {found}. A query takes {slowest:.2g}
        seconds of processors there."""
    names = ("law", "size", "recall_20", "worst", "worst_recall_20", "processor_seconds", "megabytes")
    return drawn, columns(names, ([row[name] for name in names] for row in scale)), alt


@figure(listed=False)
def lineage_tree(tree: Forest) -> Drawing:
    """A forest: roots at the left, children below and to the right of their parents, dashed where the direction of a
    link was not told.
    Data: name, parent, similarity, known, x and y (steps from the root, line from the top)."""
    drawn = new_figure(max(1.0, _LINE * (len(tree.nodes) + 1)))
    (axes,) = [drawn.subplots()]
    places: dict[str | None, tuple[float, float]] = {None: (-1, math.nan)}
    for line, node in enumerate(tree.nodes):
        x = places[node.parent][0] + 1
        places[node.name] = x, line
        if node.parent is not None:
            above = places[node.parent]
            axes.plot(
                (above[0], above[0], x), (above[1], line, line), color=QUIET, linestyle="-" if node.known else ":"
            )
        axes.plot(x, line, "o", color=MAIN if node.parent is None else INK, markersize=4)
        note(axes, node.name if node.similarity is None else f"{node.name}  {node.similarity:.2f}", (x, line), 7)
    deepest = max((x for x, _ in places.values()), default=0)
    axes.set(xlim=(-0.2, deepest + WIDTH / 2), ylim=(len(tree.nodes) - 0.4, -0.6))
    axes.axis("off")
    roots = [node.name for node in tree.nodes if node.parent is None]
    links = ", ".join(f"{node.name} from {node.parent}" for node in tree.nodes if node.parent is not None)
    alt = f"{len(roots)} trees of models, with the roots {', '.join(roots)}. Links: {links or 'none'}."
    rows = [(*node, *places[node.name]) for node in tree.nodes]
    return drawn, columns(("name", "parent", "similarity", "known", "x", "y"), rows), alt
