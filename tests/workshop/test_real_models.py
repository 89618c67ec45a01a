"""The tables of real models: measured again where their packages are installed, and held to each other everywhere."""

import csv
import io
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from minimoe.course.published import read_published
from minimoe.fingerprints.weights import open_weights
from workshop import real_models
from workshop.experiments import to_csv
from workshop.real_models import L3, L6, PACKAGES, SMOLLM2, TABLES, TUNED, convert_onnx, locate

ROOT = Path(__file__).resolve().parents[2]


def installed(*models):
    """Skip where a package, or what reads it, is missing."""
    for model in models:
        try:
            locate(model)
        except ModuleNotFoundError as error:
            pytest.skip(f"{error}; or pip install 'minimoe[real]'")
    for model, reader in {L3: "onnx", SMOLLM2: "gguf"}.items():
        if model in models:
            pytest.importorskip(reader, reason=f"pip install {reader}, to read {model}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path))
    real_models.weights_of.cache_clear()
    yield
    real_models.weights_of.cache_clear()


@pytest.mark.parametrize("name", ["real_models", "real_layers", "real_pairs"])
def test_measured_again_the_tables_are_the_same(name, cache):
    installed(*PACKAGES)
    found, shipped = list(csv.DictReader(io.StringIO(to_csv(list(TABLES[name]()))))), read_published(name)
    assert len(found) == len(shipped)
    for one, other in zip(found, shipped, strict=True):
        assert one.keys() == other.keys()
        for column, value in other.items():
            if re.fullmatch(r"-?\d+\.\d{4}", value):
                assert float(one[column]) == pytest.approx(float(value), abs=2e-3), other
            else:
                assert one[column] == value


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


def test_the_extra_installs_what_is_measured():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"][
        "real"
    ]
    assert {f"{one.package}=={one.version}" for one in PACKAGES.values()} | {"onnx"} == set(extra)


def test_tables_agree_with_each_other():
    models = {row["model"]: row for row in read_published("real_models")}
    assert list(models) == list(PACKAGES)
    for name, packaged in PACKAGES.items():
        row = models[name]
        assert (row["package"], row["version"], row["file"], row["stated"]) == (
            packaged.package,
            packaged.version,
            packaged.file,
            packaged.stated,
        )
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


def test_an_exported_encoder_comes_back_as_it_was(tmp_path):
    """An encoder of two layers, exported by hand as torch does it: matrices turned, named after what uses them."""
    onnx = pytest.importorskip("onnx", reason="pip install onnx, to read one of the models")
    generator = torch.Generator().manual_seed(0)
    like, file, out = tmp_path / "like", tmp_path / "model.onnx", tmp_path / "out"
    like.mkdir()
    sizes = {"hidden_size": 8, "num_hidden_layers": 6, "num_attention_heads": 2, "vocab_size": 2}
    (like / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}), encoding="utf-8")
    (like / "vocab.txt").write_text("a\nb\n", encoding="utf-8")
    matrices = {
        f"encoder.layer.{layer}.{part}.weight": torch.randn(shape, generator=generator).numpy()
        for layer in range(2)
        for part, shape in {
            **{f"attention.self.{role}": (8, 8) for role in ("query", "key", "value")},
            "attention.output.dense": (8, 8),
            "intermediate.dense": (12, 8),
            "output.dense": (8, 12),
        }.items()
    }
    stored = {f"onnx::MatMul_{number}": matrix.T.copy() for number, matrix in enumerate(matrices.values())}
    plain = {"model.0.auto_model.embeddings.word_embeddings.weight": np.ones((2, 8), np.float32)}
    nodes = [
        onnx.helper.make_node(
            "MatMul", ["x", number], ["y"], name=f"/model/model.0/auto_model/{name[:-7].replace('.', '/')}/MatMul"
        )
        for name, number in zip(matrices, stored, strict=True)
    ]
    arrays = [onnx.numpy_helper.from_array(array, name) for name, array in {**stored, **plain}.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], arrays)), file)
    convert_onnx(file, like=like, out=out)
    found = open_weights(out)
    assert found.num_layers == 2 and found.tokens == {"a": 0, "b": 1}
    for role, part in {"q": "attention.self.query", "up": "intermediate.dense", "down": "output.dense"}.items():
        assert np.array_equal(found.get(role, 1).numpy(), matrices[f"encoder.layer.1.{part}.weight"])


def test_the_command_names_what_it_does_not_know(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["real_models", "reel"])
    with pytest.raises(SystemExit):
        real_models.main()
    assert "there is no table 'reel'; choose from real_upcycled, real_models" in capsys.readouterr().err
