"""`make portable`: which settings it runs, what it says of each, and when it fails."""

import re
import sys

import pytest

from tests import portable
from tests.run_checks import Stage

pytestmark = pytest.mark.exact("computes nothing")


@pytest.fixture
def ran(monkeypatch) -> list[tuple[str, dict[str, str]]]:
    """The Pythons and settings that were run; in one setting, Python 9.13 fails."""
    done = []

    def run_setting(version, settings):
        done.append((version, settings))
        failed = int(version == "9.13" and "MINIMOE_ROUNDING" in settings)
        return [Stage(f"{version}, unit tests", 10, failed, 2, 1.0)]

    monkeypatch.setattr(portable, "PYTHONS", ("python9.11", "python9.12", "no-python"))
    monkeypatch.setattr(portable, "version_of", lambda python: python.removeprefix("python") if "." in python else None)
    monkeypatch.setattr(portable, "set_up", lambda python, version: version != "9.14")
    monkeypatch.setattr(portable, "run_setting", run_setting)
    return done


def test_the_first_python_runs_every_setting_and_a_missing_one_is_left_out(ran, capsys):
    assert portable.main([]) == 0
    assert [settings for version, settings in ran if version == "9.11"] == list(portable.SETTINGS)
    assert [settings for version, settings in ran if version == "9.12"] == list(portable.SETTINGS[:2])
    assert "no-python is not installed: left out" in capsys.readouterr().out


def test_a_failure_shows_in_the_table_and_the_status(ran, monkeypatch, capsys):
    for asked, line in {
        "no-python": r"no-python: not installed +FAILED",
        "python9.13": r"9\.13, unit tests +FAILED +1 s   10 passed, 1 failed, 2 skipped",
        "python9.14": r"python9\.14: set-up failed +FAILED",
    }.items():
        assert portable.main(["python9.11", asked]) == 1
        assert re.search(line, capsys.readouterr().out.rpartition("\n\n")[2])
    monkeypatch.setattr(portable, "PYTHONS", ("no-python",))
    assert portable.main([]) == 1, "no Python at all is a failure"


def test_a_version_is_asked_of_the_program():
    assert portable.version_of(sys.executable) == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert portable.version_of("no-such-program") is None
    assert portable.version_of("false") is None
