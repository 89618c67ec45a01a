"""The register of figures, and how they are written to files.

A figure is a function that returns (figure, data): what is drawn, and the numbers in it. `data` maps column names to
lists of equal length; the CSV beside a picture holds it, and the tests compare it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from minimoe.atomic import write_atomically
from minimoe.course.style import RC, render
from minimoe.progress import progress_bar

Data = dict[str, list]
Drawing = tuple[Figure, Data]

FIGURES: dict[str, Callable[[], Drawing]] = {}


def figure(draw: Callable[..., Drawing]) -> Callable[..., Drawing]:
    """Draw in the course's style, and list the function among `FIGURES`."""
    styled = in_style(draw)
    FIGURES[draw.__name__] = styled
    return styled


def in_style(draw: Callable[..., Drawing]) -> Callable[..., Drawing]:
    @wraps(draw)
    def styled(*args, **kwargs) -> Drawing:
        with mpl.rc_context(RC):
            return draw(*args, **kwargs)

    return styled


def make(names: Iterable[str] | None = None, out: str | Path = "figures", **options: Any) -> list[Path]:
    """Draw figures into `out` as PNG, SVG and CSV, and return the paths written.

    Args:
        names: keys of `FIGURES`; None or empty: all of them.
        out: a folder, made if missing.
        **options: given to each of these figures.

    Raises:
        ValueError: a name is unknown; nothing is written then.
    """
    names = list(names or FIGURES)
    for name in names:
        if name not in FIGURES:
            raise ValueError(f"figure {name!r} is unknown: wanted one of {', '.join(FIGURES)}")
    paths = []
    for name in progress_bar(names, desc="figures", unit="figure"):
        drawn, data = FIGURES[name](**options)
        contents = {"png": render(drawn, "png"), "svg": render(drawn, "svg"), "csv": to_csv(data).encode()}
        for kind, content in contents.items():
            path = Path(out) / f"{name}.{kind}"
            write_atomically(path, content)
            paths.append(path)
    return paths


def columns(names: Iterable[str], rows: Iterable[Iterable[Any]]) -> Data:
    """Rows of equal length as the data of a figure: one list for each name."""
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def to_csv(data: Data) -> str:
    """`data` as CSV with a header; floats with 6 significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(data)
    for row in zip(*data.values(), strict=True):
        writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row)
    return text.getvalue()
