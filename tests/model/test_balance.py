"""Balance losses, the bias and the capacity against slow versions, and against what is known of extreme cases."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimoe.model.balance import (
    apply_capacity,
    expert_capacity,
    expert_load,
    load_balancing_loss,
    max_violation,
    router_z_loss,
    update_bias,
)
from minimoe.model.routing import RouterOutput, route_expert_choice, route_grouped, route_switch, route_topk

SEEDS = st.integers(0, 2**31)


def random_choice(tokens: int, experts: int, k: int, seed: int) -> RouterOutput:
    generator = torch.Generator().manual_seed(seed)
    return route_topk(torch.randn(tokens, experts, generator=generator, dtype=torch.float64), k)


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


# How busy the experts are.


@given(st.integers(1, 20), st.integers(1, 8), SEEDS, st.data())
def test_expert_load_counts_the_filled_slots(tokens, experts, seed, data):
    k = data.draw(st.integers(1, experts))
    indices = random_choice(tokens, experts, k, seed).indices
    indices[0, 0] = experts  # a dropped slot
    flat = indices.flatten().tolist()
    assert expert_load(indices, experts).tolist() == [flat.count(expert) for expert in range(experts)]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20).filter(any))
def test_max_violation(load):
    value = max_violation(torch.tensor(load))
    assert value == pytest.approx(max(load) * len(load) / sum(load) - 1)
    assert -1e-12 <= value <= len(load) - 1 + 1e-12


@pytest.mark.parametrize(("load", "value"), [([7, 7, 7], 0), ([9, 9, 0, 0, 0, 0], 6 / 2 - 1), ([5, 0, 0, 0], 3)])
def test_max_violation_of_extreme_loads(load, value):
    """0 when balanced, E / K - 1 when the same K experts take everything."""
    assert max_violation(torch.tensor(load)) == pytest.approx(value)


def test_max_violation_needs_a_token():
    with pytest.raises(ValueError, match=r"load=\[0, 0\]: wanted at least one routed token"):
        max_violation(torch.tensor([0, 0]))


# The balance loss.


def slow_balance_loss(outputs: list[RouterOutput], sequences: int, pooled: bool) -> float:
    def shares(output: RouterOutput, part: range) -> tuple[list[float], list[float]]:
        experts = range(output.logits.shape[1])
        chosen, rows = output.indices.tolist(), output.logits.tolist()
        f = [sum(e in chosen[t] for t in part) / len(part) for e in experts]
        p = [sum(softmax(rows[t])[e] for t in part) / len(part) for e in experts]
        return f, p

    def product(f: list[float], p: list[float]) -> float:
        return len(f) * sum(a * b for a, b in zip(f, p, strict=True))

    length = len(outputs[0].logits) // sequences
    total = 0.0
    for start in range(0, sequences * length, length):
        layers = [shares(output, range(start, start + length)) for output in outputs]
        if pooled:
            f, p = (
                [sum(column) / len(layers) for column in zip(*side, strict=True)] for side in zip(*layers, strict=True)
            )
            total += product(f, p)
        else:
            total += sum(product(f, p) for f, p in layers) / len(layers)
    return total / sequences


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), SEEDS, st.booleans(), st.data())
def test_balance_loss(layers, sequences, length, experts, seed, pooled, data):
    k = data.draw(st.integers(1, experts))
    outputs = [random_choice(sequences * length, experts, k, seed + layer) for layer in range(layers)]
    loss = load_balancing_loss(outputs, sequences=sequences, across_layers="pooled" if pooled else "mean")
    assert loss.item() == pytest.approx(slow_balance_loss(outputs, sequences, pooled))


@pytest.mark.parametrize("k", [1, 3])
def test_balance_loss_of_a_perfect_balance_is_k(k):
    """Token t prefers experts t, t + 1, ...: every expert is chosen, and is likely, equally often."""
    logits = torch.stack([torch.arange(6.0).roll(shift) for shift in range(6)])
    assert load_balancing_loss([route_topk(logits, k)]).item() == pytest.approx(k)


def test_balance_loss_of_a_collapse_is_the_number_of_experts():
    logits = torch.tensor([[30.0, 0, 0, 0]]).repeat(5, 1)
    assert load_balancing_loss([route_topk(logits, 1)]).item() == pytest.approx(4)


def test_pooling_hides_layers_that_collapsed_in_opposite_ways():
    left, right = (route_topk(torch.tensor([row] * 4), 1) for row in ([40.0, 0.0], [0.0, 40.0]))
    assert load_balancing_loss([left]).item() == pytest.approx(2)
    assert load_balancing_loss([right]).item() == pytest.approx(2)
    assert load_balancing_loss([left, right]).item() == pytest.approx(2)
    assert load_balancing_loss([left, right], across_layers="pooled").item() == pytest.approx(1)


def test_balancing_every_sequence_is_stricter_than_balancing_the_batch():
    """Each of two sequences uses one expert of two: balanced together, collapsed apart."""
    logits = torch.tensor([[40.0, 0]] * 4 + [[0, 40.0]] * 4)
    outputs = [route_topk(logits, 1)]
    assert load_balancing_loss(outputs).item() == pytest.approx(1)
    assert load_balancing_loss(outputs, sequences=2).item() == pytest.approx(2)


def test_balance_loss_teaches_through_the_probabilities_alone():
    """Its gradient is that of E sum_i f_i P_i with f held constant."""
    logits = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    output = route_topk(logits, 2)
    (grad,) = torch.autograd.grad(load_balancing_loss([output]), logits)
    share = expert_load(output.indices, 5) / 12
    (wanted,) = torch.autograd.grad(5 * (share * logits.softmax(-1).mean(0)).sum(), logits)
    torch.testing.assert_close(grad, wanted)
    assert grad.abs().sum() > 0


def test_balance_loss_does_not_count_dropped_slots():
    logits = torch.tensor([[2.0, 0.0]] * 4, dtype=torch.float64)
    output = apply_capacity(route_topk(logits, 1), 1)
    probability = 1 / (1 + math.exp(-2))
    assert load_balancing_loss([output]).item() == pytest.approx(2 * 1 / 4 * probability)


@pytest.mark.parametrize("layers", [1, 3])
def test_pooled_balance_loss_equals_transformers(layers):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = tuple(torch.randn(30, 8) for _ in range(layers))
    ours = load_balancing_loss([route_topk(layer, 2) for layer in logits], across_layers="pooled")
    torch.testing.assert_close(ours, load_balancing_loss_func(logits, 8, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda outputs: load_balancing_loss([]), "router_outputs is empty: wanted one entry per sparse layer"),
        (lambda outputs: router_z_loss([]), "router_outputs is empty: wanted one entry per sparse layer"),
        (lambda outputs: load_balancing_loss(outputs, across_layers="sum"), "across_layers='sum': wanted 'mean' or"),
        (lambda outputs: load_balancing_loss(outputs, sequences=4), "sequences=4: wanted a divisor of the 6 tokens"),
        (lambda outputs: load_balancing_loss(outputs, sequences=0), "sequences=0: wanted a divisor of the 6 tokens"),
        (lambda outputs: apply_capacity(outputs[0], 0), "capacity=0: wanted at least 1"),
    ],
)
def test_impossible_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call([random_choice(6, 4, 2, 0)])


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), SEEDS)
def test_z_loss(layers, tokens, experts, seed):
    outputs = [random_choice(tokens, experts, 1, seed + layer) for layer in range(layers)]
    squares = [math.log(sum(map(math.exp, row))) ** 2 for output in outputs for row in output.logits.tolist()]
    assert router_z_loss(outputs).item() == pytest.approx(sum(squares) / len(squares))


# The bias.


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=12), st.sampled_from([1e-3, 0.1]))
def test_bias_step(load, rate):
    """rate * sign(mean - n), without its mean; busier experts never gain on idler ones."""
    bias = torch.zeros(len(load), dtype=torch.float64)
    update_bias(bias, torch.tensor(load), rate)
    mean = Fraction(sum(load), len(load))
    signs = [(mean > n) - (mean < n) for n in load]
    wanted = [rate * (sign - sum(signs) / len(signs)) for sign in signs]
    assert bias.tolist() == pytest.approx(wanted, abs=1e-12)
    assert bias.sum().item() == pytest.approx(0, abs=1e-9)
    ordered = bias[torch.tensor(load).argsort()].tolist()
    assert ordered == sorted(ordered, reverse=True)


def test_bias_balances_a_skewed_router():
    """Without the bias one expert gets several times its share; after 500 steps on fresh tokens all get theirs."""
    generator = torch.Generator().manual_seed(0)
    preference, bias = torch.linspace(-2, 2, 8), torch.zeros(8)

    def load() -> torch.Tensor:
        logits = preference + torch.randn(4096, 8, generator=generator)
        return expert_load(route_topk(logits, 2, score_func="sigmoid", bias=bias).indices, 8)

    assert max_violation(load()) > 1.5
    for _ in range(500):
        update_bias(bias, load(), rate=2e-3)
    assert max_violation(load()) < 0.1


# The capacity.


@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 8), st.integers(1, 400).map(lambda n: n / 8))
def test_expert_capacity_is_the_floor(tokens, experts, k, factor):
    exact = math.floor(Fraction(factor) * tokens * k / experts)
    assert expert_capacity(tokens, experts, k, factor) == min(tokens, max(1, exact))


@pytest.mark.parametrize(
    ("arguments", "capacity"),
    [((100, 8, 1, 1.0), 12), ((1, 64, 2, 1.0), 1), ((2, 49, 1, 49.0), 2), ((10, 4, 2, math.inf), 10)],
    ids=["floor", "at least one", "exact where 1 / E is not", "infinite"],
)
def test_expert_capacity_of_known_cases(arguments, capacity):
    assert expert_capacity(*arguments) == capacity


@given(st.integers(1, 12), st.integers(1, 6), SEEDS, st.data())
def test_capacity_serves_first_choices_first_then_earlier_tokens(tokens, experts, seed, data):
    k, capacity = data.draw(st.integers(1, experts)), data.draw(st.integers(1, tokens))
    output = random_choice(tokens, experts, k, seed)
    limited = apply_capacity(output, capacity)
    taken = [0] * experts
    for rank in range(k):
        for token in range(tokens):
            expert = int(output.indices[token, rank])
            kept = taken[expert] < capacity
            taken[expert] += kept
            assert limited.indices[token, rank] == (expert if kept else experts)
            assert limited.weights[token, rank] == (output.weights[token, rank] if kept else 0)
    assert expert_load(limited.indices, experts).tolist() == taken
    assert torch.equal(limited.logits, output.logits) and torch.equal(limited.scores, output.scores)


def test_capacity_by_hand():
    """Token 0 has expert 0 as its second choice; token 1, though later, has it first and gets the only place."""
    logits = torch.tensor([[1.0, 2.0, 0.0], [2.0, 0.0, 1.0]])
    limited = apply_capacity(route_topk(logits, 2), 1)
    assert limited.indices.tolist() == [[1, 3], [0, 2]]


@pytest.mark.parametrize("route", [route_switch, lambda x: route_topk(x, 3), lambda x: route_grouped(x, 2, 2)])
def test_capacity_for_all_changes_nothing(route):
    output = route(torch.randn(9, 4))
    assert all(map(torch.equal, apply_capacity(output, 9), output))


def test_capacity_leaves_empty_slots_empty():
    output = apply_capacity(route_expert_choice(torch.randn(6, 3), 2), 1)
    assert expert_load(output.indices, 3).tolist() == [1, 1, 1]
    assert (output.weights[output.indices == 3] == 0).all()
