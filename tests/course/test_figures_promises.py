"""The figures of notebook 10 against weights, tables and counts that are read or computed another way."""

import csv
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from scipy.optimize import linear_sum_assignment

from minimoe.course import figures
from minimoe.course.figures import promises
from minimoe.course.shipped import zoo_weights
from minimoe.data_files import data_path
from minimoe.lineage.derive import neurons
from minimoe.lineage.zoo import Zoo


def rows_of(data):
    return [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]


def benchmark():
    with open(data_path("zoo") / "benchmark" / "scores.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- the order of neurons -----------------------------------------------------------------------------------


def stored_up(name, layer):
    """Up rows out of the file, the norm before them folded in, of length 1."""
    tensors = load_file(data_path("zoo") / name / "model.safetensors")
    place = f"model.layers.{layer}"
    rows = tensors[f"{place}.mlp.up_proj.weight"].float() * tensors[f"{place}.post_attention_layernorm.weight"].float()
    return (rows / rows.norm(dim=1, keepdim=True)).numpy()


def test_neurons_have_the_partners_of_the_largest_sum():
    parent, others = (zoo_weights("alder"), {"one": zoo_weights("stranger-13")})
    for layer in (0, 3):
        drawn, data = figures.neuron_order(parent, others, layer)
        found = rows_of(data)
        assert drawn.axes[0].lines[0].get_ydata().tolist() == data["partner"]
        alike = stored_up("alder", layer) @ stored_up("stranger-13", layer).T
        best = alike[linear_sum_assignment(-alike)].sum()
        assert sorted(r["partner"] for r in found) == list(range(256))
        assert sum(alike[r["neuron"], r["partner"]] for r in found) == pytest.approx(best, abs=1e-3)
        assert [r["cosine"] for r in found] == pytest.approx(
            [alike[r["neuron"], r["partner"]] for r in found], abs=1e-5
        )


def test_only_a_fine_tuned_model_keeps_its_order():
    in_place = {}
    for row in rows_of(figures.neuron_order()[1]):
        in_place[row["pair"]] = in_place.get(row["pair"], 0) + (row["neuron"] == row["partner"])
    assert in_place["fine-tuned"] == 256 and in_place["strangers"] < 8
    assert in_place["strangers"] < in_place["same first weights"] < 128


# --- what a verdict is worth --------------------------------------------------------------------------------


def test_a_verdict_is_worth_the_share_of_relatives_among_those_called():
    """Counted out in a population in which exactly one pair in so many is related."""
    for counts in ((490, 0, 490, 695), (268, 64, 490, 695), (0, 3, 490, 695), (7, 20, 10, 20)):
        found, flagged, relatives, strangers = counts
        data = figures.worth_of_a_verdict(1000, found, flagged, relatives=relatives, strangers=strangers)[1]
        for one_in, low, right, high in zip(*data.values(), strict=True):
            called, wrongly = Fraction(found, relatives), (one_in - 1) * Fraction(flagged, strangers)
            assert right == pytest.approx(float(called / (called + wrongly)))
            assert low <= right <= high


def test_the_band_is_that_of_the_exact_intervals():
    data = figures.worth_of_a_verdict(50, 216, 5)[1]
    true, false = (stats.binomtest(*counts).proportion_ci() for counts in ((216, 546), (5, 1353)))
    place = data["one_in"].index(50)
    assert data["low"][place] == pytest.approx(true.low / (true.low + 49 * false.high))
    assert data["high"][place] == pytest.approx(true.high / (true.high + 49 * false.low))


def test_the_mark_can_stand_anywhere_and_verdicts_are_worth_less_where_relatives_are_rarer():
    data = figures.worth_of_a_verdict(37, 300, 20)[1]
    assert 37 in data["one_in"] and data["one_in"] == sorted(data["one_in"])
    for end in ("low", "right", "high"):
        assert (np.diff(data[end]) < 0).all()


def test_what_cannot_be_counted_is_refused():
    for arguments, message in (
        ({"found": 547}, "found=547: wanted 0 to 546"),
        ({"flagged": -1}, "flagged=-1: wanted 0 to 1353"),
        ({"one_in": 1}, "one_in=1: wanted at least 2"),
        ({"found": 0, "flagged": 0}, "found and flagged=0: wanted one of them above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            figures.worth_of_a_verdict(**arguments)


# --- behaviour ----------------------------------------------------------------------------------------------


def test_behaviour_is_that_of_the_table_and_misleads_both_ways():
    rows = rows_of(figures.behaviour_misleads()[1])
    table = benchmark()
    strangers = [row for row in rows if row["group"] == "strangers"]
    known = [row for row in table if row["relation"] == "strangers" and row["kind"] == "roots"]
    for method in ("token_agreement", "hidden_cka"):
        assert sorted(row[method] for row in strangers) == sorted(float(row[method]) for row in known)
    for kind, group in promises.BEHAVED.items():
        for root in ("alder", "birch"):
            (wanted,) = (row for row in table if (row["a"], row["b"]) == (root, f"{root}-{kind}"))
            (found,) = (row for row in rows if row["model"] == f"{root}-{kind}")
            assert found["group"] == group
            assert found["token_agreement"] == float(wanted["token_agreement"])
            assert found["hidden_cka"] == float(wanted["hidden_cka"])
    agreement = {row["model"]: row["token_agreement"] for row in rows}
    of_strangers = [row["token_agreement"] for row in strangers]
    for root in ("alder", "birch"):
        assert agreement[f"{root}-finetuned"] < min(of_strangers) < max(of_strangers) < agreement[f"{root}-distilled"]


# --- where experts come from --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dropped():
    """The neurons of alder that each expert of alder-drop-0.5 has kept, by comparing weights: [L, E, 256]."""
    parent, suspect = (Zoo().load(name) for name in ("alder", "alder-drop-0.5"))
    return torch.stack(
        [
            (neurons(block.mlp.experts) == neurons(origin.mlp)).flatten(2).all(-1)
            for block, origin in zip(suspect.model.layers, parent.model.layers, strict=True)
        ]
    )


def test_the_neurons_found_again_are_those_that_were_kept(dropped):
    partners, rates = promises.trace_experts(*map(zoo_weights, ("alder", "alder-drop-0.5")))
    for (layer, expert), found in partners.items():
        kept = dropped[layer, int(expert)].numpy()
        assert (found[layer][kept] == np.flatnonzero(kept)).all()
        assert ((found >= 0).sum(1)[np.arange(4) != layer] < 10).all()
        assert (found[layer][~kept] >= 0).sum() < 10
        assert rates[layer, expert] == pytest.approx(1 - kept.mean(), abs=0.03)


def test_the_map_is_drawn_where_neurons_are_found(dropped):
    drawn, data = figures.attribution_map()
    marks = sum(len(collection.get_segments()) for collection in drawn.axes[0].collections)
    of_parent = [row for row in rows_of(data) if row["parent"] == "alder"]
    assert marks == sum(row["agreeing"] for row in of_parent)
    for row in of_parent:
        kept = int(dropped[row["layer"], int(row["expert"])].sum())
        if row["parent_layer"] == row["layer"]:
            assert 0.6 * kept < row["agreeing"] < 1.1 * kept  # training made some miss their origin
        else:
            assert row["agreeing"] < 10


def test_drop_rates_are_read_off_and_strangers_are_all_new():
    parents = {name: zoo_weights(name) for name in ("alder", "birch")}
    for suspect, truth in (("alder-copy-trained", 0.0), ("alder-drop-0.5-trained", 0.5), ("mixture-1", 1.0)):
        drawn, data = figures.attribution_map(zoo_weights(suspect), parents, name=suspect)
        found = {parent: [] for parent in parents}
        for row in rows_of(data):
            found[row["parent"]].append(row["drop_rate"])
        assert np.mean(found["alder"]) == pytest.approx(truth, abs=0.03), suspect
        assert np.mean(found["birch"]) > 0.99
        assert drawn.axes[0].get_title(loc="left") == f"{suspect}, traced to alder"


def test_experts_can_be_traced_to_one_parent_of_another_depth():
    drawn, data = figures.attribution_map(zoo_weights("mixture-1"), {"deep": zoo_weights("deep-1")})
    assert set(data["parent_layer"]) == set(range(8)) and set(data["layer"]) == set(range(4))
    assert [label.get_text() for label in drawn.axes[0].get_xticklabels()] == [f"layer {layer}" for layer in range(8)]
    assert np.mean(data["drop_rate"]) > 0.99
