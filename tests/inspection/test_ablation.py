"""Ablation against a model whose expert returns zero, and what it leaves behind."""

from itertools import product

import numpy as np
import pytest
import torch

from minimoe.inspection import ablation
from minimoe.model import MoEConfig, MoEForCausalLM
from tests.inspection.traces import close


def tiny_model(**changes):
    shape = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "initializer_range": 0.5}
    return MoEForCausalLM(MoEConfig(**(shape | settings | changes)))


def make_batches(domains=((0, 1, 0), (1, 1, -1)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(12, (len(row), 10), generator=generator), torch.tensor(row)) for row in domains]


def test_ablation_is_the_loss_of_a_model_whose_expert_returns_zero():
    """The same thing done to the weights: an expert with a zero down projection adds nothing."""
    model, batches = tiny_model(), make_batches()
    found = ablation.ablate(model, batches, ("a", "b"))

    def losses():
        return [
            [
                float(model(row[None], labels=row[None]).cross_entropy)
                for ids, domains in batches
                for row, domain in zip(ids, domains, strict=True)
                if domain == wanted
            ]
            for wanted in (0, 1)
        ]

    with torch.no_grad():
        intact = losses()
        for layer, expert in product(range(2), range(3)):
            down = model.model.layers[layer].mlp.experts.down_proj
            kept = down[expert].clone()
            down[expert] = 0
            for domain, (before, after) in enumerate(zip(intact, losses(), strict=True)):
                assert found.value[layer, expert, domain] == pytest.approx(np.mean(after) - np.mean(before), abs=1e-4)
            down[expert] = kept
    assert found.value.shape == (2, 3, 2) and (abs(found.value) > 1e-3).all()
    close(found.null, np.broadcast_to(found.value.mean(1, keepdims=True), found.null.shape))
    assert (found.low <= found.value).all() and (found.value <= found.high).all()


def test_slots_of_a_removed_expert_are_empty_and_the_others_as_before():
    """Not renormalised, and no expert takes the place."""
    gate = tiny_model().model.layers[0].mlp.gate
    x = torch.randn(30, 16)
    before = gate(x, None)
    with ablation._without(gate, 1):
        during = gate(x, None)
    removed = before.indices == 1
    assert removed.any()
    torch.testing.assert_close(during.indices, before.indices.where(~removed, 3))
    torch.testing.assert_close(during.weights, before.weights * ~removed)
    torch.testing.assert_close(gate(x, None), before)


def test_ablation_leaves_the_model_as_it_was():
    model, batches = tiny_model(router="noisy_topk"), make_batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for training in (True, False):
        ablation.ablate(model.train(training), batches, ("a", "b"))
        assert model.training == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_ablation_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model().train()
    calls = []

    def fail(logits, ids):
        calls.append(ids)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return logits.mean((1, 2))

    monkeypatch.setattr(ablation, "_losses", fail)
    with pytest.raises(KeyboardInterrupt):
        ablation.ablate(model, make_batches(), ("a", "b"))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "settings",
    [
        {"router": "hash"},  # leaves some experts without a token
        {"router": "expert_choice", "capacity_factor": 0.4},
        {"router": "grouped", "n_group": 2, "shared_expert_intermediate_size": 6},
    ],
    ids=lambda settings: settings["router"],
)
def test_an_expert_that_nobody_chooses_costs_nothing(settings):
    model = tiny_model(**settings | {"num_experts": 6}).eval()
    batches = make_batches()
    found = ablation.ablate(model, batches, ("a", "b"))
    used = np.zeros((2, 6), dtype=bool)
    for ids, _ in batches:
        for layer, output in enumerate(model(ids, output_router_logits=True).router_outputs):
            used[layer, output.indices[output.indices < 6].unique()] = True
    close(found.value[~used], 0)
    assert (found.value[used] != 0).any()


def test_a_domain_of_one_sequence_has_no_interval():
    found = ablation.ablate(tiny_model(), make_batches(((0, 1, 1),)), ("a", "b"))
    assert np.isnan(found.low[..., 0]).all() and np.isfinite(found.low[..., 1]).all()


def test_ablation_says_what_is_missing():
    model, dense = tiny_model(), tiny_model(num_experts=0, intermediate_size=8)
    for one, batches, names, message in [
        (dense, make_batches(), ("a", "b"), "num_experts=0"),
        (model, make_batches(), ("a", "b", "c"), "domain 'c' has no sequence"),
        (model, [], ("a",), "domain 'a' has no sequence"),
        (model, make_batches(), ("a",), "domain 1: wanted less than 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ablation.ablate(one, batches, names)
