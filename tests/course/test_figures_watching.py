"""Watching a router: the figures' numbers against counts by hand, and against routers whose truth is known."""

import copy
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from minimoe.course import figures
from minimoe.course.figures import watching
from minimoe.course.style import render
from minimoe.course.widgets import controls
from minimoe.training.planted import DOMAINS, LANGUAGES, TOPICS, parallel


@pytest.fixture(scope="module")
def trace():
    return figures.planted_trace()


@pytest.fixture
def rerouted(trace, monkeypatch):
    """Put another router's first choices [T] in all layers of the trace."""

    def put(choices) -> None:
        other = copy.copy(trace)
        other.indices = trace.indices.copy()
        other.indices[:, :, 0] = choices
        monkeypatch.setattr(watching, "planted_trace", lambda: other)

    return put


def texts_of(trace, document):
    return trace.token_ids[trace.documents == document].tolist()


def test_layers_show_the_first_choice_of_each():
    text = "for x in 12:"
    _, data = figures.token_layers(text)
    model, tokenizer = figures.shipped_model()
    with torch.no_grad():
        routers = model(torch.tensor([tokenizer.encode(text).ids]), output_router_logits=True).router_outputs
    assert data["expert"] == [expert for router in routers for expert in router.logits.argmax(-1).tolist()]
    assert "".join(data["token"]) == text * len(routers)


def test_no_counted_choice_is_a_near_tie(trace):
    """Another CPU must not move a token to another expert; its rounding is of the order of 1e-7."""
    assert (trace.weights[..., 0] - trace.weights[..., 1]).min() > 2e-6
    assert min(figures.token_layers()[1]["margin"]) > 1e-4
    weights = figures.token_path()[1]["weight"]
    assert min(a - b for a, b in zip(weights[::2], weights[1::2], strict=True)) > 1e-3


@pytest.mark.parametrize("texts", [("a.",), ("a.", "b = 1", "$x$")])
def test_path_holds_both_experts_of_the_last_token(texts):
    drawn, data = figures.token_path(texts)
    assert render(drawn, "png").startswith(b"\x89PNG")
    assert data["layer"] == [layer for _ in texts for layer in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert [a + b for a, b in zip(data["weight"][::2], data["weight"][1::2], strict=True)] == pytest.approx(
        [1.0] * 4 * len(texts)
    )
    chosen = figures.route_text(texts[-1], layer=3)
    assert data["expert"][-2:] == chosen.indices[-1].tolist()


def test_trace_is_of_the_planted_documents_in_order(trace):
    _, tokenizer = figures.shipped_model()
    assert trace.documents[-1] + 1 == len(DOMAINS) * watching.DOCUMENTS
    for topic in TOPICS:
        for language, text in parallel(topic, 7, seed=watching.SEED).items():
            number = DOMAINS.index(f"{language}/{topic}") * watching.DOCUMENTS + 7
            assert texts_of(trace, number) == tokenizer.encode(text).ids
            assert {trace.domain_names[d] for d in trace.domains[trace.documents == number]} == {language}


def test_favourites_are_counted_right_and_none_is_better(trace):
    _, tokenizer = figures.shipped_model()
    _, data = figures.favourite_tokens(layer=2, min_count=200)
    pairs = Counter(zip(trace.token_ids.tolist(), trace.indices[2, :, 0].tolist(), strict=True))
    counts = Counter(trace.token_ids.tolist())
    loads = Counter(trace.indices[2, :, 0].tolist())
    for expert in range(8):
        ranked = sorted(
            ((pairs[token, expert] / n, n) for token, n in counts.items() if n >= 200),
            key=lambda row: (-row[0], -row[1]),
        )
        shown = [place for place, at in enumerate(data["expert"]) if at == expert]
        load = loads[expert] / len(trace)
        assert len(shown) == sum(share > load for share, _ in ranked[:5])
        assert [data["load"][place] for place in shown] == pytest.approx([load] * len(shown))
        assert [data["count"][place] for place in shown] == [n for _, n in ranked[: len(shown)]]
        assert [data["share"][place] for place in shown] == pytest.approx([share for share, _ in ranked[: len(shown)]])
        for place in shown:
            (token,) = (t for t in counts if tokenizer.decode([t]) == data["token"][place] and counts[t] >= 200)
            assert data["share"][place] == pytest.approx(pairs[token, expert] / counts[token])


def test_no_favourite_has_less_than_the_load(trace, rerouted):
    """Expert 1 gets the commonest token, expert 0 all others, the rest none: they have no favourites to show."""
    _, data = figures.favourite_tokens()
    assert all(share > load for share, load in zip(data["share"], data["load"], strict=True))
    rerouted(np.where(trace.token_ids == np.bincount(trace.token_ids).argmax(), 1, 0))
    drawn, data = figures.favourite_tokens()
    assert Counter(data["expert"]) == {0: 5, 1: 1}
    assert "; 7 (0%) none" in drawn.get_label()


@pytest.mark.parametrize(
    ("arguments", "message"), [({"layer": 4}, "layer=4: wanted 0 to 3"), ({"min_count": 10**6}, "min_count=1000000")]
)
def test_favourites_that_cannot_be_drawn_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        figures.favourite_tokens(**arguments)


def test_repetition_is_counted_right(trace):
    _, data = figures.repetition_by_kind()
    row = next(p for p, key in enumerate(zip(data["layer"], data["kind"], strict=True)) if key == (3, "code"))
    kind = trace.domain_names.index("code")
    same = pairs = 0
    shares = Counter()
    for document in sorted(set(trace.documents[trace.domains == kind].tolist())):
        chosen = trace.indices[3, trace.documents == document, 0].tolist()
        shares.update(chosen)
        same += sum(a == b for a, b in pairwise(chosen))
        pairs += len(chosen) - 1
    assert data["repetition"][row] == pytest.approx(same / pairs)
    assert data["by_load"][row] == pytest.approx(sum(n**2 for n in shares.values()) / shares.total() ** 2)
    assert data["low"][row] < data["repetition"][row] < data["high"][row]


def test_repetition_by_token_is_counted_right(trace):
    sums = trace.select("arithmetic")
    tokens, chosen = sums.token_ids.tolist(), sums.indices[1, :, 0].tolist()
    counts, pairs = Counter(tokens), Counter(zip(tokens, chosen, strict=True))
    agree = [
        sum(pairs[t, e] * pairs[u, e] for e in range(8)) / (counts[t] * counts[u])
        for (t, d), (u, f) in pairwise(zip(tokens, sums.documents.tolist(), strict=True))
        if d == f
    ]
    assert figures.repetition_by_token(sums)[1] == pytest.approx(np.mean(agree))
    _, data = figures.repetition_by_kind()
    row = list(zip(data["layer"], data["kind"], strict=True)).index((1, "arithmetic"))
    assert data["by_token"][row] == pytest.approx(np.mean(agree))


def test_repetition_by_token_of_a_table_is_the_count(trace, rerouted):
    """A router that is a table with a row for each token: the tokens explain everything."""
    rerouted(trace.token_ids % 8)
    _, data = figures.repetition_by_kind()
    assert data["by_token"] == pytest.approx(data["repetition"])
    assert max(abs(np.subtract(data["by_token"], data["by_load"]))) > 0.02


def test_repetition_by_token_does_not_see_the_neighbours(trace, rerouted):
    """Every document has an expert of its own: neighbours always agree, and not because of their tokens."""
    rerouted(trace.documents % 8)
    _, data = figures.repetition_by_kind()
    assert data["repetition"] == [1.0] * 24
    assert max(data["by_token"]) < 0.4


def test_translations_are_one_sentence_in_each_language():
    drawn, data = figures.draw_translations()
    lines = "".join(data["token"]).split("\n")
    stories = parallel(TOPICS[0], 0, seed=watching.SEED)
    assert list(stories) == list(LANGUAGES)
    assert all(
        story.startswith(line) and line.endswith(".") for story, line in zip(stories.values(), lines, strict=True)
    )
    german = data["expert"][slice(*[place for place, token in enumerate(data["token"]) if token == "\n"][1:])]
    expert, count = Counter(german).most_common(1)[0]
    assert f"German expert {expert} ({count / len(german):.0%})" in drawn.get_label()


def test_agreement_is_counted_right(trace):
    layer, topic, (a, b), (i, j) = 1, 2, (0, 3), (5, 11)
    shares = []
    for language, index in ((a, i), (b, j)):
        number = DOMAINS.index(f"{LANGUAGES[language]}/{TOPICS[topic]}") * watching.DOCUMENTS + index
        chosen = Counter(trace.indices[layer, trace.documents == number, 0].tolist())
        shares.append({expert: n / chosen.total() for expert, n in chosen.items()})
    wanted = sum(min(shares[0].get(expert, 0), shares[1].get(expert, 0)) for expert in range(8))
    table = figures.document_agreement()
    assert table[layer, topic, a, b, i, j] == pytest.approx(wanted)
    assert np.allclose(np.diagonal(table[:, :, a, a], axis1=-2, axis2=-1), 1)


def test_a_router_that_follows_the_meaning(trace, rerouted):
    """Every story has an expert of its own, in all languages; of 20 stories to a topic, expert e has 2 or 3."""
    rerouted(trace.documents % watching.DOCUMENTS % 8)
    _, data = figures.language_agreement()
    groups = Counter(story % 8 for story in range(watching.DOCUMENTS))
    alike = sum(n * (n - 1) for n in groups.values()) / (20 * 19)
    assert data["translations"] == [1.0] * 4
    assert data["one_language"] == pytest.approx([alike] * 4)
    assert data["other_meaning"] == pytest.approx([alike] * 4)
    assert data["by_luck"] == [0.0] * 4


def test_a_router_that_follows_the_language(trace, rerouted):
    rerouted(trace.domains)
    _, data = figures.language_agreement()
    assert data["translations"] == data["other_meaning"] == [0.0] * 4
    assert data["one_language"] == data["by_luck"] == [1.0] * 4


def test_a_router_that_follows_nothing(trace, rerouted):
    """Translations lie among the middle 95 % of the random pairings, but for one time in twenty."""
    inside = 0
    for seed in range(5):
        rerouted(np.random.default_rng(seed).integers(8, size=(4, len(trace))))
        _, data = figures.language_agreement(seed=seed)
        inside += sum(0.025 <= share <= 0.975 for share in data["by_luck"])
    assert inside >= 17  # of 20


def test_sliders_change_the_picture():
    """As the notebook has them: a text and a layer, a layer and a count."""
    text, layer, picture = controls(figures.draw_tokens, text="a 1", layer=(0, 3)).children
    shown = [picture.value]
    layer.value = 3
    shown.append(picture.value)
    text.value = "b 2"
    shown.append(picture.value)
    layer, count, picture = controls(figures.favourite_tokens, layer=(0, 3), min_count=(10, 100, 10)).children
    assert (layer.value, count.value) == (0, 50)
    for control, value in ((layer, 2), (count, 10)):
        shown.append(picture.value)
        control.value = value
    assert len({*shown, picture.value}) == 6
    assert all("<img" in html for html in shown)
