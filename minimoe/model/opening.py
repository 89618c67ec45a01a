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
    try:
        checkpoint = _open(source)
    except ImportError as error:
        extra = "gguf" if error.name == "gguf" else "remote"
        elsewhere = "" if extra == "gguf" else "not found here; "
        raise CheckpointError(
            f"{source}: {elsewhere}reading it needs {error.name}: pip install 'minimoe[{extra}]'"
        ) from error
    return Int8Folder(checkpoint) if Int8Folder.fits(checkpoint) else checkpoint


def _open(source: str | Path) -> Checkpoint:
    if _is_remote(source):
        from minimoe.model.remote import RemoteCheckpoint

        return RemoteCheckpoint(source)
    if Path(source).suffix == ".gguf":
        from minimoe.model.gguf_file import GGUF

        return GGUF(source)
    return Checkpoint(source)


def _is_remote(source: str | Path) -> bool:
    if not isinstance(source, str):
        return False
    is_name = _REPOSITORY.fullmatch(source) and not source.endswith(_FILES)
    return "://" in source or (bool(is_name) and not Path(source).exists())
