"""GGUF, the files of llama.cpp: configuration, vocabulary and tensors in one, many of them quantised.

`GGUF` reads one as `Checkpoint` reads a folder. In an architecture of `_RUN_HERE`, each tensor has its name in the
Hugging Face layout; in all others it has that of llama.cpp, as `blk.0.attn_q.weight`, and a mixture has its experts in
one tensor, [E, I, H]. What llama.cpp's converter does to numbers is undone. In some architectures its positions turn
neighbours (2i, 2i + 1) of a head where transformers turns halves (i, i + D/2), so the rows of q and k lie in another
order; and it adds 1 to the norms of Gemma and Nemotron, whose models add it when they run.

The package `gguf` turns blocks into numbers, in every format that it knows. To open a file with a vocabulary of 150,000
tokens and as many merges takes it 4 s and half a gigabyte for that while.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFReader, TokenType
from gguf.quants import dequantize
from torch import Tensor

from minimoe.model.attention import rope_frequencies
from minimoe.model.checkpoint import Checkpoint
from minimoe.model.config import MoEConfig, require
from minimoe.model.families import find_family, read_config
from minimoe.model.formats import AT_ONCE, in_pieces
from minimoe.model.stored import CheckpointError, Read, Stored, describe_file

# llama.cpp's name -> model_type, of those that run here; "llama" with experts is Mixtral.
_RUN_HERE = ("llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmoe")
_ARCHITECTURES = {model_type.replace("_", ""): model_type for model_type in _RUN_HERE}
_ONE_THAT_RUNS = f"one of {', '.join(_ARCHITECTURES)}"
# llama.cpp's names -> ours, as in transformer.py.
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
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
# Architectures whose q and k the converter permutes, as in conversion/llama.py of llama.cpp. (Where transformers turns
# neighbours too, as in Cohere's and DeepSeek-V2's models, it does not.)
_TURNS_NEIGHBOURS = ("llama", "llama-embed", "mistral3", "deci", "arcee", "smollm3", "granite", "granitemoe")
_TURNS_NEIGHBOURS += ("granitehybrid", "minicpm", "olmo", "baichuan", "xverse", "internlm2", "arctic", "deepseek")
_TURNS_NEIGHBOURS += ("bailingmoe", "chameleon", "llada", "nanbeige")
_ADDS_1_TO_NORMS = ("gemma", "gemma2", "gemma3", "gemma-embedding", "nemotron")
_ROPE_FACTORS = "rope_freqs.weight"
# What every published Llama from 3.1 on has; the file keeps only the factors that follow.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_SIZES = {  # the key of a configuration -> what follows the architecture in that of llama.cpp
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "max_position_embeddings": "context_length",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_head_dim": "attention.key_length_mla",
    "v_head_dim": "attention.value_length_mla",
    "num_nextn_predict_layers": "nextn_predict_layers",
}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class _Blocks:
    """A tensor of a GGUF file, or a part of one."""

    name: str
    file: Path
    start: int  # of its bytes
    size: int  # in bytes
    format: int  # one of GGMLQuantizationType, or another that the package does not know
    shape: tuple[int, ...]
    head_dim: int = 0  # of the heads whose rows are to be put back in order; 0: they are in order
    added: float = 0.0  # to each of its numbers

    number_type = torch.float32

    def pieces(self, read: Read, size: int) -> Iterator[Tensor]:
        """Its numbers in order, in pieces of `size`. Read as whole blocks, or as whole heads to be put in order."""
        numbers, size_of_block = GGML_QUANT_SIZES.get(self.format, (1, 1))
        unit = self.head_dim * math.prod(self.shape[1:]) or numbers
        stored = Stored(self.name, self.file, self.start, "U8", (self.size,))
        step = max(min(size, AT_ONCE) // unit, 1) * unit
        read_blocks = read(stored, step // numbers * size_of_block, torch.uint8)
        return in_pieces(map(self._dequantise, read_blocks), size, math.prod(self.shape))

    def _dequantise(self, blocks: Tensor) -> Tensor:
        """Numbers in a row; where whole heads are to be put in order, from pairs (2i, 2i + 1) to pairs (i, i + D/2)."""
        try:
            numbers = torch.from_numpy(dequantize(blocks.numpy()[None], self.format))
        except (NotImplementedError, AttributeError) as error:  # the latter where the format has no name
            form = getattr(self.format, "name", f"format {self.format}")
            raise CheckpointError(f"{self.file}: {self.name} is stored as {form}, which gguf does not read") from error
        if self.head_dim:
            numbers = numbers.view(-1, self.head_dim // 2, 2, math.prod(self.shape[1:])).transpose(1, 2)
        return numbers.flatten() - self.added

    def cut(self, count: int) -> list["_Blocks"]:
        """Its rows in `count` equal parts; of a stack of as many matrices, these."""
        rows, size = self.shape[0] // count, self.size // count
        shape = (rows, *self.shape[1:]) if len(self.shape) < 3 else self.shape[1:]
        return [replace(self, start=self.start + part * size, size=size, shape=shape) for part in range(count)]


class GGUF(Checkpoint):
    """A GGUF file, read piece by piece, in float32. Of any architecture: where it runs here, `model_config` is given.

    hf_config: what config.json would say. Of an architecture that does not run, model_type is llama.cpp's name, and of
    the sizes there is what the file gives; a list where layers differ.

    Args:
        path: the file; any part of one that is split; or the folder of either.

    Raises CheckpointError: the file or one of its parts is missing, damaged or something else, the folder holds several
    models, or a key is missing. A tensor in a format that is not understood is refused where it is read, and what is
    not computed here, where `model_config` is asked for.
    """

    def __init__(self, path: str | Path) -> None:
        parts = _find_parts(Path(path))
        self.path = self.config_file = parts[0]
        self._is_one_file = True
        try:
            self._metadata, stored = _read_parts(parts)
            self.hf_config = _read_metadata(self._metadata, stored)
            tensors = dict(_in_our_layout(stored, self.hf_config, self._metadata["general.architecture"]))
            self._factors = tensors.pop(_ROPE_FACTORS, None)
            self._set_tensors(tensors, parts)
            self._tokens = _read_tokens(self._metadata)
        except CheckpointError:
            raise
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, as of a tokenizer; empty if the file has no vocabulary."""
        return self._tokens

    def _config_to_run(self) -> dict[str, Any]:
        architecture, config = self._metadata["general.architecture"], dict(self.hf_config)
        require(architecture in _ARCHITECTURES, "general.architecture", architecture, _ONE_THAT_RUNS)
        _require_same(self._metadata, architecture, config["head_dim"])
        if self._factors is not None:
            (factors,) = self._factors.pieces(self._read, math.prod(self._factors.shape))
            config["rope_scaling"] = _read_rope_factors(factors, read_config(config))
        return config


class _Reader(GGUFReader):
    """Of the package, but what lies beyond the end of the file is an error and not a short array."""

    def __init__(self, path: Path) -> None:
        self.file, self.stored = path, {}
        super().__init__(path)
        require(self.endianess == GGUFEndian.LITTLE, "byte order", self.endianess.name, "LITTLE")

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        self.data = np.asarray(self.data)  # no longer a memmap, which takes three times as long to cut up
        self._require_held(offset + int(count) * np.dtype(dtype).itemsize)
        return super()._get(offset, dtype, count, override_order)

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        """Where each tensor lies. (The package refuses all of a file where one format is unknown to it.)"""
        known = {int(form): form for form in GGMLQuantizationType}
        for field in fields:
            _, name, _, sides, (kind,), (offset,) = field.parts
            name, shape = bytes(name).decode(), tuple(int(side) for side in reversed(sides))
            numbers, size = GGML_QUANT_SIZES.get(int(kind), (1, 0))
            require(name not in self.stored, name, "twice", "each tensor once")
            require(shape[-1] % numbers == 0, name, list(shape), f"rows of whole blocks, each of {numbers} numbers")
            start, size = start_offs + int(offset), math.prod(shape) // numbers * size
            self._require_held(start + size)
            self.stored[name] = _Blocks(name, self.file, start, size, known.get(int(kind), int(kind)), shape)

    def _require_held(self, size: int) -> None:
        if size > len(self.data):
            raise ValueError(f"found {len(self.data)} bytes, wanted a whole GGUF file")


def _find_parts(path: Path) -> list[Path]:
    """The file, or all parts of the model that it belongs to, in order."""
    if path.is_dir():
        files = sorted(file for file in path.glob("*.gguf") if not file.name.startswith("mmproj"))  # of images
        firsts = [file for file in files if (part := _PART.fullmatch(file.name)) is None or int(part[2]) == 1]
        if len(firsts) > 1:
            names = ", ".join(file.name for file in firsts)
            raise CheckpointError(f"{path}: holds {len(firsts)} models, wanted one; name one of {names}")
        path = firsts[0] if firsts else files[0] if files else path
    part, files = _PART.fullmatch(path.name), [path]
    if part is not None and int(part[3]) > 0:
        files = [path.with_name(f"{part[1]}-{number + 1:05d}-of-{part[3]}.gguf") for number in range(int(part[3]))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: not found, or no file{f': a part of {path.name}' if part else ''}")
    return files


def _read_parts(parts: list[Path]) -> tuple[dict[str, Any], dict[str, _Blocks]]:
    """The metadata of the first part, and the tensors of all."""
    stored: dict[str, _Blocks] = {}
    metadata: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        try:
            reader = _Reader(part)
            metadata.append({key: field.contents() for key, field in reader.fields.items()})
            count, place = (metadata[-1].get(f"split.{key}", default) for key, default in (("count", 1), ("no", 0)))
            whole = "1, the whole model in one file, or its parts beside it, named as they were split"
            require(count == len(parts), "split.count", count, whole if len(parts) == 1 else len(parts))
            require(place == number, "split.no", place, number)
            twice = stored.keys() & reader.stored.keys()
            require(not twice, "tensors", sorted(twice)[:3], "each in one part")
        except (ValueError, LookupError, ArithmeticError, RecursionError) as error:
            found = describe_file(part)
            found = f" (found {found})" if found and "magic" in str(error) else ""
            raise CheckpointError(f"{part}: {error}{found}") from error
        stored |= reader.stored
    count = metadata[0].get("split.tensors.count", len(stored))
    require(count == len(stored), "split.tensors.count", count, f"{len(stored)}, the tensors in all parts")
    return metadata[0], stored


def _in_our_layout(
    stored: Mapping[str, _Blocks], config: Mapping[str, Any], architecture: str
) -> Iterator[tuple[str, _Blocks]]:
    """Each tensor in the order it had, and where the model runs, each expert by itself, with its name in our layout."""
    on_disk = find_family(config["model_type"]).on_disk if architecture in _ARCHITECTURES else None
    for name, tensor in stored.items():
        place = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+?)(?:\.(\d+))?\.(weight|bias)", name)
        layer, part, expert, kind = place.groups() if place else (None, name, None, "")
        if architecture in _TURNS_NEIGHBOURS and part in ("attn_q", "attn_k"):
            head_dim = config.get("head_dim")
            is_even = type(head_dim) is int and head_dim > 0 and head_dim % 2 == 0
            is_whole = is_even and tensor.shape[0] % head_dim == 0
            require(is_whole, f"shape of {name}", list(tensor.shape), f"{head_dim} rows for each head, an even number")
            tensor = replace(tensor, head_dim=head_dim)
        if architecture in _ADDS_1_TO_NORMS and name.endswith("norm.weight"):
            tensor = replace(tensor, added=1.0)
        ours = (_NAMES if layer is None else _NAMES_IN_LAYER).get(part if expert is None else f"{part}_exps")
        if on_disk is None or (ours is None and part != "ffn_gate_up_exps"):
            yield name, tensor
            continue
        if part == "ffn_gate_inp_shexp":  # stored as [H]
            tensor = replace(tensor, shape=(1, tensor.shape[-1]))
        for own, one in _by_expert(part, expert, ours, tensor):
            name = on_disk(f"{own}.{kind}" if layer is None else f"model.layers.{layer}.{own}.{kind}")
            yield name, replace(one, name=name)


def _by_expert(part: str, expert: str | None, ours: str | None, tensor: _Blocks) -> Iterator[tuple[str, _Blocks]]:
    """A tensor, or each expert of it; and of each expert, its gate and its up, where these are one."""
    if not part.endswith("_exps"):  # before April 2024 each expert was a tensor
        yield ours.format(expert), tensor
        return
    for number, one in enumerate(tensor.cut(tensor.shape[0])):
        if part == "ffn_gate_up_exps":
            gate, up = one.cut(2)
            yield _NAMES_IN_LAYER["ffn_gate_exps"].format(number), gate
            yield _NAMES_IN_LAYER["ffn_up_exps"].format(number), up
        else:
            yield ours.format(number), one


def _read_metadata(metadata: Mapping[str, Any], stored: Mapping[str, _Blocks]) -> dict[str, Any]:
    """What config.json would say."""
    architecture = metadata.get("general.architecture")
    require(isinstance(architecture, str), "general.architecture", architecture, _ONE_THAT_RUNS)
    if architecture in _ARCHITECTURES:
        return _read_what_runs(metadata, architecture, stored)
    config: dict[str, Any] = {"model_type": architecture, "tie_word_embeddings": "output.weight" not in stored}
    for key, name in _SIZES.items():
        value = metadata.get(f"{architecture}.{name}")
        values = value if isinstance(value, list) and value else [value]
        if all(type(number) is int for number in values):
            config[key] = values[0] if len(set(values)) == 1 else values
    blocks = config.get("num_hidden_layers", _count_blocks(stored))
    config["num_hidden_layers"] = blocks - config.get("num_nextn_predict_layers", 0)  # the last ones predict further on
    if "token_embd.weight" in stored:
        config["vocab_size"] = stored["token_embd.weight"].shape[0]
    if (heads := config.get("num_attention_heads")) is not None:
        config.setdefault("num_key_value_heads", heads)
        most = max(heads) if isinstance(heads, list) else heads
        config.setdefault("head_dim", config.get("hidden_size", 0) // max(most, 1))
    return config


def _read_what_runs(metadata: Mapping[str, Any], architecture: str, stored: Mapping[str, _Blocks]) -> dict[str, Any]:
    """Widths are those of the tensors: older files do not give them."""

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

    blocks, held = whole("block_count"), _count_blocks(stored)
    require(blocks <= held, f"{architecture}.block_count", blocks, f"at most {held}, the blocks in the file")
    hidden, held = whole("embedding_length"), rows("token_embd.weight", -1)
    require(hidden == held, f"{architecture}.embedding_length", hidden, f"{held}, the columns of token_embd.weight")
    heads, experts = whole("attention.head_count"), whole("expert_count", 0)
    key_heads = whole("attention.head_count_kv", heads)
    head_dim = whole("attention.key_length", hidden // max(heads, 1))
    for key, count, name in (("head_count", heads, "attn_q"), ("head_count_kv", key_heads, "attn_k")):
        held, part = rows(f"blk.0.{name}.weight"), f"{architecture}.attention"
        wanted = f"a product of {held}, the rows of blk.0.{name}.weight"
        require(count * head_dim == held, f"{part}.{key}={count} and {part}.key_length", head_dim, wanted)
    epsilon = said("attention.layer_norm_rms_epsilon")
    require(type(epsilon) is float, f"{architecture}.attention.layer_norm_rms_epsilon", epsilon, "a number")
    rope, last = said("rope.scaling.type", "none"), f"blk.{blocks - 1}"
    names = ("ffn_gate_up_exps", "ffn_gate.0", "ffn_gate_exps") if experts else ("ffn_gate",)
    gate = next((name for part in names if (name := f"{last}.{part}.weight") in stored), f"{last}.{names[-1]}.weight")
    width, held = rows(gate) // (2 if "_up_" in gate else 1), rows(gate, 0) if experts else 0
    if gate.endswith(".0.weight"):
        held = sum(name.startswith(f"{last}.ffn_gate.") for name in stored)
    require(experts <= held, f"{architecture}.expert_count", experts, f"at most {held}, the experts in {gate}")
    shared, bias = f"{last}.ffn_gate_shexp.weight", f"{last}.attn_q.bias" in stored
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
        # What YaRN needs is not read: `_require_same` refuses it.
        "rope_scaling": None
        if rope in ("none", "yarn")
        else {"rope_type": rope, "factor": said("rope.scaling.factor")},
        "tie_word_embeddings": "output.weight" not in stored,
        "attention_bias": bias,
        "qkv_bias": bias,
        "clip_qkv": said("attention.clamp_kqv"),
        "num_experts": experts,
        "num_experts_per_tok": said("expert_used_count", 0),
        "norm_topk_prob": said("expert_weights_norm", architecture == "qwen3moe"),  # as llama.cpp does without the key
    }


def _count_blocks(stored: Mapping[str, _Blocks]) -> int:
    numbers = (re.match(r"blk\.(\d+)\.", name) for name in stored)
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def _require_same(metadata: Mapping[str, Any], architecture: str, head_dim: int) -> None:
    """Refuse what would change the function, and no family here has."""
    key = f"{architecture}.rope.scaling.type"
    require(metadata.get(key) != "yarn", key, "yarn", "none or linear, all that is read")
    fixed = {"rope.dimension_count": head_dim, "attention.value_length": head_dim}
    fixed |= {"expert_gating_func": 1, "expert_weights_scale": 1.0}  # 1 is the softmax
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
    is_bert = metadata.get("tokenizer.ggml.model") == "bert"
    return {
        _as_in_bert(token, kind) if is_bert else token: index
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != TokenType.UNUSED
    }


def _as_in_bert(token: str, kind: int) -> str:
    """How BERT writes what llama.cpp's converter rewrote: it marks what begins a word, BERT what goes on with one."""
    if kind == TokenType.CONTROL or (token.startswith("[") and token.endswith("]")):
        return token
    return token[1:] if token.startswith("\u2581") else f"##{token}"
