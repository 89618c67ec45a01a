"""The sweep over fine-grained and shared experts: what a row holds, and that the shipped table has all of them."""

import csv

from minimoe.data_files import data_path
from minimoe.model import MoEForCausalLM
from minimoe.training import Corpus, evaluate, train
from minimoe.training.presets import GRAINS, grain_config
from workshop.grain import sweep


def test_a_row_is_the_held_out_loss_of_a_trained_model():
    corpus, settings = Corpus.planted(documents_per_domain=20), {"steps": 2, "batch_size": 2, "seq_len": 16}
    rows = sweep(corpus, [1], **settings)
    assert [row["model"] for row in rows] == list(GRAINS)
    model = MoEForCausalLM(grain_config(*GRAINS["32 quarters, 2 shared"]), seed=1)
    train(model, corpus, seed=1, **settings)
    held_out = evaluate(model, corpus, batches=16)
    assert abs(rows[-1]["nats"] - sum(held_out.values()) / len(held_out)) < 1e-6


def test_the_shipped_table_has_three_seeds_of_each():
    with open(data_path("runs/grain.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], int(row["seed"])) for row in rows] == [(name, seed) for name in GRAINS for seed in range(3)]
    assert {row["steps"] for row in rows} == {"400"}  # which notebook 13 says
