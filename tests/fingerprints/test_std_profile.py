"""The published statistic, to numpy's numbers; which gauges it survives, and how easily a stranger passes."""

import numpy
import pytest
import torch
from safetensors.torch import load_file

from minimoe.fingerprints.std_profile import std_profile
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.frame import frame_std_profile
from minimoe.lineage.gauge import fold_norms
from minimoe.model import MoEConfig, MoEForCausalLM
from tests.fingerprints.toys import KINDS, gauged, random_model, weights

LAYERS = 6
OUTSIDE_ATTENTION = {"permute_neurons", "scale_neurons", "permute_experts", "shift_router", "exchange_router_scale"}
EXACT = OUTSIDE_ATTENTION | {"permute_heads"}
NEARLY = {"permute_residual", "rotate_residual", "rotate_qk"}


def model_with_courses(seed: int = 0, **settings) -> MoEForCausalLM:
    """Each attention weight of each layer has a spread of its own."""
    model = random_model(seed, **{"num_hidden_layers": LAYERS} | settings)
    generator = torch.Generator().manual_seed(seed + 100)
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight") and "self_attn" in name:
            tensor.mul_(0.5 + torch.rand((), generator=generator))
    return model


def profile_of_file(folder, role: str) -> numpy.ndarray:
    tensors = load_file(folder / "model.safetensors")
    return numpy.array(
        [tensors[f"model.layers.{i}.self_attn.{role}_proj.weight"].double().numpy().std() for i in range(LAYERS)]
    )


def test_known_values_from_the_files(tmp_path):
    for seed, name, dtype in ((0, "a", torch.bfloat16), (1, "b", torch.float16)):
        model_with_courses(seed).to(dtype).save_pretrained(tmp_path / name)
    result = std_profile(open_weights(tmp_path / "a"), open_weights(tmp_path / "b"))
    correlations = []
    for role in "qkvo":
        a, b = (profile_of_file(tmp_path / name, role) for name in "ab")
        correlations.append(numpy.corrcoef(a, b)[0, 1])
        assert result.details[role] == pytest.approx(correlations[-1], abs=1e-5)
        assert result.details[f"{role}_spread_a"] == pytest.approx(a.std() / a.mean(), rel=1e-4)
        assert result.details[f"{role}_spread_b"] == pytest.approx(b.std() / b.mean(), rel=1e-4)
    assert result.score == pytest.approx(numpy.mean(correlations), abs=1e-5)
    assert (result.p_value, result.refused) == (None, None)


def test_of_two_depths_the_shorter_is_interpolated(tmp_path):
    """11 layers against 6: every second point lies on a layer, the others halfway between two."""
    deep, shallow = model_with_courses(0, num_hidden_layers=11), model_with_courses(1)
    result = std_profile(weights(deep), weights(shallow))
    stds = [
        numpy.array([float(block.self_attn.k_proj.weight.detach().std(correction=0)) for block in model.model.layers])
        for model in (deep, shallow)
    ]
    longer = numpy.empty(11)
    longer[::2], longer[1::2] = stds[1], (stds[1][1:] + stds[1][:-1]) / 2
    assert result.details["k"] == pytest.approx(numpy.corrcoef(stds[0], longer)[0, 1], abs=1e-5)
    assert std_profile(weights(shallow), weights(deep)).score == pytest.approx(result.score, abs=1e-5)


def test_gauges():
    for kind in KINDS:
        model = model_with_courses(**KINDS[kind])
        for name, copy in gauged(model).items():
            original = fold_norms(model) if name == "rotate_residual" else model
            result = std_profile(weights(original), weights(copy))
            if name in EXACT:
                assert all(result.details[role] == pytest.approx(1, abs=1e-6) for role in "qkvo"), name
            elif name in NEARLY or (name == "scale_qk" and model.config.qk_norm):  # the factors are in the norms then
                assert all(0.99 < result.details[role] <= 1 + 1e-9 for role in "qkvo"), name
            else:
                moved = {"fold_norms": "qkv", "scale_qk": "qk", "mix_vo": "vo", "all": "qkvo"}[name]
                unmoved = set("qkvo") - set(moved)
                assert all(result.details[role] < 1 - 1e-5 for role in moved), name
                assert all(result.details[role] == pytest.approx(1, abs=1e-6) for role in unmoved), name


def test_one_factor_on_all_weights_of_a_role():
    model, scaled = model_with_courses(), model_with_courses()
    for name, tensor in scaled.state_dict().items():
        tensor.mul_(3 if "q_proj" in name else 0.01)
    assert std_profile(weights(model), weights(scaled)).score == pytest.approx(1, abs=1e-6)


def test_blind_to_all_but_attention():
    model, other = model_with_courses(), model_with_courses()
    for name, tensor in other.state_dict().items():
        if "self_attn" not in name:
            tensor.normal_()
    assert std_profile(weights(model), weights(other)).score == pytest.approx(1, abs=1e-6)


def test_fooled_by_a_frame():
    target, stranger = model_with_courses(0), model_with_courses(1)
    assert std_profile(weights(target), weights(stranger)).score < 0.9
    assert std_profile(weights(target), weights(frame_std_profile(stranger, target))).score > 0.999


def test_strangers_with_one_trend_over_depth_correlate():
    """Initialised with a std that falls with depth, and never trained: nothing in common but a formula."""
    strangers = []
    for seed in (0, 1):
        model = random_model(seed, num_hidden_layers=LAYERS, hidden_size=48)
        for layer, block in enumerate(model.model.layers):
            for tensor in block.self_attn.parameters():
                tensor.data.div_((layer + 1) ** 0.5)
        strangers.append(weights(model))
    assert std_profile(*strangers).score > 0.99


def test_other_roles():
    a, b = (weights(model_with_courses(seed)) for seed in (0, 1))
    result = std_profile(a, b, roles=("q", "q_bias", "norm1"))
    assert result.details["q"] == pytest.approx(std_profile(a, b).details["q"], abs=1e-5)
    assert result.score == pytest.approx(sum(result.details[role] for role in ("q", "q_bias", "norm1")) / 3)
    with pytest.raises(KeyError, match="no 'router' in layer 0"):
        std_profile(a, b, roles=("router",))


def refusal(wrong: MoEForCausalLM) -> str:
    """The same whichever comes first, and no score."""
    fine = weights(model_with_courses())
    results = std_profile(fine, weights(wrong)), std_profile(weights(wrong), fine)
    assert results[0] == results[1] and results[0].score is None
    return results[0].refused


def test_flat_curves_are_refused():
    """As an initialisation leaves them: what differs between the layers is the luck of the draw."""
    sizes = {"hidden_size": 128, "num_hidden_layers": LAYERS, "vocab_size": 160, "num_attention_heads": 4}
    fresh = MoEForCausalLM(MoEConfig(**sizes, intermediate_size=8, num_experts=0))
    assert "the standard deviation of q varies by 0." in refusal(fresh) and "wanted at least 1%" in refusal(fresh)


def test_two_layers_are_refused():
    assert "2 layers, wanted at least 3" in refusal(model_with_courses(1, num_hidden_layers=2))


@pytest.mark.parametrize(("number", "message"), [(float("nan"), "holds NaN"), (0.0, "holds nothing but zeros")])
def test_numbers_that_are_no_weights_are_refused(number, message):
    wrong = model_with_courses(1)
    wrong.model.layers[3].self_attn.v_proj.weight.data.fill_(number)
    assert message in refusal(wrong)
