"""Every expert of an upcycled mixture is traced to its layer, and what was drawn anew is counted."""

import pytest
import torch

from minimoe.fingerprints.expert_attribution import (
    attribute_experts,
    count_agreeing,
    estimate_drop_rate,
    expert_attribution,
    nominal_p_value,
)
from minimoe.lineage.derive import prune_layers
from minimoe.lineage.gauge import all_gauges
from minimoe.lineage.upcycling import transplant_expert, upcycle
from tests.fingerprints.toys import KINDS, disturbed, gauged, random_model, weights

PLAIN = {"attention_bias": False, "attention_output_bias": False, "intermediate_size": 128, "num_hidden_layers": 2}
WAYS = {
    "copy": {},
    "split": {},
    "virtual_groups": {},
    "drop .25": {"drop_ratio": 0.25},
    "drop .5": {"drop_ratio": 0.5},
    "drop .75": {"drop_ratio": 0.75},
}


def upcycled(dense, way, model_type="mixtral"):
    method = way.split()[0]
    return upcycle(dense, num_experts=4, num_experts_per_tok=2, method=method, model_type=model_type, **WAYS[way])


@pytest.mark.parametrize(
    ("way", "noise", "model_type"),
    [
        ("copy", 0.5, "qwen2_moe"),
        ("split", 0.0, "mixtral"),
        ("virtual_groups", 0.5, "pangu_pro_moe"),
        ("drop .25", 0.0, "qwen2_moe"),
        ("drop .5", 0.5, "mixtral"),
        ("drop .75", 0.5, "pangu_pro_moe"),
    ],
)
def test_parent_and_drop_rate(way, noise, model_type):
    """Gauged, and with noise of half the weights' size; the shared expert is never dropped."""
    dense = random_model(**PLAIN)
    suspect = weights(all_gauges(disturbed(upcycled(dense, way, model_type), noise), 3))
    found = attribute_experts(weights(dense), suspect)
    assert len(found) == 2 * (4 if model_type == "mixtral" else 5)
    for expert in found:
        rate = 0.0 if expert.expert == "shared" else WAYS[way].get("drop_ratio", 0.0)
        assert expert.parent_layer == expert.layer
        assert expert.drop_rate == pytest.approx(rate, abs=0.1)
        assert expert.nominal_p < 1e-6
    control = attribute_experts(weights(random_model(1, **PLAIN)), suspect)
    assert max(expert.effect for expert in control) < 0.1 < min(expert.effect for expert in found)
    assert {expert.drop_rate for expert in control if expert.nominal_p > 0.01} == {1.0}


def test_gauges():
    for kind in KINDS:
        model = random_model(**KINDS[kind])
        for name, copy in gauged(model).items():
            for expert in attribute_experts(weights(model), weights(copy)):
                assert expert.effect == 1 and expert.drop_rate == 0 and expert.parent_layer == expert.layer, name


def test_result():
    dense = random_model(**PLAIN)
    found = expert_attribution(weights(dense), weights(upcycled(dense, "drop .5")))
    assert found.score == pytest.approx(0.5) and found.p_value is None and found.refused is None
    assert found.details["layer 1 expert 3: parent_layer"] == 1
    assert found.details["layer 1 expert 3: drop_rate"] == pytest.approx(0.5, abs=0.1)
    control = expert_attribution(weights(random_model(1, **PLAIN)), weights(upcycled(dense, "drop .5")))
    assert control.score < 0.05


def test_a_transplanted_expert_is_told_apart():
    dense, donor = random_model(**PLAIN), random_model(1, **PLAIN)
    mixture = transplant_expert(upcycled(dense, "copy"), donor, layer=1, expert=2, donor_layer=0)
    of_dense, of_donor = (attribute_experts(weights(parent), weights(mixture)) for parent in (dense, donor))
    for one, other in zip(of_dense, of_donor, strict=True):
        foreign = (one.layer, one.expert) == (1, "2")
        assert (one.effect > 0.9) != foreign
        assert other.effect < 0.1, "a donor of another residual stream is seen only through the same tokens"


def test_from_mixture_to_mixture_and_between_dense_models():
    mixture = random_model(num_experts=4, **PLAIN)
    found = attribute_experts(weights(mixture), weights(all_gauges(disturbed(mixture, 0.3), 1)))
    assert all(expert.effect > 0.95 and expert.parent_layer == expert.layer for expert in found)
    for layer in range(2):
        assert {expert.parent_expert for expert in found if expert.layer == layer} == {"0", "1", "2", "3"}
    dense = random_model(**PLAIN | {"num_hidden_layers": 4})
    found = attribute_experts(weights(dense), weights(prune_layers(dense, [1])))
    assert [(expert.expert, expert.parent_layer) for expert in found] == [("mlp", 0), ("mlp", 2), ("mlp", 3)]


def test_blind_to_what_was_drawn_anew():
    dense = random_model(**PLAIN)
    mixture = upcycle(dense, num_experts=4, num_experts_per_tok=2, method="drop", drop_ratio=1.0)
    assert expert_attribution(weights(dense), weights(mixture)).score < 0.05


def test_blind_to_which_of_equal_experts_it_was():
    mixture = upcycled(random_model(**PLAIN), "copy")
    found = attribute_experts(weights(mixture), weights(mixture))
    assert all(expert.effect == 1 for expert in found)
    assert {expert.parent_expert for expert in found if expert.layer == 0} == {"0"}  # of four equals, the first


def test_chance():
    """The nominal p-value against a simulation; k = 0 is no evidence at all."""
    generator = torch.Generator().manual_seed(0)
    rolls = torch.randint(4, (20000, 2, 5), generator=generator)
    twice = ((rolls == 0).all(1).sum(1) >= 2).double().mean()
    assert nominal_p_value(2, 5, 4) < nominal_p_value(2, 4, 4) < 0.05
    assert nominal_p_value(0, 5, 4) == 1
    assert nominal_p_value(2, 4, 4) == pytest.approx(
        float(((rolls[..., :4] == 0).all(1).sum(1) >= 2).double().mean()), rel=0.2
    )
    assert float(twice) > nominal_p_value(2, 4, 4)


@pytest.mark.parametrize(("origin", "q"), [(0.25, 1.0), (0.75, 0.7)])
def test_drop_rate_against_simulation(origin, q):
    """Faces that find the origin of a neuron with probability q, independently."""
    generator = torch.Generator().manual_seed(0)
    found = (torch.rand(4000, 3, generator=generator) < q) & (torch.rand(4000, 1, generator=generator) < origin)
    in_all, in_two = int((found.sum(1) == 3).sum()), int((found.sum(1) == 2).sum())
    assert estimate_drop_rate(in_all, in_two, 4000, 4000) == pytest.approx(1 - origin, abs=0.03)


def test_counting():
    table = torch.full((3, 4, 5), -1.0)
    for face, columns in enumerate(([0, 1, 2, 3], [0, 1, 3, 2], [0, 4, 3, 1])):
        table[face, torch.arange(4), columns] = 1.0
    assert count_agreeing(table) == (1, 2)


def test_neurons_of_0_do_not_agree():
    dense, other = random_model(**PLAIN), random_model(1, **PLAIN)
    for model in (dense, other):
        for block in model.model.layers:
            for rows in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight, block.mlp.down_proj.weight.mT):
                rows.data[:64] = 0
    assert expert_attribution(weights(dense), weights(other)).score < 0.1


def test_refusals():
    model = random_model()
    assert "0 shared tokens" in expert_attribution(weights(model), weights(model, prefix="other")).refused
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    assert "0 or not finite" in expert_attribution(weights(model), weights(random_model())).refused
