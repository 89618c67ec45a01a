"""Three tests of whether two models were trained from independent random weights.

What they measure
    `csu`: neurons of one model are assigned to those of the other by the cosine of their up rows. Without a common
    origin the order of neurons is arbitrary, and so is the assignment: its Spearman correlation with the identity
    gives a p-value per layer, and Fisher's method one for all. From fingerprints, which hold a sketch of some rows of
    each layer, it is the same test with less power: their order is as arbitrary, so it is as exact.
    `permutation_test`: whether the neurons of two models resemble each other more in the order they are stored in than
    in random orders.
    `match`: whether an assignment by gates agrees with one by ups, both measured on shared tokens.
What leaves them unchanged
    csu and permutation test: training; folded norms, gauges of attention, and the order of experts, over which they
    average. match: every gauge.
What they cannot see
    csu and permutation test: copies whose neurons were permuted; models of other widths. Other signs and sizes of
    neurons weaken them, and so does another basis of the residual stream: what it leaves in place can still be seen,
    in the zoo enough after a random rotation (csu p = 6e-9), little or nothing after a permutation with signs. match:
    MLPs trained from scratch.
Source
    Zhu et al. 2025, arXiv 2502.12292.

The p-values of csu and of the permutation test are exact if the training of one of the two models treats neurons alike,
so that every order of them is as likely as any other, in each layer for itself; and if nobody chose one later, as
`minimoe.lineage.frame_neuron_order` does. (csu's takes Student's approximation for Spearman's rho.) match has none:
strangers that learnt similar features have large effects too.

Shapes: H hidden size, I neurons of an MLP or expert, L layers.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from minimoe.fingerprints.anchors import candidate_pairs, mean_of_pairs, pair_layers, shared_tokens
from minimoe.fingerprints.folded import Neurons, each_mlp, mean_up
from minimoe.fingerprints.matching import assign, nearest_agreement, read_both_features, similarities
from minimoe.fingerprints.result import SMALLEST_P, Features, Refusal, Result, explain_refusals
from minimoe.fingerprints.weights import Weights

FEWEST_NEURONS = 10  # for Student's approximation
MOST_NEURONS = 512  # of a layer, the first ones: their order is as arbitrary as that of all
MOST_EXPERTS = 16  # of a layer, whose mean is as good as that of all
KEPT, PROJECTIONS = 128, 32  # neurons of a layer in a fingerprint, and numbers of each


@explain_refusals
def csu(a: Weights, b: Weights) -> Result:
    """Test the order of up rows. Source: Zhu et al. 2025, algorithms 2 to 4.

    Where depths differ, layers are aligned by the similarity of assigned rows, which does not depend on their order:
    the p-value stays exact.

    Returns:
        score: mean Spearman correlation over paired layers.
        p_value: at least 1e-300.
        refused: hidden sizes or MLP widths differ, MLPs have fewer than 10 neurons, or weights are not finite.
    """
    return compare_ups(read_ups(a), read_ups(b))


def read_ups(weights: Weights) -> Features:
    """The first up rows of each layer under its number, [at most 512, H]; "shapes", [I, H] of each, [L, 2]."""
    shapes, ups = [], {}
    for layer in range(weights.num_layers):
        ups[str(layer)] = mean_up(weights, layer, MOST_NEURONS).numpy()
        shapes.append(weights.shape("up", layer)[-2:])
    return {"shapes": np.array(shapes), **ups}


def shrink_ups(ups: Features) -> Features:
    """A sketch: the first 128 rows of each layer, scaled to 1, projected to 32 numbers, in float16.

    The projections are random signs, the same for all models of a width, from the bits of a hash: they treat all
    neurons alike, which is all that an exact p-value takes. They keep cosines to about 1 / sqrt(32) (Achlioptas 2003,
    Database-friendly random projections).
    """
    sketch = {"shapes": ups["shapes"]}
    for layer, (_, hidden) in enumerate(ups["shapes"]):
        digest = hashlib.shake_256(b"minimoe csu").digest(int(hidden) * PROJECTIONS // 8)
        bits = np.unpackbits(np.frombuffer(digest, np.uint8)).reshape(hidden, PROJECTIONS)
        rows = F.normalize(torch.from_numpy(ups[str(layer)][:KEPT]), dim=1)
        sketch[str(layer)] = (rows @ torch.from_numpy(2.0 * bits - 1).float()).half().numpy()
    return sketch


def compare_ups(a: Features, b: Features) -> Result:
    """What `csu` says of two models, from their up rows, or from sketches of both."""
    left, right = ([_unit_rows(ups[str(layer)]) for layer in range(len(ups["shapes"]))] for ups in (a, b))
    scores, tests = torch.zeros(len(left), len(right), dtype=torch.float64), {}
    for i, j in candidate_pairs(*scores.shape):
        _require_shape(a["shapes"][i], b["shapes"][j])
        order = torch.arange(len(left[i]))
        if len(order) < FEWEST_NEURONS:
            raise Refusal(f"{len(order)} neurons: wanted at least {FEWEST_NEURONS}, for a p-value")
        cosine = left[i] @ right[j].mT
        if not cosine.isfinite().all():
            raise Refusal("the products of the up rows of two layers are not finite")
        found = assign(cosine)
        scores[i, j], tests[i, j] = cosine[order, found].mean(), spearman(found, order)
    rhos, p_values = zip(*(tests[pair] for pair in pair_layers(scores)), strict=True)
    return Result(score=sum(rhos) / len(rhos), p_value=fisher(p_values), details={"layers": len(rhos)})


@explain_refusals
def permutation_test(a: Weights, b: Weights, *, trials: int = 999, seed: int = 0) -> Result:
    """Test the order of neurons by reordering them. Source: Zhu et al. 2025, algorithm 1.

    Args:
        a, b: models of the same depth, hidden size and MLP width.
        trials: T random orders are drawn, with `seed`.

    Returns:
        score: cosine of the two models' neurons, gates, ups and downs together, of the first 512 of a layer; mean over
            layers.
        p_value: (1 + how many random orders reach the score) / (T + 1).
        refused: the shapes differ; the neurons of a layer are 0 or not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    score, shuffled = 0.0, torch.zeros(trials)
    if a.num_layers != b.num_layers:
        raise Refusal(f"{a.num_layers} and {b.num_layers} layers: wanted the same number")
    for layer in range(a.num_layers):
        _require_shape(*(weights.shape("up", layer)[-2:] for weights in (a, b)))
        table = _neuron_products(_neurons(a, layer), _neurons(b, layer))
        score += float(table.diagonal().sum()) / a.num_layers
        orders = torch.rand(trials, len(table), generator=generator).argsort(dim=1)  # of its columns
        shuffled += table[torch.arange(len(table)), orders].sum(1) / a.num_layers
    reached = int((shuffled >= score).sum())
    details = {"trials": trials, "mean_of_random_orders": float(shuffled.mean())}
    return Result(score=score, p_value=(1 + reached) / (trials + 1), details=details)


@explain_refusals
def match(a: Weights, b: Weights) -> Result:
    """Compare an assignment of neurons by gates with one by ups, in models of any shape (Zhu et al. 2025, algorithm 5).

    Of a mixture, each expert of `b` is compared with the nearest one of the same layer of `a`; of more than 16, every
    second, third, ...

    Returns:
        score: Spearman correlation of the two assignments, mean over experts and paired layers.
        refused: too few shared tokens; there is no gated MLP.
    """
    tokens = shared_tokens(a, b)
    left, right = ([[] for _ in range(weights.num_layers)] for weights in (a, b))  # [2, I, N] of each MLP or expert
    for found, of_layers in zip(read_both_features(a, b, tokens), (left, right), strict=True):
        for (layer, _), features in found.items():
            of_layers[layer].append(features[:2])
    scores = torch.zeros(len(left), len(right), dtype=torch.float64)
    for i, j in candidate_pairs(len(left), len(right)):
        experts = right[j][:: -(-len(right[j]) // MOST_EXPERTS)]
        scores[i, j] = sum(_gate_against_up(expert, left[i]) for expert in experts) / len(experts)
    return Result(score=mean_of_pairs(scores), details={"layers": min(scores.shape)})


def _unit_rows(rows: np.ndarray) -> Tensor:
    return F.normalize(torch.from_numpy(rows).float(), dim=1)


def spearman(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Spearman's rho of two orders, and the p-value of one at least as large by chance."""
    found = stats.spearmanr(x.numpy(), y.numpy(), alternative="greater")
    return float(found.statistic), float(found.pvalue)


def fisher(p_values: Sequence[float]) -> float:
    """One p-value of several independent ones (Fisher 1932)."""
    return max(float(stats.combine_pvalues(np.maximum(p_values, SMALLEST_P)).pvalue), SMALLEST_P)


def _neuron_products(x: Neurons, y: Neurons) -> Tensor:
    """What pairs of neurons add to the cosine of all of them, [I, I]: its trace is that cosine."""
    faces = list(zip(x, y, strict=True))
    table = sum((left @ right.mT) / (left.norm() * right.norm()) for left, right in faces) / len(faces)
    if not table.isfinite().all():
        raise Refusal("the neurons of a layer are 0 or not finite")
    return table


def _neurons(weights: Weights, layer: int) -> Neurons:
    """Gate, up and down of the first neurons of a layer, [I, H] each; the mean over the experts, if there are any.

    One order of neurons for all experts of a layer is what chance may choose: upcycled experts are not independent.
    """
    total, count = (0, 0, 0), 0
    for name, neurons in each_mlp(weights, layer):
        if name != "shared":
            total = [so_far + face[:MOST_NEURONS] for so_far, face in zip(total, neurons, strict=True)]
            count += 1
    return Neurons(*(face / count for face in total))


def _require_shape(x: Sequence[int], y: Sequence[int]) -> None:
    """Of two shapes [I, H]."""
    if tuple(x) != tuple(y):
        shapes = " and ".join(f"{rows} neurons of {columns} weights" for rows, columns in (x, y))
        raise Refusal(f"{shapes}: wanted equal shapes")


def _gate_against_up(expert: Tensor, others: list[Tensor]) -> float:
    """Spearman's rho of the two assignments of an expert [2, I, N] to the nearest of `others`."""
    tables = [similarities(expert, other) for other in others]
    table = max(tables, key=nearest_agreement)
    gates, ups = (assign(face if len(face) <= len(face.mT) else face.mT, seed) for seed, face in enumerate(table))
    return spearman(gates, ups)[0]
