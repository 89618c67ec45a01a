"""The checks of notebook 03 accept every right answer and name each known mistake."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minimoe.course.checks import WrongAnswer, check_balance_per_layer, check_bias_update
from minimoe.model import RouterOutput
from minimoe.model.balance import load_balancing_loss


def by_one_hot(logits, indices):
    f = F.one_hot(indices, logits.shape[-1]).sum(2).float().mean(1)
    return logits.shape[-1] * (f * logits.softmax(-1).mean(1)).sum(-1).mean()


def by_package(logits, indices):
    return load_balancing_loss([RouterOutput(x, x, x, chosen) for x, chosen in zip(logits, indices, strict=True)])


def by_loops(logits, indices):
    layers, tokens, experts = logits.shape
    total = 0.0
    for x, chosen in zip(logits, indices, strict=True):
        p = x.exp() / x.exp().sum(1, keepdim=True)
        for e in range(experts):
            total = total + experts * (chosen == e).sum() / tokens * p[:, e].mean()
    return total / layers


def of_one_entry(logits, indices):
    return by_one_hot(logits, indices)[None]


def probabilities(logits, indices, scaled):
    kept = logits.softmax(-1) * F.one_hot(indices, logits.shape[-1]).sum(2)
    return kept / kept.sum(-1, keepdim=True) if scaled else kept


def masked_p(logits, indices, scaled=False):
    f = F.one_hot(indices, logits.shape[-1]).sum(2).float().mean(1)
    return logits.shape[-1] * (f * probabilities(logits, indices, scaled).mean(1)).sum(-1).mean()


def weights_for_f(logits, indices, scaled=False):
    f = probabilities(logits, indices, scaled).mean(1)
    return logits.shape[-1] * (f * logits.softmax(-1).mean(1)).sum(-1).mean()


def pooled(logits, indices):
    return by_one_hot(logits.flatten(0, 1)[None], indices.flatten(0, 1)[None])


def f_with_gradient(logits, indices):
    """The right value, but f follows the logits too."""
    p = logits.softmax(-1)
    f = F.one_hot(indices, logits.shape[-1]).sum(2) + p - p.detach()
    return logits.shape[-1] * (f.mean(1) * p.mean(1)).sum(-1).mean()


@pytest.mark.parametrize("answer", [by_one_hot, by_package, by_loops, of_one_entry])
def test_a_right_balance_loss_is_accepted(answer):
    assert check_balance_per_layer(answer).startswith("Right")


WRONG_LOSSES = [
    (pooled, "opposite ways"),
    (masked_p, "no longer adds up to 1"),
    (lambda x, i: by_one_hot(x, x.topk(i.shape[-1]).indices), "You chose again"),
    (lambda x, i: masked_p(x, i, scaled=True), "scaled to 1 again"),
    (weights_for_f, "made of weights. It counts"),
    (lambda x, i: weights_for_f(x, i, scaled=True), "weights that add up to 1"),
    (lambda x, i: by_one_hot(x, i) / x.shape[-1], "factor E is missing"),
    (lambda x, i: by_one_hot(x, i) / i.shape[-1], "adds up to 1, not to K"),
    (lambda x, i: by_one_hot(x, i[..., :1]), "first choices only"),
    (lambda x, i: by_one_hot(x, i) * len(x), "Take their mean"),
    (lambda x, i: by_one_hot(x.softmax(1).log(), i), None),
    (
        lambda x, i: (
            x.shape[-1] * (F.one_hot(i, x.shape[-1]).sum(2).float().mean(1) * x.softmax(1).mean(1)).sum(-1).mean()
        ),
        "down the tokens",
    ),
    (lambda x, i: by_one_hot(x, i) + 1, r"Not yet\. Your answer is \d\.\d+; wanted \d\.\d+\."),
    (lambda x, i: x.softmax(-1), "single number"),
    (lambda x, i: None, "returned nothing"),
    (lambda x, i: "balanced", "wanted a tensor"),
    (lambda x, i: by_one_hot(x, i).item(), "no gradient"),
    (lambda x, i: by_one_hot(x, i).detach(), "no gradient"),
    (lambda x, i: np.asarray(by_one_hot(x.detach(), i)), "no gradient"),
    (f_with_gradient, "not its gradient"),
]


@pytest.mark.parametrize(("answer", "hint"), WRONG_LOSSES)
def test_a_wrong_balance_loss_is_rejected_with_a_hint(answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check_balance_per_layer(answer)


def centred(bias, load, rate):
    step = rate * torch.sign(load.mean() - load)
    return bias + step - step.mean()


def by_comparison(bias, load, rate):
    mean = sum(load.tolist()) / len(load)
    return [b + rate * ((n < mean) - (n > mean)) for b, n in zip(bias.tolist(), load.tolist(), strict=True)]


def in_place(bias, load, rate):
    bias += rate * (load.mean() - load).sign()
    return bias


@pytest.mark.parametrize("answer", [centred, by_comparison, in_place])
def test_a_right_bias_update_is_accepted(answer):
    assert check_bias_update(answer).startswith("Right")


WRONG_UPDATES = [
    (lambda b, n, r: b + r * (n - n.mean()).sign(), "wrong way round"),
    (lambda b, n, r: b + r * (n.mean() - n), "of the same size"),
    (lambda b, n, r: b + r * (1 - n / n.mean()), "as a share"),
    (lambda b, n, r: r * (n.mean() - n).sign(), "add it to the old one"),
    (lambda b, n, r: b + r * (n.median() - n).sign(), "median"),
    (lambda b, n, r: b - r * F.one_hot(n.argmax(), len(n)), "Only the busiest"),
    (lambda b, n, r: b + r * F.one_hot(n.argmin(), len(n)), "Only the idlest"),
    (lambda b, n, r: b, "Not yet"),
    (lambda b, n, r: 0.0, "shape"),
    (lambda b, n, r: None, "returned nothing"),
]


@pytest.mark.parametrize(("answer", "hint"), WRONG_UPDATES)
def test_a_wrong_bias_update_is_rejected_with_a_hint(answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check_bias_update(answer)
