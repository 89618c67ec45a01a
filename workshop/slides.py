"""Which cells share a page when a notebook is shown as slides, with `jupyter nbconvert --to slides`.

The page is the one that nbconvert gives to reveal.js: 960 x 700 pixels, scaled to any screen, without scrolling. What
a cell needs of it is estimated from the sizes in nbconvert's template; tests/test_browser.py measures pages.
"""

from __future__ import annotations

import base64
import math
import re
import struct
import textwrap
from itertools import zip_longest

from nbformat import NotebookNode

PAGE = 700  # pixels, as all heights here
_CELL = 46  # what surrounds a cell
_PARAGRAPH, _BULLET, _ROW, _CODE = 26, 32, 24, 23  # a line of prose, of a list, of a table, of code or output
_SPACE = 20  # below each of these
# Characters in a line; long lines of code are not wrapped.
_CHARACTERS = {"# ": 19, "## ": 34, "### ": 50, "prose": 75, "bullet": 70, "row": 68, "output": 63}
_HEADING = {"# ": 90, "## ": 51, "### ": 37}
_FOLDED = re.compile(r"<details>\s*(<summary>.*?</summary>)(.*?)</details>", re.DOTALL)
_IMAGE = re.compile(r'<img\b[^>]*\bwidth="(\d+)"[^>]*src="data:image/png;base64,([^"]{32})')


def slide_types(notebook: NotebookNode) -> list[str]:
    """For each cell: "slide" or "subslide" (a new page), "-" (on the page before), "notes" (for the speaker) or "skip".

    A heading opens a slide, and code after a prediction a page, so that the class can think first. Other code and
    folded answers join the page before them where they fit. What no page can hold becomes a note.
    """
    types, room, joinable = [], 0, False
    for cell in notebook.cells:
        tall = height(cell)
        if not types or cell.source.startswith(("# ", "## ")):
            kind = "slide"
        elif _is_left_out(cell):
            kind = "skip"
        elif tall > PAGE:
            kind = "notes"
        elif joinable and tall <= room and (cell.cell_type == "code" or cell.source.startswith("<details>")):
            kind = "-"
        else:
            kind = "subslide"
        types.append(kind)
        if kind in ("slide", "subslide"):
            room = PAGE
        if kind not in ("skip", "notes"):
            room -= tall
            joinable = "**Predict.**" not in cell.source
    return types


def _is_left_out(cell: NotebookNode) -> bool:
    """Whether no class needs to see the cell: imports, a widget without its kernel, links to other notebooks."""
    if cell.cell_type == "code":
        is_import = cell.source.startswith(("import ", "from ")) and not cell.outputs
        return is_import or "nbval-ignore-output" in cell.metadata.get("tags", [])
    return cell.source.startswith("**Previous:**")


def height(cell: NotebookNode) -> int:
    """How many pixels of a page the cell takes with its outputs, or with the tallest of its folded parts open."""
    if cell.cell_type != "code":
        folded = [_text_height(text) for _, text in _FOLDED.findall(cell.source)]
        return _CELL + _text_height(_FOLDED.sub(r"\1", cell.source)) + max(folded, default=0)
    return _CELL + _CODE * len(cell.source.splitlines()) + sum(_SPACE + _output_height(out) for out in cell.outputs)


def _output_height(output: NotebookNode) -> int:
    data = output.get("data", {})
    image = _IMAGE.search(data.get("text/html", ""))
    if image:
        width, height = struct.unpack(">II", base64.b64decode(image[2])[16:24])  # of the PNG header
        return int(image[1]) * height // width
    if "text/html" in data:
        return _html_height(data["text/html"])
    return _CODE * _lines(output.get("text") or data.get("text/plain", ""), "output")


def _html_height(text: str) -> int:
    """The height of paragraphs and tables, as a report shows them."""
    total = 0
    for block in re.split(r"</(?:p|li|h\d|table)>", text):
        rows = [re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.split(r"</tr>", block)]
        words = re.sub(r"<[^>]+>", "", block)
        total += _table_height(rows) if any(rows) else _PARAGRAPH * _lines(words, "prose") + _SPACE
    return total


def _lines(text: str, kind: str) -> int:
    """The lines of `text` on a page."""
    return sum(max(1, len(textwrap.wrap(line, _CHARACTERS[kind]))) for line in text.splitlines())


def _text_height(text: str) -> int:
    """The height of Markdown, block by block."""
    text = re.sub(r"\[|\]\([^)]*\)|<[^>]+>", "", text)
    total = 0
    for place, part in enumerate(re.split(r"^```.*$", text, flags=re.MULTILINE)):
        if place % 2:
            total += _SPACE + _CODE * _lines(part.strip(), "output")
        else:
            total += sum(_SPACE + _block_height(block) for block in re.split(r"\n\s*\n", part) if block.strip())
    return total


def _block_height(block: str) -> int:
    block = block.strip()
    heading = re.match(r"#{1,3} ", block)
    if heading:
        return _HEADING[heading[0]] * _lines(block.removeprefix(heading[0]), heading[0])
    if block.startswith("|"):
        return _table_height([row.strip("|").split("|") for row in block.splitlines() if not re.match(r"[|:-]+$", row)])
    if re.match(r"- |\d+\. ", block):
        items = re.split(r"(?:^|\n)(?:- |\d+\. )", block)[1:]
        return _BULLET * sum(_lines(item.replace("\n", " "), "bullet") for item in items)
    return _PARAGRAPH * _lines(block.replace("\n", " "), "prose")


def _table_height(rows: list[list[str]]) -> int:
    """The height of a table whose columns share the page as browsers do: by their longest cells, no word broken."""
    columns = list(zip_longest(*filter(None, rows), fillvalue=""))
    longest = [max(map(len, column)) for column in columns]
    share = min(1, (_CHARACTERS["row"] - len(columns)) / sum(longest))
    widths = [
        max(share * most, *(len(word) for cell in column for word in cell.split()), 1)
        for column, most in zip(columns, longest, strict=True)
    ]
    lines = [
        max(math.ceil(len(cell.strip()) / width) for cell, width in zip(row, widths, strict=False))
        for row in rows
        if row
    ]
    return sum(10 + _ROW * max(1, most) for most in lines)
