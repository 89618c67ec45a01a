"""Layers and vectors of one model beside those of another: plain loops, and models whose distance is known."""

import numpy as np
import pytest
import torch.nn.functional as F

from minimoe.fingerprints.layer_cosines import MLP, angles, layer_cosines
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.derive import prune_layers, prune_neurons
from minimoe.lineage.gauge import permute_neurons, rotate_residual
from minimoe.lineage.upcycling import upcycle
from minimoe.model import MoEConfig, MoEForCausalLM
from tests.fingerprints.toys import random_model, weights


def test_cosines_of_layers_are_those_of_their_matrices():
    a, b = (weights(random_model(seed)) for seed in (0, 1))
    found = layer_cosines(a, b)
    assert found.shape == (3, 3, 7)
    x, y = a.get("up", 2).double().numpy().ravel(), b.get("up", 0).double().numpy().ravel()
    assert found[2, 0, 5] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert layer_cosines(a, a).diagonal() == pytest.approx(1.0)


@pytest.fixture(scope="module")
def dense():
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MoEForCausalLM(MoEConfig(**sizes, **heads, num_experts=0), seed=1)


def angles_of(child, parent):
    return angles(open_weights(child), open_weights(parent))


def test_angles_are_those_of_a_loop(dense):
    other = MoEForCausalLM(dense.config, seed=2)
    found, layers, child = angles_of(other, dense), dense.state_dict(), other.state_dict()
    for role, name in (("v", "self_attn.v_proj"), ("down", "mlp.down_proj"), ("gate", "mlp.gate_proj")):
        rows = [layers[f"model.layers.{layer}.{name}.weight"] for layer in range(3)]
        known = [vector for matrix in rows for vector in (matrix.T if role == "down" else matrix)]
        matrix = child[f"model.layers.1.{name}.weight"]
        for vector, degrees in zip(matrix.T if role == "down" else matrix, found[1, role], strict=True):
            nearest = max(F.cosine_similarity(vector, each, dim=0).item() for each in known)
            assert degrees == pytest.approx(np.degrees(np.arccos(nearest)), abs=1e-3)


def test_what_only_lost_neurons_or_layers_or_their_order_has_not_turned_and_what_was_rotated_has(dense):
    for child in (dense, prune_neurons(dense, 0.5), prune_layers(dense, [1]), permute_neurons(dense, seed=1)):
        assert max(values.max() for values in angles_of(child, dense).values()) < 1e-4
    assert min(values.min() for values in angles_of(rotate_residual(dense, seed=3), dense).values()) > 10


def test_every_expert_counts(dense):
    dropped = upcycle(dense, num_experts=4, num_experts_per_tok=2, method="drop", drop_ratio=0.25)
    for (_, role), values in angles_of(dropped, dense).items():
        if role in MLP:
            assert len(values) == 4 * 40
            assert (values > 1).mean() == 0.25
        else:
            assert values.max() < 1e-4
