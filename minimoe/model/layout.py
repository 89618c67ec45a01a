"""How the tensors of a model lie in the files of a family: which are one there, and which are many.

Shapes: E experts, H hidden size, I expert width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minimoe.model.families import Family


class _InTurn:
    """Two tensors [..., I] as one whose columns they take in turn, [..., 2 I]. To fill it is to fill both."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.parts, self.dtype, self.nbytes = (first, second), first.dtype, first.nbytes + second.nbytes
        self.shape = *first.shape[:-1], 2 * first.shape[-1]

    def copy_(self, stored: Tensor) -> None:
        for number, part in enumerate(self.parts):
            part.copy_(stored[..., number::2])

    def contiguous(self) -> Tensor:
        return torch.stack(self.parts, dim=-1).flatten(-2)


def tensors_on_disk(model: nn.Module, family: Family) -> dict[str, Tensor | _InTurn]:
    """The model's tensors as the family stores them, by name: to fill them is to fill the model."""
    tensors, state = {}, model.state_dict()
    for name, tensor in state.items():
        if ".mlp.experts." in name:
            named = _together(name, state) if family.fused_experts else _one_by_one(name, tensor)
        else:
            named = {name: tensor}
        for own_name, piece in named.items():
            disk_name = family.on_disk(own_name)
            tensors[disk_name] = piece.unsqueeze(0) if disk_name.endswith(family.rows) else piece
    return tensors


def _one_by_one(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of all experts in pieces, with the names that linear maps have."""
    layer, projection = name.split("experts.")
    part = projection.removesuffix("_bias") + (".bias" if projection.endswith("_bias") else ".weight")
    return {f"{layer}experts.{expert}.{part}": piece for expert, piece in enumerate(tensor.unbind())}


def _together(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor | _InTurn]:
    """A tensor of all experts in the layout of gpt-oss: matrices as [E, in, out], gate and up as one."""

    def turned(name: str) -> Tensor:
        return state[name] if name.endswith("bias") else state[name].mT

    if ".gate_proj" in name:
        both = _InTurn(turned(name), turned(name.replace(".gate_proj", ".up_proj")))
        return {name.replace(".gate_proj", ".gate_up_proj"): both}
    return {} if ".up_proj" in name else {name: turned(name)}
