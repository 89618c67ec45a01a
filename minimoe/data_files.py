"""Where the files that come with minimoe lie, and where it keeps what it can make or fetch again."""

import os
import sys
from pathlib import Path


def data_path(name: str) -> Path:
    """The path of a shipped file, as `data_path("corpora/manifest.json")`.

    An installed wheel carries the files in `minimoe/data`; a clone has them in `data`, beside the package.
    """
    package = Path(__file__).resolve().parent
    shipped = package / "data"
    return (shipped if shipped.is_dir() else package.parent / "data") / name


def cache_folder() -> Path:
    """Where tokenized corpora and pieces of remote models are kept: `MINIMOE_CACHE`, or else `~/.cache/minimoe`.

    Deleting it is harmless.
    """
    return Path(os.environ.get("MINIMOE_CACHE") or os.path.expanduser("~/.cache/minimoe"))


def workshop_command(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """How to run a module of workshop/, which makes the course and is no part of the package: command and environment.

    Raises FileNotFoundError where there is no workshop/, as in an installed wheel.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / "workshop").is_dir():
        raise FileNotFoundError(f"{root}: found no workshop/, wanted a clone of the repository")
    search_path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    return [sys.executable, "-m", module, *arguments], os.environ | {"PYTHONPATH": search_path}
