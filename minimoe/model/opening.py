"""`open_checkpoint`: a model wherever it lies and in whatever format, as a `Checkpoint`.

Three of these formats take packages that `minimoe.model` does without: they are imported when such a source is opened.
"""

from __future__ import annotations

import re
from pathlib import Path

from minimoe.model.checkpoint import Checkpoint, CheckpointError
from minimoe.model.int8_folder import Int8Folder

_FILES = (".safetensors", ".gguf")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # "owner/name" of the Hugging Face hub, at a revision or not


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a model to be read piece by piece.

    Args:
        source: a folder in the Hugging Face layout, its matrices in floating point or in the 8-bit integers of
            bitsandbytes; a safetensors file with its config.json beside it; or a GGUF file, with the package `gguf`.
            The folder may be the https address of one, or of a safetensors file; or a repository of the Hugging Face
            hub, "owner/name" or "owner/name@revision", unless there is something here of that name. They are read by
            byte ranges, with the package `huggingface_hub`, and kept in a cache.

    Raises:
        CheckpointError: a file or a package is missing, a file is damaged, or a server fails; it is named.
    """
    checkpoint = _open_remote(source) if _is_remote(source) else _open_local(source)
    return Int8Folder(checkpoint) if Int8Folder.fits(checkpoint) else checkpoint


def _open_local(source: str | Path) -> Checkpoint:
    if Path(source).suffix != ".gguf":
        return Checkpoint(source)
    try:
        from minimoe.model.gguf_file import GGUF
    except ImportError as error:
        raise CheckpointError(f"{source}: to read it takes {error.name}: pip install 'minimoe[gguf]'") from error
    return GGUF(source)


def _is_remote(source: str | Path) -> bool:
    if not isinstance(source, str):
        return False
    is_name = _REPOSITORY.fullmatch(source) and not source.endswith(_FILES)
    return "://" in source or (bool(is_name) and not Path(source).exists())


def _open_remote(source: str) -> Checkpoint:
    try:
        from minimoe.model.remote import RemoteCheckpoint
    except ImportError as error:
        raise CheckpointError(
            f"{source}: not found here; to read it from elsewhere takes {error.name}: pip install 'minimoe[remote]'"
        ) from error
    return RemoteCheckpoint(source)
