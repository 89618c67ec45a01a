"""What scores of the grid of sizes say: its tables, each a list of rows, made from the rows of `workshop.sizes.score`.

A law of strangers predicts the score of a pair that shares nothing from its size: linear least squares on Fisher's
scale, artanh, in 1 / width, 1 / depth and their product, of the geometric means of both models, and whether depths
differ. Why these: of as many directions as a layer has, strangers share a few, and most of them at both ends of the
stack, over which scores are averaged. The form was chosen after a look at the first 112 pairs of strangers, before most
of the others were scored. Where it says evidence begins is as far above the prediction as the verdict asks: `MARGIN`
times the highest residual among the pairs that it was fitted on. Pairs that have a model in common are not independent:
residuals show the spread, but no standard error of a coefficient is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimoe.fingerprints.compare import background_of_rows
from minimoe.fingerprints.result import Result
from minimoe.fingerprints.verdict import CANNOT_TELL, EVIDENCE, HIGHEST_LEVEL, SAME, SHARED
from minimoe.fingerprints.zoo_scores import Row, Rows
from workshop.benchmark import judge_row

TERMS = ("constant", "1 / width", "1 / depth", "1 / (width depth)", "other depths")
USUAL = {"width": 96, "depth": 4}  # of the zoo, by which sizes are divided: for it, the first four terms are 1
FACTS = (*USUAL, "tokens")
USES = (("stranger", "strangers", "accused"), ("planted", "planted", "fooled"), ("relative", "relatives", "found"))


@dataclass(frozen=True)
class Law:
    """The scores of strangers as a function of size."""

    coefficients: np.ndarray  # of TERMS
    r_squared: float
    residuals: np.ndarray  # of the pairs that it was fitted on, on Fisher's scale


def fit(rows: Rows, method: str) -> Law:
    """The law of a method from pairs of strangers; those that it refuses are left out."""
    some = [row for row in rows if row[method] is not None]
    terms, found = _terms(some), np.arctanh([min(row[method], HIGHEST_LEVEL) for row in some])
    coefficients = np.linalg.lstsq(terms, found, rcond=None)[0]
    residuals = found - terms @ coefficients
    spread = ((found - found.mean()) ** 2).sum()
    return Law(coefficients, 1 - float((residuals**2).sum() / spread) if spread else 0.0, residuals)


def _terms(rows: Rows) -> np.ndarray:
    """[pairs, TERMS]."""
    width, depth = (np.array([usual / _mean(row, fact) for row in rows]) for fact, usual in USUAL.items())
    other = np.array([float(row["depth_a"] != row["depth_b"]) for row in rows])
    return np.stack([np.ones(len(rows)), width, depth, width * depth, other], axis=1)


def _mean(row: Row, fact: str) -> float:
    return (row[f"{fact}_a"] * row[f"{fact}_b"]) ** 0.5


def all_tables(rows: Rows, methods: Sequence[str], shares: Iterable[str]) -> dict[str, Rows]:
    """Every table by name; `shares` are the methods with a scale that strangers set."""
    return {"quantiles": quantiles(rows, methods), "laws": laws(rows, shares), "left_out": left_out(rows, [*shares])}


def quantiles(rows: Rows, methods: Iterable[str]) -> Rows:
    """What each method says of strangers, and of relatives, by the smaller width, depth and tokens of a pair."""
    table = []
    for method in methods:
        for use in ("stranger", "relative"):
            for fact in FACTS:
                smaller = _smaller(fact)
                for size in sorted({smaller(row) for row in rows}):
                    some = [row for row in rows if row["use"] == use and smaller(row) == size]
                    if some:
                        table.append(
                            {"method": method, "use": use, "by": fact, "smaller": size, **_spread(some, method)}
                        )
    return table


def _smaller(fact: str) -> Callable[[Row], float]:
    return lambda row: min(row[f"{fact}_a"], row[f"{fact}_b"])


def _spread(rows: Rows, method: str) -> Mapping[str, Any]:
    found = [row[method] for row in rows if row[method] is not None]
    names = ("lowest", "5 %", "median", "95 %", "highest")
    values = np.quantile(found, (0, 0.05, 0.5, 0.95, 1)) if found else [None] * len(names)
    return {
        "pairs": len(rows),
        "refused": len(rows) - len(found),
        **dict(zip(names, map(_number, values), strict=True)),
    }


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def laws(rows: Rows, methods: Iterable[str]) -> Rows:
    """The law of each method over all strangers."""
    strangers = [row for row in rows if row["use"] == "stranger"]
    table = []
    for method in methods:
        law = fit(strangers, method)
        named = dict(zip(TERMS, map(float, law.coefficients), strict=True))
        residual = {"residual sd": float(law.residuals.std()), "highest residual": float(law.residuals.max())}
        table.append({"method": method, "pairs": len(law.residuals), **named, "r_squared": law.r_squared, **residual})
    return table


def left_out(rows: Rows, methods: Sequence[str]) -> Rows:
    """What the verdict says of each pair, and each method by itself, from strangers none of which has a width of it.

    A row for each smaller width of a pair and one for all. "planted" are strangers with parts of the other model that
    do nothing, "fooled" those that are taken for relatives. "cannot_tell" counts verdicts of all pairs.
    """
    judged = [_judge_by_other_widths(rows, row, methods) for row in rows]
    table = []
    for width in [*sorted({_smaller("width")(row) for row in rows}), "all"]:
        here = [row for row in judged if width in ("all", _smaller("width")(row))]
        for by in ("verdict", *methods):
            counted = {"width": width, "by": by}
            for use, name, verb in USES:
                some = [row for row in here if row["use"] == use]
                counted |= {name: len(some), verb: sum(row["above"][by] for row in some)}
            unsure = sum(row["verdict"] == CANNOT_TELL for row in here)
            table.append({**counted, "cannot_tell": unsure if by == "verdict" else None})
    return table


def _judge_by_other_widths(rows: Rows, row: Row, methods: Sequence[str]) -> Row:
    widths = {row["width_a"], row["width_b"]}
    others = [one for one in rows if one["use"] == "stranger" and not widths & {one["width_a"], one["width_b"]}]
    background = background_of_rows(others, row["shapes"], "other widths")
    judged = judge_row(row, background)
    evidence = background.beside({name: Result(score=row[name]) for name in methods})
    above = {name: (found.standing or 0.0) > EVIDENCE for name, found in evidence.items()}
    return {**judged, "above": {"verdict": judged["verdict"] in (SAME, SHARED), **above}}
