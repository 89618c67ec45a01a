"""The checks of exercise 10 accept every right answer and name each known mistake."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from minimoe.course.checks import WrongAnswer, check_permutation_p, check_upper_bound


def by_numpy(score, shuffled):
    return (1 + np.sum(shuffled >= score)) / (1 + len(shuffled))


def one_by_one(score, shuffled):
    reached = sum(other >= score for other in [score, *shuffled.tolist()])
    return Fraction(int(reached), len(shuffled) + 1)


def by_sorting(score, shuffled):
    return 1 - np.searchsorted(np.sort(np.append(shuffled, score)), score, side="left") / (len(shuffled) + 1)


def by_torch(score, shuffled):
    return (1 + (torch.from_numpy(shuffled) >= score).sum()) / (len(shuffled) + 1)


def in_place(score, shuffled):
    """Right, and it spoils what it was given."""
    p = by_numpy(score, shuffled)
    shuffled[:] = 0
    return [p]


def by_scipy(trials, confidence):
    return stats.beta.ppf(confidence, 1, trials)


def by_binomtest(trials, confidence):
    interval = stats.binomtest(0, trials, alternative="less").proportion_ci(confidence_level=confidence)
    return torch.tensor(interval.high)


def by_bisection(trials, confidence):
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 - middle) ** trials > 1 - confidence else (low, middle)
    return high


@pytest.mark.parametrize("answer", [by_numpy, one_by_one, by_sorting, by_torch, in_place], ids=lambda f: f.__name__)
def test_right_p_values_are_accepted(answer):
    assert check_permutation_p(answer).startswith("Right")


@pytest.mark.parametrize("answer", [by_scipy, by_binomtest, by_bisection], ids=lambda f: f.__name__)
def test_right_bounds_are_accepted(answer):
    assert check_upper_bound(answer).startswith("Right")


def two_sided_by_absolute_values(score, shuffled):
    return (1 + np.sum(np.abs(shuffled) >= abs(score))) / (1 + len(shuffled))


def by_percentile(score, shuffled):
    return stats.percentileofscore(shuffled, score, kind="strict") / 100


def by_rounding(trials, confidence):
    return round(by_scipy(trials, confidence), 2)


def of_normal_approximation(trials, confidence):
    return 0 + stats.norm.ppf(confidence) * np.sqrt(0 * 1 / trials)


def clopper_pearson_two_sided(trials, confidence):
    return stats.binomtest(0, trials).proportion_ci(confidence_level=confidence).high


WRONG = [
    (check_permutation_p, lambda s, r: np.mean(r >= s), "can be 0"),
    (check_permutation_p, lambda s, r: np.sum(r >= s) / (len(r) + 1), "not among those that reach"),
    (check_permutation_p, lambda s, r: (1 + np.sum(r >= s)) / len(r), "above 1"),
    (check_permutation_p, lambda s, r: (1 + np.sum(r > s)) / (len(r) + 1), "ties are counted for the claim"),
    (check_permutation_p, lambda s, r: np.mean(r > s), "above and below"),
    (check_permutation_p, two_sided_by_absolute_values, "two-sided"),
    (check_permutation_p, lambda s, r: min(1, 2 * by_numpy(s, r)), "twice"),
    (check_permutation_p, by_percentile, "the wrong side"),
    (check_permutation_p, lambda s, r: 1 - by_numpy(s, r), "1 - p"),
    (check_permutation_p, lambda s, r: (1 + np.sum(r <= s)) / (len(r) + 1), "at most as much"),
    (check_permutation_p, lambda s, r: 1 - stats.norm.cdf(s, r.mean(), r.std()), "Not yet"),
    (check_permutation_p, lambda s, r: None, "return"),
    (check_permutation_p, lambda s, r: r >= s, "single number"),
    (check_upper_bound, lambda n, c: 0.0, "None seen"),
    (check_upper_bound, of_normal_approximation, "None seen"),
    (check_upper_bound, clopper_pearson_two_sided, "two-sided"),
    (check_upper_bound, lambda n, c: 3 / n, "rule of three"),
    (check_upper_bound, lambda n, c: -np.log(1 - c) / n, "exactly"),
    (check_upper_bound, lambda n, c: 1 - c ** (1 / n), "chance of `confidence`"),
    (check_upper_bound, lambda n, c: (1 - c) ** (1 / n), "1 minus that"),
    (check_upper_bound, lambda n, c: 1 / n, "one event"),
    (check_upper_bound, lambda n, c: 1 - 0.05 ** (1 / n), "whatever `confidence` says"),
    (check_upper_bound, by_rounding, "Not yet"),
    (check_upper_bound, lambda n, c: "small", "returned str"),
]


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_wrong_answers_are_rejected_with_a_hint(check, answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check(answer)
