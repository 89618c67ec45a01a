"""What every check does with an answer: accept what is right, name a known mistake, else show the first difference."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from numbers import Number

import numpy as np
import torch
from torch import Tensor


class WrongAnswer(AssertionError):
    """An exercise's answer is not right; the message is a hint."""


def judge(
    answer: Callable, tries: Iterable[tuple], right: Callable, mistakes: dict[str, Callable], praise: str, **how: object
) -> str:
    """Compare what a reader's function returns with what a right one returns; if all is right, return the praise.
    Raises what `compare` raises.

    Args:
        answer, right: the two functions; each gets copies of the inputs, and may return numbers of any type.
        tries: the inputs of each call.
        mistakes: for each mistake that readers are known to make, a hint and a function that makes it.
        how: the keywords of `compare`.
    """
    for inputs in tries:
        with np.errstate(all="ignore"):  # who divides by zero gets a hint, not a warning
            found, wanted, *known = (function(*deepcopy(inputs)) for function in (answer, right, *mistakes.values()))
        compare(found, wanted, dict(zip(mistakes, known, strict=True)), **how)
    return praise


def compare(
    found: object,
    wanted: object,
    mistakes: dict[str, object] | None = None,
    *,
    form: Callable[[Tensor], Tensor] = lambda value: value,
    what: str = "your answer",
    atol: float = 1e-5,
    rtol: float = 0.0,
) -> None:
    """Accept numbers of any type that equal the right ones, within `atol` and `rtol` as in `torch.isclose`. Else raise
    WrongAnswer with the hint of the mistake, or with the first number that is wrong.

    Args:
        mistakes: for each hint the wrong numbers that it is about.
        form: brings numbers to a common form where several are right, as in any order; their shape stays.
        what: what is compared, for the message about an unknown mistake.
    """
    mistakes = mistakes or {}
    shape, close = numbers(wanted).shape, partial(torch.isclose, atol=atol, rtol=rtol, equal_nan=True)
    found, wanted, *known = (_in_form(numbers(value), shape, form) for value in (found, wanted, *mistakes.values()))
    if found.shape == wanted.shape and close(found, wanted).all():
        return
    for hint, wrong in zip(mistakes, known, strict=True):
        if found.shape == wrong.shape and close(found, wrong).all():
            raise WrongAnswer(hint)
    if found.shape != wanted.shape:
        raise WrongAnswer(f"The shape of {what} is {tuple(found.shape)}; wanted {tuple(shape) or 'a single number'}.")
    if not wanted.dim():
        raise WrongAnswer(f"Not yet: {what} is {found.item():.4g}; wanted {wanted.item():.4g}.")
    entry = int((~close(found, wanted)).reshape(len(wanted), -1).any(-1).nonzero()[0])
    first, right = (np.round(values[entry].numpy(), 2).tolist() for values in (found, wanted))
    raise WrongAnswer(f"Not yet: entry {entry} of {what} is {first}; wanted {right}.")


def numbers(returned: object) -> Tensor:
    """What the reader's function returned, as a tensor of float64."""
    if returned is None:
        raise WrongAnswer("The function returned nothing. Does it end with `return ...`?")
    try:
        returned = float(returned) if isinstance(returned, Number) else returned  # a fraction, too
        if isinstance(returned, list | tuple) and returned and all(isinstance(row, Tensor) for row in returned):
            returned = torch.stack(tuple(returned))
        return torch.as_tensor(returned).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongAnswer(f"The function returned {type(returned).__name__}; wanted a tensor of numbers.") from error


def loss_of(answer: Callable, *inputs: object) -> Tensor:
    """The single number that the reader's function returns, as a tensor that a gradient can start from."""
    loss = answer(*(value.clone() if isinstance(value, Tensor) else value for value in inputs))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise WrongAnswer(
            f"The function returned {type(loss).__name__}; wanted a tensor with one number, which `backward` can "
            "start from: no `.item()`, `.tolist()` or `.numpy()` on the way."
        )
    return loss.reshape(())


def gradient(value: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The gradient on all inputs in one row; 0 where there is none."""
    if not value.requires_grad:
        return torch.zeros(sum(x.numel() for x in inputs))
    gradients = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([one.flatten() for one in gradients])


@contextmanager
def seeded() -> Iterator[None]:
    """The same random numbers at each check, and the reader's own stream as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random logits, the same at each check."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + shape[-1]))


def _in_form(value: Tensor, shape: torch.Size, form: Callable[[Tensor], Tensor]) -> Tensor:
    """Where a single number is wanted, a row of one will do. What has another shape stays as it is."""
    value = value.reshape(()) if not shape and value.numel() == 1 else value
    return form(value) if value.shape == shape else value
