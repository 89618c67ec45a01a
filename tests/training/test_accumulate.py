"""Gradient accumulation against one backward pass of the whole batch."""

import pytest
import torch
from torch import Tensor

from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.model.balance import expert_load
from minimoe.training import accumulate_gradients

IDS = torch.randint(20, (6, 9), generator=torch.Generator().manual_seed(0))
LENGTHS = (9, 4, 7, 2, 9, 5)  # so that micro-batches hold different numbers of tokens
MASK = (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).long()
LABELS = IDS.masked_fill(torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.2, -100)


def build(**settings) -> MoEForCausalLM:
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "num_experts": 6}
    sizes |= {"intermediate_size": 10, "initializer_range": 0.5, "mlp_only_layers": (1,)}
    config = MoEConfig(**sizes | {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25} | settings)
    return MoEForCausalLM(config).double()


def cut(pieces: int, **batch: Tensor) -> list[dict[str, Tensor]]:
    parts = {name: tensor.split(6 // pieces) for name, tensor in batch.items()}
    return [{name: parts[name][i] for name in parts} for i in range(pieces)]


SETTINGS = {
    "over the batch": {},
    "in each sequence": {"seq_aux": True},
    "no balance loss": {"router_aux_loss_coef": 0.0},
    "grouped": {"router": "grouped", "n_group": 2},
    "bias": {"score_func": "sigmoid", "e_score_correction_bias": True},
    "dense": {"num_experts": 0},
    "no sparse layer": {"mlp_only_layers": (0, 1, 2)},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_gradient_is_that_of_the_whole_batch(settings):
    unbalanced = settings in [SETTINGS[name] for name in ("no balance loss", "dense", "no sparse layer")]
    for padding in ({}, {"attention_mask": MASK}):
        batch = {"input_ids": IDS, "labels": LABELS} | padding
        whole = build(**settings)
        output = whole(**batch, output_router_logits=True)
        output.loss.backward()
        for pieces in (1, 2, 3, 6):
            model = build(**settings)
            found = accumulate_gradients(model, cut(pieces, **batch))
            assert found.aux_loss is not None or unbalanced
            for name in ["loss", "cross_entropy"] + ["aux_loss"] * (found.aux_loss is not None):
                torch.testing.assert_close(getattr(found, name), getattr(output, name).detach())
            assert [load.tolist() for load in found.load] == [
                expert_load(chosen.indices, 6).tolist() for chosen in output.router_outputs
            ]
            for (name, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
                assert float((parameter.grad - other.grad).abs().max()) < 1e-11, (name, pieces, bool(padding))


def test_the_mean_of_micro_batches_is_another_gradient():
    """What is commonly done: it would not pass the test above."""
    whole, model = build(), build()
    whole(IDS, labels=IDS).loss.backward()
    for part in IDS.split(2):
        (model(part, labels=part).loss / 3).backward()
    router, wanted = (m.model.layers[0].mlp.gate.weight.grad for m in (model, whole))
    assert float((router - wanted).abs().max() / wanted.abs().max()) > 1e-2


def test_it_adds_to_the_gradients_that_are_there():
    model, twice = build(), build()
    accumulate_gradients(model, cut(2, input_ids=IDS, labels=IDS))
    for _ in range(2):
        accumulate_gradients(twice, cut(2, input_ids=IDS, labels=IDS))
    for parameter, other in zip(model.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(other.grad, 2 * parameter.grad)


def test_noise_is_the_same_when_experts_are_counted_and_when_they_learn():
    model = build(router="noisy_topk")
    chosen: list[Tensor] = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda experts, args: chosen.append(args[1]))
    accumulate_gradients(model, cut(2, input_ids=IDS, labels=IDS))
    counted, learnt = chosen[:2], chosen[2:]
    assert all(map(torch.equal, counted, learnt))


def test_in_evaluation_mode_router_losses_do_not_count():
    model = build().eval()
    found = accumulate_gradients(model, cut(3, input_ids=IDS, labels=IDS))
    assert found.loss.item() == found.cross_entropy.item()


def test_nothing_to_accumulate():
    with pytest.raises(ValueError, match="labels are -100 or padding everywhere: wanted at least one to score in some"):
        accumulate_gradients(build(), cut(2, input_ids=IDS, labels=torch.full_like(IDS, -100)))
    with pytest.raises(ValueError, match="micro_batches is empty: wanted at least one"):
        accumulate_gradients(build(), [])
