"""`make portable`: which cells it runs, what it says of each, and when it fails."""

import re
import sys

import pytest

from tests import portable
from tests.run_checks import Stage


@pytest.fixture
def ran(monkeypatch) -> list[tuple[str, dict[str, str]]]:
    """The cells that were run; in one setting, Python 9.13 fails."""
    cells = []

    def run_cell(version, settings):
        cells.append((version, settings))
        failed = int(version == "9.13" and "MINIMOE_ROUNDING" in settings)
        return Stage(f"Python {version}", 10, failed, 2, 1.0, "its output")

    monkeypatch.setattr(portable, "PYTHONS", ("python9.11", "python9.12", "no-python"))
    monkeypatch.setattr(portable, "version_of", lambda python: python.removeprefix("python") if "." in python else None)
    monkeypatch.setattr(portable, "set_up", lambda python, version: version != "9.14")
    monkeypatch.setattr(portable, "run_cell", run_cell)
    return cells


def test_the_first_python_runs_every_setting_and_a_missing_one_is_left_out(ran, capsys):
    assert portable.main([]) == 0
    assert [settings for version, settings in ran if version == "9.11"] == list(portable.SETTINGS)
    assert [settings for version, settings in ran if version == "9.12"] == list(portable.SETTINGS[:2])
    assert "no-python is not installed: left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "asked, line",
    [
        ("no-python", r"no-python: not installed +FAILED"),
        ("python9.13", r"Python 9\.13 +FAILED +1 s   10 passed, 1 failed, 2 skipped"),
        ("python9.14", r"python9\.14: set-up failed +FAILED"),
    ],
)
def test_a_failure_shows_in_the_table_and_the_status(ran, asked, line, capsys):
    assert portable.main(["python9.11", asked]) == 1
    assert re.search(line, capsys.readouterr().out.rpartition("\n\n")[2])


def test_no_python_at_all_is_a_failure(ran, monkeypatch):
    monkeypatch.setattr(portable, "PYTHONS", ("no-python",))
    assert portable.main([]) == 1


def test_a_version_is_asked_of_the_program():
    assert portable.version_of(sys.executable) == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert portable.version_of("no-such-program") is None
    assert portable.version_of("false") is None
