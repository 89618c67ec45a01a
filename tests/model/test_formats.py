"""Weights in few bits are the numbers they stand for: computed here by hand, or by transformers."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from minimoe.model import MoEForCausalLM
from minimoe.model.checkpoint import Checkpoint, CheckpointError
from minimoe.model.opening import open_checkpoint
from tests.model.test_checkpoint import IDS, edit_json, small_model

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def folder(path: Path, tensors: dict[str, torch.Tensor], quantization: dict | None = None) -> Checkpoint:
    """Tensors beside a configuration that names a format, or none."""
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    config = {"model_type": "llama"} | ({} if quantization is None else {"quantization_config": quantization})
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return open_checkpoint(path)


def assert_read(found: Checkpoint, name: str, wanted: torch.Tensor) -> None:
    """As a whole, in pieces of any size, and in shape: float32."""
    assert list(found) == [name] and found.shape(name) == tuple(wanted.shape) and found.dtype == torch.float32
    assert torch.equal(found[name], wanted) and found[name].dtype == torch.float32
    for size in (wanted.numel() // 50 + 1, wanted.shape[-1] + 1, wanted.numel()):
        pieces = [piece.clone() for piece in found.pieces(name, size)]
        assert torch.equal(torch.cat(pieces), wanted.flatten())
        assert {len(piece) for piece in pieces[:-1]} <= {size} and len(pieces[-1]) <= size
    assert torch.equal(found.rows(name, [len(wanted) - 1, 0, 0]), wanted[[-1, 0, 0]])


# -- FP8


def in_blocks(codes: torch.Tensor, scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The scale of each block beside each of its numbers."""
    wide = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return codes.float() * wide[: codes.shape[0], : codes.shape[1]]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("said", [None, [4, 8], [128, 128]], ids=str)
def test_fp8_in_blocks_as_in_deepseek_v3(said, dtype, tmp_path):
    """The last blocks of rows and columns are cut off; without a configuration, the blocks are of 128."""
    rows, columns = said or (128, 128)
    codes = random(rows + rows // 2, 2 * columns + 3).to(dtype)
    scales = random(2, 3, seed=1).abs()
    about = None if said is None else {"quant_method": "fp8", "weight_block_size": said}
    tensors = {"a.weight": codes, "a.weight_scale_inv": scales}
    assert_read(folder(tmp_path, tensors, about), "a.weight", in_blocks(codes, scales, rows, columns))


def test_fp8_in_blocks_is_what_transformers_makes_of_it(tmp_path):
    codes, scales = random(3, 8, 12).to(E4M3), random(3, 2, 3, seed=1)
    wanted = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    tensors = {"experts.down_proj": codes, "experts.down_proj_scale_inv": scales}
    assert_read(folder(tmp_path, tensors), "experts.down_proj", wanted)


def test_blocks_of_an_exact_part_need_no_configuration(tmp_path):
    codes, scales = random(8, 12).to(E4M3), random(2, 3, seed=1)
    found = folder(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scales})
    assert_read(found, "a.weight", in_blocks(codes, scales, 4, 4))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1), (1, 10), (6, 5)], ids=str)
def test_fp8_with_a_scale_for_all_for_each_row_or_for_groups(shape, tmp_path):
    codes, scales = random(6, 10).to(E4M3), random(*shape, seed=1).bfloat16()
    wide = scales[:, None] if shape == (6,) else scales.repeat_interleave(2, dim=1) if shape == (6, 5) else scales
    tensors = {"a.weight": codes, "a.weight_scale": scales, "a.input_scale": torch.ones(1)}
    for about in ({"quant_method": "compressed-tensors"}, None):
        assert_read(folder(tmp_path, tensors, about), "a.weight", codes.float() * wide.float())


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_scales_that_are_powers_of_2(dtype, tmp_path):
    codes, exponents = random(4, 64).to(E4M3), torch.tensor([[0, 100], [126, 127], [128, 140], [126, 126]])
    scales = exponents.to(torch.uint8).view(dtype)
    wanted = codes.double() * (2.0 ** (exponents - 127.0).double()).repeat_interleave(32, dim=1)
    found = folder(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scales})
    assert_read(found, "a.weight", wanted.float())


@pytest.mark.parametrize("shape", [(3, 2, 2), (3, 1, 1), (3,), (3, 8), (3, 1, 8), ()], ids=str)
def test_a_stack_of_experts(shape, tmp_path):
    codes, scales = random(3, 8, 8).to(E4M3), random(*shape, seed=1)
    wide = scales.repeat_interleave(4, 1).repeat_interleave(4, 2) if shape == (3, 2, 2) else scales
    wide = scales.view(*shape, *[1] * (3 - len(shape))) if len(shape) in (1, 2) else wide
    tensors = {"experts.gate_up_proj": codes, "experts.gate_up_proj_scale_inv": scales}
    assert_read(folder(tmp_path, tensors), "experts.gate_up_proj", codes.float() * wide)


def test_scales_of_another_size_are_refused_where_they_are_wanted(tmp_path):
    tensors = {"a.weight": random(6, 10).to(E4M3), "b.weight": random(2, 2)}
    found = folder(tmp_path, tensors | {"a.weight_scale": torch.ones(4)})
    assert torch.equal(found["b.weight"], tensors["b.weight"])
    for scales in (torch.ones(4), torch.ones(4, 10), torch.ones(2, 6, 1)):
        found = folder(tmp_path, tensors | {"a.weight_scale": scales})
        message = rf"a\.weight_scale is {re.escape(str(list(scales.shape)))}, wanted \[6\], one for each row, or one"
        with pytest.raises(CheckpointError, match=message):
            found["a.weight"]
    found = folder(tmp_path, tensors | {"a.weight_scale": torch.ones(6, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match=r"a\.weight_scale is stored as I32, wanted one of F64"):
        found["a.weight"]


def test_8_bits_without_scales_are_refused_where_they_are_wanted(tmp_path):
    tensors = {
        "a.weight": random(2, 2).to(E4M3),
        "b.weight": random(2, 2),
        "c.weight": torch.ones(2, 2, dtype=torch.int8),
    }
    found = folder(tmp_path, tensors)
    assert set(found) == set(tensors) and torch.equal(found["b.weight"], tensors["b.weight"])
    for name, dtype in (("a", "F8_E4M3"), ("c", "I8")):
        message = rf"{name}\.weight is stored as {dtype}, wanted one of F64, .*, or its scales: no tensor '{name}\.SCB'"
        with pytest.raises(CheckpointError, match=message):
            found[f"{name}.weight"]


# -- integers


def test_8_bit_integers_of_compressed_tensors(tmp_path):
    codes, scales = torch.arange(-24, 24, dtype=torch.int8).view(6, 8), random(6, 1).abs()
    about = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    tensors = {"a.weight": codes, "a.weight_scale": scales}
    assert_read(folder(tmp_path, tensors, about), "a.weight", codes.float() * scales)
    zeros = torch.tensor([[0], [1], [-3], [7], [0], [9]], dtype=torch.int8)
    wanted = (codes.float() - zeros) * scales
    assert_read(folder(tmp_path, tensors | {"a.weight_zero_point": zeros}, about), "a.weight", wanted)
    found = folder(tmp_path, tensors | {"a.weight_zero_point": zeros[:2]}, about)
    with pytest.raises(CheckpointError, match=r"a\.weight_zero_point is I8 \[2, 1\], wanted I8 \[6, 1\]"):
        found["a.weight"]


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """As compressed-tensors packs: the first number in the lowest bits of an int32, each raised to be positive."""
    count, words = 32 // bits, []
    for row in codes.tolist():
        for start in range(0, len(row), count):
            word = sum(
                (number + 2 ** (bits - 1)) << bits * place for place, number in enumerate(row[start : start + count])
            )
            words.append(word - 2**32 if word >= 2**31 else word)
    return torch.tensor(words, dtype=torch.int32).view(len(codes), -1)


def groups_of(bits: int) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "group_size": 4}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


def test_packed_integers_of_8_bits_are_read_and_of_4_bits_refused_by_name(tmp_path):
    codes, scales = torch.arange(-128, 128, 8, dtype=torch.int8).view(4, 8), random(4, 2)
    tensors = {"a.weight_packed": packed(codes, 8), "a.weight_scale": scales, "a.weight_shape": torch.tensor([4, 8])}
    wanted = codes.float() * scales.repeat_interleave(4, dim=1)
    assert_read(folder(tmp_path, tensors, groups_of(8)), "a.weight", wanted)
    found = folder(tmp_path, tensors | {"a.weight_shape": torch.tensor([4, 7])}, groups_of(8))
    with pytest.raises(CheckpointError, match=r"a\.weight_shape is \[4, 7\], wanted \[4, 8\]"):
        found["a.weight"]
    for about, bits in ((groups_of(4), "4"), (None, "unknown")):
        found = folder(tmp_path, tensors | {"a.weight_packed": packed(codes // 16, 4)}, about)
        message = rf"a\.weight is stored as compressed-tensors with {bits} bits does .*, which is not read"
        with pytest.raises(CheckpointError, match=message):
            found["a.weight"]


def test_8_bit_integers_of_bitsandbytes(tmp_path):
    """What a library that reads them makes of them: the integer, times the largest number of its row, through 127."""
    codes, largest = torch.arange(-30, 30, dtype=torch.int8).view(6, 10), random(6).abs()
    tensors = {"a.weight": codes, "a.SCB": largest, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}
    about = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert_read(folder(tmp_path, tensors, about), "a.weight", codes * (largest / 127)[:, None])


# -- MXFP4


@pytest.mark.parametrize("experts", [1, 3])
def test_mxfp4_is_what_transformers_makes_of_it(experts, tmp_path):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, 6, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (experts, 6, 2), generator=generator, dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert wanted.shape == (experts, 64, 6)
    assert_read(folder(tmp_path, tensors, {"quant_method": "mxfp4"}), name, wanted)
    found = folder(tmp_path, tensors | {f"{name}_bias": torch.ones(experts, 6)})
    assert set(found) == {name, f"{name}_bias"} and torch.equal(found[name], wanted)


def test_gpt_oss_as_it_is_published_runs(tmp_path):
    """Experts in MXFP4, the rest in bfloat16: the answers are those of transformers with the numbers they stand for."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    oracle = GptOssForCausalLM(config).bfloat16().float().eval()
    tensors = {}
    for name, tensor in oracle.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor.bfloat16()
            continue
        experts, rows, columns = tensor.shape
        blocks = torch.randint(0, 256, (experts, columns, rows // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 125, (experts, columns, rows // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensor.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    config.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "mxfp4"})
    save_file(tensors, tmp_path / "model.safetensors")
    model = MoEForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        found, wanted = model(IDS).logits, oracle(IDS).logits
    assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_mxfp4_by_hand(tmp_path):
    """Of each byte the low half first; a sign, two bits of exponent, one of fraction."""
    pairs = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2
    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0] * 2
    blocks = torch.tensor([pairs, pairs], dtype=torch.uint8).view(1, 2, 1, 16)
    scales = torch.tensor([129, 126], dtype=torch.uint8).view(1, 2, 1)
    found = folder(tmp_path, {"x_blocks": blocks, "x_scales": scales})
    assert found["x"].tolist() == [[[4 * number, number / 2] for number in numbers]]
    found = folder(tmp_path, {"x_blocks": blocks[..., :8].contiguous(), "x_scales": scales})
    with pytest.raises(CheckpointError, match=r"x_blocks is \[1, 2, 1, 8\] and x_scales \[1, 2, 1\], wanted \[\.\.,"):
        found["x"]
    found = folder(tmp_path, {"x_blocks": blocks, "x_scales": torch.full_like(scales, 255)})
    assert found["x"].isnan().all()


# -- what is not read


NOT_READ = {
    "gptq": {"a.qweight": torch.int32, "a.qzeros": torch.int32, "a.scales": torch.float16, "a.g_idx": torch.int32},
    "awq": {"a.qweight": torch.int32, "a.qzeros": torch.int32, "a.scales": torch.float16},
    "bitsandbytes with 4 bits": {
        "a.weight": torch.uint8,
        "a.weight.absmax": torch.uint8,
        "a.weight.quant_map": torch.float32,
        "a.weight.nested_absmax": torch.float32,
        "a.weight.quant_state.bitsandbytes__nf4": torch.uint8,
    },
    "NVFP4": {"a.weight": torch.uint8, "a.weight_scale": E4M3, "a.weight_scale_2": torch.float32},
}


@pytest.mark.parametrize("method", NOT_READ)
def test_other_formats_are_refused_by_name_where_they_are_wanted(method, tmp_path):
    tensors = {name: torch.ones(4, 4).to(dtype) for name, dtype in NOT_READ[method].items()}
    about = {"quant_method": method.split()[0].lower(), "load_in_4bit": True}
    found = folder(tmp_path, tensors | {"a.bias": torch.ones(4), "b.weight": torch.ones(2, 2)}, about)
    assert set(found) == {"a.weight", "a.bias", "b.weight"}
    assert torch.equal(found["b.weight"], torch.ones(2, 2))
    for read in (found.shape, found.__getitem__, lambda name: next(found.pieces(name, 4))):
        with pytest.raises(CheckpointError, match=rf"a\.weight is stored as {method} does \(a\.q?weight, .*not read"):
            read("a.weight")
    with pytest.raises(CheckpointError, match=r"quantization_config\['quant_method'\]='\w+': wanted no quantization"):
        found.model_config  # noqa: B018


def test_an_unknown_dtype_is_refused_where_it_is_wanted(tmp_path):
    tensors = {"a.weight": torch.ones(2, 2, dtype=torch.int64), "b.weight": torch.ones(2, 2, dtype=torch.bool)}
    found = folder(tmp_path, tensors | {"c.weight": torch.ones(2)})
    assert found.shape("a.weight") == (2, 2) and torch.equal(found["c.weight"], torch.ones(2))
    for name, dtype in (("a", "I64"), ("b", "BOOL")):
        with pytest.raises(CheckpointError, match=rf"{name}\.weight is stored as {dtype}, wanted one of F64"):
            found[f"{name}.weight"]


def test_a_configuration_that_makes_no_sense_is_no_reason_to_crash(tmp_path):
    codes, scales = random(4, 4).to(E4M3), random(2, 2)
    for about in (
        {"weight_block_size": "many"},
        {"weight_block_size": [2]},
        {"weight_block_size": [0, -3]},
        {"config_groups": ["a"]},
        {"config_groups": {"a": {"weights": 8}}},
        [8],
    ):
        found = folder(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scales}, about)
        assert torch.equal(found["a.weight"], codes.float() * scales.repeat_interleave(2, 0).repeat_interleave(2, 1))


# -- models


def test_a_model_in_fp8_is_run_from_the_numbers_it_stands_for(tmp_path):
    """In float32, or in the dtype that is asked for; the oracle never sees the folder."""
    model = small_model()
    model.save_pretrained(tmp_path, model_type="mixtral")
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if re.search(r"(_proj|\.w\d)\.weight$", name)]:
        scale = tensors[name].abs().amax(1, keepdim=True) / torch.finfo(E4M3).max
        codes = (tensors[name] / scale).to(E4M3)
        tensors |= {name: codes, f"{name}_scale": scale, name.replace("weight", "input_scale"): torch.ones(1)}
        wanted = codes.float() * scale
        own = model.model.layers[int(name.split(".")[2])]
        if "self_attn" in name:
            getattr(own.self_attn, name.split(".")[4]).weight.data = wanted
        else:
            projection = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[name.split(".")[6]]
            getattr(own.mlp.experts, projection).data[int(name.split(".")[5])] = wanted
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)  # of the cache
    save_file(tensors, tmp_path / "model.safetensors")
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "fp8"})
    found = MoEForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.state_dict().items())
    assert found.lm_head.weight.dtype == torch.float32
    half = MoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half.lm_head.weight, model.lm_head.weight.bfloat16()) and half(IDS).logits.isfinite().all()
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert open_checkpoint(tmp_path).hashes() == [digest]
    assert "quantization_config" not in open_checkpoint(tmp_path).hf_config
