"""Pangu Pro MoE, for which there is no oracle: a second implementation in plain loops, and a case done by hand.

The slow version follows the formulas (arXiv 2505.21411, section 2; vllm-ascend for biases, router scale and shared
expert), one position, head and expert at a time, in float64, from the tensors as they lie on disk.
"""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minimoe.model import MoEConfig, MoEForCausalLM, MoELayer, route_grouped
from minimoe.model.families import read_config

# Experts, groups, active experts. The group size E/M differs from the experts per group K/M and from K, but for
# the published 64, 8, 8 scaled down: there E/M = K, which hides an offset computed from K.
SHAPES = [(6, 2, 2), (6, 2, 4), (12, 4, 4), (12, 3, 6), (8, 1, 3), (4, 4, 4), (16, 4, 4)]


def pangu_config(experts: int, groups: int, active: int, **settings) -> MoEConfig:
    return MoEConfig(
        **{
            "vocab_size": 23,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 10,
            "moe_intermediate_size": 6,
            "shared_expert_intermediate_size": 8,
            "num_experts": experts,
            "num_experts_per_tok": active,
            "n_group": groups,
            "router": "grouped",
            "router_scale": True,
            "attention_bias": True,
            "attention_output_bias": True,
            "tie_word_embeddings": False,
            "rope_theta": 500.0,
            "model_type": "pangu_pro_moe",
            **settings,
        }
    )


def random_model(config: MoEConfig, seed: int = 0) -> MoEForCausalLM:
    model = MoEForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name or "scale" in name else 0.0, 0.4, generator=generator)
    return model


# -- the slow version: lists of floats, one token at a time


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def gated_mlp(tensors: dict, prefix: str, x: np.ndarray) -> np.ndarray:
    gate, up, down = (tensors[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    inner = [silu(float(gate[i] @ x)) * float(up[i] @ x) for i in range(len(gate))]
    return down @ np.array(inner)


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / math.sqrt(sum(value**2 for value in x) / len(x) + eps) * weight


def mixture(tensors: dict, prefix: str, x: np.ndarray, groups: int, active: int) -> np.ndarray:
    logits = tensors[f"{prefix}.gate.weight"] @ x
    experts = len(logits)
    total = sum(math.exp(value) for value in logits)
    probability = [math.exp(value) / total for value in logits]
    output = np.zeros_like(x)
    for group in range(groups):
        members = range(group * experts // groups, (group + 1) * experts // groups)
        best = sorted(members, key=lambda e: -probability[e])[: active // groups]
        for e in best:
            scale = tensors[f"{prefix}.router_scale"][0, e]
            output += probability[e] * scale * gated_mlp(tensors, f"{prefix}.experts.{e}", x)
    if f"{prefix}.shared_expert.gate_proj.weight" in tensors:
        output += gated_mlp(tensors, f"{prefix}.shared_expert", x)
    return output


def turn(head: np.ndarray, position: int, theta: float) -> np.ndarray:
    half = len(head) // 2
    turned = np.empty_like(head)
    for i in range(half):
        angle = position / theta ** (2 * i / len(head))
        turned[i] = head[i] * math.cos(angle) - head[i + half] * math.sin(angle)
        turned[i + half] = head[i + half] * math.cos(angle) + head[i] * math.sin(angle)
    return turned


def attention(tensors: dict, prefix: str, xs: list, raw: dict) -> list:
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    size = raw["hidden_size"] // heads

    def project(name: str, x: np.ndarray) -> np.ndarray:
        return tensors[f"{prefix}.{name}_proj.weight"] @ x + tensors[f"{prefix}.{name}_proj.bias"]

    outputs = []
    for position, x in enumerate(xs):
        mixed = []
        for head in range(heads):
            theirs = slice(head // (heads // kv_heads) * size, (head // (heads // kv_heads) + 1) * size)
            query = turn(project("q", x)[head * size : (head + 1) * size], position, raw["rope_theta"])
            keys = [turn(project("k", xs[j])[theirs], j, raw["rope_theta"]) for j in range(position + 1)]
            strength = [math.exp(float(query @ key) / math.sqrt(size)) for key in keys]
            values = [project("v", xs[j])[theirs] for j in range(position + 1)]
            mixed.extend(sum(s * value for s, value in zip(strength, values, strict=True)) / sum(strength))
        outputs.append(project("o", np.array(mixed)))
    return outputs


def slow_logits(folder, ids: list[int]) -> np.ndarray:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    eps, active = raw["rms_norm_eps"], raw["num_experts_per_tok"]
    groups = raw.get("n_group", active)
    xs = [tensors["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(raw["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        before, after = (tensors[f"{prefix}.{name}_layernorm.weight"] for name in ("input", "post_attention"))
        attended = attention(tensors, f"{prefix}.self_attn", [norm(x, before, eps) for x in xs], raw)
        xs = [x + more for x, more in zip(xs, attended, strict=True)]
        if layer in raw.get("mlp_only_layers", []):
            xs = [x + gated_mlp(tensors, f"{prefix}.mlp", norm(x, after, eps)) for x in xs]
        else:
            xs = [x + mixture(tensors, f"{prefix}.mlp", norm(x, after, eps), groups, active) for x in xs]
    return np.array([tensors["lm_head.weight"] @ norm(x, tensors["model.norm.weight"], eps) for x in xs])


@pytest.mark.parametrize(("experts", "groups", "active"), SHAPES)
def test_equal_to_the_slow_version(experts, groups, active, tmp_path):
    settings = {2: {}, 1: {"mlp_only_layers": [1]}, 0: {"shared_expert_intermediate_size": 0}}[active % 3]
    random_model(pangu_config(experts, groups, active, **settings), seed=experts + active).save_pretrained(tmp_path)
    model = MoEForCausalLM.from_pretrained(tmp_path)
    ids = [3, 17, 0, 22, 3, 8, 11]
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0].numpy()
    expected = slow_logits(tmp_path, ids)
    # 1e-7, not 1e-14: the rotary angles are float32, as in every implementation.
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


def test_by_hand(tmp_path):
    """One token, E = 4 experts in M = 2 groups of 2, K = 2, everything small enough to follow on paper.

    x = [1, 0]; the router rows are [log 1, 0], [log 4, 0], [log 2, 0], [log 3, 0], so that the softmax over all four is
    p = [0.1, 0.4, 0.2, 0.3]. Group 0 holds experts 0 and 1: expert 1 wins with 0.4. Group 1 holds experts 2 and 3:
    expert 3 wins with 0.3. (The two best of all four are the same here; with p_0 = 0.35 they would not be.)

    router_scale = [9, 0.5, 9, 2]: weights 0.4 * 0.5 = 0.2 and 0.3 * 2 = 0.6. They are not made to sum to 1.

    Expert e: gate row [1, 0], up row [e + 1, 0], down column [1, 10]. On x: silu(1) * (e + 1) * [1, 10].
    Expert 1 gives silu(1) * [2, 20], expert 3 gives silu(1) * [4, 40].
    Shared expert: gate [1, 0], up [5, 0], down [1, 0]: silu(1) * [5, 0], added with weight 1.

    Sum: silu(1) * (0.2 * [2, 20] + 0.6 * [4, 40] + [5, 0]) = silu(1) * [0.4 + 2.4 + 5, 4 + 24] = silu(1) * [7.8, 28].
    """
    config = pangu_config(
        4, 2, 2, hidden_size=2, num_attention_heads=1, num_key_value_heads=1,
        moe_intermediate_size=1, shared_expert_intermediate_size=1,
    )  # fmt: skip
    layer = MoELayer(config).double()
    with torch.no_grad():
        layer.gate.weight.copy_(torch.tensor([[math.log(n), 0.0] for n in (1, 4, 2, 3)]))
        layer.gate.router_scale.copy_(torch.tensor([9, 0.5, 9, 2]))
        for e in range(4):
            layer.experts.gate_proj[e] = torch.tensor([[1.0, 0.0]])
            layer.experts.up_proj[e] = torch.tensor([[e + 1.0, 0.0]])
            layer.experts.down_proj[e] = torch.tensor([[1.0], [10.0]])
        layer.shared_expert.gate_proj.weight.copy_(torch.tensor([[1.0, 0.0]]))
        layer.shared_expert.up_proj.weight.copy_(torch.tensor([[5.0, 0.0]]))
        layer.shared_expert.down_proj.weight.copy_(torch.tensor([[1.0], [0.0]]))
        output, chosen = layer(torch.tensor([[[1.0, 0.0]]], dtype=torch.float64))
    silu_1 = 0.7310585786300049  # 1 / (1 + 1/e)
    assert chosen.indices.tolist() == [[1, 3]]
    torch.testing.assert_close(chosen.weights, torch.tensor([[0.2, 0.6]], dtype=torch.float64))
    torch.testing.assert_close(output, torch.tensor([[[7.8, 28.0]]], dtype=torch.float64) * silu_1)


def test_the_offset_of_a_group_is_its_size_and_not_the_active_experts():
    """12 experts in 3 groups of 4, K = 3: an offset of K instead of 4 would name experts 1 + 3 and 1 + 6."""
    logits = torch.full((1, 12), -5.0)
    logits[0, [1, 5, 9]] = 5.0  # the second of each group
    assert route_grouped(logits, 3, 3).indices.tolist() == [[1, 5, 9]]


def test_every_group_is_active_even_if_all_its_experts_score_lower():
    logits = torch.tensor([[9.0, 8.0, 7.0, -9.0, -8.0, -7.0]])
    assert route_grouped(logits, 2, 2).indices.tolist() == [[0, 5]]


@pytest.mark.parametrize("name", ["PanguProMoE", "PanGuMoE"])
def test_a_published_configuration_is_read(name, tmp_path):
    """The fields of the published configuration, sizes scaled down; without n_group there are K groups."""
    random_model(pangu_config(16, 4, 4)).save_pretrained(tmp_path)
    raw = {
        "architectures": ["PanguProMoEForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoModelForCausalLM": "modeling_pangu_moe.PanguProMoEForCausalLM"},
        "hidden_act": "silu",
        "hidden_size": 16,
        "initializer_range": 0.02,
        "max_position_embeddings": 512,
        "model_type": name,
        "moe_intermediate_size": 6,
        "num_attention_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500.0,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 8,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 23,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    model = MoEForCausalLM.from_pretrained(tmp_path)
    assert model.config.model_type == "pangu_pro_moe"
    assert (model.config.n_group, model.config.router, model.config.rms_norm_eps) == (4, "grouped", 1e-5)
    with torch.no_grad():
        found = model(torch.tensor([[1, 2, 3, 22]])).logits[0].numpy()
    np.testing.assert_allclose(found, slow_logits(tmp_path, [1, 2, 3, 22]), rtol=1e-5, atol=1e-5)


def test_absent_fields_mean_the_published_model():
    """Its size in billions, 71.99 and 16.50 active, is that of the paper (arXiv 2505.21411)."""
    config = read_config({"model_type": "PanguProMoE"})
    sizes = config.num_parameters(), config.num_parameters(active=True)
    assert [round(size / 1e9, 2) for size in sizes] == [71.99, 16.5]
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (48, 40, 8)
    assert (config.max_position_embeddings, config.rope_theta, config.rms_norm_eps) == (131072, 16e6, 1e-5)
    assert (config.n_group, config.router_aux_loss_coef, config.tie_word_embeddings) == (8, 0.001, False)


def test_on_disk_as_vllm_ascend_expects_it(tmp_path):
    random_model(pangu_config(16, 4, 4)).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert raw["model_type"] == "PanguProMoE"
    assert raw["architectures"] == ["PanguProMoEForCausalLM"]
    assert raw["rope_theta"] == 500.0
    assert "n_group" not in raw  # K groups is what goes without saying
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    layer = {name.removeprefix("model.layers.1."): shape for name, shape in shapes.items() if "layers.1." in name}
    assert layer == {
        "input_layernorm.weight": (16,),
        "post_attention_layernorm.weight": (16,),
        **{f"self_attn.{name}_proj.weight": (16 if name in "qo" else 8, 16) for name in "qkvo"},
        **{f"self_attn.{name}_proj.bias": (16 if name in "qo" else 8,) for name in "qkvo"},
        "mlp.gate.weight": (16, 16),
        "mlp.router_scale": (1, 16),
        "mlp.shared_expert.gate_proj.weight": (8, 16),
        "mlp.shared_expert.up_proj.weight": (8, 16),
        "mlp.shared_expert.down_proj.weight": (16, 8),
        **{f"mlp.experts.{e}.gate_proj.weight": (6, 16) for e in range(16)},
        **{f"mlp.experts.{e}.up_proj.weight": (6, 16) for e in range(16)},
        **{f"mlp.experts.{e}.down_proj.weight": (16, 6) for e in range(16)},
    }


@pytest.mark.parametrize(("experts", "groups", "active"), SHAPES)
def test_round_trip(experts, groups, active, tmp_path):
    model = random_model(pangu_config(experts, groups, active)).bfloat16()
    model.save_pretrained(tmp_path)
    assert ("n_group" in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))) == (groups != active)
    back = MoEForCausalLM.from_pretrained(tmp_path)
    assert (back.config.n_group, back.config.num_experts_per_tok) == (groups, active)
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_a_router_scale_without_its_row_is_refused(tmp_path):
    random_model(pangu_config(6, 2, 2)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.router_scale"] = tensors["model.layers.0.mlp.router_scale"][0].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.router_scale is \[6\], wanted \[1, 6\]"):
        MoEForCausalLM.from_pretrained(tmp_path)
