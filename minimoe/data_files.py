"""Where the files that come with minimoe lie, and where it keeps what it can make or fetch again."""

import os
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
