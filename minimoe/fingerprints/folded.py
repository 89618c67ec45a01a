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
    q, k = (_fold_norm(weights, role, layer) for role in "qk")
    return _sum_over_groups(q, weights).mT @ k


def value_output(weights: Weights, layer: int) -> Tensor:
    """The sum over heads of W_o W_v, [H, H]: from what is attended to, on the right, to what is written."""
    o = weights.get("o", layer).mT
    return _sum_over_groups(o, weights).mT @ _fold(weights, "v", "norm1", layer)


def mlps(weights: Weights, layer: int) -> dict[str, Neurons]:
    """The MLP of a layer, which has to have a gate; or its experts "0", "1", ... and "shared", if it has any."""
    _require_gate(weights, layer)
    gate, up = (_fold(weights, role, "norm2", layer) for role in ("gate", "up"))
    down = weights.get("down", layer).mT
    if gate.dim() == 2:
        return {"mlp": Neurons(gate, up, down)}
    found = {str(expert): Neurons(gate[expert], up[expert], down[expert]) for expert in range(len(gate))}
    if weights.has("shared_gate", layer):
        shared = (_fold(weights, role, "norm2", layer) for role in ("shared_gate", "shared_up"))
        found["shared"] = Neurons(*shared, weights.get("shared_down", layer).mT)
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
    matrix = weights.get(role, layer)
    return matrix * weights.get(norm, layer)


def _fold_norm(weights: Weights, role: str, layer: int) -> Tensor:
    """Queries or keys, with the norm before them and the weight of that after them."""
    matrix = _fold(weights, role, "norm1", layer)
    if not weights.has(f"{role}_norm", layer):
        return matrix
    norm = weights.get(f"{role}_norm", layer)
    return matrix * norm.repeat(len(matrix) // len(norm))[:, None]  # of one head, or of all


def _sum_over_groups(rows: Tensor, weights: Weights) -> Tensor:
    """[heads * D, H] -> [key-value heads * D, H]."""
    return rows.unflatten(0, (weights.num_kv_heads, -1, weights.head_dim)).sum(1).flatten(0, 1)
