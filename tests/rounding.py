"""Another processor, imitated: what torch computes by adding many products is moved by a rounding error.

Processors, thread counts and versions of BLAS add up in different orders, so the last digits of a product differ from
machine to machine. With `MINIMOE_ROUNDING=1` in the environment, or any other integer, which is the seed, every matrix
product, attention and normalisation on a CPU is multiplied elementwise by 1 + e, forwards and backwards, where e is
drawn anew for every call: several times what a reordered sum would show. What holds for a few seeds holds on another
processor; what does not hangs on rounding.

Who reads the variable: `conftest.py`, which leaves out the tests marked `exact`; and the kernels that `run_checks.py`
starts for notebooks, in which this file is an IPython extension. Not reached: products of numpy and scipy, solvers
and decompositions (`torch.linalg.svd`), half precisions, and processes that a test starts.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# The largest |e|, relative to a result: some 17 and 45 times the distance to the next number.
SIZE = {torch.float32: 2e-6, torch.float64: 1e-14}

# By how much a tolerance that float32 just keeps is widened: what is imitated is some 17 times the rounding of float32.
SLACK = 20 if os.environ.get("MINIMOE_ROUNDING") else 1

# What F.linear, @, einsum, F.grouped_mm, attention, norms and their gradients come down to. The first result moves,
# since the others are statistics for the backward pass; of a backward pass all do.
_FORWARD = (
    "mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "addmv", "addmv_", "dot",
    "_scaled_dot_product_flash_attention_for_cpu",
    "native_layer_norm", "rsqrt", "rsqrt_", "linalg_vector_norm",  # an RMS norm is x * rsqrt(mean(x^2))
)  # fmt: skip
_BACKWARD = ("_scaled_dot_product_flash_attention_for_cpu_backward", "native_layer_norm_backward")


def seed_from_environment() -> int | None:
    """The value of MINIMOE_ROUNDING; None where it is missing or empty.

    Raises:
        ValueError: it is not an integer.
    """
    value = os.environ.get("MINIMOE_ROUNDING", "")
    try:
        return int(value) if value else None
    except ValueError:
        raise ValueError(f"MINIMOE_ROUNDING={value!r}: wanted an integer, the seed, or nothing") from None


@contextmanager
def perturbed(seed: int) -> Iterator[None]:
    """Move the results of products while the context is open, in every thread.

    Args:
        seed: of the errors; the same calls in the same order are moved by the same amounts.
    """
    generator = torch.Generator().manual_seed(seed)
    # A kernel for the key BackendSelect runs below autograd and above the device's own, which it calls in turn.
    library = torch.library.Library("aten", "IMPL")
    for name in _FORWARD + _BACKWARD:
        packet = getattr(torch.ops.aten, name)
        for operator in (getattr(packet, overload) for overload in packet.overloads()):
            # One without a kernel for the CPU calls another of these, and would be moved twice.
            if torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CPU"):
                kernel = _moving(operator, generator, moves_all=name in _BACKWARD)
                library.impl(operator, kernel, "BackendSelect", with_keyset=True)
    try:
        yield
    finally:
        library._destroy()


def _moving(operator: torch._ops.OpOverload, generator: torch.Generator, *, moves_all: bool):
    """`operator` with its results moved."""

    def kernel(keys: torch._C.DispatchKeySet, *args, **kwargs):
        results = operator.redispatch(keys.remove(torch._C.DispatchKey.BackendSelect), *args, **kwargs)
        for result in (results if moves_all else results[:1]) if isinstance(results, tuple) else (results,):
            if result is not None and result.device.type == "cpu" and result.dtype in SIZE:
                _move(result, generator)
        return results

    return kernel


def _move(result: Tensor, generator: torch.Generator) -> None:
    noise = torch.rand(result.shape, generator=generator, dtype=result.dtype, device="cpu")
    result.mul_(noise.mul_(2).sub_(1).mul_(SIZE[result.dtype]).add_(1))


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """Equal to `tolerance` times the largest number: a sum that nearly cancels keeps the rounding of its parts."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.detach().abs().max()))


def load_ipython_extension(shell) -> None:
    """Move the products of a notebook, for as long as its kernel runs."""
    shell.rounding = perturbed(seed_from_environment())
    shell.rounding.__enter__()
