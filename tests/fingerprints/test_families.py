"""Models of many families, as transformers writes them: every role is what the model computes with, relatives are
recognised, strangers are not."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from minimoe.fingerprints.compare import compare
from minimoe.fingerprints.verdict import CANNOT_TELL, NO_EVIDENCE, SAME, SHARED
from minimoe.fingerprints.weights import open_weights
from tests.rounding import assert_near

VOCABULARY = 160
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = (
    SIZES | TOKENS | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
)
OLD = {"vocab_size": VOCABULARY, "hidden_size": 32}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | TOKENS
MIXTURE = PLAIN | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED_EXPERT = MIXTURE | {"shared_expert_intermediate_size": 16}
DEEPSEEK = PLAIN | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
DEEPSEEK |= {"moe_intermediate_size": 24, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
LATENT |= {"head_dim": 4, "num_key_value_heads": 4}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
SEES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
FAMILIES = {
    "llama": PLAIN | {"tie_word_embeddings": True},
    "mistral": PLAIN | {"sliding_window": 4},
    "qwen2": PLAIN,
    "qwen3": PLAIN,
    "gemma": PLAIN,
    "gemma2": PLAIN,
    "gemma3": {"text_config": PLAIN | {"model_type": "gemma3_text"}, "vision_config": SEES | {"patch_size": 14}},
    "phi": PLAIN,
    "phi3": PLAIN,
    "gpt2": GPT,
    "gpt_neo": OLD | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": PLAIN,
    "gptj": GPT | {"rotary_dim": 4},
    "gpt_bigcode": GPT,
    "bloom": OLD | {"n_layer": 2, "n_head": 4},
    "falcon": SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True},
    "opt": SIZES | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "olmo": PLAIN,
    "olmo2": PLAIN,
    "olmoe": MIXTURE,
    "stablelm": PLAIN,
    "starcoder2": PLAIN,
    "persimmon": PLAIN | {"qk_layernorm": False},
    "nemotron": PLAIN,
    "cohere": PLAIN,
    "granite": PLAIN,
    "granitemoeshared": MIXTURE | {"shared_intermediate_size": 16},
    "mixtral": MIXTURE,
    "qwen2_moe": SHARED_EXPERT,
    "qwen3_moe": MIXTURE,
    "qwen3_next": SHARED_EXPERT | LINEAR,
    "deepseek_v2": DEEPSEEK | LATENT | {"q_lora_rank": None},
    "deepseek_v3": DEEPSEEK | LATENT,
    "gpt_oss": MIXTURE,
    "glm4": PLAIN,
    "glm4_moe": DEEPSEEK,
    "hunyuan_v1_moe": PLAIN | {"num_experts": 4, "moe_topk": 2},
    "ernie4_5_moe": PLAIN | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 0},
    "jamba": MIXTURE | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 2},
    "llama4_text": MIXTURE | {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 48},
}


class Folders(NamedTuple):
    """A model, and models made from it or not, each written by transformers."""

    model: PreTrainedModel
    base: Path
    renumbered: Path
    tuned: Path
    stranger: Path


def random_model(family: str, seed: int) -> PreTrainedModel:
    """Norms lie around 1, or around 0 where 1 is added to them; biases of queries, keys and values are not 0."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    for name, parameter in model.named_parameters():
        is_bias = name.endswith("bias")
        if re.search(r"(q|k|v|query_key_value|c_attn)(_proj)?\.bias$", name) or (parameter.dim() > 1 and not is_bias):
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith("weight"):
            parameter.data += 0.1 * torch.randn_like(parameter)
        else:
            nn.init.zeros_(parameter)
    return model


def order(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))


def renumber(model: PreTrainedModel, family: str) -> None:
    """Give neurons and experts another order, the same one in all tensors of a size."""
    by_pairs, is_transposed = family == "gpt_oss", family in ("gpt_oss", "llama4_text")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "vision" not in name}
    for name, tensor in tensors.items():
        if re.search(r"experts\.(gate_up|down)_proj(_bias)?$|(router|gate|wg|layer)\.weight$|router\.bias$", name):
            if tensor.shape[0] == 4:
                tensor.copy_(tensor[order(4)])
        elif name.endswith("e_score_correction_bias"):
            tensor.copy_(tensor[..., order(4)])
    for name, tensor in tensors.items():
        side = None
        if re.search(r"experts\.(gate_up_proj|gate_up_proj_bias)$", name):
            side = -1 if is_transposed or tensor.dim() == 2 else 1
        elif re.search(r"experts\.down_proj$", name):
            side = 1 if is_transposed else 2
        elif "attn" in name or "attention." in name:
            continue
        elif re.search(r"(gate_proj|up_proj|fc1|fc_in|dense_h_to_4h|c_fc|input_linear)\.(weight|bias)$", name):
            side = -1 if family == "gpt2" else 0
        elif re.search(r"(down_proj|fc2|fc_out|dense_4h_to_h|c_proj|output_linear)\.weight$", name):
            side = 0 if family == "gpt2" else 1
        if side is not None:
            size, is_double = tensor.shape[side], bool(re.search(r"gate_up|input_linear", name))
            half = order(size // 2 if is_double else size)
            if is_double:
                half = (
                    torch.stack([2 * half, 2 * half + 1], 1).flatten()
                    if by_pairs
                    else torch.cat([half, half + size // 2])
                )
            tensor.copy_(tensor.index_select(side, half))


def tune(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if re.search(r"\.1\.", name):
            parameter.data += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Folders]:
    """The folders of a family, written once."""
    tokenizer = Tokenizer(models.WordLevel({f"token {i}": i for i in range(VOCABULARY)}, "token 0"))
    written: dict[str, Folders] = {}

    def save(model: PreTrainedModel, folder: Path) -> Path:
        model.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    def of(family: str) -> Folders:
        if family not in written:
            root, ids = tmp_path_factory.mktemp(family), torch.tensor([[5, 3, 5, 8, 9]])
            model, changed = random_model(family, 0), random_model(family, 0)
            base, stranger = save(model, root / "base"), save(random_model(family, 1), root / "stranger")
            with torch.no_grad():
                logits = changed(ids).logits
                renumber(changed, family)
                assert_near(changed(ids).logits, logits)
                renumbered = save(changed, root / "renumbered")
                changed = random_model(family, 0)
                tune(changed)
            written[family] = Folders(model, base, renumbered, save(changed, root / "tuned"), stranger)
        return written[family]

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_relatives_are_recognised_and_strangers_are_not(family, folders):
    base, renumbered, tuned, stranger = folders(family)[1:]
    assert compare(base, renumbered).verdict in (SAME, SHARED)
    assert compare(base, tuned).verdict == SHARED
    assert compare(base, stranger).verdict in (NO_EVIDENCE, CANNOT_TELL)


class Heard(NamedTuple):
    """What went into the attention of one layer of transformers, and what it made of it, for one token."""

    layer_input: Tensor  # [H]
    attention_input: Tensor  # [H]
    parts: tuple[Tensor, Tensor, Tensor]  # queries, keys and values, [heads, D] each


def listen(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> list[Heard]:
    """Run one token, at the first position, where no rotary embedding turns anything."""
    parts, attention_inputs, layer_inputs = [], [], []

    def spy(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts.append((query[0, :, 0], key[0, :, 0], value[0, :, 0]))
        return value.new_zeros(1, query.shape[1], 1, value.shape[-1])

    def keep(inputs: list[Tensor]) -> Callable:
        return lambda module, args, kwargs: inputs.append(kwargs.get("hidden_states", args[0] if args else None)[0, 0])

    patch.setattr(
        AttentionInterface, "get_interface", lambda *_: lambda _, *qkv, **__: (spy(*qkv[:3]).transpose(1, 2), None)
    )
    patch.setattr(F, "scaled_dot_product_attention", lambda *qkv, **_: spy(*qkv[:3]))
    modules, hooks = dict(model.named_modules()), []
    for name in modules:
        if re.search(r"\.\d+\.(self_attn|attention|attn|self_attention)$", name) and "vision" not in name:
            layer = modules[name.rpartition(".")[0]]
            hooks.append(modules[name].register_forward_pre_hook(keep(attention_inputs), with_kwargs=True))
            hooks.append(layer.register_forward_pre_hook(keep(layer_inputs), with_kwargs=True))
    with torch.no_grad():
        model(torch.tensor([[5]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [Heard(*each) for each in zip(layer_inputs, attention_inputs, parts, strict=True)]


def assert_along(found: Tensor, wanted: Tensor) -> None:
    """Each row points where it should: what norms divide by is no matter of weights."""
    assert found.shape == wanted.shape
    assert F.cosine_similarity(found, wanted, dim=-1).min() > 0.9999


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("bloom", "gpt_neo", "gptj")])
def test_norms_queries_keys_and_values_are_those_that_transformers_computes(family, folders, monkeypatch):
    weights, model = open_weights(folders(family).base), folders(family).model
    layers = weights.layers_with("q")
    for layer, heard in zip(layers, listen(model, monkeypatch), strict=True):
        if weights.has("norm1", layer):
            x, norm = heard.layer_input, weights.get("norm1", layer)
            either = [F.rms_norm(x, x.shape) * norm, F.layer_norm(x, x.shape) * norm]
            assert max(F.cosine_similarity(heard.attention_input, each, dim=0) for each in either) > 0.9999
        for role, found in zip("qkv", heard.parts, strict=True):
            wanted = weights.get(role, layer) @ heard.attention_input
            if weights.has(f"{role}_bias", layer):
                wanted = wanted + weights.get(f"{role}_bias", layer)
            if weights.has(f"{role}_norm", layer):
                norm = weights.get(f"{role}_norm", layer)
                wanted = wanted * norm.repeat(len(wanted) // len(norm))
            heads = weights.heads(layer)[role != "q"]
            wanted = wanted.view(heads, -1).repeat_interleave(len(found) // heads, dim=0)
            if "deepseek" in family and role != "v":  # transformers sorts the numbers that positions turn
                own = LATENT["qk_nope_head_dim"]
                found, wanted = found[:, :own], wanted[:, :own]
            assert_along(found, wanted)


def test_queries_keys_and_values_of_bloom(folders):
    weights, model = open_weights(folders("bloom").base), folders("bloom").model
    attention, x = model.transformer.h[1].self_attention, torch.randn(1, 1, 32)
    with torch.no_grad():
        parts = attention._reshape(attention.query_key_value(x))
    for role, found in zip("qkv", parts, strict=True):
        wanted = weights.get(role, 1) @ x[0, 0] + weights.get(f"{role}_bias", 1)
        assert_near(found.flatten(), wanted)


ACTIVATIONS = ("act_fn", "act", "activation_fn")


@pytest.mark.parametrize(
    "family",
    [*("llama", "gemma", "phi", "phi3", "gpt2", "gpt_neox", "falcon"), "starcoder2", "nemotron", "glm4", "deepseek_v3"],
)
def test_mlps_are_those_of_transformers(family, folders):
    weights, model = open_weights(folders(family).base), folders(family).model
    mlp = next(mlp for name, mlp in model.named_modules() if re.search(r"\.0\.(mlp|feed_forward)$", name))
    activation = next(getattr(mlp, name) for name in ACTIVATIONS if hasattr(mlp, name))
    x = torch.randn(32)
    with torch.no_grad():
        inner = weights.get("up", 0) @ x
        inner = activation(weights.get("gate", 0) @ x) * inner if weights.has("gate", 0) else activation(inner)
        assert_near(mlp(x[None, None])[0, 0], weights.get("down", 0) @ inner)


@pytest.mark.parametrize(
    "family",
    [*("mixtral", "olmoe", "qwen3_moe", "qwen3_next", "granitemoeshared"), "deepseek_v3", "hunyuan_v1_moe", "gpt_oss"],
)
def test_experts_are_those_of_transformers(family, folders):
    weights, model = open_weights(folders(family).base), folders(family).model
    experts = next(module for name, module in model.named_modules() if re.search(r"\.1\..*\.experts$", name))
    x = torch.randn(32)
    for expert in range(4):
        gate, up = (weights.get(role, 1)[expert] @ x for role in ("gate", "up"))
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate) if family == "gpt_oss" else F.silu(gate) * up
        with torch.no_grad():
            found = experts(x[None], torch.tensor([[expert]]), torch.ones(1, 1))[0]
        assert_near(found, weights.get("down", 1)[expert] @ inner)


def test_experts_of_llama_4(folders):
    weights, model = open_weights(folders("llama4_text").base), folders("llama4_text").model
    x = torch.randn(4, 32)
    gate, up = (torch.einsum("eih,eh->ei", weights.get(role, 1), x) for role in ("gate", "up"))
    wanted = torch.einsum("ehi,ei->eh", weights.get("down", 1), F.silu(gate) * up)
    with torch.no_grad():
        assert_near(model.model.layers[1].feed_forward.experts(x), wanted)
