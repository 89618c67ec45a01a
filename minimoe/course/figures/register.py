"""The register of figures, what they draw when nothing is given, and how they are written to files.

A figure is written as a function that returns (figure, data, alt): what is drawn, the numbers in it, and the alt text.
`figure` hands the alt text to the picture, so whoever calls it gets (figure, data). `data` maps column names to lists
of equal length; the CSV beside a picture holds it, and the tests compare it.
"""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from minimoe.atomic import write_atomically
from minimoe.course.style import RC, describe, render
from minimoe.model.config import require
from minimoe.progress import progress_bar

Data = dict[str, list]
Drawing = tuple[Figure, Data, str]
Draw = Callable[..., tuple[Figure, Data]]

FIGURES: dict[str, Draw] = {}


def figure(*, listed: bool = True, **shipped: Callable[[], Any]) -> Callable[[Callable[..., Drawing]], Draw]:
    """Make a function that draws one that is called as above, and draws in the course's style.

    Args:
        listed: among `FIGURES`.
        **shipped: for each argument that holds data, what loads the data that come with the kit. It is called where
            the argument is left out: `expert_use()` draws the shipped trace, `expert_use(trace)` yours.
    """

    def decorate(draw: Callable[..., Drawing]) -> Draw:
        @wraps(draw)
        def styled(*args, **kwargs) -> tuple[Figure, Data]:
            given = signature(draw).bind_partial(*args, **kwargs).arguments
            loaded = {name: load() for name, load in shipped.items() if name not in given}
            with mpl.rc_context(RC):
                drawn, data, *alt = draw(*args, **kwargs, **loaded)
            if alt:  # else it was drawn by another figure, which has described it
                describe(drawn, *alt)
            return drawn, data

        if listed:
            FIGURES[draw.__name__] = styled
        return styled

    return decorate


def make(names: Iterable[str] | None = None, out: str | Path = "figures", **options: Any) -> list[Path]:
    """Draw figures into the folder `out` as PNG, SVG and CSV, and return the paths written.

    `names` are keys of `FIGURES`; None or empty: all of them. The options are given to each of these figures. Raises
    ValueError where a name is unknown; nothing is written then.
    """
    names = list(names or FIGURES)
    for name in names:
        require(name in FIGURES, "figure", name, f"one of {', '.join(FIGURES)}")
    paths = []
    for name in progress_bar(names, desc="figures", unit="figure"):
        drawn, data = FIGURES[name](**options)
        contents = {"png": render(drawn, "png"), "svg": render(drawn, "svg"), "csv": to_csv(data).encode()}
        for kind, content in contents.items():
            paths.append(Path(out) / f"{name}.{kind}")
            write_atomically(paths[-1], content)
    return paths


def columns(names: Iterable[str], rows: Iterable[Iterable[Any]]) -> Data:
    """Rows of equal length as the data of a figure: one list for each name. Numbers of numpy become those of Python;
    None and NaN become "", an empty cell."""
    plain = (map(_plain, row) for row in rows)
    return dict(zip(names, map(list, zip(*plain, strict=True)), strict=True))


def _plain(cell: Any) -> Any:
    value = cell.item() if isinstance(cell, np.generic) else cell
    return "" if value is None or value != value else value


def cell_columns(axes: Mapping[str, Sequence], **values: np.ndarray) -> Data:
    """Arrays of one shape as the data of a figure: a row for each cell, with its place on every axis and its values.
    The axes are given with their entries, as `{"layer": range(4), "group": groups}`."""
    cells = zip(product(*axes.values()), *map(np.ravel, values.values()), strict=True)
    return columns((*axes, *values), ((*place, *numbers) for place, *numbers in cells))


def to_csv(data: Data) -> str:
    """`data` as CSV with a header; floats with 6 significant digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(data)
    for row in zip(*data.values(), strict=True):
        writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in row)
    return text.getvalue()
