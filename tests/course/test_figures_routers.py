"""The router figures against versions written with plain loops, and the playground in all its corners."""

import itertools

import pytest
import torch

from minimoe.course import figures
from minimoe.course.figures import routers
from minimoe.course.figures.routers import PLAYGROUND_ROUTERS, draw_changes, draw_routes
from minimoe.course.shipped import real_text_model, route_text
from minimoe.course.widgets import controls
from minimoe.model import route_switch, route_topk
from minimoe.model.balance import apply_capacity
from tests.course.test_figures import fits_its_page, small_model

TEXTS = (routers.TEXT, routers.EDITED)


def logits_of(text):
    return route_text(text, real_text_model()).routers[2].logits


def rows_of(data: dict, router: str) -> dict[tuple[int, int], tuple]:
    """(token, expert) -> the remaining columns, for one router."""
    return {(row[1], row[2]): row[3:] for row in zip(*data.values(), strict=True) if row[0] == router}


def best(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda e: -row[e])[:k]


def queue(choices: list[list[int]], capacity: int) -> set[tuple[int, int]]:
    """The (token, expert) pairs that find a seat: all first choices before any second, earlier tokens first."""
    served, seated = [], set()
    for rank in range(len(choices[0])):
        for token, wanted in enumerate(choices):
            if served.count(wanted[rank]) < capacity:
                seated.add((token, wanted[rank]))
            served.append(wanted[rank])
    return seated


def favourites(p: list[list[float]], capacity: int) -> set[tuple[int, int]]:
    """The (token, expert) pairs when each expert takes its best tokens."""
    return {(t, e) for e in range(len(p[0])) for t in best([row[e] for row in p], capacity)}


def test_no_choice_is_a_near_tie():
    """Another CPU must not send a token elsewhere."""
    for text in TEXTS:
        logits = logits_of(text)
        p, scores = logits.softmax(-1), logits.sigmoid()
        biased = scores + routers._settled_bias(logits, 2, updates=1, rate=0.1)
        choices = [(p, 1), (p, 2), (p[:, :4], 1), (p[:, 4:], 1), (p.T, 4), (scores, 2), (biased, 2)]
        for values, k in choices:
            ordered = values.sort(dim=1, descending=True).values
            assert (ordered[:, k - 1] - ordered[:, k]).min() > 1e-3 * ordered.max() / 2


def test_seven_routers_against_loops():
    drawn, data = figures.seven_routers()
    p = logits_of(routers.TEXT).double().softmax(-1).tolist()
    tokens, experts = len(p), len(p[0])
    top2 = {(t, e) for t, row in enumerate(p) for e in best(row, 2)}

    found = rows_of(data, "softmax top-k")
    assert set(found) == top2
    assert all(weight == pytest.approx(p[t][e], abs=1e-5) for (t, e), (weight, _) in found.items())

    found = rows_of(data, "top-k, then softmax")
    assert set(found) == top2
    for (t, e), (weight, _) in found.items():
        assert weight == pytest.approx(p[t][e] / sum(p[t][x] for x in best(p[t], 2)), abs=1e-5)

    found = rows_of(data, "Switch")
    first = [best(row, 1) for row in p]
    seated = queue(first, tokens // experts)
    assert set(found) == {(t, e) for t, (e,) in enumerate(first)}
    assert {pair for pair, (_, fate) in found.items() if fate == "kept"} == seated
    for (t, e), (weight, _) in found.items():
        assert weight == pytest.approx(p[t][e] if (t, e) in seated else 0, abs=1e-5)

    assert set(rows_of(data, "expert choice")) == favourites(p, 2 * tokens // experts)

    half = experts // 2
    assert set(rows_of(data, "MoGE")) == {
        (t, e) for t, row in enumerate(p) for e in (best(row[:half], 1)[0], half + best(row[half:], 1)[0])
    }

    ids = route_text(routers.TEXT, real_text_model()).input_ids.tolist()
    found = rows_of(data, "hash")
    assert len(found) == tokens
    for (t, e), (u, f) in itertools.combinations(found, 2):
        assert e == f or ids[t] != ids[u]

    kept = {name: [key for key, row in rows_of(data, name).items() if row[1] == "kept"] for name in data["router"]}
    for line, place, length in (("column", 0, tokens), ("row", 1, experts)):
        counts = {
            name: [[pair[place] for pair in pairs].count(i) for i in range(length)] for name, pairs in kept.items()
        }
        even = [name for name, count in counts.items() if len(set(count)) == 1]
        assert f"As many cells in every {line}: {'; '.join(even)}." in drawn.get_label()


def test_the_bias_chooses_and_does_not_weigh():
    scores = logits_of(routers.TEXT).double().sigmoid().tolist()
    load = [sum(e in best(row, 2) for row in scores) for e in range(len(scores[0]))]
    mean = sum(load) / len(load)
    step = [0.1 * ((mean > n) - (mean < n)) for n in load]
    bias = [value - sum(step) / len(step) for value in step]
    found = rows_of(figures.seven_routers()[1], "sigmoid + bias")
    for t, row in enumerate(scores):
        chosen = best([score + b for score, b in zip(row, bias, strict=True)], 2)
        for e in chosen:
            assert found[t, e][0] == pytest.approx(row[e] / sum(row[x] for x in chosen), abs=1e-5)
    assert len(found) == 2 * len(scores)


def test_a_grid_has_tokens_across_and_experts_down():
    """Three tokens, two experts that accept one token each: the second token finds expert 0 full."""
    logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    chosen = route_switch(logits)
    drawn, data = draw_routes(["a", "b", "c"], {"one seat": apply_capacity(chosen, 1)}, asked={"one seat": chosen})
    p = logits.softmax(-1)
    assert data["token"] == [0, 1, 2] and data["expert"] == [0, 0, 1]
    assert data["fate"] == ["kept", "dropped", "kept"]
    assert data["weight"] == pytest.approx([p[0, 0].item(), 0, p[2, 1].item()])
    axes = drawn.axes[0]
    shades = axes.collections[0].get_array().filled(torch.nan)
    assert shades.shape == (2, 3) and shades[0, 0] == pytest.approx(p[0, 0].item())
    (cross,) = (line for line in axes.lines if line.get_marker() == "x")
    assert (cross.get_xdata().tolist(), cross.get_ydata().tolist()) == ([1.5], [0.5])
    (hatched,) = axes.patches  # the token that meets nobody
    assert (hatched.get_x(), hatched.get_height()) == (1, 2)
    assert axes.get_ylim() == (2, 0) and axes.get_ylabel() == "expert"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert "slots dropped 1, tokens with no expert 1" in drawn.get_label()


def test_a_model_of_ones_own_is_drawn_in_one_line():
    model = small_model()
    _, data = figures.seven_routers("a b c d", layer=1, model=model)
    logits = route_text("a b c d", model).routers[1].logits
    assert set(rows_of(data, "softmax top-k")) == {
        (t, e) for t, row in enumerate(logits.tolist()) for e in best(row, 2)
    }
    _, data = figures.leak_from_the_future("a b c", "a b d", layer=1, model=model)
    assert set(data["router"]) == {"top-2", "Switch with a capacity", "top-2 with a capacity", "expert choice"}
    with pytest.raises(ValueError, match="layer=2: wanted 0 to 1"):
        figures.seven_routers("a b", model=model)


def test_what_leaks_from_the_future():
    _, data = figures.leak_from_the_future()
    old, new = (logits_of(text).double().softmax(-1).tolist() for text in TEXTS)
    tokens, experts = len(old), len(old[0])
    earlier = next(t for t in range(tokens) if old[t] != pytest.approx(new[t], abs=1e-4))
    rules = {
        "top-2": lambda p: {(t, e) for t, row in enumerate(p) for e in best(row, 2)},
        "Switch with a capacity": lambda p: queue([best(row, 1) for row in p], tokens // experts),
        "top-2 with a capacity": lambda p: queue([best(row, 2) for row in p], 2 * tokens // experts),
        "expert choice": lambda p: favourites(p, 2 * tokens // experts),
    }
    for name, rule in rules.items():
        found = rows_of(data, name)
        assert {pair for pair, (before, _) in found.items() if before} == rule(old)
        assert {pair for pair, (_, after) in found.items() if after} == rule(new)
        moved = any((before > 0) != (after > 0) for (t, _), (before, after) in found.items() if t < earlier)
        assert moved == (name in ("top-2 with a capacity", "expert choice"))


def test_changes_are_marked_where_they_are():
    """Of two tokens before the edit, the second goes from expert 1 to expert 0."""
    before, after = (
        route_topk(torch.tensor([[2.0, 0.0], second, [0.0, 2.0]]), 1) for second in ([0.0, 1.0], [1.0, 0.0])
    )
    drawn, data = draw_changes(["a", "b", "c"], {"top-1": before}, {"top-1": after}, edited=2)
    assert (data["token"], data["expert"]) == ([0, 1, 1, 2], [0, 0, 1, 1])
    assert [bool(weight) for weight in data["before"]] == [True, False, True, True]
    assert [bool(weight) for weight in data["after"]] == [True, True, False, True]
    axes = drawn.axes[0]
    marks = {line.get_marker(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines}
    assert marks["_"] == ([1.5], [1.5]) and marks["+"] == ([1.5], [0.5])
    assert axes.get_title("left") == "top-1: 1 rerouted"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "?"]


def test_darker_is_more_in_greyscale_too():
    shades = [routers._SHADES(weight)[:3] for weight in torch.linspace(0, 1, 11).tolist()]
    luminance = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in shades]
    assert all(a - b > 0.03 for a, b in itertools.pairwise(luminance))


SETTINGS = {
    "softmax top-k": {},
    "top-k, then softmax": {"k": 3},
    "Switch": {"k": 1, "capacity_factor": 0.5},
    "expert choice": {"capacity_factor": 0.75},
    "sigmoid + bias": {"experts": 16, "k": 4},
    "MoGE": {"experts": 12, "k": 6, "groups": 3},
    "hash": {"experts": 2, "capacity_factor": 3.0},
}


@pytest.mark.parametrize("router", PLAYGROUND_ROUTERS)
def test_the_playground_keeps_its_books(router):
    settings = {"experts": 8, "k": 2, "capacity_factor": 1.25} | SETTINGS[router]
    drawn, data = figures.playground(router, **settings)
    tokens, experts, k = 24, settings["experts"], settings["k"]
    limit = int(min(tokens, tokens * k * settings["capacity_factor"] / experts))
    kept = [fate == "kept" for fate in data["fate"]]
    load = [sum(e == expert and ok for e, ok in zip(data["expert"], kept, strict=True)) for expert in range(experts)]
    slots = list(zip(data["token"], data["expert"], strict=True))
    assert len(set(slots)) == len(slots)
    assert all((weight > 0) == ok for weight, ok in zip(data["weight"], kept, strict=True))
    if router == "expert choice":
        assert load == [limit] * experts
    else:
        assert max(load) <= limit
        assert [data["token"].count(t) for t in range(tokens)] == [k] * tokens
    without = tokens - len({t for (t, _), ok in zip(slots, kept, strict=True) if ok})
    asked = [data["expert"].count(expert) for expert in range(experts)]
    assert f"{kept.count(False)} of {len(slots)} slots dropped" in drawn.get_label()
    assert f"{without} of {tokens} tokens without expert" in drawn.get_label()
    assert f"MaxVio {max(asked) * experts / sum(asked) - 1:.2f}" in drawn.get_label()
    if router == "MoGE":
        assert len({sum(asked[g : g + 4]) for g in (0, 4, 8)}) == 1
    wanted, filled = drawn.axes[1].patches[:experts], drawn.axes[1].patches[experts:]
    assert [bar.get_width() for bar in wanted] == asked and [bar.get_width() for bar in filled] == load
    assert fits_its_page(drawn) and fits_its_page(figures.playground(router, experts=16, k=1, groups=1)[0])


def test_what_a_router_cannot_do_is_explained():
    for settings, message in (
        ({"router": "roulette"}, "router='roulette': wanted one of softmax top-k, "),
        ({"experts": 1, "k": 1}, "experts=1: wanted 2 to 16"),
        ({"experts": 17}, "experts=17: wanted 2 to 16"),
        ({"experts": 4, "k": 5}, "k=5: wanted 1 to 4"),
        ({"temperature": 0.0}, "temperature=0.0: wanted more than 0"),
        ({"router": "MoGE", "groups": 0}, "groups=0: MoGE"),
        ({"router": "Switch"}, "k=2: Switch sends every token to one expert, wanted k=1"),
        ({"router": "MoGE", "groups": 3}, "groups=3: MoGE .* wanted a divisor of both experts=8 and k=2"),
        ({"router": "MoGE", "groups": 4}, "groups=4: MoGE .* wanted a divisor of both experts=8 and k=2"),
    ):
        with pytest.raises(ValueError, match=message):
            figures.playground(**settings)


def test_made_up_logits_stay_as_they_are_and_have_no_near_tie():
    few, many = routers._made_up_logits(5), routers._made_up_logits(12)
    torch.testing.assert_close(few[0], many[0][:, :5])
    assert torch.equal(few[1], many[1])
    for temperature in (1.0, 4.0):  # as the notebook shows them
        p = (routers._made_up_logits(8)[0] / temperature).softmax(-1)
        for values, k in ((p, 2), (p.T, 7)):
            ordered = values.sort(dim=1, descending=True).values
            assert (ordered[:, k - 1] - ordered[:, k]).min() > 1e-4


def test_the_bias_that_settles_is_better_balanced():
    logits, _ = routers._made_up_logits(8)
    without, settled = (
        torch.bincount(routers._route_biased(logits, 2, bias).indices.flatten(), minlength=8).max()
        for bias in (torch.zeros(8), routers._settled_bias(logits, 2))
    )
    assert settled < without - 3


def test_each_control_changes_the_picture():
    panel = controls(
        figures.playground,
        router=list(PLAYGROUND_ROUTERS),
        experts=(2, 16),
        k=(1, 8),
        temperature=(0.25, 4.0, 0.25),
        capacity_factor=(0.25, 3.0, 0.25),
        groups=(1, 8),
    ).children
    picture = panel[-1]
    for part, value in zip(panel, ("MoGE", 12, 6, 2.0, 2.0, 3), strict=False):
        before = picture.value
        part.value = value
        assert picture.value != before
    assert "router MoGE (12 experts, k 6, temperature 2, capacity factor 2, 3 groups)" in picture.value
    panel[5].value = 4
    assert picture.value.startswith("<p>groups=4: MoGE")
