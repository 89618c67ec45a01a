"""The figures of notebook 03, against brute force, identities and logs made to be known."""

import csv
from statistics import mean

import numpy as np
import pytest
import torch

from minimoe.course.figures import device_simulator, hidden_by_averaging, load_curves, price_of_balance
from minimoe.course.figures.balance import SKEWS, place_experts
from minimoe.course.widgets import controls
from minimoe.data_files import data_path

# --- load curves -----------------------------------------------------------------------------------------------------


def log_of(*loads):
    return [{"load": load} for load in loads]


EVEN, COLLAPSED = [[25, 25, 25, 25]], [[50, 50, 0, 0]]
MANY, HARDLY = "more than one expert in ten", "hardly any expert"


def test_each_point_is_the_share_since_the_last_one():
    """70 steps make windows of 2; the load of a step is known, so the shares are."""
    log = log_of(*([[step, 10], [30, 10]] for step in range(70)))
    _, data = load_curves(log)
    rows = {(layer, step, e): share for layer, step, e, share in zip(*data.values(), strict=True)}
    assert sorted({step for _, step, _ in rows}) == list(range(2, 71, 2))
    for last in range(2, 71, 2):
        chosen = (last - 1) + (last - 2)  # of expert 0 in steps last - 2 and last - 1, counted from 0
        assert rows[0, last, 0] == pytest.approx(chosen / (chosen + 20))
        assert rows[1, last, 0] == pytest.approx(0.75)
        assert rows[0, last, 0] + rows[0, last, 1] == pytest.approx(1)


def test_what_is_left_over_makes_a_last_shorter_point():
    _, data = load_curves(log_of(*[EVEN] * 60, COLLAPSED))
    assert data["step"][-1] == 61
    assert data["share"][-4:] == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize(
    ("log", "finding"),
    [
        (log_of(*[EVEN] * 40), (HARDLY, "hardly any")),
        (log_of(*[COLLAPSED] * 40), (MANY, "more than one in five")),
        (log_of(*[[[100, 90, 80, 100, 90, 80, 5]]] * 40), (MANY, "some")),
        (log_of(*[COLLAPSED] * 20, *[EVEN] * 20), (MANY, "hardly any")),
        (log_of(*[EVEN] * 10, COLLAPSED, *[EVEN] * 29), (MANY, "hardly any")),  # one point is enough
        (log_of(*[EVEN] * 20, *[COLLAPSED] * 20), (HARDLY, "more than one in five")),
    ],
)
def test_the_alt_text_tells_who_starves_and_when(log, finding):
    drawn, _ = load_curves(log, "A run")
    first, last = finding
    wanted = (
        f"A run: at some point of the first half {first} gets less than a quarter of a fair share, at the end {last}."
    )
    assert wanted in drawn.get_label()
    assert f"over {len(log)} training steps" in drawn.get_label()


def test_a_log_of_one_step_can_be_drawn():
    _, data = load_curves(log_of(EVEN))
    assert data["share"] == [0.25] * 4


# --- averages --------------------------------------------------------------------------------------------------------


def test_rows_have_collapsed_and_their_average_is_balanced():
    _, data = hidden_by_averaging()
    for kind, experts in (("layer", 2), ("sequence", 4)):
        rows = [row for row in zip(*data.values(), strict=True) if row[0] == kind]
        table = np.array([share for *_, share, _ in rows]).reshape(experts + 1, experts)
        assert np.array_equal(table[:-1], np.eye(experts))
        assert np.array_equal(table[-1], np.full(experts, 1 / experts))
        likely = 1 / (1 + (experts - 1) * np.exp(-8))  # softmax of a logit of 8 among zeros
        losses = np.array([loss for *_, loss in rows]).reshape(experts + 1, experts)
        assert losses[:-1] == pytest.approx(experts * likely)
        assert losses[-1] == pytest.approx(1)


# --- what balance costs ----------------------------------------------------------------------------------------------


def shipped(run, table):
    with open(data_path("runs") / run / f"{table}.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_price_is_that_of_the_shipped_runs():
    _, data = price_of_balance()
    rows = {(by, seed): values for by, seed, *values in zip(*data.values(), strict=True)}
    for run, name in (("balance-none", "nothing"), ("moe", "the loss"), ("balance-bias", "the bias")):
        for seed in range(3):
            last = [row for row in shipped(run, "train") if row["seed"] == str(seed)][-10:]
            assert [row["step"] for row in last] == [str(step) for step in range(1510, 1601, 10)]
            uneven = mean(float(row[f"max_violation_{layer}"]) for row in last for layer in range(4))
            nats = mean(float(row["nats"]) for row in shipped(run, "final") if row["seed"] == str(seed))
            load = [[sum(float(row[f"load_{n}_{e}"]) for row in last) for e in range(8)] for n in range(4)]
            together = mean(max(layer) / mean(layer) - 1 for layer in load)
            starving = mean(share < mean(layer) / 4 for layer in load for share in layer)
            assert rows.pop((name, seed)) == pytest.approx([uneven, together, starving, nats])
    assert not rows


def test_both_remedies_balance_with_every_seed():
    _, data = price_of_balance()
    uneven = {by: [] for by in data["balanced_by"]}
    for by, value in zip(data["balanced_by"], data["max_violation"], strict=True):
        uneven[by].append(value)
    assert min(uneven["nothing"]) > 2 * max(uneven["the loss"] + uneven["the bias"])


def test_the_alt_text_of_the_price_says_that_the_lines_cross():
    """With one remedy one seed is ahead, with another another."""
    drawn, data = price_of_balance()
    nats = {by: [] for by in data["balanced_by"]}
    for by, value in zip(data["balanced_by"], data["nats"], strict=True):
        nats[by].append(value)
    assert np.argmin(nats["nothing"]) != np.argmin(nats["the loss"])
    assert "those of the held-out loss cross" in drawn.get_label()
    assert f"balanced by the bias, MaxVio is {min(data['max_violation'][6:]):.2f} to" in drawn.get_label()


# --- devices ---------------------------------------------------------------------------------------------------------


def brute_force(experts, k, devices, skew, tokens, seed=0):
    """Token by token, with lists: work of each device and mean probability kept, for both rules."""
    draw = torch.Generator().manual_seed(seed)
    rank = 1 + torch.randperm(experts, generator=draw)
    uniform = torch.rand(tokens, experts, generator=draw, dtype=torch.float64).numpy()
    # popularity * Exp(1)^-1 has the softmax that log popularity + Gumbel noise has
    odds = rank.double().numpy() ** -float(skew) / -np.log(uniform)
    size = experts // devices
    results = []
    for grouped in (False, True):
        work, kept = [0] * devices, 0.0
        for token in odds:
            best = sorted(range(experts), key=lambda e: -token[e])
            if grouped:
                chosen = [e for g in range(devices) for e in [e for e in best if e // size == g][: k // devices]]
            else:
                chosen = best[:k]
            for e in chosen:
                work[e // size] += 1
            kept += token[chosen].sum() / token.sum() / tokens
        results.append((work, kept))
    return results


@pytest.mark.parametrize(
    "setting", [(8, 2, 2, 0.0, 30), (12, 6, 3, 1.5, 25), (16, 4, 4, 1.0, 40), (6, 6, 2, 0.5, 9), (5, 2, 1, 1.0, 20)]
)
def test_placing_is_what_a_loop_over_tokens_counts(setting):
    for placed, (work, kept) in zip(place_experts(*setting), brute_force(*setting), strict=True):
        assert placed.load.sum(-1).tolist() == work
        assert placed.kept == pytest.approx(kept)
        assert placed.time == pytest.approx(max(work) / np.mean(work))


@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
def test_groups_take_perfect_time_and_never_keep_more(skew):
    topk, moge = place_experts(32, 8, 4, skew, 100)
    assert moge.time == 1 < topk.time
    assert moge.kept < topk.kept < 1


def test_on_one_device_both_rules_are_the_same():
    topk, moge = place_experts(8, 3, 1, 1.0, 50)
    assert torch.equal(topk.load, moge.load)
    assert topk.kept == pytest.approx(moge.kept)
    assert topk.time == moge.time == 1


@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
def test_first_choices_follow_zipf(skew):
    experts, tokens = 6, 20_000
    topk, _ = place_experts(experts, 1, 1, skew, tokens)
    popularity = np.arange(1, experts + 1) ** -skew
    assert (topk.load[0] / tokens).numpy() == pytest.approx(popularity / popularity.sum(), abs=0.012)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"experts": 10, "devices": 4}, "experts=10: wanted a multiple of devices=4"),
        ({"k": 6, "devices": 4}, "k=6: wanted a multiple of devices=4 up to experts=64"),
        ({"experts": 8, "k": 16}, "k=16: wanted a multiple of devices=8 up to experts=8"),
    ],
)
def test_what_cannot_be_placed_is_explained(setting, message):
    with pytest.raises(ValueError, match=message):
        device_simulator(**setting)


def test_the_simulator_draws_what_it_placed():
    _, data = device_simulator(experts=16, k=4, devices=4, skew=0.5, tokens=64)
    rows = list(zip(*data.values(), strict=True))
    for rule, (work, kept) in zip(("top-k", "MoGE"), brute_force(16, 4, 4, 0.5, 64), strict=True):
        drawn = {what: [(x, value) for r, w, x, value in rows if (r, w) == (rule, what)] for _, what, *_ in rows}
        assert [value for _, value in drawn["work of device"]] == pytest.approx([w / np.mean(work) for w in work])
        assert [x for x, _ in drawn["time at skew"]] == SKEWS
        assert dict(drawn["time at skew"])[0.5] == pytest.approx(max(work) / np.mean(work))
        assert dict(drawn["probability kept at skew"])[0.5] == pytest.approx(kept)


def test_the_alt_text_has_the_numbers():
    (topk, topk_kept), (_, moge_kept) = brute_force(16, 4, 4, 1.0, 64)
    alt = device_simulator(experts=16, k=4, devices=4, skew=1.0, tokens=64)[0].get_label()
    assert "64 tokens, 4 of 16 experts each, on 4 devices, skew 1." in alt
    assert f"needs {max(topk) / np.mean(topk):.2f} times as long as in perfect balance, with MoGE 1.00 times" in alt
    assert f"{topk_kept:.0%} of the router's probability with top-k and {moge_kept:.0%} with MoGE" in alt
    assert f"which is {1 - moge_kept / topk_kept:.0%} less" in alt


@pytest.mark.parametrize(
    "changed", [{"experts": 32}, {"k": 16}, {"devices": 4}, {"skew": 2.0}, {"tokens": 16}], ids=str
)
def test_every_setting_of_the_simulator_changes_its_alt_text(changed):
    assert device_simulator(**changed)[0].get_label() != device_simulator()[0].get_label()


def test_the_simulator_as_a_widget():
    *parts, picture = controls(device_simulator, devices=[4, 8, 16], skew=(0.0, 2.0, 0.25)).children
    devices, skew = (part for part in parts if part.description in ("devices", "skew"))
    before = picture.value
    skew.value = 2.0
    assert "skew 1." in before and "skew 2." in picture.value
    devices.value = 16
    assert picture.value.startswith("<p>k=8: wanted a multiple of devices=16")
