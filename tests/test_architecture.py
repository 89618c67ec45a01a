"""docs/architecture.md, held against the code: who imports whom, how long files are, what is loaded when."""

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.exact("computes nothing")
ROOT = Path(__file__).resolve().parent.parent
FILES = [path for room in ("minimoe", "workshop") for path in sorted((ROOT / room).rglob("*.py"))]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
LINES = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
# The rooms that a room may import from, besides itself.
BELOW = {
    "minimoe.model": set(),
    "minimoe.training": {"minimoe.model"},
    "minimoe.inspection": {"minimoe.model"},
    "minimoe.fingerprints": {"minimoe.model"},
    "minimoe.lineage": {"minimoe.model", "minimoe.training"},
    "minimoe.fleet": {"minimoe.model", "minimoe.fingerprints"},
    "minimoe.course": {
        "minimoe.fleet",
        "minimoe.model",
        "minimoe.training",
        "minimoe.inspection",
        "minimoe.fingerprints",
        "minimoe.lineage",
    },
}
SMALL_HELPERS = {"minimoe.atomic", "minimoe.progress", "minimoe.data_files"}
# Read by two files of the model, for sources that nobody else opens.
OPTIONAL = {"minimoe.model.remote": {"httpx2", "huggingface_hub"}, "minimoe.model.gguf_file": {"gguf"}}


def imports(module):
    """The names that `module` imports anywhere in it; a name of ours as its module."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def ours(module):
    return {name for name in imports(module) if name in MODULES}


def room(module):
    return ".".join(module.split(".")[:2])


def loaded_by(program):
    """The modules in memory after a program of its own process."""
    program = f"{program}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", cwd=ROOT, check=True)
    return set(done.stdout.split())


def test_rooms_import_downwards():
    for module in MODULES:
        if room(module) in BELOW:
            above = {name for name in ours(module) if room(name) not in {room(module)} | BELOW[room(module)]}
            assert above <= SMALL_HELPERS, f"{module} imports {above - SMALL_HELPERS}"


def test_the_package_knows_nothing_of_what_makes_the_course():
    for module in MODULES:
        if module.startswith("minimoe"):
            outside = {name for name in imports(module) if name.split(".")[0] in ("workshop", "tests", "benchmarks")}
            assert not outside, f"{module} imports {outside}"


def test_small_helpers_import_nothing_of_ours():
    assert not any(ours(module) for module in SMALL_HELPERS)


def test_no_import_cycles():
    assert list(graphlib.TopologicalSorter({module: ours(module) - {module} for module in MODULES}).static_order())


def test_the_model_needs_only_torch_numpy_and_safetensors():
    for module in MODULES:
        if room(module) == "minimoe.model":
            foreign = {name.split(".")[0] for name in imports(module)} - {"minimoe", *sys.stdlib_module_names}
            extra = foreign - {"torch", "numpy", "safetensors"} - OPTIONAL.get(module, set())
            assert not extra, f"{module} imports {extra}"


def test_imports_are_light():
    """Neither the rooms nor opening a model bring in what only figures, widgets and rare sources use."""
    rooms = "minimoe, minimoe.model.opening, minimoe.training, minimoe.inspection"
    heavy = {"matplotlib", "ipywidgets", "scipy", "sklearn", "transformers", "IPython"}
    assert not loaded_by(f"import {rooms}") & (heavy | OPTIONAL.keys() | set.union(*OPTIONAL.values()))


def test_no_two_files_have_one_name():
    names = Counter(path.name for path in FILES if path.name not in ("__init__.py", "__main__.py"))
    assert not {name for name, count in names.items() if count > 1}


def test_files_and_rooms_stay_small():
    """Limits to be lowered as the package shrinks, and raised only for a new ability: families, pages in notebooks."""
    package = {module: lines for module, lines in LINES.items() if module.startswith("minimoe")}
    assert not {module: lines for module, lines in package.items() if lines > 500}
    assert sum(package.values()) <= 22_310
    assert sum(lines for module, lines in package.items() if room(module) == "minimoe.course") <= 6_210


def test_every_file_is_on_the_map():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [path.name for path in FILES if path.name != "__init__.py" and path.name not in page]
