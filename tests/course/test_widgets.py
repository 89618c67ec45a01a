"""The widgets, driven from Python; the browser test drives them where people meet them."""

import html
import subprocess
from functools import partial

from minimoe.course import widgets
from minimoe.course.style import describe, new_figure
from minimoe.course.widgets import controls, live_page, text_box


def draw(text):
    if not text:
        raise ValueError("nothing to <draw>")
    drawn = new_figure(1)
    describe(drawn, f"a picture of {text}")
    return drawn, {"text": [text]}


def draw_bars(data, experts=8, temperature=1.0, router="topk", causal=False, quiet=True):
    if experts == 13:
        raise ValueError("experts=13: wanted <another>")
    drawn = new_figure(1)
    describe(drawn, f"{experts} bars of {data}, {temperature}, {router}, {causal}, {quiet}")
    return drawn, {}


def test_a_text_box_draws_its_text_and_explains_what_cannot_be_drawn():
    box, picture = text_box(draw, "one").children
    assert 'alt="a picture of one"' in picture.value
    box.value = "two"
    assert 'alt="a picture of two"' in picture.value
    box.value = ""
    assert picture.value == "<p>nothing to &lt;draw&gt;</p>"
    box.value = "back"
    assert "a picture of back" in picture.value


def test_controls_start_at_the_defaults_and_redraw():
    """An argument without a range, and one that was given before, have no control."""
    ranges = {"experts": (2, 16), "temperature": (0.5, 2.0, 0.5), "router": ["topk", "hash"], "causal": False}
    *parts, picture = controls(partial(draw_bars, "mine"), **ranges).children
    assert [part.value for part in parts] == [8, 1.0, "topk", False]
    assert [part.description for part in parts] == list(ranges)
    assert 'alt="8 bars of mine, 1.0, topk, False, True"' in picture.value
    for part, value in zip(parts, (4, 2.0, "hash", True), strict=True):
        part.value = value
    assert 'alt="4 bars of mine, 2.0, hash, True, True"' in picture.value
    parts[0].value = 13
    assert picture.value == "<p>experts=13: wanted &lt;another&gt;</p>"


def test_a_live_page_stands_in_a_frame(monkeypatch):
    page = '<p title="a">1 < 2 & "b"</p>'
    asked = []

    def run(command, **_):
        asked.append(command[1:])
        return subprocess.CompletedProcess(command, 0, stdout=page)

    monkeypatch.setattr(widgets.subprocess, "run", run)
    frame = live_page(partial(draw, "one"), "mixture", height=500).value
    assert asked == [["-m", "workshop.live", "mixture"]]
    assert f'srcdoc="{html.escape(page)}"' in frame and "height: 500px" in frame and 'title="' in frame


def test_without_a_clone_a_live_page_is_its_still_picture(monkeypatch):
    def missing(*_):
        raise FileNotFoundError("found no workshop/")

    monkeypatch.setattr(widgets, "workshop_command", missing)
    assert 'alt="a picture of one"' in live_page(partial(draw, "one"), "mixture").value
