"""The weights of a model by the role they play, whatever its family calls them.

    q, k, v, o                        [out, in], as stored; with q_bias, k_bias, v_bias, o_bias, q_norm, k_norm
    norm1, norm2                      [H], before attention and before the MLP
    gate, up [I, H], down [H, I]      of the MLP; in a mixture of all experts: [E, I, H], [E, H, I]
    router, router_noise [E, H]       with router_bias [E], which only selects, and router_scale [E]
    shared_gate, shared_up, shared_down    of the expert that every token meets; shared_router [1, H], how much of it
    embedding, head [V, H], norm_final [H] once in a model: they belong to no layer

A folder is read tensor by tensor, and only what is asked for, wherever it lies. What several methods compute from a
model is kept with it (`read_once`): open a model in memory anew after changing it.

Shapes: H hidden size, I width of an MLP or of an expert, E experts, L layers, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from minimoe.fingerprints.result import Refusal
from minimoe.model.checkpoint import (
    CONFIG,
    Checkpoint,
    CheckpointError,
    HashUnknownError,
    NotFiniteError,
    check_sizes,
    is_finite,
    load_weights,
    require_finite,
    tensors_on_disk,
)
from minimoe.model.config import MoEConfig
from minimoe.model.families import BERT, MINIMOE, find_family, name_in_bert
from minimoe.model.opening import open_checkpoint
from minimoe.model.transformer import Block, MoEForCausalLM

PIECE = 2**18  # numbers read at once: small enough to stay in the processor's cache

# What each role is called in our models, with one tensor per expert.
_OF_THE_MODEL = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight", "norm_final": "model.norm.weight"}
_PROJECTIONS = ("gate", "up", "down")
_OF_A_LAYER = {
    **{role: f"self_attn.{role}_proj.weight" for role in "qkvo"},
    **{f"{role}_bias": f"self_attn.{role}_proj.bias" for role in "qkvo"},
    **{f"{role}_norm": f"self_attn.{role}_norm.weight" for role in "qk"},
    "norm1": "input_layernorm.weight",
    "norm2": "post_attention_layernorm.weight",
    **{role: f"mlp.{role}_proj.weight" for role in _PROJECTIONS},
    "router": "mlp.gate.weight",
    "router_bias": "mlp.gate.e_score_correction_bias",
    "router_scale": "mlp.gate.router_scale",
    "router_noise": "mlp.gate.noise_weight",
    "shared_router": "mlp.shared_expert_gate.weight",
    **{f"shared_{role}": f"mlp.shared_expert.{role}_proj.weight" for role in _PROJECTIONS},
}
ROLES = (*_OF_A_LAYER, *_OF_THE_MODEL)
_ROLES_IN_AN_MLP = {name.removeprefix("mlp."): role for role, name in _OF_A_LAYER.items() if name.startswith("mlp.")}
_ROLES_IN_AN_MLP |= {f"experts.{role}_proj": role for role in _PROJECTIONS}  # all experts in one tensor
_EVERYWHERE = ("q", "k", "v", "o", "norm1", "norm2", "up", "down")  # in a layer of any family


class Statistics(NamedTuple):
    """Of all numbers of a tensor together."""

    mean: float
    std: float  # of the population: divided by the count
    count: int


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch on one thread inside the block: on pieces this small, threads wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Make tensors on the CPU inside the block, where weights are read to, whatever the default device."""
    with torch.device("cpu"):
        yield


def read_once(read: Callable[..., Any]) -> Callable[..., Any]:
    """Keep with each model what `read(weights, *arguments)` gave last, for when it is asked the same again."""

    @wraps(read)
    def kept(weights: Weights, *arguments: Any) -> Any:
        asked, found = weights.kept.get(read, (None, None))
        if asked != arguments:
            found = read(weights, *arguments)
            weights.kept[read] = arguments, found
        return found

    return kept


def open_weights(source: str | Path | MoEForCausalLM, *, tokenizer: Any = None) -> Weights:
    """The weights of a model, by role.

    Args:
        source: a model in memory, on any device, in any dtype; or what `open_checkpoint` takes: a folder, a file,
            "owner/name" of the Hugging Face hub or an address. Of any family in `minimoe.model.families`, or a BERT
            encoder.
        tokenizer: whatever has a `get_vocab()`; None: the one beside the files, or of the model.

    Raises:
        CheckpointError: a file is missing or damaged, the family is unknown, or the configuration has other sizes than
            the tensors; it is named. Or a server fails, there or later, where a tensor is read.
        ValueError: the model is on the meta device, where there are no numbers.
    """
    if isinstance(source, MoEForCausalLM):
        config, tensors = source.config, _read_memory(source)
        return Weights("model in memory", source, tensors, config, config, MINIMOE.on_disk, tokenizer)
    checkpoint = open_checkpoint(source)
    if tokenizer is None and hasattr(checkpoint, "get_vocab"):  # a GGUF file holds its own
        tokenizer = checkpoint
    if checkpoint.hf_config.get("model_type") == BERT:
        config, shape = None, _shape_of_bert(checkpoint)
        on_disk = _names_in_bert(checkpoint, shape.num_hidden_layers)
    else:
        config = shape = checkpoint.model_config
        on_disk = find_family(config.model_type).on_disk
    return Weights(str(source), checkpoint, checkpoint, config, shape, on_disk, tokenizer)


class Weights:
    """What `open_weights` returns.

    name: where they are from. config: None for a BERT encoder. num_layers, hidden_size, num_heads, num_kv_heads,
    head_dim, and num_experts, which is 0 for a dense model: its shape. kept: what methods computed (`read_once`).
    """

    def __init__(
        self,
        name: str,
        source: Checkpoint | MoEForCausalLM,
        tensors: Checkpoint | _Memory,
        config: MoEConfig | None,
        shape: MoEConfig,
        on_disk: Callable[[str], str],
        tokenizer: Any,
    ) -> None:
        self.name, self.config = name, config
        self.kept: dict[Callable, tuple[tuple, Any]] = {}
        self._source, self._tensors, self._tokenizer = source, tensors, tokenizer
        self._shape, self._on_disk = shape, on_disk
        self.num_layers, self.hidden_size, self.head_dim = shape.num_hidden_layers, shape.hidden_size, shape.head_dim
        self.num_heads, self.num_kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        self.num_experts = shape.num_experts

    def get(self, role: str, layer: int | None = None) -> Tensor:
        """One role of one layer, in float32.

        Args:
            role: one of `ROLES`; the shapes stand at the top of this file.
            layer: from 0; None for embedding, head and norm_final.

        Raises:
            KeyError: there is no such role or layer; the message says which there are.
            CheckpointError: a file is damaged, or stores integers.
            Refusal: a number is NaN or infinite; the tensor is named.
        """
        names, tensor = self._find(role, layer), torch.empty(self.shape(role, layer))
        for part, name in zip(tensor.view(len(names), -1), names, strict=True):
            part.copy_(self._tensors[name].flatten())
            self._require_finite(name, part)
        return tensor

    def rows(self, role: str, ids: list[int]) -> Tensor:
        """Some rows of embedding or head, [len(ids), H] in float32."""
        (name,) = self._find(role, None)
        rows = self._tensors[name][ids].float()
        self._require_finite(name, rows)
        return rows

    def has(self, role: str, layer: int | None = None) -> bool:
        """Whether `get` would find it."""
        return bool(self._names(role, layer))

    def shape(self, role: str, layer: int | None = None) -> tuple[int, ...]:
        """The shape that `get` would return, from the header alone."""
        names = self._find(role, layer)
        shape = self._tensors.shape(names[0])
        if self._is_per_expert(role, layer):
            return (len(names), *shape)
        return shape[-1:] if role == "router_scale" else shape  # [1, E] in files of Pangu Pro MoE

    def pieces(self, role: str, layer: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """All numbers of a role in the order of `get`, in float32: flat pieces, each with the name of its tensor.

        All of them lie in one buffer, which may be written to: each piece overwrites the one before. It takes memory
        for one piece, not for a tensor.
        """
        wide = torch.empty(PIECE)
        for name in self._find(role, layer):
            for piece in self._tensors.pieces(name, PIECE):
                yield name, wide[: len(piece)].copy_(piece)

    @one_thread()
    def statistics(self, role: str, layer: int | None = None) -> Statistics:
        """Mean and standard deviation of all numbers of a role, read in pieces.

        Sums are float64, over the pieces as in Chan et al. 1979 (Updating formulae and a pairwise algorithm for
        computing sample variances).

        Raises:
            Refusal: a number is not finite, or all of them are 0; the tensor is named.
        """
        count, mean, squares = 0, 0.0, 0.0  # squares: the sum of squared distances from the mean
        for name, piece in self.pieces(role, layer):
            size = len(piece)
            of_piece, around = _moments(piece)
            if not math.isfinite(around):
                raise Refusal(f"{self.name}: {name} holds NaN, infinity or numbers too large to square")
            distance = of_piece - mean
            squares += around + distance**2 * count * size / (count + size)
            count += size
            mean += distance * size / count
        if mean == 0 and squares == 0:
            raise Refusal(f"{self.name}: {role} of layer {layer} holds nothing but zeros")
        return Statistics(mean, math.sqrt(squares / count), count)

    @property
    def short_name(self) -> str:
        """The name without the folders above it, if it is a path: to be published."""
        return Path(self.name).resolve().name if Path(self.name).exists() else self.name

    def require_whole(self) -> None:
        """Look, by name alone, whether what every model has is there; a CheckpointError names what is not."""
        once = "embedding", "norm_final", *(() if self.config is None else ("head",))
        self._require(*((role, None) for role in once))
        self._require(*((role, layer) for layer in range(self.num_layers) for role in _EVERYWHERE))

    def require_decoder(self) -> None:
        """Refuse a BERT encoder, which no model here computes."""
        if self.config is None:
            raise Refusal(f"{self.name} is an encoder: it predicts no next token")

    def mlp(self, layer: int) -> nn.Module:
        """The MLP or mixture of one layer in float32, in evaluation mode, to be run and not to be changed.

        It takes memory for one layer, where `model` takes it for all.

        Raises:
            CheckpointError: a tensor is missing or of the wrong shape; its role is named.
            Refusal: the model is an encoder; a number is NaN or infinite, and the tensor is named.
        """
        self.require_decoder()
        with torch.device("meta"):
            mlp = Block(self.config, layer).mlp
        roles = {name: _ROLES_IN_AN_MLP[name] for name in mlp.state_dict()}
        self._require(*((role, layer) for role in roles.values()))
        for name, like in mlp.state_dict().items():
            if (found := self.shape(roles[name], layer)) != like.shape:
                where = f"{self.name}: {roles[name]} of layer {layer}"
                raise CheckpointError(f"{where} is {list(found)}, wanted {list(like.shape)}")
        mlp.load_state_dict({name: self.get(role, layer) for name, role in roles.items()}, assign=True)
        return mlp.eval()

    def model(self) -> MoEForCausalLM:
        """The model in float32, in evaluation mode, to be run and not to be changed.

        Raises:
            CheckpointError: tensors are missing, unexpected or of the wrong shape.
            Refusal: it is an encoder; a number is NaN or infinite, and the tensor is named.
        """
        self.require_decoder()
        with torch.device("meta"):
            model = MoEForCausalLM(self.config)
        if isinstance(self._source, MoEForCausalLM):
            tensors = {name: tensor.to("cpu", torch.float32) for name, tensor in self._source.state_dict().items()}
            model.load_state_dict(tensors, assign=True)
            for name, tensor in tensors_on_disk(model, MINIMOE).items():
                self._require_finite(name, tensor)
        else:
            with _refusing():
                load_weights(model, self._source, torch.float32)
        return model.eval()

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Token -> id, of those that have a row in the embedding; empty where there is no tokenizer."""
        vocabulary = self._tokenizer.get_vocab() if self._tokenizer is not None else _read_vocabulary(self._source)
        rows = self._tensors.shape(self._find("embedding", None)[0])[0]
        return {token: index for token, index in vocabulary.items() if index < rows}

    def sha256(self) -> str:
        """Of the weight file; of several: of their sha256 by name; in memory: of names, dtypes, shapes and bytes.

        Raises:
            Refusal: the files are on a server, and no sha256 of them is published.
        """
        if isinstance(self._source, Checkpoint):
            try:
                hashes = self._source.hashes()
            except HashUnknownError as error:
                raise Refusal(str(error)) from error
            return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        digest = hashlib.sha256()
        for name, tensor in self._tensors.items():
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _require(self, *places: tuple[str, int | None]) -> None:
        for place in places:
            if not self.has(*place):
                raise CheckpointError(self._missing(*place))

    def _require_finite(self, name: str, copied: Tensor) -> None:
        """Refuse NaN and infinity in what was copied from a tensor; the place that is named is that in the tensor."""
        if not is_finite(copied):
            with _refusing():
                require_finite(f"{self.name}: {name}", self._tensors[name].float())

    def _find(self, role: str, layer: int | None) -> list[str]:
        names = self._names(role, layer)
        if not names:
            raise KeyError(self._missing(role, layer))
        return names

    def _missing(self, role: str, layer: int | None) -> str:
        where = f"{self.name} has no {role!r}" + ("" if layer is None else f" in layer {layer}")
        if layer is not None and layer not in range(self.num_layers):
            return f"{where}: its layers go from 0 to {self.num_layers - 1}"
        return f"{where}: found {', '.join(role for role in ROLES if self._names(role, layer))}"

    def _names(self, role: str, layer: int | None) -> list[str]:
        """The tensors on disk that make up a role: one, or one per expert; none if there is none."""
        if role == "head" and self._shape.tie_word_embeddings:
            role = "embedding"
        if layer is None:
            ours = [_OF_THE_MODEL[role]] if role in _OF_THE_MODEL else []
        elif role not in _OF_A_LAYER or layer not in range(self.num_layers):
            ours = []
        elif self._is_per_expert(role, layer):
            prefix = f"model.layers.{layer}.mlp.experts"
            ours = [f"{prefix}.{expert}.{role}_proj.weight" for expert in range(self.num_experts)]
        else:
            ours = [f"model.layers.{layer}.{_OF_A_LAYER[role]}"]
        names = [self._on_disk(name) for name in ours]
        return names if names and names[0] in self._tensors else []

    def _is_per_expert(self, role: str, layer: int | None) -> bool:
        return role in _PROJECTIONS and layer is not None and self._shape.is_sparse(layer)


class _Memory(dict[str, Tensor]):
    """The tensors of a model in memory, read as those of a `Checkpoint` are."""

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        return iter(self[name].flatten().split(size))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)


def _read_memory(model: MoEForCausalLM) -> _Memory:
    """The tensors of a model, on the CPU: those that are there already are not copied."""
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("device='meta': wanted a model on a device where its weights have values")
    return _Memory((name, tensor.cpu()) for name, tensor in tensors_on_disk(model, MINIMOE).items())


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn an error about a number that is not finite into a reason why a method does not apply."""
    try:
        yield
    except NotFiniteError as error:
        raise Refusal(str(error)) from error


def _names_in_bert(checkpoint: Checkpoint, num_layers: int) -> Callable[[str], str]:
    prefix = "bert." if any(name.startswith("bert.") for name in checkpoint) else ""  # where a head was trained on top

    def in_bert(name: str) -> str:
        name = prefix + name_in_bert(name, num_layers)
        return name if name in checkpoint else name.replace("LayerNorm.weight", "LayerNorm.gamma")  # before 2019

    return in_bert


def _shape_of_bert(checkpoint: Checkpoint) -> MoEConfig:
    keys = "hidden_size", "num_hidden_layers", "num_attention_heads"
    try:
        sizes = {key: checkpoint.hf_config.get(key) for key in keys}
        vocab_size = checkpoint.hf_config.get("vocab_size", 30522)  # as transformers takes it
        shape = MoEConfig(vocab_size=vocab_size, **sizes, num_experts=0, tie_word_embeddings=False)
        check_sizes(checkpoint, shape, _names_in_bert(checkpoint, sizes["num_hidden_layers"]), {})
        return shape
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path / CONFIG}: {error}") from error


def _moments(values: Tensor) -> tuple[float, float]:
    """The mean of some numbers, and the sum of their squared distances from it.

    In float64: a profile of nearly equal deviations enlarges their rounding a hundred times. Not finite if one of the
    numbers is not, or if it is too large to square in float32.
    """
    wide = values.double()
    mean = wide.mean().item()
    wide -= mean
    around = torch.dot(wide, wide).item()
    return mean, around if around <= torch.finfo(torch.float32).max else math.inf


_VOCABULARIES: dict[str, Callable[[str], dict[str, int]]] = {  # from the text of each kind of file
    "tokenizer.json": lambda text: Tokenizer.from_str(text).get_vocab(),
    "vocab.json": lambda text: {str(token): int(index) for token, index in json.loads(text).items()},  # GPT-2
    "vocab.txt": lambda text: {token: index for index, token in enumerate(text.rstrip("\n").split("\n"))},  # BERT
}


def _read_vocabulary(source: Checkpoint | MoEForCausalLM) -> dict[str, int]:
    """Token -> id, from the first of these files that lies beside a checkpoint, or of a model in memory."""
    if isinstance(source, MoEForCausalLM):
        text = source.tokenizer_json
        return {} if text is None else _parse_vocabulary("tokenizer.json", lambda: text, "tokenizer_json")
    for name in _VOCABULARIES:
        if (file := source.beside(name)) is not None:
            return _parse_vocabulary(name, lambda file=file: file.read_text("utf-8"), file)
    return {}


def _parse_vocabulary(name: str, read: Callable[[], str], where: str | Path) -> dict[str, int]:
    try:
        return _VOCABULARIES[name](read())
    except Exception as error:  # tokenizers raises nothing more specific
        raise CheckpointError(f"{where}: wanted a vocabulary, found something else ({error})") from error
