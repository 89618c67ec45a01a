"""The checks of the exercise on the worth of a number (notebook 11)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minimoe.course.checks.answers import Mistakes, WrongAnswer, compare, numbers

Scores = np.ndarray  # [pairs] float64


def check_likelihood_ratio(answer: Callable[[Scores, Scores, float, float], float]) -> str:
    """Check `ratio(relatives, strangers, score, width)`: how much commoner scores within `width` of `score` are among
    relatives than among strangers, with 1 added to both counts and 2 to both numbers of pairs.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "This is the ratio upside down: strangers over relatives.": lambda *x: 1 / _ratio(*x),
        "This counts every score from `score` upwards. That answers another question, how many reach it. Here the "
        "score is known: count those near it, on both sides.": _of_the_tail,
        "Nothing was added. A share of 0 out of few pairs does not mean never: add 1 to each count, and 2 to each "
        "number of pairs.": lambda *x: _ratio(*x, added=(0, 0)),
        "1 was added to the counts, but nothing to the numbers of pairs. With one more hit and one more miss, add 2.": (
            lambda *x: _ratio(*x, added=(1, 0))
        ),
        "One more hit and one more miss make two more pairs: add 2 to the numbers of pairs, not 1.": (
            lambda *x: _ratio(*x, added=(1, 1))
        ),
        "These are counts, and there are more pairs of one kind than of the other. Divide each count by its number of "
        "pairs first.": _of_counts,
        "This is a probability already, from a belief of one half before. The task asks for the ratio alone.": (
            lambda *x: _ratio(*x) / (1 + _ratio(*x))
        ),
        "This is the share among relatives alone. It means something only beside the share among strangers.": (
            lambda relatives, _, *where: _share(relatives, *where, (1, 2))
        ),
    }
    rng = np.random.default_rng(0)
    relatives, strangers = 1 - rng.beta(1, 8, size=90), 1 - rng.beta(2, 5, size=140)
    for inputs in (
        (relatives, strangers, 0.9, 0.03),
        (relatives[:31], strangers, 0.8, 0.05),
        (relatives, strangers[strangers < 0.8], 0.93, 0.025),  # no stranger is near
    ):
        found = _scalar(answer, *inputs)
        if not found.isfinite():
            raise WrongAnswer(
                "Your answer is not a number, or infinite. No stranger came near this score, and one may still exist: "
                "add 1 to each count, and 2 to each number of pairs."
            )
        compare(found, _tensor(_ratio(*inputs)), {hint: _as_tensor(wrong) for hint, wrong in mistakes.items()}, inputs)
    return "Right: how much commoner this score is among relatives, also where no stranger has it."


def check_posterior(answer: Callable[[float, float], float]) -> str:
    """Check `posterior(prior, ratio)`: the probability after evidence, from the one before and a likelihood ratio.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "These are odds. Turn them back into a probability: odds / (1 + odds).": lambda p, r: r * p / (1 - p),
        "The belief before was not used. This is right for a belief of one half alone: what is rare before stays rarer "
        "after.": lambda p, r: r / (1 + r),
        "A probability times a ratio may pass 1. Turn the probability into odds first, p / (1 - p).": (
            lambda p, r: p * r
        ),
        "The ratio acts the wrong way round: evidence that is commoner among relatives must raise the belief.": (
            lambda p, r: _posterior(p, 1 / r)
        ),
        "The belief before was taken for odds. A probability p has the odds p / (1 - p).": lambda p, r: (
            p * r / (1 + p * r)
        ),
    }
    for inputs in ((0.1, 6.0), (0.02, 0.3), (0.9, 2.5), (0.5, 4.0)):
        found = _scalar(answer, *inputs)
        compare(
            found, _tensor(_posterior(*inputs)), {hint: _as_tensor(wrong) for hint, wrong in mistakes.items()}, inputs
        )
    return "Right: the same evidence leads from different beliefs to different beliefs."


def _scalar(answer: Callable, *inputs: object) -> Tensor:
    """One number, as a tensor without dimensions; the answer may spoil its inputs."""
    with np.errstate(all="ignore"):  # a division by zero is answered with a hint
        found = numbers(answer, *(value.copy() if isinstance(value, np.ndarray) else value for value in inputs))
    if found.numel() != 1:
        raise WrongAnswer(f"Your answer has shape {tuple(found.shape)}; wanted one number.")
    return found.reshape(())


def _tensor(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _as_tensor(wrong: Callable[..., float]) -> Callable[..., Tensor]:
    def as_tensor(*inputs: object) -> Tensor:
        with np.errstate(all="ignore"):
            return _tensor(wrong(*inputs))

    return as_tensor


def _share(scores: Scores, score: float, width: float, added: tuple[int, int]) -> np.float64:
    return np.float64((abs(scores - score) <= width).sum() + added[0]) / (len(scores) + added[1])


def _ratio(
    relatives: Scores, strangers: Scores, score: float, width: float, added: tuple[int, int] = (1, 2)
) -> np.float64:
    return _share(relatives, score, width, added) / _share(strangers, score, width, added)


def _of_the_tail(relatives: Scores, strangers: Scores, score: float, width: float) -> float:
    high, low = (((scores >= score).sum() + 1) / (len(scores) + 2) for scores in (relatives, strangers))
    return high / low


def _of_counts(relatives: Scores, strangers: Scores, score: float, width: float) -> float:
    near, far = ((abs(scores - score) <= width).sum() + 1 for scores in (relatives, strangers))
    return near / far


def _posterior(prior: float, ratio: float) -> float:
    odds = prior / (1 - prior) * ratio
    return odds / (1 + odds)
