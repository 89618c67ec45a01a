"""GGUF, the files of llama.cpp: configuration, vocabulary and tensors in one, many of them quantised.

`GGUF` reads one as `Checkpoint` reads a folder: each tensor under its name in the Hugging Face layout of its family.
What llama.cpp does differently is undone. It keeps the experts of a layer in one tensor, [E, I, H]. And in its "llama"
models it turns neighbours (2i, 2i + 1) of a head where transformers turns halves (i, i + D/2), so the rows of q and k
lie in another order.

The package `gguf` finds the tensors and turns them into numbers, in every format that it knows. To open a file with a
vocabulary of 150,000 tokens and as many merges takes it 4 s and half a gigabyte for that while.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFReader, TokenType
from gguf.quants import dequantize
from torch import Tensor

from minimoe.model.attention import rope_frequencies
from minimoe.model.checkpoint import Checkpoint, CheckpointError
from minimoe.model.config import MoEConfig, require
from minimoe.model.families import find_family, read_config

_ARCHITECTURES = {  # llama.cpp's name -> model_type; "llama" with experts is Mixtral
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "olmoe": "olmoe",
}
_NAMES = {  # llama.cpp's -> ours, as in transformer.py
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_NAMES_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{part}_exps": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_TURNS_NEIGHBOURS = ("llama", "mixtral")
_ROPE_FACTORS = "rope_freqs.weight"
# What every published Llama from 3.1 on has; the file keeps only the factors that follow.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class _Stored(NamedTuple):
    """Where a tensor lies, or one expert of it."""

    start: int  # of its bytes
    size: int  # in bytes
    format: GGMLQuantizationType
    shape: tuple[int, ...]
    head_dim: int = 0  # of the heads whose rows are to be put back in order; 0: they are in order


class GGUF(Checkpoint):
    """A GGUF file of a model in one of the families here, read piece by piece, in float32.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing, damaged or one of several, a key is missing, or the architecture is not
            understood. A tensor in a format that is not understood is refused where it is read.
    """

    dtype = torch.float32

    def __init__(self, path: str | Path) -> None:
        self.path = self.config_file = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{self.path}: not found, or no file")
        try:
            reader = _Reader(self.path)
            metadata = {key: field.contents() for key, field in reader.fields.items()}
            stored = {
                tensor.name: _Stored(
                    tensor.data_offset, tensor.n_bytes, tensor.tensor_type, tuple(reversed(tensor.shape.tolist()))
                )
                for tensor in reader.tensors
            }
            self.hf_config = _read_metadata(metadata, stored)
            self._stored = dict(_in_our_layout(stored, self.hf_config))
            if _ROPE_FACTORS in self:
                self.hf_config["rope_scaling"] = _read_rope_factors(self[_ROPE_FACTORS], read_config(self.hf_config))
                del self._stored[_ROPE_FACTORS]
            self._tokens = _read_tokens(metadata)
        except (ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, as of a tokenizer; empty if the file has no vocabulary."""
        return self._tokens

    @property
    def files(self) -> list[Path]:
        """The file."""
        return [self.path]

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        """Read one tensor in flat pieces of `size` numbers, the last one smaller: those of any other checkpoint."""
        stored = self._find(name)
        numbers, size_of_block = GGML_QUANT_SIZES[stored.format]
        unit = stored.head_dim * math.prod(stored.shape[1:]) or numbers  # a head or a block, read as a whole
        count, step = math.prod(stored.shape), max(size // unit, 1) * unit
        left = torch.empty(0)
        with self._open_at(self.path, stored.start, stored.size) as file:
            for start in range(0, count, step):
                blocks = np.empty((1, min(step, count - start) // numbers * size_of_block), np.uint8)
                found = file.readinto(blocks)
                if found != blocks.nbytes:
                    raise CheckpointError(f"{self.path}: found {found} bytes of {name}, wanted {blocks.nbytes}")
                part = self._dequantise(blocks, name)
                *whole, left = torch.cat([left, part]).split(size)
                yield from whole
        yield left

    def _dequantise(self, blocks: np.ndarray, name: str) -> Tensor:
        """Numbers in a row; where whole heads are to be put in order, from pairs (2i, 2i + 1) to pairs (i, i + D/2)."""
        stored = self._stored[name]
        try:
            numbers = torch.from_numpy(dequantize(blocks, stored.format))
        except NotImplementedError as error:
            form = stored.format.name
            raise CheckpointError(f"{self.path}: {name} is stored as {form}, which gguf does not read") from error
        if stored.head_dim:
            numbers = numbers.view(-1, stored.head_dim // 2, 2, math.prod(stored.shape[1:])).transpose(1, 2)
        return numbers.flatten()


class _Reader(GGUFReader):
    """Of the package, but what lies beyond the end of the file is an error and not a short array."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        require(self.endianess == GGUFEndian.LITTLE, "byte order", self.endianess.name, "LITTLE")

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        self.data = np.asarray(self.data)  # no longer a memmap, which takes three times as long to cut up
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError(f"found {len(self.data)} bytes, wanted a whole GGUF file")
        return super()._get(offset, dtype, count, override_order)


# -- the layout


def _in_our_layout(stored: Mapping[str, _Stored], config: Mapping[str, Any]) -> Iterator[tuple[str, _Stored]]:
    """Each tensor, or each expert of it, with its name in the Hugging Face layout; a name not known stays as it is."""
    on_disk = find_family(config["model_type"]).on_disk
    for name, tensor in stored.items():
        place = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        layer, part, kind = place.groups() if place else (None, name, "")
        ours = (_NAMES if layer is None else _NAMES_IN_LAYER).get(part)
        if ours is None:
            yield name, tensor
            continue
        ours = f"{ours}.{kind}" if layer is None else f"model.layers.{layer}.{ours}.{kind}"
        if part in ("attn_q", "attn_k") and config["model_type"] in _TURNS_NEIGHBOURS:
            heads = f"{config['head_dim']} rows for each head"
            require(tensor.shape[0] % config["head_dim"] == 0, f"shape of {name}", list(tensor.shape), heads)
            tensor = tensor._replace(head_dim=config["head_dim"])
        if part == "ffn_gate_inp_shexp":  # stored as [H]
            tensor = tensor._replace(shape=(1, tensor.shape[-1]))
        for expert, one in enumerate(_experts(tensor) if part.endswith("_exps") else [tensor]):
            yield on_disk(ours.format(expert)), one


def _experts(tensor: _Stored) -> Iterator[_Stored]:
    size = tensor.size // tensor.shape[0]
    for expert in range(tensor.shape[0]):
        yield tensor._replace(start=tensor.start + expert * size, size=size, shape=tensor.shape[1:])


# -- metadata


def _read_metadata(metadata: Mapping[str, Any], stored: Mapping[str, _Stored]) -> dict[str, Any]:
    """What config.json would say. Widths are those of the tensors: older files do not give them."""
    parts = metadata.get("split.count", 1)
    require(parts == 1, "split.count", parts, "1, the whole model in one file (llama-gguf-split --merge makes it)")
    architecture = metadata.get("general.architecture")
    require(
        architecture in list(_ARCHITECTURES),
        "general.architecture",
        architecture,
        f"one of {', '.join(_ARCHITECTURES)}",
    )

    def said(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    def whole(key: str, default: int | None = None) -> int:
        value = said(key, default)
        require(type(value) is int and value >= 0, f"{architecture}.{key}", value, "a whole number")
        return value

    def rows(name: str, side: int = -2) -> int:
        shape = list(stored[name].shape) if name in stored else None
        require(shape is not None and len(shape) > 1, name, shape, "a matrix")
        return shape[side]

    def require_heads(key: str, count: int, name: str) -> None:
        sizes = f"{architecture}.{key}={count} and {architecture}.attention.key_length"
        require(count * head_dim == rows(name), sizes, head_dim, f"a product of {rows(name)}, the rows of {name}")

    blocks, held = whole("block_count"), _count_blocks(stored)
    require(blocks <= held, f"{architecture}.block_count", blocks, f"at most {held}, the blocks in the file")
    hidden, held = whole("embedding_length"), rows("token_embd.weight", -1)
    require(hidden == held, f"{architecture}.embedding_length", hidden, f"{held}, the columns of token_embd.weight")
    heads, experts = whole("attention.head_count"), whole("expert_count", 0)
    key_heads = whole("attention.head_count_kv", heads)
    head_dim = whole("attention.key_length", hidden // max(heads, 1))
    require_heads("attention.head_count", heads, "blk.0.attn_q.weight")
    require_heads("attention.head_count_kv", key_heads, "blk.0.attn_k.weight")
    epsilon = said("attention.layer_norm_rms_epsilon")
    require(type(epsilon) is float, f"{architecture}.attention.layer_norm_rms_epsilon", epsilon, "a number")
    _require_same(metadata, architecture, head_dim)
    rope = said("rope.scaling.type", "none")
    last = f"blk.{blocks - 1}"
    gate = f"{last}.ffn_gate_exps.weight" if experts else f"{last}.ffn_gate.weight"
    width, held = rows(gate), rows(gate, 0) if experts else 0
    require(experts <= held, f"{architecture}.expert_count", experts, f"at most {held}, the experts in {gate}")
    shared = f"{last}.ffn_gate_shexp.weight"
    bias = f"{last}.attn_q.bias" in stored
    return {
        "model_type": "mixtral" if architecture == "llama" and experts else _ARCHITECTURES[architecture],
        "vocab_size": rows("token_embd.weight"),
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": rows(shared) if shared in stored else 0,
        "max_position_embeddings": whole("context_length"),
        "rms_norm_eps": epsilon,
        "rope_theta": said("rope.freq_base", 10000.0),
        "rope_scaling": None if rope == "none" else {"rope_type": rope, "factor": said("rope.scaling.factor")},
        "tie_word_embeddings": "output.weight" not in stored,
        "attention_bias": bias,
        "qkv_bias": bias,
        "clip_qkv": said("attention.clamp_kqv"),
        "num_experts": experts,
        "num_experts_per_tok": said("expert_used_count", 0),
        "norm_topk_prob": said("expert_weights_norm", architecture == "qwen3moe"),  # as llama.cpp does without the key
    }


def _count_blocks(stored: Mapping[str, _Stored]) -> int:
    numbers = (re.match(r"blk\.(\d+)\.", name) for name in stored)
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def _require_same(metadata: Mapping[str, Any], architecture: str, head_dim: int) -> None:
    """Refuse what would change the function, and no family here has."""
    softmax = 1
    fixed = {"rope.dimension_count": head_dim, "attention.value_length": head_dim}
    fixed |= {"expert_gating_func": softmax, "expert_weights_scale": 1.0}
    for key, wanted in fixed.items():
        found = metadata.get(f"{architecture}.{key}", wanted)
        require(found == wanted, f"{architecture}.{key}", found, f"{wanted}, all that is supported")


def _read_rope_factors(factors: Tensor, config: MoEConfig) -> dict[str, Any]:
    """The scaling of Llama 3.1 that gives the factors [D / 2] by which a file divides its frequencies."""
    scaling = {"rope_type": "llama3", "factor": factors.max().item(), **_LLAMA3}
    wanted = rope_frequencies(config) / rope_frequencies(replace(config, rope_scaling=scaling))
    fits = factors.shape == wanted.shape and torch.allclose(factors, wanted, rtol=1e-3)
    require(fits, _ROPE_FACTORS, factors.tolist(), f"those that follow from {scaling}")
    return scaling


def _read_tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    kinds = metadata.get("tokenizer.ggml.token_type", [0] * len(tokens))
    require(len(kinds) == len(tokens), "tokenizer.ggml.token_type", len(kinds), f"{len(tokens)} of them, one per token")
    return {
        token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != TokenType.UNUSED
    }
