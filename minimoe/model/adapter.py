"""Adapters of PEFT (https://github.com/huggingface/peft), read as the model that they make of their base.

LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1) adds to a matrix [out, in] the product of B [out, r] and A [r, in],
times alpha / r, or alpha / sqrt(r) where `use_rslora` says so (Kalajdzievski 2023, arXiv 2312.03732). For an embedding
[V, H], and where `fan_in_fan_out` is set, the product is transposed. Modules in `modules_to_save` replace the base's.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimoe.model.checkpoint import ADAPTER, ADAPTER_CONFIG, Checkpoint
from minimoe.model.formats import AT_ONCE, Readable, in_pieces
from minimoe.model.stored import CheckpointError, Read, Stored, read_header, read_json

_FIRST = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<embedding>embedding_)?A(?:\.weight)?")
# What would change how an adapter is added, and its only value here.
_SETTINGS: dict[str, Any] = {"peft_type": "LORA", "use_dora": False, "lora_bias": False, "layer_replication": None}
_SETTINGS |= {"target_parameters": None, "trainable_token_indices": None}
_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda")  # ways to begin that take something off the base first


class AdaptedCheckpoint(Checkpoint):
    """The base of a LoRA adapter with the adapter added, in float32 where it adds to a matrix.

    Args:
        path: the folder of the adapter. Its base is the folder that `base_model_name_or_path` names, or one of that
            name in the folder of the adapter or beside it.

    Raises CheckpointError: the base is not at hand; it is named. The adapter is not LoRA, has a part that is not
    understood, or does not fit the base. And as for `Checkpoint`, of either.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._base = Path(path), None
        self._settings = read_json(self.path / ADAPTER_CONFIG)
        self._check_settings()
        file = self._wanted(ADAPTER)
        self._base = Checkpoint(self._find_base())
        self.config_file, self.hf_config, self._is_one_file = self._base.config_file, self._base.hf_config, True
        changes = dict(self._read_changes(file))
        self._set_tensors(self._base._stored | changes, (*self._base.files, file))

    def beside(self, name: str) -> Path | None:
        """Where another file can be read: of the adapter, or else of the base."""
        return super().beside(name) or (self._base and self._base.beside(name))

    def _check_settings(self) -> None:
        for key, wanted in _SETTINGS.items():
            found = self._settings.get(key, wanted)
            if found != wanted and (found or wanted):
                raise CheckpointError(f"{self.path / ADAPTER_CONFIG}: {key}={found!r}, wanted {wanted!r}")
        found = self._settings.get("init_lora_weights", True)
        if str(found).startswith(_CHANGES_THE_BASE):
            message = "wanted a beginning that leaves the base as it is, true or 'gaussian'"
            raise CheckpointError(f"{self.path / ADAPTER_CONFIG}: init_lora_weights={found!r}, {message}")

    def _find_base(self) -> Path:
        said = str(self._settings.get("base_model_name_or_path") or "")
        name = Path(said).name
        places = [Path(said), *(folder / name for folder in (self.path, self.path.resolve().parent) if name)]
        for place in places if said else ():
            if place.is_dir() and place.resolve() != self.path.resolve():
                return place
        raise CheckpointError(
            f"{self.path}: an adapter, whose base {said!r} is not at hand; wanted the folder of the base: as "
            f"base_model_name_or_path in {ADAPTER_CONFIG}, or beside the adapter, called {name!r}"
        )

    def _read_changes(self, file: Path) -> Iterator[tuple[str, Readable]]:
        """The tensors that are not those of the base."""
        stored = read_header(file)
        firsts = {name: found for name in stored if (found := _FIRST.fullmatch(name))}
        seconds = {name: "B".join(name.rsplit("A", 1)) for name in firsts}
        for name, first in firsts.items():
            weight = f"{first['module']}.weight"
            for needed, where in ((weight, self._base), (seconds[name], stored)):
                if needed not in where:
                    raise CheckpointError(f"{file}: {name} wants {needed}, and there is none")
            is_embedding = first["embedding"] is not None
            yield weight, self._add(weight, stored[name], stored[seconds[name]], is_embedding)
        for name in stored.keys() - firsts.keys() - set(seconds.values()):
            replaced = name.removeprefix("base_model.model.").replace(".modules_to_save.", ".")
            if replaced not in self._base:
                raise CheckpointError(f"{file}: {name} is not understood, as the base has no {replaced}")
            yield replaced, stored[name]

    def _add(self, weight: str, first: Stored, second: Stored, is_embedding: bool) -> "_Sum":
        """A matrix of the base with the product of B, [out, r], and A, [r, in], which is `first`."""
        to = self._base._stored[weight]
        is_transposed = is_embedding or self._settings.get("fan_in_fan_out") is True
        sides = to.shape[::-1] if is_transposed else to.shape
        rank = first.shape[0] if first.shape else 0
        if not rank or len(sides) != 2 or (first.shape, second.shape) != ((rank, sides[1]), (sides[0], rank)):
            found = f"{first.name} is {list(first.shape)}, {second.name} is {list(second.shape)}"
            wanted = f"[r, {sides[-1]}] and [{sides[0]}, r]"
            raise CheckpointError(f"{first.file}: {found}, wanted {wanted}, as {weight} is {list(to.shape)}")
        alpha = self._alpha(weight.removesuffix(".weight"))
        scale = alpha / math.sqrt(rank) if self._settings.get("use_rslora") is True else alpha / rank
        return _Sum(to, first, second, is_transposed, scale)

    def _alpha(self, module: str) -> float:
        patterns = self._settings.get("alpha_pattern") or {}
        try:
            fitting = [pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)]
            return float(patterns[fitting[0]] if fitting else self._settings.get("lora_alpha", 8))
        except (TypeError, ValueError, re.error) as error:
            raise CheckpointError(f"{self.path / ADAPTER_CONFIG}: alpha_pattern or lora_alpha: {error}") from error


@dataclass(frozen=True)
class _Sum:
    """A matrix of the base plus `scale` times the product of two stored ones."""

    base: Readable
    first: Stored
    second: Stored
    is_transposed: bool
    scale: float

    number_type = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def pieces(self, read: Read, size: int) -> Iterator[Tensor]:
        """Its numbers in order; of the product, only the rows that a piece meets are in memory."""
        return in_pieces(self._numbers(read, min(size, AT_ONCE)), size, math.prod(self.shape))

    def _numbers(self, read: Read, size: int) -> Iterator[Tensor]:
        right, left = (
            next(part.pieces(read, math.prod(part.shape))).view(part.shape).float()
            for part in (self.first, self.second)
        )
        if self.is_transposed:
            left, right = right.T, left.T
        columns, start = self.shape[1], 0
        for piece in self.base.pieces(read, size):
            stop = start + len(piece)
            first_row = start // columns
            product = (left[first_row : -(-stop // columns)] @ right).flatten()
            begin = start - first_row * columns
            yield piece.float() + self.scale * product[begin : begin + len(piece)]
            start = stop
