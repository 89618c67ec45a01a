"""The check of notebook 13: who is given which token."""

from collections.abc import Callable

import torch
from torch import Tensor

from minimoe.course.checks.answers import WrongAnswer

Pairs = list[list[tuple[int, int]]]  # for each rank, (token, expert)


def check_dispatch(answer: Callable[[Tensor, int], Pairs]) -> str:
    """Check `dispatch(indices, each)`: from the choices [T, K] of one rank's tokens, with `each` experts on either of
    two ranks, what to give to rank 0 and to rank 1: pairs of a token and the number that its expert has on that rank,
    in any order. An empty slot holds the number of all experts, and goes nowhere."""
    draw = torch.Generator().manual_seed(0)
    for tokens, each, k in ((5, 2, 2), (9, 4, 3)):
        indices = torch.rand(tokens, 2 * each, generator=draw).argsort(1)[:, :k]
        indices[0, :2] = torch.tensor([each, each + 1])  # two experts of one rank, where there is one token
        indices[1, -1] = 2 * each
        found, wanted = _form(answer(indices.clone(), each)), _dispatch(indices, each)
        mistakes = {
            "A token that chose two experts of a rank goes there twice: each of them needs it.": [
                sorted({token: (token, expert) for token, expert in reversed(rank)}.values()) for rank in wanted
            ],
            "Rank 1 calls its experts 0, 1, ... as well: subtract the experts of the ranks before it.": [
                [(token, expert + rank * each) for token, expert in pairs] for rank, pairs in enumerate(wanted)
            ],
            "Experts lie in blocks: the first `each` on rank 0, the others on rank 1.": [
                [(token, expert // 2) for token, expert in _slots(indices, each) if expert % 2 == rank]
                for rank in (0, 1)
            ],
            "An empty slot went to rank 1. It holds the number of all experts, which is nobody's.": [
                wanted[0],
                sorted([*wanted[1], (1, each)]),
            ],
        }
        for hint, wrong in mistakes.items():
            if found != wanted and found == [sorted(pairs) for pairs in wrong]:
                raise WrongAnswer(hint)
        for rank, (ours, theirs) in enumerate(zip(wanted, found, strict=True)):
            if ours != theirs:
                raise WrongAnswer(f"Not yet: rank {rank} is given {theirs}; wanted {ours}.")
    return (
        "Right: every slot goes to the rank of its expert, under the number that it has there, and empty ones nowhere."
    )


def _slots(indices: Tensor, each: int) -> list[tuple[int, int]]:
    """The token and the expert of every slot that is not empty."""
    return [(token, expert) for token, row in enumerate(indices.tolist()) for expert in row if expert < 2 * each]


def _dispatch(indices: Tensor, each: int) -> Pairs:
    slots = _slots(indices, each)
    return [sorted((t, expert - rank * each) for t, expert in slots if expert // each == rank) for rank in (0, 1)]


def _form(returned: object) -> Pairs:
    """What the reader's function returned, as sorted lists of pairs of whole numbers."""
    try:
        first, second = returned
        return [sorted((int(token), int(expert)) for token, expert in pairs) for pairs in (first, second)]
    except (TypeError, ValueError) as error:
        raise WrongAnswer("Wanted two lists, for rank 0 and rank 1, of pairs (token, expert).") from error
