"""`open_checkpoint`: a model wherever it lies and in whatever format, as a `Checkpoint`.

Two of these formats take packages that `minimoe.model` does without: they are imported when such a source is opened.
"""

import re
from pathlib import Path

from minimoe.model.adapter import AdaptedCheckpoint
from minimoe.model.checkpoint import ADAPTER, ADAPTER_CONFIG, INDEX, SINGLE, Checkpoint, CheckpointError

_FILES = (".safetensors", ".gguf")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # "owner/name" of the Hugging Face hub, at a revision or not


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a model to be read piece by piece.

    Args:
        source: a folder in the Hugging Face layout, its matrices in floating point or in fewer bits, as formats.py
            lists; the folder of a LoRA adapter whose base is at hand; a safetensors file with its config.json beside
            it; or, with the package `gguf`, a GGUF file, any part of one that is split, or the folder of either.
            A folder in the Hugging Face layout may be the https address of one, or of a safetensors file; or a
            repository of the Hugging Face hub, "owner/name" or "owner/name@revision", unless there is something here of
            that name. They are read by byte ranges, with the package `huggingface_hub`, and kept in a cache.

    Raises:
        CheckpointError: a file or a package is missing, a file is damaged or something else, or a server fails; it is
            named.
    """
    try:
        return _open(source)
    except ImportError as error:
        wanted = "gguf" if error.name == "gguf" else "'minimoe[remote]'"
        elsewhere = "" if error.name == "gguf" else "not found here; "
        raise CheckpointError(f"{source}: {elsewhere}reading it needs {error.name}: pip install {wanted}") from error


def _open(source: str | Path) -> Checkpoint:
    if _is_remote(source):
        from minimoe.model.remote import RemoteCheckpoint

        return RemoteCheckpoint(source)
    path = Path(source)
    names = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
    is_whole = bool(names & {SINGLE, INDEX})
    if path.name == ADAPTER and (path.parent / ADAPTER_CONFIG).is_file():
        return AdaptedCheckpoint(path.parent)
    if ADAPTER_CONFIG in names and not is_whole:
        return AdaptedCheckpoint(path)
    if path.suffix == ".gguf" or (not is_whole and any(name.endswith(".gguf") for name in names)):
        from minimoe.model.gguf_file import GGUF

        return GGUF(path)
    return Checkpoint(path)


def _is_remote(source: str | Path) -> bool:
    if not isinstance(source, str):
        return False
    is_name = _REPOSITORY.fullmatch(source) and not source.endswith(_FILES)
    return "://" in source or (bool(is_name) and not Path(source).exists())
