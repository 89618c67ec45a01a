"""Weights with all that surrounds them folded in, so that fewer rewrites of a model change them.

Norm weights go into the matrices that read them; queries and keys, values and outputs meet in products; an MLP is read
as a list of neurons. Biases are left out.

Shapes: H hidden size, I width of an MLP or of an expert, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.weights import Weights


class Neurons(NamedTuple):
    """An MLP or an expert: a gate row, an up row and a down column per neuron, [I, H] each."""

    gate: Tensor
    up: Tensor
    down: Tensor


def query_key(weights: Weights, layer: int) -> Tensor:
    """The sum over heads of W_q^T W_k, [H, H]: x query_key y^T is what x asks of y at the same position.

    The queries of a group share their key, so that they can be added first. The weights of a `qk_norm` are folded in;
    what it divides by depends on the token and is not.
    """
    sides = []
    for role in "qk":
        matrix = _fold(weights, role, "norm1", layer)
        if weights.has(f"{role}_norm", layer):
            norm = weights.get(f"{role}_norm", layer)
            matrix = matrix * norm.repeat(len(matrix) // len(norm))[:, None]  # of one head, or of all
        sides.append(matrix)
    return _sum_over_groups(sides[0], weights, layer).mT @ sides[1]


def value_output(weights: Weights, layer: int) -> Tensor:
    """The sum over heads of W_o W_v, [H, H]: from what is attended to, on the right, to what is written."""
    o = _written(weights, "o", "norm1_after", layer)
    return _sum_over_groups(o, weights, layer).mT @ _fold(weights, "v", "norm1", layer)


def mlps(weights: Weights, layer: int) -> dict[str, Neurons]:
    """The MLP of a layer, which has to have a gate; or its experts "0", "1", ... and "shared", if it has any."""
    _require_gate(weights, layer)
    gate, up = (_fold(weights, role, "norm2", layer) for role in ("gate", "up"))
    down = _written(weights, "down", "norm2_after", layer)
    if gate.dim() == 2:
        return {"mlp": Neurons(gate, up, down)}
    found = {str(expert): Neurons(gate[expert], up[expert], down[expert]) for expert in range(len(gate))}
    if weights.has("shared_gate", layer):
        shared = (_fold(weights, role, "norm2", layer) for role in ("shared_gate", "shared_up"))
        found["shared"] = Neurons(*shared, _written(weights, "shared_down", "norm2_after", layer))
    return found


def mean_up(weights: Weights, layer: int) -> Tensor:
    """The up rows of a gated layer, [I, H]; the mean over the experts, if there are any."""
    _require_gate(weights, layer)
    up = _fold(weights, "up", "norm2", layer)
    return up if up.dim() == 2 else up.mean(0)


def _require_gate(weights: Weights, layer: int) -> None:
    if not weights.has("gate", layer):
        raise Refusal(f"layer {layer} has no gated MLP")


def _fold(weights: Weights, role: str, norm: str, layer: int) -> Tensor:
    """A matrix that reads the residual stream, with the norm before it, if there is one."""
    matrix = weights.get(role, layer)
    return matrix * weights.get(norm, layer) if weights.has(norm, layer) else matrix


def _written(weights: Weights, role: str, norm: str, layer: int) -> Tensor:
    """The columns of a matrix that writes, as rows, with the norm after it, if there is one."""
    columns = weights.get(role, layer).mT
    return columns * weights.get(norm, layer) if weights.has(norm, layer) else columns


def _sum_over_groups(rows: Tensor, weights: Weights, layer: int) -> Tensor:
    """[heads * D, H] -> [key-value heads * D, H]."""
    heads, kv_heads = weights.heads(layer)
    return rows.unflatten(0, (kv_heads, heads // kv_heads, -1)).sum(1).flatten(0, 1)
