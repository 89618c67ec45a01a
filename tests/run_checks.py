"""Run every check and say what passed: `make test`.

Style, the unit tests, the notebooks, and the unit tests once more with the rounding of another processor
(tests/rounding.py), each on two processes. Every stage runs, whatever became of the others.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
# What a file sets up once, one process needs. By name: xdist would leave slow files with few tests for last.
TWO_PROCESSES = ("--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder")
NBVAL = ("--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg")
# One thread: the committed numbers were made with one, and two processes share the cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MINIMOE_ROUNDING": ""}
# A kernel has no conftest.py: it finds tests/rounding.py through these settings of its own.
KERNEL_SETTINGS = 'c.InteractiveShellApp.extensions = ["tests.rounding"]\n'


class Stage(NamedTuple):
    """What became of a stage. One that is no pytest run counts as a single check."""

    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float

    def __str__(self) -> str:
        verdict = "FAILED" if self.failed else "ok"
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return f"{self.name:40} {verdict:6} {self.seconds:4.0f} s   {counts}"


def run(name: str, *command: str, python: str = sys.executable, **settings: str) -> Stage:
    """Run `python -m command` to its end, with `settings` in its environment."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | ENVIRONMENT | settings
        if environment["MINIMOE_ROUNDING"]:
            profile = Path(folder, "profile_default", "ipython_kernel_config.py")
            profile.parent.mkdir()
            profile.write_text(KERNEL_SETTINGS, encoding="utf-8")
            environment |= {"IPYTHONDIR": folder, "PYTHONPATH": str(ROOT)}
        report = Path(folder, "junit.xml")
        if command[0] == "pytest":
            command += (f"--junitxml={report}",)
        start = time.perf_counter()
        status = subprocess.run((python, "-m", *command), cwd=ROOT, env=environment).returncode
        seconds = time.perf_counter() - start
        passed, failed, skipped = read_counts(report) if report.exists() else (status == 0, 0, 0)
    if status and not failed:
        failed = 1  # it crashed, or found nothing to run
    return Stage(name, int(passed), failed, skipped, seconds)


def run_unit_tests(name: str, **options: str) -> Stage:
    """The unit tests. A module or test of ours that opens a file without an encoding fails, as pyproject.toml says."""
    return run(name, "pytest", "-q", *TWO_PROCESSES, PYTHONWARNDEFAULTENCODING="1", **options)


def run_notebooks(name: str, **options: str) -> Stage:
    """The notebooks under strict nbval."""
    return run(
        name,
        "pytest",
        "-q",
        "notebooks",
        "--ignore=notebooks/exercises",
        "--ignore=notebooks/gaps",
        *NBVAL,
        *TWO_PROCESSES,
        **options,
    )


def read_counts(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests in a JUnit report."""
    suite = ElementTree.parse(report).find("testsuite")
    total, failures, errors, skipped = (int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped"))
    return total - failures - errors - skipped, failures + errors, skipped


def print_table(stages: list[Stage]) -> int:
    """Print a line for each stage and the sums; return the exit status."""
    failed = sum(stage.failed for stage in stages)
    print("", *stages, f"{sum(stage.passed for stage in stages)} passed, {failed} failed", sep="\n")
    return 1 if failed or not stages else 0


def main() -> int:
    return print_table(
        [
            run("ruff check", "ruff", "check"),
            run("ruff format", "ruff", "format", "--check"),
            run_unit_tests("unit tests"),
            run_notebooks("notebooks"),
            run_unit_tests("unit tests, rounding", MINIMOE_ROUNDING="1"),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
