"""What several figures draw: titles, tables of shaded numbers, curves of several seeds, bare axes, ranges in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy import ndarray

from minimoe.course.style import INK, MAIN, new_figure

FILL = LinearSegmentedColormap.from_list("white to main", ["white", MAIN])  # darker is more, in greyscale too


def new_panels(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A new figure with panels in reading order; options are those of `Figure.subplots`."""
    figure = new_figure(height)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def new_pairs(number: int, height: float, extra: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A new figure with `number` panels of common axes, two to a line of `height` inches, and `extra` inches beside.

    Where the number is odd, the last place stays empty.
    """
    lines = -(-number // 2)
    figure, panels = new_panels(lines * height + extra, lines, 2, sharex=True, sharey=True)
    for panel in panels[number:]:
        panel.set_axis_off()
    return figure, panels[:number]


def set_title(figure: Figure, text: str, size: int = 12) -> None:
    """A title over all panels, at the left edge; the text is taken as it is, dollar signs too."""
    figure.suptitle(text, x=0.01, ha="left", size=size, weight="bold", parse_math=False)


def set_panel_title(axes: Axes, text: str, size: int = 11) -> None:
    """The title of one panel of several, lighter than that of the figure."""
    axes.set_title(text, size=size, weight="normal")


def label_rows(axes: Axes, labels: Sequence[Any], margin: float = 0.5, **look: Any) -> None:
    """Names at the heights 0, 1, ... of a panel, the first at the top."""
    axes.set_yticks(range(len(labels)), labels, **look)
    axes.set_ylim(len(labels) - 1 + margin, -margin)


def remove_frame(axes: Axes) -> None:
    """Leave the labels of the ticks, without the ticks and the lines around the panel."""
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


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
        axes: to draw on.
        values: [rows, columns].
        text: the format of a number ("z" writes -0 as 0).
        rows, columns: names; None: numbers from 0.
        top: what the darkest shade stands for, on which the number is white.
        shade: [rows, columns], what the shades show; None: the values.
        bold: [rows, columns], whether a number is bold.
        size: of the numbers, in points.
    """
    shade = values if shade is None else shade
    axes.imshow(shade, cmap=FILL, vmin=0, vmax=top, aspect="auto")
    for row, column in np.argwhere(~np.isnan(values)):
        value = values[row, column]
        axes.text(
            column,
            row,
            format(value, text),
            ha="center",
            va="center",
            size=size,
            weight="bold" if bold is not None and bold[row, column] else "normal",
            color="white" if shade[row, column] > 0.9 * top else INK,
        )
    down, across = values.shape
    axes.set_yticks(range(down), range(down) if rows is None else rows)
    axes.set_xticks(range(across), range(across) if columns is None else columns)
    remove_frame(axes)


def curve_with_seeds(axes: Axes, x: ndarray, values: ndarray, style: dict[str, Any], label: str) -> None:
    """The mean over the seeds of `values` [seeds, n] as a line, and a dot for each seed."""
    axes.plot(x, values.mean(0), **style, label=label)
    axes.plot(x, values.T, color=style["color"], marker=".", linestyle="")


def shared_legend(figure: Figure, axes: Axes, loc: str, columns: int) -> None:
    """One legend outside the panels, for what the panel `axes` and the others have in common."""
    figure.legend(*axes.get_legend_handles_labels(), loc=loc, ncols=columns, frameon=False)


def span(values: Sequence[float] | ndarray, digits: int = 2) -> str:
    """The smallest and the largest in words, as "0.10 to 0.25"; one number where both read alike."""
    return " to ".join(dict.fromkeys(f"{end:.{digits}f}" for end in (np.min(values), np.max(values))))


def check_layer(layer: int, layers: int) -> None:
    """Raise a ValueError where a model of so many layers has no such layer."""
    if layer not in range(layers):
        raise ValueError(f"layer={layer}: wanted 0 to {layers - 1}")
