"""How well scores tell one group from another, with exact intervals.

Scores that are missing count as the lowest: a method that refuses a pair has not found anything in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats


def roc(positives: Sequence[float | None], negatives: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray]:
    """False-positive and true-positive rate at every threshold, from (0, 0) to (1, 1)."""
    high, low = _filled(positives), _filled(negatives)
    thresholds = np.concatenate([[np.inf], np.unique(np.concatenate([high, low]))[::-1]])
    return tuple((scores >= thresholds[:, None]).mean(1) for scores in (low, high))


def auc(positives: Sequence[float | None], negatives: Sequence[float | None], *, up_to: float = 1.0) -> float:
    """The area under the ROC curve up to a false-positive rate, divided by that rate.

    Whole, it is the chance that a positive scores higher than a negative, ties counted half (Hanley & McNeil 1982,
    Radiology 143). In part, `up_to` / 2 is chance and 1 is perfect.
    """
    false, true = roc(positives, negatives)
    end = int((false < up_to).sum())  # the first corner that is not before the limit
    share = (up_to - false[end - 1]) / (false[end] - false[end - 1])
    x = np.append(false[:end], up_to)
    y = np.append(true[:end], true[end - 1] + share * (true[end] - true[end - 1]))
    return float(np.trapezoid(y, x) / up_to)


def true_positive_rate(
    positives: Sequence[float | None], negatives: Sequence[float | None], *, at: float = 0.01
) -> tuple[int, int]:
    """How many positives, of how many, are above a threshold that at most the share `at` of the negatives is above."""
    high, low = _filled(positives), np.sort(_filled(negatives))[::-1]
    threshold = low[int(at * len(low))]
    return int((high > threshold).sum()), len(high)


def interval(hits: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Of a share (Clopper & Pearson 1934, Biometrika 26): it covers the true one at least as often as promised.

    Trials are taken to be independent. Pairs that have a model in common are not quite.
    """
    tail = (1 - confidence) / 2
    low = stats.beta.ppf(tail, hits, trials - hits + 1) if hits else 0.0
    high = stats.beta.ppf(1 - tail, hits + 1, trials - hits) if hits < trials else 1.0
    return float(low), float(high)


def _filled(scores: Sequence[float | None]) -> np.ndarray:
    return np.array([-np.inf if score is None else score for score in scores], dtype=np.float64)
