"""A GGUF file gives the roles of the model it was written from; transformers reads the same from it."""

import json
import os
import re
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Format
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from minimoe.fingerprints.std_profile import std_profile
from minimoe.fingerprints.virtual_response import virtual_response
from minimoe.fingerprints.weights import ROLES, Weights, open_weights
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.model.checkpoint import CheckpointError
from minimoe.model.families import find_family
from minimoe.model.layout import tensors_on_disk
from tests.rounding import assert_near

SMALL = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "tie_word_embeddings": False,
    "rope_theta": 5000.0,
    "max_position_embeddings": 64,
}
DENSE = {"num_experts": 0}
BIASES = {"attention_bias": True, "attention_output_bias": True}
SHARED = {"shared_expert_intermediate_size": 96, "shared_expert_gate": True, "norm_topk_prob": False}
LAYOUTS = {  # (llama.cpp's architecture, our family): settings
    ("llama", "llama"): DENSE | {"head_dim": 16},
    ("llama", "llama with biases"): DENSE | BIASES,
    ("llama", "mixtral"): {},
    ("qwen2", "qwen2"): DENSE | {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 16},
    ("qwen2moe", "qwen2_moe"): SHARED | {"attention_bias": True},
    ("qwen3", "qwen3"): DENSE | {"qk_norm": "head"},
    ("qwen3moe", "qwen3_moe"): {"qk_norm": "head"},
    ("olmoe", "olmoe"): {"qk_norm": "full", "norm_topk_prob": False, "head_dim": 16},
}
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[1])
PLACES = [(role, layer) for role in ROLES for layer in (None, 0, 1)]
IDS = torch.arange(24).view(2, 12) * 5 % 160
Change = Callable[[gguf.GGUFWriter], None]


def make_model(layout: tuple[str, str] = ("llama", "llama"), seed: int = 0, **settings) -> MoEForCausalLM:
    """Every number away from what an initialisation would give."""
    config = MoEConfig(**SMALL | LAYOUTS[layout] | settings, model_type=layout[1].split()[0])
    model = MoEForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model


def llama_order(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Row j and row j + D/2 of each head, which turn together, become neighbours."""
    order = []
    for head in range(0, len(rows), head_dim):
        for j in range(head_dim // 2):
            order += [head + j, head + j + head_dim // 2]
    return rows[order]


def stored_tensors(model: MoEForCausalLM, architecture: str) -> dict[str, torch.Tensor]:
    """As llama.cpp's converter leaves them: its names, which package gguf knows; experts in one tensor; its order."""
    names = gguf.get_tensor_name_map(
        {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], model.config.num_hidden_layers
    )
    stored, experts = {}, {}
    for name, tensor in tensors_on_disk(model, find_family(model.config.model_type)).items():
        found = names.get_name(re.sub(r"\.experts\.\d+\.", ".experts.", name), try_suffixes=(".weight", ".bias"))
        if ".experts." in name:
            experts.setdefault(found, []).append(tensor)
        elif architecture == "llama" and re.search(r"attn_[qk]\.", found):
            stored[found] = llama_order(tensor, model.config.head_dim)
        else:
            stored[found] = tensor.squeeze(0) if "inp_shexp" in found else tensor
    return stored | {name: torch.stack(tensors) for name, tensors in experts.items()}


def write(
    file: Path,
    model: MoEForCausalLM,
    architecture: str = "llama",
    form: Format = Format.F32,
    change: Change = lambda writer: None,
    **raw: tuple[numpy.ndarray, Format],
) -> Path:
    """The model as a GGUF file, its matrices in `form`; `raw` replaces tensors, `change` adds to the metadata."""
    config, writer = model.config, gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    tokens = [f"t{number}" for number in range(config.vocab_size - 1)]
    writer.add_token_list([*tokens, "[PAD]"])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.UNUSED])
    change(writer)
    for name, tensor in stored_tensors(model, architecture).items():
        kind = form if tensor.dim() > 1 else Format.F32
        data, kind = raw.get(name.replace(".", "_"), (gguf.quants.quantize(tensor.float().numpy(), kind), kind))
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def assert_same_roles(found: Weights, wanted: Weights) -> None:
    for place in PLACES:
        assert found.has(*place) == wanted.has(*place), place
        if wanted.has(*place):
            assert found.shape(*place) == wanted.shape(*place), place
            assert torch.equal(found.get(*place), wanted.get(*place)), place
            assert torch.equal(torch.cat(in_pieces(found, *place)), found.get(*place).flatten())
            if wanted.shape(*place)[1:] and place[1] is not None:
                assert torch.equal(found.first_rows(*place, 3), wanted.get(*place)[..., :3, :]), place


def in_pieces(weights: Weights, role: str, layer: int | None) -> list[torch.Tensor]:
    return [piece.clone() for _, piece in weights.pieces(role, layer)]


# -- roles


@EVERY_LAYOUT
def test_roles_are_those_of_the_model_to_the_last_bit(layout, tmp_path, monkeypatch):
    monkeypatch.setattr("minimoe.fingerprints.weights.PIECE", 3000)  # no number of heads or blocks
    for form, dtype in ((Format.F32, torch.float32), (Format.F16, torch.float16), (Format.BF16, torch.bfloat16)):
        model = make_model(layout).to(dtype)
        weights = open_weights(write(tmp_path / f"{form.name}.gguf", model, layout[0], form))
        assert_same_roles(weights, open_weights(model))
        assert weights.config.model_type == layout[1].split()[0]
        same = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "num_experts")
        assert all(getattr(weights, name) == getattr(open_weights(model), name) for name in same)


@EVERY_LAYOUT
def test_a_file_is_run_as_the_model_it_was_written_from(layout, tmp_path):
    model, file = make_model(layout), tmp_path / "model.gguf"
    found = MoEForCausalLM.from_pretrained(write(file, model, layout[0]), dtype=torch.float32)
    assert found.tokenizer_json is None and not found.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.float()), name
    with torch.no_grad():
        assert_near(open_weights(file).model()(IDS).logits, model(IDS).logits)


def rows_in_our_order(name: str, rows: numpy.ndarray, head_dim: int) -> torch.Tensor:
    rows = torch.from_numpy(rows.copy())
    return rows[llama_order(torch.arange(len(rows)), head_dim).argsort()] if re.search(r"attn_[qk]\.", name) else rows


@pytest.mark.parametrize(
    ("form", "error"), [(Format.Q8_0, 0.57), (Format.Q4_1, 0.51), (Format.Q4_0, 1.01)], ids=["Q8_0", "Q4_1", "Q4_0"]
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_quantised_roles_are_those_of_gguf_and_near_the_model(family, form, error, tmp_path):
    """`error` is in steps between two numbers of a block: half a step, and what rounding the scale to float16 adds far
    from zero. Q4_0 has eight numbers on one side of zero and seven on the other, where it clips."""
    model = make_model(("llama", family))
    weights = open_weights(write(tmp_path / "model.gguf", model, form=form))
    tensors = {
        tensor.name: rows_in_our_order(
            tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type), model.config.head_dim
        )
        for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    suffix = "_exps" if family == "mixtral" else ""
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    names |= {role: f"ffn_{role}{suffix}" for role in ("gate", "up", "down")}
    for role, name in names.items():
        found, given = weights.get(role, 1), open_weights(model).get(role, 1)
        assert torch.equal(found, tensors[f"blk.1.{name}.weight"])
        blocks = given.reshape(-1, 32)
        spread = blocks.amax(1) - blocks.amin(1) if form == Format.Q4_1 else blocks.abs().amax(1)
        step = spread / {Format.Q8_0: 127, Format.Q4_1: 15, Format.Q4_0: 8}[form]
        assert 0 < ((found - given).reshape(-1, 32).abs().amax(1) / step).max() < error
    assert torch.equal(weights.get("head"), tensors["output.weight"])


@pytest.mark.parametrize(
    "form", [Format.Q6_K, Format.Q4_K, Format.Q5_K, Format.IQ4_XS, Format.MXFP4], ids=lambda form: form.name
)
def test_what_gguf_reads_is_read(form, tmp_path):
    """Files are mixed: that called Q4_K_M has Q4_K and Q6_K. The package cannot write these: the blocks are random.

    Below 60, so that their scales are finite.
    """
    numbers, size = gguf.GGML_QUANT_SIZES[form]
    blocks = numpy.random.default_rng(0).integers(
        0, 60, (64, 256 // numbers * size), dtype=numpy.uint8
    )  # finite scales
    file = write(tmp_path / "model.gguf", make_model(hidden_size=256), blk_1_attn_q_weight=(blocks, form))
    wanted = rows_in_our_order("attn_q.", gguf.quants.dequantize(blocks, form), 16)
    assert wanted.any() and torch.equal(open_weights(file).get("q", 1), wanted)


def test_pieces_take_memory_for_a_piece_and_not_for_a_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr("minimoe.fingerprints.weights.PIECE", 4096)
    model = make_model(hidden_size=1024, num_attention_heads=16)  # rows of q are read by whole heads, of 64 kB here
    weights = open_weights(write(tmp_path / "model.gguf", model, form=Format.Q8_0))
    for role in ("q", "o"):
        weights.statistics(role, 0)
        tracemalloc.start()  # it sees what numpy takes
        weights.statistics(role, 1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 4 * 4096 <= peak < model.model.layers[1].self_attn.q_proj.weight.nbytes / 2


@pytest.mark.parametrize("size", [1, 1000])
def test_pieces_are_as_large_as_those_of_other_files(size, tmp_path, monkeypatch):
    """Two models are gone through side by side, though heads are read whole and are no multiple of `size`."""
    monkeypatch.setattr("minimoe.fingerprints.weights.PIECE", size)
    model = make_model()
    found, wanted = open_weights(write(tmp_path / "model.gguf", model, form=Format.F32)), open_weights(model)
    for place in [("q", 0), ("k", 1), ("o", 0), ("down", 1)]:
        pairs = zip(in_pieces(found, *place), in_pieces(wanted, *place), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs), place


# -- models


def in_transformers(file: Path, **missing) -> torch.nn.Module:
    """What transformers makes of a file; `missing`: keys that it does not read there."""
    config = AutoConfig.for_model(**load_gguf_checkpoint(file)["config"] | missing)
    model = AutoModelForCausalLM.from_config(config).eval()
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    absent, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(absent) <= {"lm_head.weight"}
    model.tie_weights()
    return model


@pytest.mark.parametrize(
    ("layout", "form", "missing"),
    [
        (("llama", "llama"), Format.Q8_0, {}),
        (("qwen2", "qwen2"), Format.Q4_1, {}),
        (("qwen3moe", "qwen3_moe"), Format.F16, {"moe_intermediate_size": 32, "norm_topk_prob": True}),
    ],
    ids=["llama", "qwen2", "qwen3_moe"],
)
def test_transformers_reads_the_same_model(layout, form, missing, tmp_path):
    file = write(tmp_path / "model.gguf", make_model(layout), layout[0], form)
    with torch.no_grad():
        wanted = in_transformers(file, **missing)(IDS).logits
        assert_near(open_weights(file).model()(IDS).logits, wanted)


def llama3_factors(head_dim: int, theta: float, factor: float) -> numpy.ndarray:
    """What Llama 3.1 divides frequencies by, from wavelengths: short ones by 1, long ones by `factor`."""
    factors = []
    for pair in range(0, head_dim, 2):
        wavelength = 2 * numpy.pi * theta ** (pair / head_dim)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        factors.append(1 / ((1 - min(max(smooth, 0), 1)) / factor + min(max(smooth, 0), 1)))
    return numpy.array(factors, dtype=numpy.float32)


def test_the_scaling_of_llama_3_is_recovered_from_its_factors(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    model = make_model(rope_theta=500000.0, rope_scaling=scaling)
    factors = llama3_factors(model.config.head_dim, 500000.0, 32.0)
    assert len(set(factors)) > 2
    file = write(tmp_path / "a.gguf", model, change=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    weights = open_weights(file)
    assert weights.config.rope_scaling == scaling
    far = torch.arange(640).view(1, -1) % 160
    with torch.no_grad():
        assert_near(weights.model().double()(far).logits, model.double()(far).logits)
    wrong = numpy.sqrt(factors)
    file = write(tmp_path / "b.gguf", model, change=lambda writer: writer.add_tensor("rope_freqs.weight", wrong))
    with pytest.raises(CheckpointError, match=r"b\.gguf: rope_freqs\.weight=\[1\.0, .*: wanted those that follow from"):
        MoEForCausalLM.from_pretrained(file)


def test_linear_scaling_is_read(tmp_path):
    def stretch(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    weights = open_weights(write(tmp_path / "model.gguf", make_model(), change=stretch))
    assert weights.config.rope_scaling == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("layout", [("llama", "llama"), ("llama", "mixtral")], ids=str)
def test_fingerprints_know_a_model_from_its_q8_0(layout, tmp_path):
    """Strangers, in the same format, stay strangers."""
    model = make_model(layout, num_hidden_layers=4)
    with torch.no_grad():
        for index, block in enumerate(model.model.layers):  # std_profile asks for layers that differ
            for role in "qkvo":
                getattr(block.self_attn, f"{role}_proj").weight *= 1 + 0.2 * index**2 / (1 + "qkvo".index(role))
    whole = open_weights(write(tmp_path / "whole.gguf", model))
    quantised = open_weights(write(tmp_path / "q8_0.gguf", model, form=Format.Q8_0))
    stranger = open_weights(write(tmp_path / "stranger.gguf", make_model(layout, seed=1, num_hidden_layers=4)))
    assert std_profile(whole, quantised).score > 0.9999
    assert virtual_response(whole, quantised).score > 0.99
    assert abs(virtual_response(stranger, quantised).score) < 0.2


# -- tokens, hash


def test_tokens_are_those_of_the_file_without_padding(tmp_path):
    model = make_model()
    weights = open_weights(write(tmp_path / "model.gguf", model))
    assert weights.tokens == {f"t{number}": number for number in range(159)}
    (tmp_path / "tokenizer.json").write_text("not of this file", encoding="utf-8")
    assert open_weights(tmp_path / "model.gguf").tokens == weights.tokens


def test_a_file_without_a_vocabulary_has_no_tokens(tmp_path):
    def forget(writer: gguf.GGUFWriter) -> None:
        for key in ("tokens", "token_type"):
            del writer.kv_data[0][f"tokenizer.ggml.{key}"]

    assert open_weights(write(tmp_path / "model.gguf", make_model(), change=forget)).tokens == {}


# -- refusals


@pytest.mark.parametrize("form", [Format.Q8_K, Format.I32, Format.F64], ids=lambda form: form.name)
def test_a_tensor_in_another_format_is_refused_where_it_is_read(form, tmp_path):
    numbers, size = gguf.GGML_QUANT_SIZES[form]
    model = make_model(hidden_size=256)
    blocks = numpy.zeros((64, 256 // numbers * size), dtype=numpy.uint8)
    weights = open_weights(write(tmp_path / "model.gguf", model, blk_1_attn_q_weight=(blocks, form)))
    assert torch.equal(weights.get("q", 0), model.model.layers[0].self_attn.q_proj.weight)
    message = rf"model\.layers\.1\.self_attn\.q_proj\.weight is stored as {form.name}, which gguf does not read"
    for read in (weights.get, weights.statistics, lambda role, layer: weights.model()):
        with pytest.raises(CheckpointError, match=message):
            read("q", 1)


def test_the_package_is_named_where_it_is_missing(tmp_path, monkeypatch):
    file = write(tmp_path / "model.gguf", make_model())
    monkeypatch.delitem(sys.modules, "minimoe.model.gguf_file", raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"model\.gguf: reading it needs gguf: pip install gguf"):
        open_weights(file)


def set_to(key: str, value: object) -> Change:
    return lambda writer: writer.kv_data[0].__setitem__(key, gguf.gguf_writer.GGUFValue(value, kind_of(value)))


def kind_of(value: object) -> gguf.GGUFValueType:
    return gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)


def without(key: str) -> Change:
    return lambda writer: writer.kv_data[0].pop(key)


@EVERY_LAYOUT
def test_keys_that_older_files_lack_mean_what_llama_cpp_takes_them_for(layout, tmp_path):
    """As many heads of keys as of queries, heads that share the width, turned by powers of 10000; no scaling."""
    model = make_model(layout, rope_theta=10000.0, num_key_value_heads=4, head_dim=16)

    def forget(writer: gguf.GGUFWriter) -> None:
        for key in ("rope.freq_base", "attention.head_count_kv", "attention.key_length", "attention.value_length"):
            without(f"{layout[0]}.{key}")(writer)

    old = open_weights(write(tmp_path / "old.gguf", model, layout[0], change=forget))
    assert old.config == open_weights(write(tmp_path / "whole.gguf", model, layout[0])).config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("llama.block_count"), r"llama\.block_count=None: wanted a whole number"),
        (without("llama.attention.layer_norm_rms_epsilon"), r"llama\.attention\.layer_norm_rms_epsilon=None: wanted"),
        (without("general.architecture"), r"general\.architecture=None: wanted one of llama, qwen2, qwen2moe"),
        (set_to("llama.attention.head_count_kv", [2, 1]), r"llama\.attention\.head_count_kv=\[2, 1\]: wanted a whole"),
        (set_to("llama.attention.head_count", 0), r"llama\.attention\.head_count=0 and .*: wanted a product of 64"),
        (
            set_to("llama.attention.key_length", 15),
            r".*llama\.attention\.key_length=15: wanted a product of 64, the rows of blk\.0\.attn_q\.weight",
        ),
        (set_to("llama.expert_count", 4), r"blk\.1\.ffn_gate_exps\.weight=None: wanted a matrix"),
        (set_to("llama.block_count", 3), r"llama\.block_count=3: wanted at most 2, the blocks in the file"),
        (set_to("split.count", 3), r"split\.count=3: wanted 1, the whole model in one file"),
        (set_to("tokenizer.ggml.tokens", ["a"]), r"tokenizer\.ggml\.token_type=160: wanted 1 of them"),
    ],
)
def test_what_the_metadata_lacks_or_asks_for_is_named(change, message, tmp_path):
    file = write(tmp_path / "model.gguf", make_model(), change=change)
    with pytest.raises(CheckpointError, match=rf"model\.gguf: {message}"):
        open_weights(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to("llama.expert_gating_func", 2), r"llama\.expert_gating_func=2: wanted 1, all that is supported"),
        (set_to("llama.rope.dimension_count", 8), r"llama\.rope\.dimension_count=8: wanted 16, all that is supported"),
        (set_to("llama.rope.scaling.type", "yarn"), r"llama\.rope\.scaling\.type='yarn': wanted none or linear"),
    ],
)
def test_what_only_running_needs_is_refused_where_the_model_is_to_run(change, message, tmp_path):
    file = write(tmp_path / "model.gguf", make_model(), change=change)
    weights, plain = open_weights(file), open_weights(write(tmp_path / "plain.gguf", make_model()))
    assert torch.equal(weights.get("k", 1), plain.get("k", 1)) and re.search(message, weights.reason)
    for run in (weights.model, lambda: MoEForCausalLM.from_pretrained(file)):
        with pytest.raises(ValueError, match=message):
            run()


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "embedding_length",
        "expert_count",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
    ],
)
def test_an_absurd_size_is_refused_by_its_key(key, tmp_path):
    value = 2**32 - 1
    model = make_model(("llama", "mixtral"))
    file = write(tmp_path / "model.gguf", model, change=set_to(f"llama.{key}", value))
    message = rf"model\.gguf: .*llama\.{re.escape(key)}={value}\b.*: wanted .*, the "
    for opened in (open_weights, MoEForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            opened(file)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_other_quantised_folders_are_refused_by_the_name_of_their_format(method, tmp_path):
    make_model().save_pretrained(tmp_path, model_type="llama")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"bits": 8, "quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    message = rf"config\.json: quantization_config\['quant_method'\]='{method}': wanted no quantization_config"
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path)


def test_a_vector_in_place_of_a_matrix_is_named(tmp_path):
    vector = numpy.ones(64, dtype=numpy.float32), Format.F32
    file = write(tmp_path / "model.gguf", make_model(), token_embd_weight=vector)
    with pytest.raises(CheckpointError, match=r"token_embd\.weight=\[64\]: wanted a matrix"):
        open_weights(file)


def test_a_tensor_that_no_model_has_is_unexpected(tmp_path):
    extra = numpy.ones(4, dtype=numpy.float32)
    file = write(tmp_path / "model.gguf", make_model(), change=lambda w: w.add_tensor("blk.0.ssm_a", extra))
    with pytest.raises(CheckpointError, match=r"model\.gguf: 1 tensors unexpected: blk\.0\.ssm_a"):
        open_weights(file).model()


def test_files_that_are_no_gguf_are_named(tmp_path):
    file = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match=r"model\.gguf: not found"):
        open_weights(file)
    with pytest.raises(CheckpointError, match=r"folder\.gguf: not found, or no file"):
        (tmp_path / "folder.gguf").mkdir()
        open_weights(tmp_path / "folder.gguf")
    file.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match=r"model\.gguf: GGUF magic invalid"):
        open_weights(file)
    file.write_bytes(b"GGUF\x00\x00\x00\x03" + bytes(100))
    with pytest.raises(CheckpointError, match=r"byte order='BIG': wanted LITTLE"):
        open_weights(file)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    file = write(tmp_path / "model.gguf", make_model(num_hidden_layers=1))
    content = file.read_bytes()
    header = gguf.GGUFReader(file).data_offset
    for size in [*range(4, header, 101), header, len(content) - 64]:
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=f"{size}.*: wanted|found {size} bytes, wanted a whole GGUF file"):
            open_weights(file)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    weights = open_weights(write(tmp_path / "model.gguf", make_model()))
    os.truncate(tmp_path / "model.gguf", 20_000)
    with pytest.raises(CheckpointError, match=r"model\.gguf: found \d+ bytes of \S+, wanted \d+"):
        weights.model()


def test_a_damaged_header_is_refused_or_read_but_never_crashes(tmp_path):
    file = write(tmp_path / "model.gguf", make_model(("llama", "mixtral"), num_hidden_layers=1, vocab_size=6))
    content, header = file.read_bytes(), gguf.GGUFReader(file).data_offset
    rng, refused = numpy.random.default_rng(0), 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.integers(header)] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            open_weights(file).tokens  # noqa: B018
        except CheckpointError:
            refused += 1
        except KeyError as error:
            assert "has no 'embedding'" in str(error)
    assert 30 < refused < 200
