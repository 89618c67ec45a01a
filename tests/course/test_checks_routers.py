"""Each check accepts every right answer and names each known mistake."""

from contextlib import suppress

import numpy as np
import pytest
import torch

from minimoe.course.checks import WrongAnswer, check_biased_weights, check_looks_ahead, routers
from minimoe.model import route_topk


def by_package(logits, bias, k):
    chosen = route_topk(logits, k, score_func="sigmoid", norm_topk_prob=True, bias=bias)
    return torch.zeros_like(logits).scatter(1, chosen.indices, chosen.weights)


def by_sorting(logits, bias, k):
    rows = []
    for row in logits.tolist():
        scores = [1 / (1 + np.exp(-value)) for value in row]
        best = sorted(range(len(row)), key=lambda e: -(scores[e] + float(bias[e])))[:k]
        rows.append([scores[e] / sum(scores[b] for b in best) if e in best else 0.0 for e in range(len(row))])
    return rows


def by_threshold(logits, bias, k):
    scores = logits.sigmoid()
    choice = scores + bias
    kept = scores * (choice >= choice.topk(k).values[:, -1:])
    return (kept / kept.sum(1, keepdim=True)).numpy()


def by_many_edits(route, logits, position):
    before = route(logits)
    for _ in range(20):
        edited = logits.clone()
        edited[position:] = 3 * torch.randn_like(edited[position:])
        if not torch.equal(route(edited)[:position], before[:position]):
            return True
    return False


def by_shuffling_what_comes_later(route, logits, position):
    before = route(logits)[:position].numpy()
    changed = []
    for _ in range(20):
        later = logits[position:].flatten()
        later = later[torch.randperm(len(later))].reshape(-1, logits.shape[1])
        changed.append((route(torch.cat([logits[:position], later]))[:position].numpy() != before).any())
    return np.any(changed)


def by_pushing_one_expert_at_a_time(route, logits, position):
    moved = 0
    for expert in range(logits.shape[1]):
        edited = logits.clone()
        edited[position:, expert] += 10
        moved += (route(edited) != route(logits))[:position].sum()
    return moved > 0


def by_editing_one_later_token_at_a_time(route, logits, position):
    before = route(logits)[:position]
    for token in range(position, len(logits)):
        for expert in range(logits.shape[1]):
            edited = logits.clone()
            edited[token, expert] = 20
            if not torch.equal(route(edited)[:position], before):
                return True
    return False


RIGHT = [
    (check_biased_weights, by_package),
    (check_biased_weights, by_sorting),
    (check_biased_weights, by_threshold),
    (check_looks_ahead, by_many_edits),
    (check_looks_ahead, by_shuffling_what_comes_later),
    (check_looks_ahead, by_pushing_one_expert_at_a_time),
    (check_looks_ahead, by_editing_one_later_token_at_a_time),
]


@pytest.mark.parametrize(("check", "answer"), RIGHT, ids=lambda f: f.__name__)
def test_right_answers_are_accepted(check, answer):
    assert check(answer).startswith("Right")


def weighed(choice, scores, k):
    best = choice.topk(k).indices
    weights = scores.gather(1, best)
    return torch.zeros_like(scores).scatter(1, best, weights / weights.sum(1, keepdim=True))


def by_all_rows(route, logits, position):
    edited = logits.clone()
    edited[position:] = torch.randn_like(edited[position:])
    return not torch.equal(route(edited), route(logits))


def by_cutting_off(route, logits, position):
    return not torch.equal(route(logits[:position]), route(logits)[:position])


def by_an_edit_in_place(route, logits, position):
    edited = logits
    edited[position:] = 3 * torch.randn_like(edited[position:])
    return not torch.equal(route(edited)[:position], route(logits)[:position])


def by_an_edit_that_softmax_ignores(route, logits, position):
    edited = logits.clone()
    edited[position:] += 5
    return not torch.equal(route(edited)[:position], route(logits)[:position])


def by_edits_that_begin_too_early(route, logits, position):
    """Right about every router that looks at its own token only, and wrong about what looks back."""
    before = route(logits)[1:position]
    for _ in range(20):
        edited = 3 * torch.randn_like(logits)
        edited[1:position] = logits[1:position]
        if not torch.equal(route(edited)[1:position], before):
            return True
    return False


def by_edits(change, rows=slice(None), tries=20):
    """Compares some of the rows before `position` after edits: functions of the logits and the position."""

    def looks_ahead(route, logits, position):
        before = route(logits)[:position][rows]
        for _ in range(tries):
            edited = logits.clone()
            change(edited, position)
            if not torch.equal(route(edited)[:position][rows], before):
                return True
        return False

    return looks_ahead


def redraw(part, generator=None):
    def change(logits, position):
        places = part(position, len(logits))
        logits[places] = 3 * torch.randn(logits[places].shape, generator=generator)

    return change


def all_later(position, length):
    return slice(position, None)


def set_to(value):
    def change(logits, position):
        logits[position:] = value

    return change


def flip_signs(logits, position):
    logits[position:] *= -1


def lower_one_expert(logits, position):
    logits[position:, 0] = -torch.inf


only_the_last_token = by_edits(redraw(lambda position, length: slice(length - 1, None)))
only_the_token_at_position = by_edits(redraw(lambda position, length: slice(position, position + 1)))

WRONG = [
    (check_biased_weights, lambda x, b, k: weighed(x.sigmoid() + b, x.sigmoid() + b, k), "got into the weights"),
    (check_biased_weights, lambda x, b, k: weighed(x.sigmoid(), x.sigmoid(), k), "no effect"),
    (check_biased_weights, lambda x, b, k: weighed(x + b, x.sigmoid(), k), "added the bias to the logits"),
    (check_biased_weights, lambda x, b, k: weighed(x.softmax(-1) + b, x.softmax(-1), k), "use the sigmoid"),
    (check_biased_weights, lambda x, b, k: x.sigmoid() * (by_package(x, b, k) > 0), "add up to 1 yet"),
    (
        check_biased_weights,
        lambda x, b, k: x.sigmoid() * (by_package(x, b, k) > 0) / x.sigmoid().sum(1, keepdim=True),
        "over all experts",
    ),
    (
        check_biased_weights,
        lambda x, b, k: route_topk(x, k, score_func="sigmoid", norm_topk_prob=True, bias=b).weights,
        "one for each expert",
    ),
    (check_biased_weights, lambda x, b, k: by_package(x, -b, k), "Not yet"),
    (check_biased_weights, lambda x, b, k: None, "return"),
    (check_looks_ahead, by_all_rows, "top-2 looks ahead. Only the choices of the tokens before"),
    (check_looks_ahead, by_cutting_off, "Switch with a capacity looks ahead. .* do not cut them off"),
    (check_looks_ahead, by_an_edit_in_place, "expert choice does not look ahead. .* in a copy"),
    (check_looks_ahead, by_an_edit_that_softmax_ignores, "expert choice does not look ahead. .* really different"),
    (check_looks_ahead, by_edits_that_begin_too_early, "looks ahead. It looks back"),
    (check_looks_ahead, only_the_last_token, "does not look ahead. .*([Rr]eplace|edit) all"),
    (check_looks_ahead, only_the_token_at_position, "does not look ahead. .*([Rr]eplace|edit) all"),
    (check_looks_ahead, by_edits(redraw(all_later), slice(-1, None)), "does not look ahead. .*compare all"),
    (check_looks_ahead, by_edits(redraw(all_later), slice(1)), "does not look ahead. .*compare all"),
    (check_looks_ahead, by_edits(redraw(all_later), tries=1), "does not look ahead. .* try twenty"),
    (check_looks_ahead, by_edits(set_to(0.0)), "does not look ahead"),
    (check_looks_ahead, by_edits(flip_signs), "does not look ahead"),
    (check_looks_ahead, by_edits(lower_one_expert), "a logit of -inf"),
    (check_looks_ahead, by_edits(set_to(torch.nan)), "a logit of nan"),
    (check_looks_ahead, lambda route, x, p: True, "top-2 looks ahead"),
    (check_looks_ahead, lambda route, x, p: False, "expert choice does not look ahead"),
    (check_looks_ahead, lambda route, x, p: route(x)[:p], "wanted True or False"),
    (check_looks_ahead, lambda route, x, p: None, "return"),
]


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_wrong_answers_are_rejected_with_a_hint(check, answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check(answer)


@pytest.mark.parametrize(
    ("route", "token", "row"), [(routers._choice_of_the_next, 12, 11), (routers._first_follows_the_last, 23, 0)]
)
def test_a_made_up_router_lets_one_token_reroute_one_row(route, token, row):
    logits = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
    edited = logits.clone()
    edited[token] = -logits[token]
    assert (route(edited) != route(logits))[:12].any(1).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize(("tries", "seeds", "right"), [(1, range(30), 0), (20, range(10), 10)])
def test_luck_does_not_help_and_is_not_needed(tries, seeds, right):
    """With random numbers of the reader's own."""
    accepted = 0
    for seed in seeds:
        answer = by_edits(redraw(all_later, torch.Generator().manual_seed(seed)), tries=tries)
        with suppress(WrongAnswer):
            accepted += check_looks_ahead(answer).startswith("Right")
    assert accepted == right


def test_the_check_gives_the_same_verdict_at_any_time_and_leaves_the_random_numbers_alone():
    few = by_edits(redraw(all_later), tries=4)
    verdicts = set()
    for seed in range(5):
        torch.manual_seed(seed)
        try:
            verdicts.add(check_looks_ahead(few))
        except WrongAnswer as error:
            verdicts.add(str(error))
        found = torch.randn(3)
        torch.manual_seed(seed)
        assert torch.equal(found, torch.randn(3))
    assert len(verdicts) == 1
