"""Is everything there that the notebooks need?"""

import importlib.util
import sys
from pathlib import Path

import torch

from minimoe.data_files import data_path

PACKAGES = ("torch", "numpy", "matplotlib", "ipywidgets", "safetensors", "tokenizers", "scipy", "sklearn", "tqdm")
SHIPPED = ("tokenizer.json", *(f"zoo/moe-real/{x}" for x in ("config.json", "model.safetensors", "tokenizer.json")))


def check_setup(root: Path | None = None) -> None:
    """Print whether everything is there that the notebooks need, and what to do about what is not. `root` is the folder
    of shipped files; None: the kit's own."""
    root = root or data_path("")
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    lost = [f"data/{name}" for name in SHIPPED if not (root / name).is_file()]
    steps = [  # what is needed, whether it is there, and what to do if not
        ("Python 3.11 or newer", sys.version_info >= (3, 11), "install a newer Python, then run `make setup`"),
        (f"the packages: {', '.join(absent or PACKAGES)}", not absent, "run `make setup`, and start with `make lab`"),
        (f"the shipped model: {', '.join(lost or ['data/zoo/moe-real'])}", not lost, "restore it: `git checkout data`"),
        ("one thread", torch.get_num_threads() == 1, "run `torch.set_num_threads(1)`: more threads change last digits"),
    ]
    for what, there, remedy in steps:
        print(f"{'ok' if there else 'MISSING':8} {what}" + ("" if there else f"\n{'':8} -> {remedy}"))
    missing = sum(not there for _, there, _ in steps)
    todo = f"{missing} to put right; then restart the kernel and run this again."
    print(todo if missing else "Everything is in place.")
