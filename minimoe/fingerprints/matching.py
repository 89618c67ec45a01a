"""Neurons of two models matched by what they do to shared tokens.

A neuron of a gated MLP has three faces: how strongly each token opens its gate, how strongly each token drives it, and
which tokens it speaks for. They are vectors over tokens, whatever basis the residual stream has. The scale of up and
down is free, and with it their sign; the sign of a gate is not.

Shapes: F 3, for gate, up and down; H hidden size, I neurons of an MLP or expert, N tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from minimoe.fingerprints.anchors import Anchors, read_anchors
from minimoe.fingerprints.folded import Neurons, mlps
from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.weights import Weights, read_once

MOST = 512  # neurons that are looked for: a share of them is known well enough


@read_once
def read_token_features(weights: Weights, tokens: list[str]) -> dict[tuple[int, str], Tensor]:
    """The `token_features` of every MLP or expert, by layer and name."""
    anchors = read_anchors(weights, tokens)
    return {
        (layer, name): token_features(neurons, anchors)
        for layer in range(weights.num_layers)
        for name, neurons in mlps(weights, layer).items()
    }


def token_features(neurons: Neurons, anchors: Anchors) -> Tensor:
    """Gate, up and down of each neuron over tokens, centred and of norm 1: [F, I, N] float32, from sums in float64."""
    faces = (neurons.gate, anchors.inputs), (neurons.up, anchors.inputs), (neurons.down, anchors.outputs)
    over_tokens = (of_neurons.double() @ of_tokens.double().mT for of_neurons, of_tokens in faces)
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
    neurons = features.shape[1]
    return features if neurons <= most else features[:, torch.linspace(0, neurons - 1, most).long()]


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
