"""The figures of notebook 09 against the shipped table of invariances, the zoo's framed strangers, and each other."""

import csv
from functools import cache

import numpy as np
import pytest
import torch

from minimoe.course import figures
from minimoe.course.figures import hiding
from minimoe.data_files import data_path
from minimoe.fingerprints.compare import METHODS
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.gauge import GAUGES, obstacle
from minimoe.lineage.zoo import Zoo

LOGIT = "largest change of a logit"


@cache
def alder():
    return Zoo().load("alder")


@cache
def bench(gauge, amount=1.0):
    drawn, data = figures.gauge_bench(gauge, amount)
    return drawn, dict(zip(data["method"], data["score"], strict=True))


def benchmark(table):
    with open(data_path("zoo/benchmark") / f"{table}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_scores_are_those_of_the_shipped_table_and_the_needle_stays():
    invariance = {row["gauge"]: row for row in benchmark("invariance") if row["model"] == "alder"}
    for gauge in GAUGES:
        drawn, found = bench(gauge)
        assert found[LOGIT] < hiding.NOT_MOVED, gauge
        assert "No logit moves" in drawn.get_label()
        for method in (*hiding.COORDINATES, *hiding.FUNCTIONS) if gauge in invariance else ():
            wanted = invariance[gauge][method]
            assert found[method] == (pytest.approx(float(wanted), abs=2e-3) if wanted else ""), (gauge, method)


def test_every_rewrite_moves_some_weight():
    for gauge in GAUGES:
        name = next(name for name in hiding.SUBJECTS if obstacle(gauge, hiding.load_double(name).config) is None)
        model = hiding.load_double(name)
        rewritten = hiding.rewrite(model, gauge).state_dict()
        assert any(not torch.equal(tensor, rewritten[name]) for name, tensor in model.state_dict().items()), gauge


def test_a_model_of_ones_own_is_rewritten():
    drawn, data = figures.gauge_bench("permute_neurons", model=Zoo().load("stranger-13").double(), name="mine")
    assert drawn.get_suptitle() == "mine after permute_neurons (all or nothing)"
    scores = dict(zip(data["method"], data["score"], strict=True))
    assert scores["std_profile"] == pytest.approx(1) and scores["csu"] < 0.5
    labels = [text.get_text() for text in drawn.axes[1].texts]
    assert labels[:-1] == [f"{score:.2f}" for score in list(scores.values())[:-1]]


def test_the_needle_moves_where_the_function_does(monkeypatch):
    def damage(model, gauge, amount):
        changed = Zoo().load("alder").double()
        changed.model.layers[2].mlp.up_proj.weight.data.mul_(1.01)
        return changed

    monkeypatch.setattr(hiding, "rewrite", damage)
    drawn, found = bench("rotate_qk", 1.5)  # an amount that no other test keeps
    assert found[LOGIT] > 1e-3
    assert "A logit moves" in drawn.get_label()


def test_at_amount_0_every_score_is_1():
    for gauge in ("rotate_qk", "scale_neurons", "shift_router"):
        *scores, moved = bench(gauge, 0.0)[1].values()
        assert scores == pytest.approx([1] * 8, abs=1e-5), gauge  # weight_cosine adds up in float32
        assert moved < hiding.NOT_MOVED, gauge


def test_half_the_amount_is_half_the_exponent():
    model = hiding.load_double("alder")
    some, usual = (_log_factors(hiding.rewrite(model, "scale_qk", amount), model) for amount in (0.5, 1.0))
    torch.testing.assert_close(2 * some, usual)
    assert hiding.has_degrees("scale_qk") and not hiding.has_degrees("permute_heads")


def _log_factors(rewritten, model):
    pairs = zip(_attentions(rewritten), _attentions(model), strict=True)
    return torch.stack([(new.q_proj.weight / old.q_proj.weight).log2() for new, old in pairs])


def _attentions(model):
    return [block.self_attn for block in model.model.layers]


def test_strangers_beside_the_bars_are_the_highest_of_their_shapes():
    rows = benchmark("scores")
    data = figures.gauge_bench("mix_vo")[1]
    dense = [row for row in rows if row["use"] == "calibration" and row["shapes"] == "dense, dense, equal depths"]
    for method, highest in list(zip(data["method"], data["highest_stranger"], strict=True))[:-1]:
        assert highest == max(float(row[method]) for row in dense if row[method])


def test_what_is_no_gauge_is_refused():
    for arguments, message in ((("turn",), "gauge='turn'"), (("mix_vo", -1.0), "amount=-1.0")):
        with pytest.raises(ValueError, match=message):
            figures.gauge_bench(*arguments)


@cache
def frame(degree):
    return figures.frame_bench(degree=degree)[1]


def test_the_frame_goes_from_the_stranger_to_the_one_it_imitates():
    for degree, end in ((0.0, "stranger-13"), (1.0, "alder")):
        data = frame(degree)
        np.testing.assert_allclose(data["framed"][:-1], data[end][:-1], atol=0.02)
    scores = [frame(degree)["framed"][-1] for degree in (0.0, 0.5, 1.0)]
    assert scores[0] == pytest.approx(frame(1.0)["stranger-13"][-1], abs=1e-3)
    assert scores == sorted(scores) and scores[-1] > 0.999


def test_curves_are_standard_deviations_counted_here():
    data, model = frame(1.0), alder()
    for role in "qkvo":
        stds = np.array([getattr(a, f"{role}_proj").weight.detach().numpy().std() for a in _attentions(model)])
        shown = [value for of, value in zip(data["role"], data["alder"], strict=True) if of == role]
        np.testing.assert_allclose(shown, (stds - stds.mean()) / stds.std(), atol=1e-3)


def test_the_whole_frame_is_the_member_of_the_zoo():
    framed = open_weights(Zoo().load("stranger-13-framed-std"))
    wanted = METHODS["std_profile"](open_weights(alder()), framed).score
    assert frame(1.0)["framed"][-1] == pytest.approx(wanted, abs=1e-3)


def test_the_other_way_round_has_the_same_scores_and_no_degree_is_beyond_the_frame():
    models = hiding.load_double("alder"), hiding.load_double("stranger-13")
    drawn, data = figures.frame_bench(*models, names=("alder", "stranger-13"))
    assert data["alder"][-1] == pytest.approx(frame(1.0)["stranger-13"][-1])
    np.testing.assert_allclose(data["framed"][:-1], data["stranger-13"][:-1], atol=0.02)
    assert [axes.get_title() for axes in drawn.axes] == list("QKVO")
    for degree in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"degree={degree}: wanted 0 to 1"):
            figures.frame_bench(*models, degree)


def test_a_difference_of_logits_is_found_wherever_it_is():
    model = hiding.load_double("alder")
    changed = Zoo().load("alder").double()
    assert hiding.largest_difference(model, changed) < hiding.NOT_MOVED
    with torch.no_grad():
        changed.model.norm.weight[17] += 0.5
    assert hiding.largest_difference(model, changed) > 0.1
