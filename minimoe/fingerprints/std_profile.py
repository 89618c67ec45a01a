"""Whether the spread of the attention weights changes with depth in the same way in two models (HonestAGI).

What it measures
    The standard deviation of Q, K, V and O in every layer: four curves over depth, z-scored. Pearson's r between the
    curves of two models, mean of the four.
What leaves it unchanged
    Permutations of heads, neurons, experts and of the residual stream; one factor on all weights of a role. Nearly:
    flipped signs, and rotations that find the norms folded; they keep the sum of squares, and means are close to 0.
What it cannot see
    Whatever happens outside attention. It is changed by folding norms, by factors that queries and keys exchange, and
    by maps that values and outputs do: so a stranger can be given the profile of any model, its function unchanged
    (`minimoe.lineage.frame_std_profile`). Strangers of one shape share a trend over depth, and correlate. A curve that
    is nearly flat is noise once z-scored, and refused.
Source
    Yoon et al. 2025, arXiv 2507.03014.

Shapes: L layers.
"""

import numpy as np

from minimoe.fingerprints.result import Features, Refusal, Result, explain_refusals
from minimoe.fingerprints.weights import Weights

ATTENTION = ("q", "k", "v", "o")
LEAST_SPREAD = 0.01  # of a curve: its standard deviation divided by its mean
LEAST_LAYERS = 3  # two points correlate perfectly with any two


@explain_refusals
def std_profile(a: Weights, b: Weights, *, roles: tuple[str, ...] = ATTENTION) -> Result:
    """Compare the standard deviations of two models, of any shape; the curve of fewer layers is interpolated linearly.

    Args:
        roles: of a layer; the published method knows the four, and biases and norms such as "q_bias" and "norm1".

    Returns:
        score: the mean r.
        details: r of each role as "q", and the spread sd / mean of its curves as "q_spread_a" and "q_spread_b".
        refused: a spread is below 1 %; a model has fewer than 3 layers; a weight is not finite, or 0 throughout.

    Raises KeyError: a model lacks one of the roles.
    """
    return compare_std_profiles(*(read_std_profile(weights, roles) for weights in (a, b)))


def read_std_profile(weights: Weights, roles: tuple[str, ...] = ATTENTION) -> Features:
    """The curve of each role, [L]: its standard deviation in every layer."""
    curves = {}
    for role in roles:
        layers = weights.layers_with(role)
        if len(layers) < LEAST_LAYERS:
            raise Refusal(f"{weights.name}: {len(layers)} layers, wanted at least {LEAST_LAYERS} to correlate")
        curves[role] = np.array([weights.statistics(role, layer).std for layer in layers])
        spread = _spread(curves[role])
        if not spread >= LEAST_SPREAD:
            raise Refusal(
                f"{weights.name}: the standard deviation of {role} varies by {spread:.2%} over the layers, wanted at "
                f"least {LEAST_SPREAD:.0%}: a curve as flat as that is mostly noise"
            )
    return curves


def compare_std_profiles(a: Features, b: Features) -> Result:
    """What `std_profile` says of two models, from their curves."""
    correlations = {role: _pearson(a[role], b[role]) for role in a}
    spreads = {f"{role}_spread_{side}": _spread(curves[role]) for role in a for side, curves in (("a", a), ("b", b))}
    score = sum(correlations.values()) / len(correlations)
    return Result(score=score, details=correlations | spreads)


def _spread(curve: np.ndarray) -> float:
    mean = curve.mean()
    return float(curve.std() / mean) if mean else 0.0


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    depths = np.linspace(0, 1, max(len(a), len(b)))
    a, b = (np.interp(depths, np.linspace(0, 1, len(curve)), curve) for curve in (a, b))
    z_a, z_b = ((curve - curve.mean()) / curve.std() for curve in (a, b))
    return float((z_a * z_b).mean())
