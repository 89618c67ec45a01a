"""A model in less than five megabytes: what some methods need to compare it again, without its weights.

    fingerprint("checkpoint").save("checkpoint.npz")
    compare_fingerprints("csu", *as_fingerprints(Fingerprint.load("checkpoint.npz"), open_weights("another")))

What is kept
    std_profile         the standard deviations, as they are
    norm_profile        256 dimensions of every norm
    spectral            256 singular values of either product of every layer, the others by interpolation
    virtual_response    the tables of every layer in float16, over 256 tokens of the model's own vocabulary; in models
                        of more than 8 layers fewer, down to 73 of 100 layers
    csu                 128 up rows of every layer, of each 32 random projections: another sample than that of the whole
                        matrices, as exact, with less power
What it gives away
    The file holds no matrix of the model, and for wide models far too few numbers to solve for one. It holds what is
    listed, and the strings of the tokens. Whoever knows the embedding, as of a model that was fine-tuned from a
    published one, knows the inputs and outputs of the tables: of a hidden size below the number of tokens they give
    away the products of attention matrices, of any other their part in the span of those tokens. And whoever has a
    candidate can tell whether it is a relative: that is what the file is for.

Two fingerprints of different vocabularies have few tokens in common, as each took those with the smallest hashes of its
own; below 64 the virtual response is refused. With one of the two models at hand, the tokens of the other are looked up
in it. Shapes: H hidden size, L layers, N tokens.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.atomic import write_atomically
from minimoe.fingerprints.anchors import USUAL, choose_tokens
from minimoe.fingerprints.independence import compare_ups, read_ups, shrink_ups
from minimoe.fingerprints.norm_profile import compare_norms, read_norms, shrink_norms
from minimoe.fingerprints.result import Features, Refusal, Result, explain_refusals
from minimoe.fingerprints.spectral import compare_spectra, read_spectra, shrink_spectra
from minimoe.fingerprints.std_profile import compare_std_profiles, read_std_profile
from minimoe.fingerprints.virtual_response import (
    FEWEST_KEPT,
    compare_responses,
    read_responses,
    shrink_responses,
    tokens_of,
)
from minimoe.fingerprints.weights import Weights, on_the_cpu, open_weights
from minimoe.model.transformer import MoEForCausalLM
from minimoe.progress import at_work

FORMAT, VERSION = "minimoe fingerprint", 1
MOST_BYTES = 5_000_000
BYTES_OF_TABLES = 3_200_000  # of these, for the virtual response

# What is read from a model, by name; several methods may look at one of them.
READ: Mapping[str, Callable[[Weights, Sequence[str]], Features]] = {
    "std_profile": lambda weights, tokens: read_std_profile(weights),
    "norms": lambda weights, tokens: shrink_norms(read_norms(weights)),
    "spectra": lambda weights, tokens: shrink_spectra(read_spectra(weights)),
    "responses": lambda weights, tokens: shrink_responses(read_responses(weights, tokens)),
    "ups": lambda weights, tokens: shrink_ups(read_ups(weights)),
}
# The methods that need no weights: what each looks at, and how it compares two of these.
KEPT: Mapping[str, tuple[str, Callable[[Features, Features], Result]]] = {
    "std_profile": ("std_profile", compare_std_profiles),
    "norm_profile": ("norms", compare_norms),
    "spectral": ("spectra", compare_spectra),
    "virtual_response": ("responses", compare_responses),
    "virtual_response_whitened": ("responses", partial(compare_responses, whiten=True)),
    "csu": ("ups", compare_ups),
}


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What `fingerprint` returns."""

    name: str
    family: str  # model_type of config.json
    num_layers: int
    hidden_size: int
    num_heads: int
    num_experts: int  # 0: dense
    sha256: str | None  # as `Weights.sha256` gives it; None: a file on a server without a published one
    refused: Mapping[str, str]  # what could not be read, and why
    features: Mapping[str, Features]  # by the names in `READ`

    @property
    def tokens(self) -> list[str]:
        """Those of the virtual response; none if it was refused."""
        return tokens_of(self.features["responses"]) if "responses" in self.features else []

    def save(self, path: str | Path) -> None:
        """Write it as one .npz file. If this fails, an older file at `path` is as it was.

        Raises:
            ValueError: it takes more than 5 MB, as of a model of many more than 100 layers.
        """
        facts = {key: value for key, value in vars(self).items() if key != "features"}
        about = json.dumps({"format": FORMAT, "version": VERSION, **facts}).encode()
        arrays = {f"{group}/{name}": array for group, found in self.features.items() for name, array in found.items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, about=np.frombuffer(about, np.uint8), **arrays)
        size = buffer.tell()
        if size > MOST_BYTES:
            raise ValueError(f"{path}: {size} bytes of {self.num_layers} layers, wanted at most {MOST_BYTES}")
        write_atomically(path, buffer.getvalue())

    @staticmethod
    def load(path: str | Path) -> "Fingerprint":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, no fingerprint, or of another version.
        """
        facts, arrays = _read(Path(path))
        found = facts.pop("format", None), facts.pop("version", None)
        if found != (FORMAT, VERSION):
            raise ValueError(f"{path}: found format and version {found}, wanted {(FORMAT, VERSION)}")
        features: dict[str, Features] = {}
        for name, array in arrays.items():
            group, _, name = name.partition("/")
            features.setdefault(group, {})[name] = array
        expected = {
            "fields": (facts, {field.name for field in fields(Fingerprint)} - {"features"}),
            "features": ([*features, *facts.get("refused", ())], READ),
        }
        for what, (found, wanted) in expected.items():
            if sorted(found) != sorted(wanted):
                raise ValueError(f"{path}: found {what} {', '.join(sorted(found))}, wanted {', '.join(sorted(wanted))}")
        return Fingerprint(**facts, features=features)


def _read(path: Path) -> tuple[dict[str, Any], Features]:
    """What is said in words, and all arrays."""
    data = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > 4 * MOST_BYTES:  # a small file may unpack to any size
            raise ValueError(f"it unpacks to {size} bytes")
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        facts = json.loads(arrays.pop("about").tobytes())
        return dict(facts), arrays
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: found {len(data)} bytes, wanted a whole fingerprint ({error})") from error


@on_the_cpu()
def fingerprint(
    source: str | Path | MoEForCausalLM | Weights, *, tokens: Sequence[str] | None = None, tokenizer: Any = None
) -> Fingerprint:
    """Read what the methods in `KEPT` need.

    Args:
        source: whatever `open_weights` takes, or what it returned.
        tokens: to ask for virtual responses, as far as the model has them; None: those of its vocabulary with the
            smallest hashes, 256 or fewer, that they fit.
        tokenizer: as for `open_weights`.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    weights = source if isinstance(source, Weights) else open_weights(source, tokenizer=tokenizer)
    weights.require_whole()
    if tokens is None:
        known, count = weights.tokens.keys(), number_of_tokens(weights.num_layers)
    else:
        known, count = weights.tokens.keys() & set(tokens), len(tokens)
    features, refused = {}, {}
    with at_work(READ) as names:
        for name in names:
            try:
                wanted = choose_tokens(known, count, FEWEST_KEPT) if name == "responses" else ()
                features[name] = READ[name](weights, wanted)
            except Refusal as reason:
                refused[name] = str(reason)
    try:
        sha256 = weights.sha256()
    except Refusal:
        sha256 = None
    return Fingerprint(
        name=weights.short_name,
        family=weights.family,
        num_layers=weights.num_layers,
        hidden_size=weights.hidden_size,
        num_heads=weights.num_heads,
        num_experts=weights.num_experts,
        sha256=sha256,
        refused=refused,
        features=features,
    )


def number_of_tokens(layers: int) -> int:
    """How many fit: N in three tables of N x N float16 a layer; 256 at most, 64 at least."""
    return max(FEWEST_KEPT, min(USUAL, int((BYTES_OF_TABLES / (6 * layers)) ** 0.5)))


def as_fingerprints(a: Weights | Fingerprint, b: Weights | Fingerprint) -> tuple[Fingerprint, Fingerprint]:
    """Two models as fingerprints; one that is given by its weights is read at the tokens of the other."""
    if isinstance(a, Weights):
        a = fingerprint(a, tokens=b.tokens if isinstance(b, Fingerprint) else None)
    return a, fingerprint(b, tokens=a.tokens) if isinstance(b, Weights) else b


@explain_refusals
def compare_fingerprints(method: str, a: Fingerprint, b: Fingerprint) -> Result:
    """What a method says of two models, from their fingerprints; a method that is not in `KEPT` refuses."""
    if method not in KEPT:
        raise Refusal("needs the weights of both models, and one of them is a saved fingerprint")
    features, compare = KEPT[method]
    for side in (a, b):
        if features in side.refused:
            raise Refusal(side.refused[features])
    return compare(a.features[features], b.features[features])
