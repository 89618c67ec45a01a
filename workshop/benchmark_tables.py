"""What the benchmark's scores say: its tables, each a list of rows, made from the rows of `workshop.benchmark.score`.

The uses of a row are explained in benchmark_pairs.py. Methods that refuse a pair have found nothing in it: in rates and
curves such a pair ranks lowest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from statistics import mean, median
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import roc_curve

from minimoe.fingerprints.zoo_scores import Rows, scores_of, strangers_of

LOWEST = -2.0  # below every score
CUT_OFFS = (0.8, 0.9, 0.927)  # that others published
PROMISED = (0.01, 0.05, 0.1, 0.5)  # p-values


def by_method(rows: Rows, methods: Iterable[str]) -> list[dict[str, Any]]:
    """Each method over all transformations: AUC, partial AUC (up to 5 % false positives), TPR at 1 % and at 0.1 %."""
    strangers, relatives = _of_use(rows, "evaluation"), _of_use(rows, "positive")
    table = []
    for method in methods:
        high, low = _ranked(relatives, method), _ranked(strangers, method)
        rare = float((high > true_positive_threshold(low, at=0.001)).mean())
        table.append({"method": method, **_rates(relatives, strangers, method), "tpr_at_0.1%": rare})
    return table


def by_transformation(rows: Rows, methods: Iterable[str]) -> list[dict[str, Any]]:
    """Each method on each transformation, against strangers whose shapes differ alike."""
    strangers, relatives = _of_use(rows, "evaluation"), _of_use(rows, "positive")
    table = []
    for kind in dict.fromkeys(row["kind"] for row in relatives):
        some = [row for row in relatives if row["kind"] == kind]
        shapes = {row["shapes"] for row in some}
        alike = [row for row in strangers if row["shapes"] in shapes]
        table += [{"transformation": kind, "method": method, **_rates(some, alike, method)} for method in methods]
    return table


def _rates(relatives: Rows, strangers: Rows, method: str) -> dict[str, Any]:
    high, low = _ranked(relatives, method), _ranked(strangers, method)
    labels, scores = np.repeat([1, 0], [len(high), len(low)]), np.concatenate([high, low])
    curve = roc_curve(labels, scores)[:2]
    hits = int((high > true_positive_threshold(low)).sum())
    found_low, found_high = interval(hits, len(high))
    return {
        "relatives": len(high),
        "refused": sum(row[method] is None for row in relatives),
        "strangers": len(low),
        "auc": area_under(curve),
        "partial_auc": area_under(curve, up_to=0.05),
        "tpr": hits / len(high),
        "tpr_low": found_low,
        "tpr_high": found_high,
    }


def _ranked(rows: Rows, method: str) -> np.ndarray:
    """The scores of a method; pairs that it refuses rank lowest."""
    return np.array([LOWEST if row[method] is None else row[method] for row in rows])


def true_positive_threshold(strangers: np.ndarray, at: float = 0.01) -> float:
    """A score that at most the share `at` of the strangers is above."""
    return np.sort(strangers)[::-1][int(at * len(strangers))]


def area_under(curve: tuple[np.ndarray, np.ndarray], up_to: float = 1.0) -> float:
    """The mean true-positive rate of a ROC curve at false-positive rates from 0 to `up_to`; `up_to` / 2 by chance.

    Up to 1 it is the AUC. scikit-learn's partial AUC is standardised so that chance is 1/2 (McClish 1989, Medical
    Decision Making 9), and it computes the curve anew, which takes most of the time of a table.

    Args:
        curve: false-positive and true-positive rates, as `roc_curve` returns them.
    """
    false, true = curve
    within = false <= up_to
    x, y = np.append(false[within], up_to), np.append(true[within], np.interp(up_to, false, true))
    return float(np.trapezoid(y, x)) / up_to


@cache
def interval(hits: int, trials: int) -> tuple[float, float]:
    """Of a share, exact, 95 % (Clopper & Pearson 1934). Pairs that have a model in common are not quite independent."""
    return tuple(map(float, binomtest(hits, trials).proportion_ci()))


def false_positives(rows: Rows, methods: Iterable[str]) -> list[dict[str, Any]]:
    """How many strangers of one shape reach the cut-offs that others published."""
    groups = {
        "4 layers": [row for row in strangers_of(rows) if row["kind"] == "roots"],
        "8 layers": _both_called(rows, "deep-"),
        "8 layers, initialised by depth": _both_called(rows, "depth-init-"),
    }
    table = []
    for group, some in groups.items():
        for method in methods:
            found = [row[method] for row in some if row[method] is not None]
            for cut in CUT_OFFS:
                hits = sum(score > cut for score in found)
                low, high = interval(hits, len(found)) if found else (0.0, 1.0)
                table.append(
                    {
                        "strangers": group,
                        "method": method,
                        "cut_off": cut,
                        "pairs": len(found),
                        "above": hits,
                        "share": hits / len(found) if found else None,
                        "low": low,
                        "high": high,
                        "median": median(found) if found else None,
                    }
                )
    return table


def invariance(rows: Rows, methods: Sequence[str]) -> list[dict[str, Any]]:
    """The score of a model with a copy of itself after each gauge; 1 is unchanged."""
    return [
        {"model": row["a"], "gauge": row["kind"], **{method: row[method] for method in methods}}
        for row in _of_use(rows, "invariance")
    ]


def forgery(rows: Rows, methods: Iterable[str], use: str = "forgery") -> list[dict[str, Any]]:
    """What methods say of strangers that imitate a model, or hold parts of it, beside what they say of strangers."""
    strangers = [row for row in strangers_of(rows) if row["kind"] == "roots"]
    table = []
    for kind in dict.fromkeys(row["kind"] for row in _of_use(rows, use)):
        framed = [row for row in _of_use(rows, use) if row["kind"] == kind]
        for method in methods:
            scores, usual = scores_of(framed, method), scores_of(strangers, method)
            table.append(
                {
                    "frame": kind,
                    "method": method,
                    "pairs": len(scores),
                    "median": median(scores) if scores else None,
                    "highest": max(scores, default=None),
                    "strangers_median": median(usual) if usual else None,
                    "strangers_highest": max(usual, default=None),
                }
            )
    return table


def promises(rows: Rows, methods: Iterable[str]) -> list[dict[str, Any]]:
    """How often strangers have a p-value of at most so much: no more often than that, if it is one."""
    return [row for method in methods for row in _kept(method, scores_of(strangers_of(rows), f"{method}_p"))]


def calibration(rows: Rows, tested: Rows, kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    """The same for every p-value there is, those that are none of lineage included.

    Args:
        rows: of the benchmark, with p-values of their own, as "csu_p".
        tested: other tests of strangers, each with "test" and "p_value".
        kinds: what the p-value of each test is.
    """
    table = []
    for test, kind in kinds.items():
        found = [row["p_value"] for row in tested if row["test"] == test]
        if not found:
            found = scores_of(strangers_of(rows), f"{test}_p")
        table += [{"p_value": kind, **row} for row in _kept(test, found)]
    return table


def _kept(method: str, found: Sequence[float]) -> list[dict[str, Any]]:
    table = []
    for promised in PROMISED:
        hits = sum(p <= promised for p in found)
        low, high = interval(hits, len(found))
        counts = {"method": method, "promised": promised, "pairs": len(found), "found": hits / len(found)}
        table.append({**counts, "low": low, "high": high})
    return table


def attribution(rows: Rows, truth: Mapping[str, float]) -> list[dict[str, Any]]:
    """Whether experts are led back to their layer, and how much of them is said to be new.

    Args:
        rows: of the benchmark.
        truth: the drop rate of each transformation that makes a mixture of one root.
    """
    table = []
    for kind, rate in truth.items():
        some = [row for row in _of_use(rows, "positive") if row["kind"] == kind and row["right_layer"] is not None]
        rates = [row["drop_rate"] for row in some]
        table.append(
            {
                "transformation": kind,
                "pairs": len(some),
                "right_layer": mean(row["right_layer"] for row in some),
                "effect": mean(row["expert_attribution"] for row in some),
                "drop_rate": rate,
                "estimated": mean(rates),
                "furthest": max(abs(found - rate) for found in rates),
            }
        )
    return table


def verdicts(rows: Rows) -> list[dict[str, Any]]:
    """How often each verdict was reached, for each use of a pair."""
    uses = list(dict.fromkeys(row["use"] for row in rows))
    words = sorted({row["verdict"] for row in rows})
    return [
        {"use": use, **{word: sum(row["verdict"] == word for row in _of_use(rows, use)) for word in words}}
        for use in uses
    ]


def times(rows: Rows, methods: Iterable[str]) -> list[dict[str, Any]]:
    """Seconds that each method takes for a pair, the median over all."""
    return [{"method": method, "seconds": median(row[f"{method}_s"] for row in rows)} for method in methods]


def to_markdown(rows: Rows) -> str:
    """A table as GitHub and JupyterLab show it; numbers with three digits."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([_cell(row[key]) for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def wide(rows: Rows, index: str, column: str, value: str) -> list[dict[str, Any]]:
    """One row for each `index`, with the `value` of each `column` in a column of its own."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        table.setdefault(row[index], {index: row[index]})[row[column]] = row[value]
    return list(table.values())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _of_use(rows: Rows, use: str) -> Rows:
    return [row for row in rows if row["use"] == use]


def _both_called(rows: Rows, prefix: str) -> Rows:
    return [row for row in strangers_of(rows) if row["a"].startswith(prefix) and row["b"].startswith(prefix)]
