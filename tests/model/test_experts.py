"""The implementations of the experts against a loop over slots and against each other; and what they must not cost."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minimoe.model.config import EXPERTS_IMPLEMENTATIONS, MoEConfig
from minimoe.model.experts import IMPLEMENTATIONS, clamped_swiglu, eager_experts, grouped_experts, sorted_experts
from minimoe.model.layers import initialise
from minimoe.model.moe import Experts
from tests.rounding import assert_near

SEEDS = st.integers(0, 2**31)
EVERY_RUN = pytest.mark.parametrize("run", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


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


def slow_gpt_oss(x: Tensor, indices: Tensor, weights: Tensor, *experts: Tensor) -> Tensor:
    """The formula of gpt-oss, a slot at a time, with a limit of 0.5."""
    rows = [0 * x[token] for token in range(len(x))]
    for token, slot in (indices < len(experts[0])).nonzero().tolist():
        gate, up, down, of_gate, of_up, of_down = (tensor[indices[token, slot]] for tensor in experts)
        opened = (gate @ x[token] + of_gate).clamp(max=0.5)
        inner = ((up @ x[token] + of_up).clamp(-0.5, 0.5) + 1) * opened / (1 + (-1.702 * opened).exp())
        rows[token] = rows[token] + weights[token, slot] * (down @ inner + of_down)
    return torch.stack(rows)


@pytest.mark.parametrize(("width", "tokens"), [(12, 9), (7, 9), (12, 1)])
@EVERY_RUN
def test_biases_and_a_limit(run, width, tokens):
    """With empty slots, forwards and backwards; each bias takes part where its expert does, and nowhere else."""
    arguments = case(tokens, 4, 2, 8, width, 1, 0.3, torch.float32)
    generator = torch.Generator().manual_seed(2)
    biases = [torch.randn(4, size, generator=generator) for size in (width, width, 8)]
    run = partial(run, act=partial(clamped_swiglu, limit=0.5, alpha=1.702))
    found, wanted = (forward_and_gradients(each, (*arguments, *biases)) for each in (run, slow_gpt_oss))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(run(*arguments, *biases), wanted[0], rtol=1e-4, atol=1e-5)


@given(cases(torch.float32))
def test_grouped_equals_sorted(arguments):
    """At every width, also where a row is no multiple of the 16 bytes that grouped products want."""
    both = zip(*(forward_and_gradients(run, arguments) for run in (grouped_experts, sorted_experts)), strict=True)
    for found, expected in both:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("hidden", "width", "dtype"), [(32, 32, torch.bfloat16), (36, 17, torch.float16)])
@EVERY_RUN
def test_half_precision_stays_near_float64(run, hidden, width, dtype):
    exact = forward_and_gradients(slow_experts, case(16, 4, 2, hidden, width, 0, 0.2, torch.float64))
    rounded = forward_and_gradients(run, case(16, 4, 2, hidden, width, 0, 0.2, dtype))
    for found, expected in zip(rounded, exact, strict=True):
        assert found.dtype == dtype
        assert (found.double() - expected).norm() < 0.02 * expected.norm()


@EVERY_RUN
def test_autocast_multiplies_in_half_precision_and_returns_what_came_in(run):
    arguments = case(16, 4, 2, 36, 17, 0, 0.2, torch.float32)
    exact = forward_and_gradients(run, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = forward_and_gradients(run, arguments)
    for found, expected in zip(rounded, exact, strict=True):
        assert found.dtype == torch.float32
        assert 1e-4 * expected.norm() < (found - expected).norm() < 0.02 * expected.norm()


@EVERY_RUN
def test_only_what_needs_a_gradient_gets_one(run):
    """Frozen experts, a frozen trunk, a frozen router: what is left has the gradient that it has among all."""
    x, indices, weights, *matrices = case(12, 4, 2, 8, 8, 0, 0.2, torch.float32)
    _, *everything = forward_and_gradients(run, (x, indices, weights, *matrices))
    for trained in ([0], [1], [2, 3, 4], [3], [0, 1], []):
        leaves = [leaf.clone().requires_grad_(i in trained) for i, leaf in enumerate((x, weights, *matrices))]
        output = run(leaves[0], indices, *leaves[1:])
        assert output.requires_grad == bool(trained)
        if trained:
            (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        for i, leaf in enumerate(leaves):
            if i in trained:
                assert_near(leaf.grad, everything[i])
            else:
                assert leaf.grad is None


@given(st.data())
def test_one_token_without_gradients_takes_a_shorter_way_to_the_same(data):
    x, indices, *rest = data.draw(cases(torch.float64))
    with torch.no_grad():
        for token in range(len(x)):
            one = slice(token, token + 1)
            weights, *matrices = rest
            found = sorted_experts(x[one], indices[one], weights[one], *matrices)
            torch.testing.assert_close(found, slow_experts(x[one], indices[one], weights[one], *matrices))


@EVERY_RUN
def test_any_strides_do(run):
    arguments = case(6, 3, 2, 8, 4, 0, 0.3, torch.float32)
    strided = tuple(tensor.mT.contiguous().mT for tensor in arguments)
    assert not any(tensor.is_contiguous() for tensor in strided)
    both = zip(forward_and_gradients(run, strided), forward_and_gradients(run, arguments), strict=True)
    for found, expected in both:
        assert_near(found, expected)


@EVERY_RUN
def test_no_tokens_at_all(run):
    x, indices, weights, *matrices = case(1, 3, 2, 8, 8, 0, 0.0, torch.float32)
    output, *gradients = forward_and_gradients(run, (x[:0], indices[:0], weights[:0], *matrices))
    assert output.shape == (0, 8)
    assert all(gradient.eq(0).all() for gradient in gradients)


@pytest.mark.exact("two runs of one function are compared to the bit")
@EVERY_RUN
def test_exactly_the_same_on_every_run(run):
    arguments = case(200, 8, 3, 16, 16, 0, 0.1, torch.float32)
    first, second = (forward_and_gradients(run, arguments) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("run", [eager_experts, sorted_experts])
@pytest.mark.parametrize("empty", [0.4, 1.0])
def test_gradcheck(run, empty):
    x, indices, weights, *matrices = case(4, 3, 2, 3, 2, 0, empty, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, weights, *matrices)]
    assert torch.autograd.gradcheck(lambda x, *rest: run(x, indices, *rest), leaves, nondet_tol=1e-9)


def test_eager_can_be_differentiated_twice():
    x, indices, weights, *matrices = case(3, 3, 2, 3, 2, 0, 0.3, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, weights, *matrices)]
    assert torch.autograd.gradgradcheck(lambda x, *rest: eager_experts(x, indices, *rest), leaves, nondet_tol=1e-9)


def gradient_penalty(run, x: Tensor, indices: Tensor, *rest: Tensor) -> list[Tensor]:
    """The gradients of the squares of the gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *rest)]
    first = torch.autograd.grad(run(leaves[0], indices, *leaves[1:]).sum(), leaves, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in first)
    return list(torch.autograd.grad(penalty, leaves))


@pytest.mark.parametrize("tokens", [6, 600])  # few of them go another way
@pytest.mark.parametrize("run", [grouped_experts, sorted_experts])
def test_all_can_be_differentiated_twice(run, tokens):
    arguments = case(tokens, 3, 2, 8, 4, 0, 0.0, torch.float32)
    for found, expected in zip(*(gradient_penalty(by, *arguments) for by in (run, eager_experts)), strict=True):
        assert_near(found, expected, 1e-3)


@pytest.mark.parametrize("name", EXPERTS_IMPLEMENTATIONS)
def test_unused_experts_have_gradients_of_zero(name):
    """Not None: weight decay and gradient norms should not depend on which experts a batch happens to use."""
    experts = Experts(MoEConfig(hidden_size=8, intermediate_size=8, num_experts=4, experts_implementation=name))
    indices, weights = torch.tensor([[0, 4], [2, 0]]), torch.tensor([[0.5, 0.0], [0.3, 0.7]])
    experts(torch.randn(2, 8), indices, weights).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad[[1, 3]].eq(0).all()
        assert parameter.grad[[0, 2]].abs().sum(dim=(1, 2)).gt(0).all()


class Products(TorchDispatchMode):
    """Counts the matrix products made inside the block, and the numbers multiplied in them."""

    count = multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten._grouped_mm):
            left, right, *_ = args
            self.count += 1
            self.multiplications += left.shape[0] * left.shape[1] * right.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("run", "width"), [(eager_experts, 3), (sorted_experts, 4), (sorted_experts, 3)])
def test_empty_slots_cost_nothing(run, width):
    """What is multiplied are the filled slots, by three matrices each."""
    arguments = case(20, 5, 3, 8, width, 0, 0.5, torch.float32)
    filled = int((arguments[1] < 5).sum())
    assert 0 < filled < 60
    with Products() as products:
        run(*arguments)
    assert products.multiplications == 3 * filled * 8 * width


def test_sorted_passes_over_idle_experts():
    """A token that is decoded alone meets K experts: three products each."""
    arguments = case(1, 16, 2, 8, 8, 0, 0.0, torch.float64)
    with Products() as forward, torch.no_grad():
        sorted_experts(*arguments)
    assert forward.count == 3 * 2


@EVERY_RUN
def test_empty_slots_may_hold_anything(run):
    """A dropped token's hidden state is not even looked at."""
    x, indices, weights, *matrices = case(6, 3, 2, 8, 8, 0, 0.0, torch.float32)
    indices[2], weights[2], x[2] = 3, 0, torch.nan
    output = run(x, indices, weights, *matrices)
    assert output[2].eq(0).all() and output.isfinite().all()


@pytest.fixture
def poisoned_memory():
    """Fresh memory holds NaN, so that a number nobody wrote shows."""
    torch.use_deterministic_algorithms(True)  # fills it, unless torch.utils.deterministic says otherwise
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("empty", [0.4, 1.0])
@EVERY_RUN
def test_memory_that_nobody_wrote_reaches_nothing(run, empty, poisoned_memory):
    """Grouped products leave the rows of empty slots as they find them."""
    assert torch.empty(3).isnan().all()
    rows, matrices, ends = torch.ones(6, 8), torch.ones(1, 8, 8), torch.tensor([4], dtype=torch.int32)
    assert torch.nn.functional.grouped_mm(rows, matrices, offs=ends)[4:].isnan().all()
    arguments = case(12, 5, 3, 8, 8, 0, empty, torch.float32)
    both = zip(forward_and_gradients(run, arguments), forward_and_gradients(slow_experts, arguments), strict=True)
    for found, expected in both:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_operation_that_compiled_models_call_has_the_gradients_of_a_loop():
    """Of a sum as well, whose gradient is one number with strides of 0; `F.grouped_mm` refuses that."""
    left, right, ends = torch.randn(6, 16), torch.randn(2, 16, 8), torch.tensor([2, 6], dtype=torch.int32)
    gradients = []
    for multiply in (
        lambda x, matrices: torch.ops.minimoe.grouped_mm(x, matrices, ends),
        lambda x, matrices: torch.cat([x[:2] @ matrices[0], x[2:] @ matrices[1]]),
    ):
        inputs = left.clone().requires_grad_(), right.clone().requires_grad_()
        gradients.append(torch.autograd.grad(multiply(*inputs).sum(), inputs))
    for found, wanted in zip(*gradients, strict=True):
        assert_near(found, wanted)


def test_grouped_names_a_dtype_that_it_cannot_multiply():
    message = "experts_implementation='grouped' was given torch.float64: wanted one of torch.float32, torch.bfloat16"
    with pytest.raises(ValueError, match=message):
        grouped_experts(*case(4, 3, 2, 8, 8, 0, 0.0, torch.float64))


def test_grouped_runs_without_memory():
    """On the meta device, where only shapes are known: nothing is read back, forwards or backwards."""
    arguments = [tensor.to("meta") for tensor in case(12, 5, 3, 10, 6, 0, 0.3, torch.float32)]
    x, _, *leaves = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in arguments]
    output = grouped_experts(*arguments)
    gradients = torch.autograd.grad(output.sum(), (x, *leaves))
    assert output.shape == x.shape
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in (x, *leaves)]


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
