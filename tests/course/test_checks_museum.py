"""The bug museum: each check rejects its exhibit and known half-repairs, and accepts every right repair."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minimoe.course import checks
from minimoe.course.checks import WrongAnswer
from minimoe.model import route_expert_choice, route_grouped, route_noisy_topk, route_topk
from minimoe.model.balance import apply_capacity, load_balancing_loss
from workshop.build import NOTEBOOKS, read

CHECKS = [
    checks.check_noisy_choice,
    checks.check_moge_choice,
    checks.check_fresh_layer,
    checks.check_training_loss,
    checks.check_coactivation,
    checks.check_router_weights,
    checks.check_capacity,
    checks.check_balance_loss,
    checks.check_expert_choice,
]
SOURCES = [cell.source for cell in read(NOTEBOOKS / "solutions" / "bug_museum.ipynb").cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def notebook():
    """The functions of the solutions: exhibit_1 to exhibit_9, repair_1 to repair_9."""
    names = {"torch": torch, "F": F, "nn": nn}
    for source in SOURCES:
        if source.startswith(("def exhibit_", "def repair_")):
            exec(source, names)
    return names


EXHIBITS = {
    1: "two answers",
    2: "as many experts as a token uses",
    3: "`up` holds numbers that nobody wrote",
    4: "the same whatever `coef` is",
    5: "not next to each other",
    6: "At k = 1 the router still gets no gradient",
    7: "No choice may take the place of a better one",
    8: "No token chose expert 5, and no gradient reaches it",
    9: "at too high a price: 4 experts with 5 places each computed 64 tokens",
}


@pytest.mark.parametrize(("number", "hint"), EXHIBITS.items())
def test_every_exhibit_is_rejected_by_its_check(notebook, number, hint):
    with pytest.raises(WrongAnswer, match=re.escape(hint)):
        CHECKS[number - 1](notebook[f"exhibit_{number}"])


@pytest.mark.parametrize("number", EXHIBITS)
@pytest.mark.parametrize("number", EXHIBITS)
# --- other right repairs ---------------------------------------------------------------------------------------------


def noise_of_the_package(logits, noise_logits, k, training):
    output = route_noisy_topk(logits, noise_logits, k, training=training)
    return output.weights, output.indices


def noise_times_training(logits, noise_logits, k, training):
    """Draws random numbers in evaluation as well, and multiplies them by 0; worst choice first."""
    noisy = logits + training * torch.randn_like(logits) * F.softplus(noise_logits)
    best = noisy.topk(k)
    return best.values.softmax(-1).flip(-1), best.indices.flip(-1)


def groups_of_the_package(logits, k, n_group):
    output = route_grouped(logits, k, n_group)
    return output.weights, output.indices


def group_by_group(logits, k, n_group):
    size = logits.shape[1] // n_group
    probabilities = logits.softmax(-1)
    best = [probabilities[:, g * size : (g + 1) * size].topk(k // n_group) for g in range(n_group)]
    indices = torch.cat([part.indices + g * size for g, part in enumerate(best)], 1)
    return torch.cat([part.values for part in best], 1), indices


class Fused(nn.Module):
    """Experts in two tensors, each filled from a generator."""

    def __init__(self, num_experts, hidden, width, seed):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Parameter(torch.randn(num_experts, width, hidden, generator=draw) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, hidden, width, generator=draw) / width**0.5)
        self.router = nn.Parameter(torch.randn(num_experts, hidden, generator=draw) * 0.02)


def list_of_linears(num_experts, hidden, width, seed):
    torch.manual_seed(seed)
    layer = nn.Module()
    layer.router = nn.Linear(hidden, num_experts)
    layer.up = nn.ModuleList(nn.Linear(hidden, width) for _ in range(num_experts))
    layer.down = nn.ModuleList(nn.Linear(width, hidden) for _ in range(num_experts))
    return layer


def total_of_the_package(predictions, targets, router_logits, k, coef):
    balance = load_balancing_loss([route_topk(logits, k) for logits in router_logits])
    return F.cross_entropy(predictions, targets) + coef * balance


def total_by_hand(predictions, targets, router_logits, k, coef):
    """With f that adds up to 1, and the sum over layers."""
    total = -predictions.log_softmax(-1)[torch.arange(len(targets)), targets].mean()
    for logits in router_logits:
        counts = torch.bincount(logits.topk(k).indices.flatten(), minlength=logits.shape[1])
        total = total + coef * logits.shape[1] * (counts / counts.sum()) @ logits.softmax(-1).mean(0)
    return total


def all_pairs_by_hand(indices, num_experts):
    found = [[0] * num_experts for _ in range(num_experts)]
    tokens = [0] * num_experts
    for row in indices.tolist():
        for i in row:
            tokens[i] += 1
            for j in row:
                found[i][j] += i != j
    return [[found[i][j] / max(tokens[i], 1) for j in range(num_experts)] for i in range(num_experts)]


def pairs_with_numpy(indices, num_experts):
    """An expert without tokens has nan in its row, the diagonal is 1."""
    chosen = (indices.numpy()[:, :, None] == np.arange(num_experts)).any(1).astype(float)
    with np.errstate(invalid="ignore"):
        return chosen.T @ chosen / chosen.sum(0)[:, None]


def scaled_unless_alone(logits, k):
    best = logits.softmax(-1).topk(k)
    weights = best.values / best.values.sum(-1, keepdim=True) if k > 1 else best.values
    return weights, best.indices


def capacity_of_the_package(indices, num_experts, capacity):
    logits = torch.zeros(len(indices), num_experts)
    output = apply_capacity(route_topk(logits, indices.shape[1])._replace(indices=indices), capacity)
    return output.indices < num_experts


def served_by_hand(indices, num_experts, capacity):
    free = [capacity] * num_experts
    fits = [[False] * indices.shape[1] for _ in indices]
    for rank in range(indices.shape[1]):
        for token, expert in enumerate(indices[:, rank].tolist()):
            fits[token][rank] = free[expert] > 0
            free[expert] -= fits[token][rank]
    return fits


def balance_of_the_package(logits, k):
    return load_balancing_loss([route_topk(logits, k)])


def balance_with_counts(logits, k):
    """f adds up to 1."""
    counts = torch.bincount(logits.topk(k).indices.flatten(), minlength=logits.shape[1])
    return logits.shape[1] * (counts / counts.sum()) @ logits.softmax(-1).mean(0)


def choice_of_the_package(hidden, logits, experts, capacity):
    output = route_expert_choice(logits, capacity)
    mixed = torch.zeros_like(hidden)
    for e, expert in enumerate(experts):
        token, slot = torch.where(output.indices == e)
        mixed[token] += output.weights[token, slot, None] * expert(hidden[token])
    return mixed


def token_by_token(hidden, logits, experts, capacity):
    """One token a call, of shape [size]."""
    probabilities = logits.softmax(-1)
    rows = [torch.zeros_like(row) for row in hidden]
    for e, expert in enumerate(experts):
        for token in probabilities[:, e].argsort(descending=True)[:capacity].tolist():
            rows[token] = rows[token] + probabilities[token, e] * expert(hidden[token])
    return rows


RIGHT = {
    1: (noise_of_the_package, noise_times_training),
    2: (groups_of_the_package, group_by_group),
    3: (Fused, list_of_linears),
    4: (total_of_the_package, total_by_hand),
    5: (all_pairs_by_hand, pairs_with_numpy),
    6: (lambda logits, k: route_topk(logits, k), scaled_unless_alone),
    7: (capacity_of_the_package, served_by_hand),
    8: (balance_of_the_package, balance_with_counts),
    9: (choice_of_the_package, token_by_token),
}


def cases(table):
    return [
        pytest.param(CHECKS[number - 1], *np.atleast_1d(case), id=f"{number}-{i}")
        for number, row in table.items()
        for i, case in enumerate(row)
    ]


@pytest.mark.parametrize(("check", "repair"), cases(RIGHT))
def test_other_right_repairs_are_accepted(check, repair):
    assert check(repair).startswith("Right")


# --- half-repairs ----------------------------------------------------------------------------------------------------


def without_noise(logits, noise_logits, k, training):
    best = logits.topk(k)
    return best.values.softmax(-1), best.indices


def seeded_noise(logits, noise_logits, k, training):
    if not training:
        torch.manual_seed(0)
    return noise_of_the_package(logits, noise_logits, k, True)


def noise_with(spread):
    """The noise of the rule, with another standard deviation: a function of the noise_logits."""

    def choose(logits, noise_logits, k, training):
        return without_noise(logits + training * spread(noise_logits) * torch.randn_like(logits), None, k, training)

    return choose


def noise_in_the_weights_only(logits, noise_logits, k, training):
    indices = logits.topk(k).indices
    noisy = logits + training * F.softplus(noise_logits) * torch.randn_like(logits)
    return noisy.gather(1, indices).softmax(-1), indices


def noise_in_the_choice_only(logits, noise_logits, k, training):
    noisy = logits + training * F.softplus(noise_logits) * torch.randn_like(logits)
    indices = noisy.topk(k).indices
    return logits.gather(1, indices).softmax(-1), indices


def the_same_noise_each_time(logits, noise_logits, k, training):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return noise_of_the_package(logits, noise_logits, k, training)


def groups_starting_at(step):
    def choose(logits, k, n_group):
        weights, within = logits.softmax(-1).unflatten(-1, (n_group, -1)).topk(k // n_group)
        indices = within + step(logits.shape[1], k, n_group) * torch.arange(n_group)[:, None]
        return weights.flatten(1), indices.flatten(1)

    return choose


def layer(up, down, seeded=True):
    """A layer with the given fused experts: functions of a shape."""

    def fresh(num_experts, hidden, width, seed):
        if seeded:
            torch.manual_seed(seed)
        module = nn.Module()
        module.router = nn.Linear(hidden, num_experts, bias=False)
        module.up = nn.Parameter(up((num_experts, width, hidden)))
        module.down = nn.Parameter(down((num_experts, hidden, width)))
        return module

    return fresh


def small(shape):
    return 0.02 * torch.randn(shape)


def one_for_all(shape):
    return small(shape[1:]).expand(shape).clone()


def renamed(num_experts, hidden, width, seed):
    module = layer(small, small)(num_experts, hidden, width, seed)
    module.w1 = module.up
    del module.up
    return module


def with_balance(penalty, scale=lambda coef: coef):
    def total(predictions, targets, router_logits, k, coef):
        penalties = [penalty(logits, k) for logits in router_logits]
        return F.cross_entropy(predictions, targets) + scale(coef) * torch.stack(penalties).mean()

    return total


def pooled(predictions, targets, router_logits, k, coef):
    balance = load_balancing_loss([route_topk(logits, k) for logits in router_logits], across_layers="pooled")
    return F.cross_entropy(predictions, targets) + coef * balance


def shares(logits, k):
    return F.one_hot(logits.topk(k).indices, logits.shape[1]).sum(1).float().mean(0)


def counts_squared(logits, k):
    return logits.shape[1] * shares(logits, k).square().sum()


def probabilities_squared(logits, k):
    return logits.shape[1] * logits.softmax(-1).mean(0).square().sum()


def pairs_where(counts, divide):
    def coactivation(indices, num_experts):
        found = torch.zeros(num_experts, num_experts)
        for row in indices.tolist():
            for a, i in enumerate(row):
                for b, j in enumerate(row):
                    found[i, j] += counts(a, b)
        tokens = torch.bincount(indices.flatten(), minlength=num_experts).clamp(min=1)
        return divide(found, tokens, len(indices))

    return coactivation


def of_its_tokens(found, tokens, total):
    return found / tokens[:, None]


def different(a, b):
    return a != b


def straight_through(logits, k):
    """The weight 1, with a gradient."""
    best = logits.softmax(-1).topk(k)
    return best.values / best.values.sum(-1, keepdim=True).detach(), best.indices


def partly_detached(logits, k):
    best = logits.softmax(-1).topk(k)
    return best.values / (best.values.sum(-1, keepdim=True).detach() if k > 1 else 1), best.indices


def in_order_of(queue, back, room=0):
    def mask(indices, num_experts, capacity):
        waiting = queue(indices)
        place = F.one_hot(waiting, num_experts).cumsum(0).gather(1, waiting[:, None]).squeeze(1)
        return back(place <= capacity + room, indices)

    return mask


def by_rank(indices):
    return indices.T.flatten()


def turned_back(fits, indices):
    return fits.view(indices.T.shape).T


def first_choices_only(indices, num_experts, capacity):
    fits = torch.zeros_like(indices, dtype=torch.bool)
    fits[:, :1] = torch.tensor(served_by_hand(indices[:, :1], num_experts, capacity))
    return fits


def chosen_tokens(put):
    def mix(hidden, logits, experts, capacity):
        weights, chosen = logits.softmax(-1).topk(capacity, dim=0)
        output = torch.zeros_like(hidden)
        for e, expert in enumerate(experts):
            put(output, chosen[:, e], weights[:, e, None], expert(hidden[chosen[:, e]]))
        return output

    return mix


def overwrite(output, token, weight, computed):
    output[token] = weight * computed


def unweighted(output, token, weight, computed):
    output[token] += computed


HALF = {
    1: [
        (without_noise, "has standard deviation 0.00"),
        (seeded_noise, "Not yet: entry 0 of the table of weights without training"),
        (noise_with(lambda noise: F.softplus(noise).mean(0)), "Every token and expert has its own"),
        (noise_in_the_weights_only, "should decide who is chosen"),
        (noise_in_the_choice_only, "has standard deviation 0.00"),
        (the_same_noise_each_time, "two calls get the same noise"),
    ],
    2: [
        (groups_starting_at(lambda experts, k, n_group: k // n_group), "where the choices of the last one end"),
        (groups_starting_at(lambda experts, k, n_group: 0), "places within a group"),
        (groups_starting_at(lambda experts, k, n_group: experts), "wanted 0 to 23"),
        (lambda logits, k, n_group: logits.softmax(-1).topk(k), "Not yet: entry 0"),
    ],
    3: [
        (layer(small, torch.empty), "`down` holds numbers that nobody wrote"),
        (layer(torch.zeros, small), "`up` has mean 0.00 and standard deviation 0;"),
        (layer(torch.rand, small), "`up` has mean 0.50"),
        (layer(small, one_for_all), "start out equal"),
        (layer(small, small, seeded=False), "same seed differ"),
        (lambda *shape_and_seed: list_of_linears(*shape_and_seed[:3], 0), "another seed"),
        (renamed, "`up` has matrices of shapes []; wanted 4"),
    ],
    4: [
        (with_balance(counts_squared), "no gradient reaches the routers"),
        (with_balance(balance_of_the_package, lambda coef: 0.01 * (coef > 0)), "with a gradient to match"),
        (with_balance(balance_of_the_package, lambda coef: 1.0), "only the cross-entropy should be left"),
        (with_balance(probabilities_squared), "with a gradient to match"),
        (pooled, "averaged over the layers first"),
    ],
    5: [
        (pairs_where(different, lambda found, tokens, total: found), "counts"),
        (pairs_where(different, lambda found, tokens, total: found / tokens), "tokens of the other expert"),
        (pairs_where(lambda a, b: a < b, of_its_tokens), "Not yet"),
    ],
    6: [
        (straight_through, "the table of weights at k = 1"),
        (partly_detached, "At k = 2 the weights are right and their gradient is not"),
    ],
    7: [
        (in_order_of(by_rank, lambda fits, indices: fits.view(indices.shape)), "in which order do the rows"),
        (in_order_of(by_rank, turned_back, room=1), "has 6 places"),
        (first_choices_only, "No choice may take the place of a better one"),
    ],
    8: [
        (counts_squared, "No gradient"),
        (probabilities_squared, "with a gradient to match"),
        (lambda logits, k: balance_of_the_package(logits, k) / logits.shape[1], "wanted 2."),
    ],
    9: [
        (chosen_tokens(overwrite), "one of them only"),
        (chosen_tokens(unweighted), "not weighted"),
    ],
}


@pytest.mark.parametrize(("check", "repair", "hint"), cases(HALF))
def test_half_repairs_are_rejected_with_a_hint(check, repair, hint):
    with pytest.raises(WrongAnswer, match=re.escape(hint)):
        check(repair)


# --- a check leaves no trace -----------------------------------------------------------------------------------------


def test_a_check_leaves_the_random_numbers_and_the_settings_alone(notebook):
    torch.manual_seed(7)
    wanted = torch.randn(3)
    torch.manual_seed(7)
    for number, check in enumerate(CHECKS, start=1):
        if number != 3:
            check(notebook[f"repair_{number}"])
    checks.check_fresh_layer(notebook["repair_3"])
    assert torch.equal(torch.randn(3), wanted)
    assert not torch.are_deterministic_algorithms_enabled()


def test_settings_come_back_after_a_wrong_answer(notebook):
    def fails(*shape_and_seed):
        assert torch.empty(2).isnan().all()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        checks.check_fresh_layer(fails)
    assert not torch.are_deterministic_algorithms_enabled()
