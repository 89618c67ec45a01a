"""What every check does with an answer: accept what is right, name a known mistake, else show the first difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Number

import torch
from torch import Tensor


class WrongAnswer(AssertionError):
    """An exercise's answer is not right; the message is a hint."""


Mistakes = dict[str, Callable[..., Tensor]]  # a hint, and a function that makes the mistake it is about


def numbers(answer: Callable, *inputs: object) -> Tensor:
    """What the reader's function returns, as a tensor of float64."""
    found = answer(*(value.clone() if isinstance(value, Tensor) else value for value in inputs))
    if found is None:
        raise WrongAnswer("The function returned nothing. Does it end with `return ...`?")
    try:
        found = float(found) if isinstance(found, Number) else found  # a fraction, too
        rows = isinstance(found, list | tuple) and found and all(isinstance(row, Tensor) for row in found)
        return (torch.stack(tuple(found)) if rows else torch.as_tensor(found)).detach().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongAnswer(f"The function returned {type(found).__name__}; wanted a tensor of numbers.") from error


def compare(found: Tensor, wanted: Tensor, mistakes: Mistakes, inputs: tuple) -> None:
    """Accept what equals `wanted`; else name the mistake, if it is one that we know. Where a single number is wanted
    (a tensor without dimensions), an array or tensor with one entry will do."""
    if not wanted.dim() and found.numel() == 1:
        found = found.reshape(())
    if _equal(found, wanted):
        return
    for hint, wrong in mistakes.items():
        if _equal(found, wrong(*inputs)):
            raise WrongAnswer(hint)
    if found.shape != wanted.shape:
        shape = tuple(wanted.shape) if wanted.dim() else "a single number"
        raise WrongAnswer(f"Your answer has shape {tuple(found.shape)}; wanted {shape}.")
    if not wanted.dim():
        raise WrongAnswer(f"Not yet. Your answer is {found.item():.4g}; wanted {wanted.item():.4g}.")
    right = torch.isclose(found, wanted.double(), rtol=0, atol=1e-5).reshape(len(wanted), -1).all(-1)
    entry = int((~right).nonzero()[0])
    raise WrongAnswer(
        f"Not yet. Entry {entry} of your answer is {_short(found[entry])}; wanted {_short(wanted[entry])}."
    )


@contextmanager
def seeded() -> Iterator[None]:
    """The same random numbers at each check, and the reader's own stream as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _equal(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and torch.allclose(found, wanted.double(), rtol=0, atol=1e-5)


def _short(values: Tensor) -> list | float:
    return [round(value, 2) for value in values.tolist()] if values.dim() else round(values.item(), 2)
