"""Your own text: the files of a folder as documents, for `Corpus.from_folder`."""

import os
import warnings
from hashlib import sha256
from itertools import groupby
from pathlib import Path

from minimoe.training.documents import HELD_OUT, TRAIN, Document, distinct

FEW_FILES = 20  # a domain of fewer is split by block instead of by file
BLOCK = 500  # characters


def read_folder(folder: Path) -> dict[str, list[Document]]:
    """The documents of each domain of a folder. Raises as `Corpus.from_folder` says."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise ValueError(f"{folder}: found a file, wanted a folder of text files")
    files, skipped = {}, []
    for path in _visible_files(folder):
        try:
            text = _read_text(path)
        except ValueError as error:
            skipped.append(str(error))
            continue
        if text.strip():
            below = path.relative_to(folder).parts[:-1]
            files.setdefault(below[0] if below else folder.resolve().name, []).append(text)
    if not files:
        raise ValueError(f"{folder}: wanted text files, found {skipped[0] if skipped else 'none that holds any text'}")
    if skipped:
        warnings.warn(f"{folder}: {len(skipped)} binary files ignored, the first is {skipped[0]}", stacklevel=3)
    return {domain: distinct(_split_files(texts)) for domain, texts in sorted(files.items())}


def _visible_files(folder: Path) -> list[Path]:
    """The regular files below a folder that are not hidden, in an order that no machine changes."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would go on without the folder

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(folder).as_posix())


def _read_text(path: Path) -> str:
    """A file's text, newlines as `\\n`. Raises ValueError, naming the file, when it is binary."""
    data = path.read_bytes()
    if b"\0" in data:
        raise ValueError(f"{path} (a binary file: byte {data.index(0)} is NUL)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} (byte {error.start} is not UTF-8)") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _split_files(texts: list[str]) -> list[Document]:
    """Documents out of the files of one domain: whole files, or blocks of them where there are few.

    The tenth of these pieces with the smallest sha256 is held out. So there is always one, and equal pieces are in the
    same split. Neighbouring blocks of a file in the same split make one document.
    """
    files = [[text] if len(texts) >= FEW_FILES else _blocks(text) for text in texts]
    pieces = sorted({piece for file in files for piece in file}, key=lambda text: sha256(text.encode()).digest())
    held_out = set(pieces[: max(1, round(len(pieces) / 10))])
    return [
        Document("".join(neighbours), HELD_OUT if are_held_out else TRAIN)
        for file in files
        for are_held_out, neighbours in groupby(file, key=held_out.__contains__)
    ]


def _blocks(text: str) -> list[str]:
    """The text in pieces of about 500 characters that end with a paragraph, or at 1,000 with a line."""
    blocks = [""]
    for line in text.splitlines(keepends=True):
        blocks[-1] += line
        if len(blocks[-1]) >= (2 * BLOCK if line.strip() else BLOCK):
            blocks.append("")
    return [block for block in blocks if block]
