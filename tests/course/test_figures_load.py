"""The figures of notebook 03, with logs, tables and routers made to be known."""

import numpy as np
import pytest
import torch

from minimoe.course import figures
from minimoe.course.cost import place_experts
from minimoe.course.figures.load import BALANCED_BY, SKEWS, load_curves
from minimoe.course.widgets import controls
from minimoe.model import route_topk

EVEN, COLLAPSED = [[25, 25, 25, 25]], [[50, 50, 0, 0]]
MANY, HARDLY = "more than one expert in ten", "hardly any expert"


def log_of(*loads):
    return [{"load": load} for load in loads]


def test_load_curves_show_the_share_of_each_expert_since_the_last_point():
    """70 steps make windows of 2; the load of a step is known, so the shares are, and the bands that they fill."""
    drawn, data = load_curves(log_of(*([[step, 10], [30, 10]] for step in range(70))))
    rows = {(layer, step, e): share for layer, step, e, share in zip(*data.values(), strict=True)}
    assert sorted({step for _, step, _ in rows}) == list(range(2, 71, 2))
    for last in range(2, 71, 2):
        chosen = (last - 1) + (last - 2)  # of expert 0 in steps last - 2 and last - 1, counted from 0
        assert rows[0, last, 0] == pytest.approx(chosen / (chosen + 20))
        assert rows[1, last, 0] == pytest.approx(0.75)
        assert rows[0, last, 0] + rows[0, last, 1] == pytest.approx(1)
    busiest, other = (band.get_paths()[0].vertices for band in drawn.axes[1].collections)
    assert busiest[:, 1].min() == 0 and busiest[:, 1].max() == pytest.approx(0.75)  # at the bottom
    assert other[:, 1].min() == pytest.approx(0.75) and other[:, 1].max() == pytest.approx(1)
    assert (busiest[:, 0].min(), busiest[:, 0].max()) == (2, 70)


def test_what_is_left_of_a_log_makes_a_last_shorter_point():
    _, data = load_curves(log_of(*[EVEN] * 60, COLLAPSED))
    assert data["step"][-1] == 61
    assert data["share"][-4:] == [0.5, 0.5, 0, 0]
    assert load_curves(log_of(EVEN))[1]["share"] == [0.25] * 4


def test_the_alt_text_of_load_curves_tells_who_starves_and_when():
    for log, first, last in (
        (log_of(*[EVEN] * 40), HARDLY, "hardly any"),
        (log_of(*[COLLAPSED] * 40), MANY, "more than one in five"),
        (log_of(*[[[100, 90, 80, 100, 90, 80, 5]]] * 40), MANY, "some"),
        (log_of(*[COLLAPSED] * 20, *[EVEN] * 20), MANY, "hardly any"),
        (log_of(*[EVEN] * 10, COLLAPSED, *[EVEN] * 29), MANY, "hardly any"),  # one point is enough
        (log_of(*[EVEN] * 20, *[COLLAPSED] * 20), HARDLY, "more than one in five"),
    ):
        wanted = f"first half {first} gets less than a quarter of a fair share, at the end {last}."
        assert wanted in load_curves(log, "A run")[0].get_label()


def test_averages_hide_what_the_rows_show():
    """Two routers of three experts that each use one, and their average, with losses by the formula of Switch."""
    certain = 8.0 * torch.eye(3, dtype=torch.float64)[:2]
    drawn, data = figures.hidden_by_averaging({"layer": [route_topk(row.repeat(5, 1), 1) for row in certain]})
    assert data["row"] == ["0"] * 3 + ["1"] * 3 + ["average"] * 3
    table = np.reshape(data["share"], (3, 3))
    np.testing.assert_allclose(table, [[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]])
    p = certain.softmax(-1).numpy()
    probabilities = np.vstack([p, p.mean(0)])
    np.testing.assert_allclose(data["loss"][::3], 3 * (table * probabilities).sum(1))
    axes = drawn.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), table)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "average"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "layer")
    (right,) = axes.child_axes
    assert [label.get_text() for label in right.get_yticklabels()] == [f"{loss:.1f}" for loss in data["loss"][::3]]


def known_run(loads, violation, nats):
    """Tables of two seeds, ten steps each, of one layer: the loads alternate between two patterns."""
    steps = len(loads) * 5
    train = {"seed": np.repeat([0, 1], steps), "max_violation_0": np.full(2 * steps, violation)}
    for expert in range(len(loads[0])):
        train[f"load_0_{expert}"] = np.tile([load[expert] for load in loads], 10).astype(float)
    final = {"seed": np.array([0, 0, 1, 1]), "nats": np.array(nats)}
    return train, final


def test_price_of_balance_sums_the_loads_of_the_last_steps():
    """One run is as uneven in a step as the other, but its steps cancel out."""
    runs = {
        "nothing": known_run([[40, 0, 0, 0], [40, 0, 0, 0]], 3.0, [2, 4, 2, 2]),
        "luck": known_run([[40, 0, 0, 0], [0, 20, 10, 10]], 3.0, [1, 2, 3, 4]),
    }
    drawn, data = figures.price_of_balance(runs)
    assert data["balanced_by"] == ["nothing"] * 2 + ["luck"] * 2 and data["seed"] == [0, 1, 0, 1]
    assert data["together"] == [3, 3, 1, 1]
    assert data["starving"] == [0.75, 0.75, 0, 0]
    assert data["nats"] == [3, 2, 1.5, 3.5]
    left, middle, right = drawn.axes
    assert [line.get_ydata().tolist() for line in right.lines] == [[3, 1.5], [2, 3.5]]  # a line a seed
    assert [line.get_ydata().tolist() for line in middle.lines] == [[3, 1], [3, 1]]
    assert list(left.lines[0].get_xdata()) == list(runs)
    assert "those of the held-out loss cross" in drawn.get_label()


def test_both_remedies_balance_with_every_seed():
    """The finding of notebook 03, in the shipped runs."""
    _, data = figures.price_of_balance()
    uneven = {by: [] for by in BALANCED_BY}
    for by, value in zip(data["balanced_by"], data["max_violation"], strict=True):
        uneven[by].append(value)
    assert min(uneven["nothing"]) > 2 * max(max(uneven[by]) for by in BALANCED_BY if by != "nothing")


def test_the_simulator_draws_what_was_placed():
    settings = {"experts": 16, "k": 4, "devices": 4, "tokens": 64}
    drawn, data = figures.device_simulator(**settings, skew=0.5)
    rows = list(zip(*data.values(), strict=True))
    bars = drawn.axes[:2]
    for axes, (rule, placed) in zip(bars, place_experts(**settings, skew=0.5).items(), strict=True):
        shown = {what: [(x, value) for r, w, x, value in rows if (r, w) == (rule, what)] for _, what, *_ in rows}
        work = placed.work.sum(-1).tolist()
        assert [value for _, value in shown["work of device"]] == pytest.approx(work)
        assert [bar.get_height() for bar in axes.patches[-4:]] == pytest.approx(work)  # the outlines, one a device
        assert [x for x, _ in shown["time at skew"]] == SKEWS
        assert dict(shown["time at skew"])[0.5] == pytest.approx(placed.time)
        assert dict(shown["probability kept at skew"])[0.5] == pytest.approx(placed.kept)
        assert f"{rule}: the step takes {placed.time:.2f}" in axes.get_title("left")
    assert "skew 0.5" in drawn.get_label()


def test_the_controls_of_the_simulator_redraw():
    devices, skew, picture = controls(figures.device_simulator, devices=[4, 8, 16], skew=(0.0, 2.0, 0.25)).children
    before = picture.value
    skew.value = 2.0
    assert "skew 1." in before and "skew 2." in picture.value
    devices.value = 16
    assert picture.value.startswith("<p>k=8: wanted a multiple of devices=16")
