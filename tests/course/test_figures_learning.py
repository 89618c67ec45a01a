"""The figures on learning: runs with a known truth give back that truth; the costs are those of the experiments."""

import json

import numpy as np
import pytest

from minimoe.course import runs
from minimoe.course.figures import learning
from minimoe.course.style import render
from minimoe.course.widgets import controls
from minimoe.training.presets import EXPERIMENTS
from workshop import experiments

# Nats per token above the mixture, by run, and by domain where it depends on it.
TRUTH = {
    "moe": 0.0,
    "dense-active": 0.25,
    "dense-active-clock": 0.125,
    "dense-total": -0.5,
    "dense-total-compute": 0.75,
    "dense-total-clock": {"code": 0.25, "prose": -0.25},
}
BASE = {"code": 2.0, "prose": 3.0}
SEEDS = (0, 1, 2)
STEP_TIMES = {"mixture": 1.0, "dense, equal active": 0.75, "dense, equal total": 1.5}


def truth(run, domain):
    return TRUTH[run][domain] if isinstance(TRUTH[run], dict) else TRUTH[run]


def loss(run, seed, domain, step):
    """Falls with the step; a seed moves the loss of every run alike."""
    return BASE[domain] + truth(run, domain) + 0.125 * seed + 100 / step


@pytest.fixture
def known(tmp_path, monkeypatch):
    """Tables of runs in which the losses are `loss`, read in place of the shipped ones."""
    monkeypatch.setattr(runs, "data_path", lambda name: tmp_path / name)
    for run in TRUTH:
        folder = tmp_path / "runs" / run
        folder.mkdir(parents=True)
        last, where = EXPERIMENTS[run].steps, [(seed, domain) for seed in SEEDS for domain in BASE]
        held_out = [
            {"seed": seed, "step": step, "domain": domain, "nats": loss(run, seed, domain, step)}
            for seed, domain in where
            for step in range(100, last + 1, 100)
        ]
        final = [{"seed": s, "domain": d, "nats": BASE[d] + truth(run, d) + 0.125 * s} for s, d in where]
        for table, rows in (("held_out", held_out), ("final", final)):
            (folder / f"{table}.csv").write_text(experiments.to_csv(rows), encoding="utf-8")
    seconds = {name: [share] for name, share in STEP_TIMES.items()}
    (tmp_path / "runs" / "step_time.json").write_text(
        json.dumps({"results": [{"threads": 1, "seconds": seconds}]}), encoding="utf-8"
    )


def test_every_dense_run_is_compared_once():
    assert set(learning.TWINS) == {name for name in EXPERIMENTS if name.startswith("dense")}
    in_panels = {run: model for models in learning.RUNS.values() for model, run in models.items()}
    assert in_panels == {run: model for run, (model, _) in learning.TWINS.items()} | {"moe": learning.MIXTURE}


def test_gaps_are_the_true_ones_seed_by_seed(known):
    _, data = learning.final_gaps()
    found = {(run, seed): gap for run, seed, gap in zip(*data.values(), strict=True)}
    wanted = {(run, seed): np.mean([truth(run, domain) for domain in BASE]) for run in learning.TWINS for seed in SEEDS}
    assert found == pytest.approx(wanted)


def test_gaps_by_domain_are_the_true_ones_with_who_is_better(known):
    _, data = learning.gaps_by_domain()
    for run, domain, gap, better in zip(*data.values(), strict=True):
        assert gap == pytest.approx(truth(run, domain))
        assert better == ("mixture" if truth(run, domain) > 0 else "twin")
    assert len(data["run"]) == len(learning.TWINS) * len(BASE)


@pytest.mark.parametrize(
    "gap, wanted",
    [([0.1, 0.2, 0.3], "mixture"), ([-0.1, -0.2, -0.3], "twin"), ([0.3, 0.3, -0.01], "open"), ([0.1, 0.0], "open")],
)
def test_who_is_better_only_where_all_seeds_agree(gap, wanted):
    assert learning.better(np.array(gap)) == wanted


@pytest.mark.parametrize("domain", ["code", learning.ALL])
def test_curves_are_the_losses_over_the_right_axis(known, domain):
    _, data = learning.learning_curves(domain)
    tokens = 8 * 128
    for same, model, seed, x, nats in zip(*data.values(), strict=True):
        run = learning.RUNS[same][model]
        multiplied = learning.config_of(run).num_parameters(active=True)  # the head is tied: nothing is only looked up
        step_cost = {"tokens": tokens / 1e6, "compute": 6 * multiplied * tokens / 1e12, "time": STEP_TIMES[model]}
        step = round(x / step_cost[same])
        assert step % 100 == 0 and x == pytest.approx(step * step_cost[same])
        domains = list(BASE) if domain == learning.ALL else [domain]
        assert nats == pytest.approx(np.mean([loss(run, seed, d, step) for d in domains]), abs=1e-4)
    points = sum(EXPERIMENTS[run].steps // 100 for models in learning.RUNS.values() for run in models.values())
    assert len(data["x"]) == points * len(SEEDS)


def test_zoom_leaves_out_the_first_part(known):
    whole, part = learning.learning_curves()[1], learning.learning_curves(zoom=True)[1]
    rows = set(zip(*part.values(), strict=True))
    assert rows < set(zip(*whole.values(), strict=True))
    assert max(part["nats"]) < max(whole["nats"])


def test_an_unknown_domain_is_refused(known):
    with pytest.raises(ValueError, match="domain='poetry': wanted one of all domains, code, prose"):
        learning.learning_curves("poetry")


def test_alt_texts_give_the_finding(known):
    assert "dense, equal total same compute +0.750, +0.750 to +0.750" in learning.final_gaps()[0].get_label()
    assert "same tokens: mixture 2.62, dense, equal active 2.88" in learning.learning_curves()[0].get_label()
    assert "mixture 7, twin 3, open 0" in learning.gaps_by_domain()[0].get_label()


@pytest.mark.parametrize("draw", [learning.learning_curves, learning.final_gaps, learning.gaps_by_domain])
def test_figures_render(known, draw):
    assert render(draw()[0], "png").startswith(b"\x89PNG")


def cost(run):
    return learning.training_flop(learning.config_of(run), EXPERIMENTS[run].steps)


@pytest.mark.parametrize("run", learning.RUNS["compute"].values())
def test_runs_of_equal_compute_cost_the_same(run):
    assert cost(run) == pytest.approx(cost("moe"), rel=0.01)


@pytest.mark.parametrize("model, run", learning.RUNS["time"].items())
def test_runs_of_equal_time_take_the_same(model, run):
    """By the shipped measurement; a tenth is what machines may differ by."""
    share = runs.step_times()[model] * EXPERIMENTS[run].steps / EXPERIMENTS["moe"].steps
    assert share == pytest.approx(1, rel=0.1)


def test_the_controls_redraw(known):
    domain, zoom, picture = controls(learning.learning_curves, domain=[learning.ALL, *BASE], zoom=False).children
    pictures = [picture.value]
    zoom.value = True
    pictures.append(picture.value)
    domain.value = "prose"
    pictures.append(picture.value)
    assert len(set(pictures)) == 3 and all(picture.startswith("<img") for picture in pictures)
    assert "Held-out loss (prose)" in pictures[-1]
