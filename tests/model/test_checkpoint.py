"""Checkpoint folders: what is read, what is refused and how it is said, what a failing write leaves behind."""

import copy
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minimoe.model import MoEConfig, MoEForCausalLM, checkpoint, saving
from minimoe.model.checkpoint import Checkpoint, CheckpointError, load_weights
from minimoe.model.families import FAMILIES, read_config, write_config
from minimoe.model.saving import save_model

SMALL = {
    "vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "moe_intermediate_size": 8,
    "intermediate_size": 8,
    "tie_word_embeddings": False,
}
LATENT = {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3, "rope_interleave": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32, "beta_slow": 1}
YARN |= {"truncate": False, "mscale": 0.7, "mscale_all_dim": 0.5}
SIGMOID = {"score_func": "sigmoid", "e_score_correction_bias": True}
SIGMOID |= {"shared_expert_intermediate_size": 8, "mlp_only_layers": (0,)}
GPT_OSS = {"router": "topk_softmax", "moe_bias": True, "attention_sinks": True, "swiglu_limit": 2.0}
GPT_OSS |= {"sliding_window": 4, "layer_types": ("sliding_attention", "full_attention")}
LAYOUTS = {
    "llama": {"num_experts": 0},
    "mistral": {"num_experts": 0, "sliding_window": 4},
    "qwen2": {"num_experts": 0, "attention_bias": True},
    "qwen3": {"num_experts": 0, "qk_norm": "head"},
    "mixtral": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 8, "shared_expert_gate": True, "norm_topk_prob": False},
    "qwen3_moe": {"qk_norm": "head", "decoder_sparse_step": 2},
    "olmoe": {"qk_norm": "full", "clip_qkv": 2.0},
    "deepseek_v2": LATENT | {"shared_expert_intermediate_size": 16, "norm_topk_prob": False, "n_group": 2},
    "deepseek_v3": SIGMOID | LATENT | {"q_lora_rank": 6},
    "glm4_moe": SIGMOID | {"head_dim": 8, "partial_rotary_factor": 0.5},
    "gpt_oss": GPT_OSS,
    "pangu_pro_moe": {
        "attention_bias": True,
        "attention_output_bias": True,
        "router": "grouped",
        "router_scale": True,
        "n_group": 2,
        "shared_expert_intermediate_size": 8,
    },
    "minimoe": {"router": "switch", "num_experts_per_tok": 1, "capacity_factor": 1.5},
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
LAYER = "model.layers.1."
IN_ITS_OWN_PROCESS = pytest.mark.exact("runs in a process of its own, where nothing is perturbed")


def small_model(seed: int = 0, **settings) -> MoEForCausalLM:
    return MoEForCausalLM(MoEConfig(**{**SMALL, **settings}), seed=seed).eval()


def assert_same_model(a: MoEForCausalLM, b: MoEForCausalLM) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def mixtral(tmp_path) -> Path:
    """A single-file checkpoint."""
    small_model().save_pretrained(tmp_path / "mixtral", model_type="mixtral")
    return tmp_path / "mixtral"


@pytest.fixture
def sharded(tmp_path) -> Path:
    """The same model in several files."""
    save_model(small_model(), tmp_path / "sharded", model_type="mixtral", max_shard_size=6000)
    return tmp_path / "sharded"


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# -- what is written comes back


def test_every_router_comes_back_to_the_bit_in_our_own_layout(router_settings, tmp_path):
    model = small_model(**router_settings)
    if model.config.e_score_correction_bias:
        for block in model.model.layers:
            block.mlp.gate.e_score_correction_bias.normal_()
    model.save_pretrained(tmp_path)
    back = MoEForCausalLM.from_pretrained(tmp_path)
    assert back.config == model.config
    assert_same_model(back, model)
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)  # float32, added up anew


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back_to_the_bit_in_every_dtype(layout, tmp_path):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        model = small_model(**LAYOUTS[layout]).to(dtype)
        save_model(model, tmp_path / "one", model_type=layout)
        save_model(model, tmp_path / "many", model_type=layout, max_shard_size=3000)
        assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
        for folder in (tmp_path / "one", tmp_path / "many"):
            back = MoEForCausalLM.from_pretrained(folder)
            assert back.config.model_type == layout
            assert back.lm_head.weight.dtype == dtype
            assert_same_model(back, model)


@given(data=st.data())
def test_a_configuration_that_a_family_expresses_survives_it(data):
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    settings = {
        **SMALL,
        **LAYOUTS[layout],
        "num_key_value_heads": 2 if layout.startswith("deepseek") else data.draw(st.sampled_from([1, 2])),
        "rope_theta": data.draw(st.floats(100, 1e7)),
        "rms_norm_eps": data.draw(st.sampled_from([1e-5, 1e-6])),
        "initializer_range": data.draw(st.sampled_from([0.01, 0.02])),
        "max_position_embeddings": data.draw(st.integers(8, 4096)),
        "tie_word_embeddings": data.draw(st.booleans()),
        "rope_scaling": data.draw(st.sampled_from([None, {"rope_type": "linear", "factor": 2.5}, YARN])),
    }
    if layout not in ("llama", "mistral", "qwen2", "qwen3"):
        settings["router_aux_loss_coef"] = data.draw(st.sampled_from([0.0, 0.01]))
        settings["router_z_loss_coef"] = data.draw(st.sampled_from([0.0, 0.001]))
    config = MoEConfig(**settings, model_type=layout)
    raw = json.loads(json.dumps(write_config(config, None, "float32")))
    back = read_config(raw)
    assert write_config(back, None, "float32") == write_config(config, None, "float32")
    for name in settings.keys() - ({"moe_intermediate_size"} if config.num_experts == 0 else set()):
        assert getattr(back, name) == getattr(config, name), name


def test_loaded_parameters_can_be_trained(mixtral):
    model = MoEForCausalLM.from_pretrained(mixtral)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(IDS, labels=IDS).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_weights_are_not_read_as_integers(mixtral):
    with pytest.raises(ValueError, match=r"dtype=torch\.int8: wanted one of torch\.float64, torch\.float32"):
        MoEForCausalLM.from_pretrained(mixtral, dtype=torch.int8)


def test_dtype_of_a_loaded_model(mixtral):
    assert MoEForCausalLM.from_pretrained(mixtral, dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    assert Checkpoint(mixtral).dtype == torch.float32
    edit_json(mixtral / "config.json", dtype="bfloat16", torch_dtype="bfloat16")
    assert Checkpoint(mixtral).dtype == torch.float32  # what is stored decides: nothing is rounded unasked


def test_mixed_dtypes_are_widened_so_that_nothing_is_lost(mixtral):
    def narrow(tensors):
        for name in tensors:
            if "gate" not in name:
                tensors[name] = tensors[name].bfloat16()

    expected = load_file(mixtral / "model.safetensors")[f"{LAYER}block_sparse_moe.gate.weight"]
    edit_tensors(mixtral, narrow)
    model = MoEForCausalLM.from_pretrained(mixtral)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.layers[1].mlp.gate.weight, expected)


def test_weights_go_into_a_model_that_exists(mixtral):
    model = small_model(seed=5)
    load_weights(model, Checkpoint(mixtral))
    assert_same_model(model, small_model())


def test_tied_embeddings(tmp_path):
    model = small_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path, model_type="mixtral")
    assert "lm_head.weight" not in Checkpoint(tmp_path)
    assert_same_model(MoEForCausalLM.from_pretrained(tmp_path), model)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same_model(MoEForCausalLM.from_pretrained(tmp_path), model)  # stored all the same, and equal
    edit_tensors(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    untied = MoEForCausalLM.from_pretrained(tmp_path)  # as transformers does, the head that is stored
    assert not untied.config.tie_word_embeddings
    assert torch.equal(untied.lm_head.weight, model.lm_head.weight + 1)
    assert torch.equal(untied.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_rotary_buffers_of_old_files_are_ignored(mixtral):
    edit_tensors(mixtral, lambda t: t.update({f"{LAYER}self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert_same_model(MoEForCausalLM.from_pretrained(mixtral), small_model())


def test_a_checkpoint_reads_like_a_dictionary(sharded):
    opened = Checkpoint(sharded)
    name = f"{LAYER}block_sparse_moe.experts.2.w3.weight"
    assert name in opened
    assert "lm_head" not in opened
    assert len(opened) == len(list(opened)) == len(set(opened))
    assert opened.shape(name) == (8, 16)
    assert torch.equal(opened[name], small_model().model.layers[1].mlp.experts.up_proj[2])
    assert opened.hf_config["model_type"] == "mixtral"
    with pytest.raises(CheckpointError, match="no tensor 'lm_head' among the"):
        opened["lm_head"]


def test_a_hugging_face_cache_is_read_through_its_links(sharded, tmp_path):
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "abc", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sharded.iterdir()):
        os.replace(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert_same_model(MoEForCausalLM.from_pretrained(snapshot), small_model())


# -- what one tensor costs


def run_python(code: str, *arguments: object) -> dict:
    """Run `code` in a fresh process, where memory can be measured; it prints JSON."""
    prelude = """
    import json, os, resource, sys, torch
    from minimoe.model import MoEForCausalLM
    from minimoe.model.checkpoint import Checkpoint
    from minimoe.model.saving import save_model
    torch.set_num_threads(1)
    def peak():  # in megabytes; Linux's ru_maxrss would count the parent process as well
        if sys.platform == "linux":
            return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1e3
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    def handles():
        return len(os.listdir("/dev/fd"))
    torch.randn(300, 300).exp().sum()
    """
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "100000",  # glibc then gives freed tensors back at once, however its heap lies
    }
    script = textwrap.dedent(prelude) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@IN_ITS_OWN_PROCESS
def test_one_tensor_costs_one_tensors_memory(tmp_path):
    """100 MB in ten tensors: opening costs the header, reading them one after the other costs one, or two."""
    count, size = 10, 10_000_000
    header = {
        f"t{i}": {"dtype": "F32", "shape": [size // 4], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(count)
    }
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + count * size)  # zeros, of which the disk holds nothing
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    code = """
    before, open_before = peak(), handles()
    checkpoint = Checkpoint(sys.argv[1])
    opened = peak()
    for name in checkpoint:
        assert checkpoint[name][-1] == 0
    print(json.dumps([opened - before, peak() - before, handles() - open_before]))
    """
    opened, streamed, leaked = run_python(code, tmp_path)
    assert leaked == 0
    assert opened < 5
    assert 5 < streamed < 25


@IN_ITS_OWN_PROCESS
def test_loading_costs_the_model_and_one_tensor_and_saving_one_shard(tmp_path):
    """Experts of 0.5 MB each, 96 of them, 49 MB in all: read one by one into the fused tensors."""
    config = MoEConfig(
        vocab_size=64,
        hidden_size=128,
        num_hidden_layers=1,
        num_experts=96,
        moe_intermediate_size=340,
    )
    save_model(MoEForCausalLM(config), tmp_path / "big", max_shard_size=5_000_000)
    code = """
    before = peak()
    model = MoEForCausalLM.from_pretrained(sys.argv[1])
    loaded = peak()
    save_model(model, sys.argv[2], max_shard_size=5_000_000)
    parameters = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    print(json.dumps([parameters, loaded - before, peak() - loaded]))
    """
    parameters, loading, saving = run_python(code, tmp_path / "big", tmp_path / "again")
    assert 45 < parameters < 55
    assert loading < parameters + 8
    assert saving < 15


# -- where it goes


def test_a_model_is_read_onto_a_device_tensor_by_tensor(mixtral):
    """On "meta" there is room for any of them, and nothing to compare."""
    model = MoEForCausalLM.from_pretrained(mixtral, device="meta", dtype=torch.bfloat16)
    assert {(tensor.device.type, tensor.dtype) for tensor in model.state_dict().values()} == {("meta", torch.bfloat16)}
    with torch.device("meta"):
        model = MoEForCausalLM.from_pretrained(mixtral)
    assert_same_model(model, small_model())


# -- what is refused


@pytest.mark.parametrize("layout", ["pangu_pro_moe", "minimoe"])
def test_a_number_that_is_not_finite_is_named_in_every_tensor(layout, tmp_path):
    """Its tensor, value, place and how many there are; without the check it is loaded as it is."""
    small_model(**LAYOUTS[layout]).save_pretrained(tmp_path, model_type=layout)
    whole = load_file(tmp_path / "model.safetensors")
    for number, (name, tensor) in enumerate(whole.items()):
        wrong, place = tensor.clone(), [size // 2 for size in tensor.shape]
        value = (math.nan, math.inf, -math.inf)[number % 3]
        wrong[tuple(place)] = value
        save_file(whole | {name: wrong}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError) as caught:
            MoEForCausalLM.from_pretrained(tmp_path)
        assert str(caught.value) == f"{tmp_path}: {name}: {value} at {place}, wanted finite numbers (1 are not)"
    model = MoEForCausalLM.from_pretrained(tmp_path, check_finite=False)
    assert sum(int((~tensor.isfinite()).sum()) for tensor in model.state_dict().values()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_whose_sum_overflows_are_finite_and_opposite_infinities_are_not(dtype):
    large = torch.full((4, 50), torch.finfo(dtype).max, dtype=dtype)
    assert checkpoint.is_finite(large) and checkpoint.is_finite(-large) and checkpoint.is_finite(large[:0])
    for wrong in ([math.inf, -math.inf], [math.nan, 0.0], [math.inf, 0.0], [-math.inf, 1.0]):
        large[1, :2] = torch.tensor(wrong)
        assert not checkpoint.is_finite(large)


def test_a_number_that_a_narrower_dtype_makes_infinite_is_named(mixtral):
    edit_tensors(mixtral, lambda t: t["model.norm.weight"][3].fill_(1e5))
    assert MoEForCausalLM.from_pretrained(mixtral).model.norm.weight[3] == 1e5
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds 100000, wanted what fits into torch.float16"):
        MoEForCausalLM.from_pretrained(mixtral, dtype=torch.float16)


def missing_tensors(folder):
    edit_tensors(folder, lambda t: [t.pop(f"{LAYER}block_sparse_moe.experts.3.w{part}.weight") for part in (1, 2, 3)])
    return (
        r"3 tensors missing: model\.layers\.1\.block_sparse_moe\.experts\.3\.w1\.weight, \S+w2\.weight, \S+w3\.weight$"
    )


def unexpected_tensor(folder):
    edit_tensors(folder, lambda t: t.update({f"{LAYER}self_attn.q_proj.bias": torch.zeros(16)}))
    return r"1 tensors unexpected: model\.layers\.1\.self_attn\.q_proj\.bias"


def wrong_shape(folder):
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(17)}))
    return r"1 tensors of the wrong shape: model\.norm\.weight is \[17\], wanted \[16\]"


def many_problems(folder):
    def change(tensors):
        for name in [name for name in tensors if ".w1." in name]:
            tensors[name.replace("w1", "w9")] = tensors.pop(name)

    edit_tensors(folder, change)
    return r"8 tensors missing: .*w1.weight, .*w1.weight, .*w1.weight and 5 more; 8 tensors unexpected: .* and 5 more"


def too_few_experts(folder):
    edit_json(folder / "config.json", num_local_experts=3)
    return r"6 tensors unexpected: .*experts\.3\.w1.* 2 tensors of the wrong shape: .* is \[4, 16\], wanted \[3, 16\]"


def nan_in_router(folder):
    edit_tensors(folder, lambda t: t[f"{LAYER}block_sparse_moe.gate.weight"][2].fill_(float("nan")))
    return r"layers\.1\.block_sparse_moe\.gate\.weight: nan at \[2, 0\], wanted finite numbers \(16 are not\)"


def infinity_in_router(folder):
    edit_tensors(folder, lambda t: t[f"{LAYER}block_sparse_moe.gate.weight"][1, 5].fill_(float("-inf")))
    return r"layers\.1\.block_sparse_moe\.gate\.weight: -inf at \[1, 5\], wanted finite numbers \(1 are not\)"


def eight_bits(folder):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}))
    return r"model\.safetensors: lm_head\.weight is stored as F8_E4M3, wanted one of F64, F32, F16, BF16"


def integers(folder):
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}))
    return r"model\.safetensors: model\.norm\.weight is stored as I8, wanted one of F64, F32, F16, BF16"


def truncated(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 5)
    return rf"model\.safetensors: found {file.stat().st_size} bytes, wanted a whole safetensors file"


def corrupt_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"\xff" * 20 + file.read_bytes()[28:])
    return r"model\.safetensors: found \d+ bytes, wanted a whole safetensors file"


def endless_header(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    return r"model\.safetensors: found 64 bytes, wanted a whole safetensors file"


def empty_file(folder):
    (folder / "model.safetensors").write_bytes(b"")
    return r"model\.safetensors: found 0 bytes, wanted a whole safetensors file"


def no_config(folder):
    (folder / "config.json").unlink()
    return r"config\.json: not found"


def malformed_config(folder):
    (folder / "config.json").write_text('{"model_type": "mixtral",', encoding="utf-8")
    return r"config\.json: wanted JSON, found something else \(Expecting property name"


def binary_config(folder):
    (folder / "config.json").write_bytes(b"\x80\x81\x82")
    return r"config\.json: wanted JSON, found something else \(.*codec can't decode"


def list_as_config(folder):
    (folder / "config.json").write_text("[1, 2]", encoding="utf-8")
    return r"config\.json: wanted a JSON object, found list"


def key_twice(folder):
    (folder / "config.json").write_text('{"model_type": "mixtral", "model_type": "llama"}', encoding="utf-8")
    return r"config\.json: .*the key 'model_type' appears twice"


def unknown_model_type(folder):
    edit_json(folder / "config.json", model_type="gpt2")
    return rf"config\.json: model_type='gpt2': wanted one of {', '.join(FAMILIES)}"


def no_model_type(folder):
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return r"config\.json: model_type=None: wanted one of llama"


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return r"mixtral: found neither model\.safetensors nor model\.safetensors\.index\.json"


@pytest.mark.parametrize(
    "damage",
    [
        missing_tensors,
        unexpected_tensor,
        wrong_shape,
        many_problems,
        too_few_experts,
        nan_in_router,
        eight_bits,
        integers,
        truncated,
        corrupt_header,
        empty_file,
        no_config,
        malformed_config,
        key_twice,
        unknown_model_type,
        no_model_type,
        no_weights,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_folder_is_refused(damage, mixtral):
    message = damage(mixtral)
    with pytest.raises(CheckpointError, match=message):
        MoEForCausalLM.from_pretrained(mixtral)


def shard_missing(folder):
    (folder / "model-00002-of-00005.safetensors").unlink()
    return r"index\.json: names 'model-00002-of-00005\.safetensors', which is missing"


def shard_truncated(folder):
    os.truncate(folder / "model-00003-of-00005.safetensors", 100)
    return r"model-00003-of-00005\.safetensors: found 100 bytes, wanted a whole safetensors file"


def absolute_path(folder):
    outside = folder.parent / "elsewhere.safetensors"
    os.replace(folder / "model-00001-of-00005.safetensors", outside)
    edit_index(folder, "model-00001-of-00005.safetensors", str(outside))
    return r"index\.json: names '/.*elsewhere\.safetensors', which lies outside the folder"


def dotted_path(folder):
    os.replace(folder / "model-00001-of-00005.safetensors", folder.parent / "elsewhere.safetensors")
    edit_index(folder, "model-00001-of-00005.safetensors", "../elsewhere.safetensors")
    return r"index\.json: names '\.\./elsewhere\.safetensors', which lies outside the folder"


def link_outside(folder):
    shard = folder / "model-00001-of-00005.safetensors"
    os.replace(shard, folder.parent / "elsewhere.safetensors")
    shard.symlink_to(folder.parent / "elsewhere.safetensors")
    return r"index\.json: names 'model-00001-of-00005\.safetensors', which lies outside the folder"


def tensor_not_in_its_shard(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00005.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return r"lists model\.norm\.weight in model-00001-of-00005\.safetensors, found it in model-00005-of-00005"


def tensor_nowhere(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00005.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return r"lists model\.extra\.weight in model-00001-of-00005\.safetensors, found it in no file"


def tensor_not_in_the_index(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return r"lists model\.norm\.weight in no file, found it in model-00005-of-00005\.safetensors"


def tensor_in_two_shards(folder):
    shard = folder / "model-00001-of-00005.safetensors"
    save_file(load_file(shard) | {"model.norm.weight": torch.ones(16)}, shard)
    return r"model\.norm\.weight is stored twice, in model-00001-of-00005\.safetensors and in model-00005-of-00005"


def no_weight_map(folder):
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}', encoding="utf-8")
    return r"index\.json: weight_map is None, wanted an object of file names"


def numbers_in_weight_map(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": 3}}', encoding="utf-8")
    return r"index\.json: weight_map is \{'model\.norm\.weight': 3\}, wanted an object of file names"


def edit_index(folder: Path, old: str, new: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text(encoding="utf-8").replace(json.dumps(old), json.dumps(new)), encoding="utf-8")


@pytest.mark.parametrize(
    "damage",
    [
        shard_missing,
        shard_truncated,
        absolute_path,
        dotted_path,
        link_outside,
        tensor_not_in_its_shard,
        tensor_nowhere,
        tensor_not_in_the_index,
        tensor_in_two_shards,
        no_weight_map,
        numbers_in_weight_map,
    ],
    ids=lambda damage: damage.__name__,
)
def test_shards_and_an_index_that_disagree_are_refused(damage, sharded):
    assert_same_model(MoEForCausalLM.from_pretrained(sharded), small_model())
    message = damage(sharded)
    with pytest.raises(CheckpointError, match=message):
        MoEForCausalLM.from_pretrained(sharded)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 4040256\n"
WEB_PAGE = b"\n<!DOCTYPE HTML><html><body>Log in</body></html>"
ELSE = {
    "a Git LFS pointer, which stands for a file": LFS_POINTER,
    "a web page, as downloads give that want a login": WEB_PAGE,
    "a zip archive, as torch.save writes: a pickle": b"PK\x03\x04" + bytes(100),
    "a pickle, and reading a pickle runs whatever code it holds": pickle.dumps({"a": 1}),
    "a GGUF file, whose name ends in .gguf": b"GGUF\x03" + bytes(100),
}


@pytest.mark.parametrize("kind", ELSE)
def test_a_file_that_is_something_else_is_called_what_it_is(kind, mixtral, sharded):
    weights, shard = mixtral / "model.safetensors", sharded / "model-00002-of-00005.safetensors"
    for folder, file in ((mixtral, weights), (sharded, shard)):
        file.write_bytes(ELSE[kind])
        with pytest.raises(CheckpointError, match=rf"{file.name}: found \d+ bytes, {kind}.*, wanted a whole safe"):
            Checkpoint(folder)
    (mixtral / "config.json").write_bytes(ELSE[kind])
    with pytest.raises(CheckpointError, match=rf"config\.json: wanted JSON, found {kind}"):
        Checkpoint(mixtral)


def test_a_folder_that_is_no_model_is_called_what_it_is(mixtral, tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "a" / name).write_text("{}", encoding="utf-8")
    message = r"config\.json: not found; the folder holds a tokenizer alone: tokenizer\.json, tokenizer_config\.json$"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: not found; the folder holds an adapter \(adapter_config"):
        Checkpoint(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for part in "dcab":
        (tmp_path / "b" / f"{part}.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"not found; found a\.gguf, b\.gguf, c\.gguf: a GGUF file is read from"):
        Checkpoint(tmp_path / "b")
    os.replace(mixtral / "model.safetensors", mixtral / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"found neither .*; name one of these to read it: model\.fp16\.safe"):
        Checkpoint(mixtral)
    assert_same_model(MoEForCausalLM.from_pretrained(mixtral / "model.fp16.safetensors"), small_model())


def test_other_weights_in_the_folder_are_said_to_be_unread(mixtral, sharded):
    """One file beats an index, as in transformers; copies are not worth a word."""
    assert Checkpoint(mixtral).unread == Checkpoint(sharded).unread == []
    shutil.copy(mixtral / "model.safetensors", mixtral / "copy.safetensors")
    assert Checkpoint(mixtral).unread == []
    shutil.copytree(sharded, mixtral, dirs_exist_ok=True)
    edit_tensors(mixtral, lambda tensors: tensors["model.norm.weight"].add_(1))
    (mixtral / "pytorch_model.bin").write_bytes(b"")
    opened = Checkpoint(mixtral)
    shards = sorted(file.name for file in sharded.glob("model-*.safetensors"))
    assert [file.name for file in opened.files] == ["model.safetensors"]
    assert opened.unread == ["copy.safetensors", *shards, "pytorch_model.bin"]
    assert Checkpoint(mixtral / "copy.safetensors").unread == []


def test_what_is_no_folder_is_refused(mixtral, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: found nothing, wanted a folder with config\.json"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: found a file, wanted a folder with config\.json"):
        Checkpoint(mixtral / "config.json")


def test_a_file_that_shrinks_while_it_is_in_use_is_noticed(mixtral):
    opened = Checkpoint(mixtral)
    os.truncate(mixtral / "model.safetensors", 9000)
    names = iter(opened)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: found \d+ bytes of \S+, wanted \d+"):
        for name in names:
            opened[name]


def test_a_refused_checkpoint_leaves_the_model_as_it_was(mixtral):
    model = small_model(seed=5)
    message = wrong_shape(mixtral)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, Checkpoint(mixtral), dtype=torch.bfloat16)
    assert_same_model(model, small_model(seed=5))
    assert model.lm_head.weight.dtype == torch.float32


CONFIG_REFUSALS = [
    ("mixtral", {"hidden_act": "gelu"}, r"hidden_act='gelu': wanted 'silu'"),
    ("llama", {"mlp_bias": True}, r"mlp_bias=True: wanted False"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, r"\['quant_method'\]='gptq': wanted no quantization"),
    ("qwen2", {"use_sliding_window": True}, r"use_sliding_window=True: wanted False"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types=\[.*\]: wanted 'full_attention'"),
    ("mixtral", {"sliding_window": 0}, r"sliding_window=0: wanted a whole number of at least 1"),
    ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5: wanted 1"),
    *(
        (family, {key: {name: kind, "factor": 2.0}}, rf"{key}\['rope_type'\]='{kind}': wanted one of default, linear")
        for family, key, name, kind in [
            ("qwen2_moe", "rope_parameters", "rope_type", "proportional"),
            ("llama", "rope_scaling", "type", "dynamic"),
            ("olmoe", "rope_scaling", "rope_type", "longrope"),
            ("pangu_pro_moe", "rope_scaling", "type", "su"),
        ]
    ),
    ("llama", {"rope_scaling": {"type": "linear"}}, r"rope_scaling\['factor'\]=None: wanted a positive number"),
    ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, r"wanted one set of rope parameters"),
    ("llama", {"rope_scaling": "linear"}, r"rope_scaling='linear': wanted an object"),
    ("llama", {"rope_theta": "10000"}, r"rope_theta='10000': wanted a positive number"),
    ("llama", {"hidden_size": "64"}, r"hidden_size='64': wanted a whole number"),
    ("qwen3_moe", {"mlp_only_layers": 3}, r"mlp_only_layers=3: wanted a list"),
    ("qwen3_moe", {"mlp_only_layers": [99]}, r"mlp_only_layers=99: wanted layers from 0 to 23"),
    ("mixtral", {"num_local_experts": 0}, r"num_local_experts=0: wanted at least 1"),
    ("deepseek_v3", {"scoring_func": "softmax"}, r"scoring_func='softmax': wanted 'sigmoid'"),
    ("deepseek_v3", {"topk_method": "greedy"}, r"topk_method='greedy': wanted noaux_tc"),
    ("deepseek_v3", {"first_k_dense_replace": 99}, r"first_k_dense_replace=99: wanted .* at most num_hidden_layers=61"),
    ("deepseek_v3", {"n_shared_experts": None}, r"n_shared_experts=None: wanted a whole number from 0 on"),
    ("deepseek_v3", {"moe_layer_freq": 2}, r"moe_layer_freq=2: wanted 1"),
    ("deepseek_v3", {"kv_lora_rank": None}, r"qk_nope_head_dim=128: wanted None, as kv_lora_rank=None"),
]


@pytest.mark.parametrize(("family", "changes", "message"), CONFIG_REFUSALS)
def test_a_configuration_that_asks_for_more_is_refused(family, changes, message):
    assert read_config({"model_type": family}).model_type == family
    with pytest.raises(ValueError, match=message):
        read_config({"model_type": family, **changes})


def test_what_does_not_change_the_function_is_no_reason_to_refuse():
    for family, changes in (
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
        ("mixtral", {"sliding_window": None}),
        ("mixtral", {"router_jitter_noise": 0.1}),
        ("llama", {"attention_dropout": 0.1, "mlp_bias": False, "pretraining_tp": 1}),
        ("qwen3", {"layer_types": ["full_attention"] * 32}),
    ):
        assert read_config({"model_type": family, **changes}) == read_config({"model_type": family})


def test_groups_of_deepseek_v2_count_where_its_method_says_so():
    said = {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3}
    for method, groups in (("greedy", (1, 1)), ("group_limited_greedy", (8, 3))):
        config = read_config(said | {"topk_method": method})
        assert (config.n_group, config.topk_group) == groups
        raw = write_config(config, None, "float32")
        assert raw["topk_method"] == method and read_config(raw) == config


def test_the_balance_loss_of_deepseek():
    """Published configurations say how to take a loss whose coefficient may be 0."""
    said = {"model_type": "deepseek_v3", "seq_aux": True}
    assert not read_config(said | {"aux_loss_alpha": 0.0}).seq_aux
    config = read_config(said | {"aux_loss_alpha": 1e-4})
    assert config.seq_aux and config.router_aux_loss_coef == 1e-4
    assert read_config(write_config(config, None, "float32")) == config


@pytest.mark.parametrize("layout", ["deepseek_v3", "glm4_moe"])
def test_layers_that_predict_further_on_are_skipped_by_name(layout, tmp_path):
    """After the last layer, as DeepSeek-V3 and GLM-4.5 have them: a block, and what joins it to the model."""
    model = small_model(**LAYOUTS[layout])
    model.save_pretrained(tmp_path, model_type=layout)

    def add_a_layer(tensors) -> None:
        last = {name: tensor for name, tensor in tensors.items() if name.startswith(LAYER)}
        tensors |= {name.replace(".1.", ".2.", 1): tensor.clone() for name, tensor in last.items()}
        tensors |= {"model.layers.2.eh_proj.weight": torch.ones(16, 32), "model.layers.2.enorm.weight": torch.ones(16)}

    edit_tensors(tmp_path, add_a_layer)
    assert_same_model(MoEForCausalLM.from_pretrained(tmp_path), model)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.2.eh_proj.weight"))  # then it is any layer
    with pytest.raises(CheckpointError, match=r"tensors unexpected: model\.layers\.2\."):
        MoEForCausalLM.from_pretrained(tmp_path)


INEXPRESSIBLE = [
    ("mixtral", {"attention_bias": True}, r"attention_bias=True: wanted False"),
    ("mixtral", {"shared_expert_intermediate_size": 8}, r"shared_expert_intermediate_size=8: wanted 0"),
    ("mixtral", {"capacity_factor": 1.0}, r"capacity_factor=1\.0: wanted None"),
    ("mixtral", {"num_experts": 0}, r"num_local_experts=0: wanted at least 1"),
    ("qwen2_moe", {}, r"shared_expert_gate=False: wanted True"),
    ("qwen3_moe", {"qk_norm": "head", "score_func": "sigmoid"}, r"score_func='sigmoid': wanted 'softmax'"),
    ("olmoe", {"qk_norm": "full", "head_dim": 4}, r"head_dim=4: wanted 8"),
    ("olmoe", {"qk_norm": "full", "n_group": 2, "topk_group": 2}, r"n_group=2: wanted 1"),
    ("pangu_pro_moe", {}, r"attention_bias=False: wanted True; .*router='topk': wanted 'grouped'"),
    ("llama", {}, r"num_experts=4: wanted 0"),
    ("qwen2", {"num_experts": 0}, r"attention_bias=False: wanted True"),
    ("deepseek_v3", SIGMOID, r"kv_lora_rank=None: wanted a number for model_type='deepseek_v3'"),
    ("deepseek_v3", SIGMOID | LATENT | {"mlp_only_layers": (1,)}, r"mlp_only_layers=\(1,\): wanted \(0,\)"),
    ("glm4_moe", SIGMOID | {"shared_expert_intermediate_size": 12}, r"shared_expert_intermediate_size=12: wanted 8"),
]


@pytest.mark.parametrize(("family", "settings", "message"), INEXPRESSIBLE)
def test_what_a_family_cannot_express_is_refused_by_name(family, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        small_model(**settings).save_pretrained(tmp_path / "new", model_type=family)
    assert not (tmp_path / "new").exists()


def test_an_unknown_family_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ValueError, match=f"model_type='gpt2': wanted one of {', '.join(FAMILIES)}"):
        small_model().save_pretrained(tmp_path, model_type="gpt2")


# -- nothing in a checkpoint runs


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.ckpt"])
def test_a_pickle_is_refused_unread(name, mixtral, tmp_path):
    (mixtral / "model.safetensors").unlink()
    (mixtral / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match=rf"{name}: a pickle, .* runs whatever code it holds; wanted model\.safe"):
        MoEForCausalLM.from_pretrained(mixtral)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_beside_safetensors_is_ignored(mixtral, tmp_path):
    (mixtral / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert_same_model(MoEForCausalLM.from_pretrained(mixtral), small_model())
    assert not (tmp_path / "sprung").exists()


def test_code_in_a_checkpoint_never_runs(mixtral, tmp_path):
    for name in ("modeling_custom.py", "configuration_custom.py", "__init__.py"):
        (mixtral / name).write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n", encoding="utf-8")
    auto_map = {"AutoConfig": "configuration_custom.Config", "AutoModelForCausalLM": "modeling_custom.Model"}
    edit_json(mixtral / "config.json", auto_map=auto_map, trust_remote_code=True, architectures=["modeling_custom.M"])
    assert_same_model(MoEForCausalLM.from_pretrained(mixtral), small_model())
    assert not (tmp_path / "sprung").exists()


# -- writing


def test_shards_keep_to_their_size_and_the_index_to_the_truth(tmp_path):
    save_model(small_model(), tmp_path, max_shard_size=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    stored = {file.name: load_file(file) for file in tmp_path.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in stored.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in stored.values() for t in tensors.values())
    assert sorted(stored) == [f"model-{i + 1:05d}-of-{len(stored):05d}.safetensors" for i in range(len(stored))]
    assert all(sum(t.nbytes for t in tensors.values()) <= 4000 for tensors in stored.values())
    for file in stored:
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_others_may_read_what_is_saved(tmp_path):
    save_model(small_model(), tmp_path / "new", max_shard_size=6000)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "new").iterdir()} == {0o644}


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    save_model(small_model(), tmp_path, max_shard_size=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(Checkpoint(tmp_path))
    assert_same_model(MoEForCausalLM.from_pretrained(tmp_path), small_model())


def test_saving_copies_no_parameter(monkeypatch, tmp_path):
    model = small_model()
    memory = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    seen = []

    def spy(tensors, *arguments, **settings):
        seen.extend(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
        save_file(tensors, *arguments, **settings)

    monkeypatch.setattr(saving, "save_file", spy)
    save_model(model, tmp_path)
    assert len(seen) > 30
    assert set(seen) == memory


SAVES = {"one": {}, "many": {"max_shard_size": 6000}, "few": {"max_shard_size": 14000}}


@pytest.mark.parametrize(("first", "second"), [("one", "one"), ("one", "many"), ("many", "one"), ("many", "few")])
def test_a_second_save_replaces_the_first_and_leaves_the_rest(first, second, tmp_path):
    tmp_path.joinpath("notes.txt").write_text("mine", encoding="utf-8")
    save_model(small_model(), tmp_path, **SAVES[first])
    new = small_model(seed=8, num_experts=5)
    save_model(new, tmp_path, **SAVES[second])
    assert_same_model(MoEForCausalLM.from_pretrained(tmp_path), new)
    save_model(new, tmp_path.parent / "alone", **SAVES[second])
    assert files(tmp_path) == files(tmp_path.parent / "alone") | {"notes.txt": b"mine"}
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == []


def test_a_tokenizer_travels_with_its_model_byte_by_byte(tmp_path):
    text = '{"model": "\\u00e9 é\r\n"}'
    model = small_model()
    assert model.tokenizer_json is None
    model.tokenizer_json = text
    model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == text.encode()
    back = MoEForCausalLM.from_pretrained(tmp_path / "a")
    assert back.tokenizer_json == copy.deepcopy(back).half().tokenizer_json == text
    (tmp_path / "a" / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: wanted text in UTF-8, found something else"):
        MoEForCausalLM.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(("first", "second"), [("one", "one"), ("one", "many"), ("many", "one"), ("many", "few")])
def test_weights_never_lie_beside_the_tokenizer_of_another_model(first, second, tmp_path):
    old, new = small_model(), small_model(seed=8)
    old.tokenizer_json = "old"
    save_model(old, tmp_path, **SAVES[first])
    save_model(new, tmp_path, **SAVES[second])
    assert not (tmp_path / "tokenizer.json").exists()
    new.tokenizer_json = "new"
    save_model(new, tmp_path, **SAVES[first])
    save_model(old, tmp_path, **SAVES[second])
    assert MoEForCausalLM.from_pretrained(tmp_path).tokenizer_json == "old"


def test_a_tokenizer_that_waits_for_its_model_stays_unless_one_comes(tmp_path):
    tmp_path.joinpath("tokenizer.json").write_text("first", encoding="utf-8")
    model = small_model()
    save_model(model, tmp_path)
    assert tmp_path.joinpath("tokenizer.json").read_text(encoding="utf-8") == "first"
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    model.tokenizer_json = "own"
    save_model(model, tmp_path)
    assert tmp_path.joinpath("tokenizer.json").read_text(encoding="utf-8") == "own"


class Failure(Exception):
    pass


def fail() -> None:
    raise Failure


def failing(function, on_call: int, fail=fail):
    """`function`, but its `on_call`-th call fails before it does anything."""
    calls = 0

    def wrapper(*arguments, **settings):
        nonlocal calls
        calls += 1
        if calls == on_call:
            fail()
        return function(*arguments, **settings)

    return wrapper


@pytest.mark.parametrize(
    ("first", "second", "tokenizers"),
    [
        ("one", "one", ("a", "b")),
        ("one", "many", (None, "b")),
        ("many", "one", ("a", None)),
        ("many", "few", ("a", "b")),
    ],
    ids=str,
)
def test_a_failing_write_leaves_everything_as_it_was(first, second, tokenizers, monkeypatch, tmp_path):
    """Every write and every move fails once, in turn, until the save gets through."""
    old, new = small_model(), small_model(seed=8)
    old.tokenizer_json, new.tokenizer_json = tokenizers
    save_model(old, tmp_path, **SAVES[first])
    tmp_path.joinpath("notes.txt").write_text("mine", encoding="utf-8")
    before = files(tmp_path)
    failures = 0
    for module, name in ((saving, "save_file"), (saving, "_write_json"), (os, "replace")):
        for on_call in range(1, 99):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, failing(getattr(module, name), on_call))
                try:
                    save_model(new, tmp_path, **SAVES[second])
                except Failure:
                    assert files(tmp_path) == before
                    assert not any(entry.is_dir() for entry in tmp_path.iterdir())
                    failures += 1
                    continue
            save_model(old, tmp_path, **SAVES[first])
            break
    assert failures >= 3


def test_a_failing_first_save_leaves_no_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(saving, "save_file", failing(save_file, 2))
    with pytest.raises(Failure):
        save_model(small_model(), tmp_path / "new", max_shard_size=6000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_and_leaves_the_old_model(monkeypatch, tmp_path):
    save_model(small_model(), tmp_path)

    def no_space(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_model(small_model(seed=8), tmp_path)
    assert_same_model(MoEForCausalLM.from_pretrained(tmp_path), small_model())
    assert sorted(files(tmp_path)) == ["config.json", "model.safetensors"]


def save_in_a_child_killed_at(on_call: int, model: MoEForCausalLM, folder: Path, **settings) -> bool:
    """Save in a forked process that dies, without any clean-up, as it is about to move its `on_call`-th file."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        return code != 0
    try:
        os.replace = failing(os.replace, on_call, fail=lambda: os.kill(os.getpid(), signal.SIGKILL))
        save_model(model, folder, **settings)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that uses torch")
@pytest.mark.parametrize(
    ("first", "second", "tokenizers"),
    [
        ("one", "one", ("a", "b")),
        ("many", "many", (None, "b")),
        ("one", "few", ("a", None)),
    ],
    ids=str,
)
def test_a_kill_during_the_exchange_never_leaves_a_mixture(first, second, tokenizers, tmp_path):
    old, new = small_model(), small_model(seed=8)
    old.tokenizer_json, new.tokenizer_json = tokenizers
    outcomes, killed, on_call = [], True, 0
    while killed:
        on_call += 1
        save_model(old, tmp_path, **SAVES[first])
        killed = save_in_a_child_killed_at(on_call, new, tmp_path, **SAVES[second])
        try:
            found = MoEForCausalLM.from_pretrained(tmp_path)
            outcomes.append("old" if torch.equal(found.lm_head.weight, old.lm_head.weight) else "new")
            assert_same_model(found, {"old": old, "new": new}[outcomes[-1]])
            assert found.tokenizer_json == {"old": old, "new": new}[outcomes[-1]].tokenizer_json
        except CheckpointError as error:
            assert "config.json: not found" in str(error)
            outcomes.append("unreadable")
    if first == second == "one" and tokenizers == (None, None):
        assert outcomes == ["old", "new"]  # one rename: readable at every moment
    else:
        assert outcomes == ["old", *["unreadable"] * (len(outcomes) - 2), "new"]
    assert list(tmp_path.glob(".saving-*")) == []  # what the killed ones left has gone
