"""The checks of the exercise on p-values and bounds (notebook 10)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minimoe.course.checks.answers import Mistakes, compare, numbers

Shuffled = np.ndarray  # [T] scores of random orders


def check_permutation_p(answer: Callable[[float, Shuffled], float]) -> str:
    """Check `permutation_p(score, shuffled)`: the p-value of a score beside those of T random orders,
    (1 + how many of them reach it) / (T + 1). Any number will do.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "The order that was found is one of the possible orders too: count it among those that reach the score, and "
        "among all. Without it a p-value can be 0, and no test of a few orders can promise that.": _as_tensor(
            lambda score, shuffled: _reach(score, shuffled) / len(shuffled)
        ),
        "You counted the order that was found among all orders, but not among those that reach the score. It does.": (
            _as_tensor(lambda score, shuffled: _reach(score, shuffled) / (len(shuffled) + 1))
        ),
        "You counted the order that was found among those that reach the score, but not among all: then a p-value can "
        "be above 1.": _as_tensor(lambda score, shuffled: (1 + _reach(score, shuffled)) / len(shuffled)),
        "A random order that reaches the score exactly has reached it: `>=`, not `>`. Else ties are counted for the "
        "claim.": _as_tensor(lambda score, shuffled: (1 + (shuffled > score).sum()) / (len(shuffled) + 1)),
        "A random order that reaches the score exactly has reached it: `>=`, not `>`. And the order that was found is "
        "missing, above and below.": _as_tensor(lambda score, shuffled: (shuffled > score).sum() / len(shuffled)),
        "This is two-sided: it counts orders far below 0 as well. Only a high score speaks for a common origin.": (
            _as_tensor(lambda score, shuffled: (1 + (abs(shuffled) >= abs(score)).sum()) / (len(shuffled) + 1))
        ),
        "This is twice the p-value, as in a two-sided test. Only a high score speaks for a common origin.": _as_tensor(
            lambda score, shuffled: min(1, 2 * _p_value(score, shuffled))
        ),
        "This is the share of orders below the score: the wrong side. Count those that do as well or better.": (
            _as_tensor(lambda score, shuffled: (shuffled < score).mean())
        ),
        "This is 1 - p. A small p-value is the surprising one.": _as_tensor(
            lambda score, shuffled: 1 - _p_value(score, shuffled)
        ),
        "You counted the orders that score at most as much: the wrong side. A high score speaks for a common origin.": (
            _as_tensor(lambda score, shuffled: (1 + (shuffled <= score).sum()) / (len(shuffled) + 1))
        ),
    }
    rng = np.random.default_rng(0)
    for score, trials in ((0.5, 99), (-0.25, 40), (3.0, 19)):  # halves and quarters: ties are exact
        shuffled = rng.integers(-6, 7, size=trials) / 4
        inputs = (score, shuffled)
        found = numbers(answer, score, shuffled.copy())
        compare(found, torch.tensor(_p_value(*inputs), dtype=torch.float64), mistakes, inputs)
    return "Right: never 0, ties against the claim, and among strangers at most p as often as p says."


def check_upper_bound(answer: Callable[[int, float], float]) -> str:
    """Check `upper_bound(trials, confidence)`: the one-sided bound of Clopper and Pearson (1934, Biometrika 26) on a
    rate of which no event was seen: 1 - (1 - confidence) ** (1 / trials). Any number will do.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "None seen does not mean that there are none. Which rate would still show none with a chance of "
        "1 - confidence?": _as_tensor(lambda trials, confidence: 0.0),
        "This is the upper end of a two-sided interval: it leaves half of the error for a lower end. Of 0 events there "
        "is no lower end to get wrong; all of the error may lie above.": _as_tensor(
            lambda trials, confidence: 1 - ((1 - confidence) / 2) ** (1 / trials)
        ),
        "This is the bound for 95 %, whatever `confidence` says.": _as_tensor(
            lambda trials, confidence: 1 - 0.05 ** (1 / trials)
        ),
        "This is the rule of three, 3 / trials: an approximation, for 95 % and many trials. The task asks for the "
        "exact bound.": _as_tensor(lambda trials, confidence: 3 / trials),
        "This is -ln(1 - confidence) / trials: close for many trials. The chance to see none is (1 - rate) ** trials, "
        "exactly.": _as_tensor(lambda trials, confidence: -np.log(1 - confidence) / trials),
        "Here the bound is wrong with a chance of `confidence`. It may be wrong with a chance of 1 - confidence.": (
            _as_tensor(lambda trials, confidence: 1 - confidence ** (1 / trials))
        ),
        "This is the share of strangers that are not flagged. The bound is 1 minus that.": _as_tensor(
            lambda trials, confidence: (1 - confidence) ** (1 / trials)
        ),
        "This is one event in as many trials. How far above that may the rate be, and still show none?": _as_tensor(
            lambda trials, confidence: 1 / trials
        ),
    }
    for inputs in ((20, 0.95), (7, 0.8), (695, 0.99)):
        wanted = torch.tensor(1 - (1 - inputs[1]) ** (1 / inputs[0]), dtype=torch.float64)
        compare(numbers(answer, *inputs), wanted, mistakes, inputs)
    return "Right: a higher rate would have shown itself with at least this confidence."


def _reach(score: float, shuffled: Shuffled) -> int:
    return int((shuffled >= score).sum())


def _p_value(score: float, shuffled: Shuffled) -> float:
    return (1 + _reach(score, shuffled)) / (len(shuffled) + 1)


def _as_tensor(wrong: Callable[..., float]) -> Callable[..., Tensor]:
    return lambda *inputs: torch.tensor(float(wrong(*inputs)), dtype=torch.float64)
