"""Checkpoint folders in the Hugging Face layout: config.json beside one or several safetensors files.

Reading is lazy: opening a folder reads configuration and headers, one tensor costs one tensor's memory. Nothing that a
checkpoint holds is ever executed. formats.py reads what is stored in few bits; saving.py writes such folders.
"""

import filecmp
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, reduce
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from minimoe.model.config import MoEConfig, require
from minimoe.model.families import OTHERWISE, find_family, read_config
from minimoe.model.formats import Readable, find_quantised, without_quantisation
from minimoe.model.layout import tensors_on_disk
from minimoe.model.stored import (
    DTYPES,
    PICKLE,
    CheckpointError,
    NotFiniteError,
    Stored,
    describe_file,
    read_header,
    read_json,
    sha256_of_file,
)

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"  # of PEFT, see adapter.py

_ROTARY_BUFFER = "rotary_emb.inv_freq"  # stored in files before 2023, and computed anyway
# Of a layer that predicts a token further on (DeepSeek-V3: arXiv 2412.19437, section 2.2), which is not run here.
_MULTI_TOKEN = "eh_proj.weight"
KEPT_IN_FLOAT32 = "e_score_correction_bias"  # tensors whose names end so stay in float32 or wider (see moe.Router)
_PIECE = 2**20  # numbers of two tensors that are compared at once
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_WEIGHTS = (".safetensors", ".gguf", "pytorch_model.bin")

# What a configuration says of one side of a matrix: the fields whose product it is, the matrix, 0 for rows and 1 for
# columns. `sparse` and `dense` stand for the first layer of the kind.
_SIDES: tuple[tuple[tuple[str, ...], str, int], ...] = (
    (("vocab_size",), "model.embed_tokens.weight", 0),
    (("hidden_size",), "model.embed_tokens.weight", 1),
    (("num_attention_heads", "head_dim"), "model.layers.0.self_attn.q_proj.weight", 0),
    (("num_key_value_heads", "head_dim"), "model.layers.0.self_attn.k_proj.weight", 0),
    (("num_attention_heads", "head_dim"), "model.layers.0.self_attn.q_b_proj.weight", 0),
    (("q_lora_rank",), "model.layers.0.self_attn.q_b_proj.weight", 1),
    (("kv_lora_rank",), "model.layers.0.self_attn.kv_b_proj.weight", 1),
    (("intermediate_size",), "model.layers.{dense}.mlp.gate_proj.weight", 0),
    (("num_experts",), "model.layers.{sparse}.mlp.experts.down_proj", 0),  # in one tensor, as of gpt-oss
    (("moe_intermediate_size",), "model.layers.{sparse}.mlp.experts.down_proj", 1),
    (("moe_intermediate_size",), "model.layers.{sparse}.mlp.experts.0.gate_proj.weight", 0),
    (("shared_expert_intermediate_size",), "model.layers.{sparse}.mlp.shared_expert.gate_proj.weight", 0),
)


class Checkpoint:
    """A folder with config.json and safetensors files, read piece by piece.

    Iterating gives the names of the tensors on disk, `checkpoint[name]` reads one of them. What is stored in few bits
    with scales beside it is one tensor, read in float32; what is stored in a format that is not read has a name, and is
    refused when it is asked for. No file stays open.

    hf_config: the content of config.json, without the quantization_config of a format that is read.

    Args:
        path: the folder; or a safetensors file that holds a whole model, beside its config.json.

    Raises CheckpointError: a file is missing, damaged or a pickle; shards and index disagree; the file is one of
    several. Where a file or the folder is something else, an adapter or a Git LFS pointer for one, the message says so.
    """

    bytes_read = 0  # of tensors, so far
    bytes_moved: int | None = None  # over a network, so far

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        file = path if path.suffix == ".safetensors" and path.is_file() else None
        self.path = path.parent if file else path  # the folder
        if not self.path.is_dir():
            found = (describe_file(self.path) or "a file") if self.path.is_file() else "nothing"
            raise CheckpointError(f"{self.path}: found {found}, wanted a folder with {CONFIG} and {SINGLE}")
        self._open(file.name if file else None)

    def _open(self, only: str | None) -> None:
        """Read the configuration and the headers: of the file named `only`, or of all files of the model."""
        self.config_file = self.path / CONFIG
        said = read_json(self._wanted(CONFIG))
        self.hf_config: dict[str, Any] = without_quantisation(said)
        stored = _open_file(self, only) if only else _open_tensors(self)
        self._set_tensors(find_quantised(stored, said), (tensor.file for tensor in stored.values()))
        self._is_one_file = only is not None

    def _set_tensors(self, tensors: dict[str, Readable], files: Iterable[Path]) -> None:
        self._stored, self._weight_files = tensors, sorted(set(files))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, in the dtype that its pieces have."""
        shape = self.shape(name)
        (whole,) = self.pieces(name, math.prod(shape))
        return whole.view(shape)

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        """Read one tensor in flat pieces of at most `size` numbers, in the dtype that `self[name]` has.

        All of them may lie in one buffer: each overwrites the one before.
        """
        yield from self._find(name).pieces(self._read, size)

    def rows(self, name: str, ids: Sequence[int]) -> Tensor:
        """Some rows of a matrix, in the order of `ids`.

        Where numbers are stored as they are, nothing else is read, and neighbours are read together.
        """
        stored = self._find(name)
        if not isinstance(stored, Stored):
            return self[name][list(ids)]
        place = {row: number for number, row in enumerate(sorted(set(ids)))}
        rows = torch.empty(len(place), stored.shape[-1], dtype=stored.number_type, device="cpu")
        memory = rows.view(torch.uint8).numpy()
        for _, run in groupby(place, lambda row: row - place[row]):
            first, *others = run
            wanted = memory[place[first] :][: 1 + len(others)]
            with self._open_at(stored.file, stored.start + first * memory.shape[1], wanted.nbytes) as file:
                self._fill(wanted, file, stored)
        return rows[[place[row] for row in ids]]

    def _read(self, stored: Stored, size: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """The bytes of a tensor, taken as `dtype`, in pieces that lie in one buffer.

        By hand: safetensors maps the file, and what was touched of it counts as memory of the process (393 MB more for
        a file of 400 MB, in as much time); to open it anew for each tensor would read a long header as often.
        """
        total = math.prod(stored.shape)
        buffer = torch.empty(min(size, total), dtype=dtype, device="cpu")
        with self._open_at(stored.file, stored.start, total * buffer.element_size()) as file:
            for start in range(0, max(total, 1), max(size, 1)):  # an empty tensor is one empty piece
                piece = buffer[: total - start]
                self._fill(piece.view(torch.uint8).numpy(), file, stored)
                yield piece

    def _fill(self, memory: np.ndarray, file: BinaryIO, stored: Stored) -> None:
        """Read the next bytes of a tensor."""
        found = file.readinto(memory)
        if found != memory.nbytes:
            raise CheckpointError(f"{file.name}: found {found} bytes of {stored.name}, wanted {memory.nbytes}")
        self.bytes_read += found

    @property
    def files(self) -> list[Path]:
        """The safetensors files that it reads, by name."""
        return self._weight_files

    @property
    def unread(self) -> list[str]:
        """Other files with weights in the folder, by name, which are not read; copies of what is read do not count."""
        if self._is_one_file:
            return []
        read = {file.name: file for file in self.files}
        others = [name for name in self._listing() if name.endswith(_WEIGHTS) and name not in read and "/" not in name]
        return sorted(name for name in others if not self._is_copy(name, read.values()))

    def hashes(self) -> list[str]:
        """The sha256 of each of these files."""
        return [sha256_of_file(file) for file in self.files]

    def beside(self, name: str) -> Path | None:
        """Where another file of the folder can be read, as tokenizer.json; None if there is none."""
        file = self.path / name
        return file if file.exists() else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from its header. A CheckpointError where it is in a format that is not read."""
        return self._find(name).shape

    @property
    def tokenizer_json(self) -> str | None:
        """The text of the tokenizer.json beside the weights; None if there is none.

        Raises CheckpointError: it is no text.
        """
        file = self.beside(TOKENIZER)
        try:
            return None if file is None else file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: wanted text in UTF-8, found something else ({error})") from error

    @cached_property
    def model_config(self) -> MoEConfig:
        """config.json, translated, its sizes checked against the headers of the tensors, its tie against the head.

        Raises CheckpointError: the model is of an unknown family, asks for what is not supported, or has other sizes
        than the tensors.
        """
        try:
            config = read_config(self._config_to_run())
            family = find_family(config.model_type)
            keys = {field: key for field, key in family.keys.items() if key not in OTHERWISE}
            check_sizes(self, config, family.on_disk, keys)
        except ValueError as error:
            raise CheckpointError(f"{self.config_file}: {error}") from error
        return replace(config, tie_word_embeddings=config.tie_word_embeddings and not self._has_own_head())

    def _has_own_head(self) -> bool:
        """Whether a head is stored that is not the embedding: then it is the head, as in transformers."""
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if not {head, embedding} <= self._stored.keys() or self.shape(head) != self.shape(embedding):
            return False
        pieces = zip(self.pieces(head, _PIECE), self.pieces(embedding, _PIECE), strict=True)
        return not all(torch.equal(*map(Tensor.double, pair)) for pair in pieces)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every stored tensor exactly, whatever config.json says.

        A selection bias does not count: it is kept in float32 beside weights in half precision.
        Raises CheckpointError: a tensor is in a format that is not read, integers for one.
        """
        apart = _ROTARY_BUFFER, KEPT_IN_FLOAT32
        used = {stored.number_type for name, stored in self._stored.items() if not name.endswith(apart)}
        return reduce(torch.promote_types, used)

    def _config_to_run(self) -> dict[str, Any]:
        """What `read_config` is to read. A ValueError where the model asks for what is not computed here."""
        return self.hf_config

    def _find(self, name: str) -> Readable:
        if name not in self._stored:
            raise CheckpointError(f"{self.path}: no tensor {name!r} among the {len(self)} it has")
        return self._stored[name]

    def _wanted(self, name: str) -> Path:
        file = self.beside(name)
        if file is None:
            found = _what_is_there(self._listing()) if name == CONFIG else ""
            raise CheckpointError(f"{self.path / name}: not found{found}")
        return file

    def _shard(self, name: str) -> Path:
        """The file that the index calls `name`."""
        return _inside(self.path, name)

    def _listing(self) -> list[str]:
        """The names in the folder, as far as they are known."""
        return [file.name for file in self.path.iterdir()]

    def _is_copy(self, name: str, files: Iterable[Path]) -> bool:
        """Whether a file of the folder is the same as one of `files`, byte by byte."""
        is_here = isinstance(self.path, Path)  # of what is on a server, bytes are not compared
        return is_here and any(filecmp.cmp(self.path / name, file, shallow=False) for file in files)

    def _open_at(self, path: Path, start: int, size: int) -> BinaryIO:
        """A file, to read `size` bytes from `start`."""
        file = path.open("rb")
        file.seek(start)
        return file


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    check_finite: bool = True,
) -> None:
    """Fill every parameter and buffer of `model` from `checkpoint`, one tensor in memory at a time.

    Args:
        model: built from `checkpoint.model_config`; on the meta device, as its own memory is not used.
        checkpoint: of any family; its experts may lie in separate tensors.
        dtype, device, check_finite: as for `MoEForCausalLM.from_pretrained`.

    Raises:
        CheckpointError: tensors are missing, unexpected or of the wrong shape; a weight is not finite, as it is stored
            or in `dtype`.
        ValueError: `dtype` is not a floating-point dtype.
    """
    family = find_family(checkpoint.model_config.model_type)
    dtype, device = dtype or checkpoint.dtype, device or "cpu"
    require(dtype in DTYPES.values(), "dtype", dtype, f"one of {', '.join(map(str, DTYPES.values()))}")
    _check_tensors(checkpoint, tensors_on_disk(model, family))
    wide = torch.promote_types(dtype, torch.float32)
    memory = {
        name: torch.empty(like.shape, dtype=wide if name.endswith(KEPT_IN_FLOAT32) else dtype, device=device)
        for name, like in model.state_dict().items()
    }
    model.load_state_dict(memory, assign=True)  # `to_empty` would import sympy, which takes most of a second
    for name, tensor in tensors_on_disk(model, family).items():
        stored = checkpoint[name]
        narrow = stored.to(tensor.dtype)
        if check_finite and not is_finite(narrow):
            require_finite(f"{checkpoint.path}: {name}", stored)
            largest = float(stored.abs().max())
            raise NotFiniteError(f"{checkpoint.path}: {name} holds {largest:.6g}, wanted what fits into {tensor.dtype}")
        tensor.copy_(narrow)


def _open_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """Where each tensor lies, from the headers alone."""
    if (file := checkpoint.beside(SINGLE)) is not None:  # first, as in transformers
        return read_header(file)
    if (index := checkpoint.beside(INDEX)) is not None:
        return _open_shards(checkpoint, index)
    names = sorted(checkpoint._listing())
    pickle = next((name for name in names if name.endswith(_PICKLES)), None)
    if pickle is not None:
        wanted = f"wanted {SINGLE}. Convert it with a tool you trust, from a source you trust"
        raise CheckpointError(f"{checkpoint.path / pickle}: {PICKLE}; {wanted}")
    others = [name for name in names if name.endswith(_WEIGHTS)]
    found = f"; name one of these to read it: {', '.join(others)}" if others else _what_is_there(names)
    raise CheckpointError(f"{checkpoint.path}: found neither {SINGLE} nor {INDEX}{found}")


def _what_is_there(names: Collection[str]) -> str:
    """What a folder may be that is no model, to end a sentence with."""
    if ADAPTER_CONFIG in names:
        return f"; the folder holds an adapter ({ADAPTER_CONFIG}), which is a model only together with its base"
    files = [name for name in names if name.endswith(".gguf")]
    if files:
        return f"; found {', '.join(sorted(files)[:3])}: a GGUF file is read from this machine, by its name"
    tokenizer = sorted(name for name in names if name.startswith(("tokenizer", "vocab.")))
    if tokenizer and CONFIG not in names and not any(name.endswith((*_WEIGHTS, *_PICKLES)) for name in names):
        return f"; the folder holds a tokenizer alone: {', '.join(tokenizer)}"
    return f"; the folder holds {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}" if names else ""


def _open_file(checkpoint: Checkpoint, name: str) -> dict[str, Stored]:
    """One file, in a folder that may hold others; refused where an index says that the model goes on elsewhere."""
    index = checkpoint.beside(INDEX)
    shards = set() if index is None else set(_read_weight_map(index).values())
    if name in shards and len(shards) > 1:
        found = f"{checkpoint.path / name}: one of the {len(shards)} files of a model"
        raise CheckpointError(f"{found}; wanted their folder, {checkpoint.path}")
    return read_header(checkpoint._wanted(name))


def _open_shards(checkpoint: Checkpoint, index: Path) -> dict[str, Stored]:
    weight_map = _read_weight_map(index)
    stored: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        for name, found in read_header(checkpoint._shard(file)).items():
            if name in stored:
                raise CheckpointError(f"{index}: {name} is stored twice, in {stored[name].file.name} and in {file}")
            stored[name] = found
    for name in sorted(weight_map.keys() | stored.keys()):
        said, found = weight_map.get(name), stored[name].file.name if name in stored else None
        if found is None or said is None or Path(said).name != found:
            raise CheckpointError(f"{index}: lists {name} in {said or 'no file'}, found it in {found or 'no file'}")
    return stored


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map is {weight_map!r:.80}, wanted an object of file names")
    return weight_map


def _inside(folder: Path, file: str) -> Path:
    """The path of a shard; a link may lead into the blobs of a Hugging Face cache, nowhere else."""
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    target = (folder / file).resolve()
    is_inside = any(target.is_relative_to(root) for root in roots)
    if not (is_inside and target.is_file()):
        fault = "is missing" if is_inside else "lies outside the folder"
        raise CheckpointError(f"{folder / INDEX}: names {file!r}, which {fault}; wanted a file inside the folder")
    return folder / file


def _check_tensors(checkpoint: Checkpoint, wanted: Mapping[str, Tensor]) -> None:
    """Compare names and shapes."""
    ignored = {name for name in checkpoint if name.endswith(_ROTARY_BUFFER)}  # in old files
    further = tuple(name.removesuffix(_MULTI_TOKEN) for name in checkpoint if name.endswith(f".{_MULTI_TOKEN}"))
    ignored |= {name for name in checkpoint if name.startswith(further)}
    if "lm_head.weight" not in wanted:  # the embedding once more
        ignored.add("lm_head.weight")
    found = set(checkpoint) - ignored
    reshaped = [
        f"{name} is {list(checkpoint.shape(name))}, wanted {list(wanted[name].shape)}"
        for name in sorted(found & wanted.keys())
        if checkpoint.shape(name) != tuple(wanted[name].shape)
    ]
    problems = {"missing": wanted.keys() - found, "unexpected": found - wanted.keys(), "of the wrong shape": reshaped}
    if any(problems.values()):
        said = "; ".join(_list_some(what, sorted(names)) for what, names in problems.items() if names)
        raise CheckpointError(f"{checkpoint.path}: {said}")


def require_finite(name: str, tensor: Tensor) -> None:
    """Look for NaN and infinity.

    Raises NotFiniteError: naming the tensor, the first such value, its place, and how many there are.
    """
    if not is_finite(tensor):
        bad = (~tensor.isfinite()).nonzero()
        place = bad[0].tolist()
        found = f"{float(tensor[tuple(place)])} at {place}"
        raise NotFiniteError(f"{name}: {found}, wanted finite numbers ({len(bad)} are not)")


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity. A sum shows it many times faster, unless it overflows itself."""
    total = tensor.sum(dtype=torch.float32 if tensor.dtype == torch.float16 else None)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def check_sizes(
    checkpoint: Checkpoint, config: MoEConfig, on_disk: Callable[[str], str], keys: Mapping[str, str]
) -> None:
    """Hold the sizes that a configuration gives against the headers, before anything of such a size is made.

    A tensor that is not there says nothing here: what is missing is found, and named, where it is wanted.

    Args:
        on_disk: from the name of a tensor in the model here to that on disk.
        keys: field of `config` -> what the configuration calls it; a field that is not there has its own name.

    Raises ValueError: naming the key, the value found, and what the file holds.
    """

    def require_at_most(field: str, part: str, what: str) -> None:
        numbers = (re.search(rf"(?:^|\.){part}\.(\d+)\.", name) for name in checkpoint)
        held, value = max((int(number[1]) + 1 for number in numbers if number), default=0), getattr(config, field)
        require(value <= held, keys.get(field, field), value, f"at most {held}, the {what} that the file holds")

    require_at_most("num_hidden_layers", "layers?", "layers")
    layers = range(config.num_hidden_layers)
    sparse = next((layer for layer in layers if config.is_sparse(layer)), None)
    dense = next((layer for layer in layers if not config.is_sparse(layer)), None)
    if sparse is not None and on_disk(f"model.layers.{sparse}.mlp.experts.down_proj") not in checkpoint:
        require_at_most("num_experts", "experts", "experts of a layer")
    for fields, pattern, side in _SIDES:
        name = on_disk(pattern.format(sparse=sparse, dense=dense))
        names = ("matrices", "rows", "columns") if name.endswith(".experts.down_proj") else ("rows", "columns")
        if name in checkpoint and len(checkpoint.shape(name)) == len(names):
            held = checkpoint.shape(name)[side]
        elif sparse is not None and fields == ("shared_expert_intermediate_size",) and name not in checkpoint:
            held = 0
        else:
            continue
        said = {keys.get(field, field): getattr(config, field) for field in fields}
        if math.prod(value or 0 for value in said.values()) != held:
            found = " and ".join(f"{key}={value}" for key, value in said.items())
            wanted = f"a product of {held}" if len(fields) > 1 else held
            raise ValueError(f"{found}: wanted {wanted}, the {names[side]} of {name} in the file")


def _list_some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensors {what}: {', '.join(names[:3])}{more}"
