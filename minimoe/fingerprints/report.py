"""What `compare` returns, as text, JSON, HTML and a figure."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from minimoe.fingerprints.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST_P = 1e-300  # a p-value at which evidence is complete
_TITLES = ("score", "strangers: median", "highest", "lower", "p-value")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one method found, beside what it finds among strangers."""

    result: Result
    strangers: Sequence[float]
    level: float | None  # where evidence begins; None: the method does not enter the verdict

    @property
    def percentile(self) -> float | None:
        """The share of strangers with a lower score, in percent."""
        if self.result.score is None or not self.strangers:
            return None
        return 100 * sum(score < self.result.score for score in self.strangers) / len(self.strangers)

    @property
    def standing(self) -> float | None:
        """0 as the median stranger or below, 0.5 where evidence begins, 1 where nothing differs; linear between.

        Of csu, an exact test, on the scale of log p: 0 at p = 1.
        """
        score, level = self.result.score, self.level
        if level is None or score is None:
            return None
        usual = median(self.strangers) if self.result.method != "csu" else 0.0
        if self.result.method == "csu":
            score = math.log10(self.result.p_value) / math.log10(SMALLEST_P)
        low, high, start = (usual, level, 0.0) if score < level else (level, 1.0, 0.5)
        return min(max(start + (score - low) / (high - low) / 2, 0.0), 1.0)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the JSON of a report."""
        known = sorted(self.strangers)
        return {
            "score": self.result.score,
            "p_value": self.result.p_value,
            "percentile": self.percentile,
            "strangers": {"pairs": len(known), "median": median(known), "highest": known[-1]} if known else None,
            "level": self.level,
            "standing": self.standing,
            "refused": self.result.refused,
            "details": dict(self.result.details),
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """What `compare` returns; the top of this file explains verdict and score."""

    a: str
    b: str
    verdict: str
    reason: str
    score: float | None  # 0 to 1; None: no method applies
    background: str
    methods: Mapping[str, Evidence]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        methods = {name: evidence.to_dict() for name, evidence in self.methods.items()}
        return {
            **{f: getattr(self, f) for f in ("a", "b", "verdict", "reason", "score", "background")},
            "methods": methods,
        }

    def to_json(self) -> str:
        """`to_dict` as JSON; what is not a finite number is null."""
        return json.dumps(_finite(self.to_dict()), indent=2)

    def __str__(self) -> str:
        rows = [["method", *_TITLES], *self._rows()]
        widths = [max(len(row[0]) for row in rows)]
        widths += [max(len(row[column]) for row in rows if len(row) > 2) for column in range(1, len(rows[0]))]
        lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)) for row in rows]
        return "\n".join([self.a, self.b, "", *self._headline(), "", *map(str.rstrip, lines), "", *self._notes()])

    __repr__ = __str__  # the fields hold every stranger's score

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{title}</th>" for title in ("method", *_TITLES))
        body = "".join(f"<tr>{_html_cells(row)}</tr>" for row in self._rows())
        lines = [f"<p>{html.escape(line)}</p>" for line in (f"{self.a} and {self.b}", *self._headline())]
        notes = [f"<p>{html.escape(line)}</p>" for line in self._notes()]
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return "".join([*lines, table, *notes])

    def plot(self) -> tuple[Figure, dict[str, dict[str, Any]]]:
        """Each method's score as a mark on a bar that spans the strangers, and a tick where evidence begins.

        Returns:
            The figure, and its numbers by method: "score", "lowest", "highest" and "level".
        """
        from matplotlib.figure import Figure

        shown = {name: evidence for name, evidence in self.methods.items() if evidence.result.score is not None}
        figure = Figure(figsize=(6.8, 1.2 + 0.34 * len(shown)), layout="constrained")
        axes, data = figure.subplots(), {}
        for row, (name, evidence) in enumerate(shown.items()):
            known, score = sorted(evidence.strangers), evidence.result.score
            if known:
                axes.barh(row, known[-1] - known[0], left=known[0], height=0.5, color="#BBBBBB")
            if evidence.level is not None and evidence.result.method != "csu":  # its level is one of p, not of rho
                axes.plot([evidence.level] * 2, [row - 0.36, row + 0.36], color="#222222", linewidth=1.6)
            axes.plot(score, row, marker="D", color="#4477AA", markersize=7)
            ends = {"lowest": known[0], "highest": known[-1]} if known else {}
            data[name] = {"score": score, **ends, "level": evidence.level}
        axes.use_sticky_edges = False  # the widest bar would end at the axis
        axes.autoscale_view()
        axes.set_yticks(range(len(shown)), list(shown))
        axes.invert_yaxis()
        axes.set_xlabel("score (diamond); strangers (grey); where evidence begins (line)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(
            f"{self.verdict}" + ("" if self.score is None else f", score {self.score:.2f}"), x=0.01, ha="left"
        )
        return figure, data

    def _headline(self) -> list[str]:
        score = "" if self.score is None else f" (score {self.score:.2f}; evidence begins at 0.50)"
        return [f"Verdict: {self.verdict}{score}", f"Reason: {self.reason}"]

    def _notes(self) -> list[str]:
        return [f"Background: {self.background}.", "Methods marked * enter the verdict."]

    def _rows(self) -> list[list[str]]:
        """One a method; of a method that does not apply, its name and why."""
        return [[_marked(name, evidence), *_cells(evidence)] for name, evidence in self.methods.items()]


def _marked(name: str, evidence: Evidence) -> str:
    return name if evidence.level is None else f"{name} *"


def _cells(evidence: Evidence) -> list[str]:
    result, known = evidence.result, sorted(evidence.strangers)
    if result.score is None:
        return [f"does not apply: {result.refused}"]
    beside = [f"{median(known):.3f}", f"{known[-1]:.3f}", f"{evidence.percentile:.0f} %"] if known else ["", "", ""]
    return [f"{result.score:.3f}", *beside, "" if result.p_value is None else f"{result.p_value:.2g}"]


def _html_cells(row: Sequence[str]) -> str:
    span = f' colspan="{len(_TITLES)}"' if len(row) == 2 else ""
    return f"<td>{html.escape(row[0])}</td>" + "".join(f"<td{span}>{html.escape(cell)}</td>" for cell in row[1:])


def _finite(value: Any) -> Any:
    """The value with null for what JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
