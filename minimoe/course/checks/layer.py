"""The checks of the exercises on one MoE layer (notebooks 00 and 01)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minimoe.course.checks.answers import Mistakes, WrongAnswer, compare, numbers
from minimoe.model import route_grouped, route_topk


def check_first_choice_shares(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Check `shares(indices, num_experts)`: from the choices [T, K], best first, the share of tokens whose first choice
    each expert is, [E]. A list, an array and a tensor are all right.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "These are counts. A share is a part of all tokens: divide by their number.": (
            lambda indices, experts: torch.bincount(indices[:, 0], minlength=experts).double()
        ),
        "You counted every choice. Only the first column of `indices` holds first choices.": (
            lambda indices, experts: torch.bincount(indices.flatten(), minlength=experts) / indices.numel()
        ),
        "You counted every choice, and divided by the tokens: that adds up to K. Take the first column of `indices`.": (
            lambda indices, experts: torch.bincount(indices.flatten(), minlength=experts) / len(indices)
        ),
        "You counted the last choices. The best one stands in the first column.": (
            lambda indices, experts: torch.bincount(indices[:, -1], minlength=experts) / len(indices)
        ),
    }
    for tokens, experts, k in ((7, 5, 2), (40, 8, 3)):
        indices = _logits(tokens, experts).topk(k).indices
        indices[indices == experts - 1] = 0  # nobody meets the last expert, and it still has a share
        wanted = torch.bincount(indices[:, 0], minlength=experts) / tokens
        found = numbers(answer, indices, experts)
        if found.dim() == 1 and len(found) < experts:
            raise WrongAnswer(
                f"There are {experts} experts and you returned {len(found)} shares. An expert that no token meets has "
                "share 0; `torch.bincount` has an argument for that."
            )
        compare(found, wanted, mistakes, (indices, experts))
    return "Right: the shares are those of the first choices, and they add up to 1."


def check_topk_weights(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Check `topk_weights(logits, k)`: from the logits [T, E], the weights [T, K] of the k best experts, best first,
    scaled to sum to 1. Softmax first and then dividing, or softmax over the k best logits: both are right, and equal.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "These are the probabilities of the chosen experts. They do not add up to 1 yet: a division is missing.": (
            lambda logits, k: logits.softmax(-1).topk(k).values
        ),
        "You took the softmax down the tokens. It is the experts that compete: use the last dimension.": (
            lambda logits, k: _normalised(logits.softmax(0).topk(k).values)
        ),
        "You divided the raw logits, which may be negative. Take a softmax before you divide.": (
            lambda logits, k: _normalised(logits.topk(k).values)
        ),
        "Every chosen expert got the same weight. The router also says how much to trust each.": (
            lambda logits, k: torch.full((len(logits), k), 1 / k)
        ),
        "You kept the worst experts. `topk` returns the largest values unless told otherwise.": (
            lambda logits, k: _normalised(logits.softmax(-1).topk(k, largest=False).values)
        ),
    }
    for tokens, experts, k in ((5, 8, 2), (6, 9, 4)):
        logits = _logits(tokens, experts)
        wanted = route_topk(logits, k, norm_topk_prob=True).weights
        found = numbers(answer, logits, k)
        compare(found, wanted, mistakes, (logits, k))
    return "Right: the weights are positive, ordered, and add up to 1 for every token."


def check_grouped_choice(answer: Callable[[Tensor, int, int], Tensor]) -> str:
    """Check `grouped_choice(logits, k, n_group)`: the ids [T, K] of the experts when each of n_group groups of
    neighbours gives its k / n_group best (Pangu Pro MoE, arXiv 2505.21411). The order within a token's row is free.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "Some ids are off by a multiple. In which id does a group start? It depends on how many experts a group holds, "
        "not on how many it gives.": lambda logits, k, n_group: _from_groups(logits, k, n_group, step=k // n_group),
        "These are places within the groups. Add the id with which each group starts.": (
            lambda logits, k, n_group: _from_groups(logits, k, n_group, step=0)
        ),
        "These are the best experts of all, whatever their group. Here every group has to give the same number.": (
            lambda logits, k, n_group: logits.topk(k).indices
        ),
        "Your groups are interleaved (0, 2, 4, ...). A group holds neighbours: 0, 1, 2, ...": (
            lambda logits, k, n_group: _interleaved(logits, k, n_group)
        ),
        "You first chose the best groups, which is DeepSeek's rule. Here no group is left out.": (
            lambda logits, k, n_group: (
                route_topk(logits, k, n_group=n_group, topk_group=_fewest_groups(logits, k, n_group)).indices
            )
        ),
    }
    for tokens, experts, k, n_group in ((6, 12, 4, 2), (5, 8, 4, 4), (9, 18, 6, 3)):
        logits = _logits(tokens, experts)
        wanted = route_grouped(logits, k, n_group).indices.sort().values
        found = numbers(answer, logits, k, n_group)
        rows = found.sort().values if found.dim() == 2 else found
        compare(rows, wanted, {hint: _sorted(wrong) for hint, wrong in mistakes.items()}, (logits, k, n_group))
    return "Right: every group gives the same number of experts, also where a group holds more than it gives."


def _logits(tokens: int, experts: int) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(experts))


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _from_groups(logits: Tensor, k: int, n_group: int, step: int) -> Tensor:
    within = logits.unflatten(-1, (n_group, -1)).topk(k // n_group).indices
    return (within + step * torch.arange(n_group)[:, None]).flatten(-2)


def _interleaved(logits: Tensor, k: int, n_group: int) -> Tensor:
    within = logits.unflatten(-1, (-1, n_group)).mT.topk(k // n_group).indices
    return (within * n_group + torch.arange(n_group)[:, None]).flatten(-2)


def _fewest_groups(logits: Tensor, k: int, n_group: int) -> int:
    return -(-k // (logits.shape[-1] // n_group))


def _sorted(choose: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: choose(*inputs).sort().values
