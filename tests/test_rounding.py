"""The switch of tests/rounding.py: every product moves, by no more than it says; without it, nothing does."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import pytest_collection_modifyitems
from tests.rounding import SIZE, perturbed, seed_from_environment

ROOT = Path(__file__).resolve().parent.parent
# Without the switch on, whatever the suite runs under: here it is opened by hand.
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
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_moves_by_no_more_than_stated(name, dtype):
    if name == "grouped_mm" and dtype == torch.float64:
        pytest.skip("F.grouped_mm has no float64")
    x, y = inputs(dtype)
    exact = PRODUCTS[name](x, y)
    with perturbed(1):
        moved = PRODUCTS[name](x, y)
    assert not torch.equal(moved, exact)
    once = SIZE[dtype] + 2 * torch.finfo(dtype).eps
    # cdist cancels: its error is that of |x|^2 + |y|^2, and addbmm adds four products one after another
    scale = {"cdist": 128.0, "addbmm": 64.0}.get(name)
    torch.testing.assert_close(moved, exact, rtol=0 if scale else once, atol=once * scale if scale else 0)
    torch.testing.assert_close(PRODUCTS[name](x, y), exact, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear, bias", "x @ y, batched", "grouped_mm", "attention, mask", "layer_norm"])
def test_gradients_move(name):
    x, y = inputs(torch.float32)

    def gradients():
        output = PRODUCTS[name](x, y)
        return torch.autograd.grad(output, [x, y], torch.ones_like(output), allow_unused=True)

    exact = gradients()
    output = PRODUCTS[name](x, y)
    with perturbed(1):  # the backward pass alone
        moved = torch.autograd.grad(output, [x, y], torch.ones_like(output), allow_unused=True)
    assert any(a is not None and not torch.equal(a, b) for a, b in zip(exact, moved, strict=True))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_other_types_are_left_alone(dtype):
    x = (8 * randn(*SQUARE)).to(dtype)
    exact = x @ x
    with perturbed(1):
        assert torch.equal(x @ x, exact)


def test_tensors_without_values_pass():
    with perturbed(1):
        assert (torch.empty(2, 3, device="meta") @ torch.empty(3, 4, device="meta")).shape == (2, 4)
        program = torch.export.export(torch.nn.Linear(3, 4), (torch.ones(2, 3),))
    assert program.module()(torch.ones(2, 3)).shape == (2, 4)


@pytest.mark.parametrize("value, seed", [(None, None), ("", None), ("3", 3)])
def test_the_seed_is_read_from_the_environment(value, seed, monkeypatch):
    monkeypatch.delenv("MINIMOE_ROUNDING", raising=False)
    if value is not None:
        monkeypatch.setenv("MINIMOE_ROUNDING", value)
    assert seed_from_environment() == seed


def test_what_is_no_seed_is_refused(monkeypatch):
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


@pytest.mark.parametrize("seed, counts", [("1", "2 passed"), ("", "1 failed, 1 passed")])
def test_the_suite_is_run_under_it_except_for_what_is_exact(seed, counts, tmp_path):
    (tmp_path / "test_it.py").write_text(SUITE, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "-p", "tests.conftest", tmp_path]
    environment = os.environ | {"MINIMOE_ROUNDING": seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert counts in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("mark", [pytest.mark.exact, pytest.mark.exact()])
def test_a_mark_without_a_reason_is_refused(mark, request):
    request.node.add_marker(mark)
    with pytest.raises(pytest.UsageError, match="wanted a reason"):
        pytest_collection_modifyitems([request.node])
