"""The router figures against versions written with plain loops, and the playground in all its corners."""

import itertools

import pytest
import torch

from minimoe.course import figures
from minimoe.course.figures import routers
from minimoe.course.figures.routers import PLAYGROUND_ROUTERS, draw_changes, draw_routes
from minimoe.course.shipped import real_text_model, route_text
from minimoe.course.widgets import controls
from minimoe.model import route_expert_choice, route_switch, route_topk
from minimoe.model.balance import apply_capacity
from tests.course.test_figures import fits_its_page

# Two texts of 16 tokens that differ in the last word, chosen among many because each router's habit shows in them.
TEXTS = ("if the bank is full, open the bank", "if the bank is full, open the letter")
ROUTERS = {
    "top-2": lambda logits: route_topk(logits, 2),
    "Switch with a capacity": lambda logits: apply_capacity(route_switch(logits), 2),
    "top-2 with a capacity": lambda logits: apply_capacity(route_topk(logits, 2), 4),
    "expert choice": lambda logits: route_expert_choice(logits, 4),
}
# The same with loops: the (token, expert) pairs that meet, of probabilities.
LOOPS = {
    "top-2": lambda p: {(t, e) for t, row in enumerate(p) for e in best(row, 2)},
    "Switch with a capacity": lambda p: queue([best(row, 1) for row in p], 2),
    "top-2 with a capacity": lambda p: queue([best(row, 2) for row in p], 4),
    "expert choice": lambda p: favourites(p, 4),
}


def logits_of(text):
    """Of layer 2, [16, 8]."""
    return route_text(text, real_text_model())[1][2].logits


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
        p = logits.softmax(-1)
        choices = [(p, 1), (p, 2), (p.T, 4)]
        for values, k in choices:
            ordered = values.sort(dim=1, descending=True).values
            assert (ordered[:, k - 1] - ordered[:, k]).min() > 1e-3 * ordered.max() / 2


def test_routes_against_loops():
    logits = logits_of(TEXTS[0])
    p = logits.double().softmax(-1).tolist()
    routes = {name: route(logits) for name, route in ROUTERS.items()}
    drawn, data = draw_routes(["a"] * 16, routes, {"Switch with a capacity": route_switch(logits)})
    kept = {}
    for name, loop in LOOPS.items():
        found = rows_of(data, name)
        kept[name] = [pair for pair, (_, fate) in found.items() if fate == "kept"]
        assert set(kept[name]) == loop(p)
        for (t, e), (weight, fate) in found.items():
            assert weight == pytest.approx(p[t][e] if fate == "kept" else 0, abs=1e-5)
    chosen = rows_of(data, "Switch with a capacity")
    assert set(chosen) == {(t, *best(row, 1)) for t, row in enumerate(p)}
    for line, place, length in (("column", 0, 16), ("row", 1, 8)):
        counts = {
            name: [[pair[place] for pair in pairs].count(i) for i in range(length)] for name, pairs in kept.items()
        }
        even = [name for name, count in counts.items() if len(set(count)) == 1]
        assert f"As many cells in every {line}: {'; '.join(even)}." in drawn.get_label()


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


def test_what_leaks_from_the_future():
    logits = [logits_of(text) for text in TEXTS]
    before, after = ({name: route(each) for name, route in ROUTERS.items()} for each in logits)
    old, new = (each.double().softmax(-1).tolist() for each in logits)
    earlier = next(t for t in range(16) if old[t] != pytest.approx(new[t], abs=1e-4))
    _, data = draw_changes(["a"] * 16, before, after, earlier)
    for name, rule in LOOPS.items():
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
        ({"router": "MoGE", "groups": 0}, "groups=0: wanted a divisor of experts=8 and k=2, as MoGE"),
        ({"router": "Switch"}, "k=2: wanted 1, as Switch sends every token to one expert"),
        ({"router": "MoGE", "groups": 3}, "groups=3: wanted a divisor of experts=8 and k=2"),
        ({"router": "MoGE", "groups": 4}, "groups=4: wanted a divisor of experts=8 and k=2"),
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
    assert picture.value.startswith("<p>groups=4: wanted a divisor")
