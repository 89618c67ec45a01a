"""The check of exercise 11: right answers written in other ways are accepted, known mistakes are met with a hint."""

from fractions import Fraction
from math import exp, log

import numpy as np
import pytest
import torch

from minimoe.course.checks import WrongAnswer, check_likelihood_ratio, check_posterior


def by_counting(relatives, strangers, score, width):
    near = [sum(1 for one in scores if abs(one - score) <= width) for scores in (relatives, strangers)]
    return Fraction(near[0] + 1, len(relatives) + 2) / Fraction(near[1] + 1, len(strangers) + 2)


def by_appending(relatives, strangers, score, width):
    """One more hit and one more miss, literally."""
    shares = [
        np.mean(np.abs(np.append(scores, [score, score + 9 * width]) - score) <= width)
        for scores in (relatives, strangers)
    ]
    return torch.tensor([shares[0] / shares[1]])


def in_place(relatives, strangers, score, width):
    """Right, and it spoils what it was given."""
    found = by_counting(relatives, strangers, score, width)
    relatives[:] = strangers[:] = 0
    return found


@pytest.mark.parametrize("answer", [by_counting, by_appending, in_place], ids=lambda f: f.__name__)
def test_right_ratio_is_accepted(answer):
    assert check_likelihood_ratio(answer).startswith("Right")


def by_bayes(prior, ratio):
    return prior * ratio / (prior * ratio + 1 - prior)


def by_log_odds(prior, ratio):
    return 1 / (1 + exp(-(log(prior) - log(1 - prior) + log(ratio))))


@pytest.mark.parametrize("answer", [by_bayes, by_log_odds], ids=lambda f: f.__name__)
def test_right_posterior_is_accepted(answer):
    assert check_posterior(answer).startswith("Right")


def share(scores, score, width, hit=1, more=2):
    return (np.sum(abs(scores - score) <= width) + hit) / (len(scores) + more)


def ratio_of(hit, more):
    return lambda a, b, s, w: share(a, s, w, hit, more) / share(b, s, w, hit, more)


WRONG = [
    (check_likelihood_ratio, lambda a, b, s, w: 1 / by_counting(a, b, s, w), "upside down"),
    (
        check_likelihood_ratio,
        lambda a, b, s, w: ((a >= s).sum() + 1) / (len(a) + 2) / (((b >= s).sum() + 1) / (len(b) + 2)),
        "from `score` upwards",
    ),
    (check_likelihood_ratio, ratio_of(0, 0), "Nothing was added"),
    (check_likelihood_ratio, ratio_of(1, 0), "nothing to the numbers of pairs"),
    (check_likelihood_ratio, ratio_of(1, 1), "add 2 to the numbers"),
    (check_likelihood_ratio, ratio_of(0, 2), "Not yet"),
    (
        check_likelihood_ratio,
        lambda a, b, s, w: (np.sum(abs(a - s) <= w) + 1) / (np.sum(abs(b - s) <= w) + 1),
        "These are counts",
    ),
    (
        check_likelihood_ratio,
        lambda a, b, s, w: by_counting(a, b, s, w) / (1 + by_counting(a, b, s, w)),
        "a probability already",
    ),
    (check_likelihood_ratio, lambda a, b, s, w: share(a, s, w), "among relatives alone"),
    (check_likelihood_ratio, lambda a, b, s, w: by_counting(a, b, s, 2 * w), "Not yet"),
    (check_likelihood_ratio, lambda a, b, s, w: float("inf"), "infinite"),
    (check_likelihood_ratio, lambda a, b, s, w: 1.0, "Not yet"),
    (check_likelihood_ratio, lambda a, b, s, w: [1.0, 2.0], "one number"),
    (check_likelihood_ratio, lambda a, b, s, w: None, "return"),
    (check_posterior, lambda p, r: p / (1 - p) * r, "These are odds"),
    (check_posterior, lambda p, r: r / (1 + r), "was not used"),
    (check_posterior, lambda p, r: p * r, "may pass 1"),
    (check_posterior, lambda p, r: by_bayes(p, 1 / r), "wrong way round"),
    (check_posterior, lambda p, r: p * r / (1 + p * r), "taken for odds"),
    (check_posterior, lambda p, r: p, "Not yet"),
    (check_posterior, lambda p, r: 0.5, "Not yet"),
    (check_posterior, lambda p, r: None, "return"),
]


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_wrong_answers_are_rejected_with_a_hint(check, answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check(answer)


def test_a_ratio_that_divides_by_no_stranger_gets_the_hint_about_zero():
    """Right as long as some stranger is near, and infinite where none is."""

    def answer(a, b, s, w):
        return by_counting(a, b, s, w) if (abs(b - s) <= w).any() else np.float64(1) / 0

    with pytest.raises(WrongAnswer, match="one may still exist"):
        check_likelihood_ratio(answer)
