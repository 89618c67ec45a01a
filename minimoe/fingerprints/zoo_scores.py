"""The tables that a benchmark of the zoo left (workshop/benchmark.py), and how to count in them.

Methods that refuse a pair have found nothing in it: in curves and rates such a pair ranks lowest.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.data_files import data_path

Rows = Sequence[Mapping[str, Any]]
P_VALUES = ("csu", "permutation_test")  # methods whose p-value is in the table of scores
# Every test of strangers, and what its p-value is.
PROMISES = {
    "csu": "exact",
    "permutation_test": "exact",
    "palimpsest": "exact",
    "expert_attribution": "nominal",
    "token_agreement, 1 control": "not about lineage",
    "token_agreement, 6 controls": "not about lineage",
}


def read_table(name: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """A table of the benchmark, as "scores" or "p_values": numbers as numbers, empty cells as None.

    Args:
        name: of its file, without ".csv".
        folder: where it is; None: data/zoo/benchmark, which is shipped.
    """
    file = (folder or data_path("zoo") / "benchmark") / f"{name}.csv"
    with open(file, encoding="utf-8", newline="") as opened:
        return [{key: _read_cell(cell) for key, cell in row.items()} for row in csv.DictReader(opened)]


def _read_cell(cell: str) -> str | float | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


def rows_of(rows: Rows, use: str) -> Rows:
    """The pairs that are there for one use."""
    return [row for row in rows if row["use"] == use]


def strangers_of(rows: Rows) -> Rows:
    """Pairs that share nothing, as they are: framed ones are no sample of strangers."""
    return [row for row in rows if row["use"] in ("calibration", "evaluation", "between")]


def by_transformation(rows: Rows) -> Iterator[tuple[str, Rows, Rows]]:
    """Each transformation, its relatives, and the strangers for evaluation whose shapes differ alike."""
    relatives = rows_of(rows, "positive")
    for kind in dict.fromkeys(row["kind"] for row in relatives):
        some = [row for row in relatives if row["kind"] == kind]
        shapes = {row["shapes"] for row in some}
        yield kind, some, [row for row in rows_of(rows, "evaluation") if row["shapes"] in shapes]


def labelled(relatives: Sequence[float | None], strangers: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores as scikit-learn wants them: 1 for a relative; refused pairs just below the lowest score."""
    scores = np.array([*relatives, *strangers], dtype=np.float64)  # None becomes NaN
    missing = np.isnan(scores)
    scores[missing] = (0.0 if missing.all() else scores[~missing].min()) - 1
    return np.repeat([1, 0], [len(relatives), len(strangers)]), scores


def true_positives(relatives: Sequence[float | None], strangers: Sequence[float | None], *, at: float = 0.01) -> int:
    """How many relatives are above a threshold that at most the share `at` of the strangers is above."""
    labels, scores = labelled(relatives, strangers)
    usual = np.sort(scores[labels == 0])[::-1]
    return int((scores[labels == 1] > usual[int(at * len(usual))]).sum())
