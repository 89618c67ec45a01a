"""What a model's routers do to a text, recorded: `with record_routing(model) as trace: ...`.

A recording takes down what the experts of each sparse layer were *given*. So a trace holds what was dispatched: the
router's choice, best first, after any capacity. On disk a trace is one safetensors file.

Shapes: B batch, S sequence, L sparse layers, N tokens, E experts, K slots per token (K = E under expert choice).
"""

import hashlib
import inspect
import io
import json
import tempfile
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minimoe.atomic import replace_atomically

FORMAT, VERSION = "minimoe routing trace", "1"
DTYPES = {"weights": np.float32, "indices": np.int16, "domains": np.int16}  # the arrays of a trace
DTYPES |= dict.fromkeys(("token_ids", "documents", "positions"), np.int32)
ROUTED = ("weights", "indices")  # [L, N, K], the others are [N]


class TraceError(ValueError):
    """A trace is not what it should be; the message says what was found and what was wanted."""


@dataclass(eq=False, repr=False)
class RoutingTrace:
    """Where every token of some text went, in every sparse layer of one model.

    A trace that was loaded lies on disk, mapped into memory: what nobody looks at is not read.
    Raises TraceError: an array is empty, or of another type or shape.
    """

    indices: np.ndarray  # [L, N, K] int16, the experts a token was dispatched to; E in an empty slot
    weights: np.ndarray  # [L, N, K] float32, what their outputs were multiplied by; 0 in an empty slot
    token_ids: np.ndarray  # [N] int32
    domains: np.ndarray  # [N] int16, index into `domain_names`; -1 where unlabelled
    documents: np.ndarray  # [N] int32, the document a token belongs to
    positions: np.ndarray  # [N] int32, a token's place within its sequence
    domain_names: tuple[str, ...]
    layers: tuple[int, ...]  # the numbers of the sparse layers within the model
    num_experts: int  # E
    model_id: str  # what `model_id(model)` returned

    def __post_init__(self) -> None:
        shape = self.indices.shape
        if len(shape) != 3 or 0 in shape:
            raise TraceError(f"indices: found shape {shape}, wanted [layers, tokens, slots], none of them 0")
        for name, array in self._arrays().items():
            shape = (len(self.layers), len(self), self.k) if name in ROUTED else (len(self),)
            if (array.dtype, array.shape) != (DTYPES[name], shape):
                raise TraceError(f"{name}: found {array.dtype} {array.shape}, wanted {np.dtype(DTYPES[name])} {shape}")

    def __len__(self) -> int:
        return self.indices.shape[1]

    def __repr__(self) -> str:
        size = f"{len(self):,} tokens, {self.num_layers} layers, {self.k} of {self.num_experts} experts"
        return f"<RoutingTrace of {size}; domains: {', '.join(self.domain_names) or 'none'}>"

    @property
    def num_layers(self) -> int:
        """L, which counts sparse layers only."""
        return self.indices.shape[0]

    @property
    def k(self) -> int:
        """K: slots per token, some of which may be empty."""
        return self.indices.shape[2]

    def select(self, tokens: np.ndarray | str) -> "RoutingTrace":
        """The trace of some of the tokens, given as a boolean mask [N] or by the name of a domain, in memory.

        Raises TraceError where no token is left, or there is no such domain.
        """
        if isinstance(tokens, str):
            if tokens not in self.domain_names:
                raise TraceError(f"the trace has no domain {tokens!r}: wanted one of {self.domain_names}")
            tokens = self.domains == self.domain_names.index(tokens)
        arrays = {name: array[:, tokens] if name in ROUTED else array[tokens] for name, array in self._arrays().items()}
        return RoutingTrace(**arrays, **self._facts())

    def save(self, path: str | Path) -> None:
        """Write the trace to one file. If this fails, an older file at `path` is as it was."""
        tensors = {  # of what is mapped from a file nothing is read into memory
            name: torch.from_numpy(np.require(array, requirements="CW")) for name, array in self._arrays().items()
        }
        with replace_atomically(path) as temporary:
            save_file(tensors, temporary, {"format": FORMAT, "version": VERSION, "facts": json.dumps(self._facts())})

    @staticmethod
    def load(path: str | Path) -> "RoutingTrace":
        """Map a file that `save` or `record_routing(model, path)` wrote.

        Raises FileNotFoundError, or TraceError for a file that is cut short, is no trace, or is of another version.
        """
        try:
            with safe_open(path, framework="pt") as file:  # safetensors itself checks that the file is whole
                metadata = file.metadata() or {}
                found = metadata.get("format"), metadata.get("version")
                if found != (FORMAT, VERSION):
                    raise TraceError(f"{path}: found format and version {found}, wanted {(FORMAT, VERSION)}")
                arrays = {name: file.get_tensor(name).numpy() for name in DTYPES}
        except SafetensorError as error:
            size = Path(path).stat().st_size
            raise TraceError(f"{path}: these {size} bytes are not a whole routing trace ({error})") from error
        facts = json.loads(metadata["facts"])
        return RoutingTrace(**arrays, **facts | {name: tuple(facts[name]) for name in ("domain_names", "layers")})

    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in DTYPES}

    def _facts(self) -> dict[str, Any]:
        """Everything that is not an array."""
        return {name: getattr(self, name) for name in ("domain_names", "layers", "num_experts", "model_id")}


@contextmanager
def record_routing(model: nn.Module, path: str | Path | None = None) -> Iterator["Recording"]:
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
        recording = Recording.__new__(Recording)  # which has the fields of a trace at the end of the block
        recording._sequences = _Sequences()
        recorder = _Recorder(model, None if path is None else Path(path), recording._sequences, stack)
        yield recording
        vars(recording).update(vars(recorder.finish()))


class Recording(RoutingTrace):
    """A RoutingTrace that can be read once its block has ended; `label` says what comes next in it."""

    def __getattr__(self, name: str) -> Any:
        """Reached only by what is not there, such as the fields of the trace while it is being recorded."""
        condition = "once its `with record_routing(...)` block has ended without an error"
        raise AttributeError(f"{name}: a trace has its fields {condition}")

    def label(self, domains: str | Sequence[str | None] | None, *, documents: Sequence[Hashable] | None = None) -> None:
        """Say what the following forwards are about. It holds until the next call.

        Args:
            domains: of every row of the batch, or of each of its rows; None: unlabelled.
            documents: a key for each row of the batch. Rows with one key are one document, in this forward and in
                others: for long documents that come in pieces. None: each row is a document.
        """
        self._sequences.domains = domains if domains is None or isinstance(domains, str) else list(domains)
        self._sequences.keys = None if documents is None else list(documents)


class _Recorder:
    """The hooks on a model that take down what its experts are given."""

    def __init__(self, model: nn.Module, path: Path | None, sequences: "_Sequences", stack: ExitStack) -> None:
        self._experts = _find_experts(model)
        self._model, self._model_id = model, model_id(model)
        self._path, self._sequences = path, sequences
        self._stack = stack
        self._scratch = stack.enter_context(_open_scratch(path))  # a record for each token
        self._record_type: np.dtype | None = None
        self._dispatched: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # of the forward that is running, by layer
        stack.enter_context(model.register_forward_pre_hook(self._begin, with_kwargs=True))
        for layer, experts in self._experts.items():
            stack.enter_context(experts.register_forward_pre_hook(partial(self._dispatch, layer)))
        stack.enter_context(model.register_forward_hook(self._end))

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
        self._dispatched[layer] = indices.int().cpu().numpy(), weights.detach().float().cpu().numpy()

    def _end(self, model: nn.Module, args: tuple, output: Any) -> None:
        found = {layer: len(self._dispatched[layer][0]) for layer in self._experts if layer in self._dispatched}
        wanted = dict.fromkeys(self._experts, self._input_ids.numel())
        if found != wanted:
            raise TraceError(f"tokens given to the experts of each layer: {found}, but the batch has {wanted}")
        layers = [self._dispatched[layer] for layer in self._experts]
        indices, weights = (np.stack(arrays, axis=1) for arrays in zip(*layers, strict=True))
        columns = {"indices": indices, "weights": weights, "token_ids": self._input_ids.cpu().flatten().numpy()}
        columns |= self._sequences.place(self._kept, self._cached)  # [B * S, ...] each
        self._record_type = np.dtype([(name, dtype, columns[name].shape[1:]) for name, dtype in DTYPES.items()])
        records = np.empty(len(indices), self._record_type)
        for name, column in columns.items():
            records[name] = column
        self._scratch.write(records[self._kept.flatten()].data)

    def finish(self) -> RoutingTrace:
        """The trace: in memory, or written to its file and mapped from there."""
        if model_id(self._model) != self._model_id:
            raise TraceError("the weights of the model changed during the recording: a trace belongs to one model")
        if self._record_type is None or not self._scratch.tell():
            raise TraceError("the model was not called in the block; a call of a part of it does not count")
        arrays = self._arrays_by_layer()
        self._scratch.close()  # gives back its space
        trace = RoutingTrace(
            **arrays,
            domain_names=tuple(self._sequences.domain_names),
            layers=tuple(self._experts),
            num_experts=len(next(iter(self._experts.values())).down_proj),
            model_id=self._model_id,
        )
        if self._path is None:
            return trace
        trace.save(self._path)
        return RoutingTrace.load(self._path)

    def _arrays_by_layer(self) -> dict[str, np.ndarray]:
        """The arrays of the trace, in memory or mapped from files without a name."""
        if self._path is None:
            records = np.frombuffer(self._scratch.getbuffer(), self._record_type)
        else:
            self._scratch.flush()
            records = np.memmap(self._scratch, self._record_type, "r")
        arrays = {}
        for name, dtype in DTYPES.items():
            column = records[name].swapaxes(0, 1) if name in ROUTED else records[name]  # [N, L, K] -> [L, N, K]
            if self._path is None:
                arrays[name] = np.empty(column.shape, dtype)
            else:
                file = self._stack.enter_context(_open_scratch(self._path))
                arrays[name] = np.memmap(file, dtype, "w+", shape=column.shape)
            arrays[name][...] = column
        return arrays


def _open_scratch(path: Path | None) -> BinaryIO:
    """A file in memory, or one on the disk of `path`, without a name: it is gone when the process is."""
    if path is None:
        return io.BytesIO()
    if path.is_dir():
        raise IsADirectoryError(f"{path}: found a folder, wanted the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=path.parent)


class _Sequences:
    """Which domain, document and position each token has."""

    def __init__(self) -> None:
        self.domains: str | list[str | None] | None = None  # of the next forward
        self.keys: list[Hashable] | None = None  # of its documents
        self.domain_names: dict[str, int] = {}  # each with its number
        self._documents: dict[Hashable, int] = {}  # the number of each key
        self._rows: list[int] = []  # the documents of the last forward
        self._lengths: np.ndarray  # of its rows so far
        self._columns = 0  # how long a cache of them is; padding counts

    def place(self, kept: np.ndarray, cached: int) -> dict[str, np.ndarray]:
        """The labels of a forward, [B * S] each; `kept` [B, S] is False for padding, `cached` what its cache holds."""
        rows, length = kept.shape
        if not cached:
            keys = [object() for _ in range(rows)] if self.keys is None else self.keys
            _check_rows("documents", keys, rows)
            self._rows = [self._documents.setdefault(key, len(self._documents)) for key in keys]
            self._lengths, self._columns = np.zeros(rows, int), 0
        elif (rows, cached) != (len(self._rows), self._columns):
            last = f"the last forward that was recorded ended with {len(self._rows)} rows of {self._columns}"
            found = f"the cache holds {rows} rows of {cached} tokens, but {last}"
            raise ValueError(f"{found}: record a text from its beginning")
        domains = self.domains if isinstance(self.domains, list) else [self.domains] * rows
        _check_rows("domains", domains, rows)
        known = self.domain_names
        numbers = [-1 if name is None else known.setdefault(name, len(known)) for name in domains]
        positions = self._lengths[:, None] + kept.cumsum(1) - 1
        self._lengths, self._columns = positions[:, -1] + 1, self._columns + length
        of_rows = {"domains": numbers, "documents": self._rows}
        columns = {name: np.repeat(values, length) for name, values in of_rows.items()}
        return columns | {"positions": positions.flatten()}


def _check_rows(name: str, values: Sequence[Any], rows: int) -> None:
    if len(values) != rows:
        raise ValueError(f"label(...) was given {len(values)} {name}: wanted {rows}, one for each row of the batch")


# --- the model, seen from outside ---------------------------------------------------------------------------

# What makes a router act differently with the same weights, by the names that the families give it.
ROUTER_SETTINGS = (
    *("router", "num_experts", "num_local_experts", "num_experts_per_tok", "score_func", "norm_topk_prob"),
    *("n_group", "topk_group", "routed_scaling_factor", "capacity_factor"),
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
        lack = f"{type(model).__name__} has no layer with a `gate` and fused `experts`"
        raise ValueError(f"{lack}: wanted a mixture of experts")
    return found


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
