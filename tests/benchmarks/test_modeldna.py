"""modelDNA beside our methods: who is asked what, what becomes of the answers, and the tables counted by hand.

modelDNA is not needed: a package of its name, made here, answers in its stead.
"""

import csv
import json
import sys

import pytest
import torch

from benchmarks import modeldna
from benchmarks.modeldna import ANSWERS, SHOWN, all_tables, ask, by_method, by_transformation, join, read_answers
from minimoe.data_files import data_path
from minimoe.fingerprints import zoo_scores
from minimoe.lineage.zoo import Zoo
from minimoe.model import MoEForCausalLM
from workshop.benchmark import COLUMNS
from workshop.experiments import to_csv

SHIPPED = data_path("zoo") / "benchmark"
SCAN = """
import json, os
from pathlib import Path
from types import SimpleNamespace

def compare_pair(suspect, candidate):
    for folder in (suspect, candidate):
        assert (Path(folder) / "model.safetensors").exists() and (Path(folder) / "tokenizer.json").exists()
    layers = [json.loads((Path(x) / "config.json").read_text())["num_hidden_layers"] for x in (suspect, candidate)]
    if Path(suspect).name.endswith("lora"):
        raise ValueError(f"{os.environ['OMP_NUM_THREADS']} thread")
    if layers[0] != layers[1]:
        return None, None, None, verdict("NO_MATCH", None, "layer count mismatch")
    return None, None, None, verdict("SAME_LINEAGE", 0.123456789, None)

def verdict(word, probability, ruled_out):
    ruled = SimpleNamespace(ruled_out=ruled_out)
    return SimpleNamespace(verdict=SimpleNamespace(value=word), probability=probability, candidates=[ruled])
"""


@pytest.fixture
def other_interpreter(tmp_path, monkeypatch):
    """An interpreter that finds a modelDNA of version 9."""
    package = tmp_path / "packages" / "modeldna"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '9'", encoding="utf-8")
    (package / "scan.py").write_text(SCAN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return sys.executable


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """What a fresh clone has."""
    zoo = Zoo(tmp_path / "nothing built")
    monkeypatch.setattr(modeldna, "Zoo", lambda: zoo)
    return zoo


def scores_row(a, b, use, kind="finetuned", shapes="dense, dense, equal depths", **known):
    return {**dict.fromkeys(COLUMNS), "a": a, "b": b, "use": use, "kind": kind, "shapes": shapes} | known


def read_table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- asking it


def test_every_member_becomes_a_folder_with_its_weights_and_a_tokenizer(zoo, tmp_path):
    folders = modeldna.export(zoo, ["alder", "alder-copy"], tmp_path / "home")
    assert folders == {"alder": data_path("zoo") / "alder", "alder-copy": tmp_path / "home" / "alder-copy"}
    for name, folder in folders.items():
        found = MoEForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for key, wanted in zoo.load(name).state_dict().items():
            assert torch.equal(found[key], wanted), (name, key)
        assert json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) == json.loads(
            (folders["alder"] / "tokenizer.json").read_text(encoding="utf-8")
        )


def test_the_second_member_is_the_suspect_and_answers_come_with_their_reasons(zoo, other_interpreter):
    rows = [
        scores_row("alder", "alder-finetuned", "positive"),
        scores_row("alder", "alder-fewer-layers", "positive"),
        scores_row("alder", "alder-lora", "positive"),
        scores_row("stranger-14", "alder", "evaluation"),  # a root that is not shipped
    ]
    answered = modeldna.answers(zoo, rows, other_interpreter)
    assert [list(row.values())[:5] for row in answered] == [[row[key] for key in modeldna.PAIR] for row in rows[:3]]
    assert [(row["score"], row["verdict"], row["reason"], row["version"]) for row in answered] == [
        (0.123456789, "SAME_LINEAGE", None, "9"),
        (None, "NO_MATCH", "layer count mismatch", "9"),
        (None, None, "ValueError: 1 thread", "9"),
    ]


def test_an_interpreter_without_modeldna_is_named(tmp_path, capfd):
    with pytest.raises(RuntimeError, match=r"exit status 1 after 0 of 1 pairs; wanted an interpreter with modelDNA"):
        list(ask(sys.executable, [(tmp_path, tmp_path)]))
    assert "No module named 'modeldna'" in capfd.readouterr().err


# --- the tables


@pytest.fixture
def rows():
    """200 strangers of equal shapes, 10 that modelDNA refuses; relatives of two kinds; frames.

    modelDNA's third highest stranger is at .3, ours at .4: the threshold at 1 % of 200 or 210 strangers.
    """
    strangers = [0.6, 0.5, 0.3, *[0.1] * 197]
    made = [stranger(score, {0.6: "SAME_LINEAGE", 0.5: "SAME_FAMILY_UNRESOLVED"}.get(score)) for score in strangers]
    made += [stranger(None, None, shapes="dense, dense, other depths") for _ in range(10)]
    made[0] |= {"score": 0.9}
    made[1] |= {"score": 0.8}
    found = {"score": 0.7, "verdict": "shared lineage"}
    made += [relative("int8", 0.95, "EXACT_COPY", **found), relative("int8", 0.2, "NO_MATCH", **found)]
    made += [relative("int8", 0.31, "NO_MATCH", score=0.4, verdict="cannot tell")]
    made += [relative("fewer-layers", None, "NO_MATCH", shapes="dense, dense, other depths", **found)]
    made += [forged("framed-std", 0.99, "FINE_TUNE"), forged("framed-norms", 0.7, "SAME_FAMILY_UNRESOLVED")]
    return made


def stranger(probability, word, shapes="dense, dense, equal depths"):
    ours = {"score": 0.4, "verdict": "no evidence of shared lineage"}
    theirs = {"modeldna": probability, "modeldna_verdict": word or "NO_MATCH"}
    return scores_row("x", "y", "evaluation", "roots", shapes, **ours, **theirs)


def relative(kind, probability, word, shapes="dense, dense, equal depths", **ours):
    return scores_row("x", "z", "positive", kind, shapes, modeldna=probability, modeldna_verdict=word, **ours)


def forged(kind, probability, word):
    ours = {"score": 0.1, "verdict": "no evidence of shared lineage"}
    return scores_row("x", "f", "forgery", kind, modeldna=probability, modeldna_verdict=word, **ours)


def test_methods_are_counted_on_the_same_pairs(rows):
    found = {(row["pairs"], row["method"]): row for row in by_method(rows)}
    assert list(found) == [(pairs, name) for pairs in ("all", "scored by modelDNA") for name in SHOWN]
    theirs, ours = found["all", "modeldna"], found["all", "score"]
    # Pairs of a relative and a stranger in the right order, ties half: .95 all 210; .2 207; .31 208; the refused 5.
    assert theirs["auc"] == pytest.approx((210 + 207 + 208 + 5) / (4 * 210))
    assert (theirs["relatives"], theirs["refused"], theirs["strangers"], theirs["strangers_refused"]) == (4, 1, 210, 10)
    assert theirs["tpr"] == 2 / 4  # .95 and .31 are above the third highest stranger
    assert (theirs["relatives_called"], theirs["false_positives"]) == (1, 1)
    assert theirs["false_positives_high"] == pytest.approx(0.0262, abs=1e-4)  # of 1 in 210, from a table
    assert (theirs["framed"], theirs["framed_called"]) == (2, 1)
    assert ours["tpr"] == 3 / 4 and (ours["relatives_called"], ours["false_positives"]) == (3, 0)
    assert ours["framed_called"] == 0 and ours["strangers_refused"] == 0
    fewer = found["scored by modelDNA", "modeldna"]
    assert (fewer["relatives"], fewer["refused"], fewer["strangers"], fewer["strangers_refused"]) == (3, 0, 200, 0)
    assert fewer["auc"] == pytest.approx((200 + 197 + 198) / (3 * 200)) and fewer["tpr"] == 2 / 3
    assert found["scored by modelDNA", "score"]["relatives"] == 3
    assert found["all", "match"]["false_positives"] is None and found["all", "match"]["refused"] == 4


def test_each_transformation_is_held_against_strangers_of_its_shapes(rows):
    int8, layers = by_transformation(rows)
    assert (int8["transformation"], int8["relatives"], int8["strangers"]) == ("int8", 3, 200)
    assert (int8["modeldna"], int8["score"]) == (2 / 3, 2 / 3)
    assert (int8["modeldna_called"], int8["score_called"], int8["modeldna_refused"]) == (1, 2, 0)
    assert (layers["transformation"], layers["strangers"], layers["modeldna_refused"]) == ("fewer-layers", 10, 1)
    assert (layers["modeldna"], layers["score"], layers["score_called"]) == (0, 1, 1)


def test_verdicts_are_counted_for_each_frame(rows):
    said = {(row["use"], row["tool"], row["verdict"]): row["pairs"] for row in modeldna.verdicts(rows)}
    assert said["evaluation", "modeldna", "SAME_FAMILY_UNRESOLVED"] == 1
    assert said["evaluation", "modeldna", "NO_MATCH"] == 208
    assert said["framed-std", "modeldna", "FINE_TUNE"] == 1 and ("framed-norms", "modeldna", "FINE_TUNE") not in said
    assert sum(said.values()) == 2 * len(rows)


# --- the command


def test_the_tables_can_be_made_anew_from_the_answers(zoo, other_interpreter, tmp_path, capsys):
    """A pair whose members are not at hand keeps what was said of it; one that was never answered is left out."""
    ours = {"score": 0.5, "verdict": "shared lineage"}
    rows = [
        scores_row("alder", "alder-finetuned", "positive", **ours),
        scores_row("alder", "stranger-14", "evaluation", "roots", **ours),
        scores_row("alder", "stranger-15", "evaluation", "roots", **ours),
        scores_row("stranger-01", "stranger-02", "calibration", "roots", **ours),
    ]
    (tmp_path / "scores.csv").write_text(to_csv(rows), encoding="utf-8")
    stored = {"score": 0.25, "verdict": "NO_MATCH", "reason": None, "version": "8"}
    (tmp_path / ANSWERS).write_text(
        to_csv([{key: rows[1][key] for key in modeldna.PAIR} | stored], ".5g"), encoding="utf-8"
    )
    modeldna.main(["--python", other_interpreter, "--out", str(tmp_path)])
    answered = read_answers(tmp_path / ANSWERS)
    assert [(row["b"], row["score"], row["version"]) for row in answered] == [
        ("alder-finetuned", 0.12346, "9"),
        ("stranger-14", 0.25, "8"),
    ]
    assert "1 of 3 pairs compared by modelDNA now\n2 of 3 pairs in the tables" in capsys.readouterr().out
    files = [tmp_path / f"{name}.csv" for name in all_tables(join(rows, answered))]
    written = [file.read_bytes() for file in files]
    first = read_table(files[0])[0]
    assert (first["method"], first["relatives"], first["strangers"], first["tpr"]) == ("modeldna", "1", "1", "0")
    for file in files:
        file.unlink()
    modeldna.main(["--out", str(tmp_path)])
    assert [file.read_bytes() for file in files] == written


def test_what_is_missing_is_named(tmp_path, capsys):
    for wanted, file in (("no such file; `python -m workshop.benchmark", "scores.csv"), ("--python", ANSWERS)):
        with pytest.raises(SystemExit, match="2"):
            modeldna.main(["--out", str(tmp_path)])
        assert wanted in capsys.readouterr().err
        (tmp_path / file).touch()


# --- what is shipped


def test_the_shipped_tables_are_made_from_the_shipped_scores():
    """After another `python -m workshop.benchmark`, `python -m benchmarks.modeldna` makes them so."""
    rows = [row for row in zoo_scores.read_table("scores") if row["use"] in modeldna.USES]
    answered = read_answers(SHIPPED / ANSWERS)
    joined = join(rows, answered)
    assert len(joined) == len(answered), "the benchmark has grown since; what was asked is still there"
    for name, table in all_tables(joined).items():
        found = read_table(SHIPPED / f"{name}.csv")
        assert found == list(csv.DictReader(to_csv(table, ".5g").splitlines())), name
