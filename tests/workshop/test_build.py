"""Executing notebooks and making exercises from solutions."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from workshop.build import (
    build_exercises,
    build_figure_data,
    build_metadata,
    build_notebooks,
    main,
    make_exercise,
    make_gaps,
    normalise,
    read,
    write,
    written_lines,
)

pytestmark = pytest.mark.exact("computes nothing")

SOLUTION = '''def double(x):
    """Twice x."""
    ### BEGIN SOLUTION
    y = x
    return y + y
    ### END SOLUTION'''


def solution(*sources: str):
    outputs = [new_output("stream", name="stdout", text="2")]
    return new_notebook(
        cells=[
            new_markdown_cell("# Exercise"),
            *(new_code_cell(s, execution_count=1, outputs=outputs) for s in sources),
        ]
    )


def test_an_exercise_has_a_gap_and_no_outputs():
    exercise = make_exercise(solution(SOLUTION, "print(double(1))"))
    assert (
        exercise.cells[1].source
        == 'def double(x):\n    """Twice x."""\n    # YOUR CODE HERE\n    raise NotImplementedError'
    )
    assert [cell.execution_count for cell in exercise.cells[1:]] == [None, None]
    assert [cell.outputs for cell in exercise.cells[1:]] == [[], []]


def test_several_gaps_in_one_cell():
    two = f"{SOLUTION}\n\n{SOLUTION.replace('double', 'twice')}"
    exercise = make_exercise(solution(two))
    assert exercise.cells[1].source.count("raise NotImplementedError") == 2
    assert "y + y" not in exercise.cells[1].source


def test_a_region_that_is_missing_or_not_closed_is_refused():
    for broken in ("### END SOLUTION", "### BEGIN SOLUTION"):
        with pytest.raises(ValueError, match="each '### BEGIN SOLUTION' must be closed"):
            make_exercise(solution(SOLUTION.replace(broken, "#")))
    with pytest.raises(ValueError, match="needs at least one gap"):
        make_exercise(solution("print(1)"))


def test_exercises_are_written_beside_the_solutions(tmp_path):
    write(solution(SOLUTION), tmp_path / "solutions" / "01_a.ipynb")
    build_exercises(tmp_path)
    assert "raise NotImplementedError" in read(tmp_path / "exercises" / "01_a.ipynb").cells[1].source


def test_a_notebook_with_gaps_folds_the_solution_below_the_check_and_leads_where_it_did(tmp_path):
    cells = [
        new_markdown_cell(
            "# Page\n\n**To write the gaps yourself,** open [it](gaps/01_a.ipynb). Here they are filled."
        ),
        new_code_cell(SOLUTION, execution_count=1),
        new_code_cell("print(check_double(double))", execution_count=2, outputs=[new_output("stream", text="Right")]),
        new_markdown_cell("[Next](02_b.ipynb), [docs](https://docs.python.org), [below](#below)"),
        new_code_cell("names['a'](b)\nopen('../data/x')", execution_count=3),
    ]
    solved = new_notebook(cells=cells)
    assert written_lines(solved) == 2
    intro, gap, check, folded, links, code = make_gaps(solved).cells
    assert "# your code here" in intro.source and "filled" not in intro.source
    assert gap.source.endswith("    # your code here\n    raise NotImplementedError") and "y + y" not in gap.source
    assert check.source == "print(check_double(double))" and not check.outputs
    assert folded.source.startswith("<details>") and "return y + y" in folded.source and "###" not in folded.source
    assert links.source == "[Next](../02_b.ipynb), [docs](https://docs.python.org), [below](#below)"
    assert code.source == "names['a'](b)\nopen('../../data/x')"
    write(solved, tmp_path / "01_a.ipynb")
    write(new_notebook(), tmp_path / "02_b.ipynb")
    build_exercises(tmp_path)
    assert [path.name for path in (tmp_path / "gaps").iterdir()] == ["01_a.ipynb"]


def test_normalising_keeps_tags_and_drops_what_differs_between_machines():
    view = {"text/plain": "VBox()", "application/vnd.jupyter.widget-view+json": {"model_id": "a"}}
    cell = new_code_cell("box", outputs=[new_output("display_data", view)])
    cell.metadata = nbformat.from_dict(
        {"tags": ["nbval-ignore-output"], "execution": {"start": "now"}, "scrolled": True}
    )
    tidy = normalise(
        new_notebook(cells=[cell], metadata={"widgets": {}, "kernelspec": {"name": "mine", "display_name": "Mine"}})
    )
    assert tidy.cells[0].metadata == {"tags": ["nbval-ignore-output"], "slideshow": {"slide_type": "slide"}}
    assert list(tidy.cells[0].outputs[0].data) == ["text/plain"]
    assert tidy.metadata.kernelspec.name == "python3" and "widgets" not in tidy.metadata


def test_normalising_joins_what_the_kernel_cut():
    pieces = [("stdout", "a"), ("stdout", "b"), ("stderr", "c"), ("stdout", "d")]
    outputs = [new_output("stream", name=name, text=text) for name, text in pieces]
    tidy = normalise(new_notebook(cells=[new_code_cell("print()", outputs=outputs)]))
    assert [(output.name, output.text) for output in tidy.cells[0].outputs] == [
        ("stdout", "ab"),
        ("stderr", "c"),
        ("stdout", "d"),
    ]


def test_metadata_is_written_and_nothing_executed(tmp_path):
    (tmp_path / "solutions").mkdir()
    for path in (tmp_path / "00_a.ipynb", tmp_path / "solutions" / "00_b.ipynb"):
        write(solution("1 / 0"), path)
        build_metadata(tmp_path)
        cells = read(path).cells
        assert [cell.metadata.slideshow.slide_type for cell in cells] == ["slide", "-"]
        assert cells[1].outputs == solution("1 / 0").cells[1].outputs


def test_notebooks_are_executed_in_their_folder_and_a_failing_one_is_left_alone(tmp_path, capsys):
    (tmp_path / "word.txt").write_text("moe", encoding="utf-8")
    write(
        new_notebook(cells=[new_code_cell("print(open('word.txt').read())"), new_code_cell("1 / 0")]),
        tmp_path / "00_bad.ipynb",
    )
    write(new_notebook(cells=[new_code_cell("print(open('word.txt').read())")]), tmp_path / "01_good.ipynb")
    before = (tmp_path / "00_bad.ipynb").read_bytes()
    assert build_notebooks(tmp_path) == ["00_bad.ipynb"]
    assert (tmp_path / "00_bad.ipynb").read_bytes() == before
    assert read(tmp_path / "01_good.ipynb").cells[0].outputs[0].text == "moe\n"
    assert read(tmp_path / "01_good.ipynb").cells[0].execution_count == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_figure_data_is_written_for_every_figure(tmp_path, monkeypatch):
    monkeypatch.setattr("minimoe.course.figures.FIGURES", {"bars": lambda: (None, {"height": [1, 2]})})
    build_figure_data(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bars.csv"]
    assert (tmp_path / "bars.csv").read_text(encoding="utf-8").split() == ["height", "1", "2"]


def test_an_unknown_task_prints_the_usage(capsys):
    assert main(["everything"]) == 2
    assert "workshop.build notebooks" in capsys.readouterr().err
