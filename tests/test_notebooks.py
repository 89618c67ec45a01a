"""The guards: what a notebook must be beyond passing strict nbval, which a stripped notebook also does.

A guard is a function from a notebook to the problems it found. Every guard runs on every notebook it concerns, and on
a notebook made here to be bad, so that no guard can pass without looking.
"""

import ast
import html
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from minimoe.course import widgets
from workshop import build
from workshop.build import NOTEBOOKS, YOUR_CODE, make_exercise, make_gaps, normalise, sources, written_lines
from workshop.slides import PAGE, height, slide_types

COURSE = sorted(NOTEBOOKS.glob("*.ipynb"))
EXERCISES = sorted(NOTEBOOKS.glob("exercises/*.ipynb"))
GAPS = sorted(NOTEBOOKS.glob("gaps/*.ipynb"))
FIRST_HALF = [path for path in COURSE if path.name[:2] <= "06"]  # mixtures
SECOND_HALF = [path for path in COURSE if "07" <= path.name[:2] <= "12"]  # relatives and provenance
pytestmark = pytest.mark.exact("computes nothing")
Guard = Callable[[NotebookNode, Path], Iterator[str]]
read = cache(build.read)

# What an objective may begin with: verbs whose success can be seen. Extend as needed; "understand" is not among them.
VERBS = re.compile(
    r"Apply|Build|Check|Choose|Compare|Compute|Count|Decide|Derive|Detect|Explain|Find|Follow|"
    r"Implement|Judge|Load|Locate|Measure|Name|Plot|Predict|Read|Rebuild|Recognise|Run|Say|"
    r"Show|Tell|Test|Trace|Train|Try|Write"
)


def markdown(notebook: NotebookNode) -> Iterator[str]:
    return (cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_compared(cell: NotebookNode) -> bool:
    return "nbval-ignore-output" not in cell.metadata.get("tags", [])


# --- what nbval does not see -----------------------------------------------------------------------------------------


def executed_in_order(notebook: NotebookNode, path: Path) -> Iterator[str]:
    counts = [cell.execution_count for cell in code(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}: wanted 1 to {len(counts)}; run `make notebooks`"


def outputs_are_kept(notebook: NotebookNode, path: Path) -> Iterator[str]:
    for cell in code(notebook):
        if not cell.outputs and re.search(r"\b(print|show|display)\(", cell.source):
            yield f"cell {cell.execution_count} prints or shows something, and has no output"
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell {cell.execution_count} ended in {output.ename}"
            if output.get("name") == "stderr":
                yield f"cell {cell.execution_count} wrote to stderr: {output.text[:80]!r}"


def nothing_escapes_comparison(notebook: NotebookNode, path: Path) -> Iterator[str]:
    for cell in code(notebook):
        for call in ("clear_output", "update_display", "display_id", "%%capture", "# NBVAL"):
            if call in cell.source:
                yield f"cell {cell.execution_count} uses {call}, which hides an output"
        if any(line.rstrip().endswith(";") for line in cell.source.splitlines()):
            yield f"cell {cell.execution_count} has a line that ends in ';', which hides an output"
        others = [t for t in cell.metadata.get("tags", []) if t not in ("nbval-ignore-output", "raises-exception")]
        if others:
            yield f"cell {cell.execution_count} has tags {others}: wanted at most nbval-ignore-output"


def calls(cell: NotebookNode) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]


def is_widget(name: str) -> bool:
    return getattr(getattr(widgets, name, None), "__module__", None) == widgets.__name__


def name_of(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def widgets_have_compared_twins(notebook: NotebookNode, path: Path) -> Iterator[str]:
    """A widget's cell is not compared; the function behind it (its first argument) is called in a cell that is."""
    cells = code(notebook)
    for place, cell in enumerate(cells):
        shown = [call for call in calls(cell) if is_widget(name_of(call.func))]
        if not is_compared(cell) and not shown:
            yield f"cell {cell.execution_count} is not compared, and shows no widget of minimoe.course.widgets"
        for call in shown:
            behind = _function_behind(call)
            twin = cells[place + 1] if place + 1 < len(cells) else None
            if is_compared(cell):
                yield f"cell {cell.execution_count} shows a widget and lacks the tag nbval-ignore-output"
            if twin is None or not is_compared(twin) or behind not in [name_of(c.func) for c in calls(twin)]:
                yield f"cell {cell.execution_count}: wanted {behind}(...), its function, in the next, compared cell"


def _function_behind(widget: ast.Call) -> str:
    """The name of the function that a widget calls: its first argument, or the first of a `partial`."""
    first = next(iter(widget.args), None)
    if isinstance(first, ast.Call) and name_of(first.func) == "partial":
        first = next(iter(first.args), None)
    return name_of(first) if first else ""


def images_have_alt_text(notebook: NotebookNode, path: Path) -> Iterator[str]:
    for cell in code(notebook):
        for output in cell.outputs:
            data = output.get("data", {})
            if any(mime.startswith("image/") for mime in data):
                yield f"cell {cell.execution_count} shows a bare image: wanted minimoe.course.style.show"
            yield from _tags_without_alt(data.get("text/html", ""), f"cell {cell.execution_count}")
    for text in markdown(notebook):
        yield from _tags_without_alt(text, "a markdown cell")
        if re.search(r"!\[\s*\]\(", text):
            yield "a markdown image has no alt text"


def _tags_without_alt(text: str, where: str) -> Iterator[str]:
    for tag in re.findall(r"<img\b[^>]*>", text):
        alt = re.search(r'\balt="([^"]*)"', tag)
        if not alt or len(alt[1].split()) < 5:
            yield f"{where} shows an image whose alt text is {alt[1] if alt else None!r}: wanted a sentence"


def files_name_their_encoding(notebook: NotebookNode, path: Path) -> Iterator[str]:
    for cell in code(notebook):
        for call in calls(cell):
            named = {keyword.arg for keyword in call.keywords}
            binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in call.args[1:])
            if name_of(call.func) in ("open", "read_text", "write_text") and not binary and "encoding" not in named:
                yield f"cell {cell.execution_count} calls {name_of(call.func)} without encoding="


# --- the shape of a page ---------------------------------------------------------------------------------------------


def one_title(notebook: NotebookNode, path: Path) -> Iterator[str]:
    titles = re.findall(r"^# .+$", "\n".join(map(_without_code, markdown(notebook))), re.MULTILINE)
    if len(titles) != 1 or not notebook.cells[0].source.startswith("# "):
        yield f"H1 headings are {titles}: wanted one, at the top"


def opens_with_claim_and_objectives(notebook: NotebookNode, path: Path) -> Iterator[str]:
    opening = notebook.cells[0].source
    claim = re.search(r"^# .+\n\n(.+)\n", opening)
    if not claim or not re.fullmatch(r"\*\*[^.!?*]+\.\*\*", claim[1]):
        yield "wanted the claim under the title: one sentence on one line, in bold"
    section = re.search(r"\*\*You will\*\*\n\n((?:- .+\n?)+)", opening)
    objectives = re.findall(r"^- (\w+)", section[1], re.MULTILINE) if section else []
    if not 3 <= len(objectives) <= 5:
        yield f"{len(objectives)} objectives in a list after '**You will**': wanted 3 to 5"
    for word in objectives:
        if not VERBS.fullmatch(word):
            yield f"an objective begins with {word!r}: wanted one of the verbs in VERBS"
    if not re.search(r"^\*\*Time:\*\* about \d+ minutes? to read, \d+ seconds? to run\.$", opening, re.MULTILINE):
        yield "wanted a line '**Time:** about 15 minutes to read, 5 seconds to run.'"
    if "**Know first:**" not in opening:
        yield "wanted a line '**Know first:** ...'"


def predictions_are_answered(notebook: NotebookNode, path: Path) -> Iterator[str]:
    """**Predict.**, a code cell, then the folded **What happened**, before the next prediction."""
    waiting, ran, pairs = False, False, 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            ran = ran or waiting
            continue
        if "<summary><b>What happened</b></summary>" in cell.source:
            if not (waiting and ran):
                yield "a 'What happened' comes without a prediction and a code cell before it"
            waiting, pairs = False, pairs + 1
        if "**Predict.**" in cell.source:
            if waiting:
                yield f"a prediction comes before the last one was answered: {cell.source[:60]!r}"
            waiting, ran = True, False
    if waiting:
        yield "the last prediction is not answered"
    if not pairs:
        yield "there is nothing to predict"


def concerns(path: Path) -> bool:
    """Whether a newer rule holds for a notebook: for the second half of the course, and for those made here."""
    return path in SECOND_HALF or path.parent != NOTEBOOKS


def predictions_ask_one_question_and_answers_repeat_it(notebook: NotebookNode, path: Path) -> Iterator[str]:
    """So nobody has to scroll back, or to answer two things at once."""
    question = ""
    for text in markdown(notebook):
        answers = concerns(path) and "<summary><b>What happened</b></summary>" in text
        if answers and f"*{question}*" not in text:
            yield f"an answer does not begin with its question in italics: {question!r}"
        if concerns(path) and "**Predict.**" in text:
            paragraph = text.split("**Predict.**")[1].strip().split("\n\n")[0]
            question = " ".join(paragraph.split()).replace("*", "")
            if question.count("?") != 1:
                yield f"a prediction asks {question.count('?')} questions: {question!r}"


def says_how_long_it_takes(notebook: NotebookNode, path: Path) -> Iterator[str]:
    """180 words a minute, a minute a prediction, three a gap, rounded up to five; what is optional apart."""
    minutes, optional = [0.0, 0.0], False
    for cell in notebook.cells:
        if cell.source.startswith("## "):
            optional = "(optional)" in cell.source.splitlines()[0]
        minutes[optional] += 3 * cell.source.count("### BEGIN SOLUTION")
        if cell.cell_type == "markdown":
            prose = re.sub(r"<[^>]+>|\]\([^)]*\)|[|*#`]|:---", "", cell.source)
            minutes[optional] += len(prose.split()) / 180 + cell.source.count("**Predict.**")
    wanted = [5 * math.ceil(found / 5) for found in minutes]
    stated = [
        int(found) for found in re.findall(r"about (\d+) minutes", "".join(cell.source for cell in notebook.cells[:2]))
    ]
    if any(wanted) and not all(abs(a - b) <= 5 for a, b in zip(stated, wanted, strict=False)):
        yield f"it says {stated} minutes; counted {wanted}, the second for what is optional"


def ends_with_takeaways_questions_exercise(notebook: NotebookNode, path: Path) -> Iterator[str]:
    text = "\n\n".join(markdown(notebook))
    for heading in ("## Take-aways", "## Three questions", "## Exercise"):
        if text.count(f"\n{heading}\n") + text.startswith(f"{heading}\n") != 1:
            yield f"wanted one heading {heading!r}"
            return
    takeaways, questions, exercise = (
        text.split(f"{heading}\n")[1].split("\n## ")[0]
        for heading in ("## Take-aways", "## Three questions", "## Exercise")
    )
    if not re.search(r"^- .+", takeaways, re.MULTILINE):
        yield "wanted a list of take-aways"
    folded = len(re.findall(r"<details>\s*<summary>[^<]+\?</summary>\s*\S.*?</details>", questions, re.DOTALL))
    if folded != 3:
        yield f"{folded} questions, each a <details> with a <summary> that ends in '?': wanted three"
    links = re.findall(r"\]\((exercises/[^)]+\.ipynb)\)", exercise)
    if not links:
        yield "there is no link to an exercise"


def has_neighbours(notebook: NotebookNode, path: Path, course: list[Path] = COURSE) -> Iterator[str]:
    place = course.index(path)
    last = notebook.cells[-1].source
    for label, step in (("Previous", -1), ("Next", 1)):
        line = re.search(rf"\*\*{label}:\*\* (.+)", last)
        neighbour = course[place + step].name if 0 <= place + step < len(course) else None
        if not line:
            yield f"the last cell has no '**{label}:**'"
        elif neighbour and f"]({neighbour})" not in line[1]:
            yield f"'{label}' does not link to {neighbour}"


def makes_a_deck(notebook: NotebookNode, path: Path) -> Iterator[str]:
    """As slides, every page fits, a heading opens one, and each prediction is followed by a result for all to see."""
    used, result = 0, False
    for cell, kind in zip(notebook.cells, slide_types(notebook), strict=True):
        start, seen = cell.source[:60], kind not in ("notes", "skip")
        if seen:
            used = height(cell) + (used if kind == "-" else 0)
        if seen and used > PAGE:
            yield f"a page is {used} pixels tall, {PAGE} fit: wanted two cells: {start!r}"
        if cell.cell_type == "code":
            result = result or (seen and bool(cell.outputs))
            continue
        if "\n## " in _without_code(cell.source):
            yield f"a heading stands inside a cell: wanted it to begin one: {start!r}"
        if "**Predict.**" in cell.source:
            result = False
            if kind == "notes":
                yield f"a prediction is too long for a page: wanted two cells: {start!r}"
        if "<summary><b>What happened</b></summary>" in cell.source and not result:
            yield f"no page shows what was predicted: wanted short code cells with short outputs before {start!r}"


def links_resolve(notebook: NotebookNode, path: Path) -> Iterator[str]:
    for text in markdown(notebook):
        for target in re.findall(r"\]\(([^)#\s]+)\)", _without_code(text)):
            if not target.startswith(("https://", "attachment:")) and not (path.parent / target).exists():
                yield f"link to {target}, which does not exist"


_NUMBER = re.compile(r"(?<![\w.,:/-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w/-]|[.:]\d)")


def prose_quotes_only_printed_numbers(notebook: NotebookNode, path: Path) -> Iterator[str]:
    """Numbers in prose stand in an output, except counts up to ten, times, and what has a source in its paragraph.

    Code, links, formulas, headings and tables of contents are not prose.
    """
    printed = set()
    for cell in code(notebook):
        for output in cell.outputs:
            printed |= {n.replace(",", "") for n in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", _text_of(output))}
    for text in markdown(notebook):
        for paragraph in re.split(r"\n\s*\n|\n(?=- )", _prose(text)):
            if re.search(r"arXiv[: ]\d{4}\.\d{4,5}", paragraph):
                continue
            for number in _NUMBER.findall(paragraph):
                plain = number.replace(",", "")
                small = plain.isdigit() and int(plain) <= 10
                if not small and plain not in printed:
                    yield f"prose says {number}, which no cell prints: {paragraph.strip()[:80]!r}"


def _text_of(output: NotebookNode) -> str:
    data = output.get("data", {})
    shown = html.unescape(re.sub(r"data:image/[^\"']+", "", data.get("text/html", "")))
    return f"{output.get('text', '')}\n{data.get('text/plain', '')}\n{shown}"


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def _prose(text: str) -> str:
    text = _without_code(text)
    for dropped in (r"\$[^$]*\$", r"\[[^\]]*\]\([^)]*\)", r"<[^>]+>", r"^#+ .*$", r"^\*\*Time:\*\*.*$"):
        text = re.sub(dropped, " ", text, flags=re.MULTILINE)
    return text


VALIDATED: list[Guard] = [
    executed_in_order,
    outputs_are_kept,
    nothing_escapes_comparison,
    widgets_have_compared_twins,
    images_have_alt_text,
    files_name_their_encoding,
    one_title,
    links_resolve,
    prose_quotes_only_printed_numbers,
]
SHAPED: list[Guard] = [
    opens_with_claim_and_objectives,
    predictions_are_answered,
    predictions_ask_one_question_and_answers_repeat_it,
    says_how_long_it_takes,
    ends_with_takeaways_questions_exercise,
    makes_a_deck,
    has_neighbours,
]


@pytest.mark.parametrize("guard", VALIDATED + SHAPED, ids=lambda guard: guard.__name__)
def test_notebooks(guard):
    paths = sources() if guard in VALIDATED else COURSE
    assert [f"{path.name}: {problem}" for path in paths for problem in guard(read(path), path)] == []


def test_there_are_notebooks_to_guard():
    assert [path.name for path in COURSE][:2] == ["00_start_here.ipynb", "01_one_moe_layer.ipynb"]
    assert EXERCISES


def test_notebooks_are_valid_and_as_build_writes_them():
    """No timings, no widget state, one kernelspec, tags and slide types alone."""
    for path in sources():
        nbformat.validate(read(path))
        assert normalise(read(path)) == read(path), path.name


# --- exercises -------------------------------------------------------------------------------------------------------


def test_regenerating_the_exercises_changes_nothing():
    solutions = {
        path.name: nbformat.writes(make_exercise(read(path)), indent=1) + "\n"
        for path in NOTEBOOKS.glob("solutions/*.ipynb")
    }
    assert {path.name: path.read_text(encoding="utf-8") for path in EXERCISES} == solutions


def test_exercises_show_no_solution_and_no_output_and_end_with_a_check():
    for path in EXERCISES:
        cells = code(read(path))
        assert all(cell.execution_count is None and not cell.outputs for cell in cells), path.name
        for part in ("raise NotImplementedError", "check_"):
            assert any(part in cell.source for cell in cells), f"{path.name} has no {part}"


# --- gaps inside the notebooks ---------------------------------------------------------------------------------------


def test_notebooks_with_gaps_are_made_from_the_solved_ones():
    made = {
        path.name: nbformat.writes(make_gaps(read(path)), indent=1) + "\n"
        for path in COURSE
        if written_lines(read(path))
    }
    assert {path.name: path.read_text(encoding="utf-8") for path in GAPS} == made


@pytest.mark.parametrize(("half", "wanted"), [(FIRST_HALF, 100), (SECOND_HALF, 60)], ids=["00-06", "07-12"])
def test_readers_write_in_both_halves_of_the_course(half, wanted, capsys):
    lines = {path.name: written_lines(read(path)) for path in half}
    with capsys.disabled():
        told = (f"{name[:3].strip('_')} {n}" for name, n in lines.items())
        print("\nlines that readers write in gaps:", *told, end=f"; together {sum(lines.values())}\n")
    assert sum(lines.values()) >= wanted


def gaps_of(notebook: NotebookNode) -> Iterator[tuple[str, str, str]]:
    """For each cell with a gap: what is imported before it, the cell, and the next code cell, which is its check."""
    cells, imports = code(notebook), ""
    for cell, check in zip(cells, [*cells[1:], None], strict=True):
        if "### BEGIN SOLUTION" in cell.source or YOUR_CODE in cell.source:
            yield imports, cell.source, check.source
        lines = [node for node in ast.parse(cell.source).body if isinstance(node, ast.Import | ast.ImportFrom)]
        imports += "".join(f"{ast.unparse(node)}\n" for node in lines)


@pytest.mark.parametrize("path", GAPS, ids=lambda path: path.stem)
def test_each_check_praises_the_solution_and_asks_for_what_is_missing(path, capsys, monkeypatch):
    monkeypatch.chdir(NOTEBOOKS)
    solved, unsolved = (list(gaps_of(read(place))) for place in (NOTEBOOKS / path.name, path))
    assert solved and len(solved) == len(unsolved)
    for (imports, answer, check), (_, gap, _) in zip(solved, unsolved, strict=True):
        assert "print(check_" in check, f"no check below {answer[:60]!r}"
        exec(f"{imports}\n{answer}\n{check}", {})
        assert "Right" in capsys.readouterr().out
        with pytest.raises(NotImplementedError):
            exec(f"{imports}\n{gap}\n{check}", {})


def test_solutions_are_folded_below_the_checks_and_links_lead_where_they_did():
    for path in GAPS:
        notebook = read(path)
        answers = [text for text in markdown(notebook) if "<summary><b>A solution</b></summary>" in text]
        assert len(answers) == len(list(gaps_of(notebook)))
        assert not list(links_resolve(notebook, path)), path.name
        assert f"gaps/{path.name}" in "".join(markdown(read(NOTEBOOKS / path.name))), path.name
        assert not any(cell.outputs for cell in code(notebook))


# --- every guard sees what it is there to see ------------------------------------------------------------------------

OPENING = """# A page

**One thing is so.**

**You will**

- Find a thing
- Compute another
- Explain both

**Time:** about 5 minutes to read, 2 seconds to run.

**Know first:** nothing."""
PREDICTION = "## A part\n\n**Predict.** What does it print?"
ANSWER = "<details><summary><b>What happened</b></summary>\n\n*What does it print?*\n\nIt printed 42.\n\n</details>"
TAKE_AWAYS = "## Take-aways\n\n- It prints."
QUESTIONS = """## Three questions

<details><summary>Why?</summary>So.</details>
<details><summary>How?</summary>So.</details>
<details><summary>When?</summary>Now.</details>"""
EXERCISE = "## Exercise\n\n[Do it](exercises/00_first.ipynb)"
NEIGHBOURS = "**Previous:** none. **Next:** [one](01_b.ipynb)"
PICTURE = '<img alt="A bar chart of two experts" src="data:image/png;base64,AAAA">'


def good_notebook() -> NotebookNode:
    """A small notebook that every guard accepts."""
    cells = [
        new_markdown_cell(OPENING),
        new_markdown_cell(PREDICTION),
        new_code_cell("print(6 * 7)", execution_count=1, outputs=[new_output("stream", name="stdout", text="42\n")]),
        new_markdown_cell(ANSWER),
        new_code_cell(
            "text_box(draw, 'a')",
            execution_count=2,
            metadata={"tags": ["nbval-ignore-output"]},
            outputs=[new_output("execute_result", {"text/plain": "Run this."}, execution_count=2)],
        ),
        new_code_cell(
            "show(draw('a'))",
            execution_count=3,
            outputs=[new_output("display_data", {"text/html": PICTURE, "text/plain": "alt"})],
        ),
        new_markdown_cell(TAKE_AWAYS),
        new_markdown_cell(QUESTIONS),
        new_markdown_cell(EXERCISE),
        new_markdown_cell(NEIGHBOURS),
    ]
    return new_notebook(cells=cells)


def replace(cell: int, old: str, new: str) -> Callable[[NotebookNode], None]:
    def change(notebook: NotebookNode) -> None:
        assert old in notebook.cells[cell].source
        notebook.cells[cell].source = notebook.cells[cell].source.replace(old, new)

    return change


def put(cell: int, **values: object) -> Callable[[NotebookNode], None]:
    return lambda notebook: notebook.cells[cell].update(nbformat.from_dict(values))


def swap_last_two_cells(notebook: NotebookNode) -> None:
    notebook.cells[4], notebook.cells[5] = notebook.cells[5], notebook.cells[4]


def shown(mime: str, data: str) -> list[NotebookNode]:
    return [new_output("display_data", {mime: data})]


FAULTS = [
    (executed_in_order, put(2, execution_count=None)),
    (executed_in_order, put(5, execution_count=9)),
    (outputs_are_kept, put(2, outputs=[])),
    (outputs_are_kept, put(2, outputs=[new_output("stream", name="stderr", text="warning")])),
    (outputs_are_kept, put(2, outputs=[new_output("error", ename="ValueError", evalue="", traceback=[])])),
    (nothing_escapes_comparison, put(2, source="clear_output()")),
    (nothing_escapes_comparison, put(2, source="handle.update_display(1)")),
    (nothing_escapes_comparison, put(2, source="6 * 7;")),
    (nothing_escapes_comparison, put(2, source="# NBVAL_IGNORE_OUTPUT\nprint(1)")),
    (nothing_escapes_comparison, put(2, metadata={"tags": ["nbval-skip"]})),
    (widgets_have_compared_twins, put(2, metadata={"tags": ["nbval-ignore-output"]})),
    (widgets_have_compared_twins, put(4, metadata={})),
    (widgets_have_compared_twins, put(5, source="print(1)")),
    (widgets_have_compared_twins, swap_last_two_cells),
    (images_have_alt_text, put(5, outputs=shown("image/png", "AAAA"))),
    (images_have_alt_text, put(5, outputs=shown("text/html", '<img src="data:image/png;base64,AAAA">'))),
    (images_have_alt_text, put(5, outputs=shown("text/html", '<img alt="" src="x">'))),
    (images_have_alt_text, replace(1, "What", "![](x.png) What")),
    (files_name_their_encoding, put(2, source="print(open('a').read())")),
    (files_name_their_encoding, put(2, source="path.write_text('a')")),
    (one_title, replace(1, "## A part", "# A part")),
    (one_title, replace(0, "# A page", "A page")),
    (links_resolve, replace(8, "00_first", "00_gone")),
    (prose_quotes_only_printed_numbers, replace(3, "42", "43")),
    (prose_quotes_only_printed_numbers, replace(3, "42", "42 of 1,024")),
    (prose_quotes_only_printed_numbers, replace(3, "42", "0.42")),
    (prose_quotes_only_printed_numbers, replace(6, "It prints.", "It prints 12 %.")),
    (opens_with_claim_and_objectives, replace(0, "**One thing is so.**", "**One thing is so. And another.**")),
    (opens_with_claim_and_objectives, replace(0, "**One thing is so.**", "Hello.")),
    (opens_with_claim_and_objectives, replace(0, "- Find a thing\n", "")),
    (opens_with_claim_and_objectives, replace(0, "Explain both", "Understand both")),
    (opens_with_claim_and_objectives, replace(0, "2 seconds", "some seconds")),
    (opens_with_claim_and_objectives, replace(0, "**Know first:**", "")),
    (predictions_are_answered, put(3, source="On.")),
    (predictions_are_answered, put(1, source="On.")),
    (predictions_are_answered, put(2, cell_type="markdown", source="On.")),
    (predictions_ask_one_question_and_answers_repeat_it, replace(3, "*What does it print?*", "")),
    (predictions_ask_one_question_and_answers_repeat_it, replace(1, "What does it print?", "What? And why?")),
    (says_how_long_it_takes, replace(0, "about 5 minutes", "about 50 minutes")),
    (ends_with_takeaways_questions_exercise, replace(6, "## Take-aways", "## Summary")),
    (ends_with_takeaways_questions_exercise, replace(6, "- It prints.", "It prints.")),
    (ends_with_takeaways_questions_exercise, replace(7, "<summary>How?</summary>So.", "How?")),
    (ends_with_takeaways_questions_exercise, replace(8, "(exercises/00_first.ipynb)", "(01_b.ipynb)")),
    (makes_a_deck, replace(1, "What does", "What now?\n\n## Another part\n\nWhat does")),
    (makes_a_deck, replace(1, "What does", "Think.\n\n" * 20 + "What does")),
    (makes_a_deck, put(1, source="On.\n\n" * 20 + PREDICTION.replace("## ", "### "))),
    (makes_a_deck, put(2, source="print(6 * 7)\n" * 40)),
    (makes_a_deck, put(2, metadata={"tags": ["nbval-ignore-output"]})),
    (has_neighbours, replace(9, "**Previous:** none.", "")),
    (has_neighbours, replace(9, "](01_b.ipynb)", "](00_a.ipynb)")),
]


@pytest.mark.parametrize("guard", VALIDATED + SHAPED, ids=lambda guard: guard.__name__)
def test_a_guard_accepts_a_good_notebook_and_sees_every_fault(guard, tmp_path):
    path, after = tmp_path / "00_a.ipynb", tmp_path / "01_b.ipynb"
    (tmp_path / "exercises").mkdir()
    for file in (path, after, tmp_path / "exercises" / "00_first.ipynb"):
        file.touch()
    course = {"course": [path, after]} if guard is has_neighbours else {}
    faults = [spoil for concerned, spoil in FAULTS if concerned is guard]
    assert faults and list(guard(good_notebook(), path, **course)) == []
    for number, spoil in enumerate(faults):
        notebook = good_notebook()
        spoil(notebook)
        assert list(guard(notebook, path, **course)), f"fault {number}"
