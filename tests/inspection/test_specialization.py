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

from minimoe.inspection import specialization as sp
from minimoe.model import MoEConfig, MoEForCausalLM, balance

LANGUAGES, TOPICS = ("english", "french"), ("kitchen", "harbour")
DOMAINS = tuple(f"{language}/{topic}" for language, topic in product(LANGUAGES, TOPICS))
FEW = {"draws": 40}


def make_trace(indices, *, weights=None, token_ids=None, domains=None, documents=None, positions=None, experts=None):
    """A trace of the given indices [L, N, K]; by default every token is a document, and nothing is labelled."""
    indices = np.asarray(indices, dtype=np.int16)
    layers, tokens, k = indices.shape
    experts = int(indices.max()) + 1 if experts is None else experts
    if weights is None:
        weights = np.where(indices < experts, np.linspace(1, 0.5, k), 0)

    def column(values, default):
        return np.asarray(default if values is None else values, dtype=np.int32)

    return SimpleNamespace(
        indices=indices,
        weights=np.broadcast_to(weights, indices.shape).astype(np.float32),
        token_ids=column(token_ids, np.zeros(tokens)),
        domains=column(domains, np.full(tokens, -1)).astype(np.int16),
        documents=column(documents, np.arange(tokens)),
        positions=column(positions, np.arange(tokens)),
        domain_names=DOMAINS,
        layers=tuple(range(layers)),
        num_experts=experts,
        model_id="synthetic",
    )


DOCUMENTS, LENGTH, VOCABULARY, EXPERTS = 80, 64, 16, 8


def planted(follows, seed=0, k=2):
    """A trace of 80 documents of 64 tokens whose experts are fixed by one thing alone, out of 8; nothing: by chance.

    Language, topic, token and position are independent of each other, and each takes its values equally often.
    """
    rng = np.random.default_rng(seed)
    documents = np.repeat(np.arange(DOCUMENTS), LENGTH)
    domains = documents % 4
    token_ids = np.concatenate([rng.permutation(LENGTH) % VOCABULARY for _ in range(DOCUMENTS)])
    positions = np.tile(np.arange(LENGTH), DOCUMENTS)
    followed = {
        "language": domains // 2,
        "topic": domains % 2,
        "token": token_ids,
        "position": np.log2(positions + 1).astype(int),
        "document": rng.permutation(DOCUMENTS)[documents],
    }
    if follows == "nothing":
        indices = rng.random((len(documents), EXPERTS)).argsort(1)[:, :k]
    else:
        indices = (followed[follows][:, None] * k + np.arange(k)) % EXPERTS
    columns = {"token_ids": token_ids, "domains": domains, "documents": documents, "positions": positions}
    return make_trace(indices[None], experts=EXPERTS, **columns)


@st.composite
def traces(draw, k=None, layers=2):
    """Small traces with empty slots, unlabelled tokens, unused experts, and weights that are alike, 0 or negative."""
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    experts = draw(st.integers(max(2, k or 2), 6))
    k = k or draw(st.integers(1, experts))
    tokens = draw(st.integers(8, 40))
    indices = np.argsort(rng.random((layers, tokens, experts)), axis=2)[:, :, :k]
    empty = rng.random(indices.shape) < draw(st.sampled_from([0, 0.3]))
    empty[:, :4] = False
    indices = np.where(empty, experts, indices)
    documents = np.sort(rng.integers(0, 5, tokens))
    documents[:4] = [0, 1, 2, 3]  # so that each domain has a document
    domains = np.where(rng.random(tokens) < 0.2, -1, documents % 4)
    domains[:4] = range(4)
    return make_trace(
        indices,
        weights=np.where(empty, 0, rng.integers(-1, 4, indices.shape) / 4),
        token_ids=rng.integers(0, 3, tokens),
        domains=domains,
        documents=documents,
        positions=np.arange(tokens) % 7,
        experts=experts,
    )


def chosen(trace, layer, token):
    """The set of experts of a token, the plain way."""
    return {int(expert) for expert in trace.indices[layer, token] if expert < trace.num_experts}


def first_choice(trace, layer, token):
    slots = zip(trace.weights[layer, token], trace.indices[layer, token], strict=True)
    filled = [(weight, expert) for weight, expert in slots if expert < trace.num_experts]
    return int(max(filled, key=lambda slot: slot[0])[1]) if filled else None


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


# --- plain loops ------------------------------------------------------------------------------------------


@given(traces())
def test_load_and_its_unevenness(trace):
    shares = sp.load(trace, **FEW)
    for layer in range(2):
        indices = torch.from_numpy(trace.indices[layer].astype(np.int64))
        load = balance.expert_load(indices, trace.num_experts)
        close(shares.value[layer], load.double() / load.sum())
        close(sp.max_violation(trace, **FEW).value[layer], balance.max_violation(load))
        p = [float(share) for share in load.double() / load.sum() if share > 0]
        close(sp.load_entropy(trace, **FEW).value[layer], -sum(x * log(x) for x in p) / log(trace.num_experts))
    close(shares.null, 1 / trace.num_experts)


@given(traces(), st.sampled_from(["domain", "language", "topic"]))
def test_domain_specialization_counts_tokens_whose_top_k_contains_the_expert(trace, of):
    label, names = sp.labels(trace, of)
    found = sp.domain_specialization(trace, of, **FEW)
    assert found.value.shape == found.null.shape == (2, len(names), trace.num_experts)
    for layer, domain, expert in np.ndindex(found.value.shape):
        tokens = [token for token in range(len(label)) if label[token] == domain]
        close(found.value[layer, domain, expert], np.mean([expert in chosen(trace, layer, token) for token in tokens]))
        labelled = [token for token in range(len(label)) if label[token] >= 0]
        close(found.null[layer, domain, expert], np.mean([expert in chosen(trace, layer, token) for token in labelled]))


@given(traces())
def test_vocabulary_specialization_counts_first_choices(trace):
    frequent = sp.frequent_tokens(trace, 2)
    found = sp.vocabulary_specialization(trace, min_count=2, **FEW)
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


@given(traces(), st.sampled_from(sp.LABELS), st.sampled_from([None, *sp.LABELS]))
def test_mutual_information_is_that_of_scikit_learn(trace, of, condition):
    label = sp.labels(trace, of).values
    given_values = np.zeros(len(label), dtype=int) if condition is None else sp.labels(trace, condition).values
    kept = (label >= 0) & (given_values >= 0)
    sets = [{frozenset(chosen(trace, layer, t)) for t in np.flatnonzero(kept)} - {frozenset()} for layer in range(2)]
    if of == condition or len(set(label[kept])) < 2 or min(map(len, sets)) == 1:
        with pytest.raises(ValueError, match="wanted"):
            sp.mutual_information(trace, of, condition, **FEW)
        return
    found = sp.mutual_information(trace, of, condition, **FEW)
    for layer in range(2):
        assert found.value[layer] == pytest.approx(slot_information(trace, layer, label, given_values), abs=1e-9)
        assert -1e-9 < found.value[layer] < 1 + 1e-9


@given(traces(k=3))
def test_co_activation_counts_all_pairs(trace):
    found = sp.co_activation(trace, **FEW).value
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
            sp.repetition(trace, choices, **FEW)
        return
    found = sp.repetition(trace, choices, **FEW)
    for layer in range(2):
        close(found.value[layer], np.mean(meet[layer]))
        sets = [best(layer, t) for t in range(len(trace.token_ids)) if best(layer, t)]
        close(found.null[layer], np.mean([bool(left & right) for left, right in product(sets, sets)]))


@given(traces(k=2), st.integers(0, 2**31))
def test_saturation_counts_common_experts(trace, seed):
    final = SimpleNamespace(**vars(trace))
    final.indices = np.random.default_rng(seed).permuted(trace.indices, axis=1)
    found = sp.router_saturation(trace, final, **FEW)
    tokens = range(len(trace.token_ids))
    for layer in range(2):
        slots = sum(len(chosen(final, layer, token)) for token in tokens)
        common = sum(len(chosen(trace, layer, token) & chosen(final, layer, token)) for token in tokens)
        close(found.value[layer], common / slots)
        anyhow = sum(len(chosen(trace, layer, a) & chosen(final, layer, b)) for a, b in product(tokens, tokens))
        assert found.null[layer] == pytest.approx(anyhow / len(tokens) / slots, rel=1e-5)
    close(sp.router_saturation(trace, trace, **FEW).value, 1)


@given(traces(k=2), st.integers(0, 2**31))
@settings(max_examples=10)
def test_agreement_is_the_best_over_all_renamings(trace, seed):
    other = SimpleNamespace(**vars(trace))
    other.indices = np.random.default_rng(seed).permuted(trace.indices, axis=1)
    found = sp.routing_agreement(trace, other, **FEW)
    tokens, experts = range(len(trace.token_ids)), trace.num_experts
    for layer in range(2):
        ours, theirs = ([chosen(t, layer, token) for token in tokens] for t in (trace, other))
        slots = (sum(map(len, ours)) + sum(map(len, theirs))) / 2

        def common(renamed, ours=ours, theirs=theirs):
            return sum(len({renamed[expert] for expert in a} & b) for a, b in zip(ours, theirs, strict=True))

        best = max(common(renamed) for renamed in permutations(range(experts)))
        close(found.value[layer], best / slots)
        assert common(sp.match_experts(trace, other)[layer].tolist()) == best


# --- routers whose answer is known ------------------------------------------------------------------------

FOLLOWED = ("language", "topic", "token", "position")


@pytest.mark.parametrize("follows", FOLLOWED)
@pytest.mark.parametrize("k", [1, 2])
def test_all_information_is_about_what_the_router_follows(follows, k):
    trace = planted(follows, k=k)
    for of in FOLLOWED:
        found = sp.mutual_information(trace, of)
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
            found = sp.mutual_information(trace, of, seed=seed)
            missed += not found.low <= found.null <= found.high
            assert found.value < 0.03
    assert missed <= 8


def test_tokens_that_belong_to_a_domain_are_not_domain_specialization():
    """The router follows the token alone, but each language has words of its own: given the token, nothing is left."""
    rng = np.random.default_rng(0)
    trace = planted("nothing")
    language = sp.labels(trace, "language").values
    trace.token_ids = (rng.integers(0, 8, len(language)) + 8 * language).astype(np.int32)
    trace.indices = (trace.token_ids[None, :, None] // 4).astype(np.int16)
    trace.weights = np.ones_like(trace.indices, dtype=np.float32)
    assert sp.mutual_information(trace, "language").value == pytest.approx(0.5, abs=0.01)  # ln 2 of ln 4
    assert sp.mutual_information(trace, "token").value == pytest.approx(1)
    nothing_left = sp.mutual_information(trace, "language", given="token")
    assert nothing_left.value == nothing_left.null == nothing_left.low == nothing_left.high == 0  # not 1e-17
    assert sp.mutual_information(trace, "token", given="language").value == pytest.approx(0.5, abs=0.01)


def test_shares_of_information_add_up():
    trace = planted("nothing")
    both = SimpleNamespace(**vars(trace))
    both.token_ids = trace.token_ids * 4 + trace.domains
    parts = sp.mutual_information(trace, "token").value + sp.mutual_information(trace, "domain", "token").value
    assert parts == pytest.approx(sp.mutual_information(both, "token").value)


@pytest.mark.parametrize("given_label", [None, "token"])
def test_a_router_that_follows_the_document_is_no_sign_of_domains(given_label):
    """Each document has an expert of its own. Permuting whole documents shows how far chance gets; shuffled tokens
    would show next to nothing, and make a finding out of it."""
    trace = planted("document", k=1)
    found = sp.mutual_information(trace, "domain", given_label, shuffles=100)
    assert found.low < found.null < found.high
    trace.documents = np.arange(len(trace.documents), dtype=np.int32)
    shuffled_tokens = sp.mutual_information(trace, "domain", given_label, shuffles=100)
    assert found.value == pytest.approx(shuffled_tokens.value)
    assert shuffled_tokens.null < found.null / (10 if given_label is None else 1.1)


@pytest.mark.parametrize("labels", [2, 4])
def test_the_null_of_token_information_is_the_known_bias(labels):
    """(labels - 1)(E - 1) / 2N nats for a router that follows nothing."""
    trace = planted("nothing", k=1)
    trace.token_ids = (np.arange(len(trace.token_ids)) % labels).astype(np.int32)
    found = sp.mutual_information(trace, "token", shuffles=300)
    wanted = (labels - 1) * (EXPERTS - 1) / (2 * len(trace.token_ids)) / log(EXPERTS)
    assert found.null == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("of", ["language", "topic"])
def test_domain_specialization_of_a_router_that_follows_domains(of):
    trace = planted(of)
    found = sp.domain_specialization(trace, of)
    close(found.value[0], [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]])
    close(found.null[0], [[0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0]] * 2)  # load-aware: far above K / E = .25
    other = sp.domain_specialization(trace, "topic" if of == "language" else "language")
    close(other.value, other.null)


def test_the_null_of_domains_is_what_permuting_labels_gives():
    trace = planted("topic")
    found = sp.domain_specialization(trace, "topic").null
    rng = np.random.default_rng(0)
    permuted = []
    for _ in range(400):
        trace.domains = np.repeat(rng.permutation(DOCUMENTS) % 4, LENGTH).astype(np.int16)
        permuted.append(sp.domain_specialization(trace, "topic", draws=1).value)
    np.testing.assert_allclose(np.mean(permuted, axis=0), found, atol=0.01)


# --- a label that the null keeps fixed --------------------------------------------------------------------


def mostly_language(topic_share, seed=0):
    """Half of the experts belong to each language; of those, a small share of the tokens go by topic, the rest and
    the taste of every document by chance."""
    trace = planted("nothing", seed, k=1)
    rng = np.random.default_rng([seed, 1])
    language, topic = (sp.labels(trace, of).values for of in ("language", "topic"))
    taste = rng.integers(4, size=DOCUMENTS)[trace.documents]
    within = np.where(rng.random(len(language)) < 0.05, taste, rng.integers(4, size=len(language)))
    within = np.where(rng.random(len(language)) < topic_share, topic, within)
    trace.indices = (4 * language + within)[None, :, None].astype(np.int16)
    return trace


def test_a_small_effect_is_found_when_the_null_keeps_the_large_one_fixed():
    trace = mostly_language(topic_share=0.12)
    hidden = sp.mutual_information(trace, "topic", shuffles=200)
    found = sp.mutual_information(trace, "topic", within="language", shuffles=200)
    assert found.value == hidden.value
    assert hidden.low < hidden.null
    assert found.low > found.null > 0
    hidden, found = (sp.domain_specialization(trace, "topic", within=within) for within in (None, "language"))
    assert not (hidden.low > hidden.null).any()
    above = (found.low > found.null)[0]
    assert above[[0, 0, 1, 1], [0, 4, 1, 5]].sum() >= 3 and not above[[0, 0, 1, 1], [1, 5, 0, 4]].any()


def test_the_null_is_right_where_there_is_no_small_effect():
    """Without one the value is a draw from the null, so that both agree on average, and seldom lies beyond it; the
    null that lets go of the language is several times too high."""
    seeds = range(30)
    traces_of = [mostly_language(topic_share=0, seed=seed) for seed in seeds]
    kept = [sp.mutual_information(trace, "topic", within="language") for trace in traces_of]
    value, null = (np.mean([getattr(found, field) for found in kept]) for field in ("value", "null"))
    assert value == pytest.approx(null, rel=0.15)
    assert sum((found.low > found.null).item() for found in kept) <= 5
    assert np.mean([sp.mutual_information(trace, "topic", draws=0).null for trace in traces_of]) > 2 * null


def uneven(trace):
    """Another number of documents for every pair of language and topic."""
    of_document = np.repeat(np.arange(4), [35, 10, 15, 20])
    trace.domains = of_document[trace.documents].astype(np.int16)
    return trace


def test_the_null_with_a_fixed_label_is_what_permuting_within_it_gives():
    trace = mostly_language(topic_share=0.3)
    indices = trace.indices
    trace = uneven(trace)
    shares = sp.domain_specialization(trace, "topic", within="language").null
    told = sp.mutual_information(trace, "topic", within="language", draws=0, shuffles=400).null
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
                sp.domain_specialization(permuted, "topic", draws=1).value,
                mutual_info_score(of_token, indices[0, :, 0])
                / mutual_info_score(np.arange(len(of_token)), indices[0, :, 0]),
            )
        )
    np.testing.assert_allclose(np.mean([each for each, _ in found], axis=0), shares, atol=0.005)
    assert np.mean([each for _, each in found]) == pytest.approx(told.item(), rel=0.1)


def test_resamples_keep_as_many_documents_of_every_pair():
    trace = uneven(planted("nothing"))
    _, weights = sp._resampled_documents(trace.documents, 50, 0, trace.domains)
    of_document = np.repeat(np.arange(4), [35, 10, 15, 20])
    assert (np.stack([weights[of_document == domain].sum(0) for domain in range(4)], 1) == [35, 10, 15, 20]).all()
    assert weights.shape == (80, 51) and (weights[:, 0] == 1).all() and (weights[:, 1:].std(1) > 0).all()
    alone = sp.mutual_information(planted_once_each(), "topic", within="language")
    assert np.isnan(alone.low).all() and not np.isnan(alone.value).any()


def planted_once_each():
    """One document for each pair of language and topic, so that nothing can be drawn again or change places."""
    trace = planted("nothing")
    for name in ("token_ids", "domains", "documents", "positions"):
        setattr(trace, name, getattr(trace, name)[: 4 * LENGTH])
    trace.indices, trace.weights = trace.indices[:, : 4 * LENGTH], trace.weights[:, : 4 * LENGTH]
    return trace


def test_vocabulary_specialization_of_a_router_that_follows_tokens():
    found = sp.vocabulary_specialization(planted("token"))
    close(found.value[0], np.eye(EXPERTS)[2 * np.arange(VOCABULARY) % EXPERTS])
    close(found.null[0], np.tile([0.25, 0] * 4, (VOCABULARY, 1)))
    by_chance = sp.vocabulary_specialization(planted("nothing"))
    inside = (by_chance.low <= by_chance.null) & (by_chance.null <= by_chance.high)
    assert inside.mean() > 0.9
    np.testing.assert_allclose(by_chance.value, 1 / EXPERTS, atol=0.1)


def test_repetition_of_known_routers():
    repeating = sp.repetition(planted("language"))
    assert repeating.value == pytest.approx(1) and repeating.null == pytest.approx(0.5)
    for choices, wanted in ((1, 1 / 8), (2, 0.464)):
        by_chance = sp.repetition(planted("nothing"), choices)
        assert by_chance.value == pytest.approx(wanted, abs=0.02)
        assert by_chance.null == pytest.approx(wanted, abs=0.005)


def test_imbalance_is_not_locality():
    """Independent tokens, 70 % of them at one expert: repetition is far above 1 / E and at its own null."""
    rng = np.random.default_rng(0)
    indices = rng.choice(8, p=[0.7, *[0.3 / 7] * 7], size=(1, 20_000, 1))
    found = sp.repetition(make_trace(indices, documents=np.repeat(np.arange(200), 100), positions=np.arange(20_000)))
    assert found.value > 3 * sp.chance_of_repetition(8)
    assert found.low < found.null < found.high


def test_chance_of_repetition():
    assert sp.chance_of_repetition(8) == pytest.approx(1 / 8)
    assert sp.chance_of_repetition(8, 2) == pytest.approx(1 - (6 / 8) * (5 / 7)) == pytest.approx(0.464, abs=5e-4)
    sets = list(combinations(range(5), 2))
    meet = [bool({*a} & {*b}) for a, b in product(sets, sets)]
    assert sp.chance_of_repetition(5, 2) == pytest.approx(np.mean(meet))
    assert sp.chance_of_repetition(3, 2) == 1


def test_first_choice_is_by_weight_whatever_the_order_of_slots():
    trace = planted("token")
    reversed_slots = SimpleNamespace(**vars(trace))
    reversed_slots.indices, reversed_slots.weights = trace.indices[..., ::-1], trace.weights[..., ::-1]
    for metric in (sp.vocabulary_specialization, sp.repetition):
        for ours, theirs in zip(metric(trace, **FEW), metric(reversed_slots, **FEW), strict=True):
            close(ours, theirs)


def test_renamed_experts_agree_and_strangers_do_not():
    trace = planted("nothing")
    renaming = np.random.default_rng(1).permutation(EXPERTS)
    renamed = SimpleNamespace(**vars(trace))
    renamed.indices = renaming[trace.indices].astype(np.int16)
    close(sp.match_experts(trace, renamed)[0], renaming)
    same = sp.routing_agreement(trace, renamed)
    close(same.value, 1)
    assert 2 / EXPERTS < same.null < 0.35
    renamed.indices = planted("nothing", seed=5).indices
    stranger = sp.routing_agreement(trace, renamed)
    assert stranger.null > 2 / EXPERTS  # matching finds something even here
    assert stranger.low <= stranger.null <= stranger.high


# --- what chance gives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("filled", [[0, 4, 0], [1, 2, 3], [0, 0, 50]])
def test_random_router_draws_sets_of_the_right_size_all_alike(filled):
    """Mean and covariance of the counts of a random router, against the sum over all sets."""
    experts = 4
    counts = sp._random_counts(np.array(filled), experts, 20_000, np.random.default_rng(0))
    assert (counts.sum(1) == np.dot(filled, range(len(filled)))).all()
    covariance = np.zeros((experts, experts))
    for k, tokens in enumerate(filled):
        sets = np.array([[e in s for e in range(experts)] for s in combinations(range(experts), k)], dtype=float)
        covariance += tokens * np.cov(sets.T, bias=True)
    np.testing.assert_allclose(counts.mean(0), counts.sum(1).mean() / experts, rtol=0.02)
    np.testing.assert_allclose(np.cov(counts.T), covariance, atol=0.05 * covariance.max())


@pytest.mark.parametrize("metric", [sp.max_violation, sp.load_entropy])
def test_a_random_router_is_as_uneven_as_the_null_says(metric):
    found = [metric(planted("nothing", seed), draws=2, seed=seed) for seed in range(60)]
    values, nulls = (np.array([getattr(one, name) for one in found]) for name in ("value", "null"))
    standard_error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - nulls.mean()) < 3 * standard_error


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pairs_of_the_most_random_router_against_all_sets(k):
    """Conditional Poisson by enumeration: inclusion and pair probabilities for weights that are given."""
    weights = np.array([3.0, 1.0, 1.0, 0.4, 0.05])
    sets = list(combinations(range(5), k))
    probability = np.array([weights[list(s)].prod() for s in sets])
    probability /= probability.sum()
    member = np.array([[e in s for e in range(5)] for s in sets], dtype=float)
    pairs = np.einsum("s,si,sj->ij", probability, member, member)
    found = sp._independent_pairs(np.diagonal(pairs), np.eye(k + 1)[k])
    off = ~np.eye(5, dtype=bool)
    np.testing.assert_allclose(found[off], pairs[off], atol=1e-7)


@pytest.mark.parametrize(
    "inclusion, sizes",
    [
        ([1.0, 0.5, 0.5, 0.0], [0, 0, 1]),
        ([0.9, 0.6, 0.3, 0.2], [0, 0, 1]),
        ([0.5, 0.4, 0.3, 0.3], [0.2, 0.3, 0.3, 0.2]),
        ([1.0, 1.0, 1.0, 1.0], [0, 0, 0, 0, 1]),
        ([1e-4, 0.9999, 0.5, 0.5], [0, 0, 1]),
    ],
)
def test_pairs_have_the_load_they_are_given(inclusion, sizes):
    """Summed over all partners, N_ij is the mean number of partners: sum_ij p_ij = sum_k sizes[k] k (k - 1)."""
    inclusion, sizes = np.array(inclusion), np.array(sizes)
    pairs = sp._independent_pairs(inclusion, sizes)
    np.fill_diagonal(pairs, 0)
    k = np.arange(len(sizes))
    assert pairs.sum() == pytest.approx(sizes @ (k * (k - 1)), abs=1e-6)
    assert (pairs <= np.minimum.outer(inclusion, inclusion) + 1e-6).all()
    if (sizes == 1).any():
        np.testing.assert_allclose(pairs.sum(1), inclusion * (k[sizes == 1][0] - 1), atol=1e-6)


def test_co_activation_tells_pairs_from_chance():
    off, inside = ~np.eye(EXPERTS, dtype=bool), []
    for seed in range(10):
        by_chance = sp.co_activation(planted("nothing", seed), seed=seed)
        close(np.isnan(by_chance.null[0]), ~off)
        np.testing.assert_allclose(by_chance.null[0][off], 1 / 7, atol=0.02)
        inside.append(((by_chance.low <= by_chance.null) & (by_chance.null <= by_chance.high))[0][off])
    assert 0.9 < np.mean(inside) < 0.99
    pairs = sp.co_activation(planted("token"))  # experts 2i and 2i + 1 always together
    together = np.kron(np.eye(4), np.ones((2, 2)))
    close(pairs.value[0][off], together[off])
    np.testing.assert_allclose(pairs.null[0][off], 1 / 7, atol=1e-6)


# --- the interval -----------------------------------------------------------------------------------------


def test_interval_covers_the_truth_when_documents_differ():
    """Documents whose tokens are all alike: 95 % of the intervals hold the true share. Tokens as units would hold it in
    a third of the cases, for they would be 4 times too narrow."""
    held, widths = 0, []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        indices = np.repeat(rng.random(60) < 0.3, 16).astype(int)[None, :, None]
        found = sp.load(make_trace(indices, documents=np.repeat(np.arange(60), 16), experts=2), seed=seed)
        held += found.low[0, 1] <= 0.3 <= found.high[0, 1]
        widths.append(found.high[0, 1] - found.low[0, 1])
    assert 0.89 < held / 200 < 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 60) ** 0.5, rel=0.1)


def test_interval_is_the_percentile_bootstrap_with_its_mean_at_the_value():
    statistics = np.random.default_rng(0).exponential(size=(201, 3))
    found = sp._measured(statistics, 0.0)
    drawn = statistics[1:]
    for name, share in (("low", 0.025), ("high", 0.975)):
        close(getattr(found, name), np.quantile(drawn, share, axis=0) - drawn.mean(0) + statistics[0])


def test_draws_without_a_group_are_left_out_of_its_interval():
    statistics = np.random.default_rng(0).random((101, 2))
    statistics[1:51, 1] = np.nan
    found = sp._measured(statistics, 0.0)
    drawn = statistics[51:, 1]
    close(found.high[1], np.quantile(drawn, 0.975) - drawn.mean() + statistics[0, 1])


def test_same_seed_same_numbers_another_seed_another_interval():
    trace = planted("nothing")
    first, again, other = (sp.mutual_information(trace, "language", seed=seed, **FEW) for seed in (3, 3, 4))
    for ours, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    close(first.value, other.value)
    assert first.low != other.low and first.null != other.null


def test_large_tables_are_resampled_in_parts(monkeypatch):
    trace = planted("nothing")
    whole = sp.mutual_information(trace, "domain", "token")
    monkeypatch.setattr(sp, "LARGEST_TABLE", 5000)
    for ours, theirs in zip(whole, sp.mutual_information(trace, "domain", "token"), strict=True):
        close(ours, theirs)


# --- edges ------------------------------------------------------------------------------------------------


def test_one_document_has_values_and_nulls_but_no_intervals():
    trace = planted("nothing")
    trace.documents = np.zeros_like(trace.documents)
    for found in (
        sp.load(trace),
        sp.max_violation(trace),
        sp.mutual_information(trace, "token"),
        sp.co_activation(trace),
        sp.repetition(trace),
        sp.router_saturation(trace, trace),
        sp.routing_agreement(trace, trace),
        sp.vocabulary_specialization(trace),
    ):
        defined = ~np.eye(EXPERTS, dtype=bool) if found.value.shape == (1, EXPERTS, EXPERTS) else ...
        assert np.isfinite(found.value[0][defined]).all() and np.isfinite(found.null[0][defined]).all()
        assert np.isnan(found.low).all() and np.isnan(found.high).all()


def test_a_domain_of_one_document_has_no_interval_of_its_own():
    trace = planted("nothing")
    trace.domains = np.where(trace.documents == 0, 0, 1 + trace.documents % 3).astype(np.int16)
    found = sp.domain_specialization(trace)
    assert np.isnan(found.low[0, 0]).all() and np.isfinite(found.low[0, 1:]).all()


def test_every_token_at_every_expert():
    trace = make_trace([[[0, 1, 2]] * 6], domains=[0, 0, 1, 1, 2, 3], token_ids=[0, 1] * 3, experts=3)
    close(sp.load(trace).value, 1 / 3)
    close(sp.max_violation(trace).null, 0)
    off = ~np.eye(3, dtype=bool)
    close(sp.co_activation(trace).value[0][off], 1)
    np.testing.assert_allclose(sp.co_activation(trace).null[0][off], 1, atol=1e-6)
    with pytest.raises(ValueError, match="layer 0: found every token at the same 3 of 3 experts"):
        sp.mutual_information(trace, "token")


def test_labels_of_the_planted_corpus_split_at_the_slash():
    trace = make_trace([[[0]] * 6], domains=[0, 1, 2, 3, 4, -1], positions=[0, 1, 2, 3, 6, 7], experts=2)
    trace.domain_names = (*DOMAINS, "code")
    assert sp.labels(trace, "language").names == LANGUAGES
    assert sp.labels(trace, "language").values.tolist() == [0, 0, 1, 1, -1, -1]
    assert sp.labels(trace, "topic").names == TOPICS
    assert sp.labels(trace, "topic").values.tolist() == [0, 1, 0, 1, -1, -1]
    assert sp.labels(trace, "position").values.tolist() == [0, 1, 1, 2, 2, 3]
    assert sp.labels(trace, "position").names == ("0", "1-2", "3-6", "7-14")


def test_unlabelled_tokens_change_nothing():
    trace = planted("language")
    mixed = planted("language")
    mixed.indices = np.concatenate([trace.indices, planted("nothing").indices], axis=1)
    for name in ("token_ids", "domains", "documents", "positions"):
        column = getattr(trace, name)
        other = np.full_like(column, -1) if name == "domains" else column
        setattr(mixed, name, np.concatenate([column, other + 1000 if name == "documents" else other]))
    for metric in (sp.domain_specialization, sp.mutual_information):
        for ours, theirs in zip(metric(trace, "language"), metric(mixed, "language"), strict=True):
            close(ours, theirs)


@pytest.mark.parametrize(
    "change, call, message",
    [
        ({}, lambda t: sp.mutual_information(t, "sense"), "label 'sense': wanted one of domain, language"),
        ({}, lambda t: sp.mutual_information(t, "token", "token"), "given='token': wanted another label"),
        (
            {},
            lambda t: sp.mutual_information(t, "topic", within="topic"),
            "within='topic': wanted one of domain, language, to keep fixed while topic is measured",
        ),
        (
            {},
            lambda t: sp.domain_specialization(t, "topic", within="token"),
            "within='token': wanted one of domain, language",
        ),
        (
            {},
            lambda t: sp.mutual_information(t, "token", within="language"),
            "within='language' with token: wanted one of domain, language, topic to measure",
        ),
        (
            {"documents": np.arange(5120) // 128 + 7, "domains": np.repeat(np.arange(80) % 2 * 2, 64)},
            lambda t: sp.mutual_information(t, "topic", within="language"),
            r"topic: found 1 among",
        ),
        ({}, lambda t: sp.domain_specialization(t, "token"), "label 'token': wanted one of domain, language, topic"),
        ({"domain_names": ("a", "b", "c", "d")}, lambda t: sp.labels(t, "topic"), "wanted some named 'language/topic'"),
        (
            {"domain_names": (*DOMAINS, "code")},
            sp.domain_specialization,
            "domain 'code': found no token of it in the trace",
        ),
        (
            {"domains": np.zeros(5120, dtype=np.int16)},
            lambda t: sp.mutual_information(t, "domain"),
            r"domain: found 1 among the labelled tokens \['english/kitchen'\], wanted at least 2",
        ),
        (
            {"domains": np.full(5120, -1, dtype=np.int16)},
            lambda t: sp.mutual_information(t, "language"),
            r"language: found 0 among the labelled tokens \[\], wanted at least 2",
        ),
        (
            {"domain_names": ("a/b",), "domains": np.zeros(5120, dtype=np.int16)},
            sp.domain_specialization,
            "domain: found 1 among",
        ),
        (
            {"documents": np.arange(5120) // 128 + 7},
            sp.domain_specialization,
            "document 7: found two labels of domain, wanted one a document",
        ),
        ({"indices": np.full((1, 5120, 2), 8)}, sp.load, "layer 0: found 5120 tokens and no expert chosen"),
        ({"indices": np.zeros((1, 5120, 1), int)}, sp.co_activation, "layer 0: found 1 experts per token at most"),
        ({"num_experts": 1}, sp.load_entropy, "num_experts=1: wanted at least 2"),
        ({}, lambda t: sp.repetition(t, 3), "choices=3: wanted 1, or 2"),
        (
            {"indices": np.zeros((1, 5120, 1), int)},
            lambda t: sp.repetition(t, 2),
            r"choices=2: wanted 1, or 2 where a token has two \(1 here\)",
        ),
        ({"documents": np.arange(5120)}, sp.repetition, "found no two consecutive tokens of one document"),
        (
            {},
            lambda t: sp.vocabulary_specialization(t, min_count=9999),
            "min_count=9999: wanted at most 320, that of the commonest token",
        ),
        ({"num_experts": 9}, lambda t: sp.routing_agreement(planted("token"), t), "num_experts: found 9"),
        ({"layers": (3,)}, lambda t: sp.match_experts(planted("token"), t), r"layers: found \(3,\) in the second"),
        (
            {"token_ids": np.zeros(5120, dtype=np.int32)},
            lambda t: sp.router_saturation(planted("token"), t),
            r"token_ids\[\d+\]: found 0 in the second trace, wanted \d+ as in the first \(4800 of 5120 differ\)",
        ),
        (
            {"token_ids": np.zeros(7, dtype=np.int32)},
            lambda t: sp.router_saturation(planted("token"), t),
            "tokens: found 7 in the second trace, wanted 5120",
        ),
    ],
)
def test_what_is_undefined_is_said(change, call, message):
    trace = planted("token")
    vars(trace).update(change)
    with pytest.raises(ValueError, match=message):
        call(trace)


# --- ablation ---------------------------------------------------------------------------------------------


def tiny_model(**changes):
    shape = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "initializer_range": 0.5}
    return MoEForCausalLM(MoEConfig(**(shape | settings | changes)))


def make_batches(domains=((0, 1, 0), (1, 1, -1)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(12, (len(row), 10), generator=generator), torch.tensor(row)) for row in domains]


def test_ablation_is_the_loss_of_a_model_whose_expert_returns_zero():
    """The same thing done to the weights: an expert with a zero down projection adds nothing."""
    model, batches = tiny_model(), make_batches()
    found = sp.ablate(model, batches, ("a", "b"))

    def losses():
        return [
            [
                float(model(row[None], labels=row[None]).cross_entropy)
                for ids, domains in batches
                for row, domain in zip(ids, domains, strict=True)
                if domain == wanted
            ]
            for wanted in (0, 1)
        ]

    with torch.no_grad():
        intact = losses()
        for layer, expert in product(range(2), range(3)):
            down = model.model.layers[layer].mlp.experts.down_proj
            kept = down[expert].clone()
            down[expert] = 0
            for domain, (before, after) in enumerate(zip(intact, losses(), strict=True)):
                assert found.value[layer, expert, domain] == pytest.approx(np.mean(after) - np.mean(before), abs=1e-4)
            down[expert] = kept
    assert found.value.shape == (2, 3, 2) and (abs(found.value) > 1e-3).all()
    close(found.null, np.broadcast_to(found.value.mean(1, keepdims=True), found.null.shape))
    assert (found.low <= found.value).all() and (found.value <= found.high).all()


def test_slots_of_a_removed_expert_are_empty_and_the_others_as_before():
    """Not renormalised, and no expert takes the place."""
    gate = tiny_model().model.layers[0].mlp.gate
    x = torch.randn(30, 16)
    before = gate(x, None)
    with sp._without(gate, 1):
        during = gate(x, None)
    removed = before.indices == 1
    assert removed.any()
    torch.testing.assert_close(during.indices, before.indices.where(~removed, 3))
    torch.testing.assert_close(during.weights, before.weights * ~removed)
    torch.testing.assert_close(gate(x, None), before)


@pytest.mark.parametrize("training", [True, False])
def test_ablation_leaves_the_model_as_it_was(training):
    model, batches = tiny_model(router="noisy_topk"), make_batches()
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sp.ablate(model, batches, ("a", "b"))
    assert model.training == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_ablation_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model().train()
    calls = []

    def fail(logits, ids):
        calls.append(ids)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return logits.mean((1, 2))

    monkeypatch.setattr(sp, "_losses", fail)
    with pytest.raises(KeyboardInterrupt):
        sp.ablate(model, make_batches(), ("a", "b"))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_an_expert_that_nobody_chooses_costs_nothing(router_settings):
    """With every kind of router; hash routing of one token id leaves some experts without a token."""
    model = tiny_model(**router_settings | {"num_experts": 6}).eval()
    batches = make_batches()
    found = sp.ablate(model, batches, ("a", "b"))
    used = np.zeros((2, 6), dtype=bool)
    for ids, _ in batches:
        for layer, output in enumerate(model(ids, output_router_logits=True).router_outputs):
            used[layer, output.indices[output.indices < 6].unique()] = True
    close(found.value[~used], 0)
    assert (found.value[used] != 0).any()


def test_a_domain_of_one_sequence_has_no_interval():
    found = sp.ablate(tiny_model(), make_batches(((0, 1, 1),)), ("a", "b"))
    assert np.isnan(found.low[..., 0]).all() and np.isfinite(found.low[..., 1]).all()


@pytest.mark.parametrize(
    "model, batches, names, message",
    [
        ({"num_experts": 0, "intermediate_size": 8}, make_batches(), ("a", "b"), "found a dense model"),
        ({}, make_batches(), ("a", "b", "c"), "domain 'c': found no sequence of it in the batches"),
        ({}, [], ("a",), "domain 'a': found no sequence"),
        ({}, make_batches(), ("a",), "domain 1: wanted less than 1, the number of domain_names"),
    ],
)
def test_ablation_says_what_is_missing(model, batches, names, message):
    with pytest.raises(ValueError, match=message):
        sp.ablate(tiny_model(**model), batches, names)
