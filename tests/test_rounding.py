"""The switch of tests/rounding.py: every product moves, by no more than it says; without it, nothing does."""

import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests import conftest
from tests.rounding import SIZE, perturbed, seed_from_environment

# Without the switch on, whatever the suite runs under: here it is opened by hand.
pytest_plugins = "pytester"
pytestmark = pytest.mark.exact("compares results with and without the switch")


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


SQUARE, OTHER = (16, 16), (4, 16, 16)
MASK = torch.ones(16, 16).tril().bool()
ENDS = torch.tensor([5, 9, 9, 16], dtype=torch.int32)
PRODUCTS = {
    "x @ y": lambda x, y: x @ y[0],
    "x @ y, batched": lambda x, y: x @ y,
    "x @ v": lambda x, y: x @ y[0, 0],
    "v @ v": lambda x, y: x[0] @ y[0, 0],
    "linear": lambda x, y: F.linear(x, y[0]),
    "linear, bias": lambda x, y: F.linear(x, y[0], x[0]),
    "linear, inference mode": lambda x, y: torch.inference_mode()(F.linear)(x.detach(), y[0].detach()),
    "einsum": lambda x, y: torch.einsum("ab,ebc->eac", x, y),
    "baddbmm": lambda x, y: torch.baddbmm(y, y, y),
    "addbmm": lambda x, y: torch.addbmm(x, y, y),
    "addmv": lambda x, y: torch.addmv(x[0], x, x[1]),
    "vdot": lambda x, y: torch.vdot(x[0], x[1]),
    "mm, out=": lambda x, y: torch.mm(x.detach(), y[0].detach(), out=torch.empty_like(x)),
    "addmm_": lambda x, y: x.detach().clone().addmm_(x.detach(), y[0].detach()),
    "grouped_mm": lambda x, y: F.grouped_mm(x, y, offs=ENDS),
    "attention": lambda x, y: F.scaled_dot_product_attention(y[None], y[None], y[None]),
    "attention, mask": lambda x, y: F.scaled_dot_product_attention(y[None], y[None], y[None], attn_mask=MASK),
    "layer_norm": lambda x, y: F.layer_norm(y, (16,), x[0]),
    "rms_norm": lambda x, y: F.rms_norm(y, (16,), x[0]),
    "norm": lambda x, y: y.norm(dim=-1),
    "cdist": lambda x, y: torch.cdist(torch.cat([x, x]), torch.cat([y[0], y[1]])) ** 2,
}


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(*SQUARE, dtype=dtype).requires_grad_(), randn(*OTHER, dtype=dtype, seed=1).requires_grad_()


@pytest.mark.parametrize("dtype", SIZE)
def test_products_move_by_no_more_than_stated(dtype):
    x, y = inputs(dtype)
    once = SIZE[dtype] + 2 * torch.finfo(dtype).eps
    # cdist cancels: its error is that of |x|^2 + |y|^2, and addbmm adds four products one after another
    scales = {"cdist": 128.0, "addbmm": 64.0}
    for name, product in PRODUCTS.items():
        if name == "grouped_mm" and dtype == torch.float64:
            continue  # F.grouped_mm has none
        exact = product(x, y)
        with perturbed(1):
            moved = product(x, y)
        assert not torch.equal(moved, exact), name
        bounds = {"rtol": 0, "atol": once * scales[name]} if name in scales else {"rtol": once, "atol": 0}
        torch.testing.assert_close(moved, exact, **bounds, msg=lambda message, name=name: f"{name}: {message}")
        assert torch.equal(product(x, y), exact), name


def test_gradients_move():
    x, y = inputs(torch.float32)
    for name in ("linear, bias", "x @ y, batched", "grouped_mm", "attention, mask", "layer_norm"):
        first, second = (PRODUCTS[name](x, y) for _ in range(2))
        exact = torch.autograd.grad(first, [x, y], torch.ones_like(first), allow_unused=True)
        with perturbed(1):  # the backward pass alone
            moved = torch.autograd.grad(second, [x, y], torch.ones_like(second), allow_unused=True)
        assert any(a is not None and not torch.equal(a, b) for a, b in zip(exact, moved, strict=True)), name
        for a, b in zip(exact, moved, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_seed_repeats_and_no_two_calls_are_moved_alike():
    x = randn(*SQUARE)

    def twice(seed):
        with perturbed(seed):
            return x @ x, x @ x

    first, second = twice(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, twice(1)[0]) and torch.equal(second, twice(1)[1])
    assert not torch.equal(first, twice(2)[0])


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    with perturbed(1):
        randn(*SQUARE) @ randn(*SQUARE)
        found = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(3))


def test_every_thread_is_reached():
    x, found = randn(*SQUARE), []
    exact = x @ x
    with perturbed(1):
        thread = threading.Thread(target=lambda: found.append(x @ x))
        thread.start()
        thread.join()
    assert not torch.equal(found[0], exact)


def test_other_types_are_left_alone():
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        x = (8 * randn(*SQUARE)).to(dtype)
        exact = x @ x
        with perturbed(1):
            assert torch.equal(x @ x, exact), dtype


def test_tensors_without_values_pass():
    with perturbed(1):
        assert (torch.empty(2, 3, device="meta") @ torch.empty(3, 4, device="meta")).shape == (2, 4)
        program = torch.export.export(torch.nn.Linear(3, 4), (torch.ones(2, 3),))
    assert program.module()(torch.ones(2, 3)).shape == (2, 4)


def test_the_seed_is_read_from_the_environment(monkeypatch):
    monkeypatch.delenv("MINIMOE_ROUNDING", raising=False)
    assert seed_from_environment() is None
    for value, seed in (("", None), ("3", 3)):
        monkeypatch.setenv("MINIMOE_ROUNDING", value)
        assert seed_from_environment() == seed
    monkeypatch.setenv("MINIMOE_ROUNDING", "yes")
    with pytest.raises(ValueError, match="MINIMOE_ROUNDING='yes': wanted an integer"):
        seed_from_environment()


SUITE = """
import pytest, torch

def is_exact():
    return bool((torch.ones(64, 64) @ torch.ones(64, 64) == 64).all())

@pytest.fixture(scope="module")
def drawn_early():
    return is_exact()

def test_moved(drawn_early):
    assert not drawn_early and not is_exact()

@pytest.mark.exact("a reason")
def test_exact():
    assert is_exact()
"""


def test_the_suite_is_run_under_it_except_for_what_is_exact(pytester, monkeypatch):
    pytester.makepyfile(SUITE)
    settings = Path(__file__).resolve().parent.parent / "pyproject.toml"
    for seed, counts in ((1, {"passed": 1, "deselected": 1}), (None, {"passed": 1, "failed": 1})):
        monkeypatch.setattr(conftest, "ROUNDING", seed)
        pytester.runpytest_inprocess("-c", settings, "-p", "tests.conftest", pytester.path).assert_outcomes(**counts)


def test_a_mark_without_a_reason_is_refused(request):
    request.node.add_marker(pytest.mark.exact())
    with pytest.raises(pytest.UsageError, match="wanted a reason"):
        conftest.pytest_collection_modifyitems(request.config, [request.node])
