"""Gauges change weights, and only those they name; the function stays, here and in transformers."""

import os
import re

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from minimoe.lineage.gauge import GAUGES, all_gauges, fold_norms, obstacle, replace_norms, rotate_residual
from minimoe.model import MoEConfig, MoEForCausalLM
from tests.rounding import SLACK

# No row begins with a token twice: those two positions would have equal vectors, and expert choice a tie.
IDS = torch.tensor([[3, 17, 0, 22, 3, 8, 11, 5], [1, 7, 5, 20, 9, 2, 4, 19]])
SIZES = {
    "vocab_size": 23,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 7,
    "moe_intermediate_size": 5,
    "attention_bias": True,
    "attention_output_bias": True,
    "tie_word_embeddings": False,
}
MIXTURE = {"num_experts": 6}
PANGU = {"router": "grouped", "n_group": 2, "router_scale": True, "shared_expert_intermediate_size": 6}
QWEN = {"shared_expert_intermediate_size": 6, "shared_expert_gate": True, "norm_topk_prob": False}
GPT_OSS = {"router": "topk_softmax", "moe_bias": True, "attention_sinks": True, "swiglu_limit": 1.0}
GPT_OSS |= {"sliding_window": 3, "layer_types": ("sliding_attention", "full_attention")}
LATENT = {"kv_lora_rank": 7, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}
LATENT |= {"head_dim": None, "num_key_value_heads": None}
KINDS = {
    "dense": {"num_experts": 0},
    "dense, tied, one group": {"num_experts": 0, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "dense, no groups, no biases": {
        "num_experts": 0,
        "num_key_value_heads": 6,
        "attention_bias": False,
        "attention_output_bias": False,
    },
    "norm of each head": {"num_experts": 0, "qk_norm": "head"},
    "norm of each head, clipped": {"num_experts": 0, "qk_norm": "head", "clip_qkv": 1.0},
    "norm of all heads": MIXTURE | {"qk_norm": "full"},
    "norm of all heads, clipped": MIXTURE | {"qk_norm": "full", "clip_qkv": 1.0},
    "clipped": MIXTURE | {"clip_qkv": 1.0},
    "sigmoid, not in groups": MIXTURE | {"score_func": "sigmoid", "e_score_correction_bias": True},
    "every second layer": MIXTURE | QWEN | {"decoder_sparse_step": 2},
    "pangu, two of a group": MIXTURE | PANGU | {"num_experts_per_tok": 4},
    "half of a head turned": MIXTURE | {"partial_rotary_factor": 0.5, "score_func": "sigmoid"},
    "latent attention": LATENT | {"num_experts": 0, "rope_interleave": True},
    "latent attention, narrow queries": MIXTURE | LATENT | {"q_lora_rank": 5},
    "sinks, windows and biases": MIXTURE | GPT_OSS,
    "tied mixture, long context": MIXTURE
    | {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}
ATTENTION = ("rotate_qk", "scale_qk", "mix_vo", "permute_heads")
CONTINUOUS = [
    "rotate_residual",
    "rotate_qk",
    "scale_qk",
    "mix_vo",
    "scale_neurons",
    "shift_router",
    "exchange_router_scale",
]
WITHIN_LATENT_ATTENTION = ("q_b_proj", "kv_b_proj", "_a_layernorm", "_a_proj.bias", "mqa.bias")
QK = ("q_proj", "k_proj")


def touches(gauge: str, name: str, config: MoEConfig) -> bool:
    """Whether `gauge` should change the tensor `name`, worked out from the names alone."""
    if any(part in name for part in WITHIN_LATENT_ATTENTION):
        return False
    if name.endswith(("sinks", "_bias", "gate.bias")):
        moves = {"sinks": "permute_heads"}.get(name.rpartition(".")[2], "permute_experts")
        return gauge == moves or ("residual" in gauge and name.endswith("down_proj_bias"))
    qk_norm = "q_norm" in name or "k_norm" in name
    of_the_router = ".gate." in name
    beside_the_rows = "router_scale" in name or "e_score_correction_bias" in name
    residual_norm = "layernorm" in name or name == "model.norm.weight"
    writes = any(part in name for part in ("embed", "o_proj", "down_proj"))
    reads = not (writes or qk_norm or beside_the_rows or residual_norm or name.endswith("bias"))
    mlp = ".mlp." in name and not of_the_router and "shared_expert_gate" not in name
    one_group = config.num_key_value_heads == 1 and any(part in name for part in ("k_proj", "v_proj"))
    return {
        "fold_norms": reads or residual_norm,
        "rotate_residual": reads or writes,
        "permute_residual": reads or writes or residual_norm,
        "rotate_qk": any(part in name for part in QK) or qk_norm,
        "scale_qk": qk_norm if config.qk_norm else any(part in name for part in QK),
        "mix_vo": "v_proj" in name or name.endswith("o_proj.weight"),
        "permute_heads": "self_attn" in name
        and not name.endswith("o_proj.bias")
        and not one_group
        and (config.qk_norm == "full" or not qk_norm),
        "permute_neurons": mlp,
        "scale_neurons": mlp and "gate_proj" not in name,
        "permute_experts": ".experts." in name or of_the_router,
        "shift_router": name.endswith(".gate.weight"),
        "exchange_router_scale": "router_scale" in name or ".experts.down_proj" in name,
    }[gauge]


def random_model(seed: int = 0, **settings) -> MoEForCausalLM:
    """Float64, every weight away from what an initialisation would give."""
    model = MoEForCausalLM(MoEConfig(**SIZES | settings)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(1.0 if "norm" in name or "scale" in name else 0.0, 0.4, generator=generator)
    return model


@torch.no_grad()
def logits(model: MoEForCausalLM) -> torch.Tensor:
    return model(IDS).logits


@torch.no_grad()
def logits_with_cache(model: MoEForCausalLM) -> torch.Tensor:
    """The same positions in three calls: a prompt, a piece, a token."""
    pieces, cache = [], None
    for ids in IDS.split([5, 2, 1], dim=1):
        output = model(ids, cache=cache, use_cache=True)
        pieces.append(output.logits)
        cache = output.cache
    return torch.cat(pieces, dim=1)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def assert_same_function(a: MoEForCausalLM, b: MoEForCausalLM) -> None:
    assert distance(logits(a), logits(b)) < 1e-10
    assert distance(logits_with_cache(a), logits_with_cache(b)) < 1e-10
    assert torch.equal(a.generate(IDS[:, :4], 4), b.generate(IDS[:, :4], 4))


def over_layers(model: MoEForCausalLM) -> dict[str, torch.Tensor]:
    """The tensors of one role in all layers, as one vector: in one layer a small permutation may change nothing."""
    roles: dict[str, list[torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        roles.setdefault(re.sub(r"layers\.\d+", "layers", name), []).append(tensor.flatten())
    return {role: torch.cat(tensors) for role, tensors in roles.items()}


def check_gauge(gauge: str, model: MoEForCausalLM) -> None:
    """The function stays, every tensor that should change does so widely, every other one is the same to the bit."""
    if gauge == "rotate_residual":
        model = fold_norms(model)
    before, expected = over_layers(model), logits(model)
    changed = GAUGES[gauge](model, seed=5)
    assert distance(logits(changed), expected) < 1e-10
    assert_close(over_layers(model), before, rtol=0, atol=0)  # the input is as it was
    after = over_layers(changed)
    for role, old in before.items():
        if touches(gauge, role, model.config):
            assert float((after[role] - old).norm() / old.norm()) > 0.1, role
        else:
            assert torch.equal(after[role], old), role


def check_gauge_or_refusal(gauge: str, model: MoEForCausalLM) -> None:
    if obstacle(gauge, model.config) is None:
        check_gauge(gauge, model)
    else:
        with pytest.raises(ValueError, match=f"{gauge}: .*wanted"):
            GAUGES[gauge](model, seed=0)


def test_with_every_router(router_settings):
    model = random_model(**router_settings)
    check_obstacles(model.config)
    for gauge in GAUGES:
        if gauge not in ATTENTION:
            check_gauge_or_refusal(gauge, model)
    check_all(model, all_gauges(model, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_kind_of_attention_and_mlp(kind):
    model = random_model(**KINDS[kind])
    check_obstacles(model.config)
    for gauge in GAUGES:
        check_gauge_or_refusal(gauge, model)
    check_all(model, all_gauges(model, 7))


def check_all(model: MoEForCausalLM, gauged: MoEForCausalLM) -> None:
    assert_same_function(gauged, model)
    before, after = over_layers(model), over_layers(gauged)
    for role, old in before.items():  # nothing is left of the matrices that a comparison by place would find
        if old.numel() > 200 and not any(part in role for part in WITHIN_LATENT_ATTENTION):
            assert abs(float(torch.cosine_similarity(old, after[role], dim=0))) < 0.3, role


# -- what does not apply, and why

HASH = {"num_experts": 6, "router": "hash"}
REFUSALS = [
    ("scale_qk", {"clip_qkv": 1.0}, "clip_qkv=1.0"),
    ("mix_vo", {"clip_qkv": 1.0}, "clip_qkv=1.0"),
    ("permute_experts", MIXTURE | {"mlp_only_layers": (0, 1)}, "num_experts=6"),
    ("permute_experts", HASH, "router='hash'"),
    ("shift_router", {"num_experts": 0}, "num_experts=0"),
    ("shift_router", MIXTURE | {"score_func": "sigmoid"}, "score_func='sigmoid'"),
    *((gauge, LATENT | {"num_experts": 0}, "kv_lora_rank=7") for gauge in ATTENTION),
    *((gauge, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5") for gauge in ("rotate_qk", "scale_qk")),
    *((gauge, MIXTURE | GPT_OSS, "moe_bias=True") for gauge in ("permute_neurons", "scale_neurons")),
    *((gauge, MIXTURE | {"swiglu_limit": 1.0}, "swiglu_limit=1.0") for gauge in ("permute_neurons", "scale_neurons")),
    ("exchange_router_scale", MIXTURE | PANGU | {"moe_bias": True}, "moe_bias=True"),
    ("exchange_router_scale", HASH, "router='hash'"),
    ("exchange_router_scale", MIXTURE, "router_scale=False"),
]


@pytest.mark.parametrize(("gauge", "settings", "message"), REFUSALS)
def test_refusals(gauge, settings, message):
    with pytest.raises(ValueError, match=f"{gauge}: {message}.*wanted"):
        GAUGES[gauge](random_model(**settings), seed=0)


def check_obstacles(config: MoEConfig) -> None:
    """The list above is whole: what it does not name applies."""
    blocked = {gauge for gauge in GAUGES if obstacle(gauge, config)}
    expected = set() if config.router_scale else {"exchange_router_scale"}
    expected |= {"permute_experts", "shift_router"} if config.num_experts == 0 or config.router == "hash" else set()
    expected |= {"shift_router"} if config.score_func == "sigmoid" else set()
    expected |= {"permute_neurons", "scale_neurons"} if config.moe_bias else set()
    expected |= {*ATTENTION} if config.kv_lora_rank else set()
    expected |= {"rotate_qk", "scale_qk"} if config.partial_rotary_factor < 1 else set()
    expected |= {"mix_vo"} if config.clip_qkv else set()
    expected |= {"scale_qk"} if config.clip_qkv and config.qk_norm != "head" else set()
    assert blocked == expected


def test_what_is_refused_would_change_the_function():
    """Sigmoid scores each expert for itself, so that a common shift shows."""
    model = random_model(**KINDS["sigmoid, not in groups"])
    expected = logits(model)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight += torch.linspace(-0.4, 0.4, SIZES["hidden_size"], dtype=torch.float64)
    assert distance(logits(model), expected) > 1e-3


def test_rotation_wants_folded_norms():
    model = random_model(num_experts=0)
    with pytest.raises(ValueError, match=r"layers.0.input_layernorm.weight goes from .*fold_norms"):
        rotate_residual(model, seed=0)
    with torch.no_grad():  # one number throughout will do, whatever it is: the embeddings can stay tied
        tied = random_model(num_experts=0, tie_word_embeddings=True)
        for name, parameter in tied.named_parameters():
            if "norm" in name:
                parameter.fill_(0.7)
    turned = rotate_residual(tied, seed=0)
    assert turned.config.tie_word_embeddings
    assert distance(logits(turned), logits(tied)) < 1e-10


def test_a_gauge_that_does_not_exist():
    with pytest.raises(ValueError, match="gauge='fold'"):
        obstacle("fold", MoEConfig())


# -- tied embeddings, norms


def test_folding_the_final_norm_unties_the_embeddings():
    tied = random_model(num_experts=0, tie_word_embeddings=True)
    folded = fold_norms(tied)
    assert not folded.config.tie_word_embeddings and tied.config.tie_word_embeddings
    assert torch.equal(folded.model.embed_tokens.weight, tied.model.embed_tokens.weight)
    assert torch.equal(folded.lm_head.weight, tied.model.embed_tokens.weight * tied.model.norm.weight)
    again = fold_norms(folded)
    assert_close(dict(again.state_dict()), dict(folded.state_dict()), rtol=0, atol=0)


def test_a_final_norm_of_1_leaves_the_embeddings_tied():
    tied = random_model(num_experts=0, tie_word_embeddings=True)
    tied.model.norm.weight.data.fill_(1)
    folded = fold_norms(tied)
    assert folded.config == tied.config and folded.config.tie_word_embeddings
    assert distance(logits(folded), logits(tied)) < 1e-10


def test_a_norm_cannot_be_replaced_by_0_unless_it_is_0():
    model = random_model(num_experts=0)
    name = "model.layers.1.post_attention_layernorm"
    with pytest.raises(ValueError, match=rf"{name}.weight\[0\]=0: wanted another number, since it is [-\d.]+ now"):
        replace_norms(model, {name: torch.zeros(12)})
    model.get_submodule(name).weight.data.zero_()
    assert distance(logits(replace_norms(model, {name: torch.zeros(12)})), logits(model)) < 1e-10
    assert distance(logits(fold_norms(model)), logits(model)) < 1e-10
    with pytest.raises(KeyError, match="lm_head"):
        replace_norms(model, {"lm_head": torch.ones(12)})


# -- degrees, seeds, dtypes


@pytest.mark.parametrize("gauge", CONTINUOUS)
def test_amounts(gauge):
    """0 changes nothing, more changes more, and at every amount the function stays."""
    model = fold_norms(random_model(**MIXTURE, **PANGU))
    start = over_layers(model)
    moved = []
    for amount in (0.0, 0.01, 0.3, 1.0, 1.5):
        changed = GAUGES[gauge](model, seed=1, amount=amount)
        assert distance(logits(changed), logits(model)) < 1e-10
        after = over_layers(changed)
        moved.append(sum(float((after[role] - old).norm()) for role, old in start.items()))
    assert moved[0] < 1e-12 < moved[1] < moved[2] < moved[3]
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"amount=.*: wanted a finite number of at least 0"):
            GAUGES[gauge](model, seed=1, amount=wrong)


def test_half_of_the_neurons_change_sign():
    model = random_model(num_experts=0, intermediate_size=400)
    for amount, share in ((1.0, 0.5), (0.5, 0.25)):
        scaled = GAUGES["scale_neurons"](model, seed=0, amount=amount)
        for old, new in zip(model.model.layers, scaled.model.layers, strict=True):
            up, down = (
                (getattr(new.mlp, name).weight / getattr(old.mlp, name).weight) for name in ("up_proj", "down_proj")
            )
            factors = up[:, 0].detach()
            assert_close(up, factors[:, None].expand_as(up))
            assert_close(down, 1 / factors.expand_as(down))
            assert abs(float((factors < 0).double().mean()) - share) < 0.08
            assert 2**-amount <= float(factors.abs().min()) < float(factors.abs().max()) <= 2**amount


@pytest.mark.exact("two rewrites by one seed are compared to the bit")
def test_the_seed_decides_and_the_global_generator_is_left_alone():
    model = fold_norms(random_model(**MIXTURE, **PANGU))
    state = torch.get_rng_state()
    for gauge in GAUGES.keys() - {"fold_norms"}:
        one, same, other = (over_layers(GAUGES[gauge](model, seed=seed)) for seed in (1, 1, 2))
        assert_close(one, same, rtol=0, atol=0)
        assert any(not torch.equal(one[role], other[role]) for role in one), gauge
    assert torch.equal(torch.get_rng_state(), state)


def test_dtype_and_mode():
    model = random_model(**MIXTURE, **PANGU).float().train()
    gauged = all_gauges(model, 0)
    assert {tensor.dtype for tensor in gauged.state_dict().values()} == {torch.float32}
    assert not gauged.training and model.training
    assert all(parameter.requires_grad for parameter in gauged.parameters())
    assert distance(logits(gauged), logits(model.eval())) < 1e-3


# -- all of them


@settings(max_examples=8)
@given(order=st.permutations(list(GAUGES)), kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 2**31))
def test_any_order(order, kind, seed):
    model = changed = random_model(seed % 5, **KINDS[kind])
    for gauge in order:
        if gauge == "rotate_residual":
            changed = fold_norms(changed)
        if obstacle(gauge, model.config) is None:
            changed = GAUGES[gauge](changed, seed=seed)
    assert_same_function(changed, model)


# -- on disk

NO_OUTPUT_BIAS = {"attention_output_bias": False}
NO_BIAS = NO_OUTPUT_BIAS | {"attention_bias": False}
FAMILIES = {
    "llama": {"num_experts": 0},
    "qwen2": {"num_experts": 0, "tie_word_embeddings": True} | NO_OUTPUT_BIAS,
    "qwen3": {"num_experts": 0, "qk_norm": "head"},
    "mixtral": MIXTURE | NO_BIAS,
    "qwen2_moe": MIXTURE | QWEN | NO_OUTPUT_BIAS | {"mlp_only_layers": (0,)},
    "qwen3_moe": MIXTURE | {"qk_norm": "head", "tie_word_embeddings": True},
    "olmoe": MIXTURE | {"qk_norm": "full", "clip_qkv": 1.0, "hidden_size": 24, "head_dim": None},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_function(family, tmp_path):
    """In float64, but for its softmax and norms, which are in float32 whatever the dtype: hence the tolerance."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = random_model(**FAMILIES[family], model_type=family)
    all_gauges(model, 3).save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float64,
        output_loading_info=True,
        experts_implementation="eager",  # the others know no float64
    )
    assert not any(info.values()), info
    with torch.no_grad():
        assert distance(theirs(IDS).logits.double(), logits(model)) < 1e-5 * SLACK
        expected = model.generate(IDS[:, :4], 4)
        assert torch.equal(theirs.generate(IDS[:, :4], max_new_tokens=4, do_sample=False), expected)


def test_pangu_comes_back_from_disk(tmp_path):
    """transformers has no Pangu Pro MoE."""
    shape = {"hidden_size": 24, "head_dim": None, "num_experts_per_tok": 2}
    model = random_model(**MIXTURE, **PANGU, **shape, model_type="pangu_pro_moe")
    all_gauges(model, 3).save_pretrained(tmp_path)
    assert_same_function(MoEForCausalLM.from_pretrained(tmp_path), model)
