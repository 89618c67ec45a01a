"""The bug museum: each check rejects its exhibit and known half-repairs, and accepts every right repair."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minimoe.course import checks
from minimoe.course.checks import WrongAnswer, museum
from minimoe.model import route_expert_choice, route_grouped, route_noisy_topk, route_switch, route_topk
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
    7: "turns away a token that wants it more",
    8: "No token chose expert 5, and no gradient reaches it",
    9: "at too high a price: 4 experts with 5 places each computed 64 tokens",
}


@pytest.mark.parametrize(("number", "hint"), EXHIBITS.items())
def test_every_exhibit_is_rejected_by_its_check(notebook, number, hint):
    with pytest.raises(WrongAnswer, match=re.escape(hint)):
        CHECKS[number - 1](notebook[f"exhibit_{number}"])


@pytest.mark.parametrize("number", EXHIBITS)
def test_every_solution_is_accepted(notebook, number):
    assert CHECKS[number - 1](notebook[f"repair_{number}"]).startswith("Right")


@pytest.mark.parametrize("number", EXHIBITS)
def test_the_notebook_asks_the_check_that_is_tested_here(number):
    assert f"print({CHECKS[number - 1].__name__}(repair_{number}))" in SOURCES


# --- other right repairs ---------------------------------------------------------------------------------------------


def noise_of_the_package(logits, noise_logits, k, training):
    output = route_noisy_topk(logits, noise_logits, k, training=training)
    return output.weights, output.indices


def noise_times_training(logits, noise_logits, k, training):
    """Draws random numbers in evaluation as well, and multiplies them by 0; worst choice first."""
    noisy = logits + training * torch.randn_like(logits) * F.softplus(noise_logits)
    best = noisy.topk(k)
    return best.values.softmax(-1).flip(-1), best.indices.flip(-1)


NUMPY = np.random.default_rng(0)


def noise_with_numpy(logits, noise_logits, k, training):
    noisy = logits.numpy().copy()
    if training:
        noisy += NUMPY.normal(size=noisy.shape) * np.log1p(np.exp(noise_logits.numpy()))
    indices = np.argsort(-noisy)[:, :k]
    weights = np.exp(np.take_along_axis(noisy, indices, 1))
    return weights / weights.sum(1, keepdims=True), indices


def groups_of_the_package(logits, k, n_group):
    output = route_grouped(logits, k, n_group)
    return output.weights, output.indices


def group_by_group(logits, k, n_group):
    size = logits.shape[1] // n_group
    probabilities = logits.softmax(-1)
    best = [probabilities[:, g * size : (g + 1) * size].topk(k // n_group) for g in range(n_group)]
    indices = torch.cat([part.indices + g * size for g, part in enumerate(best)], 1)
    return torch.cat([part.values for part in best], 1), indices


def row_by_row(logits, k, n_group):
    rows = logits.softmax(-1).tolist()
    size = len(rows[0]) // n_group
    groups = [range(g, g + size) for g in range(0, len(rows[0]), size)]
    indices = [[e for group in groups for e in sorted(group, key=lambda e: -row[e])[: k // n_group]] for row in rows]
    return [[row[e] for e in chosen] for row, chosen in zip(rows, indices, strict=True)], indices


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


def memory_filled_in_place(num_experts, hidden, width, seed):
    torch.manual_seed(seed)
    layer = nn.Module()
    layer.router = nn.Linear(hidden, num_experts, bias=False)
    layer.up = nn.Parameter(torch.empty(num_experts, width, hidden).uniform_(-0.1, 0.1))
    layer.down = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_experts, hidden, width)))
    return layer


def total_of_the_package(predictions, targets, router_logits, k, coef):
    balance = load_balancing_loss([route_topk(logits, k) for logits in router_logits])
    return F.cross_entropy(predictions, targets) + coef * balance


def by_log_likelihood(predictions, targets, router_logits, k, coef):
    """By hand, with f that adds up to 1 and the sum over layers."""
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


def pairs_of_ranks(indices, num_experts):
    together = torch.zeros(num_experts, num_experts)
    for one in indices.T:
        for other in indices.T:
            together.index_put_((one, other), torch.ones(len(one)), accumulate=True)
    return together / together.diagonal().clamp(min=1)[:, None]


def switch_of_the_package(logits, k):
    output = route_switch(logits) if k == 1 else route_topk(logits, k)
    return output.weights, output.indices


def scaled_unless_alone(logits, k):
    best = logits.softmax(-1).topk(k)
    weights = best.values / best.values.sum(-1, keepdim=True) if k > 1 else best.values
    return weights, best.indices


def exponentials(logits, k):
    indices = logits.argsort(descending=True)[:, :k]
    return (logits.gather(1, indices) - logits.logsumexp(-1, keepdim=True)).exp(), indices.tolist()


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


def last_token_first(indices, num_experts, capacity):
    """Within a rank the order is free."""
    return torch.tensor(served_by_hand(indices.flip(0), num_experts, capacity)).flip(0).int()


def ranks_one_after_the_other(indices, num_experts, capacity):
    used = torch.zeros(num_experts, dtype=torch.long)
    columns = []
    for choice in indices.T:
        one_hot = F.one_hot(choice, num_experts)
        columns.append(((one_hot.cumsum(0) + used) * one_hot).sum(1) <= capacity)
        used += one_hot.sum(0)
    return torch.stack(columns, 1).numpy()


def balance_of_the_package(logits, k):
    return load_balancing_loss([route_topk(logits, k)])


def balance_with_counts(logits, k):
    """f adds up to 1."""
    counts = torch.bincount(logits.topk(k).indices.flatten(), minlength=logits.shape[1])
    return logits.shape[1] * (counts / counts.sum()) @ logits.softmax(-1).mean(0)


def balance_token_by_token(logits, k):
    total = 0
    for row in logits.softmax(-1):
        for e in range(len(row)):
            total = total + row[e] * (logits.topk(k).indices == e).sum()
    return (total * logits.shape[1] / len(logits) ** 2).reshape(1)


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
    1: (noise_of_the_package, noise_times_training, noise_with_numpy),
    2: (groups_of_the_package, group_by_group, row_by_row),
    3: (Fused, list_of_linears, memory_filled_in_place),
    4: (total_of_the_package, by_log_likelihood),
    5: (all_pairs_by_hand, pairs_with_numpy, pairs_of_ranks),
    6: (switch_of_the_package, scaled_unless_alone, exponentials),
    7: (capacity_of_the_package, served_by_hand, last_token_first, ranks_one_after_the_other),
    8: (balance_of_the_package, balance_with_counts, balance_token_by_token),
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


def noise_in_evaluation_only(logits, noise_logits, k, training):
    return noise_of_the_package(logits, noise_logits, k, not training)


def noise_of_one_size(logits, noise_logits, k, training):
    return without_noise(logits + training * torch.randn_like(logits), noise_logits, k, training)


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


def noise_drawn_twice(logits, noise_logits, k, training):
    _, indices = noise_of_the_package(logits, noise_logits, k, training)
    noisy = logits + training * F.softplus(noise_logits) * torch.randn_like(logits)
    return noisy.gather(1, indices).softmax(-1), indices


def the_same_noise_each_time(logits, noise_logits, k, training):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return noise_of_the_package(logits, noise_logits, k, training)


def another_softmax_in_evaluation(logits, noise_logits, k, training):
    return noise_of_the_package(logits, noise_logits, k, True) if training else logits.softmax(-1).topk(k)


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


def swapped_shapes(num_experts, hidden, width, seed):
    module = layer(small, small)(num_experts, hidden, width, seed)
    module.up, module.down = module.down, module.up
    return module


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


def masked_without_scaling(logits, k):
    best = logits.softmax(-1).topk(k)
    kept = torch.zeros_like(logits).scatter(1, best.indices, best.values)
    return logits.shape[1] * (shares(logits, k) * kept.mean(0)).sum()


def masked_logits(logits, k):
    """A softmax over the chosen logits alone: the exhibit in other words."""
    closed = torch.ones_like(logits, dtype=torch.bool).scatter(1, logits.topk(k).indices, False)
    return logits.shape[1] * (shares(logits, k) * logits.masked_fill(closed, -torch.inf).softmax(-1).mean(0)).sum()


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


def softmax_then_scaled(logits, k):
    best = logits.softmax(-1).topk(k)
    return best.values / best.values.sum(-1, keepdim=True), best.indices


def straight_through(logits, k):
    """The weight 1, with a gradient."""
    best = logits.softmax(-1).topk(k)
    return best.values / best.values.sum(-1, keepdim=True).detach(), best.indices


def without_gradient(logits, k):
    return logits.detach().softmax(-1).topk(k)


def denominator_detached(logits, k):
    best = logits.softmax(-1).topk(k)
    return best.values / (best.values.sum(-1, keepdim=True).detach() if k > 1 else 1), best.indices


def denominator_of_softmax_detached(logits, k):
    best = logits.topk(k)
    return (best.values - logits.logsumexp(-1, keepdim=True).detach()).exp(), best.indices


def a_faint_gradient(logits, k):
    best = logits.softmax(-1).topk(k)
    return 1e-4 * best.values + (1 - 1e-4) * best.values.detach(), best.indices


def the_gradient_turned(logits, k):
    best = logits.softmax(-1).topk(k)
    return 2 * best.values.detach() - best.values, best.indices


def over_tokens(logits, k):
    return logits.softmax(0).topk(k)


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


def a_queue_for_each_rank(indices, num_experts, capacity):
    columns = [served_by_hand(indices[:, [rank]], num_experts, capacity) for rank in range(indices.shape[1])]
    return torch.tensor(columns).squeeze(-1).T


def first_choices_only(indices, num_experts, capacity):
    fits = torch.zeros_like(indices, dtype=torch.bool)
    fits[:, :1] = torch.tensor(served_by_hand(indices[:, :1], num_experts, capacity))
    return fits


def last_rank_first(indices, num_experts, capacity):
    return torch.tensor(served_by_hand(indices.flip(1), num_experts, capacity)).flip(1)


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


def averaged(hidden, logits, experts, capacity):
    taken = route_expert_choice(logits, capacity).weights.sum(-1, keepdim=True)
    return choice_of_the_package(hidden, logits, experts, capacity) / taken.clamp(min=1e-20)


def run_all_then_pick(hidden, logits, experts, capacity):
    weights, chosen = logits.softmax(-1).topk(capacity, dim=0)
    output = torch.zeros_like(hidden)
    for e, expert in enumerate(experts):
        output.index_add_(0, chosen[:, e], weights[:, e, None] * expert(hidden)[chosen[:, e]])
    return output


def run_all_that_anyone_took(hidden, logits, experts, capacity):
    weights = route_expert_choice(logits, capacity).weights
    wanted = weights.any(-1)
    output = torch.zeros_like(hidden)
    for e, expert in enumerate(experts):
        output[wanted] += weights[wanted, e, None] * expert(hidden[wanted])
    return output


HALF = {
    1: [
        (without_noise, "there should be noise"),
        (seeded_noise, "still depends on `noise_logits`"),
        (noise_in_evaluation_only, "two answers"),
        (noise_of_one_size, "standard deviation"),
        (noise_with(lambda noise: F.softplus(noise).mean()), "Every token and expert has its own"),
        (noise_with(lambda noise: F.softplus(noise.mean())), "Every token and expert has its own"),
        (noise_with(lambda noise: F.softplus(noise).mean(0)), "Every token and expert has its own"),
        (noise_with(lambda noise: F.softplus(noise).mean(1, keepdim=True)), "Every token and expert has its own"),
        (noise_with(torch.exp), "standard deviation"),
        (noise_in_the_weights_only, "should decide who is chosen"),
        (noise_in_the_choice_only, "noise in the weights, and there is none"),
        (noise_drawn_twice, "chosen too often, or weigh too much"),
        (the_same_noise_each_time, "two calls get the same noise"),
        (another_softmax_in_evaluation, "no longer add up to 1"),
        (lambda logits, noise, k, training: logits.topk(k).indices, "two things"),
        (lambda logits, noise, k, training: None, "two things"),
        (lambda logits, noise, k, training: (logits.topk(k).values, logits.argmax(-1)), "have shape"),
        (lambda logits, noise, k, training: logits.topk(k), "Not yet. Entry 0"),
    ],
    2: [
        (groups_starting_at(lambda experts, k, n_group: k // n_group), "where the choices of the last one end"),
        (groups_starting_at(lambda experts, k, n_group: 0), "places within a group"),
        (groups_starting_at(lambda experts, k, n_group: experts), "there are only 24"),
        (lambda logits, k, n_group: logits.softmax(-1).topk(k), "best experts of all"),
        (lambda logits, k, n_group: (logits.topk(k).values, groups_of_the_package(logits, k, n_group)[1]), "Not yet"),
    ],
    3: [
        (layer(small, torch.empty), "`down` holds numbers that nobody wrote"),
        (layer(torch.zeros, small), "All entries of `up` are equal"),
        (layer(torch.randn, small), "`up` has standard deviation 1"),
        (layer(torch.rand, small), "`up` has mean 0.50"),
        (layer(small, one_for_all), "start out equal"),
        (layer(small, small, seeded=False), "same seed differ"),
        (lambda *shape_and_seed: list_of_linears(*shape_and_seed[:3], 0), "another seed"),
        (swapped_shapes, "`up` has shape (4, 64, 32); wanted (32, 64) at the end"),
        (renamed, "no `up`"),
        (lambda num_experts, hidden, width, seed: nn.Linear(hidden, num_experts), "part missing"),
        (lambda num_experts, hidden, width, seed: small((num_experts, hidden)), "wanted the layer"),
    ],
    4: [
        (with_balance(counts_squared), "no gradient reaches the routers"),
        (with_balance(lambda logits, k: balance_of_the_package(logits, k).detach()), "no gradient reaches"),
        (with_balance(balance_of_the_package, lambda coef: -coef), "Mind the sign"),
        (with_balance(balance_of_the_package, lambda coef: 0.01 * (coef > 0)), "Five times"),
        (with_balance(balance_of_the_package, lambda coef: 1.0), "only the cross-entropy should be left"),
        (with_balance(probabilities_squared), "with a gradient to match"),
        (with_balance(masked_logits), "with a gradient to match"),
        (pooled, "averaged over the layers first"),
        (lambda *inputs: total_of_the_package(*inputs).item(), "returned float"),
    ],
    5: [
        (pairs_where(lambda a, b: a * b == 0 and a != b, of_its_tokens), "first choice"),
        (pairs_where(lambda a, b: a < b, of_its_tokens), "one direction"),
        (pairs_where(different, lambda found, tokens, total: found), "counts"),
        (pairs_where(different, lambda found, tokens, total: found / total), "number of all tokens"),
        (pairs_where(different, lambda found, tokens, total: found / tokens), "changed places"),
        (pairs_where(lambda a, b: (a - b) % 4 in (1, 3), of_its_tokens), "Not yet"),
        (lambda indices, num_experts: torch.zeros(num_experts), "shape"),
    ],
    6: [
        (softmax_then_scaled, "At k = 1 the router still gets no gradient"),
        (without_gradient, "no gradient"),
        (straight_through, "every weight is 1"),
        (denominator_detached, "At k = 2 the weights are right and their gradient is not"),
        (denominator_of_softmax_detached, "At k = 1 the weights are right and their gradient is not"),
        (a_faint_gradient, "At k = 1 the weights are right and their gradient is not"),
        (the_gradient_turned, "At k = 1 the weights are right and their gradient is not"),
        (over_tokens, "taken over tokens"),
        (lambda logits, k: logits.sigmoid().topk(k), "Not yet"),
    ],
    7: [
        (in_order_of(by_rank, lambda fits, indices: fits.view(indices.shape)), "in which order do the rows"),
        (in_order_of(by_rank, turned_back, room=1), "has 6 places and takes 7"),
        (in_order_of(by_rank, turned_back, room=-1), "some of its 6 places are free"),
        (a_queue_for_each_rank, "has 6 places and takes"),
        (first_choices_only, "are free"),
        (last_rank_first, "wants it more"),
        (lambda indices, num_experts, capacity: indices, "yes or no"),
        (lambda indices, num_experts, capacity: [True], "of shape (16, 2)"),
    ],
    8: [
        (masked_without_scaling, "no longer add up to 1"),
        (masked_logits, "No token chose expert 5"),
        (counts_squared, "No gradient"),
        (probabilities_squared, "probabilities with probabilities"),
        (lambda logits, k: balance_of_the_package(logits, k) / logits.shape[1], "Perfect balance should give k"),
        (lambda logits, k: -balance_of_the_package(logits, k), "wanted 2."),
        (lambda logits, k: balance_of_the_package(logits, k).tolist(), "returned float"),
    ],
    9: [
        (chosen_tokens(overwrite), "one of them only"),
        (chosen_tokens(unweighted), "not weighted"),
        (averaged, "averaged"),
        (run_all_then_pick, "4 experts with 5 places each computed 64 tokens"),
        (run_all_that_anyone_took, "at too high a price"),
        (lambda hidden, logits, experts, capacity: hidden, "Not yet"),
    ],
}


@pytest.mark.parametrize(("check", "repair", "hint"), cases(HALF))
def test_half_repairs_are_rejected_with_a_hint(check, repair, hint):
    with pytest.raises(WrongAnswer, match=re.escape(hint)):
        check(repair)


def test_last_choices_may_not_push_out_first_ones():
    """The rule itself, apart from the check: three tokens want expert 0, for two of them it is the second choice."""
    indices = torch.tensor([[1, 0], [2, 0], [0, 1]])
    assert served_by_hand(indices, 3, 1) == capacity_of_the_package(indices, 3, 1).tolist()
    assert served_by_hand(indices, 3, 1) == [[True, False], [True, False], [True, False]]


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


def test_an_answer_cannot_change_the_question(notebook):
    def destructive(logits, k):
        weights, indices = notebook["repair_6"](logits, k)
        logits.detach().zero_()
        return weights, indices

    assert checks.check_router_weights(destructive).startswith("Right")


def test_an_unfilled_gap_says_so():
    def gap(*inputs):
        raise NotImplementedError

    for check in CHECKS:
        with pytest.raises(NotImplementedError):
            check(gap)


def test_there_is_one_check_for_each_exhibit():
    defined = [name for name, value in vars(museum).items() if name.startswith("check_")]
    assert defined == [check.__name__ for check in CHECKS]
    assert sum(source.startswith("def exhibit_") for source in SOURCES) == len(CHECKS)
