"""Where the files that come with minimoe lie."""

from pathlib import Path


def data_path(name: str) -> Path:
    """The path of a shipped file, as `data_path("corpora/manifest.json")`.

    An installed wheel carries the files in `minimoe/data`; a clone has them in `data`, beside the package.
    """
    package = Path(__file__).resolve().parent
    shipped = package / "data"
    return (shipped if shipped.is_dir() else package.parent / "data") / name
