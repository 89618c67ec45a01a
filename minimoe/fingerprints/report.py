"""What `compare` returns, as text, JSON, HTML and a figure."""

import html
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from minimoe.fingerprints.direction import Direction
from minimoe.fingerprints.verdict import EVIDENCE, Correlation, Evidence, PValue
from minimoe.fingerprints.weights import Files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What methods are called where people read; the names of compare.METHODS and QUICK are for programs.
NAMES = {
    "csu": "neuron order (csu)",
    "aligned_cka": "aligned CKA",
    "aligned_cka_plain": "aligned CKA, plain",
    "virtual_response_whitened": "whitened response",
    "token_agreement": "equal next tokens",
    "hidden_cka": "CKA of hidden states",
    "last_csu": "neuron order, last layers",
    "score": "all, combined",
}
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
        """Each method's score as a mark on a bar that spans the strangers, and a tick where evidence begins; first the
        methods that enter the verdict, then the others, in a panel of their own.

        Returns:
            The figure, and its numbers by method: "score", "lowest", "highest" and "level".
        """
        import matplotlib as mpl
        from matplotlib.figure import Figure

        shown = {name: evidence for name, evidence in self.methods.items() if evidence.result.score is not None}
        decide = {name: evidence for name, evidence in shown.items() if evidence.scale is not None}
        others = {name: evidence for name, evidence in shown.items() if evidence.scale is None}
        parts = [part for part in (decide, others) if part] or [{}]
        sizes = [max(len(part), 1) for part in parts]
        with mpl.rc_context({"font.size": 11}):
            height = 1.5 + 0.36 * sum(sizes) + 0.5 * len(parts)
            figure = Figure(figsize=(7.6, height), dpi=160, layout="constrained")
            panels = figure.subplots(len(parts), 1, sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
            data = {}
            for axes, part in zip(panels, parts, strict=True):
                data |= _draw_scores(axes, part)
                axes.set_title("these decide" if part is decide else "these do not decide", loc="left", size=11)
            panels[-1].set_xlabel("score")
            panels[0].set_xlim(min(-0.1, *(numbers.get("lowest", 0) - 0.02 for numbers in data.values()), 0), 1.04)
            key = {text: mark for axes in panels for mark, text in zip(*axes.get_legend_handles_labels(), strict=True)}
            figure.legend(key.values(), key.keys(), loc="outside lower left", ncols=3, frameon=False, columnspacing=1.2)
            figure.suptitle("\n".join(self._headline()[0].split(" (")).rstrip(")"), x=0.01, ha="left", weight="bold")
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


def title_of(method: str) -> str:
    """What a method is called where people read."""
    return NAMES.get(method, method.replace("_", " "))


def _draw_scores(axes: "Axes", part: Mapping[str, Evidence]) -> dict[str, dict[str, Any]]:
    """A row for each method, the first at the top; returns the numbers in them."""
    data = {}
    for row, (name, evidence) in enumerate(part.items()):
        data[name] = numbers = {"score": evidence.result.score, "level": evidence.level}
        if evidence.strangers:
            numbers |= {"lowest": min(evidence.strangers), "highest": max(evidence.strangers)}
            span = numbers["highest"] - numbers["lowest"]
            axes.barh(row, span, left=numbers["lowest"], height=0.6, color="#C8C8C8", label="strangers")
        if evidence.level is not None and isinstance(evidence.scale, Correlation):  # others are not of the score
            look = {"color": "#222222", "linewidth": 2.5}
            axes.vlines(evidence.level, row - 0.42, row + 0.42, **look, label="evidence begins")
        beyond = numbers["score"] > numbers.get("highest", math.inf)
        look = {"markeredgecolor": "#222222", "markerfacecolor": "#4477AA" if beyond else "white", "markersize": 9}
        label = {"label": "this pair (filled: above all strangers)"} if row == 0 else {}
        axes.plot(numbers["score"], row, "D", **look, **label, zorder=3)
        number = f"{numbers['score']:z.2f}"
        if isinstance(evidence.scale, PValue):
            number = f"p = {evidence.result.p_value:.2g}"
        axes.annotate(number, (1.02, row), xycoords=("axes fraction", "data"), va="center")
    axes.set_yticks(range(len(part)), map(title_of, part))
    axes.set_ylim(max(len(part), 1) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    return data


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
