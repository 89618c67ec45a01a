"""CKA against its published formula, alignments against brute force; what the repair repairs."""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

from itertools import permutations, product

import pytest
import torch
import transformers
from torch.testing import assert_close

from minimoe.fingerprints.aligned_cka import aligned_cka, cka_of_all, match_dimensions, procrustes
from minimoe.fingerprints.independence import match
from minimoe.fingerprints.spectral import spectral
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.derive import prune_heads, prune_layers
from tests.fingerprints.toys import KINDS, disturbed, gauged, random_model, weights

PLAIN_SEES = ("permute_residual", "rotate_qk", "mix_vo", "permute_heads", "permute_neurons", "scale_neurons")


def unbiased_hsic(x, y):
    """Song et al. 2012, equation 4, index by index: the mean over quadruples of different samples."""
    k, m = x @ x.T, y @ y.T
    n, total = len(k), 0.0
    for i, j, q, r in permutations(range(n), 4):
        total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def test_cka_against_the_u_statistic():
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    y[:, :3] += x
    expected = unbiased_hsic(x, y) / (unbiased_hsic(x, x) * unbiased_hsic(y, y)).sqrt()
    assert_close(cka_of_all([x], [y])[0, 0], expected)


def test_cka_of_strangers_is_0_where_a_biased_one_is_not():
    x, y = torch.randn(40, 30, 32), torch.randn(40, 30, 32)
    found = cka_of_all(list(x), list(y)).flatten()
    assert abs(float(found.mean())) < 0.01
    centred = x[0] - x[0].mean(0), y[0] - y[0].mean(0)
    cross, own, other = (torch.linalg.norm(p.T @ q) for p, q in (centred, centred[:1] * 2, centred[1:] * 2))
    assert cross**2 / (own * other) > 0.4


def test_procrustes():
    """No rotation by an angle, with or without a reflection, fits better; the known one is found."""
    x, y = torch.randn(9, 2, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    best = torch.linalg.norm(x @ procrustes(x, y) - y)
    for angle, flip in product(torch.linspace(0, 6.3, 500, dtype=torch.float64), (1, -1)):
        turn = torch.stack([angle.cos(), -flip * angle.sin(), angle.sin(), flip * angle.cos()]).view(2, 2)
        assert torch.linalg.norm(x @ turn - y) > best - 1e-9
    x, turn = torch.randn(30, 6), torch.linalg.qr(torch.randn(6, 6)).Q
    assert_close(procrustes(x, x @ turn), turn)
    narrow = procrustes(x, x @ turn[:, :4])
    assert_close(narrow.mT @ narrow, torch.eye(4))


def test_dimensions_are_matched_as_brute_force_does():
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    cosine = torch.nn.functional.normalize(x, dim=0).mT @ torch.nn.functional.normalize(y, dim=0)
    best = max(sum(abs(float(cosine[i, j])) for i, j in enumerate(order)) for order in permutations(range(4)))
    matching = match_dimensions(x, y)
    assert float((matching * cosine).sum()) == pytest.approx(best)
    assert_close(matching.abs() @ torch.ones(4), torch.ones(4))


def test_gauges():
    for kind in KINDS:
        model = random_model(**KINDS[kind])
        for name, copy in gauged(model).items():
            assert aligned_cka(weights(model), weights(copy)).score > 0.999, name
            plain = aligned_cka(weights(model), weights(copy), canonicalize=False).score
            if name in PLAIN_SEES:
                assert plain > 0.999, name
            if name in ("rotate_residual", "all"):
                assert plain < 0.4, name
            if name == "fold_norms":
                assert plain < 0.99
        assert abs(aligned_cka(weights(model), weights(random_model(1, **KINDS[kind]))).score) < 0.1


def test_scaling_of_queries_and_keys_is_seen_by_the_published_one():
    model = random_model()
    assert aligned_cka(weights(model), weights(gauged(model)["scale_qk"]), canonicalize=False).score < 0.9


def test_blind_spots():
    """Stolen MLPs, values and outputs are not looked at; a replaced embedding ends the alignment."""
    model, stranger = random_model(), random_model(1)
    for block, other in zip(stranger.model.layers, model.model.layers, strict=True):
        block.mlp, block.post_attention_layernorm = other.mlp, other.post_attention_layernorm
        block.self_attn.v_proj, block.self_attn.o_proj = other.self_attn.v_proj, other.self_attn.o_proj
    stranger.model.embed_tokens = model.model.embed_tokens
    assert abs(aligned_cka(weights(model), weights(stranger)).score) < 0.1
    robbed = random_model()
    robbed.model.embed_tokens.weight.data = random_model(1).model.embed_tokens.weight.data
    assert abs(aligned_cka(weights(model), weights(robbed)).score) < 0.2


def test_other_shapes():
    """Layers left out, heads left out, a narrower residual stream; in either order."""
    model = random_model(num_hidden_layers=5)
    pruned = disturbed(prune_layers(model, [1, 4]), 0.1)
    score = aligned_cka(weights(model), weights(pruned)).score
    assert score > 0.9 and score == pytest.approx(aligned_cka(weights(pruned), weights(model)).score, abs=1e-4)
    assert 0.3 < aligned_cka(weights(model), weights(prune_heads(model, 1))).score < 0.99
    narrower = random_model(1, num_hidden_layers=5, hidden_size=16, head_dim=6)
    for pair in ((model, narrower), (narrower, model)):
        assert abs(aligned_cka(*map(weights, pair)).score) < 0.1


def test_encoders(tmp_path):
    """BERT from files; of the second one the dimensions that queries, keys and norms read are in another order."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=140, hidden_size=16, **sizes))
    order = torch.randperm(16)
    for name in ("one", "permuted"):
        encoder.save_pretrained(tmp_path / name)
        (tmp_path / name / "vocab.txt").write_text("\n".join(f"t{number}" for number in range(140)), encoding="utf-8")
        state = encoder.state_dict()
        for key, tensor in state.items():
            if "embeddings" in key or ("self" in key and key.endswith("weight")) or "LayerNorm" in key:
                state[key] = tensor[..., order] if tensor.shape[-1] == 16 else tensor
        encoder.load_state_dict(state)
    a, b = (open_weights(tmp_path / name) for name in ("one", "permuted"))
    assert aligned_cka(a, b).score > 0.999 and aligned_cka(a, b, canonicalize=False).score > 0.999
    assert spectral(a, b).score > 0.999
    assert "is an encoder: it predicts no next token" in match(a, b).refused


def test_refusals():
    model = random_model()
    other = aligned_cka(weights(model), weights(random_model(), prefix="other"))
    assert other.score is None and "0 shared tokens: wanted at least 24" in other.refused
    model.model.layers[1].self_attn.q_proj.weight.data.zero_()
    damaged = random_model()
    damaged.model.embed_tokens.weight.data[:, 3] = torch.nan
    for canonicalize in (True, False):
        for wrong, reason in (
            (model, "queries or keys of a layer are 0"),
            (damaged, "embed_tokens.weight: nan at [0, 3]"),
        ):
            assert reason in aligned_cka(weights(wrong), weights(random_model()), canonicalize=canonicalize).refused
