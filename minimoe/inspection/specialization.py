"""Do the experts specialise? Every metric with what chance would give, and with an interval.

    metric                       what is counted                                              value has shape
    load                         share of the routed tokens that each expert receives         [L, E]
    max_violation, load_entropy  how uneven these shares are                                  [L]
    domain_specialization        share of a domain's tokens whose top-k contains an expert    [L, domains, E]
    vocabulary_specialization    share of a token's occurrences whose first choice it is      [L, tokens, E]
    mutual_information           share of all routing that a label accounts for               [L]
    co_activation                share of an expert's tokens that also go to another          [L, E, E]
    router_saturation            share of the final choices already made                      [L]
    repetition                   how often consecutive tokens get the same first choice       [L]
    routing_agreement            share of choices that two models have in common              [L]
    ablate                       nats lost, by domain, when an expert is removed              [L, E, domains]

Shapes: L sparse layers, E experts, K experts per token, T tokens, N = T * K routed tokens. A `trace` is a
`RoutingTrace`, or whatever has its attributes; an index E is an empty slot and counts for nobody. Intervals come from
counts per document, which are made once: no draw walks over the tokens again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import comb
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.model.moe import MoELayer
from minimoe.model.routing import RouterOutput
from minimoe.model.transformer import MoEForCausalLM

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from minimoe.inspection.trace import RoutingTrace

LEVEL = 0.95  # of every interval
DOCUMENT_LABELS = ("domain", "language", "topic")
LABELS = (*DOCUMENT_LABELS, "token", "position")
LARGEST_TABLE = 2**20  # numbers held at once while resampling: 8 MiB, so that they stay near the processor


class Measured(NamedTuple):
    """A measurement, what chance would give, and how far it depends on the documents at hand.

    value: from the trace as it is. null: the expectation if the router ignored what is measured; each metric
    says how it is found. low, high: a 95 % interval for the value, from resampling **documents** with replacement,
    since the tokens of one document are not independent; NaN where there are fewer than two. The resampled values are
    shifted so that their mean is the value: a resample is more uneven than its sample, which biases largest shares,
    entropies and mutual information (Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 10).

    All four have the same shape. To read: a value is more than chance when its whole interval is above the null.
    """

    value: np.ndarray
    null: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Labels(NamedTuple):
    """One label per token."""

    values: np.ndarray  # [T] int64; -1: none
    names: tuple[str, ...]  # of the labels 0, 1, ...; empty for token ids, which name themselves


# --- labels -----------------------------------------------------------------------------------------------


def labels(trace: RoutingTrace, of: str) -> Labels:
    """What each token is labelled with.

    Args:
        trace: of T tokens.
        of: "domain"; "language" or "topic", the two halves of domains named "language/topic" (other domains have
            neither); "token", its id; "position", its place in the sequence, in buckets that double: 0, 1-2, 3-6...

    Raises:
        ValueError: `of` is unknown, or no domain is named "language/topic".
    """
    if of not in LABELS:
        raise ValueError(f"label {of!r}: wanted one of {', '.join(LABELS)}")
    if of == "token":
        return Labels(np.asarray(trace.token_ids, dtype=np.int64), ())
    if of == "position":
        buckets = np.log2(np.asarray(trace.positions) + 1).astype(np.int64)
        starts = [2**bucket - 1 for bucket in range(buckets.max(initial=-1) + 1)]
        return Labels(buckets, tuple(f"{start}-{2 * start}" if start else "0" for start in starts))
    domains = np.asarray(trace.domains, dtype=np.int64)
    if of == "domain":
        return Labels(domains, tuple(trace.domain_names))
    halves = [name.split("/") for name in trace.domain_names]
    half = ("language", "topic").index(of)
    parts = [pair[half] if len(pair) == 2 else None for pair in halves]
    names = tuple(dict.fromkeys(part for part in parts if part is not None))
    if not names:
        raise ValueError(f"{of}: found domains {list(trace.domain_names)}, wanted some named 'language/topic'")
    of_domain = np.array([-1 if part is None else names.index(part) for part in parts] + [-1])
    return Labels(of_domain[domains], names)  # a domain of -1 finds the last entry


def frequent_tokens(trace: RoutingTrace, min_count: int = 10) -> np.ndarray:
    """Ids of the tokens that occur at least `min_count` times, ascending: the rows of `vocabulary_specialization`."""
    ids, counts = np.unique(trace.token_ids, return_counts=True)
    return ids[counts >= min_count]


def _labelled(trace: RoutingTrace, label: np.ndarray, of: str, fewest: int = 2) -> np.ndarray:
    """Which tokens have a label, [T] bool. Raises ValueError for fewer than so many labels, or two in one document."""
    kept = label >= 0
    found = np.unique(label[kept])
    if len(found) < fewest:
        names = labels(trace, of).names
        shown = [names[index] if names else int(index) for index in found]
        raise ValueError(f"{of}: found {len(found)} among the labelled tokens {shown}, wanted at least {fewest}")
    if of in DOCUMENT_LABELS:
        ids, first, numbered = np.unique(trace.documents[kept], return_index=True, return_inverse=True)
        other = np.flatnonzero(label[kept] != label[kept][first][numbered])
        if len(other):
            raise ValueError(f"document {ids[numbered[other[0]]]}: found two labels of {of}, wanted one a document")
    return kept


# --- load -------------------------------------------------------------------------------------------------


def load(trace: RoutingTrace, *, draws: int = 200, seed: int = 0) -> Measured:
    """Share of the routed tokens that each expert receives, [L, E]; the null is 1 / E.

    Args:
        trace: what to measure.
        draws: resamples of the documents.
        seed: of the draws.

    Raises:
        ValueError: a layer routed no token.
    """
    shares = _resampled_load(trace, draws, seed)
    return _stack(_measured(layer, np.full(trace.num_experts, 1 / trace.num_experts)) for layer in shares)


def max_violation(trace: RoutingTrace, *, draws: int = 200, shuffles: int = 200, seed: int = 0) -> Measured:
    """MaxVio = max_i n_i / mean(n) - 1, [L]: 0 when balanced, E / K - 1 at worst.

    Source: Wang et al. 2024, arXiv 2408.15664; the same as `minimoe.model.balance.max_violation`. The null is its
    mean when each token draws its experts at random: not 0, since even then some expert gets the most.

    Args:
        trace: what to measure.
        draws: resamples of the documents.
        shuffles: draws of a random router.
        seed: of both.

    Raises:
        ValueError: a layer routed no token.
    """
    return _unevenness(trace, lambda share: share.max(-1) * share.shape[-1] - 1, draws, shuffles, seed)


def load_entropy(trace: RoutingTrace, *, draws: int = 200, shuffles: int = 200, seed: int = 0) -> Measured:
    """- sum_i p_i ln p_i / ln E of the shares p of `load`, [L]: 1 when balanced, 0 when one expert takes all.

    The null is its mean when each token draws its experts at random. Arguments as in `max_violation`.

    Raises:
        ValueError: there is only one expert, or a layer routed no token.
    """
    if trace.num_experts < 2:
        raise ValueError(f"num_experts={trace.num_experts}: wanted at least 2 for an entropy of their load")
    return _unevenness(trace, lambda share: -_x_log_x(share).sum(-1) / np.log(share.shape[-1]), draws, shuffles, seed)


def _unevenness(
    trace: RoutingTrace, statistic: Callable[[np.ndarray], np.ndarray], draws: int, shuffles: int, seed: int
) -> Measured:
    rng = np.random.default_rng([seed, 1])
    measured = []
    for indices, share in zip(trace.indices, _resampled_load(trace, draws, seed), strict=True):
        filled = np.bincount((indices < trace.num_experts).sum(1), minlength=trace.indices.shape[2] + 1)
        random = _random_counts(filled, trace.num_experts, shuffles, rng)
        null = statistic(random / random.sum(1, keepdims=True)).mean()
        measured.append(_measured(statistic(share), null))
    return _stack(measured)


def _resampled_load(trace: RoutingTrace, draws: int, seed: int) -> list[np.ndarray]:
    """For each layer the shares of the experts, [1 + draws, E], the first of them as they are."""
    documents, weights = _resampled_documents(trace.documents, draws, seed)
    shares = []
    for layer, indices in zip(trace.layers, trace.indices, strict=True):
        token, expert = _filled(indices, trace.num_experts, layer)
        counts = _by_document(expert, documents[token], trace.num_experts, len(weights)) @ weights
        shares.append((counts / counts.sum(0)).T)
    return shares


def _random_counts(filled: np.ndarray, experts: int, shuffles: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens per expert, [shuffles, E], when each of filled[k] tokens draws k of the experts, all sets alike.

    Expert by expert: of the tokens with j places left and m experts to come, each takes this one with probability
    j / m (selection sampling; Knuth, The Art of Computer Programming, volume 2, section 3.4.2).
    """
    places = np.arange(len(filled))
    waiting = np.tile(filled, (shuffles, 1))  # [shuffles, places left]
    counts = np.empty((shuffles, experts))
    for expert in range(experts):
        taken = rng.binomial(waiting, np.minimum(1, places / (experts - expert)))
        counts[:, expert] = taken.sum(1)
        waiting = waiting - taken
        waiting[:, :-1] += taken[:, 1:]
    return counts


# --- domains and words ------------------------------------------------------------------------------------


def domain_specialization(
    trace: RoutingTrace, of: str = "domain", *, within: str | None = None, draws: int = 200, seed: int = 0
) -> Measured:
    """Share of a domain's tokens whose top-k contains the expert, [L, domains, E]; over the experts it sums to K.

    Source: OLMoE (Muennighoff et al. 2024, arXiv 2409.02060, section 5). A balanced router that ignores the domain
    gives K / E everywhere. The null knows the load as well: the share of all labelled tokens that go to the expert,
    which is what permuting the labels among equally long documents gives on average. So an expert that is merely
    busy is above K / E, but not above its null. Unlabelled tokens are left out.

    Args:
        trace: what to measure.
        of: "domain", "language" or "topic"; rows are in the order of `labels(trace, of).names`.
        within: another of these that stays fixed, as in `mutual_information`: the null permutes among the documents
            that share it, and is the mean of their loads, weighted by how a row's tokens spread over them.
        draws: resamples of the documents.
        seed: of the draws.

    Raises:
        ValueError: fewer than two domains, one without tokens, or a document with two; `within` is `of`.
    """
    if of not in DOCUMENT_LABELS:
        raise ValueError(f"label {of!r}: wanted one of {', '.join(DOCUMENT_LABELS)}")
    design = _design(trace, of, within)
    label, names = labels(trace, of)
    absent = [name for index, name in enumerate(names) if not (label == index).any()]
    if absent:
        raise ValueError(f"{of} {absent[0]!r}: found no token of it in the trace, wanted some of each of {list(names)}")
    kept = _labelled(trace, label, of)
    documents, weights = _resampled_documents(trace.documents[kept], draws, seed, design.cell[kept])
    spread = np.zeros((len(names), design.stratum[kept].max() + 1))  # tokens of each label in each stratum
    np.add.at(spread, (label[kept], design.stratum[kept]), 1)
    measured = []
    for indices in trace.indices[:, kept]:
        shares = _resampled_shares(label[kept], len(names), indices, trace.num_experts, documents, weights)
        of_stratum = np.zeros((spread.shape[1], trace.num_experts))
        np.add.at(of_stratum, design.stratum[kept], _membership(indices, trace.num_experts))
        in_stratum = spread.sum(0)[:, None].clip(1)
        measured.append(_measured(shares, spread / spread.sum(1, keepdims=True) @ (of_stratum / in_stratum)))
    return _stack(measured)


def vocabulary_specialization(trace: RoutingTrace, *, min_count: int = 10, draws: int = 200, seed: int = 0) -> Measured:
    """Share of a token's occurrences whose first choice is the expert, [L, tokens, E].

    Source: OLMoE (arXiv 2409.02060, section 5), with k = 1. The first choice is the slot with the largest weight.
    The null is the load-aware expectation after shuffling all tokens: the expert's share of all first choices.
    Rare tokens are left out, because one occurrence is 100 % specialised.

    Args:
        trace: what to measure.
        min_count: fewest occurrences; rows are the tokens `frequent_tokens(trace, min_count)`.
        draws: resamples of the documents.
        seed: of the draws.

    Raises:
        ValueError: no token occurs so often.
    """
    frequent = frequent_tokens(trace, min_count)
    if not len(frequent):
        _, counts = np.unique(trace.token_ids, return_counts=True)
        raise ValueError(f"min_count={min_count}: wanted at most {counts.max(initial=0)}, that of the commonest token")
    kept = np.isin(trace.token_ids, frequent)
    row = np.searchsorted(frequent, trace.token_ids[kept])
    documents, weights = _resampled_documents(trace.documents[kept], draws, seed)
    measured = []
    for layer in range(len(trace.indices)):
        first = _best(trace, layer, 1)
        shares = _resampled_shares(row, len(frequent), first[kept], trace.num_experts, documents, weights)
        null = np.bincount(first[:, 0], minlength=trace.num_experts + 1)[:-1] / len(first)
        measured.append(_measured(shares, np.tile(null, (len(frequent), 1))))
    return _stack(measured)


def _resampled_shares(
    group: np.ndarray, groups: int, indices: np.ndarray, experts: int, documents: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Share of each group's tokens that go to each expert, [1 + draws, groups, E].

    NaN in every draw for a group that is found in one document only, since nothing is known of others.
    """
    tokens = _by_document(group, documents, groups, len(weights))
    token, expert = _filled(indices, experts)
    cells = _by_document(group[token] * experts + expert, documents[token], groups * experts, len(weights))
    with np.errstate(invalid="ignore"):  # a resample may lack a group
        shares = (cells @ weights).reshape(groups, experts, -1) / (tokens @ weights)[:, None]
    shares[np.diff(tokens.indptr) < 2, :, 1:] = np.nan
    return shares.transpose(2, 0, 1)


# --- mutual information -----------------------------------------------------------------------------------


def mutual_information(
    trace: RoutingTrace,
    of: str,
    given: str | None = None,
    *,
    within: str | None = None,
    draws: int = 200,
    shuffles: int = 20,
    seed: int = 0,
) -> Measured:
    """Share of all that there is to know about the routing which a label tells, [L], from 0 to 1.

    With E the expert of a routed token drawn at random, X its label, C the condition, and t the occurrence it is
    part of, which went to k_t experts (mostly K):

        I(E; X | C) / I(E; t),   I(E; t) = H(E) - mean of ln k_t over the routed tokens

    1 means that the label determines the set of experts; for K = 1 the denominator is H(E). Shares of one whole
    add up by the chain rule, I(E; token) + I(E; domain | token) = I(E; token and domain) <= I(E; t)
    (Cover & Thomas 2006, Elements of Information Theory, theorems 2.5.2 and 2.8.1).

    **Its estimate is almost never 0 on a finite sample.** It grows with the number of labels: about
    (labels - 1)(E - 1) / 2N nats for nothing (Miller 1955). Nothing is subtracted here; the null shows that bias. For
    domain, language and topic the null is the mean after permuting the labels among the documents, or, under a
    condition, among the documents in which the condition is met, for one value of it at a time: under `given="token"`
    among those that contain the token. For token and position, single occurrences are shuffled.

    **A null must keep what the design holds fixed.** Take a corpus with as many documents of every topic in every
    language. Topics dealt out over all documents no longer have equal shares of each language, so the null sees some
    of what the language does, and hides a small effect of the topic. `within="language"` permutes the topics among
    the documents of one language at a time (restricted permutation; Good 2005, Permutation, Parametric and Bootstrap
    Tests of Hypotheses), and every resample keeps the number of documents with each pair of the two.

    Args:
        trace: what to measure.
        of: "domain", "language", "topic", "token" or "position"; see `labels`. Unlabelled tokens are left out.
        given: the condition, another of these.
        within: the label that the null and the resamples keep fixed: "domain", "language" or "topic", and so is `of`.
            Unlike `given` it does not change the value. Documents without it form a group of their own. It fixes
            numbers of documents, not of tokens: if the condition goes with it, some of its effect stays in the value.
        draws: resamples of the documents.
        shuffles: permutations of the labels.
        seed: of both.

    Raises:
        ValueError: fewer than two labels; a document with two domains; `given` or `within` is `of`; every token goes to
            every expert, so that there is nothing to know.
    """
    if given == of:
        raise ValueError(f"given={given!r}: wanted another label than the one that is measured")
    label = labels(trace, of).values
    condition = np.zeros_like(label) if given is None else labels(trace, given).values
    kept = _labelled(trace, np.where(condition < 0, -1, label), of)
    design = _design(trace, of, within)
    documents, weights = _resampled_documents(trace.documents[kept], draws, seed, design.cell[kept])
    cells = _Cells.of(label[kept], condition[kept])
    unit, example = np.arange(len(documents)), np.arange(len(documents))  # what the null exchanges, a token of each
    if of in DOCUMENT_LABELS:
        unit, example = cells.documents_of_each_stratum(documents)
    fixed = design.stratum[kept]
    unit_cell = cells.cell[example]
    group = cells.stratum[unit_cell] * (fixed.max() + 1) + fixed[example]  # units that may change places
    places = unit_cell[np.lexsort((unit_cell, group))]
    orders = _shuffled_within(group, shuffles, np.random.default_rng([seed, 1]))
    measured = []
    for layer, indices in zip(trace.layers, trace.indices[:, kept], strict=True):
        token, expert = _filled(indices, trace.num_experts, layer)
        sums = partial(_sum_x_log_x, documents=documents[token], weights=weights)
        spread = _spread(indices, trace.num_experts, documents) @ weights
        everything = sums(np.zeros_like(token)) - sums(expert) - spread
        _check_choice(everything[0] / len(token), indices, trace.num_experts, layer)
        cell, stratum = cells.cell[token], cells.stratum[cells.cell[token]]
        without_label = sums(stratum) - sums(stratum * trace.num_experts + expert)
        information = sums(cell * trace.num_experts + expert) - sums(cell) + without_label
        by_unit = np.bincount(unit[token] * trace.num_experts + expert, minlength=len(places) * trace.num_experts)
        by_chance = _mean_under(orders, by_unit.reshape(len(places), -1), places) + without_label[0]
        defined = everything > 1e-9 * len(token)  # a resample may repeat one document that uses a single set of experts
        share = np.divide(information, everything, out=np.full_like(everything, np.nan), where=defined)
        measured.append(_measured(share.round(12), np.round(by_chance / everything[0], 12)))  # 0 where theory says 0
    return _stack(measured)


# With S(c) the sum of c ln c over a table of counts, n of them in all,
#   n I(E; X | C) = S(condition, label and expert) - S(condition and label) - S(condition and expert) + S(condition)
#   n I(E; t) = n ln n - S(expert) - sum of k ln k over the tokens


class _Cells(NamedTuple):
    """The pairs of condition and label that occur, numbered in that order; those of one condition are a stratum."""

    cell: np.ndarray  # [T] of each token
    stratum: np.ndarray  # [cells] number of its condition

    @classmethod
    def of(cls, label: np.ndarray, condition: np.ndarray) -> _Cells:
        labels_in_all = label.max() + 1
        pairs, cell = np.unique(condition * labels_in_all + label, return_inverse=True)
        return cls(cell, np.unique(pairs // labels_in_all, return_inverse=True)[1])

    def documents_of_each_stratum(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of stratum and document that occur: number of each token's, [T], and a token of each."""
        pairs = self.stratum[self.cell] * (documents.max() + 1) + documents
        _, example, number = np.unique(pairs, return_index=True, return_inverse=True)
        return number, example


class _Design(NamedTuple):
    """What a null with a fixed label may not change; all 0 without one."""

    stratum: np.ndarray  # [T] number of the fixed label
    cell: np.ndarray  # [T] number of the pair of fixed label and measured one: each has as many documents in a resample


def _design(trace: RoutingTrace, of: str, within: str | None) -> _Design:
    if within is None:
        nothing = np.zeros(len(trace.documents), dtype=np.int64)
        return _Design(nothing, nothing)
    if within == of or within not in DOCUMENT_LABELS:
        others = [label for label in DOCUMENT_LABELS if label != of]
        raise ValueError(f"within={within!r}: wanted one of {', '.join(others)}, to keep fixed while {of} is measured")
    if of not in DOCUMENT_LABELS:
        raise ValueError(f"within={within!r} with {of}: wanted one of {', '.join(DOCUMENT_LABELS)} to measure")
    label, fixed = labels(trace, of).values, labels(trace, within).values + 1
    _labelled(trace, np.where(label < 0, -1, fixed), within, fewest=1)
    return _Design(fixed, fixed * (label.max() + 2) + label + 1)


def _sum_x_log_x(codes: np.ndarray, documents: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """S of how often each code occurs in the resamples, [1 + draws]; in parts, so that no table becomes large."""
    counts = _by_document(codes, documents, codes.max() + 1, len(weights))
    counts = counts[np.diff(counts.indptr) > 0]
    step = max(1, LARGEST_TABLE // counts.shape[0])
    parts = (weights[:, start : start + step] for start in range(0, weights.shape[1], step))
    return np.concatenate([_x_log_x(counts @ part).sum(0) for part in parts])


def _spread(indices: np.ndarray, experts: int, documents: np.ndarray) -> np.ndarray:
    """Sum of k ln k over the tokens of each document, k being the experts a token went to."""
    return np.bincount(documents, _x_log_x((indices < experts).sum(1)))


def _check_choice(nats: float, indices: np.ndarray, experts: int, layer: int) -> None:
    if nats < 1e-9:  # 0 but for rounding
        same = (indices < experts).sum(1).max()
        raise ValueError(
            f"layer {layer}: found every token at the same {same} of {experts} experts, wanted a choice that a label "
            "could tell something about"
        )


def _mean_under(orders: Sequence[np.ndarray], by_unit: np.ndarray, places: np.ndarray) -> float:
    """Mean of S(cell and expert) - S(cell) when the units, with their experts [units, E], change cells.

    In each of the orders the first unit comes to the cell places[0], the next to places[1], ...
    """
    from scipy.sparse import csr_array

    shape, ones = (places.max() + 1, len(by_unit)), np.ones(len(by_unit))
    tables = (csr_array((ones, (places, order)), shape=shape) @ by_unit for order in orders)
    return float(np.mean([_x_log_x(table).sum() - _x_log_x(table.sum(1)).sum() for table in tables]))


def _shuffled_within(group: np.ndarray, shuffles: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random orders of the units that keep those of a group together, groups ascending."""
    if not group.any():
        return [rng.permutation(len(group)) for _ in range(shuffles)]
    return [np.argsort(group + rng.random(len(group))) for _ in range(shuffles)]


# --- pairs of experts, of tokens, of models -----------------------------------------------------------------


def co_activation(trace: RoutingTrace, *, draws: int = 200, seed: int = 0) -> Measured:
    """N_ij / N_i, [L, E, E]: of the tokens that go to expert i, the share that goes to expert j as well.

    Source: OLMoE (arXiv 2409.02060, section 5), over **all** pairs in the top-k, whatever their rank. The diagonal is
    NaN, as is the row of an expert without tokens. A balanced router gives (K - 1) / (E - 1); the null knows the load
    as well. It belongs to the most random router with this load, under which a set of k experts is as likely as the
    product of their k weights (conditional Poisson sampling; Chen, Dempster & Liu 1994, Biometrika 81).

    Args:
        trace: what to measure.
        draws: resamples of the documents.
        seed: of the draws.

    Raises:
        ValueError: no token goes to two experts.
    """
    documents, weights = _resampled_documents(trace.documents, draws, seed)
    measured = []
    for layer, indices in zip(trace.layers, trace.indices, strict=True):
        filled = (indices < trace.num_experts).sum(1)
        if filled.max(initial=0) < 2:
            raise ValueError(f"layer {layer}: found {filled.max(initial=0)} experts per token at most, wanted 2")
        chosen = _membership(indices, trace.num_experts)
        both = _resampled_overlap(chosen, chosen, documents, weights)
        inclusion = chosen.mean(0, dtype=float)
        null = _independent_pairs(inclusion, np.bincount(filled) / len(filled))
        with np.errstate(invalid="ignore"):
            share = both / np.diagonal(both, axis1=1, axis2=2)[..., None]
            null = null / inclusion[:, None]
        diagonal = np.eye(trace.num_experts, dtype=bool)
        measured.append(_measured(np.where(diagonal, np.nan, share), np.where(diagonal, np.nan, null)))
    return _stack(measured)


def _independent_pairs(inclusion: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Chance that two experts are chosen together, [E, E], when only the loads and the sizes of the sets are given.

    inclusion: [E] share of the tokens that choose each. sizes: [K + 1] share of the tokens with k experts.
    The weights are found by scaling their odds until the inclusion is right.
    """
    wanted = _odds(inclusion)
    weights = np.where(inclusion > 0, wanted, 0.0)
    orders = np.arange(len(sizes))
    for _ in range(1000):
        weights = weights / weights.max()
        found = weights * _set_weights(weights, sizes, np.eye(len(weights), dtype=bool), orders - 1)
        if np.allclose(found, inclusion, rtol=1e-9, atol=1e-9):
            break
        weights = np.where(inclusion > 0, weights * wanted / _odds(found), 0.0)
    left_out = np.eye(len(weights), dtype=bool)[:, None] | np.eye(len(weights), dtype=bool)
    return np.outer(weights, weights) * _set_weights(weights, sizes, left_out, orders - 2)


def _odds(share: np.ndarray) -> np.ndarray:
    share = share.clip(1e-12, 1 - 1e-9)
    return share / (1 - share)


def _set_weights(weights: np.ndarray, sizes: np.ndarray, left_out: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Sum over k of sizes[k] e_m(the weights but those left out) / e_k(all weights), with m = orders[k]; e_m is the
    elementary symmetric polynomial. left_out: [..., E]."""
    of_all = _elementary(weights, np.zeros(len(weights), dtype=bool), len(sizes))
    of_rest = _elementary(weights, left_out, len(sizes))
    possible = (orders >= 0) & (sizes > 0)
    return of_rest[..., orders[possible]] @ (sizes[possible] / of_all[possible])


def _elementary(weights: np.ndarray, left_out: np.ndarray, count: int) -> np.ndarray:
    """e_0 to e_(count-1) of the weights, [..., count]: coefficients of the product of all (1 + w x)."""
    polynomial = np.zeros((*left_out.shape[:-1], count))
    polynomial[..., 0] = 1
    for expert, weight in enumerate(weights):
        times = np.where(left_out[..., expert], 0.0, weight)[..., None]
        polynomial[..., 1:] += times * polynomial[..., :-1]
    return polynomial


def router_saturation(trace: RoutingTrace, final: RoutingTrace, *, draws: int = 200, seed: int = 0) -> Measured:
    """mean |E_t and E_final| / K, [L]: the share of the final model's choices that a checkpoint already makes.

    Source: OLMoE (arXiv 2409.02060, section 5). The null is the overlap after shuffling the tokens of one trace, which
    the loads determine: K / E when balanced, more when both prefer the same few experts. Where slots are empty, the
    denominator is the number of the final model's filled ones.

    Args:
        trace: of the checkpoint.
        final: of the finished model, for the same tokens.
        draws: resamples of the documents.
        seed: of the draws.

    Raises:
        ValueError: the traces differ in their tokens, layers or number of experts.
    """
    _check_same_tokens(trace, final)
    documents, weights = _resampled_documents(trace.documents, draws, seed)
    measured = []
    for now, then in zip(trace.indices, final.indices, strict=True):
        now, then = (_membership(indices, trace.num_experts) for indices in (now, then))
        shares = _resampled_ratio((now * then).sum(1), then.sum(1), documents, weights)
        by_load = now.mean(0, dtype=float) * then.mean(0, dtype=float)
        measured.append(_measured(shares, by_load.sum() / then.sum(1).mean(dtype=float)))
    return _stack(measured)


def repetition(trace: RoutingTrace, choices: int = 1, *, draws: int = 200, seed: int = 0) -> Measured:
    """How often two consecutive tokens of a document share a first choice (or a first or second one), [L].

    Source: Mixtral (Jiang et al. 2024, arXiv 2401.04088, section 5, table 5). The null is load-aware, for two tokens
    drawn independently: sum_i p_i^2, with p_i the share of first choices on expert i. It exceeds the 1 / E of a
    balanced router (`chance_of_repetition`), so that imbalance does not read as locality. For first or second choices
    it is sum_i p_i^2 - sum_(i<j) p_ij^2, with p_i and p_ij the shares of tokens that have i, or both i and j, among
    their two.

    The first choices are the slots with the largest weights. Pairs of which one lacks them are left out, and so are
    tokens that are not next to each other in their sequence.

    Args:
        trace: what to measure.
        choices: 1, or 2 for "first or second".
        draws: resamples of the documents.
        seed: of the draws.

    Raises:
        ValueError: `choices` is impossible, or no two tokens are consecutive.
    """
    if choices not in (1, 2) or choices > trace.indices.shape[2]:
        raise ValueError(f"choices={choices}: wanted 1, or 2 where a token has two ({trace.indices.shape[2]} here)")
    next_to = (np.diff(trace.documents) == 0) & (np.diff(trace.positions) == 1)
    if not next_to.any():
        raise ValueError("found no two consecutive tokens of one document, wanted some")
    documents, weights = _resampled_documents(trace.documents[1:][next_to], draws, seed)
    measured = []
    for index, layer in enumerate(trace.layers):
        best = _best(trace, index, choices)
        whole = (best < trace.num_experts).all(1)
        left, right = best[:-1][next_to], best[1:][next_to]
        valid = (whole[:-1] & whole[1:])[next_to]
        if not valid.any():
            raise ValueError(f"layer {layer}: found no two consecutive tokens with {choices} choices each, wanted some")
        same = (left[:, :, None] == right[:, None]).any((1, 2))
        shares = _resampled_ratio(same & valid, valid, documents, weights)
        chosen = _membership(best[whole], trace.num_experts)
        both = (chosen.T @ chosen).astype(float) / len(chosen)
        measured.append(_measured(shares, np.diagonal(both) @ np.diagonal(both) - (np.triu(both, 1) ** 2).sum()))
    return _stack(measured)


def chance_of_repetition(num_experts: int, choices: int = 1) -> float:
    """How often two random sets of `choices` experts meet: 1 / E, and 1 - C(E-2, 2) / C(E, 2) for two (46.4 % of 8)."""
    return 1 - comb(num_experts - choices, choices) / comb(num_experts, choices)


def routing_agreement(
    a: RoutingTrace, b: RoutingTrace, *, draws: int = 200, shuffles: int = 20, seed: int = 0
) -> Measured:
    """The share of choices that two models have in common once their experts are matched, [L].

    2 |A and B| / (|A| + |B|), summed over the tokens, A and B being the sets of experts a token goes to. Since experts
    have no order, those of `b` are renamed by `match_experts` first. Matching finds some agreement between any
    two models, more so with few tokens; so the null is the mean when the tokens of `b` are shuffled and matched again.
    Every resample is matched anew as well.

    Args:
        a: of one model.
        b: of another, for the same tokens.
        draws: resamples of the documents.
        shuffles: of the tokens.
        seed: of both.

    Raises:
        ValueError: the traces differ in their tokens, layers or number of experts.
    """
    _check_same_tokens(a, b)
    documents, weights = _resampled_documents(a.documents, draws, seed)
    rng = np.random.default_rng([seed, 1])
    orders = [rng.permutation(len(documents)) for _ in range(shuffles)]
    measured = []
    for ours, theirs in zip(a.indices, b.indices, strict=True):
        ours, theirs = (_membership(indices, a.num_experts) for indices in (ours, theirs))
        mean_slots = np.bincount(documents, (ours.sum(1) + theirs.sum(1)) / 2)
        common = [_matched(overlap).sum() for overlap in _resampled_overlap(ours, theirs, documents, weights)]
        by_chance = [_matched(ours.T @ theirs.take(order, axis=0)).sum() for order in orders]
        measured.append(_measured(common / (mean_slots @ weights), np.mean(by_chance) / mean_slots.sum()))
    return _stack(measured)


def match_experts(a: RoutingTrace, b: RoutingTrace) -> np.ndarray:
    """The expert of `b` that stands for each expert of `a`, [L, E]: a permutation per layer.

    Of all one-to-one pairings the one with the most common tokens (linear assignment).

    Raises:
        ValueError: the traces differ in their tokens, layers or number of experts.
    """
    from scipy.optimize import linear_sum_assignment

    _check_same_tokens(a, b)
    overlaps = (
        _membership(ours, a.num_experts).T @ _membership(theirs, a.num_experts)
        for ours, theirs in zip(a.indices, b.indices, strict=True)
    )
    return np.stack([linear_sum_assignment(overlap, maximize=True)[1] for overlap in overlaps])


def _matched(overlap: np.ndarray) -> np.ndarray:
    """The entries of a table [E, E] that the best one-to-one pairing picks."""
    from scipy.optimize import linear_sum_assignment

    return overlap[linear_sum_assignment(overlap, maximize=True)]


def _check_same_tokens(a: RoutingTrace, b: RoutingTrace) -> None:
    for name in ("num_experts", "layers"):
        found, wanted = getattr(b, name), getattr(a, name)
        if found != wanted:
            raise ValueError(f"{name}: found {found} in the second trace, wanted {wanted} as in the first")
    if len(a.token_ids) != len(b.token_ids):
        raise ValueError(f"tokens: found {len(b.token_ids)} in the second trace, wanted {len(a.token_ids)}")
    differ = np.flatnonzero(np.asarray(a.token_ids) != np.asarray(b.token_ids))
    if len(differ):
        place = differ[0]
        raise ValueError(
            f"token_ids[{place}]: found {b.token_ids[place]} in the second trace, wanted {a.token_ids[place]} as in "
            f"the first ({len(differ)} of {len(a.token_ids)} differ)"
        )


# --- ablation ---------------------------------------------------------------------------------------------


@torch.no_grad()
def ablate(
    model: MoEForCausalLM,
    batches: Iterable[tuple[Tensor, Tensor]],
    domain_names: Sequence[str],
    *,
    draws: int = 200,
    seed: int = 0,
) -> Measured:
    """Cross-entropy lost by removing one expert, in nats per token, [L, E, domains]: for every expert, one at a time.

    A removed expert's slots become empty. The other weights of a token stay as they are (they are not renormalised),
    and nothing takes its place; a shared expert goes on working. The null is the mean over the experts of the layer:
    what removing a random one costs this domain. In the interval, sequences stand for documents.

    Args:
        model: in evaluation mode for the while; left as it was, whatever happens.
        batches: input_ids [B, S] and the domain of each sequence [B], such as `Corpus.batch` gives; -1: none.
        domain_names: what the domains index.
        draws: resamples of the sequences.
        seed: of the draws.

    Raises:
        ValueError: the model is dense, a domain has no sequence, or one has no name.
    """
    gates = [module.gate for module in model.modules() if isinstance(module, MoELayer)]
    if not gates:
        raise ValueError("found a dense model, wanted one with experts to remove")
    batches = list(batches)
    domains = np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(domain) for _, domain in batches)])
    _check_domains(domains, domain_names)
    intact = _sequence_losses(model, batches)
    experts = model.config.num_experts
    increase = np.empty((len(gates), experts, len(domains)))
    for layer, gate in enumerate(gates):
        for expert in range(experts):
            with _without(gate, expert):
                increase[layer, expert] = _sequence_losses(model, batches) - intact
    _, weights = _resampled_documents(np.arange(len(domains)), draws, seed)
    in_domain = (domains[:, None] == np.arange(len(domain_names))).astype(float)  # [sequences, domains]
    sequences = weights.T @ in_domain  # [1 + draws, domains]
    with np.errstate(invalid="ignore"):  # a resample may lack a domain
        means = np.einsum("les,sd,sw->wled", increase, in_domain, weights, optimize=True) / sequences[:, None, None]
    means[1:, ..., in_domain.sum(0) < 2] = np.nan
    return _measured(means, np.broadcast_to(means[0].mean(1, keepdims=True), means[0].shape))


def _check_domains(domains: np.ndarray, names: Sequence[str]) -> None:
    if domains.max(initial=-1) >= len(names):
        raise ValueError(f"domain {domains.max()}: wanted less than {len(names)}, the number of domain_names")
    for index, name in enumerate(names):
        if not (domains == index).any():
            raise ValueError(f"domain {name!r}: found no sequence of it in the batches, wanted at least one")


@contextmanager
def _without(gate: nn.Module, expert: int) -> Iterator[None]:
    """Empty the slots of an expert in all that a router returns inside the block."""

    def remove(_module: nn.Module, _inputs: object, chosen: RouterOutput) -> RouterOutput:
        removed = chosen.indices == expert
        return chosen._replace(
            weights=chosen.weights.masked_fill(removed, 0),
            indices=chosen.indices.masked_fill(removed, chosen.logits.shape[-1]),
        )

    handle = gate.register_forward_hook(remove)
    try:
        yield
    finally:
        handle.remove()


def _sequence_losses(model: MoEForCausalLM, batches: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray:
    """Mean cross-entropy of every sequence, in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        losses = [_losses(model(ids).logits, ids) for ids, _ in batches]
    finally:
        model.train(was_training)
    return torch.cat(losses).cpu().double().numpy()


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].mT.float(), ids[:, 1:], reduction="none").mean(1)


# --- counting ---------------------------------------------------------------------------------------------


def _resampled_documents(
    documents: np.ndarray, draws: int, seed: int, cells: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The documents numbered from 0, and how often each is drawn, [documents, 1 + draws].

    The first column is the trace as it is: once each. With `cells`, one number per token and the same throughout a
    document, as many documents of each cell are drawn as there are. There are no draws where every cell has just one.
    """
    _, first, numbered = np.unique(documents, return_index=True, return_inverse=True)
    of_document = np.zeros(len(first)) if cells is None else cells[first]
    counts = np.unique(of_document, return_counts=True)[1]
    rng = np.random.default_rng(seed)
    drawn = np.ones((1 + (draws if counts.max() > 1 else 0), len(first)))
    for cell, count in zip(np.unique(of_document), counts, strict=True):
        drawn[1:, of_document == cell] = rng.multinomial(count, np.full(count, 1 / count), size=len(drawn) - 1)
    return numbered, drawn.T


def _measured(statistics: np.ndarray, null: np.ndarray | float) -> Measured:
    """From a statistic of the trace and of its resamples, [1 + draws, ...], NaN where a resample does not have it."""
    value, drawn = statistics[0], np.sort(statistics[1:], axis=0)  # NaN sorts last
    valid = (~np.isnan(drawn)).sum(0)
    with np.errstate(invalid="ignore"):
        shift = value - np.where(np.isnan(drawn), 0, drawn).sum(0) / valid
    tail = (1 - LEVEL) / 2
    low, high = (_quantile(drawn, valid, share) + shift for share in (tail, 1 - tail))
    return Measured(value, np.broadcast_to(np.asarray(null, dtype=float), np.shape(value)), low, high)


def _quantile(drawn: np.ndarray, valid: np.ndarray, share: float) -> np.ndarray:
    """Along the first axis of a sorted array, among its first `valid` entries, interpolated as numpy does."""
    if not len(drawn):
        return np.full(drawn.shape[1:], np.nan)
    place = share * (valid - 1).clip(0)
    below = np.floor(place).astype(int)
    above = np.ceil(place).astype(int)
    lower, upper = (np.take_along_axis(drawn, index[None], axis=0)[0] for index in (below, above))
    return lower + (place - below) * (upper - lower)


def _stack(layers: Iterable[Measured]) -> Measured:
    return Measured(*(np.stack(field) for field in zip(*layers, strict=True)))


def _filled(indices: np.ndarray, experts: int, layer: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Token and expert of every slot that is not empty. With a `layer` to name, raises ValueError if there are none."""
    token, slot = np.nonzero(indices < experts)
    if layer is not None and not len(token):
        raise ValueError(f"layer {layer}: found {len(indices)} tokens and no expert chosen, wanted at least one")
    return token, indices[token, slot].astype(np.int64)


def _membership(indices: np.ndarray, experts: int) -> np.ndarray:
    """1 where a token's slots [T, K] contain the expert, [T, E] float32."""
    chosen = np.zeros((len(indices), experts + 1), dtype=np.float32)
    np.put_along_axis(chosen, indices.astype(np.int64), 1, axis=1)
    return chosen[:, :experts]


def _best(trace: RoutingTrace, layer: int, choices: int) -> np.ndarray:
    """The experts in the `choices` slots of largest weight, [T, choices], best first; E where too few are filled.

    By weight, because not every router orders its slots: grouped ones go by group, expert choice by expert.
    """
    indices = trace.indices[layer]
    weights = np.where(indices < trace.num_experts, trace.weights[layer], -np.inf)
    ranked = weights.argmax(1)[:, None] if choices == 1 else (-weights).argsort(1, kind="stable")[:, :choices]
    return np.take_along_axis(indices, ranked, axis=1)


def _by_document(codes: np.ndarray, documents: np.ndarray, num_codes: int, num_documents: int) -> csr_array:
    """How often each code occurs in each document, [codes, documents], sparse."""
    from scipy.sparse import csr_array

    return csr_array((np.ones(len(codes)), (codes, documents)), shape=(num_codes, num_documents))


def _resampled_ratio(above: np.ndarray, below: np.ndarray, documents: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum(above) / sum(below) over the tokens, [1 + draws]."""
    with np.errstate(invalid="ignore"):
        return (np.bincount(documents, above) @ weights) / (np.bincount(documents, below) @ weights)


def _resampled_overlap(a: np.ndarray, b: np.ndarray, documents: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Tokens that chose expert i in `a` and j in `b`, [1 + draws, E, E], from two memberships [T, E]."""
    order = documents.argsort(kind="stable")
    ends = np.bincount(documents).cumsum()[:-1]
    pieces = zip(np.split(a[order], ends), np.split(b[order], ends), strict=True)
    tables = np.stack([ours.T @ theirs for ours, theirs in pieces]).astype(float)
    return np.tensordot(weights, tables, axes=(0, 0))


def _x_log_x(x: np.ndarray) -> np.ndarray:
    return x * np.log(np.where(x > 0, x, 1))
