"""Rates and their intervals, against scikit-learn, scipy and brute force."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from minimoe.fingerprints.rates import auc, interval, roc, true_positive_rate


@pytest.fixture
def scores():
    generator = np.random.default_rng(0)
    positives, negatives = generator.normal(1, 1, 70).round(1), generator.normal(0, 1, 210).round(1)  # with ties
    return list(positives), list(negatives)


def test_auc_is_that_of_scikit_learn(scores):
    positives, negatives = scores
    labels = [1] * len(positives) + [0] * len(negatives)
    assert auc(*scores) == pytest.approx(roc_auc_score(labels, positives + negatives))


def test_partial_auc_is_the_area_under_the_curve_by_small_steps(scores):
    false, true = roc(*scores)
    grid = np.linspace(0, 0.05, 200_001)
    assert auc(*scores, up_to=0.05) == pytest.approx(np.interp(grid, false, true).mean(), abs=1e-4)


def test_perfect_and_hopeless_scores():
    assert auc([2, 3], [0, 1]) == auc([2, 3], [0, 1], up_to=0.05) == 1
    assert auc([1, 1], [1, 1]) == 0.5
    assert auc([0], [1]) == 0


def test_a_missing_score_ranks_lowest():
    assert auc([None], [0.0]) == 0
    assert auc([None], [None]) == 0.5
    assert true_positive_rate([None, 1.0], [None, 0.0]) == (1, 2)


def test_at_most_the_promised_share_of_negatives_is_above_the_threshold(scores):
    positives, negatives = scores
    for at in (0.01, 0.05, 0.2):
        hits, trials = true_positive_rate(positives, negatives, at=at)
        allowed = [
            sum(p > threshold for p in positives)
            for threshold in negatives
            if sum(n > threshold for n in negatives) <= at * len(negatives)
        ]
        assert (hits, trials) == (max(allowed), len(positives))


def test_intervals_are_those_of_scipy():
    for hits, trials in ((0, 10), (3, 10), (10, 10), (299, 300)):
        wanted = stats.binomtest(hits, trials).proportion_ci(method="exact")
        assert interval(hits, trials) == pytest.approx((wanted.low, wanted.high))
