"""Which layers and vectors a model took from another: the cosine of every layer of one with every layer of the other,
and how far each vector of one is from the nearest of the other.

Shapes: H hidden size.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.fingerprints.weight_cosine import MATRICES
from minimoe.fingerprints.weights import Weights

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
ROLES = (*ATTENTION, *MLP)


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


def angles(child: Weights, parent: Weights) -> dict[tuple[int, str], np.ndarray]:
    """How many degrees each vector of the child is from the most similar one in any layer of the parent.

    The vectors are those with which a layer reads from the residual stream, the rows of q, k, v, gate and up, and
    writes to it, the columns of o and down. Two without connection are some 90 degrees apart; the most similar of
    hundreds is nearer than that, by chance alone.

    Returns:
        (layer, role) -> [number of vectors, those of all experts].
    """

    def vectors(weights: Weights, role: str, layer: int) -> Tensor:
        """Of length 1: [number, H] float64."""
        matrix = weights.get(role, layer).double()
        rows = matrix.mT if role in ("o", "down") else matrix
        return F.normalize(rows.flatten(0, -2), dim=-1)

    known = {role: torch.cat([vectors(parent, role, layer) for layer in range(parent.num_layers)]) for role in ROLES}
    return {
        (layer, role): (vectors(child, role, layer) @ known[role].mT).amax(-1).clamp(-1, 1).arccos().rad2deg().numpy()
        for layer in range(child.num_layers)
        for role in ROLES
    }
