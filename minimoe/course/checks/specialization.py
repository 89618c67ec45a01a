"""The check of the exercise on specialization (notebook 06)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minimoe.course.checks.answers import Mistakes, WrongAnswer, compare, numbers

Labels = np.ndarray  # [T] int64
_SHUFFLES = 100


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

    The answer is random. It is right if it is within 5 standard errors of ours.

    Raises:
        WrongAnswer: with a hint.
    """
    rng = np.random.default_rng(1)
    documents = np.repeat(np.arange(24), rng.integers(10, 31, size=24)) + 5
    labels = documents * 7 % 3
    favourite = 2 * labels + rng.integers(2, size=30)[documents]
    experts = np.where(rng.random(len(documents)) < 0.8, favourite, rng.integers(6, size=len(documents)))
    wanted, tolerance = _mean([_information(_dealt(labels, documents, rng), experts) for _ in range(400)])
    of_tokens, near = _mean([_information(rng.permutation(labels), experts) for _ in range(400)])
    found = _scalar(answer, labels, experts, documents, _SHUFFLES).item()
    if abs(found - wanted) < tolerance:
        return "Right: this is how much a router that ignores the label would seem to know."
    if abs(found - _information(labels, experts)) < 1e-6:
        raise WrongAnswer("This is the information of the labels as they are. Did the shuffled labels get used?")
    if abs(found - of_tokens) < near:
        raise WrongAnswer(
            "You shuffled the tokens. Then no document is left whole, and chance looks smaller than it is: the tokens "
            "of a document resemble each other for many reasons. Give each document one label."
        )
    if abs(found - wanted * _SHUFFLES) < tolerance * _SHUFFLES:
        raise WrongAnswer("This is the sum over the shuffles. The task asks for their mean.")
    raise WrongAnswer(f"Not yet: {found:.4f}; wanted {wanted:.4f}, give or take {tolerance:.4f}.")


def _mean(values: list[float]) -> tuple[float, float]:
    """The mean, and 5 standard errors of the mean of `_SHUFFLES` such values."""
    return float(np.mean(values)), float(5 * np.std(values) / _SHUFFLES**0.5)


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


def _dealt(labels: np.ndarray, documents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The labels of the tokens after the documents exchanged theirs."""
    _, first, number = np.unique(documents, return_index=True, return_inverse=True)
    return rng.permutation(labels[first])[number]
