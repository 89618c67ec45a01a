"""Which layers a model took from another: the cosine of every layer of one with every layer of the other."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.fingerprints.weight_cosine import MATRICES
from minimoe.fingerprints.weights import Weights


def layer_cosines(a: Weights, b: Weights) -> np.ndarray:
    """[L, L', matrices]: the cosine of every matrix, in the order of `MATRICES`, of models of the same width.

    Raises CheckpointError: a file is damaged.
    """
    roles = [role for role in MATRICES if a.has(role, 0) and b.has(role, 0)]
    return torch.stack([_directions(a, role) @ _directions(b, role).T for role in roles], dim=-1).numpy()


def _directions(model: Weights, role: str) -> Tensor:
    """That matrix of each layer as a vector of length 1, [L, weights], in float64: float32 sums of millions are off in
    the third digit."""
    layers = range(model.num_layers)
    return torch.stack([F.normalize(model.get(role, layer).flatten().double(), dim=0) for layer in layers])
