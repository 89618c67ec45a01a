"""The lineage card: what to publish with a model, so that nobody has to guess where it comes from.

One JSON file. `make_card` fills in what can be computed, people write the rest, `check_card` says what holds.
    format, version    "minimoe lineage card", 1
    name               of the model
    weights            their sha256, as `Weights.sha256` gives it
    files              path in the folder -> sha256, of all that lies there but hidden files, card and fingerprint
    parents            what it was made from, [] for random weights: of each name, sha256 of the weights, licence, and
                       what it gave: "weights", or only "outputs" that were learnt from, as a teacher does
    recipe             what was done, in words
    data               what it was trained on: description, licence, sha256; null where there is none or it is not told
    licence            of the model
    fingerprint        file beside the card, written by `Fingerprint.save`, and its sha256: to compare without weights
    made_with          the package that made the card
What a check confirms
    That card, folder and fingerprint belong together, byte by byte; and of parents that are at hand, that they are
    those on the card and that `compare` finds them related. Where it finds no evidence, card and finding differ: of a
    small part of a model, or after much training, there may be too little left to find.
What it cannot confirm
    Recipe, data and licences: they are somebody's word. Who came first: a child that is named as its own parent's
    parent shares weights with it all the same. Parents that the card leaves out. Nor who made the card: whoever changes
    a model can make a new one, unless the hash of the first is kept where they cannot change it.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jsonschema import Draft202012Validator

from minimoe.atomic import write_atomically
from minimoe.fingerprints.compare import compare
from minimoe.fingerprints.fingerprint import Fingerprint, fingerprint
from minimoe.fingerprints.result import Features
from minimoe.fingerprints.verdict import CANNOT_TELL, SAME, SHARED
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.model.checkpoint import sha256_of_file

FORMAT, VERSION = "minimoe lineage card", 1
CONFIRMED, OPEN, MISMATCH = "confirmed", "open", "mismatch"
ROUNDING = 2e-3  # of the largest number of a feature: what float16 and another processor leave


class Finding(NamedTuple):
    """What `check_card` says of one field: "confirmed", "open", where it could not be checked, or "mismatch"."""

    field: str
    status: str
    found: str
    wanted: str = ""  # of a mismatch

    def __str__(self) -> str:
        return f"{self.status:9} {self.field}: {self.found}" + (f"; wanted {self.wanted}" if self.wanted else "")


def _exactly(*values: Any) -> dict[str, Any]:
    return {"description": " or ".join(map(repr, values)), "enum": values}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    rules = {"properties": properties, "required": list(properties), "additionalProperties": False}
    return {"description": "an object", "type": "object", **rules}


# JSON Schema; the description is what a finding says was wanted.
WORDS = {"description": "words", "type": "string", "pattern": r"\S"}
SHA256 = {"description": "64 hexadecimal digits", "type": "string", "pattern": "^[0-9a-f]{64}$", "maxLength": 64}
SHA256_OR_NULL = SHA256 | {"description": "64 hexadecimal digits or null", "type": ["string", "null"]}
FILES = {"description": "an object of at least one file with its sha256", "type": "object"}
FILES |= {"minProperties": 1, "additionalProperties": SHA256}
NO_FOLDER = r"^[^/\\]*[^/\\.\s][^/\\]*$"  # and more than dots
FILE_NAME = {"description": "the name of a file beside the card", "type": "string", "pattern": NO_FOLDER}
PARENT = _object(name=WORDS, sha256=SHA256, licence=WORDS, gave=_exactly("weights", "outputs"))
SCHEMA = _object(
    format=_exactly(FORMAT),
    version=_exactly(VERSION),
    name=WORDS,
    weights=SHA256,
    files=FILES,
    parents={"description": "a list", "type": "array", "items": PARENT},
    recipe=WORDS,
    data=_object(description=WORDS, licence=WORDS, sha256=SHA256_OR_NULL),
    licence=WORDS,
    fingerprint=_object(file=FILE_NAME, sha256=SHA256),
    made_with=WORDS,
)


def _check_schema(content: Any) -> list[Finding]:
    """Where a card is not as `SCHEMA` wants it."""
    misfits: dict[str, tuple[str, str]] = {}  # field -> what was found, what was wanted
    for error in Draft202012Validator(SCHEMA).iter_errors(content):
        place, wanted, found = tuple(error.absolute_path), error.schema, error.instance
        if error.validator == "required":
            for name in wanted["required"]:
                if name not in found:
                    misfits[_name_field(*place, name)] = "missing", wanted["properties"][name]["description"]
        elif error.validator == "additionalProperties":
            for name in sorted(found.keys() - wanted["properties"].keys()):
                misfits[_name_field(*place, name)] = _show(found[name]), "no such field"
        else:
            misfits[_name_field(*place)] = _show(found), wanted["description"]
    return [Finding(field, MISMATCH, *pair) for field, pair in misfits.items()]


def _name_field(*path: str | int) -> str:
    """As "parents[0].sha256" or "files[config.json]"."""
    places = [f"[{part}]" if path[0] == "files" or isinstance(part, int) else f".{part}" for part in path[1:]]
    return "".join([path[0], *places]) if path else "card"


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"found {text}" if len(text) <= 80 else f"found {text[:77]}..."


def make_card(folder: str | Path, out: str | Path, *, parents: Collection[str | Path] = ()) -> dict[str, Any]:
    """Write a card, and return it; what only people know, recipe, data and licences, is left empty.

    Args:
        folder: a model in the Hugging Face layout.
        out: the card, a new file that ends in .json; the fingerprint gets the same name with .npz.
        parents: models, whatever `open_weights` takes, entered as having given weights.

    Raises:
        CheckpointError: a file is missing or damaged.
        ValueError: `folder` is a single file; `out` ends otherwise, or one of the two files is there already.
        Refusal: a parent is on a server, and no sha256 of it is published.
    """
    card, folder = Path(out), Path(folder)
    saved = card.with_suffix(".npz")
    if card.suffix != ".json":
        raise ValueError(f"out={card}: wanted a name that ends in .json")
    for path in (card, saved):
        if path.exists():
            raise ValueError(f"{path}: there already; wanted a new name, since a card holds what people wrote")
    weights, opened = open_weights(folder), [open_weights(parent) for parent in parents]
    files = _hash_files(folder, {card, saved})
    found = fingerprint(weights)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "name": folder.resolve().name,
        "weights": weights.sha256(),
        "files": files,
        "parents": [
            {"name": parent.short_name, "sha256": parent.sha256(), "licence": "", "gave": "weights"}
            for parent in opened
        ],
        "recipe": "",
        "data": {"description": "", "licence": "", "sha256": None},
        "licence": "",
        "fingerprint": {"file": saved.name, "sha256": ""},
        "made_with": f"minimoe {version('minimoe')}",
    }
    found.save(saved)  # once all is known that can go wrong: a card that cannot be made leaves no half of it
    content["fingerprint"]["sha256"] = sha256_of_file(saved)
    write_atomically(card, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    return content


def _hash_files(folder: Path, leaving_out: Collection[Path]) -> dict[str, str]:
    """The sha256 of every file in a folder and below it, by its path; hidden ones, such as .git, are left out."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: wanted a folder in the Hugging Face layout, found a single file")
    left_out = {path.resolve() for path in leaving_out}
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): sha256_of_file(path)
        for name, path in paths.items()
        if path.resolve() not in left_out and not any(part.startswith(".") for part in name.parts)
    }


def check_card(card: str | Path, folder: str | Path, *, parents: Sequence[str | Path] = ()) -> list[Finding]:
    """Check a card against its model, and against those of its parents that are at hand.

    Args:
        card: the file; its fingerprint is looked for beside it.
        folder: the model.
        parents: models, whatever `open_weights` takes; which parent each of them is, its sha256 says.

    Returns:
        One finding or more for each field that can be checked; of a card that is not as `SCHEMA` wants it, why not.

    Raises:
        OSError: there is no such card.
        ValueError: it is not JSON, or `folder` is a single file.
        CheckpointError: a model is missing or damaged.
        Refusal: a parent is on a server, and no sha256 of it is published.
    """
    card, folder = Path(card), Path(folder)
    try:
        content = json.loads(card.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{card}: wanted JSON, found something else ({error})") from error
    if misfits := _check_schema(content):
        return misfits
    weights, opened = open_weights(folder), [open_weights(parent) for parent in parents]
    saved = card.parent / content["fingerprint"]["file"]
    return [
        *_check_files(content["files"], _hash_files(folder, {card, saved})),
        _check_hash("weights", weights.sha256(), content["weights"]),
        *_check_fingerprint(saved, content["fingerprint"]["sha256"], weights),
        *_check_parents(content["parents"], weights, opened),
    ]


def _check_files(listed: dict[str, str], found: dict[str, str]) -> Iterator[Finding]:
    for name in sorted(listed.keys() | found.keys()):
        field = f"files[{name}]"
        was, wanted = found.get(name), listed.get(name, "no such file: the card does not list it")
        if was != wanted:
            yield Finding(field, MISMATCH, f"found {was}" if was else "missing in the folder", wanted)
    if listed == found:
        yield Finding("files", CONFIRMED, f"{len(found)}, as listed")


def _check_hash(field: str, found: str, wanted: str) -> Finding:
    return Finding(field, CONFIRMED, found) if found == wanted else Finding(field, MISMATCH, f"found {found}", wanted)


def _check_fingerprint(path: Path, wanted: str, weights: Weights) -> Iterator[Finding]:
    """By its hash; and by its content, since anything has a hash."""
    if not path.is_file():
        yield Finding("fingerprint.file", MISMATCH, f"{path.name} is missing beside the card", "the file")
        return
    of_file = _check_hash("fingerprint.sha256", sha256_of_file(path), wanted)
    yield of_file
    if of_file.status == MISMATCH:
        return
    saved = Fingerprint.load(path)
    now = fingerprint(weights, tokens=saved.tokens or None)
    differing = [name for name, features in now.features.items() if not _alike(features, saved.features.get(name, {}))]
    if differing or now.features.keys() != saved.features.keys():
        found = f"other features than those of the folder ({', '.join(differing) or 'another selection'})"
        yield Finding("fingerprint", MISMATCH, found, "the fingerprint of this model")
    else:
        yield Finding("fingerprint", CONFIRMED, f"{len(now.features)} kinds of features, as read from the folder")


def _alike(ours: Features, theirs: Features) -> bool:
    """Whether both hold the same arrays, up to `ROUNDING` of the largest number in each."""

    def close(x: np.ndarray, y: np.ndarray) -> bool:
        return x.shape == y.shape and np.allclose(x, y, rtol=0, atol=ROUNDING * np.abs(y).max(initial=0))

    same_names = ours.keys() == theirs.keys()
    return same_names and all(close(ours[name].astype(float), theirs[name].astype(float)) for name in ours)


def _check_parents(claimed: list[dict[str, str]], weights: Weights, at_hand: Sequence[Weights]) -> Iterator[Finding]:
    known = {parent.sha256(): parent for parent in at_hand}
    for number, claim in enumerate(claimed):
        field = f"parents[{number}] {claim['name']}"
        parent = known.get(claim["sha256"])
        if parent is None:
            yield Finding(field, OPEN, "not at hand")
        elif claim["gave"] == "outputs":
            yield Finding(field, OPEN, "at hand; of outputs that were learnt from, weights say nothing")
        else:
            report = compare(parent, weights)
            status = {SAME: CONFIRMED, SHARED: CONFIRMED, CANNOT_TELL: OPEN}.get(report.verdict, MISMATCH)
            yield Finding(field, status, f"{report.verdict}; {report.reason}", "" if status == CONFIRMED else SHARED)
    listed = [claim["sha256"] for claim in claimed]
    wanted = " or ".join(listed) or "no parent: the card names none"
    for sha256, parent in known.items():
        if sha256 not in listed:
            yield Finding("parents", MISMATCH, f"given {parent.name} with sha256 {sha256}", wanted)
