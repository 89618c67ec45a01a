"""The figures of notebook 12 against matrices multiplied here, and against the rows of the shipped tables."""

import csv

import numpy as np
import pytest
import torch

from minimoe.course import figures
from minimoe.course.figures.provenance import REWRITINGS, shallow
from minimoe.data_files import data_path
from minimoe.fingerprints.merges import Cell, Shares
from minimoe.lineage.zoo import Zoo
from minimoe.model import MoEForCausalLM


def table(data):
    shape = [max(data[side]) + 1 for side in ("layer_a", "layer_b")]
    return np.array(data["cosine"]).reshape(shape)


def test_a_copy_lies_where_it_was_taken_from():
    for kept in ("0 2 4 6", "3 4"):
        found = table(figures.layers_of_a_copy(kept=kept)[1])
        assert found.shape == (len(kept.split()), 8)
        assert found.argmax(1).tolist() == [int(layer) for layer in kept.split()]
        assert found.max(1) == pytest.approx(1.0, abs=1e-5)
        assert abs(found[~np.isclose(found, 1.0, atol=1e-5)]).max() < 0.1


def test_a_model_of_ones_own_is_copied():
    drawn, data = figures.layers_of_a_copy(Zoo().load("alder"), "3 1", name="mine")
    assert drawn.axes[0].get_xlabel() == "layer of mine"
    assert table(data).argmax(1).tolist() == [1, 3]  # in the order of the model


def test_the_numbers_are_cosines_of_the_stored_matrices():
    model = MoEForCausalLM.from_pretrained(data_path("zoo/deep-1"), dtype=torch.float32)
    layers = [
        [getattr(block.self_attn, f"{role}_proj").weight for role in "qkvo"]
        + [getattr(block.mlp, f"{role}_proj").weight for role in ("gate", "up", "down")]
        for block in model.model.layers
    ]
    wanted = np.mean(
        [
            torch.cosine_similarity(x.flatten(), y.flatten(), dim=0).item()
            for x, y in zip(layers[4], layers[5], strict=True)
        ]
    )
    assert table(figures.layers_of_a_copy()[1])[2, 5] == pytest.approx(wanted, abs=1e-5)


@torch.no_grad()
def test_rewritings_that_keep_the_function_keep_it_and_hide_the_map():
    tokens = torch.arange(1, 60).view(1, -1)
    logits = shallow()(tokens).logits
    for rewriting in ("neurons permuted", "all gauges"):
        assert shallow(rewriting=rewriting)(tokens).logits == pytest.approx(logits, abs=1e-3)
    best = {name: table(figures.layers_of_a_copy(rewriting=name)[1]).max() for name in REWRITINGS}
    assert best["none"] > best["8 bits"] > best["4 bits"] > 0.98
    assert 0.4 < best["neurons permuted"] < 0.7  # four of seven matrices are left
    assert best["all gauges"] < 0.1


def test_what_cannot_be_made_is_refused():
    refused = (
        (("", "none"), "kept=''"),
        (("0 8", "none"), "layers 0 to 7"),
        (("a", "none"), "kept='a'"),
        (("0", "x"), "'x'"),
    )
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            shallow(*arguments)


def test_real_layers_are_the_rows_of_the_table():
    data = figures.layer_origins()[1]
    with open(data_path("published/real_layers.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    drawn = dict(
        zip(zip(data["a"], data["b"], data["layer_a"], data["layer_b"], strict=True), data["cosine"], strict=True)
    )
    assert len(drawn) == len(rows) == 36 + 18
    for row in rows:
        a, b, i, j = row["a"], row["b"], int(row["layer_a"]), int(row["layer_b"])
        key = (b, a, j, i) if b == "sre-embedding-model" else (a, b, i, j)
        assert drawn[key] == float(row["cosine"])


def test_tables_of_ones_own_are_drawn_with_their_layers_from_the_top():
    cosines = np.array([[0.0, 0.9, 0.1], [0.2, 0.0, 0.8]])
    drawn, data = figures.layer_origins({("mine", "yours"): cosines})
    assert table(data).tolist() == cosines.tolist()
    (axes,) = drawn.axes
    written = {tuple(text.get_position()): (text.get_text(), text.get_weight()) for text in axes.texts}
    assert written[1, 0] == ("0.90", "bold") and written[0, 1] == ("0.20", "normal")
    assert (axes.get_title(loc="left"), axes.get_xlabel()) == ("mine", "layer of yours")


def test_alt_texts_say_what_the_maps_show():
    tuned, small = figures.layer_origins()[0].get_label().split("paraphrase-MiniLM-L3-v2 beside")
    assert all(f"{layer} with {layer} (1.00)" in tuned for layer in range(6))
    assert "(1.00)" not in small and "-0.00" not in small
    assert "1 with 2 (1.00)" in figures.layers_of_a_copy()[0].get_label()


def test_a_merge_that_cannot_be_told_leaves_cells_empty():
    cell = Cell(0, "qk", (0.25, 0.75), (0.0, 0.0), 0.0, 1.0)
    cells = (cell._replace(layer=None, role="head"), cell, cell._replace(role="vo", shares=None))
    found = Shares(model="m", parents=("folder/a", "b$"), base=None, cells=cells)
    drawn, data = figures.merge_shares(found)
    assert data["share"] == [0.25, "", 0.75, ""] and data["parent"] == ["a", "a", "b$", "b$"]
    assert [axes.get_title("left") for axes in drawn.axes] == ["share of a", "share of b$"]
    assert "qk 0.25 0.75; vo not told" in drawn.get_label()
