"""The relatives of a model, found in a store and compared, in Python and on the command line."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minimoe.cli import app
from minimoe.fingerprints.descriptor import describe, similarity
from minimoe.fingerprints.weights import open_weights
from minimoe.fleet.adding import read, stamp_of
from minimoe.fleet.finding import NOT_AT_HAND, NOT_COMPARED, find
from minimoe.fleet.store import Failed, Store
from minimoe.lineage.gauge import all_gauges
from tests.fingerprints.toys import disturbed
from tests.fleet.models import toy

runner = CliRunner()


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A store of three strangers and a fine-tuned copy of the first; one of the strangers is no longer there."""
    root = tmp_path_factory.mktemp("fleet")
    models = {"parent": toy(0), "child": disturbed(toy(0), 0.1), "gone": toy(1), "stranger": toy(2)}
    models["child"].tokenizer_json = models["parent"].tokenizer_json
    with Store(root / "store") as store:
        for name, model in models.items():
            model.float().save_pretrained(root / name)
            store.record(read(str(root / name), stamp_of(str(root / name))))
        store.record(Failed(name="broken", stamp="", reason="no weights"))
    shutil.rmtree(root / "gone")
    return root


def test_a_rewritten_copy_finds_its_family(filled):
    rewritten = all_gauges(toy(0).float(), 1)
    with Store(filled / "store") as store:
        found = find(store, rewritten, count=4, compared=1)
    assert [Path(one.near.names[0]).name for one in found[:2]] == ["parent", "child"]
    assert found[0].verdict == "same weights" and found[0].near.similarity > 0.99
    assert found[1].verdict == NOT_COMPARED
    assert {one.verdict for one in found[2:]} == {NOT_AT_HAND, NOT_COMPARED}


def test_on_the_command_line(filled):
    store = ["--store", str(filled / "store")]
    shown = runner.invoke(app, ["fleet", "find", str(filled / "child"), *store, "--count", "2", "--compared", "1"])
    assert shown.exit_code == 0, shown.output
    head, first, second = shown.output.splitlines()
    assert head.split() == ["similarity", "verdict", "name"]
    assert first.split()[0] == "1.000" and "same weights" in first and first.endswith("child")
    assert second.endswith("parent") and NOT_COMPARED in second
    counted = runner.invoke(app, ["fleet", "stats", *store]).output
    assert "models                   4" in counted and "without broken: no weights" in counted
    again = runner.invoke(app, ["fleet", "add", str(filled / "child"), *store])
    assert "0 of 1 read now; 4 models" in again.output and again.exit_code == 0


def test_no_store(tmp_path):
    for command in (["find", "model"], ["tree"], ["stats"]):
        shown = runner.invoke(app, ["fleet", *command, "--store", str(tmp_path / "none")])
        assert shown.exit_code == 2 and "found no store" in shown.output
    assert not (tmp_path / "none").exists()


def test_a_folder_and_its_model_have_one_descriptor(filled):
    codes = [describe(open_weights(model)) for model in (filled / "parent", toy(0).float())]
    assert similarity(*codes) > 0.9999
