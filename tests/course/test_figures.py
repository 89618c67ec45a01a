"""Figures: their data against committed numbers and against the model, their looks against rules one can compute."""

import csv
import io
import re
from functools import cache

import matplotlib.colors
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from minimoe.course import figures
from minimoe.course.style import EXPERT_COLOURS, INK, describe, image_tag, new_figure, render
from workshop.build import FIGURE_DATA

RELATIVE, ABSOLUTE = 1e-3, 1e-4  # another CPU or BLAS moves a probability by far less


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def difference(found: str, wanted: str) -> str | None:
    """The first difference between two CSV texts: text must be equal, numbers within the tolerance."""
    found_rows, wanted_rows = rows(found), rows(wanted)
    if len(found_rows) != len(wanted_rows):
        return f"{len(found_rows)} rows, wanted {len(wanted_rows)}"
    for line, (a, b) in enumerate(zip(found_rows, wanted_rows, strict=True), start=1):
        if len(a) != len(b) or not all(map(_same, a, b)):
            return f"line {line}: {a}, wanted {b}"
    return None


def _same(found: str, wanted: str) -> bool:
    try:
        return float(found) == pytest.approx(float(wanted), rel=RELATIVE, abs=ABSOLUTE)
    except ValueError:
        return found == wanted


@cache
def drawing(name: str) -> tuple:
    """Each figure is drawn once for all the tests that only look at it."""
    return figures.FIGURES[name]()


@pytest.mark.parametrize("name", figures.FIGURES)
def test_data_is_what_was_committed(name):
    found = figures.to_csv(drawing(name)[1])
    wanted = (FIGURE_DATA / f"{name}.csv").read_text(encoding="utf-8")
    assert difference(found, wanted) is None, "if that is meant: python -m workshop.build figure-data"


def test_committed_data_belongs_to_a_figure():
    assert {path.stem for path in FIGURE_DATA.glob("*.csv")} == set(figures.FIGURES)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_change_in_the_data_is_seen(name):
    text = figures.to_csv(drawing(name)[1])
    number = re.findall(r"\d+\.\d{3,}(?![\de])", text)[0]  # none with an exponent, which may be too small to be seen
    assert difference(text, text) is None
    assert difference(text.replace(number, f"{float(number) * 1.01 + 0.001:.6g}", 1), text)
    assert difference(text[: text.rindex("\n", 0, -1) + 1], text)
    first = rows(text)[1][0]
    assert difference(text.replace(f"\n{first},", "\nother,", 1), text)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figure_has_alt_text_and_a_title_and_fits_its_page(name):
    drawn, data = drawing(name)
    assert len(drawn.get_label().split()) > 10
    assert figures.FIGURES[name].__doc__
    assert len({len(column) for column in data.values()}) == 1
    FigureCanvasAgg(drawn).draw()
    drawn_area, (width, height) = drawn.get_tightbbox(), drawn.get_size_inches()
    assert drawn_area.x0 > -0.01 and drawn_area.y0 > -0.01, "something is clipped"
    assert drawn_area.x1 < width + 0.01 and drawn_area.y1 < height + 0.01, "something is clipped"


def test_token_map_shows_what_the_model_chose():
    _, data = figures.token_map()
    model, tokenizer = figures.shipped_model()
    ids = tokenizer.encode(figures.SHOWCASE).ids
    with torch.no_grad():
        logits = model(torch.tensor([ids]), output_router_logits=True).router_outputs[figures.LAYER].logits
    assert data["expert"] == logits.argmax(-1).tolist()
    assert "".join(data["token"]) == figures.SHOWCASE


def test_no_choice_shown_is_a_near_tie():
    """Another CPU must not flip the colour of a token."""
    assert min(figures.token_map()[1]["margin"]) > 1e-4
    probabilities = sorted(figures.token_journey()[1]["probability"])
    assert min(b - a for a, b in zip(probabilities[-3:], probabilities[-2:], strict=False)) > 1e-4


def test_journey_weights_are_the_chosen_probabilities_rescaled():
    _, data = figures.token_journey()
    chosen = [e for e, weight in enumerate(data["weight"]) if weight]
    best = sorted(data["expert"], key=lambda e: -data["probability"][e])[: len(chosen)]
    assert sorted(best) == chosen
    total = sum(data["probability"][e] for e in chosen)
    assert [data["weight"][e] for e in chosen] == pytest.approx([data["probability"][e] / total for e in chosen])
    assert sum(data["probability"]) == pytest.approx(1)


@pytest.mark.parametrize("text", ["", "long " * 400])
def test_a_text_that_cannot_be_drawn_is_refused(text):
    with pytest.raises(ValueError, match=r"the text has \d+ tokens: wanted 1 to 256"):
        figures.draw_tokens(text)


def test_an_unknown_layer_is_refused():
    with pytest.raises(ValueError, match="layer=9: wanted 0 to 3"):
        figures.draw_tokens("a", layer=9)


@pytest.mark.parametrize(
    "text", [" ", "\n", "a\n\n\tb", "<|endoftext|>", "$x$ $$ \\n <b>", "路由器选择专家", "🙂", "x" * 200, "\x00"]
)
@pytest.mark.filterwarnings("error")
def test_any_text_can_be_drawn(text):
    drawn, data = figures.draw_tokens(text)
    assert render(drawn, "png").startswith(b"\x89PNG")
    assert data["token"]


def test_make_writes_three_files_a_figure(tmp_path):
    paths = figures.make(["parameters_total_active"], tmp_path / "new")
    assert [path.name for path in paths] == [f"parameters_total_active.{kind}" for kind in ("png", "svg", "csv")]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in paths[1].read_bytes()
    assert paths[2].read_text(encoding="utf-8").startswith("model,total,active\n")


@pytest.mark.exact("two drawings are compared to the bit")
def test_making_a_figure_twice_gives_the_same_bytes(tmp_path):
    first = [path.read_bytes() for path in figures.make(["token_journey"], tmp_path)]
    assert [path.read_bytes() for path in figures.make(["token_journey"], tmp_path)] == first


def test_an_unknown_figure_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"figure 'pie' is unknown: wanted one of .*token_map"):
        figures.make(["token_map", "pie"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_figure_without_alt_text_cannot_be_shown():
    with pytest.raises(ValueError, match="no alt text"):
        image_tag(new_figure(1))


def test_alt_text_is_escaped():
    drawn = new_figure(1)
    describe(drawn, 'a "quoted" <b>')
    assert 'alt="a &quot;quoted&quot; &lt;b&gt;"' in image_tag(drawn)


def luminance(colour: str) -> float:
    channels = matplotlib.colors.to_rgb(colour)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", EXPERT_COLOURS)
def test_text_on_an_expert_colour_is_readable(colour):
    """WCAG 2.2, contrast for small text."""
    assert (luminance(colour) + 0.05) / (luminance(INK) + 0.05) >= 4.5
