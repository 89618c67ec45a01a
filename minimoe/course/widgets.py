"""Thin ipywidgets shells. Whatever they show comes from a function that works, and is tested, without them."""

from __future__ import annotations

import html
from collections.abc import Callable

from matplotlib.figure import Figure

from minimoe.course.style import image_tag


def text_box(draw: Callable[[str], tuple[Figure, dict]], text: str, *, label: str = "Your text"):
    """A box to type in, and below it the picture of what stands in the box, redrawn on Enter.

    Args:
        draw: from a text to (figure, data); what it cannot draw it refuses with a ValueError, which is shown instead.
        text: in the box at the start.
        label: in front of the box.

    Returns:
        An ipywidgets box with children (Text, HTML).
    """
    import ipywidgets

    box = ipywidgets.Text(
        value=text,
        description=label,
        continuous_update=False,
        layout=ipywidgets.Layout(width="100%", max_width="720px"),
        style={"description_width": "initial"},
    )
    picture = ipywidgets.HTML()

    def redraw(_change=None) -> None:
        picture.value = _drawn(draw, box.value)

    box.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([box, picture])


def _drawn(draw: Callable[[str], tuple[Figure, dict]], text: str) -> str:
    try:
        figure, _ = draw(text)
    except ValueError as error:
        return f"<p>{html.escape(str(error))}</p>"
    return image_tag(figure)
