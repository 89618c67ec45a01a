"""docs/glossary.md: each term has one entry, and is a word of the notebook that its entry names."""

import re
from collections import Counter

from workshop.build import ROOT, read

GLOSSARY = ROOT / "docs" / "glossary.md"
ENTRY = re.compile(r"- \*\*(?P<terms>[^:\n]+):(?P<text> .+) \[[^]]+\]\((?P<link>[^)]+)\)")
LINES = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]


def terms_of(line: str) -> list[str]:
    entry = ENTRY.fullmatch(line)
    assert entry, f"wanted '- **term**: what it is. [Notebook](../notebooks/file.ipynb)', found {line!r}"
    return re.findall(r"\*\*([^*]+)\*\*", f"**{entry['terms']}")


def test_terms_are_words_of_the_notebook_that_their_entry_names():
    missing = []
    for line in LINES:
        cells = read(GLOSSARY.parent / ENTRY.fullmatch(line)["link"]).cells
        text = " ".join("\n".join(cell.source for cell in cells).split())
        missing += [term for term in terms_of(line) if not re.search(rf"\b{re.escape(term)}(s|es)?\b", text, re.I)]
    assert missing == []


def test_a_term_has_one_entry():
    counts = Counter(term.lower() for line in LINES for term in terms_of(line))
    assert len(counts) > 50 and max(counts.values()) == 1
