"""The implementations of the experts against a loop over slots and against each other; and what they must not cost."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minimoe.model.config import EXPERTS_IMPLEMENTATIONS, MoEConfig
from minimoe.model.experts import IMPLEMENTATIONS, eager_experts, grouped_experts, sorted_experts
from minimoe.model.layers import initialise
from minimoe.model.moe import Experts

SEEDS = st.integers(0, 2**31)


def slow_experts(x: Tensor, indices: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One slot at a time, in the words of the formula."""
    rows = []
    for token in range(len(x)):
        row = 0 * x[token]
        for slot in range(indices.shape[1]):
            expert = int(indices[token, slot])
            if expert < len(gate):
                inner = gate[expert] @ x[token]
                inner = inner * torch.sigmoid(inner) * (up[expert] @ x[token])
                row = row + weights[token, slot] * (down[expert] @ inner)
        rows.append(row)
    return torch.stack(rows)


def case(
    tokens: int, experts: int, k: int, hidden: int, width: int, seed: int, empty: float, dtype: torch.dtype
) -> tuple:
    """Random arguments in which each slot is empty with probability `empty`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    indices = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])
    dropped = torch.rand(tokens, k, generator=generator) < empty
    weights = normal(tokens, k).abs().masked_fill(dropped, 0)
    return (
        normal(tokens, hidden),
        indices.masked_fill(dropped, experts),
        weights,
        normal(experts, width, hidden) / hidden**0.5,
        normal(experts, width, hidden) / hidden**0.5,
        normal(experts, hidden, width) / width**0.5,
    )


def forward_and_gradients(run, arguments: tuple) -> list[Tensor]:
    """The output and the gradients of everything but the indices."""
    x, indices, weights, *matrices = arguments
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weights, *matrices)]
    output = run(leaves[0], indices, *leaves[1:])
    probe = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * probe).sum(), leaves, materialize_grads=True)]


@st.composite
def cases(draw, dtype: torch.dtype, multiple: int = 1) -> tuple:
    """A few tokens for many experts leave some unused; `empty` = 1 leaves all."""
    experts = draw(st.integers(1, 6))
    hidden, width = multiple * draw(st.integers(1, 4)), multiple * draw(st.integers(1, 4))
    tokens, k = draw(st.integers(1, 8)), draw(st.integers(1, experts))
    return case(tokens, experts, k, hidden, width, draw(SEEDS), draw(st.sampled_from([0.0, 0.4, 1.0])), dtype)


@given(cases(torch.float64))
def test_eager_and_sorted_equal_the_formula(arguments):
    wanted = forward_and_gradients(slow_experts, arguments)
    for run in (eager_experts, sorted_experts):
        for found, expected in zip(forward_and_gradients(run, arguments), wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@given(cases(torch.float32, multiple=4))
def test_grouped_equals_sorted(arguments):
    both = zip(*(forward_and_gradients(run, arguments) for run in (grouped_experts, sorted_experts)), strict=True)
    for found, expected in both:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_bfloat16_stays_near_float64(run):
    exact = forward_and_gradients(slow_experts, case(16, 4, 2, 32, 32, 0, 0.2, torch.float64))
    rounded = forward_and_gradients(run, case(16, 4, 2, 32, 32, 0, 0.2, torch.bfloat16))
    for found, expected in zip(rounded, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.exact("two runs of one function are compared to the bit")
@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_exactly_the_same_on_every_run(run):
    arguments = case(200, 8, 3, 16, 16, 0, 0.1, torch.float32)
    first, second = (forward_and_gradients(run, arguments) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("run", [eager_experts, sorted_experts])
@pytest.mark.parametrize("empty", [0.0, 0.4, 1.0])
def test_gradcheck(run, empty):
    x, indices, weights, *matrices = case(4, 3, 2, 3, 2, 0, empty, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, weights, *matrices)]
    assert torch.autograd.gradcheck(lambda x, *rest: run(x, indices, *rest), leaves, nondet_tol=1e-9)


@pytest.mark.parametrize("name", EXPERTS_IMPLEMENTATIONS)
def test_unused_experts_have_gradients_of_zero(name):
    """Not None: weight decay and gradient norms should not depend on which experts a batch happens to use."""
    experts = Experts(MoEConfig(hidden_size=8, intermediate_size=8, num_experts=4, experts_implementation=name))
    indices, weights = torch.tensor([[0, 4], [2, 0]]), torch.tensor([[0.5, 0.0], [0.3, 0.7]])
    experts(torch.randn(2, 8), indices, weights).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad[[1, 3]].eq(0).all()
        assert parameter.grad[[0, 2]].abs().sum(dim=(1, 2)).gt(0).all()


@pytest.mark.parametrize(("name", "product"), [("eager", "linear"), ("sorted", "linear"), ("grouped", "grouped_mm")])
def test_empty_slots_cost_nothing(name, product, monkeypatch):
    """The rows that enter the matrix products are the filled slots, three products each."""
    arguments = case(20, 5, 3, 8, 8, 0, 0.5, torch.float32)
    multiply, rows = getattr(F, product), []

    def counted(x: Tensor, *args, **kwargs) -> Tensor:
        rows.append(len(x))
        return multiply(x, *args, **kwargs)

    monkeypatch.setattr(F, product, counted)
    IMPLEMENTATIONS[name](*arguments)
    filled = int((arguments[1] < 5).sum())
    assert 0 < filled < 60
    assert sum(rows) == 3 * filled


@pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_empty_slots_may_hold_anything(run):
    """A dropped token's hidden state is not even looked at."""
    x, indices, weights, *matrices = case(6, 3, 2, 8, 8, 0, 0.0, torch.float32)
    indices[2], weights[2], x[2] = 3, 0, torch.nan
    output = run(x, indices, weights, *matrices)
    assert output[2].eq(0).all() and output.isfinite().all()


def test_every_configured_name_is_implemented():
    assert set(IMPLEMENTATIONS) == set(EXPERTS_IMPLEMENTATIONS)


def test_weights_come_from_the_seed_alone():
    config = MoEConfig(hidden_size=32, intermediate_size=64, num_experts=8, initializer_range=0.05)
    before = torch.random.get_rng_state()
    one, same, other = Experts(config, seed=1), Experts(config, seed=1), Experts(config, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        assert not torch.equal(parameter, other.get_parameter(name))
        assert parameter.std().item() == pytest.approx(0.05, rel=0.05)
        assert parameter.mean().item() == pytest.approx(0, abs=0.002)


def test_initialise_tells_matrices_biases_and_scales_apart():
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.full((30, 40), torch.nan))
    module.q_bias = torch.nn.Parameter(torch.full((4,), torch.nan))
    module.norm = torch.nn.Parameter(torch.full((4,), torch.nan))
    initialise(module, 0.1, seed=0)
    assert module.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert module.weight.mean().item() == pytest.approx(0, abs=0.02)
    assert module.q_bias.eq(0).all() and module.norm.eq(1).all()
