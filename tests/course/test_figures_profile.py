"""The figures of notebook 08 against another way to the same numbers."""

import csv
from collections import defaultdict
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats

from minimoe.course import figures
from minimoe.course.figures import profile
from minimoe.course.runs import read_run
from minimoe.data_files import data_path
from minimoe.fingerprints.std_profile import read_std_profile
from minimoe.fingerprints.weights import open_weights
from minimoe.model import MoEForCausalLM


def rows(data):
    return [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]


def mean_r(a, b):
    return np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])


def test_profile_curves_are_the_standard_deviations_of_the_weights():
    names = ("alder", "birch")
    models = {name: MoEForCausalLM.from_pretrained(data_path("zoo") / name, dtype=torch.float32) for name in names}
    profiles = {name: read_std_profile(open_weights(model)) for name, model in models.items()}
    drawn, data = figures.profile_curves(profiles, labels={"birch": "another"})
    for row in rows(data):
        path = f"model.layers.{row['layer']}.self_attn.{row['role']}_proj.weight"
        assert row["std"] == pytest.approx(models[row["model"]].get_parameter(path).double().std().item(), rel=1e-3)
    curves = np.array(data["z"]).reshape(-1, 4)
    np.testing.assert_allclose(curves.mean(1), 0, atol=1e-9)
    np.testing.assert_allclose(curves.std(1), 1)
    for axes, of_role in zip(drawn.axes, curves.reshape(4, 2, 4), strict=True):
        np.testing.assert_allclose([line.get_ydata() for line in axes.lines], of_role)
    assert [text.get_text() for text in drawn.legends[0].texts] == ["alder", "another"]


def test_training_curves_are_correlations_of_the_rows_of_the_table():
    curves = defaultdict(list)
    with open(data_path("runs") / "profiles/8-layers/std.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            curves[int(row["seed"]), int(row["step"])].append([float(row[role]) for role in "qkvo"])
    drawn, data = figures.strangers_over_training({"mine": read_run("profiles/8-layers", "std")})
    assert drawn.axes[0].get_title(loc="left") == "mine"
    seeds, steps = ({key[place] for key in curves} for place in (0, 1))
    assert len(data["score"]) == len(steps) * len(list(combinations(seeds, 2)))
    for row in rows(data):
        first, second = (np.array(curves[row[side], row["step"]]).T for side in "ab")
        assert row["score"] == pytest.approx(mean_r(first, second))
        assert row["spread"] == pytest.approx(min(curve.std() / curve.mean() for curve in (*first, *second)))


def test_monotone_curves_are_shares_that_a_direct_count_gives():
    data = figures.monotone_curves()[1]
    share = defaultdict(float)
    for row in rows(data):
        share[row["layers"], row["order"]] += row["share"]
    assert dict(share) == pytest.approx(dict.fromkeys(share, 1.0))
    rng = np.random.default_rng(7)  # other curves
    for layers in (4, 8, 48):
        scores = [mean_r(*np.sort(rng.random((2, 4, layers)))) for _ in range(400)]
        for low in (0.5, 0.8, 0.9):
            above = sum(
                r["share"] for r in rows(data) if (r["layers"], r["order"]) == (layers, "sorted") and r["low"] >= low
            )
            assert above == pytest.approx(np.mean(np.array(scores) > low), abs=0.09)


def test_random_strangers_score_what_matrices_of_random_numbers_score():
    """Matrices are drawn here, number by number."""
    layers, width, fall = 6, 32, 10.0
    data = figures.random_strangers(layers, width, fall)[1]
    rng = np.random.default_rng(3)
    scale = np.linspace(1, 0.9, layers)
    models = (rng.standard_normal((26, 4, layers, width, width)) * scale[:, None, None]).std((-1, -2))
    scores = [mean_r(a, b) for a, b in combinations(models, 2)]
    assert len(data["score"]) == len(scores) == 325
    assert np.mean(data["score"]) == pytest.approx(np.mean(scores), abs=0.05)
    assert np.std(data["score"]) == pytest.approx(np.std(scores), rel=0.2)


def test_two_random_models_agree_as_much_as_the_trend_is_more_than_the_noise():
    layers, width, fall = 48, 96, 4.0
    trend = np.linspace(1, 1 - fall / 100, layers)
    noise = trend.mean() ** 2 / (2 * width**2)  # of the variance of an estimated standard deviation
    wanted = trend.var() / (trend.var() + noise)
    assert np.mean(figures.random_strangers(layers, width, fall)[1]["score"]) == pytest.approx(wanted, abs=0.02)


def test_without_a_trend_scores_are_chance_and_narrow_with_depth():
    for layers in (4, 48):
        scores = figures.random_strangers(layers, 96, 0)[1]["score"]
        assert np.mean(scores) == pytest.approx(0, abs=0.05)
        assert np.std(scores) == pytest.approx((4 * (layers - 1)) ** -0.5, rel=0.15)


def test_flat_curves_are_marked_as_the_package_refuses_them():
    assert set(figures.random_strangers(8, 5120, 1)[1]["refused"]) == {1}
    assert set(figures.random_strangers(8, 5120, 10)[1]["refused"]) == {0}
    data = figures.random_strangers(8, 96, 4)[1]
    spreads = profile.random_stds(8, 96, 4)
    flat = {model for model in range(26) if (stats.variation(spreads[model], axis=-1) < 0.01).any()}
    assert data["refused"] == [int(a in flat or b in flat) for a, b in zip(data["a"], data["b"], strict=True)]
    assert 0 < sum(data["refused"]) < 325


def test_what_cannot_be_drawn_is_refused():
    for arguments in ((2, 96, 4), (8, 1, 4), (8, 96, -1), (8, 96, 100)):
        with pytest.raises(ValueError, match=r"wanted at least 3|wanted at least 2|wanted 0 to below 100"):
            figures.random_strangers(*arguments)
