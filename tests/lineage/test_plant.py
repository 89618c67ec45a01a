"""Plants: what they compute stays, and what they hold is the other model's."""

import pytest
import torch
import torch.nn.functional as F

from minimoe.lineage.derive import neurons
from minimoe.lineage.gauge import all_gauges
from minimoe.lineage.plant import (
    plant_cancelling_heads,
    plant_cancelling_neurons,
    plant_dead_heads,
    plant_dead_neurons,
    plant_embedding_rows,
    plant_unreached_expert,
)
from minimoe.model import MoEConfig, MoEForCausalLM
from tests.fingerprints.toys import random_weights

IDS = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 40,
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 10,
    "moe_intermediate_size": 10,
}
KINDS = {
    "dense": {"num_experts": 0},
    "biased": {"num_experts": 0, "attention_bias": True, "tie_word_embeddings": False, "qk_norm": "head"},
    "mixture": {"num_experts": 3, "shared_expert_intermediate_size": 4},
    "every second layer": {"num_experts": 3, "decoder_sparse_step": 2},
    "sigmoid": {"num_experts": 3, "score_func": "sigmoid", "e_score_correction_bias": True},
}
UNTRAINED_TOKENS = (20, 25, 39)
NEURONS = {
    "dead": plant_dead_neurons,
    **{
        way: lambda *models, way=way, **options: plant_cancelling_neurons(*models, way=way, **options)
        for way in ("opposite", "halves", "sums", "products", "squares", "spans")
    },
}
HEADS = {"dead": plant_dead_heads, "cancelling": plant_cancelling_heads}
PLANTS = {
    **NEURONS,
    "dead-first": lambda *models: plant_dead_neurons(*models, share=0.5, first=True),
    "opposite-first": lambda *models: plant_cancelling_neurons(*models, share=0.5, first=True),
    "dead heads": lambda *models: plant_dead_heads(*models, gain=4.0),
    "turned heads": lambda *models: plant_dead_heads(*models, turn=True),
    "cancelling heads": plant_cancelling_heads,
    "expert": plant_unreached_expert,
}


def random_model(seed: int = 0, **settings) -> MoEForCausalLM:
    return random_weights(MoEConfig(**SIZES | settings), seed)


@torch.no_grad()
def logits(model: MoEForCausalLM) -> torch.Tensor:
    return model(IDS).logits


def change(a: MoEForCausalLM, b: MoEForCausalLM) -> float:
    """The largest difference of a logit, relative to the largest logit."""
    return float((logits(a) - logits(b)).abs().max() / logits(b).abs().max())


def mlps(model: MoEForCausalLM) -> list[torch.Tensor]:
    """The neurons of each layer, [E, I, 3, H]."""
    mlps = [block.mlp for block in model.model.layers]
    return [neurons(mlp.experts) if hasattr(mlp, "experts") else neurons(mlp)[None] for mlp in mlps]


def token_ends(model: MoEForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer is given for each token, and what is asked of it, norms of layers left out."""
    rows = model.model.embed_tokens.weight.detach()
    inputs = F.normalize(rows, dim=1) * rows.shape[1] ** 0.5
    return inputs, model.lm_head.weight.detach() * model.model.norm.weight.detach()


# -- the function


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_computed_stays(plant, kind):
    model, other = random_model(0, **KINDS[kind]), random_model(1, num_experts=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    planted = PLANTS[plant](model, other)
    assert change(planted, model) < (1e-5 if "dead" in plant or "turned" in plant else 1e-11)
    assert sum(map(torch.numel, planted.parameters())) > sum(map(torch.numel, model.parameters()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert change(all_gauges(planted, seed=3), model) < 1e-5


@pytest.mark.parametrize("plant", NEURONS)
def test_what_is_planted_speaks_unless_it_is_undone(plant):
    """Without the last neuron of each MLP, which undoes another one, cancelling ones are heard; dead ones are not."""
    model, other = random_model(0, num_experts=0), random_model(1, num_experts=0)
    planted = NEURONS[plant](model, other)
    for block in planted.model.layers:
        block.mlp.down_proj.weight.data[:, -1] = 0
    assert (change(planted, model) < 1e-5) == (plant == "dead")


def test_planted_experts_and_heads_would_speak_if_they_were_reached():
    model, other = random_model(0, num_experts=3), random_model(1, num_experts=0)
    reached = plant_unreached_expert(model, other)
    for block in reached.model.layers:
        assert int(block.mlp.gate(torch.randn(999, 12, dtype=torch.float64)).indices.max()) < 3
        block.mlp.gate.e_score_correction_bias.zero_()
    assert change(reached, model) > 1e-3
    heads = plant_dead_heads(model, other, scale=1.0)
    assert change(heads, model) > 1e-3


# -- what is planted


def in_tokens(model: MoEForCausalLM, layer: int, rows: torch.Tensor) -> torch.Tensor:
    """Gate, up and down of neurons [n, 3, H] over all tokens: [3, n, V]."""
    inputs, outputs = token_ends(model)
    reads = rows[:, :2] * model.model.layers[layer].post_attention_layernorm.weight.detach()
    return torch.stack([reads[:, 0] @ inputs.mT, reads[:, 1] @ inputs.mT, rows[:, 2] @ outputs.mT])


def test_planted_neurons_are_the_other_s_in_its_order_as_near_as_the_tokens_allow():
    """A stranger that is the other one in another basis and with other norms has exactly the same neurons."""
    other = random_model(1, num_experts=0, tie_word_embeddings=False)
    model = all_gauges(other, seed=5)
    for first in (False, True):
        planted = plant_dead_neurons(model, other, share=0.5, first=first)
        for layer, (rows,) in enumerate(mlps(planted)):
            assert rows.shape == (15, 3, 12)
            new = rows[:5] if first else rows[10:]
            found = in_tokens(planted, layer, new) * torch.tensor([1, 1, 1e6])[:, None, None]
            wanted = in_tokens(other, layer, mlps(other)[layer][0])
            distance = torch.cdist(found.movedim(1, 0).flatten(1), wanted.movedim(1, 0).flatten(1))
            sources = distance.argmin(1).tolist()
            assert sources == sorted(set(sources)) and float(distance.min(1).values.max()) < 1e-6
    assert plant_dead_neurons(model, other, share=0.5, seed=1).config == planted.config


def test_an_expert_gets_the_neurons_of_the_expert_of_its_number():
    model, other = random_model(0, num_experts=3), random_model(1, num_experts=2)
    for rows, source in zip(mlps(plant_dead_neurons(model, other)), mlps(other), strict=True):
        assert rows.shape == (3, 20, 3, 12) and source.shape == (2, 10, 3, 12)
        assert torch.equal(rows[0, 10:], rows[2, 10:]) and not torch.equal(rows[0, 10:], rows[1, 10:])


@pytest.mark.parametrize("plant", HEADS)
def test_planted_heads_attend_to_what_they_did(plant):
    """Of a stranger that is the other one in another basis: the scores of all tokens with each other, by head."""
    other = random_model(1, num_experts=0, tie_word_embeddings=False)
    model = all_gauges(other, seed=5)
    planted = HEADS[plant](model, other, gain=2.0)
    copies = 1 if plant == "dead" else 2
    assert (planted.config.num_attention_heads, planted.config.num_key_value_heads) == (4 + 4 * copies, 2 + 2 * copies)
    for ours, theirs in zip(planted.model.layers, other.model.layers, strict=True):
        asked = []
        for block, each in ((ours, planted), (theirs, other)):
            x = token_ends(each)[0] * block.input_layernorm.weight.detach()
            asked.append((block.self_attn.q_proj(x)[:, -24:] @ block.self_attn.q_proj(x)[:, -24:].mT).detach())
        torch.testing.assert_close(asked[0], 4 * asked[1], rtol=0, atol=1e-7)


@pytest.mark.exact("two runs of the same weights are compared to the bit")
def test_rows_of_tokens_that_do_not_occur():
    model, other = random_model(0, num_experts=3), random_model(1, num_experts=0, tie_word_embeddings=False)
    for tied in (True, False):
        model = random_model(0, num_experts=3, tie_word_embeddings=tied)
        planted = plant_embedding_rows(model, other, tokens=UNTRAINED_TOKENS)
        kept = [token for token in range(40) if token not in UNTRAINED_TOKENS]
        assert torch.equal(logits(planted)[..., kept], logits(model)[..., kept])
        theirs = other.lm_head if tied else other.model.embed_tokens  # where one matrix is both, the head's come last
        rows = planted.model.embed_tokens.weight
        assert torch.equal(rows[[20, 25, 39]], theirs.weight[[20, 25, 39]])
        assert torch.equal(rows[kept], model.model.embed_tokens.weight[kept])


def test_parts_of_a_model_of_another_shape():
    model = random_model(0, num_experts=0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1}
    other = random_model(1, num_experts=0, **sizes, intermediate_size=7)
    for planted in (plant_dead_neurons(model, other), plant_dead_heads(model, other)):
        assert change(planted, model) < 1e-5
    assert plant_dead_neurons(model, other).config.intermediate_size == 17


def test_what_cannot_be_planted():
    model, other = random_model(0, num_experts=0), random_model(1, num_experts=0)
    mixture = random_model(0, num_experts=3)
    for call, message in [
        (lambda: plant_dead_neurons(model, other, share=0.0), "share=0.0: wanted above 0"),
        (lambda: plant_cancelling_neurons(model, other, way="third"), "way='third': wanted one of opposite, halves"),
        (lambda: plant_dead_neurons(model, random_model(1, vocab_size=41)), "vocab_size of the other=41: wanted 40"),
        (lambda: plant_dead_heads(model, random_model(1, head_dim=4)), "head_dim of the other=4: wanted 6"),
        (lambda: plant_dead_heads(model, random_model(1, num_key_value_heads=4)), "queries in a group of the other=1"),
        (lambda: plant_dead_heads(random_model(0, qk_norm="full"), other), "qk_norm='full': wanted None or 'head'"),
        (
            lambda: plant_unreached_expert(random_model(0, router="topk_softmax"), other),
            "router='topk_softmax': wanted 'topk'",
        ),
        (
            lambda: plant_unreached_expert(random_model(0, num_experts=3, norm_topk_prob=False), other),
            "norm_topk_prob=False: wanted True",
        ),
        (
            lambda: plant_unreached_expert(mixture, random_model(1, num_experts=0, intermediate_size=11)),
            "width of an MLP of the other=11: wanted at most 10",
        ),
        (lambda: plant_embedding_rows(model, other, tokens=[40]), r"tokens=\[40\]: wanted numbers from 0 to 39"),
        (lambda: plant_embedding_rows(model, random_model(1, hidden_size=16), tokens=[0]), "hidden_size of the other"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
