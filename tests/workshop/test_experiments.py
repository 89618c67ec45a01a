"""The runs behind the course: recipes, and tables held against the logs they come from."""

import csv
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from minimoe.model import MoEForCausalLM
from minimoe.training import Corpus, evaluate
from minimoe.training.presets import EXPERIMENTS, small_config
from workshop import experiments
from workshop.experiments import run


@pytest.fixture(scope="module")
def corpus():
    return Corpus.planted(documents_per_domain=20)


@pytest.fixture
def short(monkeypatch, corpus):
    """Experiments of 20 steps, evaluated after the last, on a little planted text."""
    few = {name: replace(recipe, steps=20, corpus="planted", snapshots=()) for name, recipe in EXPERIMENTS.items()}
    monkeypatch.setattr(experiments, "EXPERIMENTS", few)
    monkeypatch.setattr(experiments, "EVALUATE_EVERY", 20)
    monkeypatch.setattr(experiments, "FINAL_BATCHES", 2)
    monkeypatch.setattr("minimoe.training.loop.evaluate", partial(evaluate, batches=1))
    monkeypatch.setattr(Corpus, "planted", lambda: corpus)


def rows(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tables_hold_what_the_logs_say(short, corpus, tmp_path):
    run("balance-none", (0, 3), runs=tmp_path / "runs", out=tmp_path / "tables")
    log = [
        json.loads(line)
        for line in (tmp_path / "runs/balance-none-3/log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    table = rows(tmp_path / "tables/train.csv")
    assert [(row["seed"], row["step"]) for row in table] == [("0", "10"), ("0", "20"), ("3", "10"), ("3", "20")]
    last = log[10:20]
    assert float(table[3]["cross_entropy"]) == pytest.approx(sum(r["cross_entropy"] for r in last) / 10, abs=1e-4)
    for layer in range(4):
        counts = np.array([record["load"][layer] for record in last]).sum(0)
        shares = [float(table[3][f"load_{layer}_{expert}"]) for expert in range(8)]
        assert shares == pytest.approx(counts / (10 * 8 * 128 * 2), abs=1e-4)
        violation = sum(record["max_violation"][layer] for record in last) / 10
        assert float(table[3][f"max_violation_{layer}"]) == pytest.approx(violation, abs=1e-4)
    held_out = [row for row in rows(tmp_path / "tables/held_out.csv") if (row["seed"], row["step"]) == ("3", "20")]
    assert {row["domain"]: float(row["nats"]) for row in held_out} == pytest.approx(log[19]["held_out"], abs=1e-4)
    model = MoEForCausalLM.from_pretrained(tmp_path / "runs/balance-none-3")
    final = {row["domain"]: float(row["nats"]) for row in rows(tmp_path / "tables/final.csv") if row["seed"] == "3"}
    assert final == pytest.approx(evaluate(model, corpus, batches=2), abs=1e-4)


def test_a_finished_run_is_not_repeated(short, tmp_path):
    run("dense-active", (0,), runs=tmp_path, out=tmp_path / "first")
    log = (tmp_path / "dense-active-0/log.jsonl").read_bytes()
    run("dense-active", (0,), runs=tmp_path, out=tmp_path / "again")
    assert (tmp_path / "dense-active-0/log.jsonl").read_bytes() == log
    for table in ("train", "held_out", "final"):
        assert (tmp_path / f"first/{table}.csv").read_bytes() == (tmp_path / f"again/{table}.csv").read_bytes()
    assert set(rows(tmp_path / "first/train.csv")[0]) == {"seed", "step", "cross_entropy"}


def test_the_twin_of_equal_compute_meets_as_many_parameters_in_all():
    mixture = small_config().num_parameters(active=True) * EXPERIMENTS["moe"].steps
    twin = EXPERIMENTS["dense-total-compute"]
    dense = small_config(experts=0, experts_per_token=twin.experts_per_token).num_parameters() * twin.steps
    assert dense == pytest.approx(mixture, rel=1e-3)


def test_an_unknown_experiment_is_refused(tmp_path):
    with pytest.raises(ValueError, match="experiment 'luck': wanted one of moe, dense-active"):
        run("luck", out=tmp_path)
