"""Thin ipywidgets shells. Whatever they show comes from a function that works, and is tested, without them."""

import html
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any

from matplotlib.figure import Figure

from minimoe.course.style import image_tag

Draw = Callable[..., tuple[Figure, dict]]


def text_box(draw: Draw, text: str, *, label: str = "Your text"):
    """A box to type in, which begins with `text`, and below it the picture of what stands in it, redrawn on Enter.

    Args:
        draw: from a text to (figure, data); what it cannot draw it refuses with a ValueError, which is shown instead.
        label: in front of the box.

    Returns:
        An ipywidgets box with children (Text, HTML).
    """
    import ipywidgets

    look = {"layout": {"width": "100%", "max_width": "720px"}, "style": {"description_width": "initial"}}
    box = ipywidgets.Text(value=text, description=label, continuous_update=False, **look)
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

    control = ipywidgets.interactive.widget_from_abbrev
    arguments = signature(draw).parameters.items()
    parts = {name: control(ranges[name], argument.default) for name, argument in arguments if name in ranges}
    for name, part in parts.items():
        part.description = name.replace("_", " ")
        part.style.description_width = "130px"
        part.layout.width = "min(100%, 440px)"
        if part.has_trait("continuous_update"):
            part.continuous_update = False  # a drawing takes longer than a moving hand waits
    picture = _picture(lambda: draw(**{name: part.value for name, part in parts.items()}), parts.values())
    return ipywidgets.VBox([*parts.values(), picture])


def _picture(draw: Callable[[], tuple[Figure, dict]], parts: Iterable[Any]):
    """An HTML widget with what `draw` draws now, and again whenever the value of a part changes."""
    import ipywidgets

    picture = ipywidgets.HTML()

    def redraw(_change=None) -> None:
        try:
            picture.value = image_tag(draw()[0])
        except ValueError as error:
            picture.value = f"<p>{html.escape(str(error))}</p>"

    for part in parts:
        part.observe(redraw, names="value")
    redraw()
    return picture
