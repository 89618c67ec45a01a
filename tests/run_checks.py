"""Run every check and say what passed: `make test`.

Style and unit tests show as they run. The notebooks run beside them in a process of their own (nbval does not
go with parallel workers) and their output follows. Every stage runs, whatever became of the others.
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
NBVAL = ["--nbval", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg"]
# One thread: the committed numbers were made with one, and two processes share the cores.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Stage(NamedTuple):
    """What became of a stage. One that is no pytest run counts as a single check."""

    name: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    output: str | None

    def __str__(self) -> str:
        verdict = "FAILED" if self.failed else "ok"
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return f"{self.name:20} {verdict:6} {self.seconds:4.0f} s   {counts}"


def run(name: str, *command: str, capture: bool = False) -> Stage:
    """Run `python -m command` to its end."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "junit.xml")
        if command[0] == "pytest":
            command += (f"--junitxml={report}",)
        command = (sys.executable, "-m", *command)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if capture else {}
        start = time.perf_counter()
        process = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, **streams)
        seconds = time.perf_counter() - start
        passed, failed, skipped = read_counts(report) if report.exists() else (process.returncode == 0, 0, 0)
    if process.returncode and not failed:
        failed = 1  # it crashed, or found nothing to run
    return Stage(name, int(passed), failed, skipped, seconds, process.stdout)


def read_counts(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests in a JUnit report."""
    suite = ElementTree.parse(report).find("testsuite")
    total, failures, errors, skipped = (int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped"))
    return total - failures - errors - skipped, failures + errors, skipped


def main() -> int:
    notebooks = ["pytest", "-q", "notebooks", "--ignore=notebooks/exercises", *NBVAL]
    with ThreadPoolExecutor() as beside:
        validation = beside.submit(run, "notebooks (nbval)", *notebooks, capture=True)
        stages = [
            run("ruff check", "ruff", "check"),
            run("ruff format", "ruff", "format", "--check"),
            run("unit tests (pytest)", "pytest", "-q"),
            validation.result(),
        ]
    print(stages[-1].output, *stages, sep="\n")
    failed = sum(stage.failed for stage in stages)
    print(f"{sum(stage.passed for stage in stages)} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
