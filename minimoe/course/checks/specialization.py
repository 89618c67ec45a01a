"""The check of the exercise on specialization (notebook 06)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from minimoe.course.checks.answers import Mistakes, WrongAnswer, compare, numbers

Labels = np.ndarray  # [T] int64
_SHUFFLES = 1000
_SKEWED = (57, 38)  # texts in which the median over all dealings is far from their mean


def check_mutual_information(answer: Callable[[Labels, Labels], float]) -> str:
    """Check `information(labels, experts)`: what the label of a token tells about its expert, in nats, from two arrays
    [T] of whole numbers that need not begin at 0.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "These are bits. The task asks for nats: the natural logarithm, `np.log`.": (
            lambda labels, experts: _information(labels, experts) / np.log(2)
        ),
        "The sign is the wrong way round. Information is never negative: the log of together over apart.": (
            lambda labels, experts: -_information(labels, experts)
        ),
        "This is how much there is to know about the expert, H(expert). Take off what is still unknown once the label "
        "is told.": lambda labels, experts: _entropy(experts),
        "This is what is still unknown once the label is told, H(expert | label). Information is what was gained: "
        "H(expert) minus this.": lambda labels, experts: _entropy(experts) - _information(labels, experts),
        "This is the entropy of label and expert together. Compare it with the entropies of the two alone.": (
            lambda labels, experts: _entropy(_pairs(labels, experts))
        ),
        "This is the sum over all tokens. Divide by their number: information is a mean.": (
            lambda labels, experts: len(labels) * _information(labels, experts)
        ),
        "This is information as a share of H(expert). The task asks for nats.": (
            lambda labels, experts: _information(labels, experts) / _entropy(experts)
        ),
    }
    rng = np.random.default_rng(0)
    labels = rng.choice([2, 3, 700], size=60, p=[0.6, 0.3, 0.1])
    for experts in (
        np.where(rng.random(60) < 0.7, labels % 4, rng.integers(4, size=60)),
        rng.permutation(np.arange(60) % 5) + 1,
    ):
        inputs = (labels, experts)
        found = _scalar(answer, *inputs)
        if not found.isfinite().all():
            raise WrongAnswer(
                "Your answer is not a number. Some label never meets some expert, and log 0 has no value: such a pair "
                "adds nothing, so leave it out."
            )
        wanted = torch.tensor(_information(*inputs))
        compare(found, wanted, {hint: _as_tensor(wrong) for hint, wrong in mistakes.items()}, inputs)
    return "Right: the information in nats, also where a pair never occurs."


def check_information_by_chance(answer: Callable[[Labels, Labels, Labels, int], float]) -> str:
    """Check `chance(labels, experts, documents, shuffles)`: the mean of the information, in nats, when the labels are
    dealt out anew among the documents, `shuffles` times. All tokens of a document [T] share a label.

    The answer is random. There are so few documents that every way to deal is known: after one shuffle the answer must
    belong to one of them, and after many it must be within 5 standard errors of their mean.

    Raises:
        WrongAnswer: with a hint.
    """
    texts = [_few_documents(seed) for seed in _SKEWED]
    for text in texts:
        _check_mean(answer, *text)
    for labels, experts, documents in texts:
        possible = _dealt(labels, experts, documents)
        for _ in range(3):
            once = _scalar(answer, labels, experts, documents, 1).item()
            if abs(possible - once).min() > 1e-5:
                raise WrongAnswer(
                    f"After one shuffle your answer is {once:.4f}, which no dealing of the labels gives. Each document "
                    "keeps one label for all its tokens, and as many documents have each label as before: shuffle the "
                    "labels of the documents, do not draw new ones."
                )
    return "Right: this is how much a router that ignores the label would seem to know."


def _check_mean(answer: Callable[[Labels, Labels, Labels, int], float], *text: Labels) -> None:
    labels, experts, _ = text
    possible = _dealt(*text)
    wanted, tolerance = possible.mean(), 5 * possible.std() / _SHUFFLES**0.5
    found = _scalar(answer, *text, _SHUFFLES).item()
    if abs(found - _information(labels, experts)) < 1e-6:
        raise WrongAnswer("This is the information of the labels as they are. Did the shuffled labels get used?")
    if abs(possible - found).min() < 1e-7:
        raise WrongAnswer(
            "This is what one shuffle gives, or the median of them. The task asks for the mean of many, each of them "
            "another: does the loop begin with the same seed every time?"
        )
    if abs(found - wanted) < tolerance:
        return
    rng = np.random.default_rng(1)
    of_tokens = [_information(rng.permutation(labels), experts) for _ in range(200)]
    if abs(found - np.mean(of_tokens)) < np.std(of_tokens):
        raise WrongAnswer(
            "You shuffled the tokens. Then no document is left whole, and chance looks smaller than it is: the tokens "
            "of a document resemble each other for many reasons. Give each document one label."
        )
    if abs(found - wanted * _SHUFFLES) < tolerance * _SHUFFLES:
        raise WrongAnswer("This is the sum over the shuffles. The task asks for their mean.")
    raise WrongAnswer(f"Not yet: {found:.4f}; wanted {wanted:.4f}, give or take {tolerance:.4f}.")


def _few_documents(seed: int) -> tuple[Labels, Labels, Labels]:
    """Labels, experts and documents of a short text: seven documents, four with one label, two and one with others."""
    rng = np.random.default_rng([seed, 1])
    number = np.repeat(np.arange(7), rng.integers(10, 40, size=7))
    labels = rng.permutation([3, 3, 3, 3, 0, 0, 12])[number]
    favourite = rng.permutation([0, 0, 0, 0, 1, 2, 3])[number]
    experts = np.where(rng.random(len(number)) < 0.7, favourite, rng.integers(4, size=len(number)))
    return labels, experts, rng.permutation(7)[number] + 5


def _dealt(labels: Labels, experts: Labels, documents: Labels) -> np.ndarray:
    """The information after each way to deal the documents' labels; all ways are alike to a shuffle."""
    _, first, number = np.unique(documents, return_index=True, return_inverse=True)
    ways = sorted(set(permutations(labels[first].tolist())))
    return np.array([_information(np.array(way)[number], experts) for way in ways])


def _scalar(answer: Callable, *inputs: object) -> Tensor:
    """One number, as a tensor without dimensions; the answer may spoil its inputs."""
    copies = (value.copy() if isinstance(value, np.ndarray) else value for value in inputs)
    found = numbers(answer, *copies)
    if found.numel() != 1:
        raise WrongAnswer(f"Your answer has shape {tuple(found.shape)}; wanted one number.")
    return found.reshape(())


def _as_tensor(wrong: Callable[[Labels, Labels], float]) -> Callable[[Labels, Labels], Tensor]:
    return lambda labels, experts: torch.tensor(wrong(labels, experts), dtype=torch.float64)


def _entropy(values: np.ndarray) -> float:
    shares = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(shares * np.log(shares)).sum())


def _pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a * (b.max() + 1) + b


def _information(labels: np.ndarray, experts: np.ndarray) -> float:
    return _entropy(labels) + _entropy(experts) - _entropy(_pairs(labels, experts))
