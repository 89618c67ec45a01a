"""Writing a model as a folder in the Hugging Face layout: complete, or not at all."""

import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minimoe.model.checkpoint import CONFIG, INDEX, KEPT_IN_FLOAT32, SINGLE, TOKENIZER
from minimoe.model.families import find_family, write_config
from minimoe.model.layout import tensors_on_disk

MAX_SHARD_SIZE = 5 * 10**9


def save_model(
    model: nn.Module, path: str | Path, model_type: str | None = None, max_shard_size: int = MAX_SHARD_SIZE
) -> None:
    """Write `model` as a checkpoint folder, in place of the model that was there. Other files stay.

    Its tokenizer.json is part of a model: that of the old model is deleted, even if the new one has none.

    A failure leaves the old model as it was. A kill while the files are being exchanged leaves the old model, the
    new one, or a folder without config.json, which nothing reads; never a mixture.

    Args:
        model: with a `config` and a `tokenizer_json`.
        path, model_type: as for `MoEForCausalLM.save_pretrained`, which also says what is raised.
        max_shard_size: bytes per file.
    """
    family = find_family(model.config.model_type if model_type is None else model_type)
    tensors = tensors_on_disk(model, family)
    dtypes = {tensor.dtype for name, tensor in tensors.items() if not name.endswith(KEPT_IN_FLOAT32)}
    dtype = str(reduce(torch.promote_types, dtypes)).removeprefix("torch.")
    config = write_config(model.config, family.model_type, dtype)
    folder, existed = Path(path), Path(path).exists()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))  # inside: on the same file system
    try:
        new = _write_files(temporary, tensors, config, model.tokenizer_json, max_shard_size)
        _exchange(folder, temporary, new)
    except BaseException:
        shutil.rmtree(temporary)
        if not existed:
            folder.rmdir()
        raise
    for left_over in folder.glob(".saving-*"):  # this one, and those of processes that were killed
        shutil.rmtree(left_over)


def _write_files(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], tokenizer: str | None, max_shard_size: int
) -> list[str]:
    """Write a complete checkpoint; returns its files, config.json last."""
    shards = _split(tensors, max_shard_size)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(files) > 1 else [SINGLE]
    for file, names in zip(files, shards, strict=True):
        pieces = {name: tensors[name].contiguous() for name in names}
        save_file(pieces, folder / file, metadata={"format": "pt"})  # transformers refuses files without it
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        files.append(INDEX)
    if tokenizer is not None:
        (folder / TOKENIZER).write_bytes(tokenizer.encode())
        files.append(TOKENIZER)
    _write_json(folder / CONFIG, config)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes files that only their owner may read
        with file.open("rb") as written:
            os.fsync(written.fileno())
    return [*files, CONFIG]


def _split(tensors: dict[str, Tensor], max_shard_size: int) -> list[list[str]]:
    """The names in order, cut so that no file exceeds `max_shard_size` unless a single tensor does."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _exchange(folder: Path, temporary: Path, new: list[str]) -> None:
    """Put the files of `temporary` in place of the old model; on failure put the old one back.

    config.json leaves first and comes last. Where one file holds all weights and nothing else changes, as between two
    checkpoints of one training run, a single rename does it and the folder is readable at every moment.
    """
    old = _old_files(folder, new)
    one_file = new == old and new[0] == SINGLE
    if one_file and all((folder / name).read_bytes() == (temporary / name).read_bytes() for name in new[1:]):
        os.replace(temporary / SINGLE, folder / SINGLE)
        return
    aside = temporary / "old"
    aside.mkdir()
    with ExitStack() as undo:
        for name in reversed(old):
            os.replace(folder / name, aside / name)
            undo.callback(os.replace, aside / name, folder / name)
        for name in new:
            os.replace(temporary / name, folder / name)
            undo.callback(os.remove, folder / name)
        undo.pop_all()  # nothing failed


def _old_files(folder: Path, new: list[str]) -> list[str]:
    """What in `folder` makes way for the files `new`: weights, index, tokenizer, config.json last.

    A tokenizer that lies there alone is somebody's own: it stays, unless the new model brings one.
    """
    shards = sorted(file.name for file in folder.glob("model-*-of-*.safetensors"))
    old = [*shards, *(name for name in (SINGLE, INDEX, TOKENIZER, CONFIG) if (folder / name).exists())]
    return [] if old == [TOKENIZER] and TOKENIZER not in new else old
