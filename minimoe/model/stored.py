"""Single files of a checkpoint folder: JSON, the header of safetensors, and what a file is that is neither."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

PICKLE = "a pickle, and reading a pickle runs whatever code it holds"
_BEGINNINGS = (  # of files that are taken for others, in lower case
    (b"version https://git-lfs", "a Git LFS pointer, which stands for a file that `git lfs pull` fetches"),
    (b"<!doctype html", "a web page, as downloads give that want a login"),
    (b"<html", "a web page, as downloads give that want a login"),
    (b"pk\x03\x04", f"a zip archive, as torch.save writes: {PICKLE}"),
    *((bytes([0x80, protocol]), PICKLE) for protocol in range(2, 6)),
    (b"gguf", "a GGUF file, whose name ends in .gguf"),
)


class CheckpointError(ValueError):
    """A checkpoint folder is not what it should be; the message names the file or tensor."""


class NotFiniteError(CheckpointError):
    """A tensor holds NaN or infinity."""


class HashUnknownError(CheckpointError):
    """The weights are on a server, and nobody publishes their sha256."""


@dataclass(frozen=True)
class Stored:
    """A tensor of numbers, as it lies in a file."""

    name: str
    file: Path
    start: int  # of its bytes
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]

    @property
    def number_type(self) -> torch.dtype:
        """The dtype of its numbers. A CheckpointError where they stand for others, or are no floating-point numbers."""
        if self.dtype in DTYPES:
            return DTYPES[self.dtype]
        scales = (f"{self.name.removesuffix('weight')}SCB", f"{self.name}_scale", f"{self.name}_scale_inv")
        beside = f", or its scales: no tensor {', '.join(map(repr, scales))}" if self.dtype[:2] in ("I8", "F8") else ""
        found = f"{self.file}: {self.name} is stored as {self.dtype}"
        raise CheckpointError(f"{found}, wanted one of {', '.join(DTYPES)}{beside}")

    def pieces(self, read: "Read", size: int) -> Iterator[Tensor]:
        """Its numbers in order, in flat pieces of at most `size`; what is stored in few bits, in float32."""
        return read(self, size, self.number_type)


# Reads a stored tensor as numbers of a dtype, in flat pieces that lie in one buffer: each overwrites the one before.
Read = Callable[[Stored, int, torch.dtype], Iterator[Tensor]]


def read_header(file: Path) -> dict[str, Stored]:
    """Where each tensor of a safetensors file lies.

    Raises CheckpointError: the file is none, or cut off; it says what it is, if that is known.
    """
    try:
        with safe_open(file, framework="pt", device="cpu"):
            pass  # safetensors itself checks that the header is sound and the file complete
    except (SafetensorError, OSError) as error:
        kind = describe_file(file)
        found = f"{file.stat().st_size} bytes{kind and f', {kind}'}"
        raise CheckpointError(f"{file}: found {found}, wanted a whole safetensors file ({error})") from error
    with file.open("rb") as opened:  # it does not tell where a tensor starts, and opening it anew for each is slow
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(name, file, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def read_json(file: Path) -> dict[str, Any]:
    """An object, in which no key appears twice.

    Raises CheckpointError: the file is missing, or something else; it says what it is, if that is known.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: not found") from error
    except (ValueError, RecursionError) as error:
        found = describe_file(file) or "something else"
        raise CheckpointError(f"{file}: wanted JSON, found {found} ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: wanted a JSON object, found {type(content).__name__}")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice!r} appears twice")
    return content


def sha256_of_file(file: Path) -> str:
    """As `sha256sum` prints it, and as model hubs show it."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def describe(start: bytes) -> str:
    """What a file is that begins so; nothing if that is not known."""
    start = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((kind for beginning, kind in _BEGINNINGS if start.startswith(beginning)), "")


def describe_file(file: Path) -> str:
    """`describe` of the beginning of a file."""
    with file.open("rb") as opened:
        return describe(opened.read(64))
