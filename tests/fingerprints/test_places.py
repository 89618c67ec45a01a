"""Roles are found whatever tensors are called and however they are stored; what is missing or damaged is named."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from minimoe.fingerprints.compare import compare
from minimoe.fingerprints.fingerprint import fingerprint
from minimoe.fingerprints.places import Places
from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.weights import ROLES, Weights, open_weights
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.model.checkpoint import CheckpointError
from tests.rounding import assert_near

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = SIZES | {"num_key_value_heads": 2, "intermediate_size": 10, "tie_word_embeddings": False, "num_experts": 0}
MIXTURE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "mlp_only_layers": [0]}
PLACES = [(role, layer) for role in ROLES for layer in (None, 0, 1)]
# What llama.cpp calls the tensors of a model.
GGUF = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"},
    **{f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    "mlp.gate.": "ffn_gate_inp.",
}


def random_model(seed: int = 0, **settings) -> MoEForCausalLM:
    model = MoEForCausalLM(MoEConfig(**SMALL | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(generator=generator)
    return model


def tensors_of(model: MoEForCausalLM, folder: Path) -> dict[str, Tensor]:
    """As they are stored, with one tensor for each expert."""
    model.save_pretrained(folder, model_type="minimoe")
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: dict[str, Tensor], **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of"} | config), encoding="utf-8")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def assert_equal(found: Weights, wanted: Weights) -> None:
    for place in PLACES:
        assert found.has(*place) == wanted.has(*place), place
        if wanted.has(*place):
            assert torch.equal(found.get(*place), wanted.get(*place)), place
            assert found.shape(*place) == wanted.shape(*place)
            pieces = torch.cat([piece.clone() for _, piece in found.pieces(*place)])
            assert torch.equal(pieces, wanted.get(*place).flatten()), place
            if wanted.shape(*place)[1:] and place[1] is not None:
                assert torch.equal(found.first_rows(*place, 3), wanted.get(*place)[..., :3, :]), place


# -- names


@pytest.mark.parametrize("prefix", ["", "model.language_model.", "language_model.model.", "transformer."])
def test_prefixes_and_other_stacks_of_layers(prefix, tmp_path):
    model = random_model(**MIXTURE, qk_norm="head")
    tensors = tensors_of(model, tmp_path)
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    for layer in range(9):  # a tower of more layers, which sees
        renamed[f"vision_tower.encoder.layers.{layer}.self_attn.q_proj.weight"] = torch.ones(3, 3)
        renamed[f"vision_tower.encoder.layers.{layer}.self_attn.k_proj.weight"] = torch.ones(3, 3)
    renamed |= {f"vision_tower.{name}.weight": torch.ones(3, 3) for name in ("norm", "embed_tokens")}
    text = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "head_dim": 4}
    found = open_weights(write(tmp_path / "new", renamed, text_config=text, vision_config={"num_hidden_layers": 9}))
    assert_equal(found, open_weights(model))
    sizes = found.num_layers, found.hidden_size, found.num_heads, found.num_kv_heads, found.head_dim
    assert (*sizes, found.num_experts) == (2, 16, 4, 2, 4, 3)


@pytest.mark.parametrize("norm", ["ffn_norm", "post_attention_norm"])  # as in most of its models; as in GPT-OSS
@pytest.mark.parametrize("settings", [{"qk_norm": "head"}, MIXTURE | {"shared_expert_intermediate_size": 8}])
def test_names_of_llama_cpp(settings, norm, tmp_path):
    model = random_model(**settings)
    tensors, stacked = tensors_of(model, tmp_path), {}
    for name in [name for name in tensors if ".experts." in name]:
        layer, part = name.split(".")[2], name.split(".")[-2].removesuffix("_proj")
        stacked.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", []).append((name, tensors.pop(name)))
    for ours, theirs in (GGUF | {"post_attention_layernorm": norm}).items():
        tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
    tensors |= {name: torch.stack([tensor for _, tensor in sorted(parts)]) for name, parts in stacked.items()}
    found = open_weights(write(tmp_path / "new", tensors, model_type="gemma2", num_attention_heads=4, head_dim=4))
    assert_equal(found, open_weights(model))  # with norms as they are: llama.cpp stores them whole


@pytest.mark.parametrize("config", [{"num_hidden_layers": 2}, {}])
def test_layers_that_predict_further_on_are_left_out(config, tmp_path):
    model = random_model()
    tensors = tensors_of(model, tmp_path)
    more = {name.replace(".1.", ".2."): tensor for name, tensor in tensors.items() if ".1." in name}
    more |= {f"model.layers.2.{name}.weight": torch.ones(16, 16) for name in ("eh_proj", "embed_tokens", "enorm")}
    found = open_weights(write(tmp_path / "new", tensors | more, num_attention_heads=4, **config))
    assert found.num_layers == 2
    assert_equal(found, open_weights(model))


def test_a_model_without_known_names_is_refused(tmp_path):
    folder = write(tmp_path, {"a.b": torch.ones(3), "layers.0.c": torch.ones(3)}, num_attention_heads=4)
    with pytest.raises(CheckpointError, match=r"config.json: model_type='unheard_of': found no layers with attention"):
        open_weights(folder)
    tensors = {"layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}
    with pytest.raises(CheckpointError, match=r"found no embeddings among layers\.0\.self_attn\.q_proj\.weight"):
        open_weights(write(tmp_path, tensors, num_attention_heads=4))


# -- ways to store


def fused(parts: list[Tensor], way: str) -> Tensor:
    """Queries [4 heads], keys and values [2 heads, or 4] in one matrix."""
    q, k, v = (part.unflatten(0, (-1, 4)) for part in parts)
    if way == "in turn":
        return torch.cat(parts)
    if way == "quarters":
        return torch.stack([q, v, k], 1).flatten(0, 2)
    return torch.cat([q.unflatten(0, (len(k), -1)), k[:, None], v[:, None]], 1).flatten(0, 2)


@pytest.mark.parametrize(
    ("name", "model_type", "kv_heads", "way"),
    [
        ("transformer.h.{}.self_attention.query_key_value", "falcon", 2, "groups"),
        ("transformer.h.{}.self_attention.query_key_value", "falcon", 1, "groups"),
        ("gpt_neox.layers.{}.attention.query_key_value", "gpt_neox", 4, "groups"),
        ("model.layers.{}.attention.wqkv", "internlm2", 2, "groups"),
        ("transformer.encoder.layers.{}.self_attention.query_key_value", "chatglm", 2, "in turn"),
        ("model.layers.{}.attention.query_key_value", "bailing_moe", 2, "in turn"),
        ("model.layers.{}.self_attn.qkv_proj", "phi3", 2, "in turn"),
        ("transformer.h.{}.attn.c_attn", "gpt_bigcode", 1, "in turn"),
        ("transformer.h.{}.attn.c_attn", "gpt_bigcode", 4, "groups"),
        ("transformer.h.{}.attn.c_attn", "qwen", 4, "in turn"),
        ("transformer.h.{}.attn.qkv_proj", "codegen", 4, "quarters"),
        ("blk.{}.attn_qkv", "gptneox", 4, "in turn"),
    ],
)
def test_queries_keys_and_values_in_one_matrix(name, model_type, kv_heads, way, tmp_path):
    names = "transformer.wte", "token_embd", "model.embed_tokens", "gpt_neox.embed_in"
    tensors, parts = {f"{embedding}.weight": torch.randn(40, 16) for embedding in names}, {}
    for layer in range(2):
        for kind, shape in (("weight", (16,)), ("bias", ())):
            heads = (4, kv_heads, kv_heads)
            parts[layer, kind] = [torch.randn(4 * count, *shape) for count in heads]
            tensors[f"{name.format(layer)}.{kind}"] = fused(parts[layer, kind], way)
    found = open_weights(write(tmp_path, tensors, model_type=model_type, num_attention_heads=4))
    assert (found.num_heads, found.num_kv_heads, found.head_dim) == (4, kv_heads, 4)
    for (layer, kind), wanted in parts.items():
        for role, part in zip("qkv", wanted, strict=True):
            assert torch.equal(found.get(role if kind == "weight" else f"{role}_bias", layer), part)


@pytest.mark.parametrize("width", [8, 16, 10])  # of an expert; in squares, shapes alone do not say which side is which
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("model_type", ["unheard_of", "gpt_oss"])
def test_experts_in_one_tensor(model_type, is_transposed, width, tmp_path):
    model = random_model(**MIXTURE | {"moe_intermediate_size": width})
    tensors = {name: tensor for name, tensor in tensors_of(model, tmp_path).items() if ".experts." not in name}
    gate, up, down = (getattr(model.model.layers[1].mlp.experts, f"{part}_proj") for part in ("gate", "up", "down"))
    together = torch.stack([gate, up], 2).flatten(1, 2) if model_type == "gpt_oss" else torch.cat([gate, up], 1)
    for part, tensor in (("gate_up", together), ("down", down)):
        tensors[f"model.layers.1.mlp.experts.{part}_proj"] = (tensor.mT if is_transposed else tensor).detach()
    found = open_weights(write(tmp_path / "new", tensors, model_type=model_type, num_attention_heads=4, num_experts=3))
    assert_equal(found, open_weights(model))


def test_experts_in_one_tensor_of_a_family_that_runs_are_read(tmp_path):
    model = random_model(**MIXTURE | {"mlp_only_layers": []}, qk_norm="head")
    model.save_pretrained(tmp_path, model_type="qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer, block in enumerate(model.model.layers):
        experts, prefix = block.mlp.experts, f"model.layers.{layer}.mlp.experts"
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([experts.gate_proj, experts.up_proj], 1).detach()
        tensors[f"{prefix}.down_proj"] = experts.down_proj.detach().clone()
    save_file(tensors, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    assert_equal(weights, open_weights(model))
    assert weights.config is None and "experts.gate_up_proj" in weights.reason


def test_experts_one_below_the_other(tmp_path):
    """DBRX."""
    gate, up, down = torch.randn(3, 6, 16), torch.randn(3, 6, 16), torch.randn(3, 16, 6)
    stacked = {"w1": gate.flatten(0, 1), "v1": up.flatten(0, 1), "w2": down.mT.flatten(0, 1)}
    tensors = {f"transformer.blocks.0.ffn.experts.mlp.{name}": tensor for name, tensor in stacked.items()}
    tensors["transformer.blocks.0.ffn.router.layer.weight"] = torch.randn(3, 16)
    tensors["transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight"] = torch.randn(32, 16)
    norms = {f"transformer.blocks.0.norm_attn_norm.norm_{i}.weight": torch.randn(16) for i in (1, 2)}
    tensors |= norms | {"transformer.wte.weight": torch.randn(40, 16)}
    found = open_weights(write(tmp_path, tensors, model_type="dbrx", n_heads=4))
    assert found.num_experts == 3 and found.num_kv_heads == 2
    for role, wanted in (("gate", gate), ("up", up), ("down", down)):
        assert torch.equal(found.get(role, 0), wanted)
    assert [torch.equal(found.get(f"norm{i}", 0), norm) for i, norm in enumerate(norms.values(), 1)] == [True, True]


def latent_tensors(prefix: str = "model.layers.0.self_attn.") -> dict[str, Tensor]:
    """Of 2 heads: 3 rows of each that know no position, 2 that do, 4 of values; latents of 6 and 5 numbers."""
    shapes = {"q_a_proj": (6, 16), "q_a_layernorm": (6,), "q_b_proj": (10, 6), "kv_a_proj_with_mqa": (7, 16)}
    shapes |= {"kv_a_layernorm": (5,), "kv_b_proj": (14, 5), "o_proj": (16, 8)}
    tensors = {f"{prefix}{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    return tensors | {"model.embed_tokens.weight": torch.randn(40, 16)}


def test_latent_attention(tmp_path):
    tensors = latent_tensors()
    q_a, q_norm, q_b, kv_a, kv_norm, kv_b, _, _ = tensors.values()
    weights = open_weights(write(tmp_path / "a", tensors, num_attention_heads=2, head_dim=2))
    assert (weights.num_heads, weights.num_kv_heads, weights.head_dim) == (2, 2, 5)
    assert_near(weights.get("q", 0), q_b @ torch.diag(q_norm) @ q_a)
    wide = kv_b @ torch.diag(kv_norm) @ kv_a[:5]
    keys = torch.cat([wide[:3], kv_a[5:], wide[7:10], kv_a[5:]])
    assert_near(weights.get("k", 0), keys)
    assert_near(weights.get("v", 0), torch.cat([wide[3:7], wide[10:]]))
    assert weights.shape("k", 0) == (10, 16) and weights.statistics("k", 0).count == 160
    # llama.cpp cuts the last matrix in two
    kv_b = tensors.pop("model.layers.0.self_attn.kv_b_proj.weight").unflatten(0, (2, 7))
    tensors["model.layers.0.self_attn.k_b_proj.weight"] = kv_b[:, :3].mT
    tensors["model.layers.0.self_attn.v_b_proj.weight"] = kv_b[:, 3:]
    cut = open_weights(write(tmp_path / "b", tensors, num_attention_heads=2))
    for role in "qkv":
        assert_near(cut.get(role, 0), weights.get(role, 0))


def test_heads_may_differ_between_layers(tmp_path):
    """OpenELM."""
    tensors = {"transformer.token_embeddings.weight": torch.randn(40, 16)}
    parts = {
        0: [torch.randn(count * 4, 16) for count in (4, 2, 2)],
        1: [torch.randn(count * 4, 16) for count in (6, 3, 3)],
    }
    for layer, of_layer in parts.items():
        tensors[f"transformer.layers.{layer}.attn.qkv_proj.weight"] = torch.cat(of_layer)
        tensors[f"transformer.layers.{layer}.attn.out_proj.weight"] = torch.randn(16, len(of_layer[0]))
    found = open_weights(
        write(tmp_path, tensors, num_query_heads=[4, 6], num_kv_heads=[2, 3], head_dim=4, model_dim=16)
    )
    assert [found.heads(layer) for layer in range(2)] == [(4, 2), (6, 3)]
    for layer, wanted in parts.items():
        assert all(torch.equal(found.get(role, layer), part) for role, part in zip("qkv", wanted, strict=True))


def test_a_head_that_is_stored_is_the_head_though_the_model_says_it_is_tied(tmp_path):
    """As in transformers; a model that is run and one that is read agree."""
    random_model(tie_word_embeddings=True).save_pretrained(tmp_path, model_type="llama")
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    assert torch.equal(weights.get("head"), head) and torch.equal(weights.model().lm_head.weight, head)
    assert torch.equal(weights.get("embedding"), tensors["model.embed_tokens.weight"])


# -- what is wrong


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_attention_heads": None}, "num_attention_heads=None: wanted a whole number"),
        ({"num_attention_heads": "four"}, "num_attention_heads='four': wanted a whole number"),
        (
            {"n_head": 3, "num_attention_heads": None},
            r"n_head=3 and head_dim=5: wanted a product of 16, the rows of \S+q_proj",
        ),
        ({"head_dim": 3}, r"num_attention_heads=4 and head_dim=3: wanted a product of 16, the rows of \S+q_proj"),
        (
            {"num_key_value_heads": 4},
            r"num_key_value_heads=4 and head_dim=4: wanted a product of 8, the rows of \S+k_proj",
        ),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3: wanted at most 2, the layers that the file holds"),
        ({"hidden_size": 17}, r"hidden_size=17: wanted 16, the columns of model\.embed_tokens\.weight in the file"),
        ({"vocab_size": 41}, r"vocab_size=41: wanted 40, the rows of model\.embed_tokens\.weight in the file"),
        ({"num_local_experts": 4}, "num_local_experts=4: wanted at most 3, the experts that layer 1 holds"),
        ({"num_experts": -1}, "num_experts=-1: wanted a whole number"),
    ],
)
def test_sizes_are_held_against_the_tensors(config, message, tmp_path):
    tensors = tensors_of(random_model(**MIXTURE), tmp_path)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        open_weights(write(tmp_path / "new", tensors, **{"num_attention_heads": 4} | config))


def test_fused_rows_that_no_heads_explain_are_refused(tmp_path):
    tensors = {"transformer.wte.weight": torch.randn(40, 16), "transformer.h.0.attn.c_attn.weight": torch.randn(50, 16)}
    with pytest.raises(
        CheckpointError, match=r"n_head=4 and head_dim=4: wanted what makes 50 rows of queries, keys and"
    ):
        open_weights(write(tmp_path, tensors, n_head=4, head_dim=4))


def test_an_expert_that_is_missing_is_named(tmp_path):
    tensors = tensors_of(random_model(**MIXTURE), tmp_path)
    del tensors["model.layers.1.mlp.experts.1.up_proj.weight"]
    weights = open_weights(write(tmp_path / "new", tensors, num_attention_heads=4))
    with pytest.raises(CheckpointError, match=r"layer 1 holds 2 experts, and \S+up_proj.weight, but no .* of expert 1"):
        weights.get("up", 1)


@pytest.mark.parametrize(
    ("lost", "role"), [("1.self_attn.v_proj", "v"), ("0.post_attention", "norm2"), ("1.mlp.up", "up")]
)
def test_a_tensor_that_is_missing_is_named(lost, role, tmp_path):
    tensors = {name: tensor for name, tensor in tensors_of(random_model(), tmp_path).items() if lost not in name}
    with pytest.raises(CheckpointError, match=rf"has no '{role}' in layer {lost[0]}: found q, k"):
        open_weights(write(tmp_path / "new", tensors, num_attention_heads=4)).require_whole()


def test_a_layer_may_be_without_attention_and_not_without_anything(tmp_path):
    tensors = tensors_of(random_model(), tmp_path)
    hybrid = {name: tensor for name, tensor in tensors.items() if "layers.0.self_attn" not in name}
    weights = open_weights(write(tmp_path / "a", hybrid, num_attention_heads=4))
    weights.require_whole()
    assert weights.layers_with("q") == [1] and weights.layers_with("up") == [0, 1]
    empty = {name: tensor for name, tensor in tensors.items() if "layers.0" not in name}
    with pytest.raises(CheckpointError, match="has no 'q' in layer 0"):
        open_weights(write(tmp_path / "b", empty, num_attention_heads=4)).require_whole()


def test_a_number_that_is_not_finite_is_named_in_whatever_holds_it(tmp_path):
    tensors = latent_tensors()
    tensors["model.layers.0.self_attn.kv_a_layernorm.weight"][3] = math.nan
    weights = open_weights(write(tmp_path, tensors, num_attention_heads=2))
    with pytest.raises(Refusal, match=r"kv_a_layernorm\.weight: nan at \[3\], wanted finite numbers"):
        weights.get("k", 0)
    with pytest.raises(Refusal, match=r"kv_a_layernorm\.weight holds NaN"):
        weights.statistics("v", 0)
    assert weights.get("q", 0).isfinite().all()


def test_integers_are_refused_where_they_are_needed(tmp_path):
    tensors = tensors_of(random_model(), tmp_path)
    name = "model.layers.1.self_attn.v_proj.weight"
    weights = open_weights(write(tmp_path / "new", tensors | {name: tensors[name].int()}, num_attention_heads=4))
    assert weights.get("v", 0).shape == (8, 16)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_proj\.weight is stored as I32, wanted one of"):
        weights.get("v", 1)


# -- a model that can be read and not run


@pytest.fixture(params=["family", "setting"])
def readable(request, tmp_path) -> Path:
    """Of a family, or with a setting, that no model here computes; with a tokenizer."""
    model = random_model(
        vocab_size=160, qk_norm="head", **MIXTURE | {"mlp_only_layers": [], "moe_intermediate_size": 12}
    )
    model.save_pretrained(tmp_path, model_type="qwen3_moe" if request.param == "setting" else "minimoe")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config |= {"partial_rotary_factor": 0.5} if request.param == "setting" else {"model_type": "unheard_of"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = Tokenizer(models.WordLevel({f"token {i}": i for i in range(160)}, "token 0"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_model_that_does_not_run_says_why(readable):
    weights = open_weights(readable)
    assert weights.config is None
    assert "partial_rotary_factor=0.5" in weights.reason or "model_type='unheard_of': wanted one of" in weights.reason
    for run in (weights.model, lambda: weights.block(0)):
        with pytest.raises(Refusal, match=r"can be read and not run: .*(partial_rotary_factor|unheard_of)"):
            run()
    weights.require_decoder()
    assert open_weights(random_model()).reason is None


def test_methods_that_run_a_model_refuse_and_the_others_do_not(readable):
    report = compare(readable, readable, methods="all")
    refused = {name: found.result.refused for name, found in report.methods.items()}
    for name in ("virtual_response", "virtual_response_whitened", "token_agreement", "hidden_cka", "routing_agreement"):
        assert "can be read and not run" in refused[name]
    for name in ("aligned_cka", "csu", "match", "expert_attribution", "spectral", "norm_profile", "weight_cosine"):
        assert refused[name] is None
    saved = fingerprint(readable)
    assert saved.family in ("unheard_of", "qwen3_moe") and "not run" in saved.refused["responses"]


def test_the_names_of_roles_are_those_that_places_finds(tmp_path):
    random_model().save_pretrained(tmp_path)
    found = Places(open_weights(tmp_path)._tensors, {"num_attention_heads": 4}, "config.json")
    assert found.find("q", 0).names == ("model.layers.0.self_attn.q_proj.weight",)
    assert found.find("q", 2) is None and found.find("colour", 0) is None
