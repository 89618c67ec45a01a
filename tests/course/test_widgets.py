"""The widgets, driven from Python; the browser test drives them where people meet them."""

import pytest

from minimoe.course.style import describe, new_figure
from minimoe.course.widgets import controls, text_box


def draw(text):
    if not text:
        raise ValueError("nothing to <draw>")
    drawn = new_figure(1)
    describe(drawn, f"a picture of {text}")
    return drawn, {"text": [text]}


def test_the_box_starts_with_the_picture_of_its_text():
    _, picture = text_box(draw, "one").children
    assert 'alt="a picture of one"' in picture.value


def test_another_text_gives_another_picture():
    box, picture = text_box(draw, "one").children
    box.value = "two"
    assert 'alt="a picture of two"' in picture.value


def test_what_cannot_be_drawn_is_explained_in_the_picture_s_place():
    box, picture = text_box(draw, "one").children
    box.value = ""
    assert picture.value == "<p>nothing to &lt;draw&gt;</p>"
    box.value = "back"
    assert "a picture of back" in picture.value


def draw_bars(experts=8, temperature=1.0, router="topk", causal=False):
    if experts == 13:
        raise ValueError("experts=13: wanted <another>")
    drawn = new_figure(1)
    describe(drawn, f"{experts} bars, {temperature}, {router}, {causal}")
    return drawn, {}


@pytest.fixture
def panel():
    choices = ["topk", "hash"]
    return controls(draw_bars, experts=(2, 16), temperature=(0.5, 2.0, 0.5), router=choices, causal=False).children


def test_controls_start_where_the_function_does(panel):
    assert [part.value for part in panel[:-1]] == [8, 1.0, "topk", False]
    assert [part.description for part in panel[:-1]] == ["experts", "temperature", "router", "causal"]
    assert 'alt="8 bars, 1.0, topk, False"' in panel[-1].value


def test_every_control_changes_the_picture(panel):
    for part, value in zip(panel, (4, 2.0, "hash", True), strict=False):
        part.value = value
    assert 'alt="4 bars, 2.0, hash, True"' in panel[-1].value


def test_what_the_controls_cannot_draw_is_explained(panel):
    panel[0].value = 13
    assert panel[-1].value == "<p>experts=13: wanted &lt;another&gt;</p>"
