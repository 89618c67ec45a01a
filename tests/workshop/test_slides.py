"""The pages of a slide show: which cells share one, and how tall they are."""

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minimoe.course.style import image_tag, new_figure
from workshop.slides import PAGE, height, slide_types

pytestmark = pytest.mark.exact("computes nothing")

SENTENCE = "Every expert has a number, and no expert knows the others. "
OPENING = f"""# One MoE layer

**{SENTENCE[:-2]}.**

**You will**

- Find a thing
- Compute another
- Explain both

**Time:** about 5 minutes to read, 2 seconds to run.

**Know first:** nothing."""
TABLE = "| | for | against |\n|---|---|---|\n" + "\n".join(
    f"| {k} | {SENTENCE * k} | {SENTENCE * k} |" for k in (1, 2, 3)
)
ROWS = "<tr><td>std_profile</td><td>0.987</td></tr>" * 8
REPORT = (
    f"<p>{SENTENCE * 2}</p><table><thead><tr><th>method</th><th>score</th></tr></thead><tbody>{ROWS}</tbody></table>"
    f"<p>{SENTENCE}</p>"
)
ANSWER = "<details><summary><b>What happened</b></summary>\n\n{}\n\n</details>"


def printing(lines: int, source: str = "print(6 * 7)"):
    return new_code_cell(source, outputs=[new_output("stream", name="stdout", text="42\n" * lines)])


def showing(inches: float):
    figure = new_figure(inches)
    figure.set_label("An empty figure")
    html = {"text/html": image_tag(figure), "text/plain": "An empty figure"}
    return new_code_cell("figure, data = draw()\nshow(figure)", outputs=[new_output("display_data", html)])


def types(*cells) -> list[str]:
    return slide_types(new_notebook(cells=list(cells)))


TITLE = new_markdown_cell("# A page")
PREDICTION = new_markdown_cell("## A part\n\n**Predict.** What does it print?")


def test_a_heading_opens_a_slide_and_the_answer_stays_with_its_result():
    assert types(TITLE, PREDICTION, printing(1), new_markdown_cell(ANSWER.format("It printed 42."))) == [
        "slide",
        "slide",
        "subslide",  # after a prediction: the class thinks first
        "-",
    ]


def test_what_does_not_fit_on_the_page_opens_another():
    answer = new_markdown_cell(ANSWER.format("It printed 42."))
    assert types(TITLE, PREDICTION, printing(24), answer)[2:] == ["subslide", "subslide"]
    assert types(TITLE, new_markdown_cell("This is what it shows at first:"), showing(4), printing(20))[1:] == [
        "subslide",
        "-",
        "subslide",
    ]


def test_what_no_page_can_hold_is_a_note():
    assert height(showing(8)) > PAGE
    assert types(TITLE, PREDICTION, showing(8), new_markdown_cell(ANSWER.format(SENTENCE * 40)))[2:] == [
        "notes",
        "notes",
    ]


def test_imports_widgets_and_the_links_at_the_end_are_left_out():
    widget = printing(1, "controls(draw)")
    widget.metadata["tags"] = ["nbval-ignore-output"]
    imports = new_code_cell("import torch\n\ntorch.set_num_threads(1)")
    assert types(TITLE, imports, widget, new_markdown_cell("**Previous:** none · **Next:** none"))[1:] == ["skip"] * 3
    assert types(TITLE, printing(1, "import torch\nprint(6 * 7)"))[1:] == ["-"]


# Pixels in Chromium 156 with reveal.js 4.6 and nbconvert 7.17; test_browser.py measures whole notebooks so.
MEASURED = [
    (new_markdown_cell(OPENING), 456),
    (new_markdown_cell(f"## A part\n\n{SENTENCE * 5}\n\n{SENTENCE * 5}\n\n**Predict.** {SENTENCE * 2}"), 416),
    (new_markdown_cell("## A part\n\n" + "\n".join("- " + SENTENCE * k for k in (1, 2, 3))), 308),
    (new_markdown_cell(ANSWER.format(SENTENCE * 6)), 212),
    (new_markdown_cell("A card:\n\n```json\n" + '{"a": 1,\n' * 5 + "}\n```"), 228),
    (new_markdown_cell(TABLE), 367),
    (new_code_cell("report", outputs=[new_output("display_data", {"text/html": REPORT, "text/plain": "x"})]), 504),
    (printing(10, "print(6 * 7)\n" * 10), 508),
    (new_code_cell("x = 1\n" * 3, outputs=[new_output("stream", name="stdout", text=("word " * 20 + "\n") * 5)]), 349),
]


def test_heights_are_a_little_more_than_what_a_browser_measures():
    for cell, measured in MEASURED:
        assert measured <= height(cell) <= measured + 60, cell.source[:60]
