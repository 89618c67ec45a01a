"""The check of notebook 13 accepts every right dispatch and names each known mistake."""

import pytest
import torch

from minimoe.course.checks import WrongAnswer, check_dispatch


def by_loops(indices, each):
    pairs = [[], []]
    for token, row in enumerate(indices.tolist()):
        for expert in row:
            if expert < 2 * each:
                pairs[expert // each].append((token, expert % each))
    return pairs


def by_tensors(indices, each):
    found = []
    for rank in (0, 1):
        token, slot = torch.where(indices // each == rank)
        found.append(torch.stack([token, indices[token, slot] - rank * each], dim=1))
    return tuple(found)


def once_a_rank(indices, each):
    return [list(dict(reversed(pairs)).items()) for pairs in by_loops(indices, each)]


def numbered_by_all(indices, each):
    first, second = by_loops(indices, each)
    return first, [(token, expert + each) for token, expert in second]


def by_turns(indices, each):
    slots = [(t, e) for t, row in enumerate(indices.tolist()) for e in row if e < 2 * each]
    return [[(t, e // 2) for t, e in slots if e % 2 == rank] for rank in (0, 1)]


def with_empty_slots(indices, each):
    slots = [(t, e) for t, row in enumerate(indices.tolist()) for e in row]
    return [[(t, e) for t, e in slots if e < each], [(t, e - each) for t, e in slots if e >= each]]


@pytest.mark.parametrize("right", [by_loops, by_tensors])
def test_right_answers(right):
    assert check_dispatch(right).startswith("Right")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (once_a_rank, "goes there twice"),
        (numbered_by_all, "calls its experts 0, 1"),
        (by_turns, "lie in blocks"),
        (with_empty_slots, "An empty slot went to rank 1"),
        (lambda indices, each: [[], []], "Not yet: rank 0 is given"),
        (lambda indices, each: None, "Wanted two lists"),
        (lambda indices, each: indices, "Wanted two lists"),
    ],
)
def test_wrong_answers(wrong, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check_dispatch(wrong)
