"""Nulls and intervals: what chance would give, and how far a measurement depends on the documents at hand.

Shapes: T tokens, E experts, L layers. A resample is a draw of documents with replacement. Whatever is counted is
counted once for each document, and a resample adds up counts: no draw walks over the tokens again.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from scipy.sparse import csr_array

LEVEL = 0.95  # of every interval
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


def measured(statistics: Sequence[np.ndarray], null: ArrayLike) -> Measured:
    """Value and interval of a statistic, beside its null [L, ...], or what can be broadcast to that.

    statistics: for each layer, of the trace and of its resamples, [1 + draws, ...]; NaN where a resample has none.
    """
    from scipy.stats import quantile

    stacked = np.stack(statistics, axis=1)
    value, drawn = stacked[0], stacked[1:]
    with np.errstate(invalid="ignore"):
        shift = value - np.nansum(drawn, axis=0) / (~np.isnan(drawn)).sum(0)
    tail = (1 - LEVEL) / 2
    ends = np.reshape([tail, 1 - tail], (2, *[1] * value.ndim))
    low, high = quantile(drawn, ends, axis=0, nan_policy="omit") + shift
    return Measured(value, np.broadcast_to(np.asarray(null, dtype=float), value.shape), low, high)


class Resamples(NamedTuple):
    """Which document each token is of, and how often each document is drawn."""

    document: np.ndarray  # [T], from 0
    weights: np.ndarray  # [documents, 1 + draws]; the first column is the trace as it is: once each

    @classmethod
    def draw(cls, documents: np.ndarray, draws: int, seed: int, strata: np.ndarray | None = None) -> "Resamples":
        """Draw as many documents as there are, with replacement, `draws` times.

        documents: [T], any numbers. strata: [T], a number that is the same throughout a document; as many documents of
        each are drawn as there are, so that there are no draws where each has just one. None: all documents are alike.
        """
        _, first, document = np.unique(documents, return_index=True, return_inverse=True)
        stratum = np.zeros(len(first)) if strata is None else strata[first]
        numbers, sizes = np.unique(stratum, return_counts=True)
        weights = np.ones((1 + (draws if sizes.max() > 1 else 0), len(first)))
        rng = np.random.default_rng(seed)
        for number, size in zip(numbers, sizes, strict=True):
            weights[1:, stratum == number] = rng.multinomial(size, np.full(size, 1 / size), size=len(weights) - 1)
        return cls(document, weights.T)

    def of(self, tokens: np.ndarray) -> "Resamples":
        """The same draws for some of the tokens, each as often as it is named."""
        return self._replace(document=self.document[tokens])

    def counts(self, codes: np.ndarray, num_codes: int) -> "csr_array":
        """How often each code [T] occurs in each document, [codes, documents], sparse."""
        from scipy.sparse import csr_array

        return csr_array((np.ones(len(codes)), (codes, self.document)), shape=(num_codes, len(self.weights)))

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum of values [T], [1 + draws]."""
        return np.bincount(self.document, values, minlength=len(self.weights)) @ self.weights

    def ratio(self, above: np.ndarray, below: np.ndarray) -> np.ndarray:
        """The sum of values over that of others, [1 + draws]; NaN where a resample has none of the others."""
        with np.errstate(invalid="ignore"):
            return self.total(above) / self.total(below)

    def overlap(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The tokens that chose expert i in `a` and j in `b`, [1 + draws, E, E], from two memberships [T, E]."""
        order = self.document.argsort(kind="stable")
        ends = np.bincount(self.document).cumsum()[:-1]
        pieces = zip(np.split(a[order], ends), np.split(b[order], ends), strict=True)
        tables = np.stack([ours.T @ theirs for ours, theirs in pieces]).astype(float)
        return np.tensordot(self.weights, tables, axes=(0, 0))

    def conditional_entropy(self, expert: np.ndarray, given: np.ndarray) -> np.ndarray:
        """H(expert | given) of two numbers [T], in nats, [1 + draws]."""
        joint = given * (expert.max() + 1) + expert
        return (self._sum_x_log_x(given) - self._sum_x_log_x(joint)) / self.total(np.ones(len(given)))

    def _sum_x_log_x(self, codes: np.ndarray) -> np.ndarray:
        """The sum of c ln c over how often each code occurs, [1 + draws]; in parts, so that no table becomes large."""
        counts = self.counts(codes, codes.max() + 1)
        counts = counts[np.diff(counts.indptr) > 0]
        step = max(1, LARGEST_TABLE // counts.shape[0])
        parts = (self.weights[:, start : start + step] for start in range(0, self.weights.shape[1], step))
        return np.concatenate([x_log_x(counts @ part).sum(0) for part in parts])


def x_log_x(x: np.ndarray) -> np.ndarray:
    """x ln x, 0 for 0. (`scipy.special.xlogy` takes half as long again.)"""
    return x * np.log(np.where(x > 0, x, 1))


def random_loads(filled: np.ndarray, experts: int, shuffles: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens per expert, [shuffles, E], when each of filled[k] tokens draws k of the experts, all sets alike.

    Expert by expert: of the tokens with j places left and m experts to come, each takes this one with probability
    j / m (selection sampling; Knuth, The Art of Computer Programming, volume 2, section 3.4.2).
    """
    places = np.arange(len(filled))
    waiting = np.tile(filled, (shuffles, 1))  # [shuffles, places left]
    loads = np.empty((shuffles, experts))
    for expert in range(experts):
        taken = rng.binomial(waiting, np.minimum(1, places / (experts - expert)))
        loads[:, expert] = taken.sum(1)
        waiting = waiting - taken
        waiting[:, :-1] += taken[:, 1:]
    return loads


def random_pairs(loads: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How often two experts are chosen together, [E, E], by the most random router with given loads.

    Under it a set of k experts is as likely as the product of their k weights: conditional Poisson sampling (Chen,
    Dempster & Liu 1994, Biometrika 81). With e_k the elementary symmetric polynomial, the sum of the products of all
    sets of k, expert i is in w_i e_(k-1)(all but i) / e_k(all) of the sets, and i and j are both in
    w_i w_j e_(k-2)(all but i and j) / e_k(all). The odds of the weights are scaled until they give the loads.

    loads: [E], share of the tokens that choose each expert. sizes: [K + 1], share of those that choose k experts.
    """

    def share(others: np.ndarray, chosen: int) -> np.ndarray:
        """The share of sets that hold `chosen` experts, of weight 0 in `others`, over the product of their weights."""
        k = np.flatnonzero(sizes)
        k = k[k >= chosen]
        of_others, of_all = (_symmetric_polynomials(values, len(sizes)) for values in (others, weights))
        return of_others[..., k - chosen] @ (sizes[k] / of_all[k])

    others = 1 - np.eye(len(loads))
    wanted = _odds(loads)
    weights = np.where(loads > 0, wanted, 0.0)
    for _ in range(1000):
        weights = weights / weights.max()
        found = weights * share(weights * others, 1)
        if np.allclose(found, loads, rtol=1e-9, atol=1e-9):
            break
        weights = np.where(loads > 0, weights * wanted / _odds(found), 0.0)
    return np.outer(weights, weights) * share(weights * others[:, None] * others, 2)


def _odds(share: np.ndarray) -> np.ndarray:
    share = share.clip(1e-12, 1 - 1e-9)
    return share / (1 - share)


def _symmetric_polynomials(weights: np.ndarray, count: int) -> np.ndarray:
    """e_0 to e_(count-1) of weights [..., E]: the coefficients of the product of all (1 + w x), [..., count]."""
    polynomial = np.zeros((*weights.shape[:-1], count))
    polynomial[..., 0] = 1
    for weight in np.moveaxis(weights, -1, 0):
        polynomial[..., 1:] += weight[..., None] * polynomial[..., :-1]
    return polynomial


def shuffled_within(group: np.ndarray, shuffles: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random orders of units that keep those of a group together, groups ascending."""
    if not group.any():
        return [rng.permutation(len(group)) for _ in range(shuffles)]
    return [np.argsort(group + rng.random(len(group))) for _ in range(shuffles)]


def shuffled_conditional_entropy(experts: np.ndarray, cells: np.ndarray, orders: Sequence[np.ndarray]) -> float:
    """The mean of H(expert | cell) when the units change places between cells.

    experts: [units, E], how often each unit was sent to each expert. cells: [units], the cell of each place.
    orders: for each shuffle, which unit comes to the first place, to the next, and so on.
    """
    from scipy.sparse import csr_array

    shape, ones = (cells.max() + 1, len(cells)), np.ones(len(cells))
    tables = (csr_array((ones, (cells, order)), shape=shape) @ experts for order in orders)
    return float(np.mean([x_log_x(table.sum(1)).sum() - x_log_x(table).sum() for table in tables])) / experts.sum()
