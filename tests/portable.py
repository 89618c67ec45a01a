"""Run the checks as other processors and other Pythons would: `make portable`.

    python -m tests.portable [PYTHON ...]

Each Python gets an environment of its own, `.venv-3.13` and so on. On the first, the unit tests and the notebooks run
in every setting below; on the others, in the first two. A Python that is not there is left out, which is said; where
it was asked for by name, that is a failure.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.run_checks import ROOT, Stage, run_notebooks, run_unit_tests

PYTHONS = ("python3.11", "python3.13")
SETTINGS = (  # the first EVERYWHERE on each Python
    {},
    {"MINIMOE_ROUNDING": "1"},
    {"MINIMOE_ROUNDING": "2"},
    {"MINIMOE_ROUNDING": "3"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"OMP_NUM_THREADS": "2"},
)
EVERYWHERE = 2
ASK_VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"


def version_of(python: str) -> str | None:
    """Such as "3.13"; None where there is no such program, or it is no Python."""
    try:
        asked = subprocess.run([python, "-c", ASK_VERSION], capture_output=True, encoding="utf-8")
    except OSError:
        return None
    return asked.stdout.strip() or None


def set_up(python: str, version: str) -> bool:
    command = ["make", "setup", f"VENV=.venv-{version}", f"PYTHON={python}"]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def run_cell(version: str, settings: dict[str, str]) -> Stage:
    """The unit tests and, beside them, the notebooks, in one setting."""
    python = str(ROOT / f".venv-{version}/bin/python")
    name = " ".join([f"Python {version}", *(f"{key}={value}" for key, value in settings.items())])
    with ThreadPoolExecutor(max_workers=1) as beside:
        notebooks = beside.submit(run_notebooks, name, python=python, **settings)
        stages = [run_unit_tests(name, python=python, capture=True, **settings), notebooks.result()]
    passed, failed, skipped = (sum(getattr(s, count) for s in stages) for count in ("passed", "failed", "skipped"))
    output = "\n".join(stage.output for stage in stages if stage.failed)
    return Stage(name, passed, failed, skipped, max(stage.seconds for stage in stages), output)


def main(asked: list[str]) -> int:
    cells: list[Stage] = []
    for python in asked or PYTHONS:
        version = version_of(python)
        if version is None and not asked:
            print(f"{python} is not installed: left out")
            continue
        ready = version and set_up(python, version)
        if not ready:
            cells.append(Stage(f"{python}: {'set-up failed' if version else 'not installed'}", 0, 1, 0, 0.0, None))
            continue
        for settings in SETTINGS[: EVERYWHERE if cells else None]:
            cells.append(run_cell(version, settings))
            print(cells[-1].output, cells[-1], sep="\n", flush=True)
    print("", *cells, sep="\n")
    failed = sum(cell.failed for cell in cells)
    print(f"{sum(cell.passed for cell in cells)} passed, {failed} failed")
    return 1 if failed or not cells else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
