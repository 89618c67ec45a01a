"""Writing a file so that a reader sees the old bytes or the new ones, never half of either."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_atomically(path: str | Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the block ends; the folders above it are made.

    If the block or the writing fails, an older file at `path` is as it was.
    Raises OSError when the folder cannot be made or written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes a file that only its owner may read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` as `replace_atomically` does."""
    with replace_atomically(path) as temporary:
        temporary.write_bytes(data)
