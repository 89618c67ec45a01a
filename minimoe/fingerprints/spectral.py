"""Whether the singular values of two models' attention agree (GhostSpec).

What it measures
    The singular values of W_q^T W_k and of W_o W_v, norms folded, per layer. Both lists are cut to the smaller
    effective rank and scaled to [0, 1]; their mean squared distance is taken layer by layer.
What leaves it unchanged
    Every gauge. No token, no alignment and no order of dimensions is needed.
What it cannot see
    Much: strangers of the same shape and training have spectra that are close. It looks at no MLP and at no bias.
Source
    Wang et al. 2025, arXiv 2511.06390. Effective rank: Roy & Vetterli 2007.

Shapes: H hidden size, L layers.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.fingerprints.anchors import mean_of_pairs
from minimoe.fingerprints.folded import query_key, value_output
from minimoe.fingerprints.result import Features, Refusal, Result, explain_refusals
from minimoe.fingerprints.weights import Weights

PRODUCTS = {"query_key": query_key, "value_output": value_output}
KEPT = 256  # singular values of a product in a fingerprint


@explain_refusals
def spectral(a: Weights, b: Weights) -> Result:
    """Compare the spectra of two models, of any shape.

    Returns:
        score: 1 less the root mean squared distance, mean of both products over paired layers; 1 for equal spectra.
        refused: a product is 0, of rank 1, a rotation, or not finite.
    """
    return compare_spectra(read_spectra(a), read_spectra(b))


def read_spectra(weights: Weights) -> Features:
    """The singular values of both products in descending order, [L, H] each."""
    spectra = {"hidden_size": np.array(weights.hidden_size)}
    for name, read in PRODUCTS.items():
        values = []
        for layer in weights.layers_with("q"):
            values.append(singular_values(*read(weights, layer)).numpy())
        spectra[name] = np.stack(values)
    return spectra


def shrink_spectra(spectra: Features) -> Features:
    """At most `KEPT` values of each: the first ones, and ever fewer further down, where they fall slowly."""
    kept = _places(int(spectra["hidden_size"]))
    return {name: array[..., kept] if array.ndim else array for name, array in spectra.items()}


def compare_spectra(a: Features, b: Features) -> Result:
    """What `spectral` says of two models, from their spectra; what was not kept is interpolated linearly."""
    scores = 0
    for name in PRODUCTS:
        left, right = (_complete(spectra[name], int(spectra["hidden_size"])) for spectra in (a, b))
        scores += torch.tensor([[similarity(x, y) for y in right] for x in left], dtype=torch.float64) / 2
    return Result(score=mean_of_pairs(scores), details={"layers": min(scores.shape)})


def _places(hidden: int) -> np.ndarray:
    """Which of H values are kept: all of them, or a geometric sequence, the smallest and the largest included."""
    return np.arange(hidden) if hidden <= KEPT else np.unique(np.geomspace(1, hidden, KEPT).round().astype(int)) - 1


def _complete(values: np.ndarray, hidden: int) -> Tensor:
    """All values, [L, H], of all or of those that are kept."""
    if values.shape[1] == hidden:
        return torch.from_numpy(values)
    places = _places(hidden)
    return torch.tensor(np.stack([np.interp(np.arange(hidden), places, row) for row in values]))


def singular_values(x: Tensor, y: Tensor) -> Tensor:
    """All H of x^T y [H, H] in descending order, from x and y [n, H].

    Where n < H, as where queries share keys, they are those of a product [n, n] of triangles, by the QR of x^T and y^T.
    """
    rows, hidden = x.shape
    if rows >= hidden:
        return torch.linalg.svdvals(_finite(x.mT @ y))
    triangles = (torch.linalg.qr(side.mT, mode="r").R for side in (x, y))
    return F.pad(torch.linalg.svdvals(_finite(next(triangles) @ next(triangles).mT)), (0, hidden - rows))


def _finite(product: Tensor) -> Tensor:
    if not product.isfinite().all() or not product.any():
        raise Refusal("a product of attention weights is 0 or not finite")
    return product


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values divided by their sum: from 1 to their number."""
    shares = values / values.sum()
    return math.exp(float(torch.special.entr(shares).sum()))


def similarity(x: Tensor, y: Tensor) -> float:
    """1 less the root mean squared distance of two spectra."""
    rank = math.ceil(min(effective_rank(x), effective_rank(y)))
    if rank < 2:
        raise Refusal("a product of attention weights has effective rank 1")
    if not all(values[0] > values[rank - 1] for values in (x, y)):
        raise Refusal("the singular values of a product of attention weights are all the same")
    x, y = ((values[:rank] - values[rank - 1]) / (values[0] - values[rank - 1]) for values in (x, y))
    return 1 - float((x - y).square().mean().sqrt())
