"""`from minimoe import ...`: the names, where they come from, and that nothing is loaded for those not asked for."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import minimoe

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.exact("computes nothing")
NAMES = {
    "Corpus",
    "MoEConfig",
    "MoEForCausalLM",
    "Report",
    "compare",
    "evaluate",
    "fingerprint",
    "generate",
    "open_weights",
    "record_routing",
    "train",
    "upcycle",
}


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", cwd=ROOT, check=True)
    return done.stdout.split()


def test_importing_it_loads_nothing_but_itself():
    before, after = (set(run(f"{program}import sys; print(*sys.modules)")) for program in ("", "import minimoe; "))
    loaded = after - before
    assert {name for name in loaded if name.split(".")[0] not in sys.stdlib_module_names} == {"minimoe"}


def test_the_names_are_these_for_people_tools_and_stars():
    assert set(minimoe.__all__) == minimoe._FROM.keys() == NAMES
    assert len(minimoe.__all__) == len(NAMES) and set(dir(minimoe)) >= NAMES | {"__version__"}
    starred = {}
    exec("from minimoe import *", starred)
    assert {name for name in starred if not name.startswith("__")} == NAMES
    for name in NAMES:
        assert (starred[name].__module__, starred[name].__name__) == (f"minimoe.{minimoe._FROM[name]}", name)
    tree = ast.parse(Path(minimoe.__file__).read_text(encoding="utf-8"))
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module.startswith("minimoe.")]
    said = {alias.name: node.module for node in hints for alias in node.names}
    assert said == {name: f"minimoe.{module}" for name, module in minimoe._FROM.items()}


def test_a_name_that_is_not_there_is_said_in_the_usual_way():
    with pytest.raises(AttributeError, match="module 'minimoe' has no attribute 'downcycle'"):
        minimoe.downcycle  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'downcycle'"):
        from minimoe import downcycle  # noqa: F401


def test_no_name_hides_a_module():
    """`minimoe.lineage.upcycle` was a function for those who imported it in one way, and a module in another."""
    packages = [minimoe, *(importlib.import_module(found.name) for found in walk() if found.ispkg)]
    for package in packages:
        for found in pkgutil.iter_modules(package.__path__):
            name = f"{package.__name__}.{found.name}"
            importlib.import_module(name)
            assert getattr(package, found.name) is sys.modules[name], name
    assert not NAMES & {found.name for found in pkgutil.iter_modules(minimoe.__path__)}


def walk():
    return pkgutil.walk_packages(minimoe.__path__, "minimoe.")


def test_help_on_the_command_line_loads_no_torch():
    program = "import runpy, sys; sys.argv = ['minimoe', '--help']\n"
    program += "try: runpy.run_module('minimoe.cli', run_name='__main__')\n"
    program += "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert run(program)[-2:] == ["False", "False"]
