"""What all figures have in common: their data against committed numbers, their looks against rules one can compute."""

import csv
import io
import re

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from minimoe.course import figures
from minimoe.course.figures.drawing import curve_with_seeds, heatmap, new_pairs, new_panels, span
from minimoe.course.figures.register import cell_columns, columns, figure
from minimoe.course.shipped import real_text_model
from minimoe.course.style import EXPERT_COLOURS, INK, SERIES, describe, image_tag, new_figure
from minimoe.model import MoEConfig, MoEForCausalLM
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
        if len(a) != len(b) or not all(map(same, a, b)):
            return f"line {line}: {a}, wanted {b}"
    return None


def same(found: str, wanted: str) -> bool:
    try:
        return float(found) == pytest.approx(float(wanted), rel=RELATIVE, abs=ABSOLUTE)
    except ValueError:
        return found == wanted


def fits_its_page(drawn) -> bool:
    FigureCanvasAgg(drawn).draw()
    area, (width, height) = drawn.get_tightbbox(), drawn.get_size_inches()
    return area.x0 > -0.01 and area.y0 > -0.01 and area.x1 < width + 0.01 and area.y1 < height + 0.01


def small_model() -> MoEForCausalLM:
    """Four experts, two layers, untrained, with the tokenizer of the course: a model of one's own."""
    config = MoEConfig(num_hidden_layers=2, num_experts=4, hidden_size=32, initializer_range=0.3)
    model = MoEForCausalLM(config, seed=1)
    model.tokenizer_json = real_text_model().tokenizer_json
    return model


@pytest.mark.parametrize("name", [name for name in figures.FIGURES if name != "weights_and_behaviour"])  # takes long
def test_shipped_figure(name):
    """Its data are those that were committed, it has an alt text, and nothing is cut off.

    The one that is left out is held against its committed data in test_figures_relatives.py.
    """
    drawn, data = figures.FIGURES[name]()
    wanted = (FIGURE_DATA / f"{name}.csv").read_text(encoding="utf-8")
    found = difference(figures.to_csv(data), wanted)
    assert found is None, f"{found}; if that is meant, write the CSV files anew with `figure-data`"
    assert len(drawn.get_label().split()) > 10
    assert figures.FIGURES[name].__doc__
    assert fits_its_page(drawn)


def test_committed_data_belong_to_figures():
    assert {path.stem for path in FIGURE_DATA.glob("*.csv")} == set(figures.FIGURES)


def test_a_change_in_committed_data_is_seen():
    text = (FIGURE_DATA / "expert_use.csv").read_text(encoding="utf-8")
    number = re.findall(r"\d+\.\d{3,}", text)[0]
    assert difference(text, text) is None
    assert difference(text.replace(number, f"{float(number) * 1.01:.6g}", 1), text)
    assert difference(text[: text.rindex("\n", 0, -1) + 1], text)
    assert difference(text.replace("\nenglish/", "\nfrench/", 1), text)


def test_make_writes_three_files_a_figure_and_the_same_bytes_again(tmp_path):
    paths = figures.make(["parameters_total_active"], tmp_path / "new")
    assert [path.name for path in paths] == [f"parameters_total_active.{kind}" for kind in ("png", "svg", "csv")]
    first = [path.read_bytes() for path in paths]
    assert first[0].startswith(b"\x89PNG") and b"<svg" in first[1] and first[2].startswith(b"model,total,active\n")
    assert [path.read_bytes() for path in figures.make(["parameters_total_active"], tmp_path / "new")] == first


def test_an_unknown_figure_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"figure='pie': wanted one of .*token_map"):
        figures.make(["token_map", "pie"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_shipped_data_are_loaded_where_an_argument_is_left_out():
    loaded = []

    @figure(listed=False, numbers=lambda: loaded.append("shipped") or [1, 2])
    def draw(numbers, factor=1):
        return new_figure(1), {"number": [factor * number for number in numbers]}

    assert draw(factor=3)[1] == {"number": [3, 6]} and loaded == ["shipped"]
    assert draw([5])[1] == draw(numbers=[5])[1] == {"number": [5]}
    assert loaded == ["shipped"]


def test_rows_and_cells_become_columns_of_plain_numbers():
    data = columns(("name", "number"), [("a", np.float32(0.5)), ("b", np.nan), (np.str_("c"), None)])
    assert data == {"name": ["a", "b", "c"], "number": [0.5, "", ""]}
    assert type(data["number"][0]) is float
    values = np.arange(6).reshape(2, 3)
    assert cell_columns({"row": "xy", "column": range(3)}, value=values, double=2 * values) == {
        "row": ["x", "x", "x", "y", "y", "y"],
        "column": [0, 1, 2, 0, 1, 2],
        "value": [0, 1, 2, 3, 4, 5],
        "double": [0, 2, 4, 6, 8, 10],
    }


def test_a_heatmap_has_every_number_in_its_cell():
    _, (axes,) = new_panels(2)
    values = np.array([[0.0, 1.0, -0.001], [0.5, np.nan, 0.25]])
    heatmap(axes, values, "z.2f", rows=["up", "down"], bold=values == 0.25)
    texts = {(round(text.get_position()[1]), round(text.get_position()[0])): text for text in axes.texts}
    assert {place: text.get_text() for place, text in texts.items()} == {
        (0, 0): "0.00", (0, 1): "1.00", (0, 2): "0.00", (1, 0): "0.50", (1, 2): "0.25",
    }  # fmt: skip
    assert [text.get_text() for text in axes.texts if text.get_weight() == "bold"] == ["0.25"]
    assert [text.get_text() for text in axes.texts if text.get_color() == "white"] == ["1.00"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["up", "down"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is at the top
    shades = axes.images[0].cmap(axes.images[0].norm([0.0, 0.5, 1.0]))
    assert [luminance(shade[:3]) for shade in shades] == sorted((luminance(s[:3]) for s in shades), reverse=True)


def test_curves_pairs_and_spans():
    _, (axes,) = new_panels(2)
    curve_with_seeds(axes, np.arange(2), np.array([[0.0, 1.0], [1.0, 3.0]]), SERIES[0], "two seeds")
    mean, *seeds = axes.lines
    assert mean.get_ydata().tolist() == [0.5, 2.0] and mean.get_label() == "two seeds"
    assert [seed.get_ydata().tolist() for seed in seeds] == [[0.0, 1.0], [1.0, 3.0]]
    drawn, panels = new_pairs(3, height=2, extra=1)
    assert len(panels) == 3 and [axes.axison for axes in drawn.axes] == [True, True, True, False]
    assert drawn.get_figheight() == 5
    assert span([0.25, 0.1]) == "0.10 to 0.25" and span(np.array([0.101, 0.1]), 1) == "0.1"


def test_a_figure_is_shown_with_its_alt_text_escaped():
    drawn = new_figure(1)
    with pytest.raises(ValueError, match="no alt text"):
        image_tag(drawn)
    describe(drawn, 'a "quoted" <b>')
    assert 'alt="a &quot;quoted&quot; &lt;b&gt;"' in image_tag(drawn)


def luminance(colour) -> float:
    channels = matplotlib.colors.to_rgb(colour)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_on_an_expert_colour_is_readable():
    """WCAG 2.2, contrast for small text."""
    for colour in EXPERT_COLOURS:
        assert (luminance(colour) + 0.05) / (luminance(INK) + 0.05) >= 4.5, colour
