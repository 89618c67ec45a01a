"""Folders with models of random weights in bfloat16, at the size of published ones, written layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor

VOCABULARY = 32_768
DEVIATION = 0.02  # of the weights
ONE = "model-{:05d}.safetensors"

# The first as LLaMA, the second as Llama-3.2-3B, the last two as Qwen1.5-MoE and the dense model before it, at half of
# their width and depth.
LARGE: dict[str, dict[str, Any]] = {
    "half a billion": {
        "hidden_size": 1280,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "intermediate_size": 4352,
    }
    | {"num_key_value_heads": 4, "model_type": "llama"},
    "three billion": {
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "intermediate_size": 8192,
    }
    | {"num_key_value_heads": 8, "model_type": "llama"},
    "dense parent": {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "intermediate_size": 2816}
    | {"num_key_value_heads": 16, "model_type": "qwen2"},
    "mixture of 60": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
    }
    | {"num_key_value_heads": 16, "model_type": "qwen2_moe", "num_experts": 60, "num_experts_per_tok": 4}
    | {"moe_intermediate_size": 704, "shared_expert_intermediate_size": 2816, "decoder_sparse_step": 1},
}


def make_model(folder: Path, kind: str, seed: int) -> int:
    """One of `LARGE`, with a tokenizer of words: how many parameters it has."""
    folder.mkdir()
    config = LARGE[kind] | {"vocab_size": VOCABULARY, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    config |= {"hidden_act": "silu", "rope_theta": 1e4, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = {f"word{number}": number for number in range(VOCABULARY)}
    Tokenizer(models.WordLevel(words, unk_token="word0")).save(str(folder / "tokenizer.json"))
    generator, weight_map, count = torch.Generator().manual_seed(seed), {}, 0
    for number, shapes in enumerate(_shapes(config)):
        tensors = {name: _draw(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / ONE.format(number), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, ONE.format(number))
        count += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return count


def _draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    numbers = torch.randn(shape, generator=generator).mul_(DEVIATION)
    return (1 + numbers if len(shape) == 1 else numbers).bfloat16()


def _shapes(config: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of each file: what a model has once, then each layer."""
    hidden = config["hidden_size"]
    kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    yield {"model.embed_tokens.weight": (VOCABULARY, hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        start, mlps = f"model.layers.{layer}.", {"mlp": config["intermediate_size"]}
        shapes = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        shapes |= {f"self_attn.{role}_proj": (rows, hidden) for role, rows in (("q", hidden), ("k", kv), ("v", kv))}
        shapes |= {"self_attn.o_proj": (hidden, hidden)}
        if "num_experts" in config:
            experts = range(config["num_experts"])
            mlps = {f"mlp.experts.{expert}": config["moe_intermediate_size"] for expert in experts}
            mlps |= {"mlp.shared_expert": config["shared_expert_intermediate_size"]}
            shapes |= {"mlp.gate": (len(experts), hidden), "mlp.shared_expert_gate": (1, hidden)}
        for mlp, width in mlps.items():
            shapes |= {f"{mlp}.{role}_proj": (width, hidden) for role in ("gate", "up")}
            shapes |= {f"{mlp}.down_proj": (hidden, width)}
        named = {f"{start}{name}.weight": shape for name, shape in shapes.items()}
        if config["model_type"].startswith("qwen2"):  # which has biases, here as norms have weights: around 1
            rows = {"q": hidden, "k": kv, "v": kv}
            named |= {f"{start}self_attn.{role}_proj.bias": (size,) for role, size in rows.items()}
        yield named
