"""Whether two models hold the same numbers in the same places (PCS).

What it measures
    The cosine of the flattened weights of two models, matrix by matrix.
What leaves it unchanged
    One factor on all weights of a matrix; nothing else. Fine-tuning, merging and quantising move it little.
What it cannot see
    A copy whose heads, neurons, experts or residual stream were permuted or rotated: the matrices that were touched
    look like those of a stranger, near 0. Folded norms and other rescaling only lower the cosine. A high one says that
    the numbers are the same; a low one says nothing.
Source
    Parameter cosine similarity, which Zeng et al. 2023, arXiv 2312.04828 (HuRef) start from.

Shapes: L layers.
"""

import math
from itertools import islice

import torch

from minimoe.fingerprints.anchors import align_layers
from minimoe.fingerprints.result import Refusal, Result, explain_refusals
from minimoe.fingerprints.weights import Weights, one_thread

MATRICES = ("q", "k", "v", "o", "gate", "up", "down", "router", "shared_gate", "shared_up", "shared_down")


@explain_refusals
def weight_cosine(a: Weights, b: Weights) -> Result:
    """Compare the matrices of two models that have the same shape in both.

    Where only one is a mixture, attention is left to compare. Of two depths, layers are aligned.

    Returns:
        score: the mean over the matrices of paired layers; a layer without a partner in a deeper model counts 0.
        details: the cosine of each matrix by role and layer of `a`, as "q.0".
        refused: no matrix has the same shape in both; one is not finite, or 0 throughout.
    """
    if a.num_layers == b.num_layers:
        pairs = [(layer, layer) for layer in range(a.num_layers)]
    else:  # by the first numbers of each matrix: a quarter million give a cosine to .002
        scores = [[_mean(_cosines(a, b, i, j, pieces=1)) for j in range(b.num_layers)] for i in range(a.num_layers)]
        pairs = align_layers(torch.tensor(scores))
    total, details = 0, {}
    for i, j in pairs:
        cosines = _cosines(a, b, i, j)
        total += _mean(cosines)
        details |= {f"{role}.{i}": cosine for role, cosine in cosines.items()}
    return Result(score=total / min(a.num_layers, b.num_layers), details=details)


def _mean(cosines: dict[str, float]) -> float:
    return sum(cosines.values()) / len(cosines)


def _cosines(a: Weights, b: Weights, layer_a: int, layer_b: int, pieces: int | None = None) -> dict[str, float]:
    """Of each matrix that has the same shape in both layers; `pieces`: of its first ones only."""
    found = {
        role: _cosine(a, b, role, layer_a, layer_b, pieces)
        for role in MATRICES
        if a.has(role, layer_a) and b.has(role, layer_b) and a.shape(role, layer_a) == b.shape(role, layer_b)
    }
    if not found:
        layer = a.layers_with("q")[0]
        shapes = " and ".join(str(list(weights.shape("q", weights.layers_with("q")[0]))) for weights in (a, b))
        raise Refusal(f"no matrix of layers {layer_a} and {layer_b} has the same shape; q of layer {layer} is {shapes}")
    return found


@one_thread()
def _cosine(a: Weights, b: Weights, role: str, layer_a: int, layer_b: int, pieces: int | None) -> float:
    """Of one matrix. Sums within a piece are float32, those over pieces float64."""
    both = of_a = of_b = 0.0
    for (of_x, x), (of_y, y) in islice(zip(a.pieces(role, layer_a), b.pieces(role, layer_b), strict=True), pieces):
        both += torch.dot(x, y).item()
        of_a += torch.dot(x, x).item()
        of_b += torch.dot(y, y).item()
        for weights, name, squares in ((a, of_x, of_a), (b, of_y, of_b)):
            if not math.isfinite(squares):
                raise Refusal(f"{weights.name}: {name} holds NaN, infinity or numbers too large to square")
    for weights, layer, squares in ((a, layer_a, of_a), (b, layer_b, of_b)):
        if squares == 0:
            raise Refusal(f"{weights.name}: {role} of layer {layer} holds nothing but zeros")
    return both / math.sqrt(of_a * of_b)
