"""docs/architecture.md, held against the code: imports run downwards, without cycles, and `import minimoe` is light."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "minimoe").rglob("*.py"))
}
# What a room may import from the rest of the package.
ALLOWED = {
    "minimoe.model": {"minimoe.model"},
    "minimoe.training": {"minimoe.model", "minimoe.training"},
    "minimoe.inspection": {"minimoe.model", "minimoe.inspection"},
    "minimoe.lineage": {"minimoe.model", "minimoe.training", "minimoe.lineage"},
    "minimoe.fingerprints": {"minimoe.model", "minimoe.fingerprints"},
    "minimoe.course": {
        "minimoe.model",
        "minimoe.training",
        "minimoe.inspection",
        "minimoe.lineage",
        "minimoe.fingerprints",
        "minimoe.course",
    },
}
KNOWS_THE_TRUTH = "minimoe.fingerprints.benchmark"  # the one fingerprint file that may ask the family tree
SMALL_HELPERS = {"minimoe.atomic", "minimoe.progress", "minimoe.data_files"}


def imports(module):
    """Modules of ours that `module` imports anywhere, and the names of foreign packages."""
    ours, foreign = set(), set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            assert not isinstance(node, ast.ImportFrom), f"{module} imports relatively"
            continue
        for name in names:
            if name.split(".")[0] == "minimoe":
                known = name if name in MODULES else name.rpartition(".")[0]
                ours.add(known)
            else:
                foreign.add(name.split(".")[0])
    return ours, foreign


def room(module):
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("module", [module for module in MODULES if room(module) in ALLOWED])
def test_imports_run_downwards(module):
    allowed = ALLOWED[room(module)] | SMALL_HELPERS
    if module == KNOWS_THE_TRUTH:
        allowed |= {"minimoe.lineage", "minimoe.training"}
    above = {found for found in imports(module)[0] if room(found) not in allowed}
    assert not above, f"{module} imports {above}"


@pytest.mark.parametrize("module", sorted(SMALL_HELPERS))
def test_small_helpers_import_nothing_of_ours(module):
    assert not imports(module)[0]


def test_no_import_cycles():
    graph = {module: imports(module)[0] - {module} for module in MODULES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_the_model_needs_only_torch_numpy_and_safetensors():
    """Besides what two files take for a source that nobody else opens; `opening` imports them where there is one."""
    optional = {"minimoe.model.remote": {"httpx2", "huggingface_hub"}, "minimoe.model.gguf_file": {"gguf"}}
    needed = set(sys.stdlib_module_names) | {"torch", "numpy", "safetensors"}
    for module in MODULES:
        if room(module) == "minimoe.model":
            extra = imports(module)[1] - needed - optional.get(module, set())
            assert not extra, f"{module} imports {extra}"
    loaded = loaded_by("import minimoe.model.opening")
    assert not loaded & set.union(*optional.values()) and not loaded & optional.keys()


def test_import_is_light():
    """Neither the package nor the model, its training and inspection bring in what only figures and widgets use."""
    heavy = {"matplotlib", "ipywidgets", "scipy", "sklearn", "transformers", "IPython"}
    assert not loaded_by("import minimoe, minimoe.model, minimoe.training, minimoe.inspection") & heavy


def loaded_by(program):
    """The modules in memory after a program of its own process."""
    program = f"{program}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", cwd=ROOT, check=True)
    return set(done.stdout.split())


def test_every_file_is_on_the_map():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    missing = [path.name for path in MODULES.values() if path.name != "__init__.py" and path.name not in page]
    assert not missing
