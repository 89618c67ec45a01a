"""How much a head or a neuron counts: by what it writes.

A part that writes nothing can have any weights, those of another model too. So each counts from 0 to 1, which a tenth
of the root mean square of its layer is enough for. Parts that read alike are heard together: they may undo each other.

Shapes: H hidden size, n heads or neurons.
"""

import torch
from torch import Tensor

from minimoe.fingerprints.anchors import WIDE
from minimoe.fingerprints.weights import Weights, read_once

ALIKE = 0.98  # the cosine from which on two parts read the same
AUDIBLE = 0.1  # of the root mean square: who writes so much counts in full
DIMENSIONS = 256  # of a wide residual stream, in which heads are compared


def loudness(alike: Tensor, together: Tensor) -> Tensor:
    """What each part writes with all that read like it, a share each: root mean square [n].

    Args:
        alike: whether two parts read the same, [n, n].
        together: the mean inner products of what they write, [n, n].
    """
    alike = alike.to(together)
    heard = alike.to_sparse() @ together  # most read like no other
    return (heard * alike).sum(1).clamp(min=0).sqrt() / alike.sum(1).clamp(min=1)


def counts_of(loud: Tensor, mean: float) -> Tensor:
    """From what they write, and from the root mean square of a layer."""
    return (loud / max(AUDIBLE * mean, torch.finfo(loud.dtype).tiny)).clamp(max=1)


@read_once
def head_counts(weights: Weights) -> dict[int, Tensor]:
    """How much each head of each layer with attention counts, [heads].

    Those that ask louder than any that counts in full are turned down to it.
    """
    counts = {}
    for layer in weights.layers_with("q"):
        reads, writes = _of_heads(weights, layer)
        sizes = reads.diagonal().clamp(min=torch.finfo(reads.dtype).tiny).sqrt()
        loud = loudness((reads / sizes / sizes[:, None]).abs() > ALIKE, writes)
        count = counts_of(loud, float(loud.square().mean().sqrt()))
        counts[layer] = count * (sizes[count == count.max()].max() / sizes).clamp(max=1)
    return counts


def _of_heads(weights: Weights, layer: int) -> tuple[Tensor, Tensor]:
    """The inner products of the W_q^T W_k of heads, and of their W_o W_v: [heads, heads] each.

    Norm weights are folded in; wide models are looked at in some dimensions of the residual stream.
    """
    heads, kv_heads = weights.heads(layer)
    size = weights.hidden_size
    kept = torch.linspace(0, size - 1, DIMENSIONS).long() if size > WIDE else torch.arange(size)
    norm = weights.get("norm1", layer)[kept] if weights.has("norm1", layer) else 1.0
    q, k, v = (weights.get(role, layer)[:, kept] * norm for role in "qkv")
    o = weights.get("o", layer)[kept].mT
    sides = ((q, k), (o, v))
    return tuple(
        _products(*(rows.unflatten(0, (count, -1)) for rows, count in zip(pair, (heads, kv_heads), strict=True)))
        for pair in sides
    )


def _products(x: Tensor, y: Tensor) -> Tensor:
    """The inner products of x^T y of heads, from x [heads, D, H] and y [heads of keys and values, D, H]."""
    of_heads = (x.mT @ y.repeat_interleave(len(x) // len(y), dim=0)).flatten(1)
    return of_heads @ of_heads.mT
