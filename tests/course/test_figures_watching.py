"""Watching a router: the figures of a trace with known routes, against counts by hand."""

from collections import Counter
from functools import partial

import numpy as np
import pytest

from minimoe.course import figures
from minimoe.course.figures.watching import document_agreement, draw_translations
from minimoe.course.shipped import (
    PLANTED_DOCUMENTS,
    PLANTED_SEED,
    planted_trace,
    real_text_model,
    route_text,
    shipped_model,
)
from minimoe.course.widgets import controls
from minimoe.inspection import RoutingTrace
from minimoe.training.planted import DOMAINS, LANGUAGES, TOPICS, parallel

EXPERTS, LENGTH, DOCUMENTS = 4, 12, 5  # of the traces here: experts, tokens to a document, documents to a domain


def trace_of(first, *, tokens=None, kinds=("words", "sums"), documents=DOCUMENTS) -> RoutingTrace:
    """A trace of as many documents of each kind in turn, with first choices [layers, N], or what broadcasts to it."""
    number = len(kinds) * documents * LENGTH
    rng = np.random.default_rng(0)
    first = np.atleast_2d(np.broadcast_to(first, (*np.shape(first)[:-1], number)))
    return RoutingTrace(
        indices=np.stack([first, (first + 1) % EXPERTS], axis=-1).astype(np.int16),
        weights=np.full((len(first), number, 2), 0.5, dtype=np.float32),
        token_ids=(rng.integers(40, 46, number) if tokens is None else tokens).astype(np.int32),
        domains=(np.arange(number) // (documents * LENGTH)).astype(np.int16),
        documents=(np.arange(number) // LENGTH).astype(np.int32),
        positions=(np.arange(number) % LENGTH).astype(np.int32),
        domain_names=tuple(kinds),
        layers=tuple(range(len(first))),
        num_experts=EXPERTS,
        model_id="made up",
    )


@pytest.fixture(scope="module")
def random_trace():
    return trace_of(np.random.default_rng(1).integers(EXPERTS, size=(3, 2 * DOCUMENTS * LENGTH)))


def planted_like(rule):
    """Documents of every planted domain in order; `rule` gives the expert from (language, topic, story)."""
    places = [(*divmod(domain, len(TOPICS)), story) for domain in range(len(DOMAINS)) for story in range(DOCUMENTS)]
    return trace_of(np.repeat([rule(*place) for place in places], LENGTH), kinds=DOMAINS)


def test_token_path_boxes_both_experts_of_the_last_token_in_each_layer():
    texts = ("a.", "b = 1", "$x$")
    drawn, data = figures.token_path(texts)
    rows = list(zip(*data.values(), strict=True))
    place = 0
    for text, axes in zip(texts, drawn.axes, strict=False):
        _, routers = route_text(text, real_text_model())
        boxes = {(round(b.get_x() + 0.42), round(b.get_y() + 0.4)): b.get_linewidth() for b in axes.patches}
        for layer, router in enumerate(routers):
            experts, weights = router.indices[-1].tolist(), router.weights[-1].tolist()
            *where, shown = zip(*rows[place : place + 2], strict=True)
            assert where == [(text, text), (layer, layer), tuple(experts)]
            assert shown == pytest.approx(weights, rel=1e-4)
            assert boxes[experts[0], layer] > boxes[experts[1], layer]
            place += 2
        assert len(boxes) == 2 * len(routers) and axes.get_ylim()[0] > axes.get_ylim()[1]
    assert place == len(rows) and not drawn.axes[3].axison


def test_favourites_are_counted_right_and_none_is_better(random_trace):
    tokenizer = shipped_model()[1]
    drawn, data = figures.favourite_tokens(random_trace, layer=2, min_count=15, tokenizer=tokenizer)
    ids, first = random_trace.token_ids.tolist(), random_trace.indices[2, :, 0].tolist()
    counts, loads, pairs = Counter(ids), Counter(first), Counter(zip(ids, first, strict=True))
    wanted = []
    for expert in range(EXPERTS):
        load = loads[expert] / len(ids)
        shares = sorted(
            ((pairs[t, expert] / n, n, t) for t, n in counts.items() if n >= 15), key=lambda r: (-r[0], -r[1])
        )
        wanted += [(expert, load, tokenizer.decode([t]), n, share) for share, n, t in shares[:5] if share > load]
    assert list(zip(*data.values(), strict=True)) == wanted
    written = [text.get_text() for text in drawn.axes[0].texts]
    assert all(f"{share:.0%} of {n}" in written for *_, n, share in wanted)
    assert [text for text in written if text.startswith("load")] == [
        f"load {loads[e] / len(ids):.0%}" for e in range(4)
    ]


def test_no_favourite_has_less_than_the_load():
    """Expert 1 gets the commonest token, expert 0 all others, the rest none: they have no favourites to show."""
    tokens = np.arange(2 * DOCUMENTS * LENGTH) % 10 // 2 + 40
    drawn, data = figures.favourite_tokens(trace_of(np.where(tokens == 42, 1, 0), tokens=tokens), min_count=5)
    assert Counter(data["expert"]) == {0: 4, 1: 1}
    assert "; 3 (0%) none" in drawn.get_label()


def test_favourites_that_cannot_be_drawn_are_refused(random_trace):
    with pytest.raises(ValueError, match="layer=4: wanted 0 to 2"):
        figures.favourite_tokens(random_trace, layer=4)
    with pytest.raises(ValueError, match="min_count=1000000"):
        figures.favourite_tokens(random_trace, min_count=10**6)


def test_repetition_is_counted_and_held_against_three_levels_of_chance(random_trace):
    drawn, data = figures.repetition_by_kind(random_trace)
    rows = list(zip(*data.values(), strict=True))
    assert [row[:2] for row in rows] == [(layer, kind) for layer in range(3) for kind in ("words", "sums")]
    for layer, kind, repetition, low, high, by_load, by_token in rows:
        part = random_trace.select(kind)
        first, ids, documents = part.indices[layer, :, 0].tolist(), part.token_ids.tolist(), part.documents.tolist()
        neighbours = [i for i in range(len(first) - 1) if documents[i] == documents[i + 1]]
        assert repetition == pytest.approx(np.mean([first[i] == first[i + 1] for i in neighbours]))
        assert by_load == pytest.approx(sum(n**2 for n in Counter(first).values()) / len(first) ** 2)
        counts, pairs = Counter(ids), Counter(zip(ids, first, strict=True))
        agree = [
            sum(pairs[ids[i], e] * pairs[ids[i + 1], e] for e in range(EXPERTS)) / (counts[ids[i]] * counts[ids[i + 1]])
            for i in neighbours
        ]
        assert by_token == pytest.approx(np.mean(agree))
        assert low <= repetition <= high
    axes = drawn.axes[2]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([100 * row[5] for row in rows[4:]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["words", "sums"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_repetition_by_token_of_a_table_is_the_count_and_does_not_see_neighbours():
    """A router that is a table with a row for each token; one that gives every document an expert of its own."""
    tokens = np.random.default_rng(2).integers(40, 46, 2 * DOCUMENTS * LENGTH)
    table = trace_of(tokens % EXPERTS, tokens=tokens)
    data = figures.repetition_by_kind(table)[1]
    assert data["by_token"] == pytest.approx(data["repetition"])
    by_document = trace_of(np.arange(2 * DOCUMENTS * LENGTH) // LENGTH % EXPERTS, tokens=tokens)
    data = figures.repetition_by_kind(by_document)[1]
    assert data["repetition"] == [1.0, 1.0] and max(data["by_token"]) < 0.5


def test_translations_are_one_sentence_in_each_language():
    drawn, data = draw_translations()
    lines = "".join(data["token"]).split("\n")
    stories = parallel(TOPICS[0], 0, seed=PLANTED_SEED)
    assert list(stories) == list(LANGUAGES)
    assert all(s.startswith(line) and line.endswith(".") for s, line in zip(stories.values(), lines, strict=True))
    german = data["expert"][slice(*[place for place, token in enumerate(data["token"]) if token == "\n"][1:])]
    expert, count = Counter(german).most_common(1)[0]
    assert f"German expert {expert} ({count / len(german):.0%})" in drawn.get_label()


def test_document_agreement_is_the_common_part_of_the_shares():
    trace = trace_of(np.random.default_rng(3).integers(EXPERTS, size=len(DOMAINS) * DOCUMENTS * LENGTH), kinds=DOMAINS)
    topic, (a, b), (i, j) = 2, (0, 3), (1, 4)
    shares = []
    for language, story in ((a, i), (b, j)):
        number = DOMAINS.index(f"{LANGUAGES[language]}/{TOPICS[topic]}") * DOCUMENTS + story
        shares.append(np.bincount(trace.indices[0, trace.documents == number, 0], minlength=EXPERTS) / LENGTH)
    table = document_agreement(trace)
    assert table[0, topic, a, b, i, j] == pytest.approx(np.minimum(*shares).sum())
    assert np.allclose(np.diagonal(table[:, :, a, a], axis1=-2, axis2=-1), 1)


def test_language_agreement_tells_what_a_router_follows():
    """Every story has an expert of its own, in all languages; or every language has one."""
    drawn, data = figures.language_agreement(planted_like(lambda language, topic, story: story % EXPERTS))
    alike = 2 / (DOCUMENTS * (DOCUMENTS - 1))  # of 5 stories, only 0 and 4 meet one expert
    assert (data["translations"], data["by_luck"]) == ([1.0], [0.0])
    assert data["one_language"] == data["other_meaning"] == pytest.approx([alike])
    points = {line.get_label(): line.get_xdata().tolist() for line in drawn.axes[0].lines}
    assert points["translations"] == [100] and points["other text, other language"] == pytest.approx([100 * alike])
    data = figures.language_agreement(planted_like(lambda language, topic, story: min(language, EXPERTS - 1)))[1]
    assert data["translations"] == data["other_meaning"] == [0.0]
    assert data["one_language"] == data["by_luck"] == [1.0]


def test_a_router_that_follows_nothing_agrees_as_by_luck():
    """Translations lie among the middle 95 % of the random pairings, but for one time in twenty."""
    documents = 20  # of a domain: with fewer the random pairings have too little to choose from
    first = np.random.default_rng(4).integers(EXPERTS, size=(20, len(DOMAINS) * documents * LENGTH))
    trace = trace_of(first, kinds=DOMAINS, documents=documents)
    by_luck = figures.language_agreement(trace, shuffles=200)[1]["by_luck"]
    assert sum(0.025 <= share <= 0.975 for share in by_luck) >= 17


def test_the_shipped_trace_is_of_planted_documents_in_order_without_near_ties():
    trace, (_, tokenizer) = planted_trace(), shipped_model()
    assert trace.documents[-1] + 1 == len(DOMAINS) * PLANTED_DOCUMENTS
    for language, text in parallel(TOPICS[1], 7, seed=PLANTED_SEED).items():
        here = trace.documents == DOMAINS.index(f"{language}/{TOPICS[1]}") * PLANTED_DOCUMENTS + 7
        assert trace.token_ids[here].tolist() == tokenizer.encode(text).ids
        assert {trace.domain_names[d] for d in trace.domains[here]} == {language}
    # Another CPU must not move a token to another expert; its rounding is of the order of 1e-7.
    assert (trace.weights[..., 0] - trace.weights[..., 1]).min() > 2e-6
    weights = figures.token_path()[1]["weight"]
    assert min(a - b for a, b in zip(weights[::2], weights[1::2], strict=True)) > 1e-3


def test_the_controls_of_the_notebook_redraw(random_trace):
    draw = partial(figures.favourite_tokens, random_trace)
    layer, count, picture = controls(draw, layer=(0, 2), min_count=(5, 100, 5)).children
    assert (layer.value, count.value) == (0, 50)
    count.value = 5
    shown = [picture.value]
    layer.value = 2
    assert picture.value.startswith("<img") and picture.value not in shown
