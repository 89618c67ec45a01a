"""Every metric against routers whose answer is known, against plain loops, and against its own claims about chance."""

from itertools import combinations, permutations, product
from math import log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from minimoe.inspection import metrics
from minimoe.inspection.labels import LABELS, labels
from minimoe.model import balance
from tests.inspection.traces import (
    DOCUMENTS,
    DOMAINS,
    EXPERTS,
    LANGUAGES,
    LENGTH,
    TOPICS,
    VOCABULARY,
    close,
    make_trace,
    planted,
    traces,
    uneven,
)

FEW = {"draws": 40}


def chosen(trace, layer, token):
    """The set of experts of a token, the plain way."""
    return {int(expert) for expert in trace.indices[layer, token] if expert < trace.num_experts}


def first_choice(trace, layer, token):
    slots = zip(trace.weights[layer, token], trace.indices[layer, token], strict=True)
    filled = [(weight, expert) for weight, expert in slots if expert < trace.num_experts]
    return int(max(filled, key=lambda slot: slot[0])[1]) if filled else None


# --- plain loops ------------------------------------------------------------------------------------------


@given(traces())
def test_load_and_its_unevenness(trace):
    shares = metrics.load(trace, **FEW)
    for layer in range(2):
        indices = torch.from_numpy(trace.indices[layer].astype(np.int64))
        load = balance.expert_load(indices, trace.num_experts)
        close(shares.value[layer], load.double() / load.sum())
        close(metrics.max_violation(trace, **FEW).value[layer], balance.max_violation(load))
        p = [float(share) for share in load.double() / load.sum() if share > 0]
        close(metrics.load_entropy(trace, **FEW).value[layer], -sum(x * log(x) for x in p) / log(trace.num_experts))
    close(shares.null, 1 / trace.num_experts)


@given(traces(), st.sampled_from(["domain", "language", "topic"]))
def test_domain_specialization_counts_tokens_whose_top_k_contains_the_expert(trace, of):
    label, names = labels(trace, of)
    found = metrics.domain_specialization(trace, of, **FEW)
    assert found.value.shape == found.null.shape == (2, len(names), trace.num_experts)
    for layer, domain, expert in np.ndindex(found.value.shape):
        tokens = [token for token in range(len(label)) if label[token] == domain]
        close(found.value[layer, domain, expert], np.mean([expert in chosen(trace, layer, token) for token in tokens]))
        labelled = [token for token in range(len(label)) if label[token] >= 0]
        close(found.null[layer, domain, expert], np.mean([expert in chosen(trace, layer, token) for token in labelled]))


@given(traces())
def test_vocabulary_specialization_counts_first_choices(trace):
    frequent = metrics.frequent_tokens(trace, 2)
    found = metrics.vocabulary_specialization(trace, min_count=2, **FEW)
    assert found.value.shape == (2, len(frequent), trace.num_experts)
    for layer, row, expert in np.ndindex(found.value.shape):
        places = [token for token, token_id in enumerate(trace.token_ids) if token_id == frequent[row]]
        assert len(places) >= 2
        close(found.value[layer, row, expert], np.mean([first_choice(trace, layer, t) == expert for t in places]))
        everywhere = range(len(trace.token_ids))
        close(found.null[layer, row, expert], np.mean([first_choice(trace, layer, t) == expert for t in everywhere]))


def slot_information(trace, layer, label, condition):
    """I(E; label | condition) / I(E; occurrence), from scikit-learn's mutual information of plain lists."""
    slots = [
        (expert, label[token], condition[token], token)
        for token in range(len(label))
        if label[token] >= 0 and condition[token] >= 0
        for expert in sorted(chosen(trace, layer, token))
    ]
    information = 0.0
    for value in {slot[2] for slot in slots}:
        stratum = [slot for slot in slots if slot[2] == value]
        information += len(stratum) / len(slots) * mutual_info_score([s[0] for s in stratum], [s[1] for s in stratum])
    return information / mutual_info_score([slot[0] for slot in slots], [slot[3] for slot in slots])


@given(traces(), st.sampled_from(LABELS), st.sampled_from([None, *LABELS]))
def test_mutual_information_is_that_of_scikit_learn(trace, of, condition):
    label = labels(trace, of).values
    given_values = np.zeros(len(label), dtype=int) if condition is None else labels(trace, condition).values
    kept = (label >= 0) & (given_values >= 0)
    sets = [{frozenset(chosen(trace, layer, t)) for t in np.flatnonzero(kept)} - {frozenset()} for layer in range(2)]
    if of == condition or len(set(label[kept])) < 2 or min(map(len, sets)) == 1:
        with pytest.raises(ValueError, match=r"another label|at least 2|same . of . experts"):
            metrics.mutual_information(trace, of, condition, **FEW)
        return
    found = metrics.mutual_information(trace, of, condition, **FEW)
    for layer in range(2):
        assert found.value[layer] == pytest.approx(slot_information(trace, layer, label, given_values), abs=1e-9)
        assert -1e-9 < found.value[layer] < 1 + 1e-9


@given(traces(k=3))
def test_co_activation_counts_all_pairs(trace):
    found = metrics.co_activation(trace, **FEW).value
    for layer, i, j in np.ndindex(found.shape):
        with_i = [token for token in range(len(trace.token_ids)) if i in chosen(trace, layer, token)]
        if i == j or not with_i:
            assert np.isnan(found[layer, i, j])
        else:
            close(found[layer, i, j], np.mean([j in chosen(trace, layer, token) for token in with_i]))


@given(traces(k=2), st.sampled_from([1, 2]))
def test_repetition_counts_neighbours_in_a_document(trace, choices):
    def best(layer, token):
        experts = chosen(trace, layer, token)
        if choices == 2:
            return experts if len(experts) == 2 else None
        first = first_choice(trace, layer, token)
        return None if first is None else {first}

    places = [
        t
        for t in range(1, len(trace.token_ids))
        if trace.documents[t] == trace.documents[t - 1] and trace.positions[t] == trace.positions[t - 1] + 1
    ]
    pairs = [[(best(layer, t - 1), best(layer, t)) for t in places] for layer in range(2)]
    meet = [[bool(left & right) for left, right in of_layer if left and right] for of_layer in pairs]
    if not all(meet):
        with pytest.raises(ValueError, match="no two consecutive tokens"):
            metrics.repetition(trace, choices, **FEW)
        return
    found = metrics.repetition(trace, choices, **FEW)
    for layer in range(2):
        close(found.value[layer], np.mean(meet[layer]))
        sets = [best(layer, t) for t in range(len(trace.token_ids)) if best(layer, t)]
        close(found.null[layer], np.mean([bool(left & right) for left, right in product(sets, sets)]))


@given(traces(k=2), st.integers(0, 2**31))
def test_saturation_counts_common_experts(trace, seed):
    final = SimpleNamespace(**vars(trace))
    final.indices = np.random.default_rng(seed).permuted(trace.indices, axis=1)
    found = metrics.router_saturation(trace, final, **FEW)
    tokens = range(len(trace.token_ids))
    for layer in range(2):
        slots = sum(len(chosen(final, layer, token)) for token in tokens)
        common = sum(len(chosen(trace, layer, token) & chosen(final, layer, token)) for token in tokens)
        close(found.value[layer], common / slots)
        anyhow = sum(len(chosen(trace, layer, a) & chosen(final, layer, b)) for a, b in product(tokens, tokens))
        assert found.null[layer] == pytest.approx(anyhow / len(tokens) / slots, rel=1e-5)
    close(metrics.router_saturation(trace, trace, **FEW).value, 1)


@given(traces(k=2), st.integers(0, 2**31))
@settings(max_examples=10)
def test_agreement_is_the_best_over_all_renamings(trace, seed):
    other = SimpleNamespace(**vars(trace))
    other.indices = np.random.default_rng(seed).permuted(trace.indices, axis=1)
    found = metrics.matched_agreement(trace, other, **FEW)
    tokens, experts = range(len(trace.token_ids)), trace.num_experts
    for layer in range(2):
        ours, theirs = ([chosen(t, layer, token) for token in tokens] for t in (trace, other))
        slots = (sum(map(len, ours)) + sum(map(len, theirs))) / 2

        def common(renamed, ours=ours, theirs=theirs):
            return sum(len({renamed[expert] for expert in a} & b) for a, b in zip(ours, theirs, strict=True))

        best = max(common(renamed) for renamed in permutations(range(experts)))
        close(found.value[layer], best / slots)
        assert common(metrics.match_experts(trace, other)[layer].tolist()) == best


# --- routers whose answer is known ------------------------------------------------------------------------

FOLLOWED = ("language", "topic", "token", "position")


@pytest.mark.parametrize("follows", FOLLOWED)
def test_all_information_is_about_what_the_router_follows(follows):
    trace = planted(follows, k=1 if follows == "token" else 2)
    for of in FOLLOWED:
        found = metrics.mutual_information(trace, of)
        if of == follows:
            assert found.value == pytest.approx(1)
            assert found.low == pytest.approx(1) and found.null < 0.1
        else:
            assert found.value == pytest.approx(found.null, abs=0.01)
            assert found.value < 0.05


def test_a_router_that_follows_nothing_is_within_the_interval_of_its_null():
    """A 95 % interval misses its null once in twenty; 10 seeds x 5 labels may miss 8 times (chance: .4 %)."""
    missed = 0
    for seed in range(10):
        trace = planted("nothing", seed)
        for of in ("domain", *FOLLOWED):
            found = metrics.mutual_information(trace, of, seed=seed)
            missed += not found.low <= found.null <= found.high
            assert found.value < 0.03
    assert missed <= 8


def test_tokens_that_belong_to_a_domain_are_not_domain_specialization():
    """The router follows the token alone, but each language has words of its own: given the token, nothing is left."""
    rng = np.random.default_rng(0)
    trace = planted("nothing")
    language = labels(trace, "language").values
    trace.token_ids = (rng.integers(0, 8, len(language)) + 8 * language).astype(np.int32)
    trace.indices = (trace.token_ids[None, :, None] // 4).astype(np.int16)
    trace.weights = np.ones_like(trace.indices, dtype=np.float32)
    assert metrics.mutual_information(trace, "language").value == pytest.approx(0.5, abs=0.01)  # ln 2 of ln 4
    assert metrics.mutual_information(trace, "token").value == pytest.approx(1)
    nothing_left = metrics.mutual_information(trace, "language", given="token")
    assert nothing_left.value == nothing_left.null == nothing_left.low == nothing_left.high == 0  # not 1e-17
    assert metrics.mutual_information(trace, "token", given="language").value == pytest.approx(0.5, abs=0.01)


def test_shares_of_information_add_up():
    trace = planted("nothing")
    both = SimpleNamespace(**vars(trace))
    both.token_ids = trace.token_ids * 4 + trace.domains
    parts = (
        metrics.mutual_information(trace, "token").value + metrics.mutual_information(trace, "domain", "token").value
    )
    assert parts == pytest.approx(metrics.mutual_information(both, "token").value)


@pytest.mark.parametrize("given_label", [None, "token"])
def test_a_router_that_follows_the_document_is_no_sign_of_domains(given_label):
    """Each document has an expert of its own. Permuting whole documents shows how far chance gets; shuffled tokens
    would show next to nothing, and make a finding out of it."""
    trace = planted("document", k=1)
    found = metrics.mutual_information(trace, "domain", given_label, shuffles=100)
    assert found.low < found.null < found.high
    trace.documents = np.arange(len(trace.documents), dtype=np.int32)
    shuffled_tokens = metrics.mutual_information(trace, "domain", given_label, shuffles=100)
    assert found.value == pytest.approx(shuffled_tokens.value)
    assert shuffled_tokens.null < found.null / (10 if given_label is None else 1.1)


def test_the_null_of_token_information_is_the_known_bias():
    """(labels - 1)(E - 1) / 2N nats for a router that follows nothing."""
    trace = planted("nothing", k=1)
    for count in (2, 4):
        trace.token_ids = (np.arange(len(trace.token_ids)) % count).astype(np.int32)
        found = metrics.mutual_information(trace, "token", shuffles=300)
        wanted = (count - 1) * (EXPERTS - 1) / (2 * len(trace.token_ids)) / log(EXPERTS)
        assert found.null == pytest.approx(wanted, rel=0.1)


def test_domain_specialization_of_a_router_that_follows_domains():
    for of, other in (("language", "topic"), ("topic", "language")):
        trace = planted(of)
        found = metrics.domain_specialization(trace, of)
        close(found.value[0], [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]])
        close(found.null[0], [[0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0]] * 2)  # load-aware: far above K / E = .25
        found = metrics.domain_specialization(trace, other)
        close(found.value, found.null)


def test_the_null_of_domains_is_what_permuting_labels_gives():
    trace = planted("topic")
    found = metrics.domain_specialization(trace, "topic").null
    rng = np.random.default_rng(0)
    permuted = []
    for _ in range(400):
        trace.domains = np.repeat(rng.permutation(DOCUMENTS) % 4, LENGTH).astype(np.int16)
        permuted.append(metrics.domain_specialization(trace, "topic", draws=1).value)
    np.testing.assert_allclose(np.mean(permuted, axis=0), found, atol=0.01)


# --- a label that the null keeps fixed --------------------------------------------------------------------


def mostly_language(topic_share, seed=0):
    """Half of the experts belong to each language; of those, a small share of the tokens go by topic, the rest and
    the taste of every document by chance."""
    trace = planted("nothing", seed, k=1)
    rng = np.random.default_rng([seed, 1])
    language, topic = (labels(trace, of).values for of in ("language", "topic"))
    taste = rng.integers(4, size=DOCUMENTS)[trace.documents]
    within = np.where(rng.random(len(language)) < 0.05, taste, rng.integers(4, size=len(language)))
    within = np.where(rng.random(len(language)) < topic_share, topic, within)
    trace.indices = (4 * language + within)[None, :, None].astype(np.int16)
    return trace


def test_a_small_effect_is_found_when_the_null_keeps_the_large_one_fixed():
    trace = mostly_language(topic_share=0.12)
    hidden = metrics.mutual_information(trace, "topic", shuffles=200)
    found = metrics.mutual_information(trace, "topic", within="language", shuffles=200)
    assert found.value == hidden.value
    assert hidden.low < hidden.null
    assert found.low > found.null > 0
    hidden, found = (metrics.domain_specialization(trace, "topic", within=within) for within in (None, "language"))
    assert not (hidden.low > hidden.null).any()
    above = (found.low > found.null)[0]
    assert above[[0, 0, 1, 1], [0, 4, 1, 5]].sum() >= 3 and not above[[0, 0, 1, 1], [1, 5, 0, 4]].any()


def test_the_null_is_right_where_there_is_no_small_effect():
    """Without one the value is a draw from the null, so that both agree on average, and seldom lies beyond it; the
    null that lets go of the language is several times too high."""
    seeds = range(30)
    traces_of = [mostly_language(topic_share=0, seed=seed) for seed in seeds]
    kept = [metrics.mutual_information(trace, "topic", within="language") for trace in traces_of]
    value, null = (np.mean([getattr(found, field) for found in kept]) for field in ("value", "null"))
    assert value == pytest.approx(null, rel=0.15)
    assert sum((found.low > found.null).item() for found in kept) <= 5
    assert np.mean([metrics.mutual_information(trace, "topic", draws=0).null for trace in traces_of]) > 2 * null


def test_the_null_with_a_fixed_label_is_what_permuting_within_it_gives():
    trace = mostly_language(topic_share=0.3)
    indices = trace.indices
    trace = uneven(trace)
    shares = metrics.domain_specialization(trace, "topic", within="language").null
    told = metrics.mutual_information(trace, "topic", within="language", draws=0, shuffles=400).null
    language = np.repeat([0, 0, 1, 1], [35, 10, 15, 20])
    rng = np.random.default_rng(0)
    permuted = SimpleNamespace(**vars(trace))
    found = []
    for _ in range(400):
        topic = np.repeat([0, 1, 0, 1], [35, 10, 15, 20])
        for number in (0, 1):
            topic[language == number] = rng.permutation(topic[language == number])
        permuted.domains = (2 * language + topic)[trace.documents].astype(np.int16)
        of_token = topic[trace.documents]
        found.append(
            (
                metrics.domain_specialization(permuted, "topic", draws=1).value,
                mutual_info_score(of_token, indices[0, :, 0])
                / mutual_info_score(np.arange(len(of_token)), indices[0, :, 0]),
            )
        )
    np.testing.assert_allclose(np.mean([each for each, _ in found], axis=0), shares, atol=0.005)
    assert np.mean([each for _, each in found]) == pytest.approx(told.item(), rel=0.1)


def test_vocabulary_specialization_of_a_router_that_follows_tokens():
    found = metrics.vocabulary_specialization(planted("token"))
    close(found.value[0], np.eye(EXPERTS)[2 * np.arange(VOCABULARY) % EXPERTS])
    close(found.null[0], np.tile([0.25, 0] * 4, (VOCABULARY, 1)))
    by_chance = metrics.vocabulary_specialization(planted("nothing"))
    inside = (by_chance.low <= by_chance.null) & (by_chance.null <= by_chance.high)
    assert inside.mean() > 0.9
    np.testing.assert_allclose(by_chance.value, 1 / EXPERTS, atol=0.1)


def test_repetition_of_known_routers():
    repeating = metrics.repetition(planted("language"))
    assert repeating.value == pytest.approx(1) and repeating.null == pytest.approx(0.5)
    for choices, wanted in ((1, 1 / 8), (2, 0.464)):
        by_chance = metrics.repetition(planted("nothing"), choices)
        assert by_chance.value == pytest.approx(wanted, abs=0.02)
        assert by_chance.null == pytest.approx(wanted, abs=0.005)


def test_imbalance_is_not_locality():
    """Independent tokens, 70 % of them at one expert: repetition is far above 1 / E and at its own null."""
    rng = np.random.default_rng(0)
    indices = rng.choice(8, p=[0.7, *[0.3 / 7] * 7], size=(1, 20_000, 1))
    found = metrics.repetition(
        make_trace(indices, documents=np.repeat(np.arange(200), 100), positions=np.arange(20_000))
    )
    assert found.value > 3 * metrics.chance_of_repetition(8)
    assert found.low < found.null < found.high


def test_repetition_by_token_is_that_of_tokens_that_draw_from_their_own_choices():
    trace = planted("nothing")
    drawn = {token: np.bincount(trace.indices[0, trace.token_ids == token, 0], minlength=8) for token in range(16)}
    shares = {token: counts / counts.sum() for token, counts in drawn.items()}
    pairs = [(i, i + 1) for i in range(len(trace.token_ids) - 1) if trace.documents[i] == trace.documents[i + 1]]
    wanted = np.mean([shares[trace.token_ids[i]] @ shares[trace.token_ids[j]] for i, j in pairs])
    assert metrics.repetition_by_token(trace) == pytest.approx([wanted])
    table = planted("token")
    assert metrics.repetition_by_token(table) == pytest.approx(metrics.repetition(table, **FEW).value)
    assert metrics.repetition_by_token(planted("document")) < 0.3 < metrics.repetition(planted("document"), **FEW).value


def test_chance_of_repetition():
    assert metrics.chance_of_repetition(8) == pytest.approx(1 / 8)
    assert metrics.chance_of_repetition(8, 2) == pytest.approx(1 - (6 / 8) * (5 / 7)) == pytest.approx(0.464, abs=5e-4)
    sets = list(combinations(range(5), 2))
    meet = [bool({*a} & {*b}) for a, b in product(sets, sets)]
    assert metrics.chance_of_repetition(5, 2) == pytest.approx(np.mean(meet))
    assert metrics.chance_of_repetition(3, 2) == 1


def test_first_choice_is_by_weight_whatever_the_order_of_slots():
    trace = planted("token")
    reversed_slots = SimpleNamespace(**vars(trace))
    reversed_slots.indices, reversed_slots.weights = trace.indices[..., ::-1], trace.weights[..., ::-1]
    for metric in (metrics.vocabulary_specialization, metrics.repetition):
        for ours, theirs in zip(metric(trace, **FEW), metric(reversed_slots, **FEW), strict=True):
            close(ours, theirs)


def test_renamed_experts_agree_and_strangers_do_not():
    trace = planted("nothing")
    renaming = np.random.default_rng(1).permutation(EXPERTS)
    renamed = SimpleNamespace(**vars(trace))
    renamed.indices = renaming[trace.indices].astype(np.int16)
    close(metrics.match_experts(trace, renamed)[0], renaming)
    same = metrics.matched_agreement(trace, renamed)
    close(same.value, 1)
    assert 2 / EXPERTS < same.null < 0.35
    renamed.indices = planted("nothing", seed=5).indices
    stranger = metrics.matched_agreement(trace, renamed)
    assert stranger.null > 2 / EXPERTS  # matching finds something even here
    assert stranger.low <= stranger.null <= stranger.high


def test_co_activation_tells_pairs_from_chance():
    off, inside = ~np.eye(EXPERTS, dtype=bool), []
    for seed in range(10):
        by_chance = metrics.co_activation(planted("nothing", seed), seed=seed)
        close(np.isnan(by_chance.null[0]), ~off)
        np.testing.assert_allclose(by_chance.null[0][off], 1 / 7, atol=0.02)
        inside.append(((by_chance.low <= by_chance.null) & (by_chance.null <= by_chance.high))[0][off])
    assert 0.9 < np.mean(inside) < 0.99
    pairs = metrics.co_activation(planted("token"))  # experts 2i and 2i + 1 always together
    together = np.kron(np.eye(4), np.ones((2, 2)))
    close(pairs.value[0][off], together[off])
    np.testing.assert_allclose(pairs.null[0][off], 1 / 7, atol=1e-6)


# --- edges ------------------------------------------------------------------------------------------------


def test_one_document_has_values_and_nulls_but_no_intervals():
    trace = planted("nothing")
    trace.documents = np.zeros_like(trace.documents)
    for found in (
        metrics.load(trace),
        metrics.max_violation(trace),
        metrics.mutual_information(trace, "token"),
        metrics.co_activation(trace),
        metrics.repetition(trace),
        metrics.router_saturation(trace, trace),
        metrics.matched_agreement(trace, trace),
        metrics.vocabulary_specialization(trace),
    ):
        defined = ~np.eye(EXPERTS, dtype=bool) if found.value.shape == (1, EXPERTS, EXPERTS) else ...
        assert np.isfinite(found.value[0][defined]).all() and np.isfinite(found.null[0][defined]).all()
        assert np.isnan(found.low).all() and np.isnan(found.high).all()


def test_a_domain_of_one_document_has_no_interval_of_its_own():
    trace = planted("nothing")
    trace.domains = np.where(trace.documents == 0, 0, 1 + trace.documents % 3).astype(np.int16)
    found = metrics.domain_specialization(trace)
    assert np.isnan(found.low[0, 0]).all() and np.isfinite(found.low[0, 1:]).all()


def test_every_token_at_every_expert():
    trace = make_trace([[[0, 1, 2]] * 6], domains=[0, 0, 1, 1, 2, 3], token_ids=[0, 1] * 3, experts=3)
    close(metrics.load(trace).value, 1 / 3)
    close(metrics.max_violation(trace).null, 0)
    off = ~np.eye(3, dtype=bool)
    close(metrics.co_activation(trace).value[0][off], 1)
    np.testing.assert_allclose(metrics.co_activation(trace).null[0][off], 1, atol=1e-6)
    with pytest.raises(ValueError, match="layer 0: every token goes to the same 3 of 3 experts"):
        metrics.mutual_information(trace, "token")


def test_labels_of_the_planted_corpus_split_at_the_slash():
    trace = make_trace([[[0]] * 6], domains=[0, 1, 2, 3, 4, -1], positions=[0, 1, 2, 3, 6, 7], experts=2)
    trace.domain_names = (*DOMAINS, "code")
    assert labels(trace, "language").names == LANGUAGES
    assert labels(trace, "language").values.tolist() == [0, 0, 1, 1, -1, -1]
    assert labels(trace, "topic").names == TOPICS
    assert labels(trace, "topic").values.tolist() == [0, 1, 0, 1, -1, -1]
    assert labels(trace, "position").values.tolist() == [0, 1, 1, 2, 2, 3]
    assert labels(trace, "position").names == ("0", "1-2", "3-6", "7-14")


def test_unlabelled_tokens_change_nothing():
    trace = planted("language")
    mixed = planted("language")
    mixed.indices = np.concatenate([trace.indices, planted("nothing").indices], axis=1)
    for name in ("token_ids", "domains", "documents", "positions"):
        column = getattr(trace, name)
        other = np.full_like(column, -1) if name == "domains" else column
        setattr(mixed, name, np.concatenate([column, other + 1000 if name == "documents" else other]))
    for metric in (metrics.domain_specialization, metrics.mutual_information):
        for ours, theirs in zip(metric(trace, "language"), metric(mixed, "language"), strict=True):
            close(ours, theirs)


TOKENS = DOCUMENTS * LENGTH
UNDEFINED = [  # what of a trace is changed, what is asked of it, what the error names
    ({}, lambda t: metrics.mutual_information(t, "sense"), "label 'sense'"),
    ({}, lambda t: metrics.mutual_information(t, "token", "token"), "given='token'"),
    ({}, lambda t: metrics.mutual_information(t, "topic", within="topic"), "within='topic': wanted .* while topic"),
    ({}, lambda t: metrics.domain_specialization(t, "topic", within="token"), "within='token'"),
    ({}, lambda t: metrics.mutual_information(t, "token", within="language"), "within='language' with token"),
    (
        {"documents": np.arange(TOKENS) // 128 + 7, "domains": np.repeat(np.arange(80) % 2 * 2, 64)},
        lambda t: metrics.mutual_information(t, "topic", within="language"),
        "topic: the labelled tokens have 1 values",
    ),
    ({}, lambda t: metrics.domain_specialization(t, "token"), "label 'token'"),
    ({"domain_names": ("a", "b", "c", "d")}, lambda t: labels(t, "topic"), "^topic: no domain"),
    ({"domain_names": (*DOMAINS, "code")}, metrics.domain_specialization, "domain 'code' has no token"),
    (
        {"domains": np.zeros(TOKENS, dtype=np.int16)},
        lambda t: metrics.mutual_information(t, "domain"),
        r"domain: .* 1 values \['english/kitchen'\]",
    ),
    (
        {"domains": np.full(TOKENS, -1, dtype=np.int16)},
        lambda t: metrics.mutual_information(t, "language"),
        "language: .* 0 values",
    ),
    ({"documents": np.arange(TOKENS) // 128 + 7}, metrics.domain_specialization, "document 7 has two labels"),
    ({"indices": np.full((1, TOKENS, 2), 8)}, metrics.load, f"layer 0: none of the {TOKENS} tokens"),
    ({"indices": np.zeros((1, TOKENS, 1), int)}, metrics.co_activation, "layer 0: a token goes to 1 experts at most"),
    ({"num_experts": 1}, metrics.load_entropy, "num_experts=1"),
    ({}, lambda t: metrics.repetition(t, 3), "choices=3"),
    ({"indices": np.zeros((1, TOKENS, 1), int)}, lambda t: metrics.repetition(t, 2), r"choices=2: .*\(1 here\)"),
    ({"documents": np.arange(TOKENS)}, metrics.repetition, "no two consecutive tokens"),
    ({}, lambda t: metrics.vocabulary_specialization(t, min_count=9999), "min_count=9999: wanted at most 320"),
    ({"num_experts": 9}, lambda t: metrics.matched_agreement(planted("token"), t), "num_experts=9 in the second"),
    ({"layers": (3,)}, lambda t: metrics.match_experts(planted("token"), t), r"layers=\(3,\) in the second"),
    ({"token_ids": np.zeros(TOKENS)}, lambda t: metrics.router_saturation(planted("token"), t), "token_ids: the"),
    ({"token_ids": np.zeros(7)}, lambda t: metrics.router_saturation(planted("token"), t), "token_ids: the 7 tokens"),
]


def test_what_is_undefined_is_said():
    for change, call, message in UNDEFINED:
        trace = planted("token")
        vars(trace).update(change)
        with pytest.raises(ValueError, match=message):
            call(trace)
