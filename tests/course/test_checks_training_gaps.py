"""The checks of the gaps of notebooks 04 to 06: right answers of several forms pass, known mistakes get their hint."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from minimoe.course import checks
from minimoe.course.checks import WrongAnswer


def train_on(model, batches, rate, clear=True, step=True, of="cross_entropy", back="loss"):
    optimizer, losses = torch.optim.AdamW(model.parameters(), rate), []
    for ids in batches:
        output = model(ids, labels=ids)
        losses.append(getattr(output, of).detach())
        getattr(output, back).backward()
        if step:
            optimizer.step()
        if clear:  # after the step does as well
            optimizer.zero_grad()
    return losses


def train_with_new_optimizers(model, batches, rate):
    return [train_on(model, [ids], rate)[0] for ids in batches]


def dense_twin(config, experts=None):
    width = (experts or config.num_experts_per_tok) * config.moe_intermediate_size
    return replace(config, num_experts=0, intermediate_size=width)


def loss_without(model, ids, layer, expert, part="gate_proj"):
    """Silent another way: with no gate, nothing comes out."""
    silent = copy.deepcopy(model)
    with torch.no_grad():
        getattr(silent.model.layers[layer].mlp.experts, part)[expert] = 0
        return silent(ids, labels=ids).cross_entropy.item()


def loss_of_the_broken(model, ids, layer, expert):
    with torch.no_grad():
        model.model.layers[layer].mlp.experts.down_proj[expert] = 0
    return model(ids, labels=ids).cross_entropy


def divergence(use, base=2):
    return entropy(np.mean(use, 0), base=base) - np.mean(entropy(use, base=base, axis=1))


RIGHT = {
    "check_train_on": train_on,
    "check_dense_twin": dense_twin,
    "check_effective_experts": lambda weights: np.exp(entropy(weights.numpy(), axis=-1)),
    "check_loss_without": loss_without,
    "check_divergence": divergence,
}
WRONG = [
    ("check_train_on", lambda m, b, r: train_on(m, b, r, clear=False), "earlier batches"),
    ("check_train_on", lambda m, b, r: train_on(m, b, r, step=False), "does not learn"),
    ("check_train_on", lambda m, b, r: train_on(m, b, r, of="loss"), "without the balance loss"),
    ("check_train_on", lambda m, b, r: train_on(m, b, r, back="cross_entropy"), "Not yet"),
    ("check_train_on", train_with_new_optimizers, "once, before the loop"),
    ("check_train_on", lambda m, b, r: None, "returned nothing"),
    ("check_dense_twin", lambda config: config, "dense model"),
    ("check_dense_twin", lambda config: dense_twin(config, config.num_experts), "as wide as all"),
    ("check_dense_twin", lambda config: dense_twin(config, 1), "Not yet"),
    ("check_effective_experts", lambda w: torch.special.entr(w).sum(-1), "exponential"),
    ("check_effective_experts", lambda w: (-w * w.log()).sum(-1).exp(), "0 log 0"),
    ("check_effective_experts", lambda w: torch.xlogy(w, w).sum(-1).exp(), "Not yet"),
    ("check_effective_experts", lambda w: w.sum(), "shape"),
    ("check_loss_without", lambda m, ids, n, e: m(ids, labels=ids).cross_entropy, "Nothing was switched off"),
    ("check_loss_without", lambda m, ids, n, e: loss_without(m, ids, 1 - n, e), "of another layer"),
    ("check_loss_without", loss_of_the_broken, "Change a copy"),
    ("check_divergence", lambda use: divergence(use, base=None), "nats"),
    ("check_divergence", lambda use: -divergence(use), "turned round"),
    ("check_divergence", lambda use: (use * np.log2(use)).sum(), "0 log 0"),
]


@pytest.mark.parametrize("check", RIGHT)
def test_right_answers_are_praised(check):
    assert getattr(checks, check)(RIGHT[check]).startswith("Right")


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_known_mistakes_get_their_hint(check, answer, hint):
    with np.errstate(all="ignore"), pytest.raises(WrongAnswer, match=hint):
        getattr(checks, check)(answer)


def test_the_divergence_of_two_groups_is_the_one_of_scipy():
    use = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    assert divergence(use) == pytest.approx(jensenshannon(*use, base=2) ** 2)
