"""Writing a file so that a reader sees the old bytes or the new ones, never half of either."""

import os
import tempfile
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, making the folders above it. If this fails, an older file at `path` is as it was.

    Raises OSError when the folder cannot be made or written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes a file that only its owner may read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
