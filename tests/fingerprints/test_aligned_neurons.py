"""Neurons found in another model, through rotations that nobody knows, and parts that do nothing."""

import pytest
import torch

from minimoe.fingerprints.aligned_neurons import _compare_traits, _fit, aligned_neurons, best_part, read_parts
from minimoe.fingerprints.audible import head_counts
from minimoe.lineage import plant, transplant_expert, upcycle
from minimoe.lineage.gauge import all_gauges
from minimoe.lineage.zoo import Zoo
from tests.fingerprints.toys import KINDS, disturbed, gauged, random_model, weights

BOTH = aligned_neurons, best_part


def mixture(model, seed=0):
    return upcycle(model, num_experts=3, num_experts_per_tok=2, model_type="minimoe", seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gauge_hides_a_neuron(kind):
    model = random_model(1, **KINDS[kind])
    for name, copy in gauged(model).items():
        for method in BOTH:
            assert method(weights(model), weights(copy)).score == pytest.approx(1, abs=1e-3), name


def test_no_token_needs_to_be_shared():
    model = random_model(1)
    other = all_gauges(model, 3)
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(random_model(5).model.embed_tokens.weight)
    found = aligned_neurons(weights(model), weights(other, prefix="another "))
    assert found.score == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 48, "intermediate_size": 96}, {"num_hidden_layers": 5}])
def test_strangers_score_about_0(sizes):
    ours, theirs = weights(random_model(1)), weights(random_model(2, **sizes))
    assert abs(aligned_neurons(ours, theirs).score) < 0.1
    assert best_part(ours, theirs).score < 0.4


def test_a_wide_model_is_looked_at_in_some_directions_beside_a_narrow_one_too():
    wide, narrow = random_model(1, hidden_size=516, head_dim=6, intermediate_size=1024), random_model(2)
    assert aligned_neurons(weights(wide), weights(all_gauges(wide, 3))).score > 0.9
    for pair in ((wide, narrow), (narrow, wide)):
        assert abs(aligned_neurons(*map(weights, pair)).score) < 0.1


def test_a_counterpart_is_found_by_traits_and_the_rotation_from_it():
    """Against the truth: a rotation and an order that were drawn here."""
    (part,), *_ = read_parts(weights(random_model(1)), False)
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0]
    order = torch.randperm(32, generator=generator)
    other = part._replace(
        faces=part.faces[:, order] @ rotation.mT, traits=part.traits[order], counts=part.counts[order]
    )
    assert torch.equal(_compare_traits(part, other).argmax(0), order)
    torch.testing.assert_close(_fit(part, other), rotation, atol=1e-6, rtol=0)


@pytest.mark.parametrize("is_gauged", [False, True])
@pytest.mark.parametrize("expert", [1, 2])
def test_one_expert_of_another_model_is_found_and_named_wherever_it_stands(expert, is_gauged):
    parent, host = random_model(1, num_hidden_layers=4), mixture(random_model(2, num_hidden_layers=4))
    suspect = transplant_expert(host, parent, layer=1, expert=expert)
    suspect = disturbed(all_gauges(suspect, 3) if is_gauged else suspect, 0.1)
    found = best_part(weights(parent), weights(suspect))
    scores = {name: score for name, score in found.details.items() if name.startswith("layer")}
    ordered = sorted(scores, key=scores.__getitem__)
    assert ordered[-1].startswith("layer 1") and scores[ordered[-1]] > 0.9 and scores[ordered[-2]] < 0.5
    assert aligned_neurons(weights(parent), weights(suspect)).score < 0.3


def test_a_residual_stream_of_which_dimensions_were_left_out_is_still_known():
    model = random_model(1, attention_bias=False, attention_output_bias=False)
    narrow = random_model(1, hidden_size=18, head_dim=6, attention_bias=False, attention_output_bias=False)
    wide = model.state_dict()
    with torch.no_grad():
        for name, tensor in narrow.state_dict().items():
            if wide[name].shape != tensor.shape:
                tensor.copy_(wide[name][tuple(slice(side) for side in tensor.shape)])
            else:
                tensor.copy_(wide[name])
    assert aligned_neurons(weights(model), weights(narrow)).score > 0.7


PLANTED = {
    "dead": lambda model, other: plant.plant_dead_neurons(model, other),
    "dead, first": lambda model, other: plant.plant_dead_neurons(model, other, first=True),
    **{
        way: lambda model, other, way=way: plant.plant_cancelling_neurons(model, other, way=way)
        for way in ("opposite", "halves", "sums", "products")
    },
}


@pytest.mark.parametrize("is_gauged", [False, True])
@pytest.mark.parametrize("kind", PLANTED)
def test_planted_neurons_that_do_nothing_do_not_count(kind, is_gauged):
    other, model = random_model(1), random_model(2)
    planted = PLANTED[kind](model, other)
    suspect = weights(all_gauges(planted, 3) if is_gauged else planted)
    found, of_parts = (method(weights(other), suspect) for method in BOTH)
    assert found.score < 0.1 and of_parts.score < 0.4
    assert found.details["silent"] > 0.4
    assert aligned_neurons(weights(model), suspect).score > 0.9, "what does something still counts"


def test_an_expert_that_no_token_meets_does_not_count():
    other, model = random_model(1), mixture(random_model(2))
    ends = {name: tensor for name, tensor in model.state_dict().items() if "layers" not in name}
    other.load_state_dict(other.state_dict() | ends)  # so that planted neurons are what they were
    suspect = plant.plant_unreached_expert(model, other)
    found = best_part(weights(other), weights(suspect))
    assert found.score < 0.5 < 0.9 < found.details["idle"]


@pytest.mark.parametrize("way", ["squares", "spans"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_others_undo_stays_silent_in_half_precision(way, dtype):
    alder, stranger = Zoo().load("alder"), Zoo().load("stranger-13")
    planted = plant.plant_cancelling_neurons(stranger, alder, way=way, share=0.25).to(dtype).float()
    assert aligned_neurons(weights(alder), weights(planted)).score < 0.1


def test_heads_that_write_nothing_or_undo_each_other_do_not_count():
    model, other = random_model(1, attention_bias=False), random_model(2, attention_bias=False)
    assert all((counts == 1).all() for counts in head_counts(weights(model)).values())
    for planted in (plant.plant_dead_heads(model, other), plant.plant_cancelling_heads(model, other)):
        for counts in head_counts(weights(planted)).values():
            assert (counts[:4] == 1).all() and (counts[4:] < 0.1).all()
