"""The figures of notebook 06 against the model's own logits and the rows of the tables."""

import csv

import numpy as np
import pytest
import torch

from minimoe.course import figures
from minimoe.course.figures import specialization
from minimoe.course.runs import read_run
from minimoe.data_files import data_path
from minimoe.model import MoEForCausalLM
from minimoe.training import Corpus


def rows(name, table):
    text = (data_path("runs") / name / f"{table}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def mean(found):
    values = [float(value) for value in found]
    return sum(values) / len(values)


def test_expert_use_counts_the_two_largest_logits():
    data = figures.expert_use(layer=2)[1]
    model = MoEForCausalLM.from_pretrained(data_path("zoo/moe-planted"), dtype=torch.float32)
    corpus = Corpus.planted()
    met = {}
    with torch.no_grad():
        for domain in corpus.domains:
            ids = torch.from_numpy(corpus.tokens(domain, "held_out")[: 16 * 128].astype(np.int64)).view(16, 128)
            logits = model(ids, output_router_logits=True).router_outputs[2].logits
            met[domain] = (logits >= logits.sort().values[:, -2:-1]).double().mean(0)
    met["all"] = torch.stack(list(met.values())).mean(0)
    assert data["label"] == [name for name in met for _ in range(8)]
    assert data["share"] == pytest.approx(torch.cat(list(met.values())).tolist(), abs=1e-6)
    assert data["chance"][:8] == pytest.approx(met["all"].tolist(), abs=1e-6)


@pytest.mark.parametrize("label, names", [("language", 5), ("topic", 5), ("domain", 19)])
@pytest.mark.parametrize("layer", range(4))
def test_every_position_of_the_controls_can_be_drawn(label, names, layer):
    drawn, data = figures.expert_use(label, layer)
    assert len(data["label"]) == names * 8
    shares = np.array(data["share"]).reshape(names, 8)
    np.testing.assert_allclose(shares.sum(1), 2)
    assert f"layer {layer}" in drawn.get_label()


@pytest.mark.parametrize("arguments, message", [(("domain", 4), "layer=4"), (("token", 0), "label 'token'")])
def test_what_cannot_be_drawn_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"{message}: wanted"):
        figures.expert_use(*arguments)


def test_followed_labels_are_the_rows_of_the_finished_models():
    data = figures.followed_labels()[1]
    of = {
        (row["metric"], int(row["layer"]), int(row["seed"])): row
        for row in rows("planted-batch", "specialization")
        if row["step"] == "800"
    }
    assert len(data["metric"]) == 6 * 4 * 3
    for metric, layer, seed, value, chance in zip(*data.values(), strict=True):
        assert (value, chance) == (float(of[metric, layer, seed]["value"]), float(of[metric, layer, seed]["null"]))


def test_training_curves_are_means_of_three_trainings():
    data = figures.routing_over_training()[1]
    table = rows("planted-batch", "specialization")
    for metric, step, layer, value, chance in zip(*data.values(), strict=True):
        where = (metric, str(step), str(layer))
        found = [row for row in table if (row["metric"], row["step"], row["layer"]) == where]
        assert len(found) == 3
        assert value == pytest.approx(mean(row["value"] for row in found))
        assert chance == pytest.approx(mean(row["null"] for row in found))
    assert set(data["metric"]) == {"saturation", "token", "language", "topic"}


def test_both_ways_of_balancing_are_shown_as_they_were_measured():
    data = figures.batch_or_sequence()[1]
    runs = {"loss over the batch": "planted-batch", "loss in each sequence": "planted-sequence"}
    assert len(data["value"]) == 2 * 3 * (4 + 1)
    for balance, measure, layer, seed, value in zip(*data.values(), strict=True):
        if measure == "loss":
            wanted = mean(row["nats"] for row in rows(runs[balance], "final") if row["seed"] == str(seed))
        else:
            where = (str(seed), "800", "language", str(layer))
            found = rows(runs[balance], "specialization")
            (wanted,) = (
                float(row["value"]) for row in found if (row["seed"], row["step"], row["metric"], row["layer"]) == where
            )
        assert value == pytest.approx(wanted)


def test_ablation_map_shows_every_expert():
    data = figures.ablation_map(seed=2)[1]
    of = {
        (int(row["layer"]), row["group"], int(row["expert"])): float(row["nats"])
        for row in rows("planted-batch", "ablation")
        if row["seed"] == "2"
    }
    shown = dict(zip(zip(data["layer"], data["group"], data["expert"], strict=True), data["nats"], strict=True))
    assert shown == of
    with pytest.raises(ValueError, match="seed=7: wanted one of 0, 1, 2"):
        figures.ablation_map(seed=7)


def test_load_and_worth_weigh_every_group_alike():
    data = figures.load_and_worth()[1]
    experts = [place for place, view in enumerate(data["view"]) if view == "expert"]
    assert len(experts) == 3 * 4 * 8
    found = [row for row in rows("planted-batch", "ablation") if (row["seed"], row["layer"]) == ("1", "2")]
    wanted = [mean(row["nats"] for row in found if row["expert"] == str(expert)) for expert in range(8)]
    shown = [data["nats"][place] for place in experts if (data["seed"][place], data["layer"][place]) == (1, 2)]
    assert shown == pytest.approx(wanted)


def test_use_and_worth_go_by_the_columns_not_the_order_of_the_rows(monkeypatch):
    share, nats = figures.use_and_worth()
    table = read_run("planted-batch", "ablation")
    row = 555
    place = tuple(int(table[column][row]) for column in ("seed", "layer", "expert"))
    groups = list(dict.fromkeys(table["group"].tolist()))
    assert nats[place][groups.index(table["group"][row])] == table["nats"][row]
    np.testing.assert_allclose(share.sum(2), 2, atol=1e-4)
    order = np.random.default_rng(0).permutation(len(table["seed"]))
    shuffled = {column: cells[order] for column, cells in table.items()}
    monkeypatch.setattr(specialization, "read_run", lambda *_: shuffled)
    again = figures.use_and_worth()[1]
    np.testing.assert_array_equal(np.sort(again, axis=3), np.sort(nats, axis=3))  # groups in order of appearance


def test_topics_are_held_against_a_chance_that_keeps_the_language():
    above = [
        sum(a > b for a, b in zip(data["low"][:32], data["chance"][:32], strict=True))
        for data in (figures.expert_use("topic", layer)[1] for layer in range(4))
    ]
    assert sum(above) > 0.025 * 128  # none, where the chance lets go of the language


def test_rank_correlation_is_that_of_the_ranks():
    rng = np.random.default_rng(0)
    share, nats = rng.random((2, 3, 10)), rng.random((2, 3, 10)) ** 3
    ranks = [values.argsort(-1).argsort(-1) for values in (share, nats)]
    wanted = [np.corrcoef(ranks[0][place], ranks[1][place])[0, 1] for place in np.ndindex(2, 3)]
    np.testing.assert_allclose(figures.rank_correlations(share, nats).flatten(), wanted)
    np.testing.assert_allclose(figures.rank_correlations(share, np.exp(share)), 1)
