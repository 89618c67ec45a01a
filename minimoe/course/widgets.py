"""Thin ipywidgets shells. Whatever they show comes from a function that works, and is tested, without them."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from inspect import Signature, signature
from typing import Any

from matplotlib.figure import Figure

from minimoe.course.style import image_tag

Draw = Callable[..., tuple[Figure, dict]]


def text_box(draw: Draw, text: str, *, label: str = "Your text"):
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
    return ipywidgets.VBox([box, _picture(lambda: draw(box.value), [box])])


def controls(draw: Draw, **ranges: tuple | Sequence | bool):
    """A slider, a list or a tick box for some arguments of `draw`, and below them the picture, redrawn on every change.

    Args:
        draw: from the arguments to (figure, data). A control starts at the default of its argument. What cannot be
            drawn is refused with a ValueError, which is shown instead.
        **ranges: for each of these arguments what `ipywidgets.interact` takes: (low, high) or (low, high, step) for a
            slider, a list of choices, or True or False.

    Returns:
        An ipywidgets box: one control for each argument, in order, then an HTML.
    """
    import ipywidgets

    controlled = [argument for argument in signature(draw).parameters.values() if argument.name in ranges]

    def settings(**values: Any) -> None:
        """What ipywidgets makes controls for."""

    settings.__signature__ = Signature([argument.replace(kind=argument.KEYWORD_ONLY) for argument in controlled])
    parts = ipywidgets.interactive(settings, **ranges).kwargs_widgets
    names = {part: part.description for part in parts}
    for part in parts:
        part.description = names[part].replace("_", " ")
        part.style.description_width = "130px"
        part.layout.width = "min(100%, 440px)"
        if part.has_trait("continuous_update"):
            part.continuous_update = False  # a drawing takes longer than a moving hand waits
    return ipywidgets.VBox([*parts, _picture(lambda: draw(**{names[part]: part.value for part in parts}), parts)])


def _picture(draw: Callable[[], tuple[Figure, dict]], parts: Sequence[Any]):
    """An HTML widget with what `draw` draws now, and again whenever the value of a part changes."""
    import ipywidgets

    picture = ipywidgets.HTML()

    def redraw(_change=None) -> None:
        picture.value = _drawn(draw)

    for part in parts:
        part.observe(redraw, names="value")
    redraw()
    return picture


def _drawn(draw: Callable[[], tuple[Figure, dict]]) -> str:
    try:
        figure, _ = draw()
    except ValueError as error:
        return f"<p>{html.escape(str(error))}</p>"
    return image_tag(figure)
