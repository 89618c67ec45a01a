"""The router figures against versions written with plain loops, and the playground in all its corners."""

import itertools

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from minimoe.course import figures
from minimoe.course.figures import routers
from minimoe.course.widgets import controls
from workshop.build import NOTEBOOKS, read

TEXTS = (routers.TEXT, routers.EDITED)


def rows_of(data: dict, router: str) -> dict[tuple[int, int], tuple]:
    """(token, expert) -> the remaining columns, for one router."""
    columns = list(zip(*data.values(), strict=True))
    return {(row[1], row[2]): row[3:] for row in columns if row[0] == router}


def probabilities(text: str) -> list[list[float]]:
    return figures.catch_logits(text).logits.double().softmax(-1).tolist()


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


def test_the_logits_are_those_of_the_shipped_model():
    caught = figures.catch_logits(routers.TEXT, layer=1)
    model, tokenizer = figures.shipped_model()
    assert "".join(caught.tokens) == routers.TEXT
    seen = []
    hook = model.model.layers[1].mlp.register_forward_hook(
        lambda layer, inputs, _: seen.append(layer.gate.weight @ inputs[0][0].T)
    )
    with torch.no_grad():
        model(torch.tensor([tokenizer.encode(routers.TEXT).ids]))
    hook.remove()
    torch.testing.assert_close(caught.logits, seen[0].T)


@pytest.mark.parametrize("text", TEXTS)
def test_no_choice_is_a_near_tie(text):
    """Another CPU must not send a token elsewhere."""
    logits = figures.catch_logits(text).logits
    p, scores = logits.softmax(-1), logits.sigmoid()
    biased = scores + routers._settled_bias(logits, 2, updates=1, rate=0.1)
    choices = [(p, 1), (p, 2), (p[:, :4], 1), (p[:, 4:], 1), (p.T, 4), (scores, 2), (biased, 2)]
    for values, k in choices:
        ordered = values.sort(dim=1, descending=True).values
        assert (ordered[:, k - 1] - ordered[:, k]).min() > 1e-3 * ordered.max() / 2


def test_seven_routers_against_loops():
    _, data = figures.seven_routers()
    p = probabilities(routers.TEXT)
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

    found = rows_of(data, "expert choice")
    assert set(found) == favourites(p, 2 * tokens // experts)

    half = experts // 2
    assert set(rows_of(data, "MoGE")) == {
        (t, e) for t, row in enumerate(p) for e in (best(row[:half], 1)[0], half + best(row[half:], 1)[0])
    }

    found = rows_of(data, "hash")
    ids = figures.catch_logits(routers.TEXT).input_ids.tolist()
    expert = dict(found)
    for (t, e), (u, f) in itertools.combinations(expert, 2):
        assert e == f or ids[t] != ids[u]
    assert len(found) == tokens


def test_the_alt_text_says_which_grids_are_even():
    drawn, data = figures.seven_routers()
    kept = {name: [key for key, row in rows_of(data, name).items() if row[1] == "kept"] for name in data["router"]}
    for line, place, length in (("column", 0, 16), ("row", 1, 8)):
        counts = {
            name: [[pair[place] for pair in pairs].count(i) for i in range(length)] for name, pairs in kept.items()
        }
        even = [name for name, count in counts.items() if len(set(count)) == 1]
        assert f"As many cells in every {line}: {'; '.join(even)}." in drawn.get_label()


def test_the_bias_chooses_and_does_not_weigh():
    _, data = figures.seven_routers()
    logits = figures.catch_logits(routers.TEXT).logits.double()
    scores = logits.sigmoid().tolist()
    load = [sum(e in best(row, 2) for row in scores) for e in range(len(scores[0]))]
    mean = sum(load) / len(load)
    step = [0.1 * ((mean > n) - (mean < n)) for n in load]
    bias = [value - sum(step) / len(step) for value in step]
    found = rows_of(data, "sigmoid + bias")
    for t, row in enumerate(scores):
        chosen = best([score + b for score, b in zip(row, bias, strict=True)], 2)
        for e in chosen:
            assert found[t, e][0] == pytest.approx(row[e] / sum(row[x] for x in chosen), abs=1e-5)
    assert len(found) == 2 * len(scores)


def test_what_leaks_from_the_future():
    _, data = figures.leak_from_the_future()
    old, new = (probabilities(text) for text in TEXTS)
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


def test_the_notebook_shows_what_the_register_draws():
    shown = str(read(NOTEBOOKS / "02_routers.ipynb"))
    for draw in (figures.seven_routers, figures.leak_from_the_future, figures.playground):
        assert draw()[0].get_label() in shown


def test_darker_is_more_in_greyscale_too():
    shades = [routers._SHADES(weight)[:3] for weight in torch.linspace(0, 1, 11).tolist()]
    luminance = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in shades]
    assert all(a - b > 0.03 for a, b in itertools.pairwise(luminance))


# --- the playground --------------------------------------------------------------------------------------------------

SETTINGS = {
    "softmax top-k": {},
    "top-k, then softmax": {"k": 3},
    "Switch": {"k": 1, "capacity_factor": 0.5},
    "expert choice": {"capacity_factor": 0.75},
    "sigmoid + bias": {"experts": 16, "k": 4},
    "MoGE": {"experts": 12, "k": 6, "groups": 3},
    "hash": {"experts": 2, "capacity_factor": 3.0},
}


def test_the_settings_below_cover_every_router():
    assert tuple(SETTINGS) == figures.PLAYGROUND_ROUTERS


@pytest.mark.parametrize("router", SETTINGS)
def test_the_playground_keeps_its_books(router):
    settings = {"experts": 8, "k": 2, "capacity_factor": 1.25} | SETTINGS[router]
    drawn, data = figures.playground(router, **settings)
    tokens, experts, k = 24, settings["experts"], settings["k"]
    limit = int(min(tokens, tokens * k * settings["capacity_factor"] / experts))
    kept = [fate == "kept" for fate in data["fate"]]
    load = [sum(e == expert and ok for e, ok in zip(data["expert"], kept, strict=True)) for expert in range(experts)]
    slots = [(t, e) for t, e in zip(data["token"], data["expert"], strict=True)]
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
        groups = [sum(asked[g : g + 4]) for g in (0, 4, 8)]
        assert len(set(groups)) == 1


@pytest.mark.parametrize("router", SETTINGS)
def test_nothing_is_clipped(router):
    for settings in (SETTINGS[router], {"experts": 16, "k": 1, "groups": 1}):
        drawn, _ = figures.playground(router, **settings)
        FigureCanvasAgg(drawn).draw()
        area, (width, height) = drawn.get_tightbbox(), drawn.get_size_inches()
        assert area.x0 > -0.01 and area.y0 > -0.01 and area.x1 < width + 0.01 and area.y1 < height + 0.01


IMPOSSIBLE = [
    ({"router": "roulette"}, "router='roulette': wanted one of softmax top-k, "),
    ({"experts": 1, "k": 1}, "experts=1: wanted 2 to 16"),
    ({"experts": 17}, "experts=17: wanted 2 to 16"),
    ({"experts": 4, "k": 5}, "k=5: wanted 1 to 4"),
    ({"temperature": 0.0}, "temperature=0.0: wanted more than 0"),
    ({"router": "MoGE", "groups": 0}, "groups=0: wanted at least 1"),
    ({"router": "Switch"}, "k=2: Switch sends every token to one expert, wanted k=1"),
    ({"router": "MoGE", "groups": 3}, "groups=3: MoGE .* wanted a divisor of both experts=8 and k=2"),
    ({"router": "MoGE", "groups": 4}, "groups=4: MoGE .* wanted a divisor of both experts=8 and k=2"),
]


@pytest.mark.parametrize(("settings", "message"), IMPOSSIBLE)
def test_what_a_router_cannot_do_is_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        figures.playground(**settings)


def test_another_expert_leaves_the_others_logits_alone():
    few, many = routers._made_up(5), routers._made_up(12)
    torch.testing.assert_close(few[0], many[0][:, :5])
    assert torch.equal(few[1], many[1])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_playground_as_the_notebook_shows_it_has_no_near_tie(temperature):
    logits, _ = routers._made_up(8)
    p = (logits / temperature).softmax(-1)
    for values, k in ((p, 2), (p.T, 7)):
        ordered = values.sort(dim=1, descending=True).values
        assert (ordered[:, k - 1] - ordered[:, k]).min() > 1e-4


def test_the_bias_that_settles_is_better_balanced():
    logits, _ = routers._made_up(8)
    load = [
        torch.bincount(routers._route_biased(logits, 2, bias).indices.flatten(), minlength=8)
        for bias in (torch.zeros(8), routers._settled_bias(logits, 2))
    ]
    assert load[1].max() < load[0].max() - 3


def test_each_control_changes_the_picture():
    panel = controls(
        figures.playground,
        router=list(figures.PLAYGROUND_ROUTERS),
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
    assert (
        'alt="24 tokens through the router MoGE (12 experts, k 6, temperature 2, capacity factor 2, 3 groups)'
        in picture.value
    )
    panel[5].value = 4
    assert picture.value.startswith("<p>groups=4: MoGE")
