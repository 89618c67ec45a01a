"""The figures of dense models, drawn of runs with a known truth: they give back that truth."""

import numpy as np
import pytest

from minimoe.course import figures, runs
from minimoe.course.cost import training_flop
from minimoe.course.figures.twins import Progress, twins_by_cost
from minimoe.course.widgets import controls
from minimoe.training.presets import EXPERIMENTS

# Nats per token above the mixture, by run, and by domain where it depends on it.
TRUTH = {
    "dense-active": {"code": 0.25, "prose": 0.25},
    "dense-total": {"code": 0.25, "prose": -0.25},
    "mine": {"code": -0.5, "prose": -0.75},
}
BASE = {"code": 2.0, "prose": 3.0}
SEEDS = (0, 1, 2)


def table(names, rows):
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def final(above=None, noise=(0, 0, 0)):
    """A table "final": a loss for each seed and domain, `above` the base; `noise` moves the prose of a seed."""
    above = above or dict.fromkeys(BASE, 0.0)
    rows = [(s, d, BASE[d] + above[d] + 0.125 * s + noise[s] * (d == "prose")) for s in SEEDS for d in BASE]
    return table(("seed", "domain", "nats"), rows)


def held_out(above):
    """A table "held_out" of five steps: falls with the step; a seed moves the loss of every domain alike."""
    rows = [(s, 100 * n, d, BASE[d] + above + 0.125 * s + 1 / n) for s in SEEDS for n in range(1, 6) for d in BASE]
    return table(("seed", "step", "domain", "nats"), rows)


@pytest.fixture
def twins():
    return {run: final(above) for run, above in TRUTH.items()}


def test_final_gaps_are_the_true_ones_seed_by_seed(twins):
    drawn, data = figures.final_gaps(final(), twins)
    rows = list(zip(*data.values(), strict=True))
    assert [row[:2] for row in rows] == [(run, seed) for run in TRUTH for seed in SEEDS]
    assert [gap for *_, gap in rows] == pytest.approx([np.mean([*TRUTH[run].values()]) for run in TRUTH for _ in SEEDS])
    (axes,) = drawn.axes
    zero, *marks = axes.lines
    assert list(zero.get_xdata()) == [0, 0]
    assert [mark.get_xdata().mean() for mark in marks] == pytest.approx([0.25, 0.0, -0.625])
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first dense model at the top
    assert [label.get_text() for label in axes.get_yticklabels()][2] == "mine"
    assert "dense, equal active same tokens and compute +0.250, +0.250 to +0.250" in drawn.get_label()


def test_gaps_by_domain_mark_who_is_better_with_every_seed(twins):
    twins["mine"] = final(TRUTH["mine"], noise=(0, 0, 1))  # with one seed the mixture is ahead in prose
    drawn, data = figures.gaps_by_domain(final(), twins)
    found = {(run, domain): row for run, domain, *row in zip(*data.values(), strict=True)}
    assert {place: who for place, (_, who) in found.items()} == {
        ("dense-active", "code"): "mixture", ("dense-active", "prose"): "mixture",
        ("dense-total", "code"): "mixture", ("dense-total", "prose"): "dense",
        ("mine", "code"): "dense", ("mine", "prose"): "open",
    }  # fmt: skip
    assert found["dense-total", "prose"][0] == pytest.approx(-0.25)
    (axes,) = drawn.axes
    shown = {(round(text.get_position()[1]), round(text.get_position()[0])): text for text in axes.texts}
    assert shown[1, 1].get_text() == "-0.250" and shown[1, 1].get_weight() == "bold"
    assert shown[0, 0].get_text() == "+0.250" and shown[0, 0].get_weight() == "normal"
    assert (axes.images[0].get_array() > 0).tolist() == [[True, True], [True, False], [False, False]]
    counts = "mixture 3, dense 2, open 1. Where it is the dense model: dense, equal total same tokens: prose; mine"
    assert counts in drawn.get_label()


def test_who_is_better_only_where_all_seeds_agree():
    cases = {"mixture": [0.1, 0.2, 0.3], "dense": [-0.1, -0.2, -0.3], "open": [0.3, 0.3, -0.01]}
    assert {name: runs.better(np.array(gap)) for name, gap in cases.items()} == {name: name for name in cases}
    assert runs.better(np.array([0.1, 0.0])) == "open"


def test_learning_curves_are_the_losses_over_the_cost():
    progress = {"a": Progress(held_out(0.0), final(), 1.0), "b": Progress(held_out(0.5), final(), 3.0)}
    for domain, base in (("code", 2.0), (runs.ALL, 2.5)):
        drawn, data = figures.learning_curves({"money": progress}, domain)
        for same, model, seed, x, nats in zip(*data.values(), strict=True):
            step = x / {"a": 1, "b": 3}[model]
            assert same == "money" and step % 100 == 0
            assert nats == pytest.approx(base + 0.125 * seed + 100 / step + 0.5 * (model == "b"))
        assert len(data["x"]) == 2 * 5 * len(SEEDS)
        means = {line.get_label(): line for line in drawn.axes[0].lines if line.get_linewidth() > 1}
        assert means["b"].get_xdata().tolist() == [300, 600, 900, 1200, 1500]
        assert means["b"].get_ydata()[0] == pytest.approx(base + 0.125 + 1 + 0.5)
    assert f"same money: a {2.5 + 0.125:.2f}" in drawn.get_label()
    zoomed = figures.learning_curves({"money": progress}, zoom=True)[1]
    assert set(zip(*zoomed.values(), strict=True)) < set(zip(*data.values(), strict=True))
    assert min(zoomed["x"]) == 300  # after four tenths of the way
    with pytest.raises(ValueError, match="domain='poetry': wanted one of all domains, code, prose"):
        figures.learning_curves({"money": progress}, "poetry")


def test_shipped_steps_cost_what_the_axes_say():
    tokens = 8 * 128
    for same, models in twins_by_cost().items():
        for model, progress in models.items():
            config = runs.config_of(runs.RUNS[same][model])
            flop = 6 * config.num_parameters(active=True) * tokens  # the head is tied: nothing is only looked up
            wanted = {"tokens": tokens / 1e6, "compute": flop / 1e12, "time": runs.step_times()[model]}[same]
            assert progress.step_cost == pytest.approx(wanted)


def test_every_dense_run_is_compared_once():
    assert set(runs.TWINS) == {name for name in EXPERIMENTS if name.startswith("dense")}
    in_panels = {run: model for models in runs.RUNS.values() for model, run in models.items()}
    assert in_panels == {run: model for run, (model, _) in runs.TWINS.items()} | {"moe": runs.MIXTURE}


def test_runs_of_equal_compute_or_time_were_given_the_same():
    def cost(run):
        return training_flop(runs.config_of(run), EXPERIMENTS[run].steps)

    for run in runs.RUNS["compute"].values():
        assert cost(run) == pytest.approx(cost("moe"), rel=0.01)
    for model, run in runs.RUNS["time"].items():  # by the shipped measurement; a tenth is what machines may differ by
        share = runs.step_times()[model] * EXPERIMENTS[run].steps / EXPERIMENTS["moe"].steps
        assert share == pytest.approx(1, rel=0.1)


def test_the_controls_redraw():
    domain, zoom, picture = controls(figures.learning_curves, domain=[runs.ALL, "prose"], zoom=False).children
    shown = [picture.value]
    zoom.value = True
    shown.append(picture.value)
    domain.value = "prose"
    assert len({*shown, picture.value}) == 3 and "Held-out loss (prose)" in picture.value
