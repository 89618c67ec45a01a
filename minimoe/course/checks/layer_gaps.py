"""The checks of the gaps inside the notebooks 01 to 03 that no exercise has: a layer, its routers, their balance.

Shapes: T tokens, H hidden size, I width of an MLP, E experts, K experts per token.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.course.checks.answers import judge, loss_of, normal
from minimoe.course.checks.mixture import check_balance_per_layer

Function = Callable[[Tensor], Tensor]


def check_swiglu(answer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    """Check `mlp(x, gate, up, down)`: x [H] or [T, H] through gate and up [I, H], SwiGLU, and down [H, I]."""

    def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, inner: Callable = lambda g, u: F.silu(g) * u) -> Tensor:
        return inner(x @ gate.T, x @ up.T) @ down.T

    tries = [(x, normal(6, 4, seed=1), normal(6, 4, seed=2), normal(4, 6, seed=3)) for x in (normal(4), normal(5, 4))]
    mistakes = {
        "SiLU went to the result of `up`. It belongs to that of `gate`.": lambda g, u: g * F.silu(u),
        "SiLU is missing. Without it `gate` opens nothing.": lambda g, u: g * u,
        "This is the sigmoid. SiLU is x times its sigmoid: `F.silu`.": lambda g, u: g.sigmoid() * u,
        "The two results are to be multiplied, number by number, not added.": lambda g, u: F.silu(g) + u,
    }
    known = {hint: lambda *inputs, inner=inner: mlp(*inputs, inner=inner) for hint, inner in mistakes.items()}
    return judge(answer, tries, mlp, known, "Right: widened twice, multiplied, made narrow again.", atol=1e-4)


def check_count(answer: Callable[[int, int, int, int, int], Sequence[int]]) -> str:
    """Check `count_weights(hidden_size, width, experts, k, shared_width)`: the weights (stored, active) of the MLPs of
    a layer with E routed experts, of which k are active, and a shared expert; 0 where there is none."""
    mistakes = {
        "Each MLP has three matrices: gate, up and down.": lambda h, w, e, k, s: (e * h * w + h * s, k * h * w + h * s),
        "The shared expert is active for every token, too.": lambda h, w, e, k, s: (3 * h * (e * w + s), 3 * h * k * w),
        "The shared expert is missing.": lambda h, w, e, k, s: (3 * h * e * w, 3 * h * k * w),
        "This is (active, stored). Wanted (stored, active).": (
            lambda h, w, e, k, s: (3 * h * (k * w + s), 3 * h * (e * w + s))
        ),
    }
    tries, praise = [(4, 6, 8, 2, 0), (4, 6, 8, 2, 10)], "Right: all are stored, k and the shared one are active."
    return judge(answer, tries, lambda h, w, e, k, s: (3 * h * (e * w + s), 3 * h * (k * w + s)), mistakes, praise)


def check_combine(answer: Callable[[Tensor, Tensor, Tensor, Sequence[Function], Function | None], Tensor]) -> str:
    """Check `combine(xs, weights, chosen, experts, shared)`: for each row of xs [T, H] the sum of what its chosen
    experts [T, K] give times their weights [T, K], and what the shared expert gives, which may be None."""

    def right(x: Tensor, weights: Tensor, chosen: Tensor, experts: Sequence, shared: Function | None) -> Tensor:
        outputs = torch.stack([expert(x) for expert in experts], 1)
        outputs = outputs.gather(1, chosen[..., None].expand(-1, -1, x.shape[1]))
        return (weights[..., None] * outputs).sum(1) + (shared(x) if shared else 0)

    experts = [lambda x, n=n: (n + 1) * x.roll(n, -1) for n in range(4)]
    routed = (normal(6, 5), *normal(6, 4, seed=1).softmax(-1).topk(2), experts)
    mistakes = {
        "The outputs are added without their weights.": lambda x, w, *rest: right(x, torch.ones_like(w), *rest),
        "The shared expert is missing. Every token goes through it, with weight 1.": lambda *x: right(*x[:4], None),
        "Only the first choice counts here. Add up all K of them.": lambda x, w, c, *rest: right(
            x, w[:, :1], c[:, :1], *rest
        ),
    }
    tries = [(*routed, None), (*routed, lambda x: x.square())]
    return judge(answer, tries, right, mistakes, "Right: every token gets its own sum.", atol=1e-4)


def check_dropped(answer: Callable[[list[int], int, int], Sequence[int]]) -> str:
    """Check `dropped(choices, num_experts, capacity)`: the places of the tokens that find the expert of their choice
    full, where each has as many seats and gives them in the order of the text."""

    def places(choices: list[int], experts: int, capacity: int, pick: Callable = lambda of, c: of[c:]) -> list[int]:
        of_each = [[place for place, expert in enumerate(choices) if expert == e] for e in range(experts)]
        return sorted(place for of in of_each for place in pick(of, capacity))

    tries = [(normal(40, 4).argmax(1).tolist(), 4, 6), ([1, 1, 0, 1, 3, 1, 1], 4, 2)]
    mistakes = {
        "These tokens found a seat. Wanted those that did not.": lambda of, c: of[:c],
        "The first ones are dropped here. Seats go to those who come first.": lambda of, c: of[: max(0, len(of) - c)],
        "An expert drops a token while it has a seat left.": lambda of, c: of[c - 1 :],
        "An expert takes one token more than it has seats.": lambda of, c: of[c + 1 :],
    }
    known = {hint: lambda *inputs, pick=pick: places(*inputs, pick) for hint, pick in mistakes.items()}
    return judge(answer, tries, places, known, "Right: first come, first served.")


def check_experts_of(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Check `experts_of(scores, seats)`: of each token the number of experts that take it, [T], where each expert takes
    the `seats` tokens with the highest scores [T, E] for it (Zhou et al. 2022, arXiv 2202.09368)."""

    def counts(scores: Tensor, seats: int, dim: int = 0, bins: int = 0) -> Tensor:
        return torch.bincount(scores.topk(seats, dim).indices.flatten(), minlength=bins or len(scores))

    mistakes = {
        "Here each token chooses experts. Let each expert choose tokens: the best of a column.": (
            lambda scores, seats: counts(scores, seats, 1, scores.shape[1])
        ),
        "Tokens that no expert takes are missing at the end; their number is 0.": lambda *x: counts(*x, bins=1),
    }
    scores = normal(8, 4)
    scores[-2:] -= 9  # tokens that nobody takes
    tries = [(scores, 3), (normal(12, 6), 4)]
    return judge(answer, tries, counts, mistakes, "Right: the experts choose, and some tokens are left over.")


def check_balance(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Check `balance_loss(logits, indices)` of one layer: E * sum_i f_i P_i of logits [T, E] and choices [T, K], a
    tensor through which P, and only P, receives a gradient."""

    def of_layers(logits: Tensor, indices: Tensor) -> Tensor:
        return torch.stack([loss_of(answer, *layer) for layer in zip(logits, indices, strict=True)]).mean()

    check_balance_per_layer(of_layers)
    return "Right: the value, and its gradient."


def check_step_time(answer: Callable[[Tensor, int, int], float]) -> str:
    """Check `step_time(indices, devices, experts)`: the work of the busiest device over the mean, where choices [T, K]
    are worked off and neighbouring experts lie on one device, as many on each."""

    def time(indices: Tensor, devices: int, experts: int) -> float:
        work = torch.bincount(indices.flatten(), minlength=experts).view(devices, -1).sum(1)
        return (work.max() / work.double().mean()).item()

    mistakes = {
        "This is the busiest expert, not the busiest device.": lambda indices, devices, experts: time(
            indices, experts, experts
        ),
        "Here every second expert or so lies on one device. Neighbours share one: 0 and 1, ...": (
            lambda indices, devices, experts: time(indices % devices, devices, devices)
        ),
        "Wanted a ratio: the busiest device's work divided by the mean.": (
            lambda indices, devices, experts: time(indices, devices, experts) * indices.numel() / devices
        ),
    }
    tries = [(normal(20, 12).topk(3).indices, 4, 12), (normal(9, 8).topk(2).indices % 5, 4, 8)]
    return judge(answer, tries, time, mistakes, "Right: 1 in perfect balance, and all wait for the busiest device.")
