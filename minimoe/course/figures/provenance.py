"""Which layers a model took from another: the figures of notebook 12."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
from matplotlib.axes import Axes

from minimoe.course.figures.register import Drawing, figure
from minimoe.course.published import read_published
from minimoe.course.style import INK, QUIET, describe, new_figure
from minimoe.fingerprints.layer_cosines import layer_cosines
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.derive import prune_layers, quantise
from minimoe.lineage.gauge import all_gauges, permute_neurons
from minimoe.lineage.zoo import Zoo
from minimoe.model import MoEForCausalLM

L6, L3, TUNED = "all-MiniLM-L6-v2", "paraphrase-MiniLM-L3-v2", "sre-embedding-model"  # of data/published/real_*.csv
DEEP, EVERY_SECOND = "deep-1", "0 2 4 6"
REWRITINGS: dict[str, Callable[[MoEForCausalLM], MoEForCausalLM]] = {
    "none": lambda model: model,
    "8 bits": partial(quantise, bits=8),
    "4 bits": partial(quantise, bits=4),
    "neurons permuted": partial(permute_neurons, seed=1),
    "all gauges": partial(all_gauges, seed=1),
}


@cache
def _deep() -> MoEForCausalLM:
    return Zoo().load(DEEP)


def shallow(kept: str = EVERY_SECOND, rewriting: str = "none") -> MoEForCausalLM:
    """A copy of a member of the zoo of which only some layers are `kept`, rewritten afterwards.

    Raises:
        ValueError: no layers, one that it does not have, or an unknown rewriting.
    """
    layers, depth = kept.split(), _deep().config.num_hidden_layers
    if not layers or not set(layers) <= set(map(str, range(depth))):
        raise ValueError(f"kept={kept!r}: wanted some of the layers 0 to {depth - 1}, as {EVERY_SECOND!r}")
    if rewriting not in REWRITINGS:
        raise ValueError(f"rewriting={rewriting!r}: wanted one of {', '.join(REWRITINGS)}")
    return REWRITINGS[rewriting](prune_layers(_deep(), set(range(depth)) - set(map(int, layers))))


@figure
def layers_of_a_copy(kept: str = EVERY_SECOND, rewriting: str = "none") -> Drawing:
    """The cosine of every layer of a shallow copy with every layer of the model it was made from.

    Data: layer_a (of the copy), layer_b, cosine.

    Raises:
        ValueError: as for `shallow`.
    """
    table = layer_cosines(open_weights(shallow(kept, rewriting)), open_weights(_deep())).mean(-1)
    drawn = new_figure(0.9 + 0.36 * len(table))
    axes = drawn.subplots()
    _draw(axes, table)
    axes.set(ylabel="layer of the copy", xlabel=f"layer of {DEEP}")
    describe(
        drawn,
        f"A table of cosines, layer by layer, of a copy with the layers {kept}, rewritten: {rewriting}. {_say(table)}",
    )
    places = np.indices(table.shape).reshape(2, -1).tolist()
    return drawn, dict(zip(("layer_a", "layer_b", "cosine"), (*places, table.flatten().tolist()), strict=True))


def measured_cosines(a: str, b: str) -> np.ndarray:
    """The mean cosine of every layer of one real model with every layer of another, [L, L'], from real_layers.csv."""
    rows = [row for row in read_published("real_layers") if (row["a"], row["b"]) == (a, b)]
    table = np.empty([1 + max(int(row[side]) for row in rows) for side in ("layer_a", "layer_b")])
    for row in rows:
        table[int(row["layer_a"]), int(row["layer_b"])] = float(row["cosine"])
    return table


@figure
def layer_origins() -> Drawing:
    """The cosine of every layer of a real model with every layer of another, for two pairs.

    Data: a, b, layer_a, layer_b, cosine.
    """
    tables = {(TUNED, L6): measured_cosines(L6, TUNED).T, (L3, L6): measured_cosines(L3, L6)}
    drawn = new_figure(4.6)
    panels = drawn.subplots(len(tables), 1, height_ratios=[len(table) for table in tables.values()])
    data: dict[str, list] = {name: [] for name in ("a", "b", "layer_a", "layer_b", "cosine")}
    for axes, ((a, b), table) in zip(panels, tables.items(), strict=True):
        _draw(axes, table)
        axes.set(ylabel="its layer", xlabel=f"layer of {b}")
        axes.set_title(a)
        for (i, j), cosine in np.ndenumerate(table):
            for column, cell in zip(data.values(), (a, b, i, j, float(cosine)), strict=True):
                column.append(cell)
    said = [f"{a} beside {b}: {_say(table)}" for (a, b), table in tables.items()]
    describe(drawn, f"Two tables of cosines, layer by layer. {' '.join(said)}")
    return drawn, data


def _say(table: np.ndarray) -> str:
    best = ", ".join(
        f"{layer} with {row.argmax()} ({round(row.max(), 2) + 0.0:.2f})" for layer, row in enumerate(table)
    )
    return f"Largest cosine of each layer: {best}."


def _draw(axes: Axes, table: np.ndarray) -> None:
    axes.imshow(table, cmap="Blues", vmin=0, vmax=2, aspect="auto")
    for (i, j), cosine in np.ndenumerate(table):
        high = cosine > 0.5
        axes.text(
            j,
            i,
            f"{round(cosine, 2) + 0.0:.2f}",
            ha="center",
            va="center",
            color=INK if high else QUIET,
            weight="bold" if high else None,
        )
    axes.set(xticks=range(table.shape[1]), yticks=range(table.shape[0]))
    axes.tick_params(length=0)
