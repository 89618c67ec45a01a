"""Traces that tests share: of given indices, of routers whose answer is known, and any."""

from itertools import product
from types import SimpleNamespace

import numpy as np
from hypothesis import strategies as st

LANGUAGES, TOPICS = ("english", "french"), ("kitchen", "harbour")
DOMAINS = tuple(f"{language}/{topic}" for language, topic in product(LANGUAGES, TOPICS))


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


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def uneven(trace):
    """Another number of documents for every pair of language and topic."""
    of_document = np.repeat(np.arange(4), [35, 10, 15, 20])
    trace.domains = of_document[trace.documents].astype(np.int16)
    return trace
