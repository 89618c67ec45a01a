"""Every metric of `minimoe.inspection` on a million routed tokens; and mutual information against scikit-learn's.

    python -m benchmarks.inspection [--rounds N] [--threads 1 2] [--json FILE]

First all metrics with their default number of resamples: the limit is 10 seconds on
one thread. Then one of them in turns with its peer. Both compute the information between expert and token on the trace,
on resamples of its documents and under shuffled labels: ours from counts per document, the peer by calling
`sklearn.metrics.mutual_info_score` on the tokens of every resample, each of whose values is asserted to agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import mutual_info_score
from threadpoolctl import threadpool_limits

from benchmarks.timing import Target, finish, measure, parse_arguments, report, torch_threads
from minimoe.inspection import metrics
from minimoe.inspection.nulls import Measured, Resamples
from minimoe.inspection.trace import RoutingTrace

OURS = "minimoe counts per document"
PEER = "scikit-learn mutual_info_score"
LIMIT = 10.0  # seconds, for all metrics
LANGUAGES, TOPICS = ("english", "french", "german", "spanish"), ("kitchen", "weather", "harbour", "market")
DOMAINS = (*(f"{language}/{topic}" for language in LANGUAGES for topic in TOPICS), "code", "arithmetic")


class Size(NamedTuple):
    layers: int  # L
    tokens: int  # T, in every layer
    experts: int  # E
    k: int  # K
    documents: int


# A million routed tokens, layers * tokens * k: few experts as in the course, many as in OLMoE.
SIZES = (Size(4, 125_000, 8, 2, 1000), Size(4, 31_250, 64, 8, 250))
PEER_SIZE = Size(1, 62_500, 8, 1, 500)
PEER_DRAWS, PEER_SHUFFLES = 20, 5


def make_trace(size: Size, router: int = 0) -> RoutingTrace:
    """Words as frequent as words are, and a router that prefers some experts for each of them and for each domain.

    Another `router` sends the same text elsewhere.
    """
    rng = np.random.default_rng(0)
    layers, tokens, experts, k, documents = size
    document = np.sort(rng.integers(documents, size=tokens)).astype(np.int32)
    domains = (document % len(DOMAINS)).astype(np.int16)
    words = (rng.zipf(1.3, tokens) % 1024).astype(np.int32)
    rng = np.random.default_rng([1, router])
    likes = rng.normal(size=(layers, 1024, experts))[:, words] + rng.normal(size=(layers, 18, experts))[:, domains]
    likes += rng.gumbel(size=likes.shape)
    indices = likes.argsort(2)[:, :, : -k - 1 : -1].astype(np.int16)
    weights = np.broadcast_to(np.linspace(1, 0.5, k, dtype=np.float32), indices.shape)
    starts = np.searchsorted(document, np.arange(documents))
    return RoutingTrace(
        indices=indices,
        weights=weights / weights.sum(2, keepdims=True),
        token_ids=words,
        domains=domains,
        documents=document,
        positions=(np.arange(tokens) - starts[document]).astype(np.int32),
        domain_names=DOMAINS,
        layers=tuple(range(layers)),
        num_experts=experts,
        model_id="synthetic",
    )


def calls_of_all(trace: RoutingTrace, other: RoutingTrace) -> dict[str, Callable[[], Measured]]:
    """Every metric that needs no model, on `trace`; those between two traces with `other`."""
    found: dict[str, Callable[[], Measured]] = {
        "load": lambda: metrics.load(trace),
        "max_violation": lambda: metrics.max_violation(trace),
        "load_entropy": lambda: metrics.load_entropy(trace),
        "domain_specialization": lambda: metrics.domain_specialization(trace),
        "vocabulary_specialization": lambda: metrics.vocabulary_specialization(trace),
        "mutual_information, domain given token": lambda: metrics.mutual_information(trace, "domain", "token"),
        "co_activation": lambda: metrics.co_activation(trace),
        "router_saturation": lambda: metrics.router_saturation(trace, other),
        "repetition": lambda: metrics.repetition(trace),
        "repetition, first or second": lambda: metrics.repetition(trace, 2),
        "matched_agreement": lambda: metrics.matched_agreement(trace, other),
    }
    for of in ("domain", "language", "topic", "token", "position"):
        found[f"mutual_information, {of}"] = lambda of=of: metrics.mutual_information(trace, of)
    return found


def time_all(size: Size, rounds: int) -> dict[str, Any]:
    """Seconds of every metric in every round, and whether the median of their sums is below the limit."""
    calls = calls_of_all(make_trace(size), make_trace(size, router=1))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    total = float(np.median(np.sum(list(seconds.values()), axis=0)))
    return {"seconds": seconds, "median_total": total, "limit": LIMIT, "reached": total < LIMIT}


def print_all(size: Size, threads: int, result: dict[str, Any]) -> None:
    """A table of the medians, their sum and whether it keeps the limit."""
    routed = size.layers * size.tokens * size.k
    print(
        f"\n{routed:,} routed tokens: L {size.layers}, T {size.tokens}, E {size.experts}, K {size.k}, threads {threads}"
    )
    for name, times in result["seconds"].items():
        print(f"{name:40} {np.median(times):8.3f} s")
    mark = "reached" if result["reached"] else "NOT REACHED"
    print(f"{'all of them':40} {result['median_total']:8.3f} s   {mark}: wanted below {LIMIT:.0f} s")


def peers(trace: RoutingTrace) -> dict[str, Callable[[], Measured]]:
    """The share of the first layer's routing (K = 1) that the token accounts for, measured in both ways."""
    experts, documents = trace.indices[0, :, 0].astype(np.int64), trace.documents
    resamples = Resamples.draw(documents, PEER_DRAWS, seed=0).weights
    orders = [np.random.default_rng(seed).permutation(len(experts)) for seed in range(PEER_SHUFFLES)]

    def explained(words: np.ndarray, experts: np.ndarray) -> float:
        shares = np.bincount(experts) / len(experts)
        return mutual_info_score(words, experts) / -(shares * np.log(shares)).sum()

    def theirs() -> Measured:
        drawn = [np.repeat(np.arange(len(experts)), times[documents].astype(int)) for times in resamples.T]
        found = [explained(trace.token_ids[tokens], experts[tokens]) for tokens in drawn]
        null = np.mean([explained(trace.token_ids[order], experts) for order in orders])
        low, high = np.quantile(found[1:], [0.025, 0.975]) + found[0] - np.mean(found[1:])
        return Measured(*(np.array([number]) for number in (found[0], null, low, high)))

    def ours() -> Measured:
        return metrics.mutual_information(trace, "token", draws=PEER_DRAWS, shuffles=PEER_SHUFFLES)

    return {OURS: ours, PEER: theirs}


def assert_same_results(calls: dict[str, Callable[[], Measured]]) -> None:
    """Both ways must agree on value and interval, and within 5 % on the null, for which each shuffles by itself.

    Raises:
        AssertionError: naming the number.
    """
    ours, theirs = (call() for call in calls.values())
    for name, found, wanted in zip(Measured._fields, ours, theirs, strict=True):
        tolerance = 0.05 if name == "null" else 1e-6
        np.testing.assert_allclose(found, wanted, rtol=tolerance, err_msg=name)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with the given command line; None: that of the process."""
    arguments = parse_arguments("Time the metrics of routing traces.", argv, rounds=5)
    results: list[dict[str, Any]] = []
    calls = peers(make_trace(PEER_SIZE))
    assert_same_results(calls)
    for threads in arguments.threads:
        with threadpool_limits(threads), torch_threads(threads):
            for size in SIZES:
                result = time_all(size, arguments.rounds)
                print_all(size, threads, result)
                results.append({"size": size._asdict(), "threads": threads} | result)
            seconds = measure(calls, arguments.rounds)
        title = f"mutual_information, token: T {PEER_SIZE.tokens}, {PEER_DRAWS} resamples, {PEER_SHUFFLES} shuffles"
        result = report(f"{title}, threads {threads}", seconds, OURS, [Target(PEER, 4.0)])
        results.append({"size": PEER_SIZE._asdict(), "threads": threads} | result)
    finish("inspection", results, arguments.json)


if __name__ == "__main__":
    main()
