"""The weights of a model by the role they play, whatever its family calls them.

    q, k, v, o                        [out, in], as stored; with q_bias, k_bias, v_bias, o_bias, q_norm, k_norm
    norm1, norm2                      [H], before attention and before the MLP; one norm may be both
    norm1_after, norm2_after          [H], of what attention and MLP give, before it is added
    gate, up [I, H], down [H, I]      of the MLP; in a mixture of all experts: [E, I, H], [E, H, I]
    router, router_noise [E, H]       with router_bias [E], which only selects, and router_scale [E]
    shared_gate, shared_up, shared_down    of the expert that every token meets; shared_router [1, H], how much of it
    embedding, head [V, H], norm_final [H] once in a model: they belong to no layer

A folder is read tensor by tensor, and only what is asked for, wherever it lies. What several methods compute from a
model is kept with it (`read_once`): open a model in memory anew after changing it.

Shapes: H hidden size, I width of an MLP or of an expert, E experts, L layers, V vocabulary.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from minimoe.fingerprints.places import Place, Places, Product
from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.roles import IN_A_LAYER, ONCE, slot_of
from minimoe.model.checkpoint import (
    Checkpoint,
    CheckpointError,
    NotFiniteError,
    is_finite,
    load_weights,
    require_finite,
)
from minimoe.model.config import MoEConfig
from minimoe.model.families import MINIMOE, find_family, read_config
from minimoe.model.layout import tensors_on_disk
from minimoe.model.opening import open_checkpoint
from minimoe.model.stored import HashUnknownError, describe_file
from minimoe.model.transformer import Block, MoEForCausalLM
from minimoe.progress import note

PIECE = 2**18  # numbers read at once: small enough to stay in the processor's cache
ROLES = (*IN_A_LAYER, *ONCE)
_PARTS = [("q", "k", "v", "o"), ("up", "down")]  # of a layer that has one of these, all


class Files(NamedTuple):
    """The weight files of a model by name, and what was read of them since it was opened, in bytes."""

    names: list[str]
    size: int
    read: int
    moved: int | None  # over a network, headers and other files included; None: they are here
    unread: list[str]  # others with weights beside them, by name


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
    is_default = torch.get_default_device().type == "cpu"  # to name it all the same would slow every operation
    with nullcontext() if is_default else torch.device("cpu"):
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


def open_weights(source: str | Path | MoEForCausalLM, *, tokenizer: Any = None) -> "Weights":
    """The weights of a model, by role.

    Args:
        source: a model in memory, on any device, in any dtype; or what `open_checkpoint` takes: a folder, a file,
            "owner/name" of the Hugging Face hub or an address. Of any family of decoders with attention whose tensors
            have names that the package gguf or roles.py knows, or an encoder: BERT or a relative of it.
        tokenizer: whatever has a `get_vocab()`; None: the one beside the files, or of the model.

    Raises:
        CheckpointError: a file is missing or damaged, no tensor has a known name, or the configuration has other sizes
            than the tensors; it is named. Or a server fails, there or later, where a tensor is read.
        ValueError: the model is on the meta device, where there are no numbers.
    """
    if isinstance(source, MoEForCausalLM):
        if any(tensor.is_meta for tensor in source.state_dict().values()):
            raise ValueError("device='meta': wanted a model on a device where its weights have values")
        tensors = _Memory((name, tensor.cpu()) for name, tensor in tensors_on_disk(source, MINIMOE).items())
        reason = _not_followed(source.config)
        return Weights("model in memory", source, tensors, None if reason else source.config, reason, tokenizer)
    checkpoint = open_checkpoint(source)
    is_gguf = hasattr(checkpoint, "get_vocab")
    if tokenizer is None and is_gguf:  # it holds its own
        tokenizer = checkpoint
    reason = config = None
    try:
        read_config(checkpoint.hf_config)
    except ValueError as error:
        reason = str(error)  # why it cannot be run
    if reason is not None and reason.startswith("quantization_config"):  # then the numbers may mean anything
        raise CheckpointError(f"{checkpoint.config_file}: {reason}")
    is_fused = any(name.endswith(".experts.gate_up_proj") for name in checkpoint)
    if reason is None and is_fused and not find_family(checkpoint.hf_config["model_type"]).fused_experts:
        reason = "its experts lie together in experts.gate_up_proj, wanted tensors for each of them"
    if reason is None:
        try:
            config = checkpoint.model_config
            reason = _not_followed(config)
        except CheckpointError as error:
            if not is_gguf:  # then the sizes are others than those of the tensors
                raise
            reason = str(error)
    return Weights(str(source), checkpoint, checkpoint, None if reason else config, reason, tokenizer)


def _not_followed(config: MoEConfig) -> str | None:
    """Why the methods that run a model layer by layer, from its roles, cannot follow it; None: they can."""
    usual = {"kv_lora_rank": None, "attention_sinks": False, "moe_bias": False, "swiglu_limit": None}
    found = {name: getattr(config, name) for name, value in usual.items() if getattr(config, name) != value}
    return next((f"{name}={value!r}: no role holds it, wanted {usual[name]}" for name, value in found.items()), None)


class Weights:
    """What `open_weights` returns.

    name: where they are from. family: `model_type` of the configuration. config: of a model that can be run; None: it
    can only be read, and `reason` says why. num_layers, hidden_size, num_heads, num_kv_heads, head_dim, and
    num_experts, which is 0 for a dense model: its shape. Where layers differ, that of the first one with attention.
    kept: what methods computed (`read_once`).
    """

    def __init__(
        self,
        name: str,
        source: Checkpoint | MoEForCausalLM,
        tensors: "Checkpoint | _Memory",
        config: MoEConfig | None,
        reason: str | None,
        tokenizer: Any,
    ) -> None:
        self.name, self.config, self.reason = name, config, reason
        self.kept: dict[Callable, tuple[tuple, Any]] = {}
        self._source, self._tensors, self._tokenizer = source, tensors, tokenizer
        config = source.config if isinstance(source, MoEForCausalLM) else config
        where, said = (name, vars(config)) if config else (str(source.config_file), source.hf_config)
        self._places = places = Places(tensors, said, where)
        self.family, self.is_encoder = str(said.get("model_type")), places.is_encoder
        self.num_layers, self.hidden_size, self.head_dim = places.num_layers, places.hidden_size, places.head_dim
        self.num_heads, self.num_kv_heads, self.num_experts = places.num_heads, places.num_kv_heads, places.num_experts
        self.heads = places.heads  # of a layer: how many of queries, and of keys and values

    def layers_with(self, role: str) -> list[int]:
        """The layers that have a role: of a hybrid model, not all have attention; a KeyError if there are none."""
        layers = [layer for layer in range(self.num_layers) if self.has(role, layer)]
        if not layers:
            raise KeyError(self._missing(role, 0))
        return layers

    def get(self, role: str, layer: int | None = None, *, over: Tensor | None = None) -> Tensor:
        """One role of one layer, in float32.

        Args:
            role: one of `ROLES`; the shapes stand at the top of this file.
            layer: from 0; None for embedding, head and norm_final.
            over: what is no longer needed, to be overwritten if it has the same shape: to ask for memory takes longer.

        Raises:
            KeyError: there is no such role or layer; the message says which there are.
            CheckpointError: a file is damaged, or stores integers.
            Refusal: a number is NaN or infinite; the tensor is named.
        """
        place, shape = self._find(role, layer), self.shape(role, layer)
        tensor = over if over is not None and over.shape == shape and not over.is_meta else torch.empty(shape)
        flat, start = tensor.view(-1), 0
        for name, part in place.read(self._tensors):
            flat[start : start + part.numel()].copy_(part.flatten())
            self._require_finite(name, flat[start : start + part.numel()])
            start += part.numel()
        return tensor

    def matrices(self, role: str, layer: int) -> Iterator[Tensor]:
        """The matrix of a role, or those of its experts one after the other, as stored, with memory for one of them.

        They may lie in one buffer: each overwrites the one before.
        """
        sides = self.shape(role, layer)[-2:]
        for name, part in self._find(role, layer).read(self._tensors):
            for matrix in part.reshape(-1, *sides):
                self._require_finite(name, matrix)
                yield matrix

    def rows(self, role: str, ids: list[int]) -> Tensor:
        """Some rows of embedding or head, [len(ids), H] in float32."""
        (name,) = self._find(role, None).names
        rows = self._tensors.rows(name, ids).float()
        self._require_finite(name, rows)
        return rows

    def first_rows(self, role: str, layer: int, count: int) -> Tensor:
        """The first rows of a matrix, or of that of every expert; of matrices that lie alone, no others are read."""
        place = self._find(role, layer)
        rows, *others = self._tensors.shape(place.names[0])[:-1]
        if others or place.take is not None or isinstance(place, Product):
            return self.get(role, layer)[..., :count, :]
        parts = [self._tensors.rows(name, range(min(count, rows))).float() for name in place.names]
        for name, part in zip(place.names, parts, strict=True):
            self._require_finite(name, part)
        return torch.stack(parts) if place.by_expert else parts[0]

    def has(self, role: str, layer: int | None = None) -> bool:
        """Whether `get` would find it."""
        return self._places.find(role, layer) is not None

    def shape(self, role: str, layer: int | None = None) -> tuple[int, ...]:
        """The shape that `get` would return, from the header alone."""
        return self._find(role, layer).shape(self._tensors)

    def pieces(self, role: str, layer: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """All numbers of a role in the order of `get`, in float32: flat pieces, each with the name of its tensor.

        All of them lie in one buffer, which may be written to: each piece overwrites the one before. It takes memory
        for one piece; of a role that is only part of a tensor, or a product, for a tensor or an expert.
        """
        place, wide = self._find(role, layer), torch.empty(PIECE)
        if place.take is None and not isinstance(place, Product):
            parts = ((name, piece) for name in place.names for piece in self._tensors.pieces(name, PIECE))
        else:
            parts = ((name, piece) for name, part in place.read(self._tensors) for piece in part.flatten().split(PIECE))
        for name, piece in parts:
            yield name, wide[: len(piece)].copy_(piece)

    @one_thread()
    def statistics(self, role: str, layer: int | None = None) -> Statistics:
        """Mean and standard deviation of all numbers of a role, read in pieces.

        Sums are float64, over the pieces as in Chan et al. 1979 (Updating formulae and a pairwise algorithm for
        computing sample variances).
        Raises Refusal: a number is not finite, or all of them are 0; the tensor is named.
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
        runs, layers = self.config is not None, range(self.num_layers)
        once = {"embedding": True, "norm_final": runs or self.is_encoder, "head": runs}
        self._require(*((role, None) for role, is_wanted in once.items() if is_wanted))
        norms = [role for role in ("norm1", "norm2") if runs or any(self.has(role, layer) for layer in layers)]
        for layer in layers:
            begun = [part for part in _PARTS if any(self.has(role, layer) for role in part)]
            is_other = bool(begun) or any(self.has(role, layer) for role in norms)  # without attention, or without MLP
            parts = begun if is_other and not runs else _PARTS
            self._require(*((role, layer) for role in (*sum(parts, ()), *norms)))

    def require_decoder(self) -> None:
        """Refuse an encoder, which predicts no next token."""
        if self.is_encoder:
            raise Refusal(f"{self.name} is an encoder: it predicts no next token")

    def require_config(self) -> MoEConfig:
        """The configuration of a model that can be run; others are refused, with the reason."""
        self.require_decoder()
        if self.config is None:
            raise Refusal(f"{self.name} can be read and not run: {self.reason}")
        return self.config

    def block(self, layer: int, part: str = "", *, over: Block | None = None) -> Block:
        """One layer in float32, in evaluation mode, to be run and not to be changed.

        It takes memory for one layer, where `model` takes it for all.

        Args:
            layer: from 0.
            part: what the names begin with of the tensors that are read, as "mlp."; the others stay without numbers.
            over: a block that is no longer needed: its memory is used again.

        Raises:
            CheckpointError: a tensor is missing or of the wrong shape; its role is named.
            Refusal: the model can only be read; a number is NaN or infinite, and the tensor is named.
        """
        config = self.require_config()
        with torch.device("meta"):
            block = Block(config, layer)
        wanted = {name: like.shape for name, like in block.state_dict().items() if name.startswith(part)}
        roles = {name: _role_in_a_block(name) for name in wanted}
        self._require(*((role, layer) for role in roles.values()))
        for name, shape in wanted.items():
            if (found := self.shape(roles[name], layer)) != shape:
                where = f"{self.name}: {roles[name]} of layer {layer}"
                raise CheckpointError(f"{where} is {list(found)}, wanted {list(shape)}")
        memory = {} if over is None else over.state_dict()
        tensors = {name: self.get(role, layer, over=memory.get(name)) for name, role in roles.items()}
        block.load_state_dict(tensors, assign=True, strict=False)
        return block.eval()

    def model(self) -> MoEForCausalLM:
        """The model in float32, in evaluation mode, to be run and not to be changed.

        Raises:
            CheckpointError: tensors are missing, unexpected or of the wrong shape.
            Refusal: it can only be read; a number is NaN or infinite, and the tensor is named.
        """
        config = self.require_config()
        with torch.device("meta"):
            model = MoEForCausalLM(config)
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
        rows = self.shape("embedding")[0]
        return {token: index for token, index in vocabulary.items() if index < rows}

    @property
    def files(self) -> Files | None:
        """None of a model in memory."""
        if isinstance(self._source, MoEForCausalLM):
            return None
        names, sizes = zip(*((file.name, file.stat().st_size) for file in self._source.files), strict=True)
        return Files([*names], sum(sizes), self._source.bytes_read, self._source.bytes_moved, self._source.unread)

    def begins_like(self, other: "Weights") -> bool:
        """Whether the embeddings begin with the same numbers: where they do not, there is no need to compare hashes."""
        first, second = (next(side.pieces("embedding"))[1].view(torch.int32) for side in (self, other))
        return torch.equal(first, second)

    def sha256(self) -> str:
        """Of the weight file; of several: of their sha256 by name; in memory: of names, dtypes, shapes and bytes.

        Raises Refusal: the files are on a server, and no sha256 of them is published.
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

    def _find(self, role: str, layer: int | None) -> Place:
        note(role if layer is None else f"{role} of layer {layer}")
        place = self._places.find(role, layer)
        if place is None:
            raise KeyError(self._missing(role, layer))
        return place

    def _missing(self, role: str, layer: int | None) -> str:
        where = f"{self.name} has no {role!r}" + ("" if layer is None else f" in layer {layer}")
        if layer is not None and layer not in range(self.num_layers):
            return f"{where}: its layers go from 0 to {self.num_layers - 1}"
        return f"{where}: found {', '.join(role for role in ROLES if self.has(role, layer))}"


class _Memory(dict[str, Tensor]):
    """The tensors of a model in memory, on the CPU, read as those of a `Checkpoint` are."""

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        return iter(self[name].flatten().split(size))

    def rows(self, name: str, ids: Sequence[int]) -> Tensor:
        return self[name][list(ids)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn an error about a number that is not finite into a reason why a method does not apply."""
    try:
        yield
    except NotFiniteError as error:
        raise Refusal(str(error)) from error


def _role_in_a_block(name: str) -> str:
    """Of a parameter of a layer of our models."""
    norms = {"input_layernorm.weight": "norm1", "post_attention_layernorm.weight": "norm2"}
    return norms.get(name) or slot_of(name)[0].removeprefix("expert_")


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
        found = (describe_file(where) if isinstance(where, Path) else "") or "something else"
        raise CheckpointError(f"{where}: wanted a vocabulary, found {found} ({error})") from error
