"""Tensors that are stored in few bits with scales beside them, read as the numbers that these stand for, in float32.

    FP8       X float8 [.., R, C] times X_scale_inv or X_scale: one number, one for each row, or one for each block.
              DeepSeek-AI 2024 (arXiv 2412.19437, section 3.3), fbgemm, compressed-tensors, ModelOpt.
    integers  (X - X_zero_point) X_scale of X int8 [.., R, C], likewise: compressed-tensors, in which an int32 of
              X_packed [.., R, C / 4] may hold four of them, as bytes that are 128 too high. bitsandbytes with 8 bits:
              X SCB / 127, SCB [R] being each row's largest absolute value (Dettmers et al. 2022, arXiv 2208.07339,
              section 2.1). That such models round activations too when they run changes nothing in their weights.
    MXFP4     X [.., 32 G, R], as transformers gives it. X_blocks [.., R, G, 16] are pairs of numbers of 4 bits, the low
              half of a byte first. X_scales [.., R, G] is e + 127, where 32 of them share the factor 2^e.
              OCP Microscaling Formats (MX) 1.0, sections 5.1 to 5.4.

Tensors of GPTQ, AWQ, bitsandbytes with 4 bits and others are listed by name; reading one raises an error.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minimoe.model.stored import DTYPES, CheckpointError, Read, Stored

AT_ONCE = 2**18  # numbers that are computed at once: small enough to stay in the processor's cache
_FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_EXPONENTS = ("F8_E8M0", "U8")  # scales that are powers of 2
_POWERS = torch.tensor([*(2.0 ** (stored - 127) for stored in range(255)), math.nan], device="cpu")  # what they are
_BLOCK = [128, 128]  # rows and columns with one scale, where the configuration does not say
_BY_ROWS = 0  # the other layouts of bitsandbytes are orders for GPUs of long ago
_4_BITS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # and the same below 0
_METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "modelopt")  # and bitsandbytes, with 8 bits


@dataclass(frozen=True)
class _Quantised:
    """A tensor that follows from codes and scales."""

    name: str
    codes: Stored
    scales: Stored
    beside: Mapping[str, Stored] = field(repr=False)  # all that is stored
    config: Mapping[str, Any]  # quantization_config

    number_type = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.codes.file}: {text}")


class _Scaled(_Quantised):
    """Codes of 8 bits, each multiplied by the scale of its block. A block may be a row, or the whole matrix."""

    def pieces(self, read: Read, size: int) -> Iterator[Tensor]:
        return in_pieces(self._numbers(read, min(size, AT_ONCE)), size, math.prod(self.shape))

    def _numbers(self, read: Read, size: int) -> Iterator[Tensor]:
        block_rows, block_columns, grid_rows, grid_columns = self._blocks()
        scales, zeros, start = self._read_scales(read), self._read_zeros(read), 0
        rows, columns = (1, *self.shape)[-2:]
        for codes in self._read_codes(read, size):
            number = torch.arange(start, start + len(codes), device="cpu")
            row, column = number // columns, number % columns
            block = row // rows * grid_rows + row % rows // block_rows  # a stack of matrices, one below the other
            block = block * grid_columns + column // block_columns
            yield (codes.float() - zeros[block % len(zeros)]) * scales[block % len(scales)]
            start += len(codes)

    def _read_codes(self, read: Read, size: int) -> Iterator[Tensor]:
        return read(self.codes, size, _FLOAT8.get(self.codes.dtype, torch.int8))

    def _read_scales(self, read: Read) -> Tensor:
        """Flat: one for each block, or one alone."""
        count = math.prod(self.scales.shape)
        if self.scales.dtype in DTYPES:
            return next(self.scales.pieces(read, count)).float()
        if self.scales.dtype in _EXPONENTS and self.codes.dtype in _FLOAT8:
            return _POWERS[next(read(self.scales, count, torch.uint8)).int()]
        raise self.error(f"{self.scales.name} is stored as {self.scales.dtype}, wanted one of {', '.join(DTYPES)}")

    def _read_zeros(self, read: Read) -> Tensor:
        """Flat: the code that stands for 0, one for each block or one for all."""
        zeros = self.beside.get(f"{self.name}_zero_point")
        if zeros is None:
            return torch.zeros(1, device="cpu")
        if zeros.dtype != "I8" or zeros.shape != self.scales.shape:
            raise self.error(f"{zeros.name} is {zeros.dtype} {list(zeros.shape)}, wanted I8 {list(self.scales.shape)}")
        return next(read(zeros, math.prod(zeros.shape), torch.int8)).float()

    def _blocks(self) -> tuple[int, int, int, int]:
        """Rows and columns of a block, and how many blocks make up the rows and the columns of a matrix."""
        *stack, rows, columns = self.shape if len(self.shape) > 1 else (1, *self.shape)
        given = self.scales.shape
        if math.prod(given) == 1 or given == tuple(stack):
            return rows, columns, 1, 1
        if given == (*stack, rows):
            return 1, columns, rows, 1
        if given[:-2] == tuple(stack) and len(given) > 1:
            said = self.config.get("weight_block_size")
            said = said if isinstance(said, list) and [type(size) for size in said] == [int, int] else _BLOCK
            sizes = [_block(*side) for side in zip((rows, columns), given[-2:], said, strict=True)]
            if all(sizes):
                return *sizes, *given[-2:]
        wanted = f"{[*stack, rows]}, one for each row, or one for each block of {list(self.shape)}"
        raise self.error(f"{self.scales.name} is {list(given)}, wanted {wanted}")


def _block(length: int, count: int, said: int) -> int:
    """How many of `length` numbers share one of `count` scales, the last of which may have fewer; 0: impossible."""
    sizes = said, length // max(count, 1)
    return next((size for size in sizes if size > 0 and -(-length // size) == count), 0)


class _Bitsandbytes(_Scaled):
    """Integers of 8 bits; 127 stands for the scale of a row."""

    def _read_scales(self, read: Read) -> Tensor:
        layout = self.beside.get(f"{self.name.removesuffix('weight')}weight_format")
        found = _BY_ROWS if layout is None else int(next(read(layout, 1, torch.uint8)))
        if found != _BY_ROWS:
            raise self.error(f"{layout.name}={found}, wanted {_BY_ROWS}, by rows")
        if self.scales.shape != self.shape[:1]:
            raise self.error(f"{self.scales.name} is {list(self.scales.shape)}, wanted {list(self.shape[:1])}")
        return super()._read_scales(read) / 127


class _Packed(_Scaled):
    """Integers of 8 bits, four of which are stored as one of 32."""

    @property
    def shape(self) -> tuple[int, ...]:
        *rows, columns = self.codes.shape
        return (*rows, 4 * columns)

    def _read_codes(self, read: Read, size: int) -> Iterator[Tensor]:
        shape = self.beside.get(f"{self.name}_shape")
        found = self.shape if shape is None else tuple(next(read(shape, 2, torch.int64)).tolist())
        if found != self.shape:
            raise self.error(f"{shape.name} is {list(found)}, wanted {list(self.shape)}")
        stored = Stored(self.codes.name, self.codes.file, self.codes.start, "U8", self.shape)
        return (codes.float() - 128 for codes in read(stored, size, torch.uint8))


class _Mxfp4(_Quantised):
    """Blocks of 32 numbers of 4 bits: a sign, two bits of exponent and one of fraction."""

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, rows, groups, _ = self.codes.shape
        return (*stack, 32 * groups, rows)

    def pieces(self, read: Read, size: int) -> Iterator[Tensor]:
        if self.codes.shape[-1] != 16 or self.codes.shape[:-1] != self.scales.shape:
            found = f"{self.codes.name} is {list(self.codes.shape)} and {self.scales.name} {list(self.scales.shape)}"
            raise self.error(f"{found}, wanted [.., rows, groups, 16] and [.., rows, groups]")
        return in_pieces(self._matrices(read), size, math.prod(self.shape))

    def _matrices(self, read: Read) -> Iterator[Tensor]:
        values = torch.tensor([*_4_BITS, *(-value for value in _4_BITS)], device="cpu")
        rows, groups = self.scales.shape[-2:]
        blocks = read(self.codes, rows * groups * 16, torch.uint8)
        exponents = read(self.scales, rows * groups, torch.uint8)
        for block, exponent in zip(blocks, exponents, strict=True):
            pairs = torch.stack([block & 15, block >> 4], dim=1).int()
            numbers = values[pairs].view(-1, 32) * _POWERS[exponent.int()][:, None]
            yield numbers.view(rows, 32 * groups).T.flatten()


@dataclass(frozen=True)
class _Refused(_Quantised):
    """A tensor in a format that is not read."""

    method: str

    @property
    def shape(self) -> tuple[int, ...]:
        raise self.error(
            f"{self.name} is stored as {self.method} does ({self.codes.name}, {self.scales.name}), which is not read; "
            f"wanted one of {', '.join(DTYPES)}, or FP8, MXFP4 or 8-bit integers with scales"
        )

    def pieces(self, read: Read, size: int) -> Iterator[Tensor]:
        return iter(self.shape)


Readable = Stored | _Quantised  # has a shape, a number_type and pieces()

# How the names of a tensor, its codes and its scales end; the dtypes of the codes; what reads them, or whose they are.
_FORMS: tuple[tuple[str, str, str, tuple[str, ...], type[_Quantised] | str], ...] = (
    ("", "", "_scale_inv", tuple(_FLOAT8), _Scaled),
    ("", "", "_scale", (*_FLOAT8, "I8"), _Scaled),
    ("weight", "weight", "SCB", ("I8",), _Bitsandbytes),
    ("", "_packed", "_scale", ("I32", "U8"), _Packed),
    ("", "_blocks", "_scales", ("U8",), _Mxfp4),
    ("weight", "qweight", "scales", ("I32",), "GPTQ or AWQ"),
    ("", "", ".absmax", ("U8",), "bitsandbytes with 4 bits"),
    ("", "", "_scale", ("U8",), "NVFP4"),
)


def find_quantised(stored: Mapping[str, Stored], hf_config: Mapping[str, Any]) -> dict[str, Readable]:
    """The tensors of a model: what is stored as numbers, and in place of codes and scales what follows from them.

    Formats are known by names and dtypes; of the configuration only the size of blocks is taken, and how many bits are
    packed.
    """
    config = hf_config.get("quantization_config")
    config = config if isinstance(config, Mapping) else {}
    found: dict[str, Readable] = {}
    for name, codes in stored.items():
        for ending, codes_end, scales_end, dtypes, form in _FORMS:
            base = name.removesuffix(codes_end)
            if codes.dtype in dtypes and name.endswith(codes_end) and base + scales_end in stored:
                parts = base + ending, codes, stored[base + scales_end], stored, config
                found[base + ending] = _quantised(form, parts)
                break
        else:
            found[name] = codes
    quantised = {name for name, tensor in found.items() if isinstance(tensor, _Quantised)}
    return {name: tensor for name, tensor in found.items() if name in quantised or not _is_about(name, quantised)}


def _quantised(form: type[_Quantised] | str, parts: tuple) -> _Quantised:
    name, codes, _, stored, config = parts
    if form is _Packed:
        bits = _bits(config)
        about = f"{name}_g_idx", f"{name}_zero_point"
        is_plain = bits == ["8"] and codes.dtype == "I32" and not any(part in stored for part in about)
        form = _Packed if is_plain else f"compressed-tensors with {' or '.join(bits) or 'unknown'} bits"
    if isinstance(form, str):
        return _Refused(*parts, method=str(config.get("quant_method", form)) if form == "GPTQ or AWQ" else form)
    return form(*parts)


def _bits(config: Mapping[str, Any]) -> list[str]:
    """What compressed-tensors says of its groups of tensors."""
    groups = config.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in groups if isinstance(group, Mapping)]
    return sorted({str(about.get("num_bits")) for about in weights if isinstance(about, Mapping)})


def _is_about(name: str, quantised: set[str]) -> bool:
    """Whether a stored tensor only says how to read or to run one that is quantised."""
    if not quantised or name.endswith("bias"):
        return False
    ends = [place.start() for place in re.finditer(r"[._]", name)]
    begins = any(name[:end] in quantised or (name[end] == "." and f"{name[:end]}.weight" in quantised) for end in ends)
    return begins or name.endswith((".k_scale", ".v_scale"))  # the last two: of the cache


def without_quantisation(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without its quantization_config, if that names a format which is read."""
    said = hf_config.get("quantization_config")
    said = said if isinstance(said, Mapping) else {}
    is_int8 = said.get("quant_method") == "bitsandbytes" and said.get("load_in_8bit") is True
    is_read = is_int8 or said.get("quant_method") in _METHODS
    return {key: value for key, value in hf_config.items() if key != "quantization_config" or not is_read}


def in_pieces(parts: Iterable[Tensor], size: int, total: int) -> Iterator[Tensor]:
    """The `total` numbers of flat tensors, one after the other, in pieces of `size`; all of these lie in one buffer."""
    piece, filled = torch.empty(min(size, total), device="cpu"), 0
    if total == 0:
        yield piece
        return
    for part in parts:
        while len(part):
            taken, part = part[: len(piece) - filled], part[len(piece) - filled :]
            piece[filled : filled + len(taken)] = taken
            filled += len(taken)
            if filled == len(piece):
                yield piece
                total -= filled
                piece, filled = piece[:total], 0
