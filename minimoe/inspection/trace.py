"""What a model's routers do to a text, recorded: `with record_routing(model) as trace: ...`.

A recording takes down what the experts of each sparse layer were *given*. So a trace holds what was dispatched: the
router's choice, best first, after any capacity. On disk a trace is one safetensors file.

Shapes: B batch, S sequence, L sparse layers, N tokens, E experts, K slots per token (K = E under expert choice).
"""

from __future__ import annotations

import hashlib
import inspect
import io
import itertools
import json
import tempfile
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minimoe.atomic import open_atomically

FORMAT, VERSION = "minimoe routing trace", "1"
# The arrays of a trace, in the order they have in its file: the widest first, which aligns all of them.
DTYPES = {
    "weights": np.float32,
    "token_ids": np.int32,
    "documents": np.int32,
    "positions": np.int32,
    "indices": np.int16,
    "domains": np.int16,
}
ROUTED = ("weights", "indices")  # [L, N, K], the others are [N]


class TraceError(ValueError):
    """A trace is not what it should be; the message says what was found and what was wanted."""


@dataclass(eq=False, repr=False)
class RoutingTrace:
    """Where every token of some text went, in every sparse layer of one model.

    A trace that was loaded lies on disk, mapped into memory: what nobody looks at is not read.

    Args:
        indices: [L, N, K] int16, the experts a token was dispatched to; an empty slot has index `num_experts`.
        weights: [L, N, K] float32, what their outputs were multiplied by; 0 in an empty slot.
        token_ids: [N] int32.
        domains: [N] int16, index into `domain_names`; -1 where unlabelled.
        documents: [N] int32, the document a token belongs to.
        positions: [N] int32, a token's place within its sequence.
        domain_names: what `domains` points to.
        layers: the numbers of the sparse layers within the model.
        num_experts: E.
        model_id: what `model_id(model)` returned.

    Raises:
        TraceError: an array is empty, or of another type or shape.
    """

    indices: np.ndarray
    weights: np.ndarray
    token_ids: np.ndarray
    domains: np.ndarray
    documents: np.ndarray
    positions: np.ndarray
    domain_names: tuple[str, ...]
    layers: tuple[int, ...]
    num_experts: int
    model_id: str

    def __post_init__(self) -> None:
        if self.indices.ndim != 3 or self.indices.size == 0:
            raise TraceError(
                f"indices: found shape {self.indices.shape}, wanted [layers, tokens, slots], none of them 0"
            )
        shapes = _shapes(len(self.layers), len(self), self.k)
        for name, array in self._arrays().items():
            if (array.dtype, array.shape) != (DTYPES[name], shapes[name]):
                wanted = f"{np.dtype(DTYPES[name])} {shapes[name]}"
                raise TraceError(f"{name}: found {array.dtype} {array.shape}, wanted {wanted}")

    def __len__(self) -> int:
        return self.indices.shape[1]

    def __repr__(self) -> str:
        return (
            f"<RoutingTrace of {len(self):,} tokens, {self.num_layers} layers, {self.k} of {self.num_experts} experts; "
            f"domains: {', '.join(self.domain_names) or 'none'}>"
        )

    @property
    def num_layers(self) -> int:
        """L, which counts sparse layers only."""
        return self.indices.shape[0]

    @property
    def k(self) -> int:
        """K: slots per token, some of which may be empty."""
        return self.indices.shape[2]

    def select(self, tokens: np.ndarray | str) -> RoutingTrace:
        """The trace of some of the tokens, in memory.

        Args:
            tokens: a boolean mask [N], or the name of a domain.

        Raises:
            TraceError: no token is left, or there is no such domain.
        """
        if isinstance(tokens, str):
            if tokens not in self.domain_names:
                raise TraceError(f"found no domain {tokens!r}, wanted one of {self.domain_names}")
            tokens = self.domains == self.domain_names.index(tokens)
        arrays = {name: array[:, tokens] if name in ROUTED else array[tokens] for name, array in self._arrays().items()}
        return RoutingTrace(**arrays, **self._facts())

    @staticmethod
    def merge(traces: Sequence[RoutingTrace]) -> RoutingTrace:
        """Traces of one model, one after the other, in memory. Documents of different traces stay different.

        Raises:
            TraceError: there are no traces, or they are of different models.
        """
        if not traces:
            raise TraceError("traces: found none, wanted at least one")
        first = traces[0]
        for number, trace in enumerate(traces):
            for name in ("num_experts", "k", "layers", "model_id"):
                found, wanted = getattr(trace, name), getattr(first, name)
                if found != wanted:
                    raise TraceError(f"traces[{number}]: found {name}={found!r}, wanted {wanted!r} as in traces[0]")
        domain_names = tuple(dict.fromkeys(name for trace in traces for name in trace.domain_names))
        starts = np.cumsum([0] + [1 + trace.documents.max() for trace in traces[:-1]], dtype=np.int32)
        parts = {name: [getattr(trace, name) for trace in traces] for name in DTYPES}
        parts["domains"] = [_renumber(trace, domain_names) for trace in traces]
        parts["documents"] = [trace.documents + start for trace, start in zip(traces, starts, strict=True)]
        arrays = {name: np.concatenate(arrays, axis=1 if name in ROUTED else 0) for name, arrays in parts.items()}
        return RoutingTrace(**arrays, **first._facts() | {"domain_names": domain_names})

    def check_model(self, model: nn.Module) -> None:
        """Raises TraceError unless this is a trace of `model` as it is now."""
        found = model_id(model)
        if found != self.model_id:
            raise TraceError(f"the trace is of another model: found model_id={found!r}, wanted {self.model_id!r}")

    def save(self, path: str | Path) -> None:
        """Write the trace to one file. If this fails, an older file at `path` is as it was."""
        shapes = _shapes(self.num_layers, len(self), self.k)
        pieces = (np.ascontiguousarray(array).data for array in self._arrays().values())
        _write(Path(path), shapes, pieces, self._facts())

    @staticmethod
    def load(path: str | Path) -> RoutingTrace:
        """Map a file that `save` or `record_routing(model, path)` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            TraceError: the file is cut short, is no trace, or is of another version.
        """
        path = Path(path)
        try:
            with safe_open(path, framework="np") as file:  # safetensors itself checks that the file is whole
                metadata = file.metadata() or {}
        except SafetensorError as error:
            size = path.stat().st_size
            raise TraceError(f"{path}: found {size} bytes, wanted a whole routing trace ({error})") from error
        found = metadata.get("format"), metadata.get("version")
        if found != (FORMAT, VERSION):
            raise TraceError(f"{path}: found format and version {found}, wanted {(FORMAT, VERSION)}")
        facts = json.loads(metadata["facts"])
        facts |= {name: tuple(facts[name]) for name in ("domain_names", "layers")}
        return RoutingTrace(**_map_arrays(path), **facts)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in DTYPES}

    def _facts(self) -> dict[str, Any]:
        """Everything that is not an array."""
        return {name: getattr(self, name) for name in ("domain_names", "layers", "num_experts", "model_id")}


def _shapes(layers: int, tokens: int, k: int) -> dict[str, tuple[int, ...]]:
    return {name: (layers, tokens, k) if name in ROUTED else (tokens,) for name in DTYPES}


def _renumber(trace: RoutingTrace, domain_names: Sequence[str]) -> np.ndarray:
    """The domains of a trace as indices into a longer list of names."""
    numbers = [domain_names.index(name) for name in trace.domain_names]
    return np.array([*numbers, -1], np.int16)[trace.domains]  # -1, unlabelled, finds the last


# --- recording ----------------------------------------------------------------------------------------------


@contextmanager
def record_routing(model: nn.Module, path: str | Path | None = None) -> Iterator[Recording]:
    """Record where every token goes in every forward of `model` within the block.

        with record_routing(model) as trace:
            trace.label("code")
            model(input_ids)
        trace.indices  # can be read now that the block has ended

    Each row of a batch is a document, unless `label` says otherwise or the forward brings a cache: it then continues
    the rows of the last forward, so that generate() makes one document a row. (Without a cache generate() runs the
    whole text anew for every token, and all of it is recorded. A beam search would mix up the documents, as it moves
    rows about.) What an `attention_mask` hides is padding, and left out.

    The model computes what it would compute anyway, bit for bit. In training mode that includes the router's noise.
    Blocks may be nested; each records the forwards within it.

    A recording is whole or not there: when the block ends in an exception or the process is killed, nothing is kept,
    and an older file at `path` is as it was.

    Args:
        model: a `MoEForCausalLM`, or a Mixtral, Qwen2-MoE, Qwen3-MoE or OLMoE of transformers: any module called with
            `input_ids` [B, S] whose sparse layers have a `gate` and call `experts(hidden_states, indices, weights)`.
        path: record to disk and, at the end, map this file. Memory then holds one forward at a time; while the block
            ends, the disk holds the trace twice. None: keep the trace in memory.

    Raises:
        ValueError: the model has no such layer, is called without `input_ids`, or with a cache of text that was not
            recorded; labels do not fit the batch.
        TraceError: when the block ends, as nothing was recorded, or the model's weights changed within it.
    """
    with ExitStack() as stack:
        recording = Recording(model, None if path is None else Path(path), stack)
        yield recording
        recording._finish()


class Recording(RoutingTrace):
    """A RoutingTrace in the making; `label` says what comes next."""

    def __init__(self, model: nn.Module, path: Path | None, stack: ExitStack) -> None:
        self._experts = _find_experts(model)
        self._model, self._model_id = model, model_id(model)
        self._sequences = _Sequences()
        self._store = _Store(path, len(self._experts), stack)
        self._dispatched: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of the forward that is running, by layer
        hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            *(experts.register_forward_pre_hook(partial(self._dispatch, n)) for n, experts in self._experts.items()),
            model.register_forward_hook(self._end),
        ]
        for hook in hooks:
            stack.callback(hook.remove)

    def __getattr__(self, name: str) -> Any:
        """Reached only by what is not there: the arrays, until `_finish`."""
        raise AttributeError(
            f"{name}: a trace can be read once its `with record_routing(...)` block ended without error"
        )

    def label(self, domains: str | Sequence[str | None] | None, *, documents: Sequence[Hashable] | None = None) -> None:
        """Say what the following forwards are about. It holds until the next call.

        Args:
            domains: of every row of the batch, or of each of its rows; None: unlabelled.
            documents: a key for each row of the batch. Rows with one key are one document, in this forward and in
                others: for long documents that come in pieces. None: each row is a document.
        """
        self._sequences.label(domains, documents)

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        if call.get("input_ids") is None:
            raise ValueError("input_ids=None: wanted the token ids, which a trace keeps")
        self._input_ids = call["input_ids"]
        self._kept = _not_padding(self._input_ids, call.get("attention_mask"))
        self._cached = _cached_tokens(call.get("cache", call.get("past_key_values")))  # before the model adds to it
        self._dispatched = {}

    def _dispatch(self, layer: int, experts: nn.Module, args: tuple[Tensor, ...]) -> None:
        _, indices, weights = args
        self._dispatched[layer] = _numpy(indices, "indices"), _numpy(weights, "weights")

    def _end(self, model: nn.Module, args: tuple, output: Any) -> None:
        found = {layer: len(self._dispatched[layer][0]) for layer in self._experts if layer in self._dispatched}
        wanted = dict.fromkeys(self._experts, self._input_ids.numel())
        if found != wanted:
            raise TraceError(f"tokens given to the experts of each layer: found {found}, wanted {wanted}")
        indices, weights = zip(*(self._dispatched[layer] for layer in self._experts), strict=True)
        arrays = {"indices": indices, "weights": weights, "token_ids": [_numpy(self._input_ids, "token_ids").flatten()]}
        arrays |= {name: [array] for name, array in self._sequences.place(self._kept, self._cached).items()}
        self._store.append(arrays, self._kept.flatten())

    def _finish(self) -> None:
        """Become a RoutingTrace like any other."""
        if model_id(self._model) != self._model_id:
            raise TraceError("found weights that changed during the recording, wanted one model to a trace")
        trace = self._store.finish(
            {
                "domain_names": tuple(self._sequences.domain_names),
                "layers": tuple(self._experts),
                "num_experts": _num_experts(self._experts),
                "model_id": self._model_id,
            }
        )
        self.__dict__, self.__class__ = vars(trace), RoutingTrace


class _Sequences:
    """Which domain, document and position each token has."""

    def __init__(self) -> None:
        self.domain_names: list[str] = []
        self._domains: str | list[str | None] | None = None
        self._keys: list[Hashable] | None = None
        self._numbers: Iterator[int] = itertools.count()  # of documents
        self._number_of: dict[Hashable, int] = {}
        self._documents: list[int] = []  # of the rows of the last forward
        self._lengths = np.zeros(0, int)  # of its rows so far
        self._columns = 0  # how long a cache of them is; padding counts

    def label(self, domains: str | Sequence[str | None] | None, documents: Sequence[Hashable] | None) -> None:
        self._domains = domains if domains is None or isinstance(domains, str) else list(domains)
        self._keys = None if documents is None else list(documents)

    def place(self, kept: np.ndarray, cached: int) -> dict[str, np.ndarray]:
        """The labels, [B * S] each, of a forward.

        Args:
            kept: [B, S], False for padding.
            cached: how many tokens the forward found in its cache.
        """
        rows, length = kept.shape
        if not cached:
            self._documents, self._lengths, self._columns = self._number_documents(rows), np.zeros(rows, int), 0
        elif (rows, cached) != (len(self._documents), self._columns):
            raise ValueError(
                f"cache: found {rows} rows of {cached} tokens, wanted {len(self._documents)} of {self._columns} to "
                "continue the last forward; record a text from its beginning"
            )
        positions = self._lengths[:, None] + kept.cumsum(1) - 1
        self._lengths, self._columns = positions[:, -1] + 1, self._columns + length
        return {
            "domains": np.repeat(self._number_domains(rows), length),
            "documents": np.repeat(self._documents, length),
            "positions": positions.flatten(),
        }

    def _number_domains(self, rows: int) -> list[int]:
        domains = self._domains if isinstance(self._domains, list) else [self._domains] * rows
        _check_rows("domains", domains, rows)
        for name in domains:
            if name is not None and name not in self.domain_names:
                self.domain_names.append(name)
        return [-1 if name is None else self.domain_names.index(name) for name in domains]

    def _number_documents(self, rows: int) -> list[int]:
        if self._keys is None:
            return [next(self._numbers) for _ in range(rows)]
        _check_rows("documents", self._keys, rows)
        for key in self._keys:
            if key not in self._number_of:
                self._number_of[key] = next(self._numbers)
        return [self._number_of[key] for key in self._keys]


class _Store:
    """The arrays of a trace while they grow: a scratch file for each, and for each layer where they have layers."""

    def __init__(self, path: Path | None, layers: int, stack: ExitStack) -> None:
        if path is not None:
            if path.is_dir():
                raise IsADirectoryError(f"{path}: found a folder, wanted the name of a file")
            path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._files: dict[str, list[BinaryIO]] = {
            name: [stack.enter_context(_scratch(path)) for _ in range(layers if name in ROUTED else 1)]
            for name in DTYPES
        }
        self._layers, self._tokens, self._k = layers, 0, 0

    def append(self, arrays: dict[str, Sequence[np.ndarray]], kept: np.ndarray) -> None:
        """Add one array to each file.

        Args:
            arrays: one for each file of that name, of the same tokens.
            kept: which of these to add.
        """
        self._tokens += int(kept.sum())
        self._k = arrays["indices"][0].shape[1]
        for name, files in self._files.items():
            for file, array in zip(files, arrays[name], strict=True):
                file.write(array[kept].astype(DTYPES[name], copy=False).data)

    def finish(self, facts: dict[str, Any]) -> RoutingTrace:
        """All that was appended, in memory or on disk."""
        if not self._tokens:
            raise TraceError("found no forward of the model in the block, wanted at least one (of the whole model)")
        shapes = _shapes(self._layers, self._tokens, self._k)
        if self._path is not None:
            pieces = (piece for files in self._files.values() for file in files for piece in _read_through(file))
            _write(self._path, shapes, pieces, facts)
            return RoutingTrace.load(self._path)
        arrays = {
            name: np.concatenate([np.frombuffer(file.getbuffer(), DTYPES[name]) for file in files])
            for name, files in self._files.items()
        }
        return RoutingTrace(**{name: array.reshape(shapes[name]) for name, array in arrays.items()}, **facts)


def _scratch(path: Path | None) -> BinaryIO:
    """A file in memory, or one on the disk of `path`, without a name: it is gone when the process is."""
    return io.BytesIO() if path is None else tempfile.TemporaryFile(dir=path.parent)


def _read_through(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    return iter(lambda: file.read(2**18), b"")


def _check_rows(name: str, values: Sequence[Any], rows: int) -> None:
    if len(values) != rows:
        raise ValueError(f"label(...): found {len(values)} {name}, wanted {rows}, one for each row of the batch")


# --- the model, seen from outside ---------------------------------------------------------------------------

# What makes a router act differently with the same weights, by the names that the families give it.
ROUTER_SETTINGS = (
    "router",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "score_func",
    "norm_topk_prob",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "capacity_factor",
)


def model_id(model: nn.Module) -> str:
    """What two traces of the same model have in common: a sha256 of its router's settings and of all its weights.

    Of each tensor it takes at most 2^17 values, evenly spread: enough that a model that was trained further has
    another id, and little enough for a model of any size.
    """
    settings = {name: getattr(model.config, name, None) for name in ROUTER_SETTINGS}
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        step = tensor.numel() // 2**16 | 1  # odd, to fall on every column of the usual matrix
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().flatten()[::step].cpu().double().numpy().tobytes())
    return digest.hexdigest()


def _find_experts(model: nn.Module) -> dict[int, nn.Module]:
    """The experts of each sparse layer, by the number of the layer."""
    found = {}
    for name, module in model.named_modules():
        numbers = [int(part) for part in name.split(".") if part.isdigit()]
        if numbers and hasattr(module, "gate") and hasattr(getattr(module, "experts", None), "down_proj"):
            found[numbers[0]] = module.experts
    if not found:
        raise ValueError(
            f"{type(model).__name__}: found no layer with a `gate` and fused `experts`, wanted a sparse model"
        )
    return found


def _num_experts(experts: dict[int, nn.Module]) -> int:
    return len(next(iter(experts.values())).down_proj)


def _not_padding(input_ids: Tensor, attention_mask: Tensor | None) -> np.ndarray:
    """[B, S]: False where `attention_mask` [B, cached + S] is 0."""
    if attention_mask is None:
        return np.ones(input_ids.shape, bool)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        found = tuple(getattr(attention_mask, "shape", ())) or type(attention_mask).__name__
        raise ValueError(f"attention_mask: found {found}, wanted [batch, sequence], from which to tell the padding")
    return (attention_mask[:, -input_ids.shape[1] :] != 0).cpu().numpy()


def _cached_tokens(cache: Any) -> int:
    """How many tokens a cache holds, ours or that of transformers."""
    if cache is None:
        return 0
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else cache[0][0].shape[2]


def _numpy(tensor: Tensor, name: str) -> np.ndarray:
    return tensor.detach().to(torch.float32 if name == "weights" else torch.int32).cpu().numpy()


# --- the file -----------------------------------------------------------------------------------------------

_SAFETENSORS_NAMES = {np.float32: "F32", np.int32: "I32", np.int16: "I16"}


def _write(path: Path, shapes: dict[str, tuple[int, ...]], pieces: Iterable[bytes], facts: dict[str, Any]) -> None:
    """Put a trace at `path`, whole or not at all.

    Args:
        path: of the file.
        shapes: of the arrays.
        pieces: their bytes, in the order of `DTYPES`.
        facts: all the rest.
    """
    with open_atomically(path) as file:
        file.write(_header(shapes, facts))
        for piece in pieces:
            file.write(piece)


def _header(shapes: dict[str, tuple[int, ...]], facts: dict[str, Any]) -> bytes:
    """The first bytes of a safetensors file: the length of what follows, then JSON."""
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": VERSION, "facts": json.dumps(facts)}}
    end = 0
    for name, dtype in DTYPES.items():
        start, end = end, end + int(np.prod(shapes[name])) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": shapes[name], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format asks that data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _map_arrays(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.asarray(np.memmap(path, np.uint8, "r", offset=8 + length))  # a plain array, still lying on disk
    return {
        name: data[slice(*header[name]["data_offsets"])].view(dtype).reshape(header[name]["shape"])
        for name, dtype in DTYPES.items()
    }
