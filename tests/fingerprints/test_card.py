"""Lineage cards: what is true of a model passes, and each thing that is not is named with what was found and wanted."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minimoe.data_files import data_path
from minimoe.fingerprints.card import CONFIRMED, MISMATCH, OPEN, check_card, make_card
from minimoe.fingerprints.fingerprint import Fingerprint
from minimoe.lineage.gauge import all_gauges
from minimoe.lineage.zoo import Zoo
from minimoe.model import MoEForCausalLM
from minimoe.model.checkpoint import CheckpointError

ALDER, CHILD, STRANGER = (data_path("zoo") / name for name in ("alder", "alder-finetuned", "stranger-01"))


def complete(card: Path, **changes) -> None:
    """Fill in what people write, and change what a test wants to be otherwise."""
    content = json.loads(card.read_text(encoding="utf-8"))
    for parent in content["parents"]:
        parent["licence"] = "Apache-2.0"
    content |= {"recipe": "250 steps on other text", "licence": "Apache-2.0"}
    content["data"] = {"description": "generated text", "licence": "Apache-2.0", "sha256": None}
    card.write_text(json.dumps(content | changes), encoding="utf-8")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A fine-tuned model in a folder of its own, its card and fingerprint in it."""
    folder = tmp_path_factory.mktemp("published") / "child"
    shutil.copytree(CHILD, folder)
    make_card(folder, folder / "card.json", parents=[ALDER])
    complete(folder / "card.json")
    return folder


@pytest.fixture
def copy(published, tmp_path):
    """One to be spoiled."""
    return Path(shutil.copytree(published, tmp_path / "copy"))


def edit(folder: Path, **changes) -> Path:
    card = folder / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return card


def mismatches(findings):
    return {finding.field: finding for finding in findings if finding.status == MISMATCH}


def test_a_card_of_its_model_is_confirmed(published):
    findings = check_card(published / "card.json", published, parents=[ALDER])
    assert {finding.status for finding in findings} == {CONFIRMED}
    assert [finding.field for finding in findings] == [
        "files",
        "weights",
        "fingerprint.sha256",
        "fingerprint",
        "parents[0] alder",
    ]
    assert "shared lineage" in findings[-1].found


def test_a_card_may_lie_elsewhere_and_a_parent_may_be_missing(published, tmp_path):
    for name in ("card.json", "card.npz"):
        shutil.copy(published / name, tmp_path)
    findings = check_card(tmp_path / "card.json", CHILD)
    assert {finding.field for finding in findings if finding.status == CONFIRMED} == {
        "files",
        "weights",
        "fingerprint.sha256",
        "fingerprint",
    }
    assert (findings[-1].field, findings[-1].status, findings[-1].found) == ("parents[0] alder", OPEN, "not at hand")


def test_what_a_fresh_card_lacks_is_listed(tmp_path):
    make_card(CHILD, tmp_path / "card.json", parents=[ALDER])
    found = mismatches(check_card(tmp_path / "card.json", CHILD))
    assert found.keys() == {"recipe", "licence", "data.description", "data.licence", "parents[0].licence"}
    assert str(found["recipe"]) == 'mismatch  recipe: found ""; wanted words'


def test_a_card_names_the_published_hash_of_the_file(published):
    content = json.loads((published / "card.json").read_text(encoding="utf-8"))
    of_file = hashlib.sha256((CHILD / "model.safetensors").read_bytes()).hexdigest()
    of_parent = hashlib.sha256((ALDER / "model.safetensors").read_bytes()).hexdigest()
    assert content["weights"] == content["files"]["model.safetensors"] == of_file
    assert content["parents"] == [{"name": "alder", "sha256": of_parent, "licence": "Apache-2.0", "gave": "weights"}]
    assert content["files"].keys() == {path.name for path in CHILD.iterdir()}
    assert (content["name"], content["fingerprint"]["file"]) == ("child", "card.npz")


# --- what was tampered with


def test_one_weight_that_was_changed(copy):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    findings = check_card(copy / "card.json", copy, parents=[ALDER])
    found = mismatches(findings)
    assert {"files[model.safetensors]", "weights"} <= found.keys()
    assert found["weights"].wanted == json.loads((copy / "card.json").read_text(encoding="utf-8"))["weights"]
    assert found["weights"].found != f"found {found['weights'].wanted}"


def test_files_that_changed_went_or_came(copy):
    (copy / "config.json").write_text((copy / "config.json").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    (copy / "lineage.json").unlink()
    (copy / "modeling.py").write_text("print('hello')", encoding="utf-8")
    (copy / ".hidden").touch()
    found = mismatches(check_card(copy / "card.json", copy))
    assert found.keys() == {"files[config.json]", "files[lineage.json]", "files[modeling.py]"}
    assert found["files[lineage.json]"].found == "missing in the folder"
    assert found["files[modeling.py]"].wanted.startswith("no such file")


def test_files_in_subfolders_count(tmp_path):
    folder = Path(shutil.copytree(CHILD, tmp_path / "model"))
    (folder / "extra").mkdir()
    (folder / "extra" / "words.txt").write_text("a", encoding="utf-8")
    content = make_card(folder, tmp_path / "card.json")
    assert "extra/words.txt" in content["files"]
    complete(tmp_path / "card.json")
    (folder / "extra" / "words.txt").write_text("b", encoding="utf-8")
    assert mismatches(check_card(tmp_path / "card.json", folder)).keys() == {"files[extra/words.txt]"}


def test_a_fingerprint_that_is_missing_or_changed(copy):
    with (copy / "card.npz").open("ab") as file:
        file.write(b"\0")
    assert mismatches(check_card(copy / "card.json", copy)).keys() == {"fingerprint.sha256"}
    (copy / "card.npz").unlink()
    found = mismatches(check_card(copy / "card.json", copy))
    assert found.keys() == {"fingerprint.file"}
    assert "card.npz is missing" in found["fingerprint.file"].found


def test_the_fingerprint_of_another_model_is_seen_whatever_its_hash(copy, tmp_path):
    make_card(STRANGER, tmp_path / "other.json")
    shutil.copy(tmp_path / "other.npz", copy / "card.npz")
    other = json.loads((tmp_path / "other.json").read_text(encoding="utf-8"))["fingerprint"]["sha256"]
    edit(copy, fingerprint={"file": "card.npz", "sha256": other})
    found = mismatches(check_card(copy / "card.json", copy))
    assert found.keys() == {"fingerprint"}
    for name in ("std_profile", "norms", "spectra", "responses", "ups"):
        assert name in found["fingerprint"].found


def test_no_part_of_a_fingerprint_goes_unread(published, copy):
    for group in ("std_profile", "norms", "spectra", "responses", "ups"):
        saved = Fingerprint.load(published / "card.npz")
        name = next(name for name, array in saved.features[group].items() if array.dtype.kind == "f")
        saved.features[group][name] = (saved.features[group][name] * 1.1).astype(saved.features[group][name].dtype)
        saved.save(copy / "card.npz")
        digest = hashlib.sha256((copy / "card.npz").read_bytes()).hexdigest()
        edit(copy, fingerprint={"file": "card.npz", "sha256": digest})
        found = mismatches(check_card(copy / "card.json", copy))
        assert found.keys() == {"fingerprint"} and f"({group})" in found["fingerprint"].found


def test_rounding_is_no_mismatch(copy):
    saved = Fingerprint.load(copy / "card.npz")
    for features in saved.features.values():
        for name, array in features.items():
            if array.dtype.kind == "f":
                features[name] = (array.astype(float) * (1 + 1e-4)).astype(array.dtype)
    saved.save(copy / "card.npz")
    digest = hashlib.sha256((copy / "card.npz").read_bytes()).hexdigest()
    edit(copy, fingerprint={"file": "card.npz", "sha256": digest})
    assert not mismatches(check_card(copy / "card.json", copy))


# --- parents


def test_a_parent_that_is_another_one(published):
    found = mismatches(check_card(published / "card.json", published, parents=[STRANGER]))
    assert found.keys() == {"parents"}
    claimed = json.loads((published / "card.json").read_text(encoding="utf-8"))["parents"][0]["sha256"]
    assert "stranger-01" in found["parents"].found and found["parents"].wanted == claimed


def test_a_claim_that_is_not_true(tmp_path):
    make_card(CHILD, tmp_path / "card.json", parents=[STRANGER])
    complete(tmp_path / "card.json")
    found = mismatches(check_card(tmp_path / "card.json", CHILD, parents=[STRANGER]))
    assert found.keys() == {"parents[0] stranger-01"}
    (finding,) = found.values()
    assert finding.found.startswith("no evidence of shared lineage") and finding.wanted == "shared lineage"


def test_a_root_has_no_parents(tmp_path):
    make_card(ALDER, tmp_path / "card.json")
    complete(tmp_path / "card.json")
    assert not mismatches(check_card(tmp_path / "card.json", ALDER))
    found = mismatches(check_card(tmp_path / "card.json", ALDER, parents=[CHILD]))
    assert found["parents"].wanted == "no parent: the card names none"


def test_a_rewritten_copy_is_confirmed(tmp_path):
    copy = all_gauges(MoEForCausalLM.from_pretrained(ALDER, dtype=torch.float32), seed=1)
    copy.save_pretrained(tmp_path / "copy")
    shutil.copy(ALDER / "tokenizer.json", tmp_path / "copy")
    make_card(tmp_path / "copy", tmp_path / "card.json", parents=[ALDER])
    complete(tmp_path / "card.json")
    (finding,) = check_card(tmp_path / "card.json", tmp_path / "copy", parents=[ALDER])[-1:]
    assert finding.status == CONFIRMED and finding.found.startswith("same weights")


def test_of_a_teacher_weights_say_nothing(tmp_path):
    student = data_path("zoo") / "alder-distilled"
    content = make_card(student, tmp_path / "card.json", parents=[ALDER])
    complete(tmp_path / "card.json", parents=[content["parents"][0] | {"gave": "outputs", "licence": "Apache-2.0"}])
    findings = check_card(tmp_path / "card.json", student, parents=[ALDER])
    assert not mismatches(findings)
    assert findings[-1].status == OPEN and "outputs" in findings[-1].found


def test_where_an_order_stands_alone_a_claim_stays_open(tmp_path):
    """A stranger whose neurons have the order of alder's: somebody arranged it, or one part was taken over."""
    Zoo().load("stranger-13-framed-order").save_pretrained(tmp_path / "one")
    make_card(tmp_path / "one", tmp_path / "card.json", parents=[ALDER])
    complete(tmp_path / "card.json")
    (finding,) = check_card(tmp_path / "card.json", tmp_path / "one", parents=[ALDER])[-1:]
    assert finding.status == OPEN and finding.found.startswith("cannot tell")


# --- the schema


WRONG = [
    ({"format": "a card"}, "format", '"a card"', "'minimoe lineage card'"),
    ({"version": 2}, "version", "2", "1"),
    ({"version": True}, "version", "true", "1"),
    ({"name": "  "}, "name", '"  "', "words"),
    ({"weights": "0" * 64 + "\\n"}, "weights", "\\\\n", "64 hexadecimal digits"),
    ({"weights": "abc"}, "weights", '"abc"', "64 hexadecimal digits"),
    ({"files": {}}, "files", "{}", "at least one file"),
    ({"files": {"config.json": None}}, "files[config.json]", "null", "64 hexadecimal digits"),
    ({"parents": {}}, "parents", "{}", "a list"),
    ({"parents": ["alder"]}, "parents[0]", '"alder"', "an object"),
    ({"parents": [{"name": "alder"}]}, "parents[0].sha256", "missing", "64 hexadecimal digits"),
    ({"recipe": None}, "recipe", "null", "words"),
    ({"data": "text"}, "data", '"text"', "an object"),
    ({"data": {"description": "d", "licence": "l"}}, "data.sha256", "missing", "or null"),
    ({"data": {"description": "d", "licence": "l", "sha256": "0"}}, "data.sha256", '"0"', "or null"),
    ({"licence": 3}, "licence", "3", "words"),
    ({"license": "MIT"}, "license", '"MIT"', "no such field"),
    (
        {"fingerprint": {"file": "../x.npz", "sha256": "0" * 64}},
        "fingerprint.file",
        '"../x.npz"',
        "beside the card",
    ),
    ({"fingerprint": {"file": "x.npz"}}, "fingerprint.sha256", "missing", "64 hexadecimal digits"),
    ({"made_with": []}, "made_with", "[]", "words"),
]


def test_each_field_is_held_to_its_kind(copy):
    whole = (copy / "card.json").read_text(encoding="utf-8")
    for changes, field, found, wanted in WRONG:
        (copy / "card.json").write_text(whole, encoding="utf-8")
        findings = mismatches(check_card(edit(copy, **changes), copy))
        assert field in findings, changes
        assert found in findings[field].found and wanted in findings[field].wanted, findings


def test_every_field_is_asked_for(copy):
    content = json.loads((copy / "card.json").read_text(encoding="utf-8"))
    for name in content:
        (copy / "card.json").write_text(
            json.dumps({key: value for key, value in content.items() if key != name}), encoding="utf-8"
        )
        findings = mismatches(check_card(copy / "card.json", copy))
        assert findings.keys() == {name} and findings[name].found == "missing"


def test_what_a_parent_gave_is_one_of_two_things(copy):
    parents = json.loads((copy / "card.json").read_text(encoding="utf-8"))["parents"]
    found = mismatches(check_card(edit(copy, parents=[parents[0] | {"gave": "advice"}]), copy))
    assert found["parents[0].gave"].wanted == "'weights' or 'outputs'"


# --- what cannot be read or written


def test_what_cannot_be_read(copy, tmp_path):
    with pytest.raises(FileNotFoundError):
        check_card(tmp_path / "none.json", copy)
    for text in ("{", "[" * 100_000):
        (tmp_path / "card.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="wanted JSON"):
            check_card(tmp_path / "card.json", copy)
    (tmp_path / "card.json").write_text("[]", encoding="utf-8")
    (finding,) = check_card(tmp_path / "card.json", copy)
    assert str(finding) == "mismatch  card: found []; wanted an object"
    with pytest.raises(CheckpointError, match="nowhere"):
        check_card(copy / "card.json", tmp_path / "nowhere")


def test_nothing_is_overwritten_and_nothing_half_done(copy, tmp_path):
    before = (copy / "card.json").read_bytes()
    with pytest.raises(ValueError, match=r"card\.json: there already"):
        make_card(copy, copy / "card.json")
    assert (copy / "card.json").read_bytes() == before
    np.savez(tmp_path / "card.npz")
    with pytest.raises(ValueError, match=r"card\.npz: there already"):
        make_card(copy, tmp_path / "card.json")
    with pytest.raises(ValueError, match=r"wanted a name that ends in \.json"):
        make_card(copy, tmp_path / "card.txt")
    with pytest.raises(CheckpointError):
        make_card(tmp_path / "nowhere", tmp_path / "new.json")
    assert not (tmp_path / "new.npz").exists()


def test_a_single_file_is_no_folder_to_list(copy, tmp_path):
    """A card that lists no file could never be confirmed."""
    with pytest.raises(ValueError, match="wanted a folder"):
        make_card(copy / "model.safetensors", tmp_path / "new.json")
    assert list(tmp_path.glob("new.*")) == []
    with pytest.raises(ValueError, match="wanted a folder"):
        check_card(copy / "card.json", copy / "model.safetensors")
