"""torch.compile without graph breaks, and torch.export: the whole model, forwards and backwards, equal to eager."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minimoe.model import MoEConfig, MoEForCausalLM
from tests.rounding import assert_near

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_put((torch.tensor([1, 1, 1]), torch.arange(3)), torch.tensor(0))
DEEPSEEK = {
    "score_func": "sigmoid",
    "e_score_correction_bias": True,
    "n_group": 2,
    "shared_expert_intermediate_size": 8,
}


def build(**settings) -> MoEForCausalLM:
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": 4}
    sizes |= {"intermediate_size": 6, "router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1, "initializer_range": 0.3}
    return MoEForCausalLM(MoEConfig(**sizes | settings), seed=3)


def gradients(model: MoEForCausalLM, run, **arguments) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = run(**arguments).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_alike(found: tuple[float, dict], wanted: tuple[float, dict]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-4)
    for name, gradient in wanted[1].items():
        assert_near(found[1][name], gradient, 1e-3)  # a gradient of the whole model, in float32


@pytest.mark.parametrize(
    ("implementation", "settings", "padded"),
    [
        ("eager", DEEPSEEK, True),
        ("grouped", DEEPSEEK, True),
        ("grouped", {"router": "grouped", "n_group": 2}, False),
        ("grouped", {"num_experts": 0}, True),
    ],
)
def test_compiled_without_a_graph_break(implementation, settings, padded):
    torch._dynamo.reset()
    model = build(experts_implementation=implementation, **settings)
    arguments = {"input_ids": IDS, "labels": IDS} | ({"attention_mask": MASK} if padded else {})
    wanted = gradients(model, model, **arguments)
    found = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager"), **arguments)
    assert_alike(found, wanted)


@torch.no_grad()
def compile_by_inductor() -> None:
    model = build(experts_implementation="grouped")
    assert_near(torch.compile(model, fullgraph=True)(IDS).logits, model(IDS).logits)


@pytest.mark.exact("runs in a process of its own, where nothing is perturbed")
@pytest.mark.skipif(
    shutil.which("g++") is None or " " in torch.__file__,
    reason="inductor wants g++, and torch in a path without a space, as it does not quote it",
)
def test_compiled_by_inductor(tmp_path):
    """The default backend, which writes and builds code: once, and forwards alone, as it takes a while.

    In a process and a cache of its own: code that it kept from a run with another ATEN_CPU_CAPABILITY crashes.
    """
    program = "from tests.model.test_compile import compile_by_inductor; compile_by_inductor()"
    # one thread: a pool of processes takes longer to start than the two small files to build
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("implementation", ["eager", "grouped"])
def test_exported_for_any_batch_and_length(implementation):
    model = build(experts_implementation=implementation).eval()
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=512)
    sizes = {0: batch, 1: length}
    exported = torch.export.export(model, (IDS, MASK), dynamic_shapes=(sizes, sizes)).module()
    for rows, columns in ((2, 9), (5, 30)):
        ids = torch.randint(20, (rows, columns))
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        assert_near(exported(ids, mask).logits, model(ids, mask).logits)
