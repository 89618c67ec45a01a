"""Roles are the tensors they say they are, in every family; statistics are those of numpy, in little memory."""

import hashlib
import json
import math
import os
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM, BertModel

from minimoe.fingerprints import weights as module
from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.weights import ROLES, Weights, open_weights
from minimoe.lineage.derive import quantise
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.model.checkpoint import CheckpointError
from minimoe.model.saving import save_model
from tests.rounding import assert_near

SMALL = {
    "vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "moe_intermediate_size": 6,
    "intermediate_size": 10,
    "tie_word_embeddings": False,
}
SHARED = {"shared_expert_intermediate_size": 8}
PANGU = SHARED | {"attention_bias": True, "attention_output_bias": True}
PANGU |= {"router": "grouped", "router_scale": True, "n_group": 2}
LAYOUTS = {
    "llama": {"num_experts": 0, "attention_bias": True, "attention_output_bias": True},
    "qwen2": {"num_experts": 0, "attention_bias": True, "tie_word_embeddings": True},
    "qwen3": {"num_experts": 0, "qk_norm": "head"},
    "mixtral": {"intermediate_size": 6},
    "qwen2_moe": SHARED | {"shared_expert_gate": True, "norm_topk_prob": False, "attention_bias": True},
    "qwen3_moe": {"qk_norm": "head", "decoder_sparse_step": 2},
    "olmoe": {"qk_norm": "full", "intermediate_size": 6},
    "pangu_pro_moe": PANGU,
    "minimoe": {"score_func": "sigmoid", "e_score_correction_bias": True, "num_experts": 1, "num_experts_per_tok": 1},
}
# What two roles of each published family are called on disk, as in the published checkpoints.
ON_DISK = {
    "llama": {"q_bias": "self_attn.q_proj.bias", "up": "mlp.up_proj.weight"},
    "qwen2": {"norm1": "input_layernorm.weight", "norm2": "post_attention_layernorm.weight"},
    "qwen3": {"q_norm": "self_attn.q_norm.weight", "gate": "mlp.gate_proj.weight"},
    "mixtral": {"router": "block_sparse_moe.gate.weight", "gate": "block_sparse_moe.experts.{}.w1.weight"},
    "qwen2_moe": {"shared_up": "mlp.shared_expert.up_proj.weight", "up": "mlp.experts.{}.up_proj.weight"},
    "qwen3_moe": {"k_norm": "self_attn.k_norm.weight", "down": "mlp.experts.{}.down_proj.weight"},
    "olmoe": {"router": "mlp.gate.weight", "up": "mlp.experts.{}.up_proj.weight"},
    "pangu_pro_moe": {"o_bias": "self_attn.o_proj.bias", "router_scale": "mlp.router_scale"},
}
PLACES = [(role, layer) for role in ROLES for layer in (None, 0, 1)]


def random_model(seed: int = 0, **settings) -> MoEForCausalLM:
    """Every number away from what an initialisation would give."""
    model = MoEForCausalLM(MoEConfig(**SMALL | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(generator=generator)
    return model


def one_tensor(folder: Path, tensor: torch.Tensor) -> Weights:
    """A model whose q of layer 1 is `tensor`, whatever its shape."""
    if not (folder / "config.json").exists():
        random_model(num_experts=0).save_pretrained(folder, model_type="llama")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.1.self_attn.q_proj.weight": tensor}, folder / "model.safetensors")
    return open_weights(folder)


# -- roles


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_and_the_model_in_memory_have_the_same_roles(layout, tmp_path):
    dtype = (torch.float32, torch.float16, torch.bfloat16)[list(LAYOUTS).index(layout) % 3]
    model = random_model(**LAYOUTS[layout]).to(dtype)
    save_model(model, tmp_path / "one", model_type=layout)
    save_model(model, tmp_path / "many", model_type=layout, max_shard_size=3000)
    memory = open_weights(model)
    for source in (tmp_path / "one", tmp_path / "many", tmp_path / "one" / "model.safetensors"):
        stored = open_weights(source)
        assert (stored.name, stored.config.model_type) == (str(source), layout)
        for place in PLACES:
            assert stored.has(*place) == memory.has(*place)
            if memory.has(*place):
                found = stored.get(*place)
                assert found.dtype == torch.float32
                assert torch.equal(found, memory.get(*place)), place
                assert tuple(found.shape) == stored.shape(*place) == memory.shape(*place)
                assert torch.equal(torch.cat([piece.clone() for _, piece in stored.pieces(*place)]), found.flatten())


def test_roles_in_memory_are_the_parameters():
    model = random_model(**PANGU | {"mlp_only_layers": [0]})
    weights = open_weights(model)
    dense, sparse = model.model.layers
    attention, mixture = sparse.self_attn, sparse.mlp
    wanted = {
        **{role: getattr(attention, f"{role}_proj").weight for role in "qkvo"},
        **{f"{role}_bias": getattr(attention, f"{role}_proj").bias for role in "qkvo"},
        **{role: getattr(mixture.experts, f"{role}_proj") for role in ("gate", "up", "down")},
        **{f"shared_{role}": getattr(mixture.shared_expert, f"{role}_proj").weight for role in ("gate", "up", "down")},
        "router": mixture.gate.weight,
        "router_scale": mixture.gate.router_scale,
        "norm1": sparse.input_layernorm.weight,
        "norm2": sparse.post_attention_layernorm.weight,
    }
    assert {role for role in ROLES if weights.has(role, 1)} == set(wanted)
    assert all(torch.equal(weights.get(role, 1), tensor) for role, tensor in wanted.items())
    assert torch.equal(weights.get("gate", 0), dense.mlp.gate_proj.weight) and not weights.has("router", 0)
    wanted = {"embedding": model.model.embed_tokens, "head": model.lm_head, "norm_final": model.model.norm}
    assert {role for role in ROLES if weights.has(role)} == set(wanted)
    assert all(torch.equal(weights.get(role), part.weight) for role, part in wanted.items())
    sizes = weights.num_layers, weights.hidden_size, weights.num_heads, weights.num_kv_heads, weights.head_dim
    assert (*sizes, weights.num_experts) == (2, 16, 4, 2, 4, 4)


def test_roles_on_disk_are_the_published_tensors(tmp_path):
    for layout, names in ON_DISK.items():
        random_model(**LAYOUTS[layout]).save_pretrained(tmp_path / layout, model_type=layout)
        tensors, weights = load_file(tmp_path / layout / "model.safetensors"), open_weights(tmp_path / layout)
        for role, name in names.items():
            name = f"model.layers.1.{name}"
            stored = [tensors[name.format(expert)] for expert in range(4)] if "{}" in name else tensors[name]
            wanted = torch.stack(stored) if "{}" in name else stored
            assert torch.equal(weights.get(role, 1), wanted[0] if role == "router_scale" else wanted), (layout, role)


def test_one_expert_is_still_a_stack():
    assert open_weights(random_model(**LAYOUTS["minimoe"])).get("down", 1).shape == (1, 16, 6)


def test_a_tied_head_is_the_embedding(tmp_path):
    random_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    weights = open_weights(tmp_path)
    assert torch.equal(weights.get("head"), weights.get("embedding"))


@pytest.mark.parametrize(
    ("role", "layer", "message"),
    [
        ("gate", 2, "no 'gate' in layer 2: its layers go from 0 to 1"),
        ("q", None, "no 'q': found embedding, head, norm_final"),
        ("embedding", 0, "no 'embedding' in layer 0: found q, k, v, o, norm1, norm2, gate, up, down, router"),
        ("router_bias", 1, "no 'router_bias' in layer 1: found q, k"),
        ("colour", 1, "no 'colour' in layer 1: found q, k"),
    ],
)
def test_what_is_not_there_is_named(role, layer, message):
    weights = open_weights(random_model())
    assert not weights.has(role, layer)
    for ask in (weights.get, weights.shape, weights.statistics):
        with pytest.raises(KeyError, match=f"model in memory has {message}"):
            ask(role, layer)


# -- BERT


@pytest.fixture(params=["encoder", "with a head", "gamma"])
def bert(request, tmp_path) -> tuple[BertModel, Weights]:
    """An encoder of transformers and its folder: alone, below a head that was trained on it, with names of 2018."""
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 10, "max_position_embeddings": 8}
    config = BertConfig(vocab_size=29, hidden_size=16, **sizes)
    whole = BertForMaskedLM(config) if request.param == "with a head" else BertModel(config)
    for tensor in whole.parameters():
        torch.nn.init.normal_(tensor)
    whole.save_pretrained(tmp_path)
    if request.param == "gamma":
        tensors = load_file(tmp_path / "model.safetensors")
        renamed = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
        save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "été", "\u2028", "##s"]) + "\n", encoding="utf-8")
    return getattr(whole, "bert", whole), open_weights(tmp_path)


def test_bert_encoders(bert):
    encoder, weights = bert
    sizes = weights.num_layers, weights.hidden_size, weights.num_heads, weights.num_kv_heads, weights.head_dim
    assert (*sizes, weights.num_experts, weights.config) == (3, 16, 4, 4, 4, 0, None)
    first, second, last = encoder.encoder.layer
    wanted = {
        "q": second.attention.self.query.weight,
        "k": second.attention.self.key.weight,
        "v": second.attention.self.value.weight,
        "o": second.attention.output.dense.weight,
        "q_bias": second.attention.self.query.bias,
        "k_bias": second.attention.self.key.bias,
        "v_bias": second.attention.self.value.bias,
        "o_bias": second.attention.output.dense.bias,
        "norm1": first.output.LayerNorm.weight,  # what attention of the second layer reads went through it
        "norm2": second.attention.output.LayerNorm.weight,
        "up": second.intermediate.dense.weight,
        "down": second.output.dense.weight,
    }
    assert {role for role in ROLES if weights.has(role, 1)} == set(wanted)
    assert all(torch.equal(weights.get(role, 1), tensor) for role, tensor in wanted.items())
    assert torch.equal(weights.get("norm1", 0), encoder.embeddings.LayerNorm.weight)
    assert torch.equal(weights.get("norm_final"), last.output.LayerNorm.weight)
    assert torch.equal(weights.get("embedding"), encoder.embeddings.word_embeddings.weight)
    assert not weights.has("head")
    assert weights.tokens == {"[PAD]": 0, "été": 1, "\u2028": 2, "##s": 3}
    with pytest.raises(Refusal, match="is an encoder: it predicts no next token"):
        weights.model()


def test_a_bert_config_without_sizes_is_refused(bert):
    file = Path(bert[1].name) / "config.json"
    file.write_text(json.dumps({"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: num_attention_heads=None: wanted a whole number"):
        open_weights(bert[1].name)


# -- sources that are refused


def test_a_shard_is_not_a_model(tmp_path):
    save_model(random_model(), tmp_path, model_type="mixtral", max_shard_size=5000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    with pytest.raises(CheckpointError, match=rf"{shard.name}: one of the \d+ files of a model; wanted their folder"):
        open_weights(shard)


def test_files_that_are_missing_or_cut_off_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors: found nothing, wanted a folder"):
        open_weights(tmp_path / "nowhere.safetensors")
    random_model().save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 9000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: found 9000 bytes, wanted a whole safetensors file"):
        open_weights(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        open_weights(tmp_path / "model.safetensors")


def test_integers_are_refused_where_they_are_read(tmp_path):
    weights = one_tensor(tmp_path, torch.ones(16, 16, dtype=torch.int8))
    assert weights.get("q", 0).shape == (16, 16)
    for read in (weights.get, weights.statistics):
        with pytest.raises(
            CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight is stored as I8, wanted one of"
        ):
            read("q", 1)


# -- 8-bit integers


def in_int8(folder: Path, *, layout: int = 0, method: str = "bitsandbytes") -> None:
    """Store the matrices of all layers as bitsandbytes does: integers, the largest number of each row, and a layout."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if re.search(r"(_proj|experts\.\d\.w\d)\.weight$", name)]:
        matrix = tensors[name].double()
        scales, prefix = matrix.abs().amax(1), name.removesuffix("weight")
        tensors[name] = (matrix / scales[:, None] * 127).round().to(torch.int8)
        tensors[f"{prefix}SCB"] = scales.float()
        tensors[f"{prefix}weight_format"] = torch.tensor(layout, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": method, "load_in_8bit": True, "llm_int8_threshold": 6.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("layout", ["llama", "mixtral", "qwen2_moe"])
def test_integers_of_bitsandbytes_are_the_numbers_they_stand_for(layout, tmp_path, monkeypatch):
    """The oracle rounds the model itself, and never sees the folder."""
    monkeypatch.setattr(module, "PIECE", 50)  # no number of rows
    model = random_model(**LAYOUTS[layout])
    model.save_pretrained(tmp_path, model_type=layout)
    in_int8(tmp_path)
    found, wanted = open_weights(tmp_path), open_weights(quantise(model, 8))
    for role in ROLES:
        for layer in (None, 0, 1):
            assert found.has(role, layer) == wanted.has(role, layer)
            if wanted.has(role, layer):
                assert found.shape(role, layer) == wanted.shape(role, layer)
                torch.testing.assert_close(found.get(role, layer), wanted.get(role, layer), rtol=1e-6, atol=0)
                pieces = torch.cat([piece.clone() for _, piece in found.pieces(role, layer)])
                assert torch.equal(pieces, found.get(role, layer).flatten())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert_near(found.model()(ids).logits, wanted.model()(ids).logits)
    assert_near(MoEForCausalLM.from_pretrained(tmp_path)(ids).logits, wanted.model()(ids).logits)
    assert found.sha256() == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()


def test_integers_in_another_layout_or_without_their_scales_are_refused(tmp_path):
    random_model(**LAYOUTS["llama"]).save_pretrained(tmp_path, model_type="llama")
    in_int8(tmp_path, layout=2)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight_format=2, wanted 0, by rows"):
        open_weights(tmp_path).get("q", 0)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(("weight_format", "q_proj.SCB"))}
    tensors["model.layers.0.self_attn.k_proj.SCB"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.0\.self_attn\.q_proj\.SCB'"):
        open_weights(tmp_path).get("q", 0)
    with pytest.raises(CheckpointError, match=r"k_proj\.SCB is \[3\], wanted \[8\]"):
        open_weights(tmp_path).statistics("k", 0)


def test_4_bits_of_bitsandbytes_are_refused(tmp_path):
    random_model(**LAYOUTS["llama"]).save_pretrained(tmp_path, model_type="llama")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": False, "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"quantization_config\['quant_method'\]='bitsandbytes': wanted no"):
        open_weights(tmp_path)


# -- statistics


def assert_statistics(weights: Weights, values: torch.Tensor) -> None:
    wide = values.double().numpy()
    found = weights.statistics("q", 1)
    assert found.count == wide.size
    numpy.testing.assert_allclose(found.std, wide.std(), rtol=1e-5, atol=1e-5 * abs(wide).max())
    numpy.testing.assert_allclose(found.mean, wide.mean(), rtol=1e-5, atol=1e-5 * wide.std())


@given(
    size=st.integers(1, 3500),
    mean=st.sampled_from([0.0, 0.02, -1.0, 3.0, -1000.0]),
    std=st.sampled_from([0.02, 1.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_statistics_are_those_of_numpy_in_float64(tmp_path_factory, size, mean, std, dtype):
    values = (mean + std * torch.randn(size, generator=torch.Generator().manual_seed(size))).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", 1000)  # pieces that do not divide the tensor
        assert_statistics(one_tensor(tmp_path_factory.mktemp("model"), values + 1e-3), values + 1e-3)


def test_a_large_mean_does_not_swallow_the_spread(tmp_path):
    """Without a shift, float32 sums of squares would be off by more than the variance."""
    values = 5000 + torch.randn(300_000)
    squares = float((values.square().sum() / len(values) - values.mean() ** 2).item())
    assert not 0.9 < squares < 1.1
    found, wide = one_tensor(tmp_path, values).statistics("q", 1), values.double().numpy()
    assert abs(found.std / wide.std() - 1) < 1e-5 and abs(found.mean - wide.mean()) < 1e-5


def test_pieces_may_differ_from_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 1000)
    values = torch.randn(5500)
    values[:1000] += 700
    values[2000] = 1e6
    values[4000:5000] = 3
    assert_statistics(one_tensor(tmp_path, values), values)


def test_statistics_of_a_mixture_are_those_of_all_experts(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    wide = model.model.layers[0].mlp.experts.up_proj.detach().double().numpy()
    for weights in (open_weights(tmp_path), open_weights(model)):
        found = weights.statistics("up", 0)
        assert (found.std, found.mean) == pytest.approx((wide.std(), wide.mean()), rel=1e-5)


def test_statistics_leave_a_model_in_memory_alone():
    model = random_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 100
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    open_weights(model).statistics("q", 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Largest(TorchDispatchMode):
    """Keeps the size in bytes of the largest memory behind any tensor that is made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.size = max(self.size, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_need_memory_for_a_piece_and_not_for_the_tensor(dtype, tmp_path):
    values = torch.randn(5 * module.PIECE + 5).to(dtype)
    weights = one_tensor(tmp_path, values)
    with Largest() as largest:
        weights.statistics("q", 1)
    assert module.PIECE * values.element_size() <= largest.size <= module.PIECE * 8 < values.nbytes  # in float64
    with Largest() as largest:
        weights.get("q", 1)
    assert largest.size == len(values) * 4  # so that what is measured can be seen to differ


def test_threads_are_as_many_after_as_before(tmp_path):
    used = []

    class Threads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            used.append(torch.get_num_threads())
            return function(*args, **(kwargs or {}))

    weights, empty = one_tensor(tmp_path / "a", torch.randn(9)), one_tensor(tmp_path / "b", torch.zeros(9))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Threads():
            weights.statistics("q", 1)
        assert set(used) == {1} and torch.get_num_threads() == 2
        with pytest.raises(Refusal):
            empty.statistics("q", 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("wrong", "place"), [(math.nan, 0), (math.inf, 1500), (-math.inf, 2499)])
def test_one_number_that_is_not_finite_is_noticed(wrong, place, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 1000)
    values = torch.randn(2500)
    values[place] = wrong
    with pytest.raises(Refusal, match=r"model\.layers\.1\.self_attn\.q_proj\.weight holds NaN, infinity"):
        one_tensor(tmp_path, values).statistics("q", 1)


def test_zeros_are_refused_and_constants_are_not(tmp_path):
    with pytest.raises(Refusal, match=r"q of layer 1 holds nothing but zeros"):
        one_tensor(tmp_path, torch.zeros(2500)).statistics("q", 1)
    for size in range(2490, 2510):  # 0.1 is rounded, and so are its sums
        mean, std, count = one_tensor(tmp_path, torch.full((size,), 0.1)).statistics("q", 1)
        assert mean == pytest.approx(0.1) and std < 1e-7 and count == size


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    weights = one_tensor(tmp_path, torch.randn(2500))
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: found \d+ bytes of model\.layers\.1\.\S+q_proj"):
        weights.statistics("q", 1)


# -- tokens, hashes, models


def test_tokens_are_those_beside_the_weights(tmp_path):
    model, vocabulary = random_model(), {"a": 0, "b": 28, "beyond the embedding": 29}
    model.save_pretrained(tmp_path)
    assert open_weights(tmp_path).tokens == open_weights(model).tokens == {}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    assert open_weights(tmp_path).tokens == {"a": 0, "b": 28}
    tokenizer = Tokenizer(models.BPE({"c": 0, "d": 1}, []))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    wanted = {"c": 0, "d": 1, "<end>": 2}
    assert open_weights(tmp_path).tokens == open_weights(model, tokenizer=tokenizer).tokens == wanted


@pytest.mark.parametrize(("file", "content"), [("tokenizer.json", "{"), ("vocab.json", "[1]"), ("vocab.txt", "\xff")])
def test_a_damaged_tokenizer_is_named(file, content, tmp_path):
    random_model().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=f"{file}: wanted a vocabulary"):
        _ = open_weights(tmp_path).tokens


def test_the_hash_is_that_of_the_files(tmp_path):
    model = random_model()
    save_model(model, tmp_path / "one")
    save_model(model, tmp_path / "many", max_shard_size=5000)
    one, many = (
        [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((tmp_path / name).glob("*.safetensors"))]
        for name in ("one", "many")
    )
    assert len(many) > 2 and open_weights(tmp_path / "one").sha256() == one[0]
    assert open_weights(tmp_path / "many").sha256() == hashlib.sha256("".join(many).encode()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_of_a_model_in_memory_changes_with_a_single_bit(dtype):
    model, same = random_model().to(dtype), random_model().to(dtype)
    assert open_weights(model).sha256() == open_weights(same).sha256()
    with torch.no_grad():
        same.model.norm.weight[3] *= -1
    assert open_weights(model).sha256() != open_weights(same).sha256()


def test_a_layer_by_itself_is_that_of_the_model(tmp_path):
    """In memory of its own, or in that of the layer before."""
    for settings in (
        SHARED | {"shared_expert_gate": True, "e_score_correction_bias": True, "mlp_only_layers": [0]},
        PANGU,
        {"router": "noisy_topk", "qk_norm": "full"},
    ):
        model, folder = random_model(**settings).half(), tmp_path / str(len(settings))
        save_model(model, folder, model_type="minimoe")
        for weights in (open_weights(folder), open_weights(model)):
            over = None
            for layer, block in enumerate(weights.model().model.layers):
                over = weights.block(layer, over=over)
                part = weights.block(layer, "mlp.").mlp
                for found, wanted in (
                    (over.state_dict(), block.state_dict()),
                    (part.state_dict(), block.mlp.state_dict()),
                ):
                    assert found.keys() == wanted.keys()
                    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_matrices_one_by_one_are_those_of_the_role(tmp_path):
    save_model(random_model(**SHARED).half(), tmp_path, model_type="minimoe")
    for weights in (open_weights(tmp_path), open_weights(random_model(**SHARED))):
        for role in ("q", "gate", "down", "shared_up"):
            found = torch.stack([matrix.float() for matrix in weights.matrices(role, 1)])
            assert torch.equal(found.view(weights.shape(role, 1)), weights.get(role, 1))


def test_an_mlp_that_lacks_a_tensor_or_has_one_of_another_shape_is_refused(tmp_path):
    random_model(**SHARED, shared_expert_gate=True).save_pretrained(tmp_path, model_type="qwen2_moe")
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.shared_expert_gate.weight"
    save_file(tensors | {name: torch.ones(1, 15)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"shared_router of layer 1 is \[1, 15\], wanted \[1, 16\]"):
        open_weights(tmp_path).block(1)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has no 'shared_router' in layer 1"):
        open_weights(tmp_path).block(1)


def test_the_model_is_given_in_float32(tmp_path):
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    model = random_model(**LAYOUTS["qwen2_moe"]).half().train()
    save_model(model, tmp_path, model_type="qwen2_moe")
    found = [open_weights(source).model() for source in (tmp_path, tmp_path / "model.safetensors", model)]
    wanted = MoEForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
    for each in found:
        assert_near(each(ids).logits, wanted)
        assert not each.training
    assert model.training and model.lm_head.weight.dtype == torch.float16
