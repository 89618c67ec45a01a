"""Folders in which bitsandbytes stored matrices as 8-bit integers, read as the numbers these stand for.

Beside the integers of a matrix [out, in] lies "SCB", [out]: the largest number of each row before rounding, for which
127 stands. What is not a matrix of a layer lies there as in any other folder.

Source: Dettmers et al. 2022, arXiv 2208.07339, section 2.1; the layout is that of `Linear8bitLt` in bitsandbytes. When
it runs, that package rounds activations too, which is no property of the weights and not done here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minimoe.model.checkpoint import Checkpoint, CheckpointError

_SCALES, _LAYOUT = "SCB", "weight_format"
_BY_ROWS = 0  # the other layouts are orders for GPUs of long ago


class Int8Folder(Checkpoint):
    """A `Checkpoint` whose integer matrices are read in float32.

    Args:
        stored: the folder, here or elsewhere, as it is.

    Raises:
        CheckpointError: where a matrix is read, its scales are missing or its layout is not understood.
    """

    dtype = torch.float32

    def __init__(self, stored: Checkpoint) -> None:
        self.path, self.config_file, self._folder = stored.path, stored.config_file, stored
        self.hf_config = {key: value for key, value in stored.hf_config.items() if key != "quantization_config"}
        about = (f".{_SCALES}", f".{_LAYOUT}")
        self._stored = {name: found for name, found in stored._stored.items() if not name.endswith(about)}
        self.beside, self.hashes = stored.beside, stored.hashes

    @staticmethod
    def fits(stored: Checkpoint) -> bool:
        """Whether the configuration says that it is one."""
        said = stored.hf_config.get("quantization_config")
        is_of_bitsandbytes = isinstance(said, dict) and said.get("quant_method") == "bitsandbytes"
        return is_of_bitsandbytes and said.get("load_in_8bit") is True

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        """Read one tensor in flat pieces of at most `size` numbers, in the dtype that `self[name]` has."""
        if self._find(name).dtype != "I8":
            yield from self._folder.pieces(name, size)
            return
        scales, columns, start = self._scales(name) / 127, self.shape(name)[-1], 0
        for integers in self._folder._read(name, size, torch.int8):
            row = torch.arange(start, start + len(integers)) // columns
            yield integers * scales[row]
            start += len(integers)

    def _scales(self, name: str) -> Tensor:
        matrix = name.removesuffix("weight")
        if matrix + _LAYOUT in self._folder:
            (layout,) = next(self._folder._read(matrix + _LAYOUT, 1, torch.uint8))
            if layout != _BY_ROWS:
                raise CheckpointError(f"{self.path}: {matrix}{_LAYOUT}={int(layout)}, wanted {_BY_ROWS}, by rows")
        scales, rows = self._folder[matrix + _SCALES].float(), self.shape(name)[:1]
        if scales.shape != rows:
            raise CheckpointError(f"{self.path}: {matrix}{_SCALES} is {list(scales.shape)}, wanted {list(rows)}")
        return scales
