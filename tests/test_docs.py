"""The code on the pages for people who do not open the course: it is run as it stands, on the shipped models."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def code_of(page):
    """All Python on a page, one block after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M))


def run_in_a_clone(program, tmp_path):
    """Where data/ lies beside the program, and what it writes harms nobody."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    return subprocess.run(
        [sys.executable, "-c", f"import torch; torch.set_num_threads(1)\n{program}"],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.mark.parametrize(
    ("page", "printed", "written"),
    [
        ("README.md", "shared lineage", "runs/copy/config.json"),
        ("docs/using.md", "shared lineage", "runs/sums/tokenizer.json"),
    ],
)
def test_the_code_on_the_page_does_what_it_says(page, printed, written, tmp_path):
    done = run_in_a_clone(code_of(page), tmp_path)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout
    assert (tmp_path / written).exists()


def test_the_program_of_using_is_short_and_uses_the_short_names():
    lines = [line for line in code_of("docs/using.md").splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 30
    for page in ("README.md", "docs/using.md"):
        assert not re.search(r"(from|import) minimoe\.", code_of(page))
