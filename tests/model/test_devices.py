"""Models on other devices and in other precisions, as far as a CPU can tell.

"meta" stands in for a device that is not the CPU: an operation that mixes the two fails, as it would on a GPU. What a
device without float64 would refuse (Apple's MPS) is found by looking at every operation.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimoe.inspection import record_routing
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.model.balance import max_violation, update_bias
from minimoe.model.moe import Router
from minimoe.training.accumulate import accumulate_gradients
from tests.rounding import assert_near

SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
DEEPSEEK = {"score_func": "sigmoid", "e_score_correction_bias": True, "num_experts": 6}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
# The routers that differ in what they hold and in what they do; the others are variants of these.
FOUR_ROUTERS = pytest.mark.parametrize(
    "router_settings", ["sigmoid and bias in groups", "noisy", "expert choice", "grouped"], indirect=True
)


def build(**settings) -> MoEForCausalLM:
    config = MoEConfig(**SIZES | {"num_experts": 6, "initializer_range": 0.5} | settings)
    return MoEForCausalLM(config, seed=3)


# Building.


@FOUR_ROUTERS
def test_built_on_meta_and_initialised_in_one_call(router_settings):
    wanted = build(**router_settings, tie_word_embeddings=False)
    with torch.device("meta"):
        model = build(**router_settings, tie_word_embeddings=False)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)
    model.init_weights(seed=3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted.state_dict()[name]), name
    assert_near(model.eval()(IDS).logits, wanted.eval()(IDS).logits)


@pytest.mark.parametrize("implementation", ["sorted", "grouped"])
def test_shapes_can_be_inferred_on_meta(implementation):
    with torch.device("meta"):
        model = build(experts_implementation=implementation).bfloat16()
        output = model(IDS.to("meta"), MASK.to("meta"), labels=IDS.to("meta"), output_router_logits=True)
    assert output.logits.shape == (2, 5, 20) and output.loss.is_meta


@pytest.fixture
def another_default_device():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("another_default_device")
@FOUR_ROUTERS
def test_a_model_on_the_cpu_under_another_default_device(router_settings):
    """Whatever it makes on the way lies beside its weights, not where the default says."""
    with torch.device("cpu"):
        model, ids, mask = build(**router_settings, router_z_loss_coef=0.1), IDS.clone(), MASK.clone()
    accumulate_gradients(model, [{"input_ids": ids, "labels": ids, "attention_mask": mask}] * 2)
    assert all(p.grad is None or p.grad.device.type == "cpu" for p in model.parameters())
    with record_routing(model) as trace:
        for settings in ({}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "eos_token_id": 3, "attention_mask": mask}):
            assert model.generate(ids, 3, **settings).device.type == "cpu"
    assert len(trace) > 0
    assert model.init_weights() is None and next(model.parameters()).device.type == "cpu"


# Without float64.


class NoFloat64(TorchDispatchMode):
    """Stops at the first operation that makes a tensor of float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            assert not (isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64), f"{func} makes float64"
        return result


@FOUR_ROUTERS
def test_nothing_on_the_device_is_float64(router_settings):
    model = build(**router_settings, router_z_loss_coef=0.1)
    optimizer = torch.optim.AdamW(model.parameters())
    with NoFloat64():
        losses = accumulate_gradients(model, [{"input_ids": IDS, "labels": IDS, "attention_mask": MASK}] * 2)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for load in losses.load:
            max_violation(load)
            update_bias(torch.zeros(6), load)
        model.generate(IDS, 3, temperature=1.0, attention_mask=MASK)


def test_the_guard_sees_float64():
    with NoFloat64(), pytest.raises(AssertionError, match="makes float64"):
        torch.ones(2).double()


# Half precision and autocast.


@FOUR_ROUTERS
def test_routers_compute_in_float32_under_autocast(router_settings):
    """The choice is then the one that is made without autocast, but for what attention rounds before it."""
    router, x = Router(build(**router_settings).config).eval(), torch.randn(40, 8)
    nn.init.normal_(router.weight)
    wanted = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router(x)
        whole = build(**router_settings)(IDS, labels=IDS, output_router_logits=True)
    assert found.logits.dtype == torch.float32 and torch.equal(found.indices, wanted.indices)
    torch.testing.assert_close((found.logits, found.weights), (wanted.logits, wanted.weights), rtol=1e-4, atol=1e-4)
    assert all(chosen.logits.dtype == torch.float32 for chosen in whole.router_outputs)
    assert whole.loss.dtype == torch.float32


def test_autocast_trains():
    model = build(router_aux_loss_coef=0.1, router_z_loss_coef=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IDS, MASK, labels=IDS).loss
    loss.backward()
    reference = build(router_aux_loss_coef=0.1, router_z_loss_coef=0.1)
    assert abs(loss - reference(IDS, MASK, labels=IDS).loss) < 0.05
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def half(model: nn.Module) -> nn.Module:
    return model.half()


def bfloat16(model: nn.Module) -> nn.Module:
    return model.to(torch.bfloat16)


def bfloat16_on_meta(model: nn.Module) -> nn.Module:
    return model.to("meta", torch.bfloat16)


def half_as_loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: tensor.half() for name, tensor in model.state_dict().items()}, assign=True)
    return model


@pytest.mark.parametrize("change", [half, bfloat16, bfloat16_on_meta, half_as_loaded])
def test_the_selection_bias_stays_in_float32(change):
    """A step of 0.001 on a bias of 0.5 is lost in bfloat16, whose next number is 0.504."""
    model = build(**DEEPSEEK)
    values = torch.linspace(0.4, 0.6, 6).half().float()  # which half precision can hold
    for block in model.model.layers:
        block.mlp.gate.e_score_correction_bias.copy_(values)
    changed = change(copy.deepcopy(model))
    for block in changed.model.layers:
        bias = block.mlp.gate.e_score_correction_bias
        assert bias.dtype == torch.float32 and block.mlp.gate.weight.dtype != torch.float32
        assert bias.is_meta or torch.equal(bias, values)
    assert model.double().model.layers[0].mlp.gate.e_score_correction_bias.dtype == torch.float64


def test_the_selection_bias_begins_in_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        gate = build(**DEEPSEEK).model.layers[0].mlp.gate
    finally:
        torch.set_default_dtype(torch.float32)
    assert (gate.weight.dtype, gate.e_score_correction_bias.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_selection_bias_stays_in_float32_on_disk(tmp_path, dtype):
    model = build(**DEEPSEEK).to(dtype)
    for block in model.model.layers:
        block.mlp.gate.e_score_correction_bias.uniform_(-1, 1)
    model.save_pretrained(tmp_path)
    for back in (MoEForCausalLM.from_pretrained(tmp_path), MoEForCausalLM.from_pretrained(tmp_path, dtype=dtype)):
        for name, tensor in back.state_dict().items():
            assert tensor.dtype == (torch.float32 if name.endswith("bias") else dtype)
            assert torch.equal(tensor, model.state_dict()[name]), name
