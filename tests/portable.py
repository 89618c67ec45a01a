"""Run the checks as other processors and other Pythons would: `make portable`.

    python -m tests.portable [PYTHON ...]

Each Python gets an environment of its own, `.venv-3.13` and so on. On the first, the unit tests and the notebooks run
in every setting below; on the others, in the first two. A Python that is not there is left out, which is said; where
it was asked for by name, that is a failure.
"""

import subprocess
import sys

from tests.run_checks import ROOT, Stage, print_table, run_notebooks, run_unit_tests

PYTHONS = ("python3.11", "python3.13")
SETTINGS = (  # the first EVERYWHERE on each Python
    {},
    {"MINIMOE_ROUNDING": "1"},
    {"MINIMOE_ROUNDING": "2"},
    {"MINIMOE_ROUNDING": "3"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},  # two processes share the cores: waiting must not take one
)
EVERYWHERE = 2
STAGES = {"unit tests": run_unit_tests, "notebooks": run_notebooks}
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


def run_setting(version: str, settings: dict[str, str]) -> list[Stage]:
    """The unit tests and the notebooks."""
    python = str(ROOT / f".venv-{version}/bin/python")
    name = " ".join([version, *(f"{key}={value}" for key, value in settings.items())])
    return [run(f"{name}, {what}", python=python, **settings) for what, run in STAGES.items()]


def main(asked: list[str]) -> int:
    stages: list[Stage] = []
    for python in asked or PYTHONS:
        version = version_of(python)
        if version is None and not asked:
            print(f"{python} is not installed: left out")
            continue
        ready = version and set_up(python, version)
        if not ready:
            stages.append(Stage(f"{python}: {'set-up failed' if version else 'not installed'}", 0, 1, 0, 0.0))
            continue
        for settings in SETTINGS[: EVERYWHERE if stages else None]:
            stages += run_setting(version, settings)
            print(*stages[-len(STAGES) :], sep="\n", flush=True)
    return print_table(stages)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
