"""Thin ipywidgets shells. Whatever they show comes from a function that works, and is tested, without them.

Such a function returns (figure, data). What it cannot draw it refuses with a ValueError, which is shown instead.
"""

import html
import subprocess
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from minimoe.course.style import image_tag
from minimoe.data_files import workshop_command

Draw = Callable[..., tuple[Figure, dict]]


def text_box(draw: Draw, text: str, *, label: str = "Your text"):
    """A box to type in, which begins with `text`, and below it the picture of what stands in it, redrawn on Enter: an
    ipywidgets box with children (Text, HTML)."""
    look = {"layout": {"width": "100%", "max_width": "720px"}, "style": {"description_width": "initial"}}
    box = ipywidgets.Text(value=text, description=label, continuous_update=False, **look)
    return ipywidgets.VBox([box, _picture(lambda: draw(box.value), [box])])


def controls(draw: Draw, **ranges: tuple | Sequence | bool):
    """A slider, a list or a tick box for some arguments of `draw`, and below them the picture, redrawn on every change.

    The ranges are what `ipywidgets.interact` takes for each of these arguments: (low, high) or (low, high, step) for a
    slider, a list of choices, or True or False. A control starts at the default of its argument. Returns an ipywidgets
    box with one control for each argument, in order, then an HTML.
    """
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


def live_page(draw: Draw, page: str, *, height: int = 800):
    """A page of the site in a frame, "mixture" or "claim", whose models run in the browser: an ipywidgets HTML.

    Only a clone of the repository has the page; elsewhere it is the still picture that `draw` draws.
    """
    try:
        command, environment = workshop_command("workshop.live", page)
    except FileNotFoundError:
        return ipywidgets.HTML(image_tag(draw()[0]))
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    look = f"width: 100%; height: {height}px; border: 0"
    return ipywidgets.HTML(f'<iframe title="Live page" style="{look}" srcdoc="{html.escape(done.stdout)}"></iframe>')


def _picture(draw: Callable[[], tuple[Figure, dict]], parts: Iterable[Any]):
    """An HTML widget with what `draw` draws now, and again whenever the value of a part changes."""
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
