"""GGUF files as people have them: split, old, fused, and of architectures that nothing here runs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Format

from minimoe.model import MoEForCausalLM
from minimoe.model.checkpoint import Checkpoint, CheckpointError
from minimoe.model.opening import open_checkpoint
from tests.model.test_checkpoint import LFS_POINTER
from tests.model.test_gguf import llama_order, make_model, set_to, stored_tensors, write

HEADS = {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8}
METADATA = HEADS | {"block_count": 2, "embedding_length": 16, "feed_forward_length": 24, "context_length": 64}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_raw(
    file: Path,
    architecture: str,
    tensors: dict[str, torch.Tensor],
    metadata: dict | None = None,
    form: Format = Format.F32,
) -> Checkpoint:
    """Tensors and keys as they are."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in (METADATA if metadata is None else metadata).items():
        set_to(f"{architecture}.{key}", value)(writer)
    for name, tensor in tensors.items():
        kind = form if tensor.dim() > 1 else Format.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(file)


def assert_same_tensors(found: Checkpoint, wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found.shape(name) == tuple(tensor.shape) and torch.equal(found[name], tensor), name
        pieces = torch.cat([piece.clone() for piece in found.pieces(name, 37)])
        assert torch.equal(pieces, tensor.flatten()), name


def assert_runs_as(model: MoEForCausalLM, source: Path) -> None:
    found = MoEForCausalLM.from_pretrained(source)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


# -- split


def split(file: Path, model: MoEForCausalLM, count: int = 3) -> list[Path]:
    """Into parts of as many tensors, by the package's own writer."""
    whole = write(file, model)
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(file, "llama", split_max_tensors=-(-len(reader.tensors) // count))
    for field in reader.fields.values():
        if not field.name.startswith("GGUF."):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.kv_data[0][field.name] = gguf.gguf_writer.GGUFValue(field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, numpy.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole.unlink()
    return sorted(file.parent.glob(f"{file.stem}-*.gguf"))


def test_a_model_in_parts_is_read_from_any_of_them_and_from_their_folder(tmp_path):
    model = make_model()
    parts = split(tmp_path / "model.gguf", model)
    assert [part.name for part in parts] == [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for source in (*parts, tmp_path):
        assert_runs_as(model, source)
        found = open_checkpoint(source)
        assert (found.files, found.unread) == (parts, [])
        assert len(found.hashes()) == 3 and len(found.get_vocab()) == 159


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    model = make_model()
    first, second, third = split(tmp_path / "model.gguf", model)
    shutil.copy(second, tmp_path / "kept")
    shutil.copy(third, second)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.gguf: split\.no=2: wanted 1"):
        open_checkpoint(first)
    second.unlink()
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-00003\.gguf: not found, or no file: a part of model-0000"
    ):
        open_checkpoint(third)
    shutil.copy(tmp_path / "kept", tmp_path / "alone.gguf")
    with pytest.raises(
        CheckpointError, match=r"alone\.gguf: split\.count=3: wanted 1, the whole .* or its parts beside it"
    ):
        open_checkpoint(tmp_path / "alone.gguf")


# -- folders


def test_a_folder_with_one_gguf_file_is_that_model(tmp_path):
    model = make_model()
    write(tmp_path / "model.gguf", model)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")  # as many repositories have it
    (tmp_path / "mmproj-model.gguf").write_bytes(b"of images")
    assert_runs_as(model, tmp_path)
    shutil.copy(tmp_path / "model.gguf", tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 models, wanted one; name one of model\.gguf, other\.gguf"):
        open_checkpoint(tmp_path)
    model.save_pretrained(tmp_path, model_type="llama")
    assert open_checkpoint(tmp_path).unread == ["mmproj-model.gguf", "model.gguf", "other.gguf"]


def test_a_pointer_in_place_of_a_file_is_called_one(tmp_path):
    (tmp_path / "model.gguf").write_bytes(LFS_POINTER)
    with pytest.raises(CheckpointError, match=r"model\.gguf: GGUF magic invalid \(found a Git LFS pointer"):
        open_checkpoint(tmp_path)


# -- experts


def rewritten(file: Path, layout: tuple[str, str], change: Callable[[dict], dict], monkeypatch) -> MoEForCausalLM:
    """A model written with its tensors changed."""
    model = make_model(layout)
    stored = change(stored_tensors(model, layout[0]))
    with monkeypatch.context() as patch:
        patch.setattr("tests.model.test_gguf.stored_tensors", lambda model, architecture: stored)
        write(file, model, layout[0])
    return model


def one_by_one(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of before April 2024: blk.0.ffn_gate.3.weight."""
    result = {}
    for name, tensor in stored.items():
        stack = name.endswith("_exps.weight")
        result |= {name.replace("_exps", f".{i}"): one for i, one in enumerate(tensor)} if stack else {name: tensor}
    return result


def fused(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gate above up, in one tensor."""
    result = dict(stored)
    for name in [name for name in stored if "ffn_gate_exps" in name]:
        gate, up = result.pop(name), result.pop(name.replace("gate", "up"))
        result[name.replace("gate", "gate_up")] = torch.cat([gate, up], dim=1)
    return result


@pytest.mark.parametrize("change", [one_by_one, fused])
@pytest.mark.parametrize(
    "layout", [("llama", "mixtral"), ("qwen3moe", "qwen3_moe"), ("qwen2moe", "qwen2_moe")], ids=str
)
def test_experts_one_by_one_and_gate_and_up_in_one(layout, change, tmp_path, monkeypatch):
    model = rewritten(tmp_path / "model.gguf", layout, change, monkeypatch)
    assert_runs_as(model, tmp_path)
    config = open_checkpoint(tmp_path).model_config
    assert (config.num_experts, config.moe_intermediate_size) == (4, 32)


def test_more_experts_than_there_are(tmp_path, monkeypatch):
    model = make_model(("llama", "mixtral"))
    stored = one_by_one(stored_tensors(model, "llama"))
    monkeypatch.setattr("tests.model.test_gguf.stored_tensors", lambda model, architecture: stored)
    write(tmp_path / "model.gguf", model, change=set_to("llama.expert_count", 5))
    with pytest.raises(
        CheckpointError, match=r"llama\.expert_count=5: wanted at most 4, the experts in blk\.1\.ffn_gate\.0"
    ):
        open_checkpoint(tmp_path / "model.gguf").model_config  # noqa: B018


# -- architectures that do not run


def test_another_architecture_keeps_its_names_and_gives_its_sizes(tmp_path):
    tensors = {
        "token_embd.weight": random(40, 16),
        "blk.0.attn_qkv.weight": random(64, 16),
        "blk.1.ffn_gate_exps.weight": random(3, 12, 16),
        "blk.1.ffn_gate.2.weight": random(12, 16),
        "blk.1.ffn_gate_up_exps.weight": random(3, 24, 16),
        "blk.0.ssm_a": random(5),
    }
    metadata = METADATA | {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": 12}
    found = write_raw(tmp_path / "model.gguf", "phi3", tensors, metadata)
    assert_same_tensors(found, tensors)
    assert found.hf_config == {
        "model_type": "phi3",
        "tie_word_embeddings": True,
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 40,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
    }
    message = r"model\.gguf: general\.architecture='phi3': wanted one of llama, qwen2, qwen2moe, qwen3, qwen3moe, olmoe"
    for run in (lambda: found.model_config, lambda: MoEForCausalLM.from_pretrained(tmp_path)):
        with pytest.raises(CheckpointError, match=message):
            run()


def test_sizes_that_are_not_given_follow_from_others(tmp_path):
    metadata = {"block_count": 3, "embedding_length": 32, "attention.head_count": 4, "nextn_predict_layers": 1}
    tensors = {"token_embd.weight": random(40, 32), "output.weight": random(40, 32)}
    config = write_raw(tmp_path / "a.gguf", "glm4moe", tensors, metadata).hf_config
    assert (config["num_hidden_layers"], config["head_dim"], config["num_key_value_heads"]) == (2, 8, 4)
    assert config["tie_word_embeddings"] is False
    per_layer = {"attention.head_count": [4, 2], "attention.head_count_kv": [2, 2], "feed_forward_length": [8, 16]}
    config = write_raw(tmp_path / "b.gguf", "openelm", {"a.weight": random(2, 2)}, METADATA | per_layer).hf_config
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == ([4, 2], 2)
    assert config["intermediate_size"] == [8, 16]
    assert write_raw(tmp_path / "c.gguf", "mamba", {"blk.4.ssm_a": random(2)}, {}).hf_config["num_hidden_layers"] == 5


@pytest.mark.parametrize(
    "architecture", ["granite", "granitemoe", "minicpm", "deci", "mistral3", "smollm3", "deepseek"]
)
def test_rows_of_q_and_k_are_put_back_in_order(architecture, tmp_path):
    q, k, v, bias = random(32, 16), random(16, 16, seed=1), random(16, 16, seed=2), random(32, seed=3)
    stored = {"attn_q.weight": llama_order(q, 8), "attn_k.weight": llama_order(k, 8), "attn_v.weight": v}
    stored |= {"attn_q.bias": llama_order(bias, 8)}
    wanted = {"attn_q.weight": q, "attn_k.weight": k, "attn_v.weight": v, "attn_q.bias": bias}
    found = write_raw(tmp_path / "model.gguf", architecture, {f"blk.0.{name}": part for name, part in stored.items()})
    assert_same_tensors(found, {f"blk.0.{name}": tensor for name, tensor in wanted.items()})


@pytest.mark.parametrize("architecture", ["command-r", "gemma2", "deepseek2", "llama4", "phi3"])
def test_rows_of_others_stay(architecture, tmp_path):
    tensors = {"blk.0.attn_q.weight": random(32, 16), "blk.0.attn_k.weight": random(16, 16)}
    assert_same_tensors(write_raw(tmp_path / "model.gguf", architecture, tensors), tensors)


@pytest.mark.parametrize(
    ("architecture", "added"), [("gemma", 1), ("gemma2", 1), ("gemma3", 1), ("gemma3n", 0), ("olmo2", 0)]
)
def test_norms_of_gemma_are_those_of_its_checkpoint(architecture, added, tmp_path):
    """Its model multiplies by 1 + weight, llama.cpp by what is stored."""
    names = ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.post_ffw_norm.weight", "blk.0.attn_q_norm.weight")
    norms = {name: torch.tensor([0.5, -0.25, 2.0, 0.0]) for name in names}
    others = {"output_norm.bias": torch.ones(4), "blk.0.ffn_down.weight": random(4, 8)}
    stored = {name: tensor + added for name, tensor in norms.items()}
    assert_same_tensors(write_raw(tmp_path / "model.gguf", architecture, stored | others), norms | others)


def test_what_is_not_computed_is_read_all_the_same(tmp_path):
    """The reason why it does not run is given where that is asked."""
    for key, value, message in (
        ("llama.expert_gating_func", 2, r"llama\.expert_gating_func=2: wanted 1, all that is supported"),
        ("llama.rope.dimension_count", 8, r"llama\.rope\.dimension_count=8: wanted 16, all that is supported"),
        ("llama.rope.scaling.type", "yarn", r"llama\.rope\.scaling\.type='yarn': wanted none or linear"),
    ):
        model = make_model()
        found = open_checkpoint(write(tmp_path / "model.gguf", model, change=set_to(key, value)))
        q = "model.layers.1.self_attn.q_proj.weight"
        assert torch.equal(found[q], model.state_dict()[q])
        assert found.hf_config["num_attention_heads"] == 4
        with pytest.raises(CheckpointError, match=message):
            found.model_config  # noqa: B018


# -- types


def test_a_type_that_the_package_does_not_know_is_refused_where_it_is_wanted(tmp_path):
    """It is named by its number; all else is read."""
    tensors = {"a.weight": random(4, 32), "b.weight": random(4, 32, seed=1), "c.bias": random(3)}
    write_raw(tmp_path / "model.gguf", "phi3", tensors)
    content = (tmp_path / "model.gguf").read_bytes()
    place = content.index(b"a.weight") + len("a.weight") + 4 + 2 * 8  # past its two sides
    assert content[place : place + 4] == bytes(4)  # F32
    (tmp_path / "model.gguf").write_bytes(content[:place] + (999).to_bytes(4, "little") + content[place + 4 :])
    found = open_checkpoint(tmp_path / "model.gguf")
    assert list(found) == list(tensors) and found.shape("a.weight") == (4, 32)
    assert torch.equal(found["b.weight"], tensors["b.weight"]) and torch.equal(found["c.bias"], tensors["c.bias"])
    with pytest.raises(
        CheckpointError, match=r"model\.gguf: a\.weight is stored as format 999, which gguf does not read"
    ):
        found["a.weight"]


@pytest.mark.parametrize(
    "form", [Format.Q5_0, Format.Q5_1, Format.Q8_0, Format.TQ1_0, Format.TQ2_0, Format.MXFP4], ids=str
)
def test_other_architectures_are_read_in_every_type(form, tmp_path):
    matrix = random(32, 256)
    tensors = {"blk.0.attn_q.weight": matrix, "blk.0.attn_output.weight": matrix}
    found = write_raw(tmp_path / "model.gguf", "granite", tensors, METADATA, form)
    wanted = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(matrix.numpy(), form), form))
    assert torch.equal(found["blk.0.attn_output.weight"], wanted) and wanted.any()
    assert torch.equal(llama_order(found["blk.0.attn_q.weight"], 8), wanted)


# -- tokens


def test_word_pieces_are_written_as_bert_writes_them(tmp_path):
    words = ["[PAD]", "<s>", "un", "##believ", "##able", "[", "##]"]
    kinds = [gguf.TokenType.NORMAL, gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 5
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "bert")
    writer.add_tokenizer_model("bert")
    writer.add_token_list(["[PAD]", "<s>", "\u2581un", "believ", "able", "\u2581[", "]"])
    writer.add_token_types(kinds)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_checkpoint(tmp_path / "model.gguf").get_vocab() == {word: index for index, word in enumerate(words)}
