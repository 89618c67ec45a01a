"""The code on the pages for people who do not open the course: it is run as it stands, on the shipped models."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def code_of(page):
    """All Python on a page, one block after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text_of(page), re.S | re.M))


def test_the_code_on_the_pages_does_what_it_says(tmp_path, monkeypatch, capsys):
    """In a folder where data/ lies, as in a clone, and what is written harms nobody."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    for page, written in {"README.md": "runs/copy/config.json", "docs/using.md": "runs/sums/tokenizer.json"}.items():
        exec(compile(code_of(page), page, "exec"), {"__name__": "__main__"})
        assert "shared lineage" in capsys.readouterr().out, page
        assert (tmp_path / written).exists()


def test_the_program_of_using_is_short_and_uses_the_short_names():
    lines = [line for line in code_of("docs/using.md").splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 30
    for page in ("README.md", "docs/using.md"):
        assert not re.search(r"(from|import) minimoe\.", code_of(page))


def test_minutes_in_the_readme_are_those_of_the_notebooks():
    rows = re.findall(r"^\| \w+ \| \[[^]]+\]\((notebooks/[^)]+)\) \|.*\| (\d+) \|$", text_of("README.md"), re.M)
    assert len(rows) == 16
    for path, minutes in rows:
        assert f"about {minutes} minutes to read" in text_of(path), path
