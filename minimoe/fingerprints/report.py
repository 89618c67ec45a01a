"""What `compare` returns, as text, JSON, HTML and a figure."""

import html
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from minimoe.fingerprints.direction import Direction
from minimoe.fingerprints.verdict import EVIDENCE, Correlation, Evidence
from minimoe.fingerprints.weights import Files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = ("method", "score", "strangers: median", "highest", "lower", "p-value")


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """What `compare` returns; verdict.py explains verdict and score."""

    a: str
    b: str
    verdict: str
    reason: str
    score: float | None  # 0 to 1; None: no method applies
    background: str
    methods: Mapping[str, Evidence]
    is_quick: bool = False  # whether a small part of both was looked at
    direction: Direction | None = None  # None: it was not asked for, or the models are not related
    files: Mapping[str, Files] = field(default_factory=dict)  # of "a" and "b", where they lie in files

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; of files, bytes."""
        return vars(self) | {
            "methods": {name: evidence.to_dict() for name, evidence in self.methods.items()},
            "direction": self.direction and self.direction.to_dict(),
            "files": {side: files._asdict() for side, files in self.files.items()},
        }

    def to_json(self) -> str:
        """`to_dict` as JSON; what is not a finite number is null."""
        return json.dumps(_finite(self.to_dict()), indent=2)

    def __str__(self) -> str:
        rows = [_TITLES, *self._rows()]
        widths = [max(len(row[0]) for row in rows)]
        widths += [max(len(row[column]) for row in rows if len(row) > 2) for column in range(1, len(_TITLES))]
        lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)) for row in rows]
        return "\n".join([self.a, self.b, "", *self._headline(), "", *map(str.rstrip, lines), "", *self._notes()])

    __repr__ = __str__  # the fields hold every stranger's score

    def _repr_html_(self) -> str:
        head = "".join(f"<p>{html.escape(line)}</p>" for line in (f"{self.a} and {self.b}", *self._headline()))
        titles = "".join(f"<th>{title}</th>" for title in _TITLES)
        body = "".join(f"<tr>{_html_cells(row)}</tr>" for row in self._rows())
        notes = "".join(f"<p>{html.escape(line)}</p>" for line in self._notes())
        return f"{head}<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>{notes}"

    def plot(self) -> "tuple[Figure, dict[str, dict[str, Any]]]":
        """Each method's score as a mark on a bar that spans the strangers, and a tick where evidence begins.

        Returns:
            The figure, and its numbers by method: "score", "lowest", "highest" and "level".
        """
        from matplotlib.figure import Figure

        shown = {name: evidence for name, evidence in self.methods.items() if evidence.result.score is not None}
        figure = Figure(figsize=(6.8, 1.2 + 0.34 * len(shown)), layout="constrained")
        axes, data = figure.subplots(), {}
        for row, (name, evidence) in enumerate(shown.items()):
            data[name] = numbers = {"score": evidence.result.score}
            if evidence.strangers:
                numbers |= {"lowest": min(evidence.strangers), "highest": max(evidence.strangers)}
                span = numbers["highest"] - numbers["lowest"]
                axes.barh(row, span, left=numbers["lowest"], height=0.5, color="#BBBBBB")
            numbers["level"] = evidence.level
            if evidence.level is not None and isinstance(evidence.scale, Correlation):  # others are not of the score
                axes.plot([evidence.level] * 2, [row - 0.36, row + 0.36], color="#222222", linewidth=1.6)
            axes.plot(numbers["score"], row, marker="D", color="#4477AA", markersize=7)
        axes.use_sticky_edges = False  # the widest bar would end at the axis
        axes.autoscale_view()
        axes.set_yticks(range(len(shown)), list(shown))
        axes.invert_yaxis()
        axes.set_xlabel("score (diamond); strangers (grey); where evidence begins (line)")
        axes.spines[["top", "right"]].set_visible(False)
        score = "" if self.score is None else f", score {self.score:.2f}"
        figure.suptitle(f"{self.verdict}{score}", x=0.01, ha="left")
        return figure, data

    def _headline(self) -> list[str]:
        score = "" if self.score is None else f" (score {self.score:.2f}; evidence begins at {EVIDENCE:.2f})"
        direction = [] if self.direction is None else str(self.direction).splitlines()
        return [f"Verdict: {self.verdict}{score}", f"Reason: {self.reason}", *direction]

    def _notes(self) -> list[str]:
        about = ["A quick look, at a small part of both models."] if self.is_quick else []
        about += [line for side, files in self.files.items() for line in self._about(getattr(self, side), files)]
        return [f"Background: {self.background}.", "Methods marked * enter the verdict.", *about]

    def _about(self, name: str, files: Files) -> Iterator[str]:
        """What is worth saying of the files of a model."""
        if self.is_quick:
            share = files.read / files.size
            yield f"Looked at {files.read / 1e6:,.1f} of {files.size / 1e6:,.1f} MB ({share:.1%}) of {name}."
        if files.moved is not None:
            yield f"Moved {files.moved / 1e6:,.1f} of {files.size / 1e6:,.1f} MB of {name}."
        if files.unread:
            names = f"{files.names[0]} and {len(files.names) - 1} more" if len(files.names) > 1 else files.names[0]
            yield f"Read of {name}: {names}. Not read, though beside it: {', '.join(files.unread)}."

    def _rows(self) -> list[list[str]]:
        """The cells of each method; of one that does not apply, its name and why."""
        return [
            [name if evidence.level is None else f"{name} *", *_cells(evidence)]
            for name, evidence in self.methods.items()
        ]


def _cells(evidence: Evidence) -> list[str]:
    result, known = evidence.result, evidence.strangers
    if result.score is None:
        return [f"does not apply: {result.refused}"]
    beside = [f"{median(known):.3f}", f"{max(known):.3f}", f"{evidence.percentile:.0f} %"] if known else ["", "", ""]
    return [f"{result.score:.3f}", *beside, "" if result.p_value is None else f"{result.p_value:.2g}"]


def _html_cells(row: list[str]) -> str:
    span = f' colspan="{len(_TITLES) - 1}"' if len(row) == 2 else ""
    return f"<td>{html.escape(row[0])}</td>" + "".join(f"<td{span}>{html.escape(cell)}</td>" for cell in row[1:])


def _finite(value: Any) -> Any:
    """The value with null for what JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
