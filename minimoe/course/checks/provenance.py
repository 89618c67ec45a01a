"""The check of the exercise on the layers of a shallow descendant (notebook 12)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import Tensor

from minimoe.course.checks.answers import Mistakes, compare, numbers

Matrices = Sequence[np.ndarray]  # one a layer, all of one shape
_SHAPE = (24, 16)
_KEPT = (
    1,
    2,
    5,
    0,
)  # the layers of the deep model that the shallow one has, the last one twice as large and turned round
_DEPTH = 7


def check_cosine_table(answer: Callable[[Matrices, Matrices], np.ndarray]) -> str:
    """Check `cosine_table(shallow, deep)`: the cosine of each matrix of one model with each of another, [L, L'].

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "These are dot products. A large matrix then resembles everything: divide by both lengths.": _dots,
        "You divided by the length of the deep layer only. The cosine divides by both.": (
            lambda shallow, deep: _dots(shallow, deep) / _lengths(deep)
        ),
        "You divided by the length of the shallow layer only. The cosine divides by both.": (
            lambda shallow, deep: _dots(shallow, deep) / _lengths(shallow)[:, None]
        ),
        "The table lies on its side. Wanted a row for each layer of the shallow model.": lambda shallow, deep: (
            _cosines(shallow, deep).T
        ),
        "The sign is gone. A cosine of -1 is a matrix that was turned round, and the table should show it.": (
            lambda shallow, deep: _cosines(shallow, deep).abs()
        ),
        "This is Pearson's correlation: the mean was taken off first. The cosine leaves it in.": lambda shallow, deep: (
            _cosines([matrix - matrix.mean() for matrix in shallow], [matrix - matrix.mean() for matrix in deep])
        ),
        "This is the mean of the cosines of rows. Wanted one cosine, of the whole matrix as one long vector.": _of_rows,
        "These are distances, 1 - cosine. Wanted the cosine: 1 where the two are alike.": lambda shallow, deep: (
            1 - _cosines(shallow, deep)
        ),
    }
    inputs = _two_models(offset=0.5)
    compare(numbers(answer, *deepcopy(inputs)), _cosines(*inputs), mistakes, inputs)
    return "Right: every layer of one model beside every layer of the other."


def check_layer_map(answer: Callable[[np.ndarray, int], Sequence[int]]) -> str:
    """Check `layer_map(table, size)`: for each row of a table of cosines the column of the largest one; -1 where that
    is not above 5 / sqrt(size), for matrices of `size` numbers.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "Every row has a largest entry, also that of a layer from elsewhere. Say -1 where it is within chance.": (
            lambda table, size: torch.from_numpy(table.argmax(1)).double()
        ),
        "You looked along the columns: for each layer of the deep model. Wanted one answer for each row.": (
            lambda table, size: _best(table.T, size)
        ),
        "A layer that was turned round has a large negative cosine. Here only the largest one counts: no `abs`.": (
            lambda table, size: _best(np.abs(table), size)
        ),
        "The level is 5 / sqrt(size), not 5 / size: the spread of a cosine shrinks with the root of the numbers.": (
            lambda table, size: _best(table, size**2)
        ),
        "You have the cosines. Wanted the layers they belong to: `argmax`, not `max`.": (
            lambda table, size: torch.from_numpy(table.max(1)).double()
        ),
        "Layers count from 0, as everywhere in this course.": lambda table, size: _best(table, size) + 1,
    }
    shallow, deep = _two_models(offset=0.0)
    table = np.vstack(
        [_cosines(shallow, deep).numpy(), np.full(_DEPTH, -0.3)]
    )  # the last row: even its best is negative
    for inputs in ((table, shallow[0].size), (table[::-1].copy(), shallow[0].size), (table[:, :3].copy(), 10_000)):
        compare(numbers(answer, *deepcopy(inputs)), _best(*inputs), mistakes, inputs)
    return "Right: the layers that were taken, and none where there is none."


def _two_models(offset: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A deep model, and a shallow one of some of its layers, a little changed, and one layer from elsewhere."""
    rng = np.random.default_rng(0)
    deep = [scale * (rng.normal(size=_SHAPE) + offset) for scale in rng.uniform(0.5, 3, size=_DEPTH)]
    shallow = [deep[layer] + 0.3 * deep[layer].std() * rng.normal(size=_SHAPE) for layer in _KEPT]
    shallow[-1] = -2 * shallow[-1]
    return [*shallow, rng.normal(size=_SHAPE) + offset], deep


def _dots(shallow: Matrices, deep: Matrices) -> Tensor:
    return torch.tensor([[float((one * other).sum()) for other in deep] for one in shallow], dtype=torch.float64)


def _lengths(matrices: Matrices) -> Tensor:
    return torch.tensor([float(np.linalg.norm(matrix)) for matrix in matrices], dtype=torch.float64)


def _cosines(shallow: Matrices, deep: Matrices) -> Tensor:
    return _dots(shallow, deep) / _lengths(shallow)[:, None] / _lengths(deep)


def _of_rows(shallow: Matrices, deep: Matrices) -> Tensor:
    def unit(matrix: np.ndarray) -> np.ndarray:
        return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)

    return _dots([unit(matrix) for matrix in shallow], [unit(matrix) for matrix in deep]) / _SHAPE[0]


def _best(table: np.ndarray, size: int) -> Tensor:
    found = np.where(table.max(1) > 5 / np.sqrt(size), table.argmax(1), -1)
    return torch.from_numpy(found).double()
