"""docs/glossary.md: each term stands in the notebook that its entry names."""

import re
from pathlib import Path

import pytest

from workshop.build import ROOT, read

GLOSSARY = ROOT / "docs" / "glossary.md"
ENTRY = re.compile(r"- \*\*(?P<terms>[^:\n]+):(?P<text> .+) \[[^]]+\]\((?P<link>[^)]+)\)")
ENTRIES = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]


def parts(line: str) -> tuple[list[str], str, Path]:
    """The terms in bold, what is said of them, and the notebook that is named."""
    entry = ENTRY.fullmatch(line)
    assert entry, f"wanted '- **term**: what it is. [Notebook](../notebooks/file.ipynb)', found {line!r}"
    return re.findall(r"\*\*([^*]+)\*\*", f"**{entry['terms']}"), entry["text"], GLOSSARY.parent / entry["link"]


@pytest.mark.parametrize("line", ENTRIES, ids=lambda line: re.search(r"\*\*(.+?)\*\*", line)[1])
def test_a_term_is_used_where_its_entry_points(line):
    terms, _, path = parts(line)
    used = " ".join("\n".join(cell.source for cell in read(path).cells).lower().split())
    assert [term for term in terms if term.lower() not in used] == []


def test_a_term_has_one_short_entry():
    terms = [term.lower() for line in ENTRIES for term in parts(line)[0]]
    assert len(terms) > 50 and len(terms) == len(set(terms))
    for line in ENTRIES:
        assert line.count(". ") <= 4, f"more than a few sentences: {line!r}"
