"""Which layer of another model each expert came from, and how much of it is left.

What it measures
    The neurons of an expert are assigned to those of an MLP of the other model three times, by their three
    faces (matching.py): gate rows, up rows and down columns, each as numbers over shared tokens. k neurons get the
    same partner all three times; the effect is k / I. How many get it only twice shows how often training hides the
    origin of a neuron, and so how many neurons have none.
What leaves it unchanged
    Every gauge; the order of neurons and of experts; slicing. A narrower expert is assigned to some of the neurons.
What it cannot see
    Models without shared tokens; experts trained so long that nothing is left; which of several equal experts one came
    from. An expert moved into a model with other embeddings: it stands out, but its tokens are not those of its donor.
    Whether neurons do anything: dead ones count.
Source
    Ours. Drop-Upcycling: Nakamura et al. 2025, arXiv 2502.19261.

The p-value of an expert is nominal: the chance that assignments drawn at random agree so often. Strangers that learnt
similar features agree more often than that, so read the effect beside theirs.

Shapes: I neurons of the expert, I' of the MLP it is compared with, N tokens.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from minimoe.fingerprints.anchors import is_wide, shared_tokens
from minimoe.fingerprints.matching import Found, assign, read_both_features, read_token_features, similarities, thin_out
from minimoe.fingerprints.result import Result, explain_refusals
from minimoe.fingerprints.weights import Weights

Place = tuple[int, str]  # layer and expert
# Neurons of an expert that show which MLP to look at more closely: 16 miss the one with a quarter of them once in 100.
GLANCE, GLANCE_OF_WIDE = 256, 16
AT_ONCE = 32  # experts that are looked at together


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Where one expert seems to come from."""

    layer: int
    expert: str  # its number, "shared", or "mlp" for a dense layer
    parent_layer: int
    parent_expert: str  # as `expert`
    neurons: int  # I, or I' if that is smaller; at most as many as are looked for
    agreeing: int  # k
    drop_rate: float  # the share of neurons that did not come from there, estimated; 1 if nominal_p is above .01
    nominal_p: float  # times the number of MLPs that it was compared with (Bonferroni), at most 1

    @property
    def effect(self) -> float:
        """k / neurons, from 0 to 1."""
        return self.agreeing / self.neurons


@explain_refusals
def expert_attribution(a: Weights, b: Weights) -> Result:
    """Attribute the experts of one model to the layers of another.

    Args:
        a: the supposed parent, dense or a mixture.
        b: the suspect, a mixture; of a dense model, its MLPs.

    Returns:
        score: the mean effect.
        details: "layer 0 expert 3: parent_layer", "... : effect", "... : drop_rate" and "... : nominal_p".
        refused: too few shared tokens; no gated MLP.
    """
    found = attribute_experts(a, b)
    details = {
        f"layer {expert.layer} expert {expert.expert}: {field}": getattr(expert, field)
        for expert in found
        for field in ("parent_layer", "effect", "drop_rate", "nominal_p")
    }
    score = sum(expert.effect for expert in found) / len(found)
    return Result(score=score, details=details)


def attribute_experts(parent: Weights, suspect: Weights) -> list[Attribution]:
    """The most likely origin in `parent` of every expert, or MLP, of `suspect`.

    Of all MLPs and experts of the parent the one is taken in which most neurons have the same nearest neighbour by
    gate, up and down; assignments, which take far longer, are made to that one alone.
    """
    tokens = shared_tokens(parent, suspect)
    sources, experts = read_both_features(parent, suspect, tokens)
    glance = (GLANCE_OF_WIDE, torch.float32) if is_wide(parent, suspect) else (GLANCE, torch.float64)
    nearest = _nearest_sources(experts, sources, *glance)
    found = []
    for (layer, expert), features in experts.items():
        source = nearest[layer, expert]
        table = similarities(features, sources[source])
        agreeing, in_two = count_agreeing(table)
        _, rows, columns = table.shape
        nominal_p = min(1.0, len(sources) * nominal_p_value(agreeing, rows, columns))
        attribution = Attribution(
            layer=layer,
            expert=expert,
            parent_layer=source[0],
            parent_expert=source[1],
            neurons=min(rows, columns),
            agreeing=agreeing,
            drop_rate=1.0 if nominal_p > 0.01 else estimate_drop_rate(agreeing, in_two, rows, columns),
            nominal_p=nominal_p,
        )
        found.append(attribution)
    return found


@lru_cache(maxsize=16)
def trace_experts(parent: Weights, suspect: Weights) -> tuple[dict[Place, np.ndarray], dict[Place, float]]:
    """Of each expert, which neurons of each layer of a dense parent its own are [L, I], -1 for none; and its drop rate.

    A neuron is the one of the parent that is nearest by gate, by up and by down. Assignments, as `attribute_experts`
    makes them to the most likely layer, would take seconds for all layers.
    """
    tokens = shared_tokens(parent, suspect)
    sources, experts = (read_token_features(weights, tokens) for weights in (parent, suspect))
    partners = {}
    for place, expert in experts.items():
        gate, up, down = torch.stack([similarities(expert, source).argmax(-1) for source in sources.values()], dim=1)
        partners[place] = gate.where((gate == up) & (up == down), -1).numpy()
    return partners, {(found.layer, found.expert): found.drop_rate for found in attribute_experts(parent, suspect)}


def _nearest_sources(
    experts: Found, sources: Found, most: int, dtype: torch.dtype
) -> dict[tuple[int, str], tuple[int, str]]:
    """The source in which most of at most so many neurons of each expert have one nearest neighbour by all faces.

    Many experts are looked at together, so that the features of a source are widened to `dtype` once for all of them.
    """
    names, agreements = list(experts), {expert: {} for expert in experts}
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        glances = [thin_out(experts[expert], most) for expert in some]
        together, sizes = torch.cat(glances, dim=1).to(dtype), [glance.shape[1] for glance in glances]
        for source, features in sources.items():
            nearest = torch.stack([_nearest(together[face], features[face], face > 0) for face in range(3)])
            agreeing = (nearest == nearest[0]).all(0).float().split(sizes)
            for expert, share in zip(some, agreeing, strict=True):
                agreements[expert][source] = float(share.mean())
    return {expert: max(of_sources, key=of_sources.__getitem__) for expert, of_sources in agreements.items()}


def _nearest(x: Tensor, y: Tensor, is_free_in_sign: bool) -> Tensor:
    """For each row of x [n, N] the nearest of y [I, N], in the dtype of x: [n]."""
    products = x @ y.to(x.dtype).mT
    return (products.abs_() if is_free_in_sign else products).argmax(-1)


def count_agreeing(table: Tensor) -> tuple[int, int]:
    """How many rows of [3, I, I'] are assigned to the same column in all three, and how many in just two."""
    gate, up, down = (assign(face, seed) for seed, face in enumerate(table))
    pairs = torch.stack([(x == y) & (x >= 0) for x, y in ((gate, up), (gate, down), (up, down))]).sum(0)
    return int((pairs == 3).sum()), int((pairs == 1).sum())


def estimate_drop_rate(agreeing: int, in_two: int, rows: int, columns: int) -> float:
    """1 - s / neurons, where s neurons have an origin and each face finds it with one probability q.

    As in counting animals by recapture: of I rows and I' columns s q^3 are `agreeing`, at least 1, in all three faces
    and s 3 q^2 (1 - q) `in_two` alone, besides those without an origin that do so by chance. If training changed
    nothing, q = 1 and the rate is 1 - effect.
    """
    neurons = min(rows, columns)
    by_chance = 3 * (neurons - agreeing) / max(max(rows, columns) - agreeing, 1)
    q = 3 * agreeing / (3 * agreeing + max(in_two - by_chance, 0))
    return 1 - min(agreeing / q**3 / neurons, 1)


def nominal_p_value(agreeing: int, rows: int, columns: int) -> float:
    """The chance of at least so many agreements if up and down each hit a gate's partner with chance 1 / columns."""
    return float(stats.binom.sf(agreeing - 1, min(rows, columns), 1 / max(rows, columns) ** 2))
