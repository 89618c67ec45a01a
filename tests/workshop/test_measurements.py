"""The tables behind notebook 06: made from models by one function, and still true of the model that is shipped."""

import copy
import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minimoe.course import held_out
from minimoe.course.held_out import LENGTH, record, stretches
from minimoe.course.runs import PLANTED, read_run, where
from minimoe.data_files import data_path
from minimoe.inspection import record_routing
from minimoe.inspection.labels import labels
from minimoe.inspection.metrics import matched_agreement, mutual_information
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.training import Corpus
from workshop import measurements
from workshop.halve import halve

SHARE, NATS = 2e-3, 0.01  # what float16 may change: in a share of information, in a loss


@pytest.fixture(scope="module")
def corpus():
    return Corpus.planted()


@pytest.fixture(scope="module")
def shipped():
    return MoEForCausalLM.from_pretrained(data_path("zoo/moe-planted"), dtype=torch.float32)


@pytest.fixture(scope="module")
def trace(shipped, corpus):
    return record(shipped, corpus)


def losses(model, ids):
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def without(model, layer, expert):
    """A copy whose expert answers every token with 0, which is what an empty slot adds."""
    silent = copy.deepcopy(model)
    with torch.no_grad():
        silent.model.layers[layer].mlp.experts.down_proj[expert] = 0
    return silent


# --- the shipped tables -------------------------------------------------------------------------------------


def test_the_shipped_model_follows_what_the_table_says(trace):
    for metric, tolerance in {"token": SHARE, "language": SHARE, "topic": 5e-5, "topic given token": SHARE}.items():
        table = where(read_run("planted-batch", "specialization"), seed=0, step=800, metric=metric)
        found = measurements.information(trace, metric)
        for column in ("value", "null", "low", "high"):
            np.testing.assert_allclose(
                getattr(found, column), table[column], atol=tolerance, err_msg=f"{metric}, {column}"
            )


def test_topics_are_dealt_out_within_each_language(trace):
    """Here by hand, on counts of experts; and the table says the same of all three models: above chance, by little."""
    language, topic = (labels(trace, of).values.reshape(-1, LENGTH)[:, 0] for of in ("language", "topic"))
    rng = np.random.default_rng(7)
    found = measurements.information(trace, "topic")
    for layer in (0, 3):
        met = np.stack([np.bincount(choices, minlength=8) for choices in trace.indices[layer].reshape(len(topic), -1)])
        nats = []
        for _ in range(100):
            dealt = topic.copy()
            for number in range(4):
                dealt[language == number] = rng.permutation(topic[language == number])
            table = np.stack([met[dealt == number].sum(0) for number in range(4)])
            nats.append(expected_log(table))
        chosen = met[topic >= 0].sum(0) / met[topic >= 0].sum()
        all_there_is = -(chosen * np.log(chosen)).sum() - np.log(2)
        assert found.null[layer] == pytest.approx(np.mean(nats) / all_there_is, rel=0.2)
    table = where(read_run("planted-batch", "specialization"), step=800, metric="topic")
    assert len(table["low"]) == 12 and (table["low"] > table["null"]).all()
    assert (table["value"] < 1e-3).all()


def expected_log(table):
    share = table / table.sum()
    return (share * np.log(share / (share.sum(1, keepdims=True) * share.sum(0)))).sum()


def test_the_shipped_model_loses_what_the_table_says(shipped, corpus):
    for layer, expert, group in ((0, 2, "arithmetic"), (0, 0, "english"), (3, 1, "french")):
        domains = [domain for domain in corpus.domains if domain.split("/")[0] == group]
        ids = torch.cat([stretches(corpus, domain, 16 // len(domains)) for domain in domains])
        found = losses(without(shipped, layer, expert), ids) - losses(shipped, ids)
        row = where(read_run("planted-batch", "ablation"), seed=0, layer=layer, expert=expert, group=group)
        assert found > 0.05
        assert found == pytest.approx(row["nats"].item(), abs=NATS)


def test_the_tables_hold_every_seed_layer_and_expert():
    for name in PLANTED:
        ablated, followed = read_run(name, "ablation"), read_run(name, "specialization")
        rows = zip(*(ablated[column].tolist() for column in ("seed", "layer", "expert", "group")), strict=True)
        assert len(set(rows)) == len(ablated["seed"]) == 3 * 4 * 8 * 6
        np.testing.assert_allclose(ablated["share"].reshape(3, 4, 8, 6).sum(2), 2, atol=1e-4)  # K experts a token
        last = where(followed, step=800)
        assert len(last["seed"]) == 3 * 4 * (len(measurements.INFORMATION) + 2)
        assert (last["low"] <= last["value"]).all() and (last["value"] <= last["high"]).all()


# --- how they are made --------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two seeds of a tiny model, each with a snapshot, where an experiment would leave them."""
    for module in (held_out, measurements):
        monkeypatch.setattr(module, "STRETCHES", 4)
    monkeypatch.setattr(measurements, "INFORMATION", ("topic", "language given token"))
    recipe = replace(measurements.EXPERIMENTS["planted-batch"], steps=2, snapshots=(1,))
    monkeypatch.setattr(measurements, "EXPERIMENTS", {"planted-batch": recipe})
    shape = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MoEConfig(vocab_size=1024, num_experts=4, num_experts_per_tok=2, model_type="mixtral", **shape)
    for seed in (0, 1):
        folder = tmp_path / f"planted-batch-{seed}"
        MoEForCausalLM(config, seed=seed).save_pretrained(folder)
        MoEForCausalLM(config, seed=seed + 5).save_pretrained(folder / "step-1")
    return tmp_path


def rows(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_tiny_models_are_measured_from_end_to_end(runs, corpus, tmp_path):
    measurements.measure("planted-batch", (0, 1), runs=runs, out=tmp_path / "out", corpus=corpus)
    followed, ablated = (rows(tmp_path / "out" / f"{table}.csv") for table in ("specialization", "ablation"))

    model = MoEForCausalLM.from_pretrained(runs / "planted-batch-1")
    with torch.no_grad(), record_routing(model) as trace:  # one stretch at a time
        for domain in corpus.domains:
            trace.label(domain)
            for start in range(0, 4 * 128, 128):
                stream = corpus.tokens(domain, "held_out")[start : start + 128].astype(np.int64)
                model(torch.from_numpy(stream)[None])
    wanted = mutual_information(trace, "language", "token")
    (row,) = (
        row
        for row in followed
        if (row["seed"], row["step"], row["metric"], row["layer"]) == ("1", "2", "language given token", "1")
    )
    for column in ("value", "null", "low", "high"):
        assert float(row[column]) == pytest.approx(getattr(wanted, column)[1], rel=1e-5)

    other = record(MoEForCausalLM.from_pretrained(runs / "planted-batch-0"), corpus)
    agreement = [row for row in followed if row["metric"] == "agreement" and row["layer"] == "1"]
    assert [row["seed"] for row in agreement] == ["0", "1"]
    assert float(agreement[1]["value"]) == pytest.approx(matched_agreement(trace, other).value[1], rel=1e-5)

    saturation = [row for row in followed if row["metric"] == "saturation"]
    assert {(row["seed"], row["step"], row["layer"]) for row in saturation} == {
        (seed, "1", layer) for seed in "01" for layer in "01"
    }
    assert len(ablated) == 2 * 2 * 4 * 6
    ids = torch.cat([stretches(corpus, domain, 1) for domain in corpus.domains if "german" in domain])
    for row in ablated:
        if (row["seed"], row["layer"], row["group"]) == ("1", "1", "german"):
            lost = losses(without(model, 1, int(row["expert"])), ids) - losses(model, ids)
            assert float(row["nats"]) == pytest.approx(lost, abs=1e-5)


def test_a_run_that_is_missing_is_named_with_its_command_and_nothing_is_written(runs, corpus, tmp_path):
    for missing in ("planted-batch-1/step-1", "planted-batch-1"):
        (runs / missing / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=rf"no model in \S+{missing}; .* --seeds 1` trains it"):
            measurements.measure("planted-batch", (1,), runs=runs, out=tmp_path / "out", corpus=corpus)
    with pytest.raises(ValueError, match="'moe' are not measured; choose one of planted-batch, planted-sequence"):
        measurements.measure("moe", (0,), runs=runs, out=tmp_path / "out", corpus=corpus)
    assert not (tmp_path / "out").exists()


def test_stretches_are_the_text_without_gaps(corpus):
    found = stretches(corpus, "code", 3)
    assert found.flatten().tolist() == corpus.tokens("code", "held_out")[: 3 * 128].tolist()
    with pytest.raises(ValueError, match=r"code has \d+ held-out tokens; 1000 stretches of 128 take 128000"):
        stretches(corpus, "code", 1000)


# --- half the space -----------------------------------------------------------------------------------------


@pytest.fixture
def finished(runs):
    folder = runs / "planted-batch-0"
    for name in ("tokenizer.json", "training.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def test_halving_rounds_every_weight_and_keeps_the_rest(finished, tmp_path):
    halve(finished, tmp_path / "half")
    whole, half = (MoEForCausalLM.from_pretrained(folder) for folder in (finished, tmp_path / "half"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], weight.half())
    assert (tmp_path / "half" / "training.json").read_text(encoding="utf-8") == "{}"


def test_halving_refuses_what_it_would_spoil(finished, tmp_path):
    model = MoEForCausalLM.from_pretrained(finished)
    with torch.no_grad():
        model.model.norm.weight[0] = 1e5
    model.save_pretrained(finished)
    with pytest.raises(OverflowError, match=r"model\.norm\.weight holds 1e"):
        halve(finished, tmp_path / "half")
    (finished / "training.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"training\.json"):
        halve(finished, tmp_path / "half")
    assert not (tmp_path / "half").exists()
