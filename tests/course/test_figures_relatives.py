"""The figures of notebook 07 against the tree itself."""

import csv

import numpy as np
import pytest
import torch

from minimoe.course import figures
from minimoe.course.figures import relatives
from minimoe.course.figures.relatives import Place, Relative
from minimoe.course.shipped import zoo_model
from minimoe.fingerprints.behaviour import moved_probability, predictions
from minimoe.fingerprints.layer_cosines import ATTENTION, MLP, ROLES, angles
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.derive import prune_layers
from minimoe.lineage.tree import MEMBERS
from minimoe.lineage.zoo import ancestors, relation
from minimoe.model import MoEConfig, MoEForCausalLM
from tests.course.test_figures import fits_its_page
from workshop.build import FIGURE_DATA


@pytest.fixture(scope="module")
def model():
    config = MoEConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        num_experts=0,
    )
    return MoEForCausalLM(config, seed=1)


# --- the family tree --------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["alder", "birch"])
def test_the_tree_shows_every_member_that_was_not_rewritten(root):
    drawn, data = figures.family_tree(relatives.family_of(root))
    gauged = {name for name, member in MEMBERS.items() if member.recipe in ("one_gauge", "all_gauges")}
    named = [name for name in MEMBERS if name == root or name.startswith(f"{root}-")]
    assert sorted(data["name"]) == sorted(name for name in named if not gauged & {name, *ancestors(name)})
    for name, group, true, parents in zip(*(data[of] for of in ("name", "group", "relation", "parents")), strict=True):
        assert true == relation(root, name)
        assert tuple(parents.split()) == MEMBERS[name].parents
        assert (true == "shared lineage") == (group not in ("teacher and student", "same first weights"))
    assert len(set(zip(data["x"], data["y"], strict=True))) == len(data["name"]), "two names in one place"
    strangers = sum(relation(root, name) == "strangers" for name in MEMBERS)
    assert f"{strangers} strangers" in drawn.get_label()


def test_a_family_of_ones_own_can_be_drawn():
    """A chain: each box is one column further right, and each arrow comes from the box before."""
    rows = [
        ("root", "root", ()),
        ("tuned", "tuned", ("root",)),
        ("merged", "merged", ("tuned",)),
        ("x", "strangers", ()),
    ]
    family = [
        Relative(name, name, group, "strangers" if group == "strangers" else "shared lineage", parents)
        for name, group, parents in rows
    ]
    drawn, data = figures.family_tree(family)
    assert data["name"] == ["root", "tuned", "merged"]
    assert data["x"] == sorted(set(data["x"]))
    assert "Arrows: root to tuned (weights); tuned to merged (weights)." in drawn.get_label()


def test_arrows_come_from_parents():
    groups = {}
    for one in relatives.family_of("alder"):
        groups.setdefault(one.group, []).append(one)
    arrows = relatives.arrows(groups)
    for source, target in arrows:
        if target != "same first weights":  # which has no parent
            parents = {parent for one in groups[target] for parent in one.parents}
            assert parents & {one.name for one in groups[source]}
    assert {target for _, target in arrows} == set(groups) - {"alder", "rewritten", "strangers"}


def test_there_is_no_family_of_a_descendant():
    with pytest.raises(ValueError, match="root='alder-copy': wanted a member without parents"):
        relatives.family_of("alder-copy")


# --- the map and the scatter ------------------------------------------------------------------------------


def test_what_was_left_alone_has_not_turned():
    alder = zoo_model("alder")
    for name, changed in (("alder-lora", ATTENTION), ("alder-drop-0.5", MLP)):
        drawn, data = figures.turned_vectors(zoo_model(name), alder, name=name)
        assert name in drawn.get_label()
        for role, degrees, same in zip(data["role"], data["degrees"], data["same"], strict=True):
            assert (degrees > 1) == (role in changed)
            assert same == (0.5 if role in MLP else 1.0) or name == "alder-lora"


def test_the_map_has_the_layers_of_the_child_from_the_top(model):
    child = prune_layers(MoEForCausalLM(model.config, seed=2), [0])
    drawn, data = figures.turned_vectors(child, model, name="mine")
    assert [label.get_text() for label in drawn.axes[0].get_xticklabels()] == list(ROLES)
    assert [float(text.get_text()) for text in drawn.axes[0].texts] == pytest.approx(data["degrees"], abs=0.51)
    assert data["layer"] == [0] * 7 + [1] * 7


def test_a_place_is_the_mean_angle_and_what_moved(model):
    ids, other = torch.arange(12).view(2, 6), MoEForCausalLM(model.config, seed=2)
    (place,) = relatives.measure_places([("other", "merged", other)], model, ids)
    degrees = np.concatenate([*angles(open_weights(other), open_weights(model)).values()])
    assert place.degrees == pytest.approx(degrees.mean())
    assert place.moved == pytest.approx(moved_probability(*(predictions(each, ids) for each in (other, model))))


def test_the_scatter_shows_the_places_it_is_given():
    places = [
        Place("near", "merged", 5.0, 0.1),
        Place("far", "merged", 50.0, 0.4),
        Place("else", "strangers", 72.0, 0.5),
    ]
    drawn, data = figures.weights_and_behaviour(places, parent="mine", labels={"else": "a stranger"})
    merged, apart = drawn.axes[0].lines
    assert (merged.get_label(), merged.get_xydata().tolist()) == ("merged", [[5.0, 0.1], [50.0, 0.4]])
    assert (apart.get_label(), apart.get_xydata().tolist()) == ("no similar vector", [[72.0, 0.5]])
    assert [text.get_text() for text in drawn.axes[0].texts] == ["a stranger"]
    assert data["name"] == ["near", "far", "else"]


# To measure all 33 models takes as long as a dozen other figures; notebook 07 does. Here a third of them are.


def committed_places():
    with open(FIGURE_DATA / "weights_and_behaviour.csv", encoding="utf-8", newline="") as file:
        return [Place(name, group, *map(float, numbers)) for name, group, *numbers in list(csv.reader(file))[1:]]


def test_the_committed_places_are_those_of_the_shipped_figure(monkeypatch):
    known = {place.name: place for place in committed_places()}
    compared = {group: kinds[::3] for group, kinds in relatives._COMPARED.items()}
    shipped = [f"alder-{kind}" for kinds in relatives._COMPARED.values() for kind in kinds] + [*relatives._APART]
    assert [*known] == shipped
    monkeypatch.setattr(relatives, "_COMPARED", compared)
    monkeypatch.setattr(relatives, "_APART", relatives._APART[::3])
    found = relatives.places_of_the_zoo.__wrapped__()
    assert len(found) == 12
    for place in found:
        assert place[:2] == known[place.name][:2]
        assert place[2:] == pytest.approx(known[place.name][2:], rel=1e-3, abs=1e-4)
    drawn, data = figures.weights_and_behaviour(committed_places())
    assert figures.to_csv(data) == (FIGURE_DATA / "weights_and_behaviour.csv").read_text(encoding="utf-8")
    assert "33 models" in drawn.get_label() and fits_its_page(drawn)


def test_the_scatter_knows_what_is_exact():
    moved, degrees = ({place.name: getattr(place, of) for place in committed_places()} for of in ("moved", "degrees"))
    for name, member in MEMBERS.items():
        if name in moved and member.exact:
            assert moved[name] < 1e-4
    unchanged = ("copy", "virtual-groups", "fewer-neurons", "fewer-layers", "deepened", "sliced")
    assert max(degrees[f"alder-{kind}"] for kind in unchanged) < 1e-4
