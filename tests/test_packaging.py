"""Set-up and packaging: the other files repeat what pyproject.toml declares, and `make` does what it says."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import minimoe

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
DECLARED = [*RUNTIME, *(requirement for extra in EXTRAS.values() for requirement in extra)]

pytestmark = pytest.mark.exact("computes nothing")
CONDA_NAME = {"torch": "pytorch-cpu"}
IMPORT_NAME = {"scikit-learn": "sklearn", "ipython": "IPython", "pyyaml": "yaml", "pillow": "PIL"}


def constraints() -> dict[str, str]:
    lines = [
        line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    pins = [line.split("==") for line in lines]
    return {canonicalize_name(name): version for name, version in pins}


# --- the files agree


def test_version_and_authors_are_repeated_faithfully():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == minimoe.__version__ == PROJECT["version"]
    assert f"## [{minimoe.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"] and citation["title"]
    assert citation["authors"] == PROJECT["authors"]


def test_environment_yml_agrees_with_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge"]
    lines = [line for line in environment["dependencies"] if isinstance(line, str)]
    for line in lines:
        assert line.count("=") < 2 or ">=" in line, f"{line!r} names a build string, which ties it to one platform"
    expected = [f"{CONDA_NAME.get(each.name, each.name)}{each.specifier}" for each in RUNTIME]
    assert lines == ["python=3.11", *expected, "pip"]
    assert environment["dependencies"][-1] == {"pip": ["-e .[fleet]"]}, "notebook 12 keeps a fleet"
    assert PROJECT["requires-python"] == ">=3.11"


def test_a_tested_version_is_pinned_for_every_dependency_on_any_platform():
    pins = constraints()
    for requirement in DECLARED:
        pinned = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{requirement} does not allow the pinned {pinned}"
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{line!r} is no plain pin"


@pytest.mark.skipif(not (ROOT / ".venv/set-up-complete").exists(), reason="`make setup` did not make this environment")
def test_constraints_are_what_is_installed():
    here = [sysconfig.get_path("purelib")]  # setuptools, once imported, adds a folder of packages of its own
    installed = {canonicalize_name(each.name): each.version for each in metadata.distributions(path=here)}
    differing = {
        name: (installed[name], pin)
        for name, pin in constraints().items()
        if name in installed and installed[name].split("+")[0] != pin
    }
    assert not differing, f"installed and pinned: {differing}"


def test_readme_gives_the_reason_for_every_dependency():
    rows = "".join(
        line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines(True) if line.startswith("|")
    )
    missing = [requirement.name for requirement in DECLARED if f"`{requirement.name}`" not in rows]
    assert not missing, f"no table row of the README names {missing}"


def imported_by(*folders: str) -> dict[str, str]:
    """Top-level modules imported anywhere under the folders, each with one file that does so."""
    found = {}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            found |= {name.split(".")[0]: str(path.relative_to(ROOT)) for name in names}
    own = {"minimoe", "workshop", "tests", "benchmarks", *sys.stdlib_module_names}
    return {name: path for name, path in found.items() if name not in own}


def test_every_import_is_a_declared_dependency():
    for folders, extras in {
        ("minimoe",): ("remote", "fleet"),  # imported only where it is needed
        ("workshop",): ("remote", "site", "real"),
        ("tests", "benchmarks"): ("remote", "test", "real", "fleet"),
    }.items():
        allowed = [*RUNTIME, *(requirement for extra in extras for requirement in EXTRAS[extra])]
        modules = {IMPORT_NAME.get(requirement.name, requirement.name) for requirement in allowed}
        undeclared = {name: path for name, path in imported_by(*folders).items() if name not in modules}
        assert not undeclared, f"imported, but not declared in pyproject.toml: {undeclared}"


# --- the wheel


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    found = [path for folder in ("minimoe", "data") for path in (ROOT / folder).rglob("*.*") if path.is_file()]
    files = [path.relative_to(ROOT) for path in found]
    package = {str(path) for path in files if path.suffix == ".py" and path.parts[0] == "minimoe"}
    data = {f"minimoe/{path}" for path in files if path.parts[0] == "data"}
    assert package and data
    assert {name for name in names if ".dist-info/" not in name} == package | data
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("licenses/LICENSE-TEXT") for name in names)


# --- make, with a stand-in for Python that writes down what it is asked to do

STAND_IN = """#!/bin/sh
echo "$*" >> calls
case "$*" in
    "-c import sys"*) exit ${TOO_OLD:-0} ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip "*torch==*) if [ "$PIP" = hangs ]; then touch hanging; sleep 60; fi ;;
    "-m pip "*) if [ "$PIP" = fails ]; then exit 1; fi ;;
esac
"""


class Clone:
    """A folder with a space in its name that holds what `make setup` needs."""

    def __init__(self, parent: Path):
        self.path = parent / "a clone"
        self.path.mkdir()
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.path)
        self.python = parent / "stand in"
        self.python.write_text(STAND_IN, encoding="utf-8")
        self.python.chmod(0o755)
        self.venv = self.path / ".venv"

    def start(self, *arguments: str, **settings: str) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")} | settings
        return subprocess.Popen(
            ["make", f"PYTHON={self.python}", *arguments],
            cwd=self.path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )

    def make(self, *arguments: str, **settings: str) -> tuple[int, str]:
        process = self.start(*arguments, **settings)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def calls(self) -> list[str]:
        """What Python was asked to do since the last call of this function."""
        path = self.path / "calls"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def test_setup_installs_torch_first_and_leaves_settings_that_jupyter_can_read(clone):
    status, output = clone.make("setup")
    assert status == 0, output
    _, venv, torch, rest = clone.calls()
    assert venv == "-m venv .venv"
    assert torch.endswith(f"--constraint constraints.txt torch=={constraints()['torch']}")
    assert rest.endswith("--constraint constraints.txt --quiet --editable .[test,dev,text,remote,site,fleet]")
    for settings in ("share/jupyter/lab/settings/overrides.json", "etc/jupyter/jupyter_nbconvert_config.json"):
        assert json.loads((clone.venv / settings).read_text(encoding="utf-8"))
    assert clone.make("setup")[0] == 0
    assert clone.calls() == [], "nothing is done twice"


def test_targets_set_up_what_is_missing_and_run_one_program(clone):
    for target, program in {
        "lab": "-m jupyterlab --no-browser notebooks/00_start_here.ipynb",
        "test": "tests/run_checks.py",
        "notebooks": "-m workshop.build notebooks",
        "site": "-m workshop.website",
        "figures": "-m minimoe.cli figures",
    }.items():
        shutil.rmtree(clone.venv, ignore_errors=True)
        for _ in range(2):
            status, output = clone.make(target, "LAB_ARGS=--no-browser")
            assert status == 0, output
        assert clone.venv.joinpath("set-up-complete").exists()
        *_, before, first, second = clone.calls()
        assert "pip" in before and first == second == program


def test_portable_is_told_the_pythons_and_needs_no_environment(clone):
    assert clone.make("portable", "PYTHONS=one two")[0] == 0
    assert clone.calls() == ["-m tests.portable one two"]


def test_a_failed_setup_leaves_nothing(clone):
    status, output = clone.make("setup", PIP="fails")
    assert status != 0 and "set-up failed" in output
    assert not clone.venv.exists()
    assert clone.make("setup")[0] == 0


def test_a_killed_setup_is_done_again_from_nothing(clone):
    process = clone.start("setup", PIP="hangs")
    while not clone.path.joinpath("hanging").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (clone.venv / "half-written").touch()
    clone.calls()
    assert clone.make("setup")[0] == 0
    assert "-m venv .venv" in clone.calls()
    assert not (clone.venv / "half-written").exists()


def test_new_constraints_update_the_environment_in_place(clone):
    clone.make("setup")
    later = time.time() + 10
    os.utime(clone.path / "constraints.txt", (later, later))
    assert clone.make("setup", PIP="fails")[0] != 0
    assert clone.venv.exists(), "a failed update must not take the working environment away"
    clone.calls()
    os.utime(clone.path / "constraints.txt")
    os.utime(clone.venv / "set-up-complete", (later - 60, later - 60))
    status, output = clone.make("setup", TOO_OLD="1")  # the Python on the PATH no longer matters
    assert status == 0, output
    torch, rest = clone.calls()
    assert "torch==" in torch and "--editable" in rest
    assert clone.make("setup")[0] == 0
    assert clone.calls() == []


def test_a_moved_folder_and_an_environment_without_its_python_are_set_up_again(clone):
    clone.make("setup")
    (clone.venv / "bin/python").unlink()
    clone.calls()
    assert clone.make("setup")[0] == 0
    assert "-m venv .venv" in clone.calls()
    clone.path = clone.path.rename(clone.path.with_name("moved here"))
    assert clone.make("setup")[0] == 0
    assert "-m venv .venv" in clone.calls()


def test_an_old_python_is_refused_with_the_way_out(clone):
    status, output = clone.make("setup", TOO_OLD="1")
    assert status != 0
    assert "needs Python 3.11" in output and str(clone.python) in output and "make setup PYTHON=" in output
    assert not clone.venv.exists()


def test_the_makefile_tells_old_pythons_from_new(monkeypatch):
    """The stand-in cannot show that the question in the Makefile is the right one; running it can."""
    (question,) = re.findall(r"-c '(import sys; .*?)'", (ROOT / "Makefile").read_text(encoding="utf-8"))
    for version, status in {(3, 9): 1, (3, 10, 14): 1, (3, 11): 0, (3, 13, 1): 0, (4, 0): 0}.items():
        monkeypatch.setattr(sys, "version_info", version)
        with pytest.raises(SystemExit) as caught:
            exec(question)
        assert int(caught.value.code) == status, version
