"""Whether the weights of the norms agree, dimension by dimension.

What it measures
    For every norm of the residual stream, Pearson's r between its weights in two models, and beside it their cosine.
    The two differ in one thing: for r, each model's mean is taken off first.
What leaves it unchanged
    All that does not touch these norms: gauges of attention, of MLPs and of mixtures. Fine-tuning moves them little.
What it cannot see
    Copies whose residual stream was permuted; folded norms, which are 1 throughout, are refused. Norm weights lie
    around a mean far from 0, so that their cosine is near 1 for any two models: the score is r. Norms can be
    replaced by those of another model, its function unchanged (`minimoe.lineage.frame_norms`), so a stranger can reach
    1 in both.

Shapes: H hidden size, L layers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minimoe.fingerprints.anchors import pair_layers
from minimoe.fingerprints.result import Features, Refusal, Result, explain_refusals
from minimoe.fingerprints.weights import Weights

KEPT = 256  # dimensions of the residual stream in a fingerprint


@explain_refusals
def norm_profile(a: Weights, b: Weights) -> Result:
    """Compare the norm weights of two models of the same hidden size; of two depths, layers are aligned by r.

    Returns:
        score: the mean r over the norms of paired layers and the final norm. A norm without a partner in a deeper model
        counts 0. details: "pearson", which is the score, and "cosine", its counterpart.
        refused: the hidden sizes differ; the weights of a norm are all the same (folded, or never trained) or not
        finite.
    """
    return compare_norms(read_norms(a), read_norms(b))


def read_norms(weights: Weights) -> Features:
    """ "layers", both norms of every layer, [L, 2, H] float64, and "final", that at the end, [H]."""
    layers = [[_norm(weights, role, layer) for role in ("norm1", "norm2")] for layer in range(weights.num_layers)]
    final = _norm(weights, "norm_final", None)
    return {"hidden_size": np.array(len(final)), "layers": np.array(layers), "final": final}


def shrink_norms(norms: Features) -> Features:
    """At most `KEPT` dimensions of them, in even steps, in float32.

    For relatives r of so many is r of all but for the third digit; for strangers it is off by 1 / 16, before the mean.
    """
    hidden = int(norms["hidden_size"])
    kept = np.linspace(0, hidden - 1, min(hidden, KEPT)).round().astype(int)
    return {name: array[..., kept].astype(np.float32) if array.ndim else array for name, array in norms.items()}


def compare_norms(a: Features, b: Features) -> Result:
    """What `norm_profile` says of two models, from their norms."""
    if a["hidden_size"] != b["hidden_size"]:
        raise Refusal(f"hidden sizes {a['hidden_size']} and {b['hidden_size']}: wanted the same")
    layers_a, final_a, layers_b, final_b = (
        torch.from_numpy(norms[name]).double() for norms in (a, b) for name in ("layers", "final")
    )
    pearson = _cosines(_centre(layers_a), _centre(layers_b))
    pairs = pair_layers(pearson)
    details = {
        "pearson": _mean(pearson, pairs, _centre(final_a), _centre(final_b)),
        "cosine": _mean(_cosines(layers_a, layers_b), pairs, final_a, final_b),
    }
    return Result(score=details["pearson"], details=details)


def _norm(weights: Weights, role: str, layer: int | None) -> np.ndarray:
    norm = weights.get(role, layer).double()
    if (norm == norm[0]).all():
        where = f"{weights.name}: {role}" + ("" if layer is None else f" of layer {layer}")
        raise Refusal(f"{where} is {float(norm[0]):.4g} throughout: folded or never trained")
    return norm.numpy()


def _centre(norms: Tensor) -> Tensor:
    return norms - norms.mean(-1, keepdim=True)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine over both norms of each layer of `a` [L, 2, H] and each of `b` [L', 2, H]: [L, L']."""
    unit_a, unit_b = (torch.nn.functional.normalize(norms, dim=-1) for norms in (a, b))
    return torch.einsum("irh,jrh->ij", unit_a, unit_b) / 2


def _mean(cosines: Tensor, pairs: list[tuple[int, int]], final_a: Tensor, final_b: Tensor) -> float:
    """Over the two norms of each pair of layers, and the final norm."""
    final = torch.cosine_similarity(final_a, final_b, dim=0)
    return (2 * sum(float(cosines[pair]) for pair in pairs) + float(final)) / (2 * min(cosines.shape) + 1)
