"""How much of a merged model came from each of several candidate parents.

What it measures
    For each role of each layer, the shares w >= 0 that make the sum of w times each parent closest to the model (least
    squares: Lawson & Hanson 1974, Solving Least Squares Problems), after all of them were brought into the frame of the
    model. An interval comes from leaving out each tenth of the rows in turn (jackknife), and what no parent explains is
    said beside.
What leaves it unchanged
    Every gauge, of the model and of the parents, before or after the merge.
What it cannot see
    Parents that hardly differ: their shares cannot be told (the condition number says so). A parent that was not named:
    its relatives get what is its. Products of matrices and folded norms are not linear in the merged weights; the error
    is of second order in how far parents differ.
Source
    Ours.

A spherical merge (slerp) is a sum with nearly the same shares. TIES and task arithmetic add differences to a base: with
`base`, shares are those of the differences, they need not add up to 1, and what is left is the base's. TIES leaves
numbers out, and so is no sum: what least squares make of it depends on the basis. In TIES merges of members of the zoo,
shares of products are up to .2 from those of their two factors, of all other matrices up to .05.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray
from scipy.optimize import nnls

from minimoe.fingerprints.one_frame import Part, in_one_frame
from minimoe.fingerprints.weights import Weights, on_the_cpu
from minimoe.model.config import require

FOLDS = 10
NOTHING = 1e-3  # length of a difference to the base that rounding and rewrites leave
# How many merged tensors, norms included, are multiplied in a part: of shares that add up to s, those of the products
# add up to that power of s. Up and down are made equally long, so that each holds half of the factors of both.
FACTORS = {"embedding": 1, "head": 2, "qk": 4, "vo": 3, "gate": 2, "up": 1.5, "down": 1.5}
WORST_CONDITION = 1e6  # of parents that differ by 2 thousandths of their length


class Cell(NamedTuple):
    """What one role of one layer has of each parent."""

    layer: int | None  # None: embedding and head
    role: str  # "embedding", "head", "qk", "vo", "gate", "up", "down"; of a mixture "expert 0" ...
    shares: tuple[float, ...] | None  # None: they cannot be told; of a parent that equals the base here, 0
    errors: tuple[float, ...]  # standard errors of the shares
    unexplained: float  # the part of the squared length that no parent explains; with a base, of the difference to it
    condition: float  # of the correlations of the parents, 1 where they have none


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What `shares` returns."""

    model: str
    parents: tuple[str, ...]
    base: str | None
    cells: tuple[Cell, ...]

    def mean(self, **wanted: str | int) -> tuple[tuple[float, ...] | None, float]:
        """The mean shares, None where none can be told, and what is unexplained, of all cells or of those with this
        `role` or `layer`."""
        cells = [cell for cell in self.cells if cell._asdict().items() >= wanted.items()]
        told = [cell.shares for cell in cells if cell.shares is not None]
        unexplained = sum(cell.unexplained for cell in cells) / len(cells)
        return tuple(np.mean(told, axis=0).tolist()) if told else None, unexplained

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return vars(self) | {"shares": self.mean()[0], "cells": [cell._asdict() for cell in self.cells]}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        letters = ascii_uppercase[: len(self.parents)]
        names = [f"{letter}  {name}" for letter, name in zip(letters, self.parents, strict=True)]
        base = [f"Shares of differences to {self.base}; the rest is its own."] if self.base else []
        roles = {cell.role: {"role": cell.role} for cell in self.cells}
        layers = {f"layer {n}": {"layer": n} for n in dict.fromkeys(cell.layer for cell in self.cells) if n is not None}
        rows = [_row(name, *self.mean(**wanted)) for name, wanted in (roles | layers | {"all": {}}).items()]
        title = f"{'':<12}" + "".join(f"{letter:>7}" for letter in letters) + "  unexplained"
        return "\n".join([f"Shares of {self.model}", *names, *base, "", title, *rows])


def _row(name: str, shares: tuple[float, ...] | None, unexplained: float) -> str:
    told = "  cannot be told" if shares is None else "".join(f"{share:7.2f}" for share in shares)
    return f"{name:<12}{told}{unexplained:13.2f}"


@on_the_cpu()
def shares(model: Weights, parents: Sequence[Weights], *, base: Weights | None = None) -> Shares:
    """Find how much of a merged model came from each candidate.

    Args:
        model: the merged one; dense, or a mixture of which each expert is compared with the MLPs of its layer.
        parents: at least one, at most 26, of the hidden size and number of layers of `model`, and MLPs no narrower.
        base: what the parents were trained from, if it is known and differences to it were merged.

    Raises:
        ValueError: a shape does not fit; the field is named.
        Refusal: fewer shared tokens than the hidden size; no gated MLP, or no head.
    """
    require(1 <= len(parents) <= 26, "number of parents", len(parents), "1 to 26")
    others = [*parents, *([base] if base else [])]
    for number, other in enumerate(others):
        _require_alike(model, other, "base" if other is base else f"parent {ascii_uppercase[number]} ({other.name})")
    grams: dict[tuple[int | None, str], ndarray] = {}
    for part in in_one_frame(model, others, closely=True):
        place = part.layer, part.role if " " not in part.role else part.role.rsplit(" ", 1)[0]
        grams[place] = grams.get(place, 0) + _grams(part, base is not None)
    factors = {} if base else FACTORS
    cells = (_solve(*place, found, factors.get(place[1], 1.0)) for place, found in grams.items())
    names = tuple(parent.name for parent in parents)
    return Shares(model=model.name, parents=names, base=base and base.name, cells=tuple(cells))


def _require_alike(model: Weights, other: Weights, who: str) -> None:
    for field in ("hidden_size", "num_layers"):
        found, wanted = getattr(other, field), getattr(model, field)
        require(found == wanted, f"{field} of {who}", found, f"{wanted}, as in the merged model")
    for layer in model.layers_with("gate"):
        found, wanted = (one.shape("gate", layer)[-2] if one.has("gate", layer) else 0 for one in (other, model))
        require(
            found >= wanted, f"neurons in layer {layer} of {who}", found, f"at least {wanted}, as in the merged model"
        )


def _grams(part: Part, has_base: bool) -> ndarray:
    """Inner products of the model and its P parents over each tenth of the rows: [FOLDS, 1 + P, 1 + P]."""
    rows = part.rows[:-1] - part.rows[-1] if has_base else part.rows
    scale = part.rows[0].square().sum()
    folds = (some.flatten(1) for some in rows.tensor_split(FOLDS, dim=1))
    return torch.stack([some @ some.mT / scale for some in folds]).numpy()


def _solve(layer: int | None, role: str, grams: ndarray, factors: float) -> Cell:
    whole = grams.sum(0)
    found, unexplained, condition = _fit(whole)
    by_fold = np.array([found, *(_fit(whole - gram)[0] for gram in grams)])
    sums = by_fold.sum(1, keepdims=True)
    by_fold *= np.where(sums > 0, sums, 1) ** (1 / factors - 1)
    errors = np.sqrt((len(grams) - 1) * by_fold[1:].var(axis=0))
    told = tuple(by_fold[0].tolist()) if condition < WORST_CONDITION else None
    return Cell(layer, role, told, tuple(errors.tolist()), unexplained, float(condition))


def _fit(gram: ndarray) -> tuple[ndarray, float, float]:
    """Shares, what is unexplained, and the condition number, of one table of inner products in units of the model."""
    lengths, found = np.sqrt(gram.diagonal()), np.zeros(len(gram) - 1)
    here = np.flatnonzero(lengths[1:] > NOTHING)  # of those that equal the base
    if lengths[0] <= NOTHING or not len(here):
        return found, float(lengths[0] > NOTHING), 1.0
    lengths, gram = (table[np.ix_(*[[0, *1 + here]] * table.ndim)] for table in (lengths, gram))
    cosines = gram / np.outer(lengths, lengths)
    values, vectors = np.linalg.eigh(cosines[1:, 1:])
    roots = np.sqrt(values.clip(1e-12))
    weights, _ = nnls(roots[:, None] * vectors.T, vectors.T @ cosines[1:, 0] / roots)
    both = np.array([1, *-weights])
    found[here] = weights * lengths[0] / lengths[1:]
    return found, float(max(both @ cosines @ both, 0.0)), roots[-1] ** 2 / roots[0] ** 2
