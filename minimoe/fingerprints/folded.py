"""Weights with the norms around them folded in, so that fewer rewrites of a model change them.

Norm weights go into the matrices that read them. W_q is paired with W_k and W_v with W_o, since only their products
matter; an MLP is read as a list of neurons. Biases are left out.

Shapes: H hidden size, I width of an MLP or of an expert, E experts.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minimoe.fingerprints.audible import head_counts
from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.weights import Weights


class Neurons(NamedTuple):
    """An MLP or an expert: a gate row, an up row and a down column per neuron, [I, H] each."""

    gate: Tensor
    up: Tensor
    down: Tensor


def query_key(weights: Weights, layer: int) -> tuple[Tensor, Tensor]:
    """Q and K [n, H]; Q^T K, the sum over heads of W_q^T W_k, is what a token asks of one at the same position.

    The queries of a group share their key, so that they can be added first. The weights of a `qk_norm` are folded in;
    what it divides by depends on the token and is not. Heads count as much as they write (audible.py).
    """
    sides = []
    for role in "qk":
        matrix = weights.get(role, layer) * _norm(weights, "norm1", layer)
        if weights.has(f"{role}_norm", layer):
            norm = weights.get(f"{role}_norm", layer)
            matrix = matrix * norm.repeat(len(matrix) // len(norm))[:, None]  # of one head, or of all
        sides.append(matrix)
    count = head_counts(weights)[layer]
    sides[0] = sides[0] * count.repeat_interleave(len(sides[0]) // len(count))[:, None]
    return _sum_over_groups(sides[0], weights, layer), sides[1]


def value_output(weights: Weights, layer: int) -> tuple[Tensor, Tensor]:
    """O and V [n, H]; O^T V, the sum over heads of W_o W_v, leads from what is attended to to what is written."""
    written = weights.get("o", layer).mT * _norm(weights, "norm1_after", layer)
    return _sum_over_groups(written, weights, layer), weights.get("v", layer) * _norm(weights, "norm1", layer)


def mlps(weights: Weights, layer: int) -> dict[str, Neurons]:
    """The MLP of a layer, which has to have a gate, as "mlp"; or its experts "0", "1", ..., "shared" if it has one."""
    return dict(each_mlp(weights, layer))


def each_mlp(weights: Weights, layer: int, most: int | None = None) -> Iterator[tuple[str, Neurons]]:
    """The same one at a time, with memory for one. most: of more neurons, as many are taken in even steps."""
    _require_gate(weights, layer)
    for name, faces in each_part(weights, layer, lambda rows: even_steps(len(rows), most)):
        yield name, Neurons(*faces)


def each_part(
    weights: Weights, layer: int, choose: Callable[[Tensor], slice | Tensor]
) -> Iterator[tuple[str, list[Tensor]]]:
    """The same of any MLP: gate, up and down [I, H] of each neuron; of an MLP without a gate, up and down.

    choose: from the first of these, which neurons are taken.
    """
    before, after = (_norm(weights, norm, layer) for norm in ("norm2", "norm2_after"))
    reading = [role for role in ("gate", "up") if weights.has(role, layer)]
    is_mixture = len(weights.shape("up", layer)) == 3
    for kind in ("", "shared_") if is_mixture and weights.has("shared_up", layer) else ("",):
        faces = (weights.matrices(f"{kind}{role}", layer) for role in (*reading, "down"))
        for number, (first, *others, down) in enumerate(zip(*faces, strict=True)):
            name, first = ("shared" if kind else str(number)) if is_mixture else "mlp", first.float() * before
            kept = choose(first)
            yield name, [first[kept], *(rows[kept].float() * before for rows in others), down.mT[kept].float() * after]


def mean_up(weights: Weights, layer: int, most: int | None = None) -> Tensor:
    """The up rows of a gated layer, the first `most` of them: [I, H]; the mean over the experts, if there are any."""
    _require_gate(weights, layer)
    total, count = 0, 0
    for rows in weights.matrices("up", layer):
        total, count = rows[:most].float() + total, count + 1
    return total / count * _norm(weights, "norm2", layer)


def even_steps(count: int, most: int | None) -> slice | Tensor:
    """Which of `count` neurons are taken where at most so many are wanted."""
    return slice(None) if most is None or count <= most else torch.linspace(0, count - 1, most).long()


def _require_gate(weights: Weights, layer: int) -> None:
    if not weights.has("gate", layer):
        raise Refusal(f"layer {layer} has no gated MLP")


def _norm(weights: Weights, role: str, layer: int) -> Tensor | float:
    """The weight of a norm; 1 where there is none."""
    return weights.get(role, layer) if weights.has(role, layer) else 1.0


def _sum_over_groups(rows: Tensor, weights: Weights, layer: int) -> Tensor:
    """[heads * D, H] -> [key-value heads * D, H]."""
    heads, kv_heads = weights.heads(layer)
    return rows.unflatten(0, (kv_heads, heads // kv_heads, -1)).sum(1).flatten(0, 1)
