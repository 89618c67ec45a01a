"""What the methods said of the pairs of the zoo: tables as rows, the shipped ones or those of another benchmark."""

import csv
from functools import cache
from pathlib import Path
from typing import Any

from minimoe.data_files import data_path

Row = dict[str, Any]
Rows = list[Row]


def read_table(name: str, folder: Path | None = None) -> Rows:
    """The rows of `<folder>/<name>.csv`, numbers as numbers and empty cells as None; no folder: the shipped ones."""
    path = (folder or data_path("zoo/benchmark")) / f"{name}.csv"
    with open(path, encoding="utf-8", newline="") as file:
        return [{key: _value(cell) for key, cell in row.items()} for row in csv.DictReader(file)]


def _value(cell: str) -> str | float | None:
    try:
        return float(cell)
    except ValueError:
        return cell or None


@cache
def scores() -> Rows:
    """The shipped scores, one row a pair."""
    return read_table("scores")


def is_rewritten(row: Row) -> bool:
    """Whether one of a pair went through gauges."""
    return "gauged" in row["kind"]


def strangers_of(rows: Rows) -> Rows:
    """Pairs that share nothing, as they are: framed ones are no sample of strangers."""
    return [row for row in rows if row["use"] in ("calibration", "evaluation", "between")]


def scores_of(rows: Rows, method: str) -> list[float]:
    """The scores of a method, without those of pairs that it refuses."""
    return [row[method] for row in rows if row[method] is not None]
