"""Which layers a model took from another: the figures of notebook 12."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from minimoe.course.figures.drawing import heatmap, new_panels
from minimoe.course.figures.register import Drawing, cell_columns, columns, figure
from minimoe.course.published import read_published
from minimoe.course.shipped import zoo_model
from minimoe.fingerprints.layer_cosines import layer_cosines
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.derive import prune_layers, quantise
from minimoe.lineage.gauge import all_gauges, permute_neurons
from minimoe.model import MoEForCausalLM
from minimoe.model.config import require

EVERY_SECOND = "0 2 4 6"
REWRITINGS: dict[str, Callable[[MoEForCausalLM], MoEForCausalLM]] = {
    "none": lambda model: model,
    "8 bits": partial(quantise, bits=8),
    "4 bits": partial(quantise, bits=4),
    "neurons permuted": partial(permute_neurons, seed=1),
    "all gauges": partial(all_gauges, seed=1),
}


def shallow(kept: str = EVERY_SECOND, rewriting: str = "none", *, deep: MoEForCausalLM | None = None) -> MoEForCausalLM:
    """A copy of a model of which only the layers with the numbers in `kept` are left, rewritten afterwards by one of
    `REWRITINGS`. The model is `deep`; None: deep-1 of the zoo.

    Raises ValueError for no layers, one that it does not have, or an unknown rewriting.
    """
    deep = deep or zoo_model("deep-1")
    layers, depth = kept.split(), deep.config.num_hidden_layers
    known = layers and set(map(str, range(depth))).issuperset(layers)
    require(known, "kept", kept, f"some of the layers 0 to {depth - 1}, as {EVERY_SECOND!r}")
    require(rewriting in REWRITINGS, "rewriting", rewriting, f"one of {', '.join(REWRITINGS)}")
    return REWRITINGS[rewriting](prune_layers(deep, set(range(depth)) - set(map(int, layers))))


@figure(deep=partial(zoo_model, "deep-1"))
def layers_of_a_copy(
    deep: MoEForCausalLM, kept: str = EVERY_SECOND, rewriting: str = "none", *, name: str = "deep-1"
) -> Drawing:
    """The cosine of every layer of a shallow copy with every layer of the model it was made from.
    Data: layer_a (of the copy), layer_b, cosine. Raises what `shallow` raises."""
    table = layer_cosines(open_weights(shallow(kept, rewriting, deep=deep)), open_weights(deep)).mean(-1)
    drawn, (axes,) = new_panels(0.9 + 0.36 * len(table))
    heatmap(axes, table, top=2, bold=table > 0.5)
    axes.set(ylabel="layer of the copy", xlabel=f"layer of {name}")
    alt = f"""A table of cosines, layer by layer, of a copy with the layers {kept}, rewritten: {rewriting}.
        {_largest_in_words(table)}"""
    layers, depth = map(range, table.shape)
    return drawn, cell_columns({"layer_a": layers, "layer_b": depth}, cosine=table), alt


def measured_cosines() -> dict[tuple[str, str], np.ndarray]:
    """(model, model it may have layers of) -> the mean cosine of each layer with each of the other, of real models."""
    l6, l3, tuned = "all-MiniLM-L6-v2", "paraphrase-MiniLM-L3-v2", "sre-embedding-model"

    def read(a: str, b: str) -> np.ndarray:
        rows = [row for row in read_published("real_layers") if (row["a"], row["b"]) == (a, b)]
        return np.reshape([float(row["cosine"]) for row in rows], (-1, 6))  # each second model has 6 layers

    return {(tuned, l6): read(l6, tuned).T, (l3, l6): read(l3, l6)}


@figure(tables=measured_cosines)
def layer_origins(tables: Mapping[tuple[str, str], np.ndarray]) -> Drawing:
    """The cosine of every layer of a model with every layer of another, for some pairs of them."""
    rows, said = [], []
    drawn, panels = new_panels(4.6, len(tables), height_ratios=[len(table) for table in tables.values()])
    for axes, ((a, b), table) in zip(panels, tables.items(), strict=True):
        heatmap(axes, table, top=2, bold=table > 0.5)
        axes.set(title=a, ylabel="its layer", xlabel=f"layer of {b}")
        rows += [(a, b, *place, cosine) for place, cosine in np.ndenumerate(table)]
        said.append(f"{a} beside {b}: {_largest_in_words(table)}")
    alt = f"Tables of cosines, layer by layer. {' '.join(said)}"
    return drawn, columns(("a", "b", "layer_a", "layer_b", "cosine"), rows), alt


def _largest_in_words(table: np.ndarray) -> str:
    best = ", ".join(f"{layer} with {row.argmax()} ({row.max():z.2f})" for layer, row in enumerate(table))
    return f"Largest cosine of each layer: {best}."
