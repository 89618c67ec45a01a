"""The figures of notebook 07 against the tree itself, and the two rulers against models whose distance is known."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minimoe.course import figures
from minimoe.course.figures import relatives
from minimoe.lineage.derive import prune_layers, prune_neurons
from minimoe.lineage.gauge import permute_neurons, rotate_residual
from minimoe.lineage.recipes import INSTANT
from minimoe.lineage.tree import MEMBERS
from minimoe.lineage.upcycling import upcycle
from minimoe.lineage.zoo import Zoo, ancestors, relation
from minimoe.model import MoEConfig, MoEForCausalLM


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


def of_roles(found, *roles):
    return np.concatenate([values for (_, role), values in found.items() if role in roles])


# --- the two rulers ---------------------------------------------------------------------------------------


def test_angles_are_those_of_a_loop(model):
    other = MoEForCausalLM(model.config, seed=2)
    found = relatives.angles_by_role(other, model)
    layers = model.state_dict()
    for role, name in (("v", "self_attn.v_proj"), ("down", "mlp.down_proj"), ("gate", "mlp.gate_proj")):
        rows = [layers[f"model.layers.{layer}.{name}.weight"] for layer in range(3)]
        known = [vector for matrix in rows for vector in (matrix.T if role == "down" else matrix)]
        child = other.state_dict()[f"model.layers.1.{name}.weight"]
        for vector, degrees in zip(child.T if role == "down" else child, found[1, role], strict=True):
            nearest = max(F.cosine_similarity(vector, each, dim=0).item() for each in known)
            assert degrees == pytest.approx(np.degrees(np.arccos(nearest)), abs=1e-3)


def test_what_only_lost_neurons_or_layers_or_their_order_has_not_turned(model):
    for child in (model, prune_neurons(model, 0.5), prune_layers(model, [1]), permute_neurons(model, seed=1)):
        assert max(values.max() for values in relatives.angles_by_role(child, model).values()) < 1e-4


def test_every_expert_counts(model):
    dropped = upcycle(model, num_experts=4, num_experts_per_tok=2, method="drop", drop_ratio=0.25)
    found = relatives.angles_by_role(dropped, model)
    for role in ("gate", "up", "down"):
        for layer in range(3):
            assert len(found[layer, role]) == 4 * 40
            assert (found[layer, role] > 1).mean() == 0.25
    assert of_roles(found, "q", "k", "v", "o").max() < 1e-4


def test_a_rotation_turns_every_vector(model):
    assert min(values.min() for values in relatives.angles_by_role(rotate_residual(model, seed=3), model).values()) > 10


def test_moved_probability_is_what_must_be_moved(model):
    ids = torch.arange(12).view(2, 6)
    other = MoEForCausalLM(model.config, seed=2)
    with torch.no_grad():
        a, b = (each(ids).logits.softmax(-1).flatten(0, 1) for each in (model, other))
    wanted = np.mean([(x - y).clamp(min=0).sum().item() for x, y in zip(a, b, strict=True)])
    ours, theirs = (relatives.predictions(each, ids) for each in (model, other))
    assert relatives.moved_probability(ours, theirs) == pytest.approx(wanted, abs=1e-5)
    assert relatives.moved_probability(ours, ours) == 0


def test_the_home_text_is_held_out_code_and_prose():
    ids = relatives.home_text()
    assert ids.shape == (16, 128)
    assert len({tuple(row) for row in ids.tolist()}) == 16


# --- the family tree --------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["alder", "birch"])
def test_the_tree_shows_every_member_that_was_not_rewritten(root):
    data = figures.family_tree(root)[1]
    gauged = {name for name, member in MEMBERS.items() if member.recipe in ("one_gauge", "all_gauges")}
    wanted = [
        name
        for name in MEMBERS
        if (name == root or name.startswith(f"{root}-")) and not gauged & {name, *ancestors(name)}
    ]
    assert sorted(data["name"]) == sorted(wanted)
    shown = dict(zip(data["name"], zip(data["relation"], data["parents"], strict=True), strict=True))
    for name, (true, parents) in shown.items():
        assert true == relation(root, name)
        assert tuple(parents.split()) == MEMBERS[name].parents
    assert len(set(zip(data["x"], data["y"], strict=True))) == len(wanted), "two names in one place"


def test_members_without_a_weight_of_the_root_stand_apart():
    data = figures.family_tree()[1]
    groups = {
        group: {true for each, true in zip(data["group"], data["relation"], strict=True) if each == group}
        for group in data["group"]
    }
    assert groups.pop("teacher and student") == {"teacher and student"}
    assert groups.pop("same first weights") == {"same first weights"}
    assert set.union(*groups.values()) == {"shared lineage"}


def test_arrows_come_from_parents():
    family = relatives._family("alder")
    arrows = relatives._arrows(family, "alder")
    for source, target in arrows:
        if target != "same first weights":  # which has no parent
            parents = {parent for name in family[target] for parent in MEMBERS[name].parents}
            assert parents & set(family[source])
    assert {target for _, target in arrows} == set(family) - {"alder", "rewritten"}


def test_the_alt_text_counts_strangers():
    strangers = sum(relation("alder", name) == "strangers" for name in MEMBERS)
    assert f"{strangers} strangers" in figures.family_tree()[0].get_label()


def test_there_is_no_family_of_a_descendant():
    with pytest.raises(ValueError, match="root='alder-copy': wanted a member without parents"):
        figures.family_tree("alder-copy")


# --- the map and the scatter ------------------------------------------------------------------------------


@pytest.mark.parametrize("descendant", relatives.DESCENDANTS)
def test_every_choice_of_the_widget_can_be_drawn(descendant):
    drawn, data = figures.turned_vectors(descendant)
    member = Zoo().load(f"alder-{descendant}")
    assert len(data["role"]) == 7 * member.config.num_hidden_layers
    assert f"alder-{descendant}" in drawn.get_label()
    assert all(
        0 <= degrees < 90 and 0 <= same <= 1 for degrees, same in zip(data["degrees"], data["same"], strict=True)
    )


def test_what_was_left_alone_has_not_turned():
    lora, dropped = (figures.turned_vectors(name)[1] for name in ("lora", "drop-0.5"))
    for data, changed in ((lora, "qkvo"), (dropped, ("gate", "up", "down"))):
        for role, degrees in zip(data["role"], data["degrees"], strict=True):
            assert (degrees > 1) == (role in changed)
    mlp = [same for role, same in zip(dropped["role"], dropped["same"], strict=True) if role in ("gate", "up", "down")]
    assert mlp == [0.5] * 12


def test_the_scatter_knows_what_is_exact():
    data = figures.weights_and_behaviour()[1]
    moved = dict(zip(data["name"], data["moved"], strict=True))
    degrees = dict(zip(data["name"], data["degrees"], strict=True))
    for name, member in MEMBERS.items():
        if name in moved and member.exact:
            assert moved[name] < 1e-4
    unchanged = ("copy", "virtual-groups", "fewer-neurons", "fewer-layers", "deepened", "sliced")
    assert max(degrees[f"alder-{kind}"] for kind in unchanged) < 1e-4
    assert set(data["group"][-5:]) == {"teacher and student", "same first weights", "strangers"}
    assert all(MEMBERS[name].recipe in INSTANT or Zoo().folder(name) for name in moved)
