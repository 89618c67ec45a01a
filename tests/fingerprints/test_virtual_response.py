"""Responses are those of the model's own layers, and no gauge moves them."""

import pytest
import torch
from torch.testing import assert_close

from minimoe.fingerprints.anchors import read_anchors
from minimoe.fingerprints.virtual_response import directions, read_responses, virtual_response
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.derive import prune_layers
from minimoe.lineage.gauge import all_gauges
from minimoe.lineage.upcycling import upcycle
from tests.fingerprints.toys import KINDS, Vocabulary, gauged, random_model, weights


def test_gauges():
    for kind in KINDS:
        model = random_model(**KINDS[kind])
        original = weights(model)  # what is read of it is kept
        for name, copy in gauged(model).items():
            rewritten = weights(copy)
            for whiten in (False, True):
                assert virtual_response(original, rewritten, whiten=whiten).score > 0.999, name
        assert abs(virtual_response(original, weights(random_model(1, **KINDS[kind]))).score) < 0.05


@pytest.mark.parametrize(
    "router", [{"router": "hash"}, {"router": "expert_choice", "capacity_factor": 1.0}, {"clip_qkv": 0.5}]
)
def test_other_models(router):
    model = random_model(num_experts=4, **router)
    assert virtual_response(weights(model), weights(all_gauges(model, 1))).score > 0.999


def test_tables_against_the_model():
    """Each token alone at position 0: attention returns its value, and the MLP follows on what it is given."""
    for kind in KINDS:
        model = random_model(**KINDS[kind]).float()
        opened = weights(model)
        tokens = [f"t{number}" for number in range(40)]
        anchors = read_anchors(opened, tokens)
        tables = directions(read_responses(opened, tokens), list(range(40)))
        block = model.model.layers[1]
        x = block.input_layernorm.weight * anchors.inputs
        at_start = torch.ones(1, 3), torch.zeros(1, 3)  # cos and sin of position 0, heads of size 6
        with torch.no_grad():
            attended, (keys, _) = block.self_attn(x[:, None], *at_start, None)
            queries = block.self_attn._project(x[:, None])[0][:, :, 0]
            mixed = block.mlp((block.post_attention_layernorm.weight * anchors.inputs)[None])
            mixed = mixed[0] if block.is_sparse else mixed
        values = attended[:, 0] - block.self_attn.o_proj.bias
        expected = {
            "A": torch.einsum("ihd,jhd->ij", queries, keys[:, :, 0].repeat_interleave(2, dim=1)),
            "OV": values @ anchors.outputs.mT,
            "M": mixed[0] @ anchors.outputs.mT,
        }
        for name, table in expected.items():
            assert float(torch.corrcoef(torch.stack([tables[name][1], table.flatten().detach()]))[0, 1]) > 0.99999, name
            assert_close(tables[name][1].norm(), torch.tensor(1.0))


def test_through_files(tmp_path):
    """In float32, in a folder, as a mixture that was gauged and upcycled: the function of each layer is the same."""
    dense = random_model(attention_bias=False, attention_output_bias=False)
    mixture = all_gauges(upcycle(dense, num_experts=4, num_experts_per_tok=2), 1)
    for name, model in (("dense", dense), ("mixture", mixture)):
        model.float().save_pretrained(tmp_path / name)
    a, b = (open_weights(tmp_path / name, tokenizer=Vocabulary()) for name in ("dense", "mixture"))
    found = virtual_response(a, b)
    assert found.score > 0.999 and found.details["tokens"] == 160


def test_stolen_mlps_show_in_their_own_table():
    model, thief = random_model(), random_model(1)
    thief.model.embed_tokens, thief.lm_head, thief.model.norm = (
        model.model.embed_tokens,
        model.lm_head,
        model.model.norm,
    )
    for block, other in zip(thief.model.layers, model.model.layers, strict=True):
        block.mlp, block.post_attention_layernorm = other.mlp, other.post_attention_layernorm
    details = virtual_response(weights(model), weights(thief)).details
    assert details["M"] > 0.999 and abs(details["A"]) < 0.1 and abs(details["OV"]) < 0.1


def test_blind_to_layers_in_a_model_with_other_embeddings():
    model, thief = random_model(), random_model(1)
    thief.model.layers, thief.model.norm = model.model.layers, model.model.norm
    for whiten in (False, True):
        assert abs(virtual_response(weights(model), weights(thief), whiten=whiten).score) < 0.1


def test_depths_that_differ():
    model = random_model(num_hidden_layers=5)
    assert virtual_response(weights(model), weights(prune_layers(model, [1, 4]))).score > 0.999


def test_refusals():
    model = random_model()
    assert "0 shared tokens" in virtual_response(weights(model), weights(model, prefix="other")).refused
    model.model.layers[2].mlp.down_proj.weight.data.zero_()
    assert "the response M of a layer is constant" in virtual_response(weights(model), weights(random_model())).refused


def test_whitening_hides_what_strangers_share():
    """Strangers with one strong direction in common, as a language gives them, are alike until all weigh the same."""
    model, stranger = random_model(), random_model(1)
    stranger.model.embed_tokens, stranger.lm_head = model.model.embed_tokens, model.lm_head
    stranger.model.norm = model.model.norm
    generator = torch.Generator().manual_seed(0)
    for block, other in zip(model.model.layers, stranger.model.layers, strict=True):
        written, read = torch.randn(2, 24, generator=generator, dtype=torch.float64)
        for attention in (block.self_attn, other.self_attn):
            attention.v_proj.weight.data[0] += 20 * read
            attention.o_proj.weight.data[:, 0] += 20 * written
    pair = weights(model), weights(stranger)
    assert virtual_response(*pair).details["OV"] > 0.9
    assert virtual_response(*pair, whiten=True).details["OV"] < 0.3
