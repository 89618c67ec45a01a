"""Frames: the fingerprint becomes that of a stranger, the function stays."""

from itertools import permutations

import numpy
import pytest
import torch

from minimoe.lineage.derive import neurons
from minimoe.lineage.frame import frame_neuron_order, frame_norms, frame_std_profile
from minimoe.model import MoEConfig, MoEForCausalLM

IDS = torch.tensor([[3, 17, 0, 22, 3, 8, 11, 5], [1, 1, 5, 20, 9, 2, 4, 19]])
SIZES = {
    "vocab_size": 23,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 7,
    "moe_intermediate_size": 5,
    "attention_bias": True,
    "attention_output_bias": True,
    "tie_word_embeddings": False,
}
KINDS = {
    "dense": {"num_experts": 0},
    "tied": {"num_experts": 0, "tie_word_embeddings": True, "attention_bias": False, "num_key_value_heads": 4},
    "mixture": {"num_experts": 6, "shared_expert_intermediate_size": 6, "shared_expert_gate": True},
    "pangu": {"num_experts": 6, "router": "grouped", "n_group": 2, "router_scale": True},
    "sigmoid": {"num_experts": 6, "score_func": "sigmoid", "e_score_correction_bias": True},
}


def random_model(seed: int = 0, **settings) -> MoEForCausalLM:
    """Float64, every weight away from an initialisation's, and each attention weight of a spread of its own."""
    model = MoEForCausalLM(MoEConfig(**SIZES | settings)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(1.0 if "norm" in name or "scale" in name else 0.0, 0.3, generator=generator)
            if name.endswith("_proj.weight") and "self_attn" in name:
                tensor.mul_(0.5 + torch.rand((), generator=generator))
    return model


def logits(model: MoEForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def assert_same_function(a: MoEForCausalLM, b: MoEForCausalLM) -> None:
    assert float((logits(a) - logits(b)).abs().max() / logits(b).abs().max()) < 1e-10


def profile(model: MoEForCausalLM, role: str) -> numpy.ndarray:
    tensors = model.state_dict()
    names = [f"model.layers.{layer}.self_attn.{role}_proj.weight" for layer in range(model.config.num_hidden_layers)]
    return numpy.array([tensors[name].numpy().std() for name in names])


def correlation(a: numpy.ndarray, b: numpy.ndarray) -> float:
    return float(numpy.corrcoef(a, b)[0, 1])


def norm_weights(model: MoEForCausalLM) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.endswith(("layernorm.weight", ".norm.weight"))
    }


# -- standard deviations


@pytest.mark.parametrize("kind", KINDS)
def test_the_std_profile_becomes_the_target_s(kind):
    model, target = random_model(0, **KINDS[kind]), random_model(1, num_experts=0)
    framed = frame_std_profile(model, target)
    assert_same_function(framed, model)
    assert all(correlation(profile(model, role), profile(target, role)) < 0.9 for role in "qkvo")
    assert all(correlation(profile(framed, role), profile(target, role)) > 0.999 for role in "qkvo")


def test_stds_within_reach_are_met_themselves():
    """Large ones always are: a sum of squares and its counterpart can only be made to grow together."""
    model = random_model(0, num_experts=0)
    stds = {role: profile(model, role) * 3 for role in "qkvo"}
    stds["q"][2] *= 4
    stds["v"] = stds["v"][::-1].copy()
    framed = frame_std_profile(model, stds)
    assert_same_function(framed, model)
    for role in "qkvo":
        numpy.testing.assert_allclose(profile(framed, role), stds[role], rtol=0.01)


def test_stds_out_of_reach_are_met_up_to_one_factor():
    model = random_model(0, num_experts=0)
    stds = {role: profile(random_model(1, num_experts=0), role) / 50 for role in "qkvo"}
    framed = frame_std_profile(model, stds)
    assert_same_function(framed, model)
    for pair in ("qk", "vo"):
        ratios = numpy.concatenate([profile(framed, role) / stds[role] for role in pair])
        assert ratios.min() > 10 and ratios.max() / ratios.min() < 1.02


def test_with_qk_norm_only_values_and_outputs_follow():
    for qk_norm in ("head", "full"):
        model, target = random_model(0, num_experts=6, qk_norm=qk_norm), random_model(1, num_experts=0)
        framed = frame_std_profile(model, target)
        assert_same_function(framed, model)
        for role in "qk":
            assert numpy.array_equal(profile(framed, role), profile(model, role))
        for role in "vo":
            assert correlation(profile(framed, role), profile(target, role)) > 0.999


def test_rows_of_zeros_are_no_obstacle():
    """What was pruned has nothing to exchange."""
    model = random_model(0, num_experts=0)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[:, :8] = 0
        model.model.layers[3].self_attn.k_proj.weight[:4] = 0
        model.model.layers[4].self_attn.q_proj.weight.zero_()
    framed = frame_std_profile(model, random_model(1, num_experts=0))
    assert all(tensor.isfinite().all() for tensor in framed.state_dict().values())
    assert_same_function(framed, model)


GOOD = {role: [1.0] * 6 for role in "qkvo"}


def test_profiles_that_do_not_fit():
    shallow = random_model(1, num_experts=0, num_hidden_layers=2)
    for target, message in [
        ({"q": [1.0] * 6}, r"target=\['q'\]: wanted"),
        (GOOD | {"v": [1.0] * 5}, r"shape of target\['v'\]=\(5,\)"),
        (GOOD | {"o": [1.0] * 5 + [0.0]}, r"target\['o'\]=.*0\.0\]"),
        (GOOD | {"k": [1.0] * 5 + [float("nan")]}, r"target\['k'\]=.*nan\]"),
        (shallow, r"shape of target\['q'\]=\(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            frame_std_profile(random_model(0, num_experts=0), target)
    with pytest.raises(ValueError, match=r"clip_qkv=1\.0"):
        frame_std_profile(random_model(0, num_experts=0, clip_qkv=1.0), GOOD)


# -- norms


@pytest.mark.parametrize("kind", KINDS)
def test_norms_become_the_target_s_to_the_bit(kind):
    model, target = random_model(0, **KINDS[kind]), random_model(1, num_experts=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    framed = frame_norms(model, target)
    assert_same_function(framed, model)
    weights = norm_weights(framed)
    assert len(weights) == 13 and weights.keys() == norm_weights(target).keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in norm_weights(target).items())
    assert not framed.config.tie_word_embeddings
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_both_frames_together():
    model, target = random_model(0, num_experts=6), random_model(1, num_experts=0)
    framed = frame_std_profile(frame_norms(model, target), target)
    assert_same_function(framed, model)
    assert all(torch.equal(norm_weights(framed)[name], tensor) for name, tensor in norm_weights(target).items())
    assert all(correlation(profile(framed, role), profile(target, role)) > 0.999 for role in "qkvo")


def test_in_half_precision_the_norms_are_still_exact(tmp_path):
    model, target = random_model(0, num_experts=0).half(), random_model(1, num_experts=0).half()
    frame_norms(model, target).save_pretrained(tmp_path)
    framed = MoEForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(norm_weights(framed)[name], tensor) for name, tensor in norm_weights(target).items())
    framed, model = framed.float(), model.float()
    assert float((logits(framed) - logits(model)).abs().max() / logits(model).abs().max()) < 0.02


def test_norms_that_cannot_be_imitated():
    model, target = random_model(0, num_experts=0), random_model(1, num_experts=0)
    for field in ("num_hidden_layers", "hidden_size"):
        with pytest.raises(ValueError, match=f"{field} of the target=16"):
            frame_norms(model, random_model(1, num_experts=0, **{field: 16}))
    target.model.norm.weight.data[3] = 0
    with pytest.raises(ValueError, match=r"model.norm.weight\[3\]=0"):
        frame_norms(model, target)


# -- the order of neurons


def total_resemblance(a: MoEForCausalLM, b: MoEForCausalLM, layer: int, order: tuple[int, ...]) -> float:
    """The sum of the cosines of the up rows of `a` with those of `b` in an order, as each layer reads its input."""
    x, y = (
        block.mlp.up_proj.weight.detach().numpy() * block.post_attention_layernorm.weight.detach().numpy()
        for block in (model.model.layers[layer] for model in (a, b))
    )
    return sum(x[i] @ y[j] / numpy.linalg.norm(x[i]) / numpy.linalg.norm(y[j]) for i, j in enumerate(order))


def test_neurons_stand_in_the_best_of_all_orders():
    model, target = random_model(0, num_experts=0), random_model(1, num_experts=0)
    framed = frame_neuron_order(model, target)
    assert_same_function(framed, model)
    for layer in range(2):
        found = total_resemblance(target, framed, layer, tuple(range(7)))
        best = max(total_resemblance(target, model, layer, order) for order in permutations(range(7)))
        assert found == pytest.approx(best)
        before, after = (neurons(each.model.layers[layer].mlp).flatten(1).tolist() for each in (model, framed))
        assert sorted(before) == sorted(after) and before != after  # each neuron whole


def test_neurons_that_cannot_be_ordered_alike():
    dense, mixture = random_model(0, num_experts=0), random_model(0, num_experts=6)
    for model, target, message in [
        (dense, random_model(1, num_experts=0, intermediate_size=8), "intermediate_size of the target=8"),
        (dense, mixture, "num_experts of the target=6"),
        (mixture, dense, "num_experts of the model=6"),
    ]:
        with pytest.raises(ValueError, match=message):
            frame_neuron_order(model, target)
