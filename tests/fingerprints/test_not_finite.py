"""NaN or infinity in a weight: every method that reads it refuses by the name of the tensor, the others go on."""

import math
from functools import cache

import pytest
import torch

from minimoe.fingerprints.compare import METHODS
from minimoe.fingerprints.weights import open_weights
from minimoe.model.families import MINIMOE
from minimoe.model.layout import tensors_on_disk
from tests.fingerprints.toys import Vocabulary, random_model

KINDS = {
    "dense": {"qk_norm": "head"},
    "mixture": {
        "num_experts": 4,
        "shared_expert_intermediate_size": 16,
        "shared_expert_gate": True,
        "e_score_correction_bias": True,
    },
}
LAYER = "model.layers.1."
TENSORS = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "norm_final": "model.norm.weight",
    **{role: f"{LAYER}self_attn.{role}_proj.weight" for role in "qkvo"},
    **{f"{role}_bias": f"{LAYER}self_attn.{role}_proj.bias" for role in "qkvo"},
    "norm1": f"{LAYER}input_layernorm.weight",
    "norm2": f"{LAYER}post_attention_layernorm.weight",
}
TENSORS_OF = {
    "dense": TENSORS
    | {role: f"{LAYER}mlp.{role}_proj.weight" for role in ("gate", "up", "down")}
    | {f"{role}_norm": f"{LAYER}self_attn.{role}_norm.weight" for role in "qk"},
    "mixture": TENSORS
    | {role: f"{LAYER}mlp.experts.2.{role}_proj.weight" for role in ("gate", "up", "down")}
    | {f"shared_{role}": f"{LAYER}mlp.shared_expert.{role}_proj.weight" for role in ("gate", "up", "down")}
    | {
        "router": f"{LAYER}mlp.gate.weight",
        "router_bias": f"{LAYER}mlp.gate.e_score_correction_bias",
        "gate of the shared expert": f"{LAYER}mlp.shared_expert_gate.weight",
    },
}
# What each method reads, from what it says it measures.
ATTENTION, MLP, SHARED = {"q", "k", "v", "o"}, {"gate", "up", "down"}, {"shared_gate", "shared_up", "shared_down"}
ROUTING = {"router", "router_bias", "gate of the shared expert"}
ANCHORS = {"embedding", "head", "norm_final"}
NEURONS = MLP | SHARED | {"norm2"}
ALL = {role for tensors in TENSORS_OF.values() for role in tensors}
READS = {
    "std_profile": ATTENTION,
    "norm_profile": {"norm1", "norm2", "norm_final"},
    "weight_cosine": ATTENTION | MLP | SHARED | {"router"},
    "aligned_cka_plain": {"embedding", "q", "k"},
    "aligned_cka": ATTENTION | {"embedding", "norm1", "q_norm", "k_norm"},  # a head counts by what it writes
    "spectral": ATTENTION | {"norm1", "q_norm", "k_norm"},
    "virtual_response": ALL - {"o_bias"},
    "virtual_response_whitened": ALL - {"o_bias"},
    "csu": {"up", "norm2"},
    "aligned_neurons": NEURONS | {"embedding", "router", "router_bias"},
    "best_part": NEURONS | {"embedding", "router", "router_bias"},
    "permutation_test": NEURONS,
    "match": NEURONS | ANCHORS,
    "expert_attribution": NEURONS | ANCHORS,
    "token_agreement": ALL,
    "hidden_cka": ALL,
    "routing_agreement": ALL,
}

pytestmark = pytest.mark.exact("two comparisons of the same weights are compared to the bit")


def model_of(kind, seed):
    model = random_model(seed, **KINDS[kind])
    with torch.no_grad():  # std_profile asks for layers that differ
        for layer, block in enumerate(model.model.layers):
            for role in "qkvo":
                getattr(block.self_attn, f"{role}_proj").weight *= 1 + 0.2 * layer**2
    return model


def opened(model, folder=None):
    if folder is not None:
        model.save_pretrained(folder)
    return open_weights(model if folder is None else folder, tokenizer=Vocabulary())


@cache
def clean_results(kind):
    a, b = (opened(model_of(kind, seed)) for seed in (0, 1))
    return {name: method(a, b) for name, method in METHODS.items()}


def test_the_tables_name_every_method_and_every_tensor_of_a_layer():
    assert READS.keys() == METHODS.keys()
    for kind, tensors in TENSORS_OF.items():
        names = tensors_on_disk(model_of(kind, 0), MINIMOE)
        there = {name for name in names if ".layers." not in name or LAYER in name}
        assert {name for name in there if ".experts." not in name or ".experts.2." in name} == set(tensors.values())
    refused = {(kind, name) for kind in KINDS for name, result in clean_results(kind).items() if result.refused}
    assert refused == {("dense", "routing_agreement")}


FROM_FOLDERS = ("embedding", "norm_final", "q", "up", "router", "shared_gate")  # each is read in another way


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_that_meets_it_names_the_tensor_and_another_does_not_mind(kind, tmp_path):
    """As NaN in the first of two models in memory; as infinity in the second of two folders."""
    for role, name in TENSORS_OF[kind].items():
        wrong = model_of(kind, 0)
        spoil(wrong, name, math.nan)
        check(kind, role, opened(wrong), opened(model_of(kind, 1)))
    for role in TENSORS_OF[kind].keys() & set(FROM_FOLDERS):
        wrong = model_of(kind, 1)
        spoil(wrong, TENSORS_OF[kind][role], math.inf)
        check(kind, role, opened(model_of(kind, 0), tmp_path / "other"), opened(wrong, tmp_path / f"wrong {role}"))


def spoil(model, name, number):
    with torch.no_grad():
        tensors_on_disk(model, MINIMOE)[name][..., 3] = number


def check(kind, role, *pair):
    for method, run in METHODS.items():
        clean, found = clean_results(kind)[method], run(*pair)
        if role in READS[method] and clean.refused is None:
            assert found.score is None and TENSORS_OF[kind][role] in found.refused, (method, role)
        else:
            same = (found.score, found.p_value, found.details) == (clean.score, clean.p_value, clean.details)
            assert same, (method, role)
