"""Is everything there that the notebooks need?"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from minimoe.data_files import data_path


class SetUp(NamedTuple):
    """One thing that a notebook needs: whether it is there, and what to do if not."""

    what: str
    found: bool
    remedy: str


PACKAGES = ("torch", "numpy", "matplotlib", "ipywidgets", "safetensors", "tokenizers", "scipy", "sklearn", "tqdm")
SHIPPED = (
    "tokenizer.json",
    *(f"zoo/moe-real/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")),
)


def check_setup(root: Path | None = None) -> None:
    """Print whether everything is there that the notebooks need, and what to do about what is not.

    Args:
        root: the folder of shipped files; None: the kit's own.
    """
    steps = list(_setup(root or data_path("")))
    for step in steps:
        print(f"{'ok' if step.found else 'MISSING':8} {step.what}")
        if not step.found:
            print(f"{'':8} -> {step.remedy}")
    missing = sum(not step.found for step in steps)
    todo = f"{missing} to put right; then restart the kernel and run this again."
    print(todo if missing else "Everything is in place.")


def _setup(root: Path) -> Iterator[SetUp]:
    yield SetUp("Python 3.11 or newer", sys.version_info >= (3, 11), "install a newer Python, then run `make setup`")
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    remedy = "run `make setup` in the folder of the kit, and start with `make lab`"
    yield SetUp(f"the packages: {_or_all(absent, PACKAGES)}", not absent, remedy)
    absent = [f"data/{name}" for name in SHIPPED if not (root / name).is_file()]
    remedy = "restore them from the repository: `git checkout data`"
    yield SetUp(f"the shipped model: {_or_all(absent, ['data/zoo/moe-real'])}", not absent, remedy)
    one = torch.get_num_threads() == 1
    yield SetUp("one thread", one, "run `torch.set_num_threads(1)`: more are slower here, and change the last digits")


def _or_all(absent: list[str], every: Sequence[str]) -> str:
    return ", ".join(absent or every)
