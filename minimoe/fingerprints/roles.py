"""Which tensor plays which role, whatever the family calls it: names of tensors, and of sizes in config.json.

The package gguf keeps the names of more than a hundred architectures, in the files of Hugging Face and in those of
llama.cpp. `_SLOTS` says which of its tensors are of interest here, `_MORE_NAMES` what it lacks. A slot is a role, or
what roles are made of: places.py makes them. Nothing asks how a model is run: positions, windows, activations and
scaling play no part.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

PROJECTIONS = ("gate", "up", "down")
IN_A_LAYER = (
    *"qkvo",
    *(f"{role}_bias" for role in "qkvo"),
    *(f"{role}_norm" for role in "qk"),
    *("norm1", "norm2", "norm1_after", "norm2_after"),
    *PROJECTIONS,
    *("router", "router_bias", "router_scale", "router_noise", "shared_router"),
    *(f"shared_{role}" for role in PROJECTIONS),
)
ONCE = ("embedding", "head", "norm_final")

# gguf's name of a tensor -> its role, or what roles are made of. Where it gives one name to several of them, the first
# one here takes it.
_SLOTS = {
    **{f"ATTN_{slot.upper()}": slot for slot in (*"qkv", "qkv", "q_norm", "k_norm")},
    **{f"ATTN_{slot.upper()}": slot for slot in ("q_a", "q_a_norm", "q_b", "kv_a_norm", "kv_b")},  # latent attention
    **{f"ATTN_{slot.upper()}": slot for slot in ("k_b", "v_b")},  # llama.cpp cuts kv_b in two
    "ATTN_KV_A_MQA": "kv_a",
    "ATTN_OUT": "o",
    **{f"FFN_{role.upper()}": role for role in PROJECTIONS},
    **{f"FFN_{role.upper()}_EXP": f"expert_{role}" for role in PROJECTIONS},
    **{f"FFN_{role.upper()}_SHEXP": f"shared_{role}" for role in PROJECTIONS},
    "FFN_GATE_UP_EXP": "expert_gate_up",
    "FFN_GATE_INP": "router",
    "FFN_EXP_PROBS_B": "router_bias",
    "FFN_GATE_INP_SHEXP": "shared_router",
    "ATTN_NORM": "norm1",
    "FFN_NORM": "norm2",
    "FFN_PRE_NORM": "norm2",
    "ATTN_NORM_2": "norm1_apart",  # beside a norm of the MLP (Falcon)
    "ATTN_POST_NORM": "norm1_after",
    "FFN_POST_NORM": "norm2_after",
    "ATTN_OUT_NORM": "norm1_out",  # of the sum (BERT), or another name of one of these
    "LAYER_OUT_NORM": "norm2_out",
    "NEXTN_EH_PROJ": "further_on",  # in a layer that predicts a token further on
    "TOKEN_EMBD": "embedding",
    "OUTPUT": "head",
    "OUTPUT_NORM": "norm_final",
    "TOKEN_EMBD_NORM": "norm_embedding",
}
_MORE_NAMES = {  # within a layer, without ".weight"
    "mlp.router_scale": "router_scale",  # Pangu Pro MoE
    "mlp.gate.router_scale": "router_scale",  # ours
    "mlp.gate.noise_weight": "router_noise",  # ours
    "attention.wqkv": "qkv",  # InternLM 2
    "self_attn.q_conv1d": "linear",  # attention of another kind (Kimi Linear)
    "linear_attn.in_proj_qkv": "linear",  # (Qwen 3.5)
    "attention.q_conv1d": "linear",  # (Ling 2.5)
    **{f"attention.{role}_proj": role for role in "qkv"},
    **{f"attention.{part}_proj": part for part in ("q_a", "q_b", "kv_b")},
    **{f"attention.{part}_layernorm": f"{part}_norm" for part in ("q_a", "kv_a")},
    "attention.kv_a_proj_with_mqa": "kv_a",
    "block_sparse_moe.input_linear": "expert_gate_up",  # Granite
    "block_sparse_moe.experts.gate_up_proj": "expert_gate_up",
    "block_sparse_moe.experts.down_proj": "expert_down",
    "block_sparse_moe.router": "router",
    "shared_mlp.input_linear": "shared_up",
    "feed_forward.experts.gate_up_proj": "expert_gate_up",  # Llama 4
    "mlp.experts.fc1": "expert_gate_up",  # Aria
    "mlp.experts.fc2": "expert_down",
    "mlp.experts.e_score_correction": "router_bias",  # Laguna
    "mlp.linear_gate": "gate",  # Hunyuan 4
    "mlp.shared_experts.linear_gate": "shared_gate",
    "mlp.shared_experts.gate_up_proj": "shared_up",  # MiniMax M3
    **{f"block_sparse_moe.{role}_proj": role for role in PROJECTIONS},  # of a layer without experts (Kimi Linear)
    **{f"attention.attn.{role}": role for role in "qkvo"},  # MPNet
    "attention.LayerNorm": "norm1_out",  # there of the sum, in ESM before attention: `_find_norms` tells
    "LayerNorm": "norm2",  # ESM
    "intermediate.LayerNorm": "norm2",  # RoBERTa-PreLayerNorm
    "attention.ln": "norm1",  # Megatron-BERT
    "ln": "norm2",
    **{f"attention.self.{role}_proj": role[0] for role in ("query", "key", "value")},  # DeBERTa-v2
    "attention.self.in_proj": "qkv",  # DeBERTa
    "attention.qkv_proj": "qkv",  # GTE
    "attention.o_proj": "o",
    "attn_ln": "norm1_out",
    "mlp_ln": "norm2_out",
    "mlp.up_gate_proj": "up",
    **{f"temporal_block.{role}_proj": role for role in "qkvo"},  # RecurrentGemma
    **{f"mlp_block.{role}_proj": role for role in PROJECTIONS},
    "temporal_pre_norm": "norm1",
    "channel_pre_norm": "norm2",
    "post_norm1": "norm1_after",  # HyperCLOVA X
    "post_norm2": "norm2_after",
    "post_operator_norm": "norm1_after",  # LFM 3
    "post_ffn_norm": "norm2_after",
    "self_attn_layer_norm": "norm1",  # OPT, XGLM
    "final_layer_norm": "norm2",
    "post_attention_layernorm": "norm_between",  # after attention or before the MLP: `_find_norms` tells
    "fc1": "up",
    "fc2": "down",
}
_MORE_NAMES_ONCE = {
    "final_layer_norm": "norm_final",  # OPT
    "layer_norm": "norm_final",  # XGLM
    "model.embedding_norm": "norm_final",  # LFM 2
    "embed_in": "embedding",  # GPT-NeoX in Japanese
    "encoder.emb_layer_norm_after": "norm_final",  # ESM
    "encoder.ln": "norm_final",  # Megatron-BERT
    "LayerNorm": "norm_final",  # RoBERTa-PreLayerNorm
}
_OTHER_STACKS = re.compile(r"vision|visual|image|audio|speech|mtp|draft|assistant")
_WITH_BIAS = ("q", "k", "v", "o", "qkv")

# What configurations call a size; the first is the name that errors use.
SIZES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "model_dim", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "num_query_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num"),
    "head_dim": ("head_dim", "kv_channels"),
    "vocabulary": ("vocab_size",),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
}
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")


@cache
def _known_names() -> tuple[dict[str, str], dict[str, str]]:
    """Name -> slot, within a layer and outside of one, without ".weight"."""
    from gguf.constants import MODEL_TENSOR, TENSOR_NAMES
    from gguf.tensor_mapping import TensorNameMap

    in_a_layer, once = dict(_MORE_NAMES), dict(_MORE_NAMES_ONCE)
    for tensor, slot in _SLOTS.items():
        tensor = MODEL_TENSOR[tensor]
        tables = TensorNameMap.block_mappings_cfg, TensorNameMap.mappings_cfg
        names = (name for table in tables for name in table.get(tensor, ()))
        for name in (*names, TENSOR_NAMES[tensor]):
            _, is_of_a_layer, part = name.partition("{bid}.")
            (in_a_layer if is_of_a_layer else once).setdefault((part or name).removesuffix(".weight"), slot)
    return in_a_layer, once


def known_architectures() -> list[str]:
    """Those of the package gguf that have attention whose queries are known here, as llama.cpp calls them."""
    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSOR, MODEL_TENSORS

    queries = {MODEL_TENSOR[name] for name in ("ATTN_Q", "ATTN_Q_B", "ATTN_QKV")}
    return sorted(name for kind, name in MODEL_ARCH_NAMES.items() if queries & set(MODEL_TENSORS[kind]))


def slot_of(name: str) -> tuple[str | None, int | None]:
    """What a tensor of a layer is for, by its name in the layer, and the expert in it; None: nothing of interest."""
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    base, kind = re.fullmatch(r"(.+?)(?:\.(weight|gamma|bias|beta))?", name).groups()
    expert = re.search(r"(?<=experts)\.(\d+)", base)
    if expert is not None:
        base = base[: expert.start()] + base[expert.end() :]
    slot = _known_names()[0].get(base)
    if kind in ("bias", "beta") and slot != "router_bias":
        slot = f"{slot}_bias" if slot in _WITH_BIAS else None
    return slot, None if expert is None else int(expert[1])


def find_layers(tensors: Iterable[str]) -> tuple[str, dict[int, dict[str, dict[int | None, str]]]]:
    """The layers of the text model: what stands before their number, and number -> slot -> expert -> name.

    Of a model that sees or hears these are those of its text part.
    """
    stacks: dict[str, dict] = {}
    for name in tensors:
        place = re.fullmatch(r"(?:(.*?)\.)?(\d+)\.(.+)", name)
        slot, expert = (None, None) if place is None else slot_of(place[3])
        if slot is not None:
            slots = stacks.setdefault(place[1] or "", {}).setdefault(int(place[2]), {})
            slots.setdefault(slot, {}).setdefault(expert, name)

    def likely(stack: str) -> tuple[bool, int]:
        return not _OTHER_STACKS.search(stack), sum(map(len, stacks[stack].values()))

    stack = max(stacks, key=likely, default="")
    return stack, stacks.get(stack, {})


def find_once(tensors: Iterable[str], stack: str) -> dict[str, str]:
    """Slot -> name of the tensors outside of layers that belong to the same model as those layers."""
    found: dict[str, str] = {}
    for name in tensors:
        parts = re.sub(r"\.(weight|gamma)$", "", name).split(".")
        for i in range(len(parts)):
            slot = _known_names()[1].get(".".join(parts[i:]))
            if slot is not None and parts[:i] == stack.split(".")[:i]:
                found.setdefault(slot, name)
                break
    return found


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With what a nested configuration says of the text model; whether its head is tied, the outer one says."""
    for key in _TEXT_CONFIGS:
        if isinstance(nested := config.get(key), Mapping):
            outer = {name: value for name, value in config.items() if name != key}
            tied = outer.get("tie_word_embeddings", True)
            return text_config({**outer, **nested, "tie_word_embeddings": tied})
    return config
