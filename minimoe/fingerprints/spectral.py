"""Whether the singular values of two models' attention agree (GhostSpec).

What it measures
    The singular values of W_q^T W_k and of W_o W_v, norms folded, per layer. Both lists are cut to the smaller
    effective rank and scaled to [0, 1]; their mean squared distance is taken layer by layer.
What leaves it unchanged
    Every gauge. No token, no alignment and no order of dimensions is needed.
What it cannot see
    Much: strangers of the same shape and training have spectra that are close. MLPs, values of single heads.
Source
    Wang et al. 2025, arXiv 2511.06390. Effective rank: Roy & Vetterli 2007.

There is no p-value: compare the score with those of strangers. Shapes: H hidden size, L layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minimoe.fingerprints.anchors import mean_of_pairs
from minimoe.fingerprints.folded import query_key, value_output
from minimoe.fingerprints.result import Refusal, Result
from minimoe.fingerprints.weights import Weights


def spectral(a: Weights, b: Weights) -> Result:
    """Compare the spectra of two models.

    Args:
        a: one model.
        b: the other, of any shape.

    Returns:
        score: 1 less the root mean squared distance, mean of both products over paired layers; 1 for equal spectra.
        refused: a product is 0, of rank 1, or not finite.
    """
    try:
        scores = torch.zeros(a.num_layers, b.num_layers, dtype=torch.float64)
        for product in (query_key, value_output):
            left, right = ([_spectrum(product(w, layer)) for layer in range(w.num_layers)] for w in (a, b))
            scores += torch.tensor([[similarity(x, y) for y in right] for x in left], dtype=torch.float64) / 2
    except Refusal as reason:
        return Result(method="spectral", refused=str(reason))
    return Result(method="spectral", score=mean_of_pairs(scores), details={"layers": min(scores.shape)})


def _spectrum(product: Tensor) -> Tensor:
    """Singular values in descending order, [H]."""
    if not product.isfinite().all() or not product.any():
        raise Refusal("a product of attention weights is 0 or not finite")
    return torch.linalg.svdvals(product)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values divided by their sum: from 1 to their number."""
    shares = values / values.sum()
    return math.exp(float(torch.special.entr(shares).sum()))


def similarity(x: Tensor, y: Tensor) -> float:
    """1 less the root mean squared distance of two spectra."""
    rank = math.ceil(min(effective_rank(x), effective_rank(y)))
    if rank < 2:
        raise Refusal("a product of attention weights has effective rank 1")
    x, y = (_to_unit_range(values[:rank]) for values in (x, y))
    return 1 - float((x - y).square().mean().sqrt())


def _to_unit_range(values: Tensor) -> Tensor:
    return (values - values[-1]) / (values[0] - values[-1])
