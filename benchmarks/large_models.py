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
DEVIATION, GROWTH = 0.02, 0.01  # of the weights of the first layer, and by how much it grows from layer to layer
SHARD = "model-{:05d}.safetensors"
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
LARGE: dict[str, dict[str, Any]] = {
    "half a billion": {"model_type": "llama"} | dict(zip(SIZES, (1280, 24, 20, 4, 4352), strict=True)),
    # as Llama 3.2 with three billion parameters
    "three billion": {"model_type": "llama"} | dict(zip(SIZES, (3072, 28, 24, 8, 8192), strict=True)),
    # as Qwen1.5-MoE and the dense model it came from, at half their width and depth
    "dense parent": {"model_type": "qwen2"} | dict(zip(SIZES, (1024, 12, 16, 16, 2816), strict=True)),
    "mixture of 60": {"model_type": "qwen2_moe", "num_experts": 60, "num_experts_per_tok": 4, "decoder_sparse_step": 1}
    | {"moe_intermediate_size": 704, "shared_expert_intermediate_size": 2816}
    | dict(zip(SIZES, (1024, 12, 16, 16, 2816), strict=True)),
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
        tensors = {name: _draw(shape, (1 + GROWTH * number) * DEVIATION, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / SHARD.format(number), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, SHARD.format(number))
        count += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return count


def _draw(shape: tuple[int, ...], deviation: float, generator: torch.Generator) -> Tensor:
    numbers = torch.randn(shape, generator=generator).mul_(deviation)
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
