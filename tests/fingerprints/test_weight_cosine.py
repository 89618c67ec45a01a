"""The same numbers in the same places, and nothing else."""

import numpy
import pytest
import torch
from safetensors.torch import load_file

from minimoe.fingerprints import weights as weights_module
from minimoe.fingerprints.weight_cosine import weight_cosine
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.derive import depth_upscale, prune_layers, quantise
from minimoe.lineage.gauge import fold_norms
from minimoe.lineage.upcycling import upcycle
from tests.fingerprints.toys import KINDS, disturbed, gauged, random_model, weights

READ = {"q", "k", "v", "gate", "up", "router", "shared_gate", "shared_up"}  # from the residual stream
ALL = READ | {"o", "down", "shared_down"}
MLP = {"gate", "up", "down", "shared_gate", "shared_up", "shared_down"}
# What each gauge puts in other places, so that nothing is left to see, and what it only rescales.
MOVED = {
    "rotate_residual": ALL,
    "permute_residual": ALL,
    "rotate_qk": {"q", "k"},
    "mix_vo": {"v", "o"},
    "permute_heads": {"q", "k", "v", "o"},
    "permute_neurons": MLP,
    "permute_experts": {"router", "gate", "up", "down"},
    "all": ALL,
}
RESCALED = {
    "fold_norms": READ,
    "scale_qk": {"q", "k"},
    "scale_neurons": {"up", "down", "shared_up", "shared_down"},
    "shift_router": {"router"},
    "exchange_router_scale": {"down"},
}


def by_role(details: dict[str, float]) -> dict[str, list[float]]:
    roles: dict[str, list[float]] = {}
    for name, cosine in details.items():
        roles.setdefault(name.split(".")[0], []).append(cosine)
    return roles


def test_known_values_from_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_module, "PIECE", 100)  # less than a matrix
    for seed, name, dtype in ((0, "a", torch.bfloat16), (1, "b", torch.float16)):
        random_model(seed, num_experts=4).to(dtype).save_pretrained(tmp_path / name, model_type="minimoe")
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    result = weight_cosine(open_weights(tmp_path / "a"), open_weights(tmp_path / "b"))

    def cosine(*names: str) -> float:
        a, b = (numpy.concatenate([of[name].double().numpy().ravel() for name in names]) for of in tensors)
        return a @ b / numpy.linalg.norm(a) / numpy.linalg.norm(b)

    wanted = {}
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        wanted |= {f"{role}.{layer}": cosine(f"{prefix}.self_attn.{role}_proj.weight") for role in "qkvo"}
        wanted[f"router.{layer}"] = cosine(f"{prefix}.mlp.gate.weight")
        for role in ("gate", "up", "down"):
            names = [f"{prefix}.mlp.experts.{expert}.{role}_proj.weight" for expert in range(4)]
            wanted[f"{role}.{layer}"] = cosine(*names)
    assert result.details == pytest.approx(wanted, abs=1e-5)
    assert result.score == pytest.approx(numpy.mean(list(wanted.values())), abs=1e-5)
    assert (result.p_value, result.refused) == (None, None)


def test_gauges():
    for kind in KINDS:
        many = {"num_attention_heads": 12, "num_key_value_heads": 6}  # a permutation of few leaves some where they are
        many["num_experts"] = 12 if "num_experts" in KINDS[kind] else 0
        model = random_model(**KINDS[kind] | many)
        for name, copy in gauged(model).items():
            original = fold_norms(model) if name == "rotate_residual" else model
            for role, cosines in by_role(weight_cosine(weights(original), weights(copy)).details).items():
                if role in MOVED.get(name, ()):
                    assert min(cosines) < 0.4, (name, role)  # the least: not every layer need have experts
                elif role in RESCALED.get(name, ()) and not (name == "scale_qk" and model.config.qk_norm):
                    assert min(cosines) < 0.99, (name, role)
                else:
                    assert min(cosines) == pytest.approx(1, abs=1e-5), (name, role)  # float32 sums


def test_one_factor_on_a_matrix():
    model, scaled = random_model(), random_model()
    scaled.model.layers[1].mlp.up_proj.weight.data.mul_(7)
    assert weight_cosine(weights(model), weights(scaled)).score == pytest.approx(1, abs=1e-5)


def test_strangers_are_near_0_and_descendants_near_1():
    model = random_model()
    for seed in range(1, 6):
        assert abs(weight_cosine(weights(model), weights(random_model(seed))).score) < 0.05
    assert weight_cosine(weights(model), weights(disturbed(model, 0.1))).score > 0.99
    assert weight_cosine(weights(model), weights(quantise(model, 8))).score > 0.999


def test_depths_are_aligned():
    model = random_model(num_hidden_layers=5)
    pruned = prune_layers(model, [1, 2])
    for pair in ((model, pruned), (pruned, model)):
        assert weight_cosine(*map(weights, pair)).score == pytest.approx(1, abs=1e-5)
    found = weight_cosine(weights(model), weights(pruned)).details
    assert {name.split(".")[1] for name in found} == {"0", "3", "4"}
    assert weight_cosine(weights(model), weights(depth_upscale(model, 1))).score == pytest.approx(1, abs=1e-5)
    assert abs(weight_cosine(weights(model), weights(random_model(1))).score) < 0.1


def test_of_a_mixture_and_its_dense_parent_attention_is_left_to_compare():
    dense = random_model(attention_bias=False, attention_output_bias=False)
    mixture = upcycle(dense, num_experts=4, num_experts_per_tok=2)
    result = weight_cosine(weights(dense), weights(mixture))
    assert set(by_role(result.details)) == set("qkvo") and result.score == pytest.approx(1, abs=1e-5)


def test_nothing_of_one_shape_is_refused():
    result = weight_cosine(weights(random_model(0)), weights(random_model(1, hidden_size=32)))
    assert result.score is None and "q of layer 0 is [24, 24] and [32, 32]" in result.refused


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (float("inf"), "model.layers.1.mlp.down_proj.weight holds NaN, inf"),
        (0.0, "down of layer 1 holds nothing but zeros"),
    ],
)
@pytest.mark.parametrize("depth", [3, 4])
def test_numbers_that_are_no_weights_are_refused(depth, number, message):
    model, wrong = random_model(0), random_model(1, num_hidden_layers=depth)
    wrong.model.layers[1].mlp.down_proj.weight.data.fill_(number)
    for pair in ((model, wrong), (wrong, model)):
        result = weight_cosine(*map(weights, pair))
        assert result.score is None and message in result.refused
