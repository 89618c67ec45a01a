"""A LoRA adapter beside its base is read as the model that both make, which is computed here by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimoe.model import MoEForCausalLM
from minimoe.model.checkpoint import CheckpointError
from minimoe.model.opening import open_checkpoint
from tests.model.test_checkpoint import IDS, small_model
from tests.rounding import assert_near

Q, DOWN, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens"
SETTINGS = {"peft_type": "LORA", "r": 3, "lora_alpha": 12, "base_model_name_or_path": "someone/base", "use_dora": False}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prefixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


PARTS = {
    f"{Q}.lora_A.weight": random(3, 16, seed=1),
    f"{Q}.lora_B.weight": random(16, 3, seed=2),
    f"{DOWN}.lora_A.weight": random(3, 8, seed=3),
    f"{DOWN}.lora_B.weight": random(16, 3, seed=4),
}


def write(folder: Path, tensors: dict[str, torch.Tensor], **settings) -> Path:
    """An adapter as PEFT writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(prefixed(tensors), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings), encoding="utf-8")
    return folder


@pytest.fixture
def base(tmp_path) -> dict[str, torch.Tensor]:
    """A dense model beside the adapters of these tests: its tensors."""
    small_model(num_experts=0).save_pretrained(tmp_path / "base", model_type="llama")
    return load_file(tmp_path / "base" / "model.safetensors")


def changed(base: dict[str, torch.Tensor], q: float, down: float) -> dict[str, torch.Tensor]:
    """What the parts make of the base, added by these factors."""
    added = {Q: q, DOWN: down}
    change = {f"{name}.weight": PARTS[f"{name}.lora_B.weight"] @ PARTS[f"{name}.lora_A.weight"] for name in added}
    return base | {name: base[name] + added[name.removesuffix(".weight")] * tensor for name, tensor in change.items()}


def assert_reads(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    found = open_checkpoint(folder)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found.shape(name) == tuple(tensor.shape)
        assert_near(found[name], tensor.float())
        for size in (5, 37):
            pieces = torch.cat([piece.clone() for piece in found.pieces(name, size)])
            assert_near(pieces, found[name].flatten())


@pytest.mark.parametrize(
    ("settings", "q", "down"),
    [
        ({}, 12 / 3, 12 / 3),
        ({"use_rslora": True}, 12 / math.sqrt(3), 12 / math.sqrt(3)),
        ({"alpha_pattern": {"q_proj": 6}}, 6 / 3, 12 / 3),
        ({"alpha_pattern": {r"layers\.\d\.mlp\.down_proj": 9}, "r": 64, "rank_pattern": {"proj": 3}}, 12 / 3, 9 / 3),
    ],
    ids=str,
)
def test_a_matrix_gets_the_product_times_alpha_over_r(settings, q, down, base, tmp_path):
    folder = write(tmp_path / "adapter", PARTS, **settings)
    assert_reads(folder, changed(base, q, down))
    assert_reads(folder / "adapter_model.safetensors", changed(base, q, down))


def test_the_sum_is_run(base, tmp_path):
    model = small_model(num_experts=0)
    wanted = changed(base, 4, 4)
    model.load_state_dict(wanted)
    found = MoEForCausalLM.from_pretrained(write(tmp_path / "adapter", PARTS))
    assert_near(found(IDS).logits, model(IDS).logits)


def test_a_base_in_half_precision_is_added_to_in_float32(base, tmp_path):
    small_model(num_experts=0).bfloat16().save_pretrained(tmp_path / "base", model_type="llama")
    half = {name: tensor.bfloat16() for name, tensor in base.items()}
    wanted = {name: tensor.float() for name, tensor in half.items()}
    found = open_checkpoint(write(tmp_path / "adapter", PARTS))
    assert_near(found[f"{Q}.weight"], changed(wanted, 4, 4)[f"{Q}.weight"])
    assert found["model.norm.weight"].dtype == torch.bfloat16 and found.dtype == torch.float32


def test_embeddings_and_transposed_matrices_get_the_product_transposed(base, tmp_path):
    first, second = random(2, 29, seed=5), random(16, 2, seed=6)
    parts = {f"{EMBEDDING}.lora_embedding_A": first, f"{EMBEDDING}.lora_embedding_B": second}
    name = f"{EMBEDDING}.weight"
    assert_reads(write(tmp_path / "a", parts), base | {name: base[name] + 12 / 2 * (second @ first).T})
    parts = {f"{DOWN}.lora_A.weight": random(2, 16, seed=5), f"{DOWN}.lora_B.weight": random(8, 2, seed=6)}
    product = parts[f"{DOWN}.lora_B.weight"] @ parts[f"{DOWN}.lora_A.weight"]
    wanted = base | {f"{DOWN}.weight": base[f"{DOWN}.weight"] + 12 / 2 * product.T}
    assert_reads(write(tmp_path / "b", parts, fan_in_fan_out=True), wanted)


def test_saved_modules_replace_those_of_the_base(base, tmp_path):
    head, norm = random(29, 16, seed=7), random(16, seed=8)
    parts = PARTS | {"lm_head.weight": head, "model.norm.modules_to_save.weight": norm}
    wanted = changed(base, 4, 4) | {"lm_head.weight": head, "model.norm.weight": norm}
    assert_reads(write(tmp_path / "adapter", parts), wanted)


@pytest.mark.parametrize("where", ["named", "inside", "beside"])
def test_the_base_is_found(where, base, tmp_path):
    name = str(tmp_path / "base") if where == "named" else "someone/base"
    folder = write(tmp_path / "adapter" if where == "beside" else tmp_path / "far" / "adapter", PARTS)
    if where == "inside":
        (tmp_path / "base").rename(folder / "base")
    write(folder, PARTS, base_model_name_or_path=name)
    assert_reads(folder, changed(base, 4, 4))


def test_what_lies_beside(base, tmp_path):
    folder = write(tmp_path / "adapter", PARTS)
    (tmp_path / "base" / "tokenizer.json").write_text("of the base", encoding="utf-8")
    found = open_checkpoint(folder)
    assert found.tokenizer_json == "of the base" and len(found.hashes()) == len(found.files) == 2
    assert {file.name for file in found.files} == {"model.safetensors", "adapter_model.safetensors"}
    (folder / "tokenizer.json").write_text("of the adapter", encoding="utf-8")
    assert found.tokenizer_json == "of the adapter"
    save_file({"step": torch.ones(1)}, folder / "optimizer.safetensors")  # of the training, and no part of a model
    assert found.unread == []


def test_without_its_base_the_base_is_named(tmp_path):
    folder = write(tmp_path / "adapter", PARTS)
    with pytest.raises(CheckpointError, match=r"adapter: an adapter, whose base 'someone/base' is not at hand; wanted"):
        open_checkpoint(folder)
    write(folder, PARTS, base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match=r"an adapter, whose base '' is not at hand"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        ({}, {"peft_type": "IA3"}, r"adapter_config\.json: peft_type='IA3', wanted 'LORA'"),
        ({}, {"use_dora": True}, r"use_dora=True, wanted False"),
        ({}, {"target_parameters": ["experts.up"]}, r"target_parameters=\['experts\.up'\], wanted None"),
        ({}, {"init_lora_weights": "pissa_niter_16"}, r"init_lora_weights='pissa_niter_16', wanted a beginning that"),
        ({}, {"lora_alpha": "many"}, r"alpha_pattern or lora_alpha: could not convert"),
        ({}, {"alpha_pattern": {"(": 3}}, r"alpha_pattern or lora_alpha: "),
        (
            {f"{Q}.lora_B.weight": None},
            {},
            r"q_proj\.lora_A\.weight wants \S+lora_B\.weight, and there is none",
        ),
        ({"x.lora_A.weight": random(3, 4), "x.lora_B.weight": random(4, 3)}, {}, r"wants x\.weight, and there is none"),
        ({"x.weight": random(3)}, {}, r"x\.weight is not understood, as the base has no x\.weight"),
        ({f"{Q}.lora_magnitude_vector": random(16)}, {}, r"lora_magnitude_vector is not understood"),
        ({f"{Q}.lora_B.weight": random(16, 2)}, {}, r"lora_B\.weight is \[16, 2\], wanted \[r, 16\] and \[16, r\]"),
        ({f"{DOWN}.lora_A.weight": random(3, 16)}, {}, r"wanted \[r, 8\] and \[16, r\], as .* is \[16, 8\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_understood_is_refused_by_name(parts, settings, message, base, tmp_path):
    tensors = {name: tensor for name, tensor in (PARTS | parts).items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write(tmp_path / "adapter", tensors, **settings))
