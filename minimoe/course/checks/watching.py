"""The checks of the exercise on repetition (notebook 05)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minimoe.course.checks.answers import Mistakes, compare, numbers


def check_repetition(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Check `repetition(choices, documents)`: from the choices [T, K], best first, and the document [T] of each token,
    the share of the pairs of neighbours in one document that have the same first choice. Any number will do.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "You also paired the last token of a document with the first of the next. They are no neighbours.": (
            lambda choices, documents: _same(choices).mean()
        ),
        "You divided by the number of tokens. A document of n tokens has n - 1 pairs.": (
            lambda choices, documents: _within(choices, documents).sum() / len(choices)
        ),
        "You divided by all neighbouring tokens, also by those of two documents.": (
            lambda choices, documents: _within(choices, documents).sum() / (len(choices) - 1)
        ),
        "You counted a common expert anywhere among the choices. Here only the first column counts.": (
            lambda choices, documents: _any_common(choices)[_neighbours(documents)].mean()
        ),
        "You compared the second choices too, place by place. Here only the first column counts.": (
            lambda choices, documents: (choices[1:] == choices[:-1])[_neighbours(documents)].double().mean()
        ),
        "That is the mean of the documents' shares, in which a short document weighs as much as a long one. Count all "
        "pairs together.": _mean_of_documents,
    }
    for seed, lengths in ((4, (9, 2, 14)), (5, (3, 5, 4, 20))):  # with repetitions across a boundary, too
        choices, documents = _routed(seed, lengths)
        wanted = _within(choices, documents).mean()
        compare(numbers(answer, choices, documents), wanted, mistakes, (choices, documents))
    return "Right: only pairs within a document, only first choices, divided by the number of pairs."


def check_chance_by_load(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Check `chance_by_load(choices, num_experts)`: from the choices [T, K], best first, how often two tokens drawn
    independently share a first choice: sum p_i^2. Any number will do.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "That is 1 / E: right only if every expert is the first choice of as many tokens.": (
            lambda choices, experts: torch.tensor(1 / experts)
        ),
        "Your shares are those of all choices. Take the first column only.": (
            lambda choices, experts: _squares(choices, experts) / choices.numel() ** 2
        ),
        "These are sums of squared counts. A share is a count divided by the number of tokens.": (
            lambda choices, experts: _squares(choices[:, 0], experts)
        ),
        "That is the largest share: how often a bet on the busiest expert is won. Two may also meet elsewhere.": (
            lambda choices, experts: torch.bincount(choices[:, 0]).max() / len(choices)
        ),
        "The shares add up to 1. Square them before you add.": lambda choices, experts: torch.tensor(1.0),
        "You drew two *different* tokens out of this sample. That is fair too, but here both are drawn independently, "
        "from all tokens.": lambda choices, experts: (
            (_squares(choices[:, 0], experts) - len(choices)) / (len(choices) * (len(choices) - 1))
        ),
    }
    for seed, length in ((2, 40), (3, 25)):
        choices, _ = _routed(seed, (length,))
        wanted = _squares(choices[:, 0], 6) / length**2
        compare(numbers(answer, choices, 6), wanted, mistakes, (choices, 6))
    return "Right: at least 1 / E, and equal to it only when the load is even."


def _routed(seed: int, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Choices [T, 2] of six unevenly liked experts, and the document of each token."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(lengths), 6, generator=generator) + torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, -3.0])
    return logits.topk(2).indices, torch.repeat_interleave(torch.tensor(lengths))


def _neighbours(documents: Tensor) -> Tensor:
    return documents[1:] == documents[:-1]


def _same(choices: Tensor) -> Tensor:
    return (choices[1:, 0] == choices[:-1, 0]).double()


def _within(choices: Tensor, documents: Tensor) -> Tensor:
    return _same(choices)[_neighbours(documents)]


def _any_common(choices: Tensor) -> Tensor:
    return (choices[1:, :, None] == choices[:-1, None]).any(-1).any(-1).double()


def _mean_of_documents(choices: Tensor, documents: Tensor) -> Tensor:
    shares = [_same(choices[documents == document]).mean() for document in documents.unique()]
    return torch.stack(shares).mean()


def _squares(chosen: Tensor, experts: int) -> Tensor:
    return (torch.bincount(chosen.flatten(), minlength=experts).double() ** 2).sum()
