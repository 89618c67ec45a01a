"""What several figures draw: panels, tables of shaded numbers, curves of several seeds, notes, ranges in words."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy import ndarray

from minimoe.course.style import INK, MAIN, new_figure

FILL = LinearSegmentedColormap.from_list("white to main", ["white", MAIN])  # darker is more, in greyscale too


def new_panels(
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """A new figure with panels in reading order, and what is written for all of them: a title, labels of the axes.
    The title stands at the left edge, taken as it is, dollar signs too; options are those of `Figure.subplots`."""
    figure = new_figure(height)
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    if title:
        figure.suptitle(title, x=0.01, ha="left", parse_math=False)
    if xlabel:
        figure.supxlabel(xlabel)
    if ylabel:
        figure.supylabel(ylabel)
    return figure, panels


def new_pairs(number: int, height: float, extra: float = 0.0, **texts: str) -> tuple[Figure, list[Axes]]:
    """A new figure with `number` panels of common axes, two to a line of `height` inches, and `extra` inches beside.
    Where the number is odd, the last place stays empty."""
    lines = -(-number // 2)
    figure, panels = new_panels(lines * height + extra, lines, 2, sharex=True, sharey=True, **texts)
    for panel in panels[number:]:
        panel.set_axis_off()
    return figure, panels[:number]


def label_rows(axes: Axes, labels: Sequence[Any], margin: float = 0.5, **look: Any) -> None:
    """Names at the heights 0, 1, ... of a panel, the first at the top."""
    axes.set_yticks(range(len(labels)), labels, **look)
    axes.set_ylim(len(labels) - 1 + margin, -margin)


def label_right(axes: Axes, heights: Sequence[float] | ndarray, labels: Sequence[str], title: str = "") -> Axes:
    """Numbers beside the right edge of a panel, and what they are; returns the axis that holds them."""
    right = axes.secondary_yaxis("right")
    right.set_yticks(heights, labels)
    right.tick_params(length=0)
    right.set(frame_on=False, ylabel=title)
    return right


def heatmap(
    axes: Axes,
    values: ndarray,
    text: str = "z.2f",
    *,
    rows: Sequence[Any] | None = None,
    columns: Sequence[Any] | None = None,
    top: float = 1.0,
    shade: ndarray | None = None,
    bold: ndarray | None = None,
    size: float = 10,
) -> None:
    """A table with every number written on a shade between white, 0, and blue, `top`. A NaN leaves its cell empty.

    Args:
        values: [rows, columns].
        text: the format of a number ("z" writes -0 as 0).
        rows, columns: names; None: numbers from 0.
        top: what the darkest shade stands for, on which the number is white.
        shade: [rows, columns], what the shades show; None: the values.
        bold: [rows, columns], whether a number is bold.
        size: of the numbers, in points.
    """
    shade = values if shade is None else shade
    bold = np.zeros_like(values) if bold is None else bold
    axes.imshow(shade, cmap=FILL, vmin=0, vmax=top, aspect="auto")
    for place in np.argwhere(~np.isnan(values)):
        cell = tuple(place)
        look = {"color": "white" if shade[cell] > 0.9 * top else INK, "weight": "bold" if bold[cell] else "normal"}
        axes.text(*place[::-1], format(values[cell], text), ha="center", va="center", size=size, **look)
    down, across = values.shape
    axes.set_yticks(range(down), range(down) if rows is None else rows)
    axes.set_xticks(range(across), range(across) if columns is None else columns)
    axes.tick_params(length=0)
    axes.set_frame_on(False)


def curve_with_seeds(axes: Axes, x: ndarray, values: ndarray, style: dict[str, Any], label: str) -> None:
    """The mean over the seeds of `values` [seeds, n] as a line, and a dot for each seed."""
    axes.plot(x, values.mean(0), **style, label=label)
    axes.plot(x, values.T, color=style["color"], marker=".", linestyle="")


def note(axes: Axes, text: str, place: tuple[float, float], points: float) -> None:
    """A text beside a place, so many points to the right, or to the left where `points` are negative."""
    side = "left" if points > 0 else "right"
    axes.annotate(text, place, (points, 0), textcoords="offset points", ha=side, va="center", size=10)


def span(values: Sequence[float] | ndarray, digits: int = 2) -> str:
    """The smallest and the largest in words, as "0.10 to 0.25"; one number where both read alike."""
    return " to ".join(dict.fromkeys(f"{end:.{digits}f}" for end in (np.min(values), np.max(values))))
