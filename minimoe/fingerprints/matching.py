"""Neurons of two models matched by what they do to shared tokens.

A neuron of a gated MLP has three faces: how strongly each token opens its gate, how strongly each token drives it, and
which tokens it speaks for. They are vectors over tokens, whatever basis the residual stream has. The scale of up and
down is free, and with it their sign; the sign of a gate is not.

Shapes: F 3, for gate, up and down; H hidden size, I neurons of an MLP or expert, N tokens.
"""

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from minimoe.fingerprints.anchors import WIDE, Anchors, read_anchors
from minimoe.fingerprints.folded import Neurons, each_mlp, even_steps
from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.weights import Weights, read_once

Found = dict[tuple[int, str], Tensor]  # features of an MLP or expert [F, I, N], by layer and name

MOST = 320  # neurons that are looked for: a share of them is known to .03
MOST_OF_A_LAYER, FEWEST = 3072, 48  # in all of its experts, but at least so many of each


def read_both_features(a: Weights, b: Weights, tokens: list[str]) -> tuple[Found, Found]:
    """The features of two models. Of the narrower MLPs only as many neurons are read as are looked for.

    Of equally wide ones those of the model with more experts, or else of `b`, are looked for.
    """
    sought, _ = sorted((b, a), key=lambda weights: (_width(weights), -weights.num_experts))
    experts = max(1, sought.num_experts)
    most = min(MOST, max(FEWEST, MOST_OF_A_LAYER // experts))
    left, right = (read_token_features(weights, tokens, most if weights is sought else None) for weights in (a, b))
    return left, right


@read_once
def read_token_features(weights: Weights, tokens: list[str], most: int | None = None) -> Found:
    """The `token_features` of every MLP or expert; of more than `most` neurons, as many are taken in even steps."""
    anchors = read_anchors(weights, tokens)
    return {
        (layer, name): token_features(neurons, anchors)
        for layer in range(weights.num_layers)
        for name, neurons in each_mlp(weights, layer, most)
    }


def _width(weights: Weights) -> int:
    """Of the first MLP, or of one of its experts; 0 where there is none with a gate."""
    layers = (layer for layer in range(weights.num_layers) if weights.has("gate", layer))
    return next((weights.shape("gate", layer)[-2] for layer in layers), 0)


def token_features(neurons: Neurons, anchors: Anchors) -> Tensor:
    """Gate, up and down of each neuron over tokens, centred and of norm 1: [F, I, N] float32, from sums in float64.

    In wide models from sums in float32, which takes half the time: among so many neurons, no score hangs on one.
    """
    faces = (neurons.gate, anchors.inputs), (neurons.up, anchors.inputs), (neurons.down, anchors.outputs)
    dtype = torch.float32 if neurons.gate.shape[1] > WIDE else torch.float64
    over_tokens = (of_neurons.to(dtype) @ of_tokens.to(dtype).mT for of_neurons, of_tokens in faces)
    features = torch.stack([F.normalize(x - x.mean(-1, keepdim=True), dim=-1).float() for x in over_tokens])
    if not features.isfinite().all() or not features.any(-1).any(-1).all():
        raise Refusal("the neurons of an MLP are 0 or not finite")
    return features


def similarities(x: Tensor, y: Tensor) -> Tensor:
    """Correlation of features [F, I, N] with [F, I', N]: [F, I, I'], absolute for up and down.

    In float64: where neurons are found nowhere, an assignment is among near ties, and must not hang on rounding.

    Of more than `MOST` neurons on the narrower side, as many are taken in even steps, and looked for among all others.
    """
    x, y = (thin_out(x), y) if x.shape[1] <= y.shape[1] else (x, thin_out(y))
    products = torch.stack([ours.double() @ theirs.double().mT for ours, theirs in zip(x, y, strict=True)])
    products[1:].abs_()
    return products


def thin_out(features: Tensor, most: int = MOST) -> Tensor:
    """At most so many neurons of [F, I, N], in even steps."""
    return features[:, even_steps(features.shape[1], most)]


def nearest_agreement(table: Tensor) -> float:
    """The share of rows of [F, I, I'] whose nearest column is the same in all faces: a quick look."""
    nearest = table.argmax(-1)
    return float((nearest == nearest[0]).all(0).float().mean())


def assign(table: Tensor, seed: int = 0) -> Tensor:
    """For each row of [I, I'] a column of its own, of the largest sum: [I]. Rows beyond I' columns get -1.

    Columns are shuffled first: of neurons that are alike, or 0, it must not be the order that chooses.
    """
    order = torch.randperm(table.shape[1], generator=torch.Generator().manual_seed(seed))
    rows, columns = linear_sum_assignment(table[:, order].numpy(), maximize=True)
    found = torch.full((len(table),), -1)
    found[torch.from_numpy(rows)] = order[torch.from_numpy(columns)]
    return found
