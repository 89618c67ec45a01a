"""GGUF, the files of llama.cpp: configuration, vocabulary and tensors in one, many of them quantised.

`GGUF` reads one as `Checkpoint` reads a folder: each tensor under its name in the Hugging Face layout of its family.
What llama.cpp does differently is undone. It keeps the experts of a layer in one tensor, [E, I, H]. And in its "llama"
models it turns neighbours (2i, 2i + 1) of a head where transformers turns halves (i, i + D/2), so the rows of q and k
lie in another order.

Written from the description of the format (github.com/ggml-org/ggml, docs/gguf.md) and tested against the package
`gguf`, which takes seconds to open a file with a vocabulary of the usual size.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from minimoe.model.checkpoint import Checkpoint, CheckpointError
from minimoe.model.config import MoEConfig
from minimoe.model.families import find_family, read_config
from minimoe.model.transformer import rope_frequencies

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

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # for struct
_TEXT, _LIST = 8, 9
_UNUSED = 5  # the type of tokens that fill the vocabulary up


class _Stored(NamedTuple):
    """Where a tensor lies, or one expert of it."""

    file: Path
    start: int  # of its bytes
    size: int  # in bytes; 0 where the format is not understood
    format: int  # its number in the file
    shape: tuple[int, ...]
    head_dim: int = 0  # of the heads whose rows are to be put back in order; 0: they are in order


class GGUF(Checkpoint):
    """A GGUF file of a model in one of the families here, read piece by piece.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is missing, damaged or one of several, a key is missing, or the architecture is not
            understood. A tensor in a format that is not understood is refused where it is read.
    """

    dtype = torch.float32  # holds every number of every format here

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{self.path}: not found, or no file")
        try:
            with self.path.open("rb") as file:
                metadata, stored = _read_header(file, self.path)
            self.hf_config = _read_metadata(metadata, stored)
            self._stored = dict(_in_our_layout(stored, self.hf_config))
            if _ROPE_FACTORS in self:
                self.hf_config["rope_scaling"] = _read_rope_factors(self[_ROPE_FACTORS], read_config(self.hf_config))
                del self._stored[_ROPE_FACTORS]
            self.tokens = _read_tokens(metadata)  # token -> id; empty if there is no vocabulary
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor: in the dtype it is stored in, or in float32 if it is quantised."""
        shape = self.shape(name)
        (whole,) = self.pieces(name, math.prod(shape))
        return whole.view(shape)

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        """Read one tensor in flat pieces of at most `size` numbers, in the dtype that `self[name]` has."""
        stored = self._find(name)
        form = self._format(name)
        unit = stored.head_dim * math.prod(stored.shape[1:]) or form.numbers  # whole heads or whole blocks
        count, step = math.prod(stored.shape), max(size // unit, 1) * unit
        with stored.file.open("rb") as file:
            file.seek(stored.start)
            for start in range(0, count, step):
                blocks = torch.empty(min(step, count - start) // form.numbers, form.bytes, dtype=torch.uint8)
                found = file.readinto(blocks.numpy())
                if found != blocks.nbytes:
                    raise CheckpointError(f"{self.path}: found {found} bytes of {name}, wanted {blocks.nbytes}")
                yield from _in_order(form.read(blocks).flatten(), stored).split(size)

    @cached_property
    def model_config(self) -> MoEConfig:
        """The configuration, translated.

        Raises:
            CheckpointError: the model asks for what is not supported.
        """
        try:
            return read_config(self.hf_config)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def _format(self, name: str) -> _Format:
        found = self._stored[name].format
        if found not in _FORMATS:
            wanted = ", ".join(form.name for form in _FORMATS.values())
            raise CheckpointError(
                f"{self.path}: {name} is stored as {_NOT_READ.get(found, f'format {found}')}, wanted one of {wanted}"
            )
        return _FORMATS[found]


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
            _require(tensor.shape[0] % config["head_dim"] == 0, f"shape of {name}", list(tensor.shape), heads)
            tensor = tensor._replace(head_dim=config["head_dim"])
        if part == "ffn_gate_inp_shexp":  # stored as [H]
            tensor = tensor._replace(shape=(1, tensor.shape[-1]))
        for expert, one in enumerate(_experts(tensor) if part.endswith("_exps") else [tensor]):
            yield on_disk(ours.format(expert)), one


def _experts(tensor: _Stored) -> Iterator[_Stored]:
    size = tensor.size // tensor.shape[0]
    for expert in range(tensor.shape[0]):
        yield tensor._replace(start=tensor.start + expert * size, size=size, shape=tensor.shape[1:])


def _in_order(numbers: Tensor, stored: _Stored) -> Tensor:
    """Rows of whole heads, from pairs (2i, 2i + 1) to pairs (i, i + D/2)."""
    if not stored.head_dim:
        return numbers
    return numbers.view(-1, stored.head_dim // 2, 2, math.prod(stored.shape[1:])).transpose(1, 2).flatten()


# -- metadata


def _read_metadata(metadata: Mapping[str, Any], stored: Mapping[str, _Stored]) -> dict[str, Any]:
    """What config.json would say. Widths are those of the tensors: older files do not give them."""
    parts = metadata.get("split.count", 1)
    _require(parts == 1, "split.count", parts, "1, the whole model in one file (llama-gguf-split --merge makes it)")
    architecture = metadata.get("general.architecture")
    _require(
        architecture in list(_ARCHITECTURES),
        "general.architecture",
        architecture,
        f"one of {', '.join(_ARCHITECTURES)}",
    )

    def said(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    def whole(key: str, default: int | None = None) -> int:
        value = said(key, default)
        _require(type(value) is int and value >= 0, f"{architecture}.{key}", value, "a whole number")
        return value

    def rows(name: str) -> int:
        shape = list(stored[name].shape) if name in stored else None
        _require(shape is not None and len(shape) > 1, name, shape, "a matrix")
        return shape[-2]

    hidden, heads, experts = whole("embedding_length"), whole("attention.head_count"), whole("expert_count", 0)
    head_dim = whole("attention.key_length", hidden // max(heads, 1))
    _require(head_dim > 0, f"{architecture}.attention.key_length", head_dim, "at least 1")
    epsilon = said("attention.layer_norm_rms_epsilon")
    _require(type(epsilon) is float, f"{architecture}.attention.layer_norm_rms_epsilon", epsilon, "a number")
    _require_same(metadata, architecture, head_dim)
    rope = said("rope.scaling.type", "none")
    last = f"blk.{whole('block_count') - 1}"
    width = rows(f"{last}.ffn_gate_exps.weight" if experts else f"{last}.ffn_gate.weight")
    shared = f"{last}.ffn_gate_shexp.weight"
    bias = f"{last}.attn_q.bias" in stored
    return {
        "model_type": "mixtral" if architecture == "llama" and experts else _ARCHITECTURES[architecture],
        "vocab_size": rows("token_embd.weight"),
        "hidden_size": hidden,
        "num_hidden_layers": whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole("attention.head_count_kv", heads),
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


def _require_same(metadata: Mapping[str, Any], architecture: str, head_dim: int) -> None:
    """Refuse what would change the function, and no family here has."""
    softmax = 1
    fixed = {"rope.dimension_count": head_dim, "attention.value_length": head_dim}
    fixed |= {"expert_gating_func": softmax, "expert_weights_scale": 1.0}
    for key, wanted in fixed.items():
        found = metadata.get(f"{architecture}.{key}", wanted)
        _require(found == wanted, f"{architecture}.{key}", found, f"{wanted}, all that is supported")


def _read_rope_factors(factors: Tensor, config: MoEConfig) -> dict[str, Any]:
    """The scaling of Llama 3.1 that gives the factors [D / 2] by which a file divides its frequencies."""
    scaling = {"rope_type": "llama3", "factor": factors.max().item(), **_LLAMA3}
    wanted = rope_frequencies(config) / rope_frequencies(replace(config, rope_scaling=scaling))
    fits = factors.shape == wanted.shape and torch.allclose(factors, wanted, rtol=1e-3)
    _require(fits, _ROPE_FACTORS, factors.tolist(), f"those that follow from {scaling}")
    return scaling


def _read_tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    kinds = metadata.get("tokenizer.ggml.token_type", [0] * len(tokens))
    _require(
        len(kinds) == len(tokens), "tokenizer.ggml.token_type", len(kinds), f"{len(tokens)} of them, one per token"
    )
    return {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}


def _require(holds: bool, key: str, found: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{key}={found!r:.80}: wanted {wanted}")


# -- the header


class _Header:
    """The beginning of a file, read value by value."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def bytes(self, count: int) -> bytes:
        found = self._file.read(count) if count <= self._size else b""
        if len(found) != count:
            raise ValueError(f"found {self._size} bytes, wanted a whole GGUF file; this one ends in its header")
        return found

    def numbers(self, code: str, count: int = 1) -> tuple:
        return struct.unpack(f"<{count}{code}", self.bytes(count * struct.calcsize(code)))

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def text(self) -> str:
        return self.bytes(int.from_bytes(self.bytes(8), "little")).decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            _require(kind in _NUMBERS, "type of a value", kind, "one that GGUF has; the header is damaged")
            return self.number(_NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            return list(self.numbers(_NUMBERS[kind], count))
        return [self.value(kind) for _ in range(count)]


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], dict[str, _Stored]]:
    """Metadata, and where each tensor lies."""
    size = path.stat().st_size
    header = _Header(file, size)
    magic = header.bytes(4)
    _require(magic == b"GGUF", "first bytes", magic, "b'GGUF'")
    version = header.number("I")
    _require(version in (2, 3), "version", version, "GGUF version 2 or 3, little-endian")
    tensors, keys = header.number("Q"), header.number("Q")
    metadata = {header.text(): header.value(header.number("I")) for _ in range(keys)}
    listed = [_read_entry(header) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    _require(type(alignment) is int and alignment > 0, "general.alignment", alignment, "a whole number of at least 1")
    start = -(-file.tell() // alignment) * alignment
    stored = {}
    for name, shape, number, offset in listed:
        found = _Stored(path, start + offset, _size(name, shape, number), number, shape)
        end = found.start + found.size
        _require(end <= size, "size", size, f"a whole GGUF file, with {name} up to byte {end}")
        _require(name not in stored, "tensor", name, "each name once")
        stored[name] = found
    return metadata, stored


def _read_entry(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, number of the format, offset."""
    name, dimensions = header.text(), header.number("I")
    shape = tuple(reversed(header.numbers("Q", dimensions)))
    _require(all(shape) and shape, f"shape of {name}", list(shape), "at least 1 in each direction, and one direction")
    return name, shape, header.number("I"), header.number("Q")


def _size(name: str, shape: tuple[int, ...], number: int) -> int:
    if number not in _FORMATS:
        return 0
    form = _FORMATS[number]
    _require(
        shape[-1] % form.numbers == 0,
        f"shape of {name}",
        list(shape),
        f"rows of a multiple of {form.numbers}, as {form.name} stores them",
    )
    return math.prod(shape) // form.numbers * form.bytes


# -- formats of numbers: all but the plain ones store blocks, each with a scale of its own


class _Format(NamedTuple):
    name: str
    numbers: int  # in a block
    bytes: int  # of a block
    read: Callable[[Tensor], Tensor]  # blocks [n, bytes] of uint8 -> numbers, n * numbers of them in order


def _read_q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]) - 8)


def _read_q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]) + _half(blocks, 2)


def _read_q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8)


def _read_q6_k(blocks: Tensor) -> Tensor:
    """Two halves of 128 numbers: 4 low bits each, then 2 high bits each; a scale for every 16, and one for all."""
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64)))
    packed = blocks[:, 128:192].unflatten(1, (2, 32))
    high = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return (low + 16 * high - 32).view(-1, 16, 16) * scales.unsqueeze(-1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at one place of each block, [n, 1] in float32."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """The low four bits of all bytes, then the high four."""
    return torch.cat([packed & 15, packed >> 4], dim=-1).float()


_FORMATS = {
    0: _Format("F32", 1, 4, lambda blocks: blocks.view(torch.float32)),
    1: _Format("F16", 1, 2, lambda blocks: blocks.view(torch.float16)),
    30: _Format("BF16", 1, 2, lambda blocks: blocks.view(torch.bfloat16)),
    8: _Format("Q8_0", 32, 34, _read_q8_0),
    2: _Format("Q4_0", 32, 18, _read_q4_0),
    3: _Format("Q4_1", 32, 20, _read_q4_1),
    14: _Format("Q6_K", 256, 210, _read_q6_k),  # of the head, in files that are Q4_0 elsewhere
}
_NOT_READ = {
    **{6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 15: "Q8_K"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M"},
    **{34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}
