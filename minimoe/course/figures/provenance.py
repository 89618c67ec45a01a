"""Which layers a model took from another: the figures of notebook 12."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from minimoe.course.figures.drawing import heatmap, new_panels
from minimoe.course.figures.register import Drawing, cell_columns, columns, figure
from minimoe.course.published import read_published
from minimoe.course.shipped import zoo_model, zoo_weights
from minimoe.fingerprints.layer_cosines import layer_cosines
from minimoe.fingerprints.merges import Shares, shares
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


def shares_of_branches() -> Shares:
    """Of a mixture whose experts are the MLPs of three models, and all else their mean, and which was trained on."""
    parents = ("alder-finetuned", "alder-continued-1", "alder-lora")
    found = shares(zoo_weights("alder-btx-trained"), list(map(zoo_weights, parents)))
    return replace(found, parents=parents)


@figure(found=shares_of_branches)
def merge_shares(found: Shares) -> Drawing:
    """What a merged model has of each parent in each role of each layer: a panel a parent. Where parents cannot be told
    apart, the cell is empty. Data: parent, layer, role, share."""
    cells = {(cell.layer, cell.role): cell.shares for cell in found.cells if cell.layer is not None}
    layers, roles = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))
    unknown = (np.nan,) * len(found.parents)
    table = np.array([[cells.get((layer, role)) or unknown for role in roles] for layer in layers])
    height = len(found.parents) * (0.5 + 0.32 * len(layers)) + 0.6
    drawn, panels = new_panels(height, len(found.parents), sharex=True, ylabel="layer")
    for axes, parent, values in zip(panels, found.parents, table.transpose(2, 0, 1), strict=True):
        heatmap(axes, values, rows=layers, columns=roles)
        axes.set_title(f"share of {Path(parent).name}", parse_math=False)
    names = [Path(parent).name for parent in found.parents]
    means = {role: found.mean(role=role)[0] for role in roles}
    said = [
        f"{role} {' '.join(f'{share:.2f}' for share in told) if told else 'not told'}" for role, told in means.items()
    ]
    alt = f"""Tables of shares by layer and role, one for each parent of a merged model: {", ".join(names)}. Means over
        the layers, a number a parent: {"; ".join(said)}."""
    return drawn, cell_columns({"parent": names, "layer": layers, "role": roles}, share=table.transpose(2, 0, 1)), alt
