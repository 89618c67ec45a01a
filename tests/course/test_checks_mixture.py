"""The checks of notebooks 00 to 03 accept every right answer and name each known mistake."""

from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minimoe.course import checks
from minimoe.course.checks import WrongAnswer, check_looks_ahead
from minimoe.model import RouterOutput, route_grouped, route_topk, route_topk_softmax
from minimoe.model.balance import load_balancing_loss, update_bias


def shares_by_hand(indices, experts):
    return [sum(int(row[0]) == expert for row in indices) / len(indices) for expert in range(experts)]


def shares_by_one_hot(indices, experts):
    return F.one_hot(indices[:, 0], experts).double().mean(0).numpy()


def scaled(weights):
    return weights / weights.sum(-1, keepdim=True)


def softmax_of_the_best(logits, k):
    weights = route_topk_softmax(logits, k).weights.clone()
    logits.zero_()  # an answer cannot change the question
    return weights


def exponentials(logits, k):
    return scaled(logits.sort(descending=True).values[:, :k].exp()).tolist()


def group_by_group(logits, k, n_group):
    parts = [part.topk(k // n_group).indices for part in logits.chunk(n_group, dim=1)]
    return list(torch.cat([part + i * logits.shape[1] // n_group for i, part in enumerate(parts)], dim=1))


def groups_best_first(logits, k, n_group):
    chosen = route_grouped(logits, k, n_group).indices
    return chosen.gather(1, logits.gather(1, chosen).argsort(descending=True)).tolist()


def group_starts(step):
    def answer(logits, k, n_group):
        within = logits.view(len(logits), n_group, -1).topk(k // n_group).indices
        return (within + step(k, n_group) * torch.arange(n_group)[:, None]).flatten(1)

    return answer


def chosen_by_bias(logits, bias, k):
    return route_topk(logits, k, score_func="sigmoid", norm_topk_prob=True, bias=bias)


def biased_by_package(logits, bias, k):
    chosen = chosen_by_bias(logits, bias, k)
    return torch.zeros_like(logits).scatter(1, chosen.indices, chosen.weights)


def biased_by_sorting(logits, bias, k):
    rows = []
    for row in logits.tolist():
        scores = [1 / (1 + np.exp(-value)) for value in row]
        best = sorted(range(len(row)), key=lambda e: -(scores[e] + float(bias[e])))[:k]
        rows.append([scores[e] / sum(scores[b] for b in best) if e in best else 0.0 for e in range(len(row))])
    return rows


def weighed(choice, scores, k):
    best = choice.topk(k).indices
    return torch.zeros_like(scores).scatter(1, best, scaled(scores.gather(1, best)))


def by_many_edits(route, logits, position, rows=slice(None), last=None, tries=20, generator=None):
    """Some of the rows before `position`, after edits of some tokens from there on."""
    before = route(logits)[:position][rows]
    for _ in range(tries):
        edited = logits.clone()
        edited[position:last] = 3 * torch.randn(edited[position:last].shape, generator=generator)
        if not torch.equal(route(edited)[:position][rows], before):
            return True
    return False


def by_pushing_one_expert_at_a_time(route, logits, position):
    moved = 0
    for expert in range(logits.shape[1]):
        edited = logits.clone()
        edited[position:, expert] += 10
        moved += (route(edited) != route(logits))[:position].sum()
    return (moved > 0).numpy()


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


def balance(logits, indices):
    f = F.one_hot(indices, logits.shape[-1]).sum(2).float().mean(1)
    return logits.shape[-1] * (f * logits.softmax(-1).mean(1)).sum(-1).mean()


def balance_by_package(logits, indices):
    return load_balancing_loss([RouterOutput(x, x, x, chosen) for x, chosen in zip(logits, indices, strict=True)])


def balance_by_loops(logits, indices):
    total = 0.0
    for x, chosen in zip(logits, indices, strict=True):
        p = x.exp() / x.exp().sum(1, keepdim=True)
        for e in range(x.shape[1]):
            total = total + x.shape[1] * (chosen == e).sum() / len(x) * p[:, e].mean()
    return (total / len(logits))[None]


def balance_of_pooled_layers(logits, indices):
    return balance(logits.flatten(0, 1)[None], indices.flatten(0, 1)[None])


def balance_with_gradient_in_f(logits, indices):
    """The right value, but f follows the logits too."""
    p = logits.softmax(-1)
    f = F.one_hot(indices, logits.shape[-1]).sum(2) + p - p.detach()
    return logits.shape[-1] * (f.mean(1) * p.mean(1)).sum(-1).mean()


def bias_centred(bias, load, rate):
    step = rate * torch.sign(load.mean() - load)
    return bias + step - step.mean()


def bias_by_comparison(bias, load, rate):
    mean = sum(load.tolist()) / len(load)
    return [b + rate * ((n < mean) - (n > mean)) for b, n in zip(bias.tolist(), load.tolist(), strict=True)]


def bias_in_place(bias, load, rate):
    update_bias(bias, load, rate=rate)
    return bias


RIGHT = [
    (checks.check_first_choice_shares, shares_by_hand),
    (checks.check_first_choice_shares, shares_by_one_hot),
    (checks.check_topk_weights, softmax_of_the_best),
    (checks.check_topk_weights, exponentials),
    (checks.check_grouped_choice, group_by_group),
    (checks.check_grouped_choice, groups_best_first),
    (checks.check_biased_weights, biased_by_package),
    (checks.check_biased_weights, biased_by_sorting),
    (checks.check_looks_ahead, by_many_edits),
    (checks.check_looks_ahead, by_pushing_one_expert_at_a_time),
    (checks.check_balance_per_layer, balance),
    (checks.check_balance_per_layer, balance_by_package),
    (checks.check_balance_per_layer, balance_by_loops),
    (checks.check_bias_update, bias_centred),
    (checks.check_bias_update, bias_by_comparison),
    (checks.check_bias_update, bias_in_place),
]


@pytest.mark.parametrize(("check", "answer"), RIGHT, ids=lambda f: f.__name__)
def test_right_answers_are_accepted(check, answer):
    assert check(answer).startswith("Right")


WRONG = [
    (checks.check_first_choice_shares, lambda i, e: torch.bincount(i[:, 0], minlength=e), "counts"),
    (
        checks.check_first_choice_shares,
        lambda i, e: torch.bincount(i.flatten(), minlength=e) / i.numel(),
        "every choice",
    ),
    (checks.check_first_choice_shares, lambda i, e: torch.bincount(i[:, 0]) / len(i), "share 0"),
    (checks.check_first_choice_shares, lambda i, e: torch.bincount(i[:, 1], minlength=e) / len(i), "Not yet: entry"),
    (checks.check_topk_weights, lambda x, k: x.softmax(-1).topk(k).values, "add up to 1"),
    (checks.check_topk_weights, lambda x, k: scaled(x.softmax(0).topk(k).values), "down the tokens"),
    (checks.check_topk_weights, lambda x, k: scaled(x.topk(k).values), "raw logits"),
    (checks.check_topk_weights, lambda x, k: scaled(x.softmax(-1).topk(k).values).flip(1), "Not yet: entry 0"),
    (checks.check_grouped_choice, group_starts(lambda k, n: k // n), "how many experts a group holds"),
    (checks.check_grouped_choice, group_starts(lambda k, n: 0), "places within"),
    (checks.check_grouped_choice, lambda x, k, n: x.topk(k).indices, "best of all"),
    (checks.check_biased_weights, lambda x, b, k: weighed(x.sigmoid() + b, x.sigmoid() + b, k), "got into the weights"),
    (checks.check_biased_weights, lambda x, b, k: weighed(x + b, x.sigmoid(), k), "Not yet: entry"),
    (checks.check_biased_weights, lambda x, b, k: x.sigmoid() * (biased_by_package(x, b, k) > 0), "add up to 1 yet"),
    (checks.check_biased_weights, lambda x, b, k: chosen_by_bias(x, b, k).weights, "one for each expert"),
    (checks.check_looks_ahead, by_all_rows, "top-2 looks ahead. Only the tokens before"),
    (checks.check_looks_ahead, by_cutting_off, "Switch with a capacity looks ahead. .* do not cut them off"),
    (checks.check_looks_ahead, by_an_edit_in_place, "expert choice does not look ahead. .* in a copy"),
    (checks.check_looks_ahead, lambda *x: by_many_edits(*x, last=x[2] + 1), "does not look ahead. Replace all"),
    (checks.check_looks_ahead, lambda *x: by_many_edits(*x, rows=slice(-1, None)), "does not look ahead. .* all rows"),
    (checks.check_looks_ahead, lambda *x: by_many_edits(*x, rows=slice(1)), "does not look ahead. .* all rows"),
    (checks.check_balance_per_layer, balance_of_pooled_layers, "opposite ways"),
    (
        checks.check_balance_per_layer,
        lambda x, i: balance(x, i) / x.shape[-1],
        "factor E, the number of experts, is missing",
    ),
    (checks.check_balance_per_layer, lambda x, i: balance(x, i) / i.shape[-1], "adds up to 1, not to K"),
    (checks.check_balance_per_layer, lambda x, i: balance(x, i) + 1, r"Not yet: your answer is \d\.\d+; wanted"),
    (checks.check_balance_per_layer, lambda x, i: balance(x, i).item(), "which `backward` can start from"),
    (checks.check_balance_per_layer, lambda x, i: balance(x, i).detach(), "no gradient"),
    (checks.check_balance_per_layer, balance_with_gradient_in_f, "not its gradient"),
    (checks.check_bias_update, lambda b, n, r: b + r * (n - n.mean()).sign(), "wrong way round"),
    (checks.check_bias_update, lambda b, n, r: b + r * (n.mean() - n), "Only the sign counts"),
    (checks.check_bias_update, lambda b, n, r: r * (n.mean() - n).sign(), "not the new bias"),
]


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_wrong_answers_are_rejected_with_a_hint(check, answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check(answer)


@pytest.mark.parametrize(("tries", "seeds", "right"), [(1, range(10), 0), (20, range(5), 5)])
def test_luck_does_not_help_and_is_not_needed_to_tell_what_looks_ahead(tries, seeds, right):
    """With random numbers of the reader's own."""
    accepted = 0
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        with suppress(WrongAnswer):
            check_looks_ahead(lambda *x, g=generator: by_many_edits(*x, tries=tries, generator=g))
            accepted += 1
    assert accepted == right
