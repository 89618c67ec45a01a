"""Do the experts specialise? Every metric of a trace with what chance would give, and an interval: see `Measured`.

Shapes: L sparse layers, E experts, K experts per token, T tokens. A `trace` is a `RoutingTrace`, or whatever has its
attributes; an index E is an empty slot and counts for nobody. Everywhere `draws` is how often documents are resampled
for the interval, `shuffles` how often chance is imitated where the null has no formula, and `seed` that of both.
"""

from collections.abc import Callable
from math import comb

import numpy as np

from minimoe.inspection.labels import DOCUMENT_LABELS, fixed_label, labelled, labels, number_pairs
from minimoe.inspection.nulls import (
    Measured,
    Resamples,
    measured,
    random_loads,
    random_pairs,
    shuffled_conditional_entropy,
    shuffled_within,
    x_log_x,
)
from minimoe.inspection.trace import RoutingTrace


def load(trace: RoutingTrace, *, draws: int = 200, seed: int = 0) -> Measured:
    """Share of the routed tokens that each expert receives, [L, E]; the null is 1 / E.

    Raises ValueError where a layer routed no token.
    """
    return measured(_resampled_loads(trace, draws, seed), 1 / trace.num_experts)


def max_violation(trace: RoutingTrace, *, draws: int = 200, shuffles: int = 200, seed: int = 0) -> Measured:
    """MaxVio = max_i n_i / mean(n) - 1, [L]: 0 when balanced, E / K - 1 at worst.

    Source: Wang et al. 2024, arXiv 2408.15664; the same as `minimoe.model.balance.max_violation`. The null is its
    mean when each token draws its experts at random: not 0, since even then some expert gets the most.
    Raises ValueError where a layer routed no token.
    """
    return _unevenness(trace, lambda share: share.max(-1) * share.shape[-1] - 1, draws, shuffles, seed)


def load_entropy(trace: RoutingTrace, *, draws: int = 200, shuffles: int = 200, seed: int = 0) -> Measured:
    """- sum_i p_i ln p_i / ln E of the shares p of `load`, [L]: 1 when balanced, 0 when one expert takes all.

    The null is its mean when each token draws its experts at random.
    Raises ValueError where there is only one expert, or a layer routed no token.
    """
    if trace.num_experts < 2:
        raise ValueError(f"num_experts={trace.num_experts}: wanted at least 2 for an entropy of their load")
    return _unevenness(trace, lambda share: -x_log_x(share).sum(-1) / np.log(share.shape[-1]), draws, shuffles, seed)


def _unevenness(
    trace: RoutingTrace, statistic: Callable[[np.ndarray], np.ndarray], draws: int, shuffles: int, seed: int
) -> Measured:
    """A statistic of the shares [..., E], and its mean under a random router."""
    rng = np.random.default_rng([seed, 1])
    nulls = []
    for indices in trace.indices:
        filled = np.bincount((indices < trace.num_experts).sum(1))
        loads = random_loads(filled, trace.num_experts, shuffles, rng)
        nulls.append(statistic(loads / loads.sum(1, keepdims=True)).mean())
    return measured([statistic(shares) for shares in _resampled_loads(trace, draws, seed)], nulls)


def _resampled_loads(trace: RoutingTrace, draws: int, seed: int) -> list[np.ndarray]:
    """For each layer the shares of the experts, [1 + draws, E], the first of them as they are."""
    resamples = Resamples.draw(trace.documents, draws, seed)
    shares = []
    for layer, indices in zip(trace.layers, trace.indices, strict=True):
        token, expert = _filled(indices, trace.num_experts, layer)
        counts = resamples.of(token).counts(expert, trace.num_experts) @ resamples.weights
        with np.errstate(invalid="ignore"):  # a resample may lack routed tokens
            shares.append((counts / counts.sum(0)).T)
    return shares


def domain_specialization(
    trace: RoutingTrace, of: str = "domain", *, within: str | None = None, draws: int = 200, seed: int = 0
) -> Measured:
    """Share of a domain's tokens whose top-k contains the expert, [L, domains, E]; over the experts it sums to K.

    Source: OLMoE (Muennighoff et al. 2024, arXiv 2409.02060, section 5). A balanced router that ignores the domain
    gives K / E everywhere. The null knows the load as well: the share of all labelled tokens that go to the expert,
    which is what permuting the labels among equally long documents gives on average. So an expert that is merely
    busy is above K / E, but not above its null. Unlabelled tokens are left out.

    Args:
        of: "domain", "language" or "topic"; rows are in the order of `labels(trace, of).names`.
        within: another of these that stays fixed, as in `mutual_information`: the null permutes among the documents
            that share it, and is the mean of their loads, weighted by how a row's tokens spread over them.

    Raises ValueError for fewer than two domains, one without tokens, or a document with two; or if `within` is `of`.
    """
    if of not in DOCUMENT_LABELS:
        raise ValueError(f"label {of!r}: wanted one of {', '.join(DOCUMENT_LABELS)}")
    fixed = fixed_label(trace, of, within)
    label, names = labels(trace, of)
    absent = [name for index, name in enumerate(names) if not (label == index).any()]
    if absent:
        raise ValueError(f"{of} {absent[0]!r} has no token in the trace: wanted some of each of {list(names)}")
    kept = labelled(trace, label, of)
    label, fixed = label[kept], fixed[kept]
    strata = None if within is None else number_pairs(fixed, label)
    resamples = Resamples.draw(trace.documents[kept], draws, seed, strata)
    in_label, in_stratum = np.eye(len(names))[label], np.eye(fixed.max() + 1)[fixed]
    spread = in_label.T @ in_stratum / in_label.sum(0)[:, None]  # share of a label's tokens that are in each stratum
    shares, nulls = [], []
    for indices in trace.indices[:, kept]:
        shares.append(_resampled_shares(label, len(names), indices, trace.num_experts, resamples))
        loads = in_stratum.T @ _membership(indices, trace.num_experts) / in_stratum.sum(0)[:, None].clip(1)
        nulls.append(spread @ loads)
    return measured(shares, nulls)


def vocabulary_specialization(trace: RoutingTrace, *, min_count: int = 10, draws: int = 200, seed: int = 0) -> Measured:
    """Share of a token's occurrences whose first choice is the expert, [L, tokens, E].

    Source: OLMoE (arXiv 2409.02060, section 5), with k = 1. The first choice is the slot with the largest weight.
    The null is the load-aware expectation after shuffling all tokens: the expert's share of all first choices.
    Rows are `frequent_tokens(trace, min_count)`: rare tokens are left out, because one occurrence is 100 % specialised.
    Raises ValueError where no token occurs `min_count` times.
    """
    frequent = frequent_tokens(trace, min_count)
    if not len(frequent):
        _, counts = np.unique(trace.token_ids, return_counts=True)
        raise ValueError(f"min_count={min_count}: wanted at most {counts.max(initial=0)}, that of the commonest token")
    kept = np.isin(trace.token_ids, frequent)
    row = np.searchsorted(frequent, trace.token_ids[kept])
    resamples = Resamples.draw(trace.documents[kept], draws, seed)
    shares, nulls = [], []
    for layer in range(len(trace.indices)):
        first = _best(trace, layer, 1)
        shares.append(_resampled_shares(row, len(frequent), first[kept], trace.num_experts, resamples))
        nulls.append([_membership(first, trace.num_experts).mean(0, dtype=float)])  # the same for every token
    return measured(shares, nulls)


def frequent_tokens(trace: RoutingTrace, min_count: int = 10) -> np.ndarray:
    """Ids of the tokens that occur at least `min_count` times, ascending: the rows of `vocabulary_specialization`."""
    ids, counts = np.unique(trace.token_ids, return_counts=True)
    return ids[counts >= min_count]


def _resampled_shares(
    group: np.ndarray, groups: int, indices: np.ndarray, experts: int, resamples: Resamples
) -> np.ndarray:
    """Share of each group's tokens that go to each expert, [1 + draws, groups, E].

    NaN in every draw for a group that is found in one document only, since nothing is known of others.
    """
    tokens = resamples.counts(group, groups)
    token, expert = _filled(indices, experts)
    cells = resamples.of(token).counts(group[token] * experts + expert, groups * experts) @ resamples.weights
    with np.errstate(invalid="ignore"):  # a resample may lack a group
        shares = cells.reshape(groups, experts, -1) / (tokens @ resamples.weights)[:, None]
    shares[np.diff(tokens.indptr) < 2, :, 1:] = np.nan
    return shares.transpose(2, 0, 1)


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

    With Y the expert of a routed token drawn at random, X its label, C the condition, and t the occurrence it is
    part of, which went to k_t experts (mostly K):

        I(Y; X | C) / I(Y; t),   I(Y; X | C) = H(Y | C) - H(Y | C, X),   I(Y; t) = H(Y) - mean of ln k_t

    1 means that the label determines the set of experts; for K = 1 the denominator is H(Y). Shares of one whole
    add up by the chain rule, I(Y; token) + I(Y; domain | token) = I(Y; token and domain) <= I(Y; t)
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
        of: "domain", "language", "topic", "token" or "position"; see `labels`. Unlabelled tokens are left out.
        given: the condition, another of these.
        within: the label that the null and the resamples keep fixed: "domain", "language" or "topic", and so is `of`.
            Unlike `given` it does not change the value. Documents without it form a group of their own. It fixes
            numbers of documents, not of tokens: if the condition goes with it, some of its effect stays in the value.

    Raises ValueError for fewer than two labels, or a document with two domains; where `given` or `within` is `of`; and
    where every token goes to every expert, so that there is nothing to know.
    """
    if given == of:
        raise ValueError(f"given={given!r}: wanted another label than the one that is measured")
    label = labels(trace, of).values
    condition = np.zeros_like(label) if given is None else labels(trace, given).values
    kept = labelled(trace, np.where(condition < 0, -1, label), of)
    label, condition, fixed = (values[kept] for values in (label, condition, fixed_label(trace, of, within)))
    strata = None if within is None else number_pairs(fixed, label)
    resamples = Resamples.draw(trace.documents[kept], draws, seed, strata)
    cell, condition = number_pairs(condition, label), np.unique(condition, return_inverse=True)[1]

    # What the null exchanges: documents, or what of them meets one condition; or single tokens.
    unit = number_pairs(condition, resamples.document) if of in DOCUMENT_LABELS else np.arange(len(label))
    token_of_unit = np.unique(unit, return_index=True)[1]
    group = number_pairs(condition, fixed)[token_of_unit]  # units of one group may change places
    place = cell[token_of_unit]
    place = place[np.lexsort((place, group))]
    orders = shuffled_within(group, shuffles, np.random.default_rng([seed, 1]))

    shares, nulls = [], []
    for layer, indices in zip(trace.layers, trace.indices[:, kept], strict=True):
        token, expert = _filled(indices, trace.num_experts, layer)
        slots = resamples.of(token)
        experts_of_token = (indices < trace.num_experts).sum(1)
        spread = resamples.ratio(x_log_x(experts_of_token), experts_of_token)  # the mean of ln k_t
        everything = slots.conditional_entropy(expert, np.zeros_like(token)) - spread
        if everything[0] < 1e-9:  # 0 but for rounding
            found = f"every token goes to the same {experts_of_token.max()} of {trace.num_experts} experts"
            raise ValueError(f"layer {layer}: {found}, so that there is no choice for a label to explain")
        without_label = slots.conditional_entropy(expert, condition[token])
        information = without_label - slots.conditional_entropy(expert, cell[token])
        of_unit = np.bincount(unit[token] * trace.num_experts + expert, minlength=len(place) * trace.num_experts)
        of_unit = of_unit.reshape(len(place), trace.num_experts)
        by_chance = without_label[0] - shuffled_conditional_entropy(of_unit, place, orders)
        defined = everything > 1e-9  # a resample may repeat one document that uses a single set of experts
        share = np.divide(information, everything, out=np.full_like(everything, np.nan), where=defined)
        shares.append(share.round(12))  # 0 where theory says 0
        nulls.append(np.round(by_chance / everything[0], 12))
    return measured(shares, nulls)


def co_activation(trace: RoutingTrace, *, draws: int = 200, seed: int = 0) -> Measured:
    """N_ij / N_i, [L, E, E]: of the tokens that go to expert i, the share that goes to expert j as well.

    Source: OLMoE (arXiv 2409.02060, section 5), over **all** pairs in the top-k, whatever their rank. The diagonal is
    NaN, as is the row of an expert without tokens. A balanced router gives (K - 1) / (E - 1); the null knows the load
    as well, and belongs to the most random router with this load (see `random_pairs`).
    Raises ValueError where no token goes to two experts.
    """
    resamples = Resamples.draw(trace.documents, draws, seed)
    diagonal = np.eye(trace.num_experts, dtype=bool)
    shares, nulls = [], []
    for layer, indices in zip(trace.layers, trace.indices, strict=True):
        sizes = np.bincount((indices < trace.num_experts).sum(1))
        if len(sizes) < 3:
            raise ValueError(f"layer {layer}: a token goes to {len(sizes) - 1} experts at most, wanted 2 or more")
        chosen = _membership(indices, trace.num_experts)
        both = resamples.overlap(chosen, chosen)
        loads = chosen.mean(0, dtype=float)
        with np.errstate(invalid="ignore"):  # an expert may have no token
            share = both / np.diagonal(both, axis1=1, axis2=2)[..., None]
            null = random_pairs(loads, sizes / len(indices)) / loads[:, None]
        shares.append(np.where(diagonal, np.nan, share))
        nulls.append(np.where(diagonal, np.nan, null))
    return measured(shares, nulls)


def router_saturation(trace: RoutingTrace, final: RoutingTrace, *, draws: int = 200, seed: int = 0) -> Measured:
    """The share of the final model's choices that a checkpoint already makes, [L]: mean |S and S_final| / K.

    S is the set of experts of a token in `trace`, of a checkpoint; S_final that in `final`, of the finished model.
    Source: OLMoE (arXiv 2409.02060, section 5). The null is the overlap after shuffling the tokens of one trace, which
    the loads determine: K / E when balanced, more when both prefer the same few experts. Where slots are empty, the
    denominator is the number of the final model's filled ones.
    Raises ValueError where the traces differ in their tokens, layers or number of experts.
    """
    resamples = Resamples.draw(trace.documents, draws, seed)
    shares, nulls = [], []
    for early, last in _memberships(trace, final):
        shares.append(resamples.ratio((early * last).sum(1), last.sum(1)))
        by_load = early.mean(0, dtype=float) @ last.mean(0, dtype=float)
        nulls.append(by_load / last.sum(1).mean(dtype=float))
    return measured(shares, nulls)


def repetition(trace: RoutingTrace, choices: int = 1, *, draws: int = 200, seed: int = 0) -> Measured:
    """How often two consecutive tokens of a document share a first choice (or a first or second one), [L].

    Source: Mixtral (Jiang et al. 2024, arXiv 2401.04088, section 5, table 5). The null is load-aware, for two tokens
    drawn independently: sum_i p_i^2, with p_i the share of first choices on expert i. It exceeds the 1 / E of a
    balanced router (`chance_of_repetition`), so that imbalance does not read as locality. For first or second choices
    it is sum_i p_i^2 - sum_(i<j) p_ij^2, with p_i and p_ij the shares of tokens that have i, or both i and j, among
    their two.

    The first choices are the slots with the largest weights. Pairs of which one lacks them are left out, and so are
    tokens that are not next to each other in their sequence.
    Raises ValueError for other `choices` than 1 and 2 ("first or second"), more than K, or no consecutive tokens.
    """
    if choices not in (1, 2) or choices > trace.indices.shape[2]:
        raise ValueError(f"choices={choices}: wanted 1, or 2 where a token has two ({trace.indices.shape[2]} here)")
    next_to = (np.diff(trace.documents) == 0) & (np.diff(trace.positions) == 1)
    if not next_to.any():
        raise ValueError("the trace has no two consecutive tokens of one document")
    resamples = Resamples.draw(trace.documents[1:][next_to], draws, seed)
    shares, nulls = [], []
    for index, layer in enumerate(trace.layers):
        best = _best(trace, index, choices)
        whole = (best < trace.num_experts).all(1)
        left, right = best[:-1][next_to], best[1:][next_to]
        valid = (whole[:-1] & whole[1:])[next_to]
        if not valid.any():
            raise ValueError(f"layer {layer}: there are no two consecutive tokens that have {choices} choices each")
        same = (left[:, :, None] == right[:, None]).any((1, 2))
        shares.append(resamples.ratio(same & valid, valid))
        chosen = _membership(best[whole], trace.num_experts)
        both = (chosen.T @ chosen).astype(float) / len(chosen)
        nulls.append(np.diagonal(both) @ np.diagonal(both) - (np.triu(both, 1) ** 2).sum())
    return measured(shares, nulls)


def chance_of_repetition(num_experts: int, choices: int = 1) -> float:
    """How often two random sets of `choices` experts meet: 1 / E, and 1 - C(E-2, 2) / C(E, 2) for two (46.4 % of 8)."""
    return 1 - comb(num_experts - choices, choices) / comb(num_experts, choices)


def repetition_by_token(trace: RoutingTrace) -> np.ndarray:
    """How often neighbours would have the same first choice if every token chose by itself, [L].

    A token t draws its expert from s_t, the shares of the experts among all first choices for t in this trace. So this
    is the mean of sum_i s_t(i) s_u(i) over the neighbours t, u of a document. A token that occurs once can only draw
    what it has drawn, so rare tokens pull this level towards the count.
    """
    shares = vocabulary_specialization(trace, min_count=1, draws=0).value
    place = np.searchsorted(frequent_tokens(trace, 1), trace.token_ids)
    neighbours = np.diff(trace.documents) == 0
    one, next_one = place[:-1][neighbours], place[1:][neighbours]
    return (shares[:, one] * shares[:, next_one]).sum(-1).mean(-1)


def matched_agreement(
    a: RoutingTrace, b: RoutingTrace, *, draws: int = 200, shuffles: int = 20, seed: int = 0
) -> Measured:
    """The share of choices that two models have in common once their experts are matched, [L].

    2 |A and B| / (|A| + |B|), summed over the tokens, A and B being the sets of experts a token goes to. Since experts
    have no order, those of `b` are renamed by `match_experts` first. Matching finds some agreement between any
    two models, more so with few tokens; so the null is the mean when the tokens of `b` are shuffled and matched again.
    Every resample is matched anew as well.
    Raises ValueError where the traces differ in their tokens, layers or number of experts.
    """
    resamples = Resamples.draw(a.documents, draws, seed)
    rng = np.random.default_rng([seed, 1])
    orders = [rng.permutation(len(a.documents)) for _ in range(shuffles)]
    shares, nulls = [], []
    for ours, theirs in _memberships(a, b):
        mean_slots = resamples.total((ours.sum(1) + theirs.sum(1)) / 2)
        common = [_matched(overlap)[1] for overlap in resamples.overlap(ours, theirs)]
        by_chance = [_matched(ours.T @ theirs.take(order, axis=0))[1] for order in orders]
        shares.append(common / mean_slots)
        nulls.append(np.mean(by_chance) / mean_slots[0])
    return measured(shares, nulls)


def match_experts(a: RoutingTrace, b: RoutingTrace) -> np.ndarray:
    """The expert of `b` that stands for each expert of `a`, [L, E]: a permutation per layer.

    Of all one-to-one pairings the one with the most common tokens (linear assignment).
    Raises ValueError where the traces differ in their tokens, layers or number of experts.
    """
    return np.stack([_matched(ours.T @ theirs)[0] for ours, theirs in _memberships(a, b)])


def _matched(overlap: np.ndarray) -> tuple[np.ndarray, float]:
    """The column for each row of a table [E, E] that make the largest sum, and this sum."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(overlap, maximize=True)
    return columns, overlap[rows, columns].sum()


def _memberships(a: RoutingTrace, b: RoutingTrace) -> list[tuple[np.ndarray, np.ndarray]]:
    """`_membership` of each layer in two traces of the same tokens."""
    for name in ("num_experts", "layers"):
        found, wanted = getattr(b, name), getattr(a, name)
        if found != wanted:
            raise ValueError(f"{name}={found} in the second trace: wanted {wanted}, as in the first")
    if not np.array_equal(a.token_ids, b.token_ids):
        found = f"the {len(b.token_ids)} tokens of the second trace are not the {len(a.token_ids)} of the first"
        raise ValueError(f"token_ids: {found}: wanted two traces of one text")
    pairs = zip(a.indices, b.indices, strict=True)
    return [tuple(_membership(indices, a.num_experts) for indices in pair) for pair in pairs]


def _filled(indices: np.ndarray, experts: int, layer: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Token and expert of every slot that is not empty. With a `layer` to name, raises ValueError if there are none."""
    token, slot = np.nonzero(indices < experts)
    if layer is not None and not len(token):
        raise ValueError(f"layer {layer}: none of the {len(indices)} tokens goes to an expert")
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
