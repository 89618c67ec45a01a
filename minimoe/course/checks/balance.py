"""The checks of the exercises on load balance (notebook 03)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.course.checks.answers import Mistakes, WrongAnswer, compare, numbers
from minimoe.model.balance import update_bias


def check_balance_per_layer(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Check `balance_loss(logits, indices)`: from the logits [L, T, E] and the choices [L, T, K] of L layers, the mean
    over layers of E * sum_i f_i P_i, as a tensor through which P, and only P, receives a gradient.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "You averaged f and P over the layers first. Two layers that collapsed in opposite ways then look balanced: "
        "take a loss for each layer, and average the losses.": lambda *given: _loss(*given, pooled=True),
        "The factor E is missing: without it, the balanced value depends on the number of experts.": (
            lambda logits, indices: _loss(logits, indices) / logits.shape[-1]
        ),
        "Your f adds up to 1, not to K: divide the counts by the number of tokens, not by the number of choices.": (
            lambda logits, indices: _loss(logits, indices) / indices.shape[-1]
        ),
        "Your P no longer adds up to 1; wanted the mean of all probabilities.": (
            lambda logits, indices: _loss(logits, indices, probability=_masked(logits, indices))
        ),
        "Your P is the probability after the choice, scaled to 1 again. An expert that nobody chooses then never gets "
        "a gradient that would help it. Take the softmax over all experts.": (
            lambda logits, indices: _loss(logits, indices, probability=_rescaled(logits, indices))
        ),
        "Your f is made of weights. It counts: a token that chose an expert adds 1, however much it likes it.": (
            lambda logits, indices: _loss(logits, indices, chosen=_masked(logits, indices))
        ),
        "Your f is made of weights that add up to 1. It counts: a token that chose an expert adds 1 to it.": (
            lambda logits, indices: _loss(logits, indices, chosen=_rescaled(logits, indices))
        ),
        "You chose again, the top of the logits. Count the choices that you were given: a bias may be behind them.": (
            lambda logits, indices: _loss(logits, logits.topk(indices.shape[-1]).indices)
        ),
        "You counted first choices only. All K experts of a token have to work for it.": (
            lambda logits, indices: _loss(logits, indices[..., :1])
        ),
        "You added up the losses of the layers. Take their mean.": (
            lambda logits, indices: _loss(logits, indices) * len(logits)
        ),
        "You took the softmax down the tokens. It is the experts that compete: use the last dimension.": (
            lambda logits, indices: _loss(logits, indices, probability=logits.softmax(-2))
        ),
    }
    for layers, tokens, experts, k in ((2, 6, 4, 2), (3, 40, 8, 3)):
        logits = 2 * torch.randn(layers, tokens, experts, generator=torch.Generator().manual_seed(experts))
        logits[..., -1] -= 9  # nobody meets the last expert, and it still has a probability
        bias = torch.linspace(-2, 2, experts).roll(1)  # so the choices are not the top of the logits
        inputs = (logits, (logits + bias).topk(k).indices)
        compare(numbers(answer, *inputs), _loss(*inputs), mistakes, inputs)
        _check_gradient(answer, *inputs)
    return "Right: the loss is K when the load is balanced, and a gradient pulls busy experts down and idle ones up."


def _loss(
    logits: Tensor,
    indices: Tensor,
    *,
    chosen: Tensor | None = None,
    probability: Tensor | None = None,
    pooled: bool = False,
) -> Tensor:
    """The balance loss, or what it becomes with another f, another P or another average."""
    experts = logits.shape[-1]
    f = (F.one_hot(indices, experts).sum(-2).to(logits.dtype) if chosen is None else chosen).mean(-2)
    mean_probability = (logits.softmax(-1) if probability is None else probability).mean(-2)
    if pooled:
        f, mean_probability = f.mean(0), mean_probability.mean(0)
    return experts * (f * mean_probability).sum(-1).mean()


def _masked(logits: Tensor, indices: Tensor) -> Tensor:
    return logits.softmax(-1) * F.one_hot(indices, logits.shape[-1]).sum(-2)


def _rescaled(logits: Tensor, indices: Tensor) -> Tensor:
    masked = _masked(logits, indices)
    return masked / masked.sum(-1, keepdim=True)


def _check_gradient(answer: Callable, logits: Tensor, indices: Tensor) -> None:
    wanted_at = logits.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(_loss(wanted_at, indices), wanted_at)
    found_at = logits.clone().requires_grad_()
    try:
        found = answer(found_at, indices.clone())
        (gradient,) = torch.autograd.grad(found.sum(), found_at)
    except (
        AttributeError,
        TypeError,
        RuntimeError,
    ) as error:  # a number, an array, or a tensor cut off from the logits
        raise WrongAnswer(
            "The value is right, but no gradient comes back to the logits, so the loss would train nothing. Stay with "
            "tensors: no `.item()`, `.tolist()`, `.numpy()` or `.detach()` on the way from the logits."
        ) from error
    if not torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-6):
        raise WrongAnswer(
            "The value is right, but not its gradient: P is a mean of softmax probabilities, f is constant."
        )


def check_bias_update(answer: Callable[[Tensor, Tensor, float], Tensor]) -> str:
    """Check `new_bias(bias, load, rate)`: the selection bias [E] after one step of Wang et al. 2024 (arXiv 2408.15664):
    `rate` more for experts with less than the mean load, `rate` less for those with more. The same number added to all
    experts changes no choice, so it is right with it and without.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes: Mistakes = {
        "The wrong way round: busy experts went up. Raise those that have too little to do.": (
            lambda bias, load, rate: bias - _step(load, rate)
        ),
        "Your step grows with the distance from the mean. This rule takes a step of the same size, `rate`, whatever "
        "the distance: only the sign counts.": lambda bias, load, rate: bias + rate * (load.mean() - load),
        "Your step grows with the distance from the mean, as a share of it. Here only the sign counts.": (
            lambda bias, load, rate: bias + rate * (load.mean() - load) / load.mean()
        ),
        "You returned the step, not the new bias: add it to the old one.": lambda bias, load, rate: _step(load, rate),
        "You compared with the median. An expert is busy when it has more than the mean.": (
            lambda bias, load, rate: bias + rate * torch.sign(load.median() - load)
        ),
        "Only the busiest expert moved. Every expert that is not at the mean takes a step.": (
            lambda bias, load, rate: bias - rate * (load == load.max())
        ),
        "Only the idlest expert moved. Every expert that is not at the mean takes a step.": (
            lambda bias, load, rate: bias + rate * (load == load.min())
        ),
    }
    for load in ([10, 0, 2, 4, 4], [1, 2, 3, 30, 6, 6, 0, 16]):
        counts = torch.tensor(load, dtype=torch.float32)
        bias = torch.linspace(-0.02, 0.03, len(load))
        wanted = bias.clone()
        update_bias(wanted, counts, rate=0.01)
        inputs = (bias, counts, 0.01)
        found = numbers(answer, *inputs)
        if found.shape != wanted.shape:
            raise WrongAnswer(f"Your answer has shape {tuple(found.shape)}; wanted {tuple(wanted.shape)}.")
        compare(_centred(found), _centred(wanted), {h: _centred_result(wrong) for h, wrong in mistakes.items()}, inputs)
    return "Right: idle experts move up, busy ones down, all by the same step."


def _step(load: Tensor, rate: float) -> Tensor:
    return rate * torch.sign(load.mean() - load)


def _centred(bias: Tensor) -> Tensor:
    return bias - bias.mean()


def _centred_result(wrong: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: _centred(wrong(*inputs))
