"""The checks of the gaps in notebooks 01 to 03: right answers of several forms pass, known mistakes get their hint."""

import pytest
import torch
import torch.nn.functional as F

from minimoe.course import checks
from minimoe.course.checks import WrongAnswer


def mlp(x, gate, up, down, silu=F.silu):
    return F.linear(silu(F.linear(x, gate)) * F.linear(x, up), down)


def combine(xs, weights, chosen, experts, shared):
    rows = []
    for x, row, best in zip(xs, weights, chosen, strict=True):  # one token after the other
        total = sum(w * experts[e](x[None])[0] for w, e in zip(row, best, strict=True))
        rows.append(total if shared is None else total + shared(x[None])[0])
    return torch.stack(rows)


def dropped(choices, num_experts, capacity):
    seats, places = [capacity] * num_experts, []
    for place, expert in enumerate(choices):
        seats[expert] -= 1
        if seats[expert] < 0:
            places.append(place)
    return places


def experts_of(scores, seats):
    best = torch.zeros_like(scores).scatter(0, scores.topk(seats, dim=0).indices, 1)
    return best.sum(1)


def balance(logits, indices):
    f = F.one_hot(indices, logits.shape[1]).sum(1).double().mean(0)
    return logits.shape[1] * (f * logits.softmax(1).mean(0)).sum()


def step_time(indices, devices, experts):
    device = indices // (experts // devices)
    return F.one_hot(device.flatten(), devices).double().mean(0).max() * devices


RIGHT = {
    "check_dropped": dropped,
    "check_experts_of": experts_of,
    "check_balance": balance,
    "check_step_time": step_time,
    "check_swiglu": mlp,
    "check_count": lambda h, w, e, k, s: torch.tensor([e * 3 * h * w + 3 * h * s, k * 3 * h * w + 3 * h * s]),
    "check_combine": combine,
}
WRONG = [
    ("check_dropped", lambda c, e, n: sorted(set(range(len(c))) - set(dropped(c, e, n))), "found a seat"),
    ("check_dropped", lambda c, e, n: sorted(len(c) - 1 - t for t in dropped(c[::-1], e, n)), "who come first"),
    ("check_dropped", lambda c, e, n: dropped(c, e, n - 1), "has a seat left"),
    ("check_dropped", lambda c, e, n: dropped(c, e, n + 1), "more than it has seats"),
    ("check_experts_of", lambda s, n: F.one_hot(s.topk(n, 1).indices, s.shape[1]).sum((0, 1)), "each token chooses"),
    ("check_experts_of", lambda s, n: torch.bincount(s.topk(n, 0).indices.flatten()), "are missing at the end"),
    ("check_balance", lambda x, i: balance(x, i) / x.shape[1], "number of experts, is missing"),
    ("check_balance", lambda x, i: balance(x, i) / i.shape[1], "adds up to 1"),
    ("check_balance", lambda x, i: balance(x, i).detach(), "no gradient"),
    ("check_step_time", lambda i, d, e: step_time(i, e, e), "busiest expert"),
    ("check_step_time", lambda i, d, e: step_time(i % d, d, d), "Neighbours share"),
    ("check_step_time", lambda i, d, e: step_time(i, d, e) * i.numel() / d, "a ratio"),
    ("check_swiglu", lambda x, g, u, d: mlp(x, u, g, d), "belongs to that of `gate`"),
    ("check_swiglu", lambda x, g, u, d: mlp(x, g, u, d, silu=lambda y: y), "SiLU is missing"),
    ("check_swiglu", lambda x, g, u, d: mlp(x, g, u, d, silu=torch.sigmoid), "sigmoid"),
    ("check_swiglu", lambda x, g, u, d: None, "returned nothing"),
    ("check_count", lambda h, w, e, k, s: (e * h * w + h * s, k * h * w + h * s), "three matrices"),
    ("check_count", lambda h, w, e, k, s: (3 * h * (e * w + s), 3 * h * k * w), "active for every token"),
    ("check_count", lambda h, w, e, k, s: (3 * h * (k * w + s), 3 * h * (e * w + s)), "Wanted \\(stored, active"),
    ("check_combine", lambda x, w, c, e, s: combine(x, torch.ones_like(w), c, e, s), "without their weights"),
    ("check_combine", lambda x, w, c, e, s: combine(x, w, c, e, None), "shared expert is missing"),
    ("check_combine", lambda x, w, c, e, s: combine(x, w[:, :1], c[:, :1], e, s), "Only the first choice"),
    ("check_combine", lambda x, w, c, e, s: x, "Not yet"),
]


@pytest.mark.parametrize("check", RIGHT)
def test_right_answers_are_praised(check):
    assert getattr(checks, check)(RIGHT[check]).startswith("Right")


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_known_mistakes_get_their_hint(check, answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        getattr(checks, check)(answer)
