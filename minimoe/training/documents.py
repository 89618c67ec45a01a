"""Documents: what a corpus is made of, before it becomes tokens."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)


class Document(NamedTuple):
    """One whole text, and the split that it belongs to for good."""

    text: str
    split: str


def split_of(key: str) -> str:
    """The split of the document that `key` names: one in ten is held out.

    It depends on the key alone, so a document stays where it is when others come or go.
    """
    held_out = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 10 == 0
    return HELD_OUT if held_out else TRAIN


def distinct(documents: Iterable[Document]) -> list[Document]:
    """The documents in order, without blank ones and repetitions, so that no text is in both splits."""
    first = {}
    for document in documents:
        if document.text.strip():
            first.setdefault(document.text, document)
    return list(first.values())


def digest(documents: Iterable[Document]) -> str:
    """sha256 of the documents' text (UTF-8) and splits, in order."""
    state = hashlib.sha256()
    for text, split in documents:
        data = text.encode()
        state.update(f"{split} {len(data)}\n".encode())
        state.update(data)
    return state.hexdigest()
