"""Writes what is generated under `notebooks/`.

    python -m workshop.build notebooks    execute notebooks and solutions, keep their outputs; write the exercises
    python -m workshop.build exercises    write exercises from solutions, and notebooks with gaps from the solved
    python -m workshop.build metadata     write tags and slide types anew, and execute nothing
    python -m workshop.build figure-data  write the CSV files that the figures are compared with

A notebook that fails is left as it was.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

from minimoe.atomic import write_atomically
from minimoe.progress import progress_bar
from workshop.slides import slide_types

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
FIGURE_DATA = ROOT / "tests" / "figures"
# Committed outputs are those of one thread, without progress bars: what validation will see.
_KERNEL_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MINIMOE_PROGRESS": "0"}
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
_WIDGET = "application/vnd.jupyter.widget-view+json"
YOUR_CODE = "# your code here"
# What a solved notebook says of its gaps, and what one with gaps says.
_FILLED = re.compile(r"^\*\*To write the gaps yourself,\*\* .*$", re.MULTILINE)
_TO_FILL = (
    f"**Write** where a cell says `{YOUR_CODE}`. The next cell checks it, and a solution is folded below the check."
)
# Where a link leads, and a path in code.
_RELATIVE = {"markdown": re.compile(r"(\]\()([^)\s]+)"), "code": re.compile(r"""(["'])(\.\./[^"'\s]*)""")}
_SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION$", re.MULTILINE | re.DOTALL)


def sources(folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks that are executed, in reading order: the course, then the solutions."""
    return sorted(folder.glob("*.ipynb")) + sorted(folder.glob("solutions/*.ipynb"))


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Run every cell in a fresh kernel whose working directory is `folder`; return the normalised result.

    Raises:
        CellExecutionError: a cell failed.
    """
    executed = copy.deepcopy(notebook)
    client = NotebookClient(
        executed,
        kernel_name="python3",
        timeout=600,
        record_timing=False,
        store_widget_state=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=os.environ | _KERNEL_ENVIRONMENT)
    return normalise(executed)


def normalise(notebook: NotebookNode) -> NotebookNode:
    """A copy as every machine would write it: no timings, no widget state, one kernelspec, streams whole.

    Of the metadata of cells only tags are kept; the place of each cell in a slide show is what `slide_types` says.
    """
    tidy = copy.deepcopy(notebook)
    tidy.metadata = nbformat.from_dict(_METADATA)
    for cell in tidy.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
        for output in cell.get("outputs", []):
            if _WIDGET in output.get("data", {}):
                # A view without its kernel shows an error; a line of text says what would be here.
                output.data = nbformat.from_dict({"text/plain": "Run this cell for the interactive version."})
    for cell, slide_type in zip(tidy.cells, slide_types(tidy), strict=True):
        cell.metadata["slideshow"] = nbformat.from_dict({"slide_type": slide_type})
    return tidy


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Neighbouring pieces of one stream as one: where a kernel cuts what it prints depends on the moment."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == "stream" and output.get("name") == joined[-1].get("name"):
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def make_exercise(solution: NotebookNode) -> NotebookNode:
    """The exercise of a solution: no outputs, and a gap where a cell has `### BEGIN SOLUTION ... ### END SOLUTION`.

    Raises:
        ValueError: there is no such region, or one is not closed.
    """
    exercise = normalise(solution)
    gaps = 0
    for cell in exercise.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs, cell.execution_count = [], None
        cell.source, found = _SOLUTION.subn(r"\1# YOUR CODE HERE\n\1raise NotImplementedError", cell.source)
        gaps += found
        if "SOLUTION" in cell.source:
            raise ValueError(f"cell {cell.id}: each '### BEGIN SOLUTION' must be closed by '### END SOLUTION'")
    if not gaps:
        raise ValueError("no cell has a '### BEGIN SOLUTION'; an exercise needs at least one gap to fill")
    return exercise


def written_lines(notebook: NotebookNode) -> int:
    """How many lines of code readers write in the gaps of a notebook."""
    regions = [found[0] for cell in notebook.cells for found in _SOLUTION.finditer(cell.source)]
    return sum(bool(line.strip()) for region in regions for line in region.splitlines()[1:-1])


def make_gaps(notebook: NotebookNode) -> NotebookNode:
    """A notebook of the course as readers get it who write themselves: without outputs, with a gap where a cell has
    `### BEGIN SOLUTION ... ### END SOLUTION`, and the solution folded below the check, which is the next code cell. It
    lies one folder deeper, so that its relative links and paths do, too.
    """
    with_gaps = normalise(notebook)
    cells, folded = [], ""
    for cell in with_gaps.cells:
        cell.source = _RELATIVE[cell.cell_type].sub(_one_deeper, cell.source)
        cell.source = _FILLED.sub(_TO_FILL, cell.source)
        cells.append(cell)
        if cell.cell_type != "code":
            continue
        cell.outputs, cell.execution_count = [], None
        if folded:
            cells.append(new_markdown_cell(folded, id=f"{cell.id[:56]}-answer"))
            folded = ""
        if "### BEGIN SOLUTION" in cell.source:
            solved = re.sub(r"^ *### (BEGIN|END) SOLUTION\n?", "", cell.source, flags=re.MULTILINE).rstrip()
            folded = f"<details><summary><b>A solution</b></summary>\n\n```python\n{solved}\n```\n\n</details>"
            cell.source = _SOLUTION.sub(rf"\1{YOUR_CODE}\n\1raise NotImplementedError", cell.source)
    with_gaps.cells = cells
    return normalise(with_gaps)


def _one_deeper(found: re.Match) -> str:
    before, target = found.groups()
    return found[0] if target.startswith(("http", "#")) else f"{before}../{target}"


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a valid notebook to `path`, whole or not at all."""
    nbformat.validate(notebook)
    write_atomically(path, (nbformat.writes(notebook, indent=1) + "\n").encode())


def read(path: Path) -> NotebookNode:
    """The notebook at `path`."""
    return nbformat.read(path, as_version=4)


def build_notebooks(folder: Path = NOTEBOOKS) -> list[str]:
    """Execute all notebooks in place and print the seconds each took; return the names of those that failed."""
    failed = []
    for path in progress_bar(sources(folder), desc="notebooks", unit="notebook"):
        start = time.perf_counter()
        try:
            write(execute(read(path), path.parent), path)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed.append(path.name)
            print(f"{path.name}: FAILED, left as it was\n{error}", file=sys.stderr)
        else:
            print(f"{path.name}: {time.perf_counter() - start:.0f} s")
    return failed


def build_metadata(folder: Path = NOTEBOOKS) -> None:
    """Normalise all notebooks in place; outputs stay as they are."""
    for path in sources(folder):
        write(normalise(read(path)), path)


def build_exercises(folder: Path = NOTEBOOKS) -> None:
    """Write `exercises/` from `solutions/`, and `gaps/` from the notebooks that have some."""
    for path in sorted(folder.glob("solutions/*.ipynb")):
        write(make_exercise(read(path)), folder / "exercises" / path.name)
    for path in sorted(folder.glob("*.ipynb")):
        if written_lines(read(path)):
            write(make_gaps(read(path)), folder / "gaps" / path.name)


def build_figure_data(folder: Path = FIGURE_DATA) -> None:
    """Write the numbers in every figure, to be compared with from now on."""
    from minimoe.course.figures import FIGURES, to_csv

    for name, draw in FIGURES.items():
        write_atomically(folder / f"{name}.csv", to_csv(draw()[1]).encode())


def main(arguments: list[str]) -> int:
    """Do what the first argument says; 1 when a notebook failed, 2 for an unknown argument."""
    if arguments == ["notebooks"]:
        failed = build_notebooks()
        build_exercises()
        return 1 if failed else 0
    if arguments == ["exercises"]:
        build_exercises()
    elif arguments == ["metadata"]:
        build_metadata()
        build_exercises()
    elif arguments == ["figure-data"]:
        build_figure_data()
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
