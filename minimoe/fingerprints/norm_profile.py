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

import numpy as np
import torch
import torch.nn.functional as F

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
    """ "layers", both norms of every layer, [L, 2, H] float64, and "final", that at the end, [H].

    Where there are none before attention and MLP, they are those after them.
    """
    layers = [[_norm(weights, role, layer) for role in ("norm1", "norm2")] for layer in range(weights.num_layers)]
    final = _norm(weights, "norm_final", None)
    return {"hidden_size": np.array(len(final)), "layers": np.array(layers), "final": final}


def shrink_norms(norms: Features) -> Features:
    """At most `KEPT` dimensions in even steps, in float32: r is off in the third digit, for strangers by 1 / 16."""
    hidden = int(norms["hidden_size"])
    kept = np.linspace(0, hidden - 1, min(hidden, KEPT)).round().astype(int)
    return {name: array[..., kept].astype(np.float32) if array.ndim else array for name, array in norms.items()}


def compare_norms(a: Features, b: Features) -> Result:
    """What `norm_profile` says of two models, from their norms."""
    if a["hidden_size"] != b["hidden_size"]:
        raise Refusal(f"hidden sizes {a['hidden_size']} and {b['hidden_size']}: wanted the same")
    details = {}
    for name, centred in (("pearson", True), ("cosine", False)):
        parts = [torch.from_numpy(norms[part]).double() for part in ("layers", "final") for norms in (a, b)]
        if centred:
            parts = [part - part.mean(-1, keepdim=True) for part in parts]
        left, right = (F.normalize(layers, dim=-1) for layers in parts[:2])
        cosines = torch.einsum("irh,jrh->ij", left, right) / 2  # [L, L'], mean of both norms of a layer
        if centred:
            pairs = pair_layers(cosines)
        final = torch.cosine_similarity(*parts[2:], dim=0)
        total = 2 * sum(float(cosines[pair]) for pair in pairs) + float(final)
        details[name] = total / (2 * min(cosines.shape) + 1)
    return Result(score=details["pearson"], details=details)


def _norm(weights: Weights, role: str, layer: int | None) -> np.ndarray:
    if weights.has(f"{role}_after", layer) and not weights.has(role, layer):
        role = f"{role}_after"
    where = f"{weights.name}: {role}" + ("" if layer is None else f" of layer {layer}")
    if not weights.has(role, layer):
        raise Refusal(f"{where} has no weights")
    norm = weights.get(role, layer).double()
    if (norm == norm[0]).all():
        raise Refusal(f"{where} is {float(norm[0]):.4g} throughout: folded or never trained")
    return norm.numpy()
