"""The widgets, driven from Python; the browser test drives them where people meet them."""

from minimoe.course.style import describe, new_figure
from minimoe.course.widgets import text_box


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
