"""Against transformers: what it saves and what we save mean the same model to both.

Each case is a small random model of one family. transformers is the oracle: its weights, its logits, its losses.
Distances are max |a - b| / max |b|.
"""

import json
import logging
import os
import random
from functools import reduce
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch
import transformers
from safetensors.torch import load_file

from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.model.balance import load_balancing_loss
from minimoe.model.families import FAMILIES, read_config, write_config
from minimoe.model.saving import save_model
from tests.rounding import SLACK

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

DENSE = ("llama", "mistral", "qwen2", "qwen3")
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
LATENT = ("deepseek_v2", "deepseek_v3")
LATER = ("glm4_moe", *LATENT, "gpt_oss")
GROUPED = ("glm4_moe", *LATENT)
ALL = DENSE + SPARSE + LATER
# Of the cases drawn below those that show every kind of setting in every family; a test holds them to it.
CASES = [
    *(("llama", 0), ("llama", 4), ("llama", 11)),
    *(("mistral", 0), ("mistral", 6), ("mistral", 23)),
    *(("qwen2", 0), ("qwen2", 9), ("qwen2", 11)),
    *(("qwen3", 0), ("qwen3", 3), ("qwen3", 4)),
    *(("mixtral", 0), ("mixtral", 2), ("mixtral", 6), ("mixtral", 7)),
    *(("qwen2_moe", 1), ("qwen2_moe", 2), ("qwen2_moe", 3), ("qwen2_moe", 9)),
    *(("qwen3_moe", 0), ("qwen3_moe", 1), ("qwen3_moe", 4), ("qwen3_moe", 15)),
    *(("olmoe", 0), ("olmoe", 1), ("olmoe", 2), ("olmoe", 7)),
    *(("glm4_moe", 0), ("glm4_moe", 2), ("glm4_moe", 3), ("glm4_moe", 8)),
    *(("deepseek_v2", 0), ("deepseek_v2", 7), ("deepseek_v2", 9), ("deepseek_v2", 17)),
    *(("deepseek_v3", 0), ("deepseek_v3", 3), ("deepseek_v3", 4), ("deepseek_v3", 16)),
    *(("gpt_oss", 0), ("gpt_oss", 1), ("gpt_oss", 3)),
]


def random_settings(family: str, number: int) -> dict:
    """Arguments of a transformers configuration. Even cases go to one file, odd ones to shards."""
    draw = random.Random(f"{family} {number}")
    heads, layers = draw.choice([2, 4]), draw.choice([2, 3])
    settings = {
        "vocab_size": draw.choice([31, 40]),
        "hidden_size": draw.choice([16, 24, 32]),
        "intermediate_size": draw.choice([12, 20]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in (1, 2, 4) if heads % n == 0]),
        "max_position_embeddings": 64,
        "rms_norm_eps": draw.choice([1e-6, 1e-5]),
        "tie_word_embeddings": draw.random() < 0.3,
        "rope_parameters": random_rope(draw, "yarn" if family in LATER else "llama3"),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,  # of a padding token transformers computes no gradient
    }
    if family in LATENT:
        settings |= random_latents(draw) | {"num_key_value_heads": heads}
    elif family != "olmoe" and draw.random() < 0.7:
        settings["head_dim"] = draw.choice([4, 8, 12])
    elif family == "qwen3":
        settings["head_dim"] = settings["hidden_size"] // heads  # its default is 128
    if family in ("llama", "qwen3", "qwen3_moe", "olmoe", *LATER):
        settings["attention_bias"] = draw.random() < 0.5
    if family in SPARSE:
        experts = draw.choice([1, 3, 4, 8])
        key = "num_local_experts" if family == "mixtral" else "num_experts"
        settings[key] = experts
        settings["num_experts_per_tok"] = draw.choice([k for k in (1, 2, 3, 4) if k <= experts])
        settings["router_aux_loss_coef"] = draw.choice([0.0, 0.02])
    if family in ("qwen2_moe", "qwen3_moe", "olmoe"):
        settings["norm_topk_prob"] = draw.random() < 0.5
    if family in ("qwen2_moe", "qwen3_moe"):
        settings["moe_intermediate_size"] = draw.choice([8, 12])
        settings["decoder_sparse_step"] = draw.choice([1, 1, 2])
        settings["mlp_only_layers"] = draw.choice([[], [], [0]])
    if family == "qwen2_moe":
        settings["qkv_bias"] = draw.random() < 0.7
        settings["shared_expert_intermediate_size"] = draw.choice([8, 20])
    if family == "olmoe":
        settings["clip_qkv"] = draw.choice([None, 0.5])
    if family in ("mistral", "mixtral"):
        settings["sliding_window"] = draw.choice([None, 3, 64])
    if family == "gpt_oss":
        settings |= random_gpt_oss(draw, layers)
    elif family in LATER:
        settings |= random_groups(draw, layers)
    if family == "deepseek_v2":
        del settings["norm_topk_prob"]
        settings["topk_method"] = draw.choice(["greedy", "group_limited_greedy"])
    if family == "deepseek_v3":
        settings["rope_interleave"] = draw.random() < 0.7
    if family == "glm4_moe":
        settings["use_qk_norm"] = draw.random() < 0.5
        settings.setdefault("head_dim", 8)  # half of it has to be an even number
        settings["rope_parameters"]["partial_rotary_factor"] = draw.choice([0.5, 1.0])
    return settings


def random_gpt_oss(draw: random.Random, layers: int) -> dict:
    experts = draw.choice([3, 4, 8])
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": draw.choice([k for k in (1, 2, 3, 4) if k <= experts]),
        "router_aux_loss_coef": draw.choice([0.0, 0.02]),
        "sliding_window": draw.choice([3, 64]),
        "layer_types": draw.choice([None, ["full_attention", *["sliding_attention"] * (layers - 1)]]),
        "swiglu_limit": draw.choice([7.0, 0.4]),
    }


def random_latents(draw: random.Random) -> dict:
    return {
        "q_lora_rank": draw.choice([None, 6, 10]),
        "kv_lora_rank": draw.choice([8, 12]),
        "qk_nope_head_dim": draw.choice([6, 8]),
        "qk_rope_head_dim": draw.choice([4, 8]),
        "v_head_dim": draw.choice([5, 8]),
    }


def random_groups(draw: random.Random, layers: int) -> dict:
    """A mixture as in DeepSeek's models."""
    experts, groups = draw.choice([4, 8]), draw.choice([1, 2])
    kept = draw.choice(range(1, groups + 1))
    return {
        "n_routed_experts": experts,
        "num_experts_per_tok": draw.choice([1, 2, 3][: experts // groups * kept]),
        "moe_intermediate_size": draw.choice([8, 12]),
        "n_shared_experts": draw.choice([1, 2]),
        "first_k_dense_replace": draw.choice(range(layers)),
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": draw.random() < 0.5,
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
    }


def random_rope(draw: random.Random, third: str) -> dict:
    rope = {"rope_theta": draw.choice([10000.0, 500.0]), "rope_type": draw.choice(["default", "linear", third])}
    if rope["rope_type"] != "default":
        rope["factor"] = draw.choice([2.0, 3.5])
    if rope["rope_type"] == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    if rope["rope_type"] == "yarn":
        rope |= {"original_max_position_embeddings": 16, "beta_fast": draw.choice([4.0, 1.5]), "beta_slow": 0.5}
        rope |= draw.choice(
            [{}, {"truncate": False}, {"mscale": 1.0, "mscale_all_dim": 0.7}, {"attention_factor": 1.3}]
        )
    return rope


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Norms away from 1, biases away from 0, routers that decide: what an initialisation leaves trivial."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.3, generator=generator)
        if "norm" in name:
            parameter.add_(1)
        if name.endswith(("gate.weight", "router.weight")):
            parameter.mul_(3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.3, generator=generator)


def cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """The parameters alone: `model.to` would round the rotary frequencies as well."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


class Case(NamedTuple):
    theirs: torch.nn.Module
    ours: MoEForCausalLM
    folder: str
    bfloat16: bool
    sharded: bool
    ids: torch.Tensor

    @property
    def balances(self) -> bool:
        """Whether transformers computes a balance loss."""
        return hasattr(self.theirs.config, "router_aux_loss_coef")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request, tmp_path_factory) -> Case:
    """A random model, saved by transformers and read by us."""
    family, number = request.param
    bfloat16, sharded = number % 3 == 0, number % 2 == 1
    config = transformers.AutoConfig.for_model(family, **random_settings(family, number))
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomise(theirs, number)
    folder = tmp_path_factory.mktemp("theirs")
    if bfloat16:
        cast(theirs, torch.bfloat16)
    theirs.save_pretrained(folder, max_shard_size="8KB" if sharded else "5GB")
    cast(theirs, torch.float32)
    assert (folder / "model.safetensors").exists() != sharded
    ids = torch.randint(config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(number))
    return Case(theirs, MoEForCausalLM.from_pretrained(folder, dtype=torch.float32), folder, bfloat16, sharded, ids)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


def test_logits_and_greedy_tokens_are_equal(case):
    with torch.no_grad():
        ours, theirs = case.ours(case.ids).logits, case.theirs(case.ids).logits
    assert distance(ours, theirs) < 1e-5 * SLACK
    prompt = case.ids[:, :5]
    expected = case.theirs.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(case.ours.generate(prompt, 6, use_cache=True), expected)
    assert torch.equal(case.ours.generate(prompt, 6, use_cache=False), expected)


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """By our names: transformers fuses gate and up, which are two tensors here."""
    model.zero_grad()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    is_gpt_oss = any(name.endswith("experts.gate_up_proj_bias") for name in found)
    for name in [name for name in found if "experts.gate_up_proj" in name]:
        both = found.pop(name)
        halves = (both[..., ::2], both[..., 1::2]) if is_gpt_oss else both.chunk(2, dim=1)
        for half, ours_name in zip(halves, ("gate_proj", "up_proj"), strict=True):
            found[name.replace("gate_up_proj", ours_name)] = half
    if is_gpt_oss:
        found = {name: each.mT if ".experts." in name and each.dim() == 3 else each for name, each in found.items()}
    names = (("shared_experts", "shared_expert"), (".router.", ".gate."))
    return {reduce(lambda name, pair: name.replace(*pair), names, name): each for name, each in found.items()}


def assert_gradients_are_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = max(float(expected.abs().max()), 1e-3)  # where the gradient is 0 but for rounding
        assert float((ours[name] - expected).abs().max()) / scale < 1e-4 * SLACK, name


def test_losses_and_gradients_are_equal(case):
    sparse = case.balances
    theirs = case.theirs(case.ids, labels=case.ids, **({"output_router_logits": True} if sparse else {}))
    ours = case.ours(case.ids, labels=case.ids, output_router_logits=sparse)
    loss = ours.cross_entropy
    if sparse:
        pooled = load_balancing_loss(ours.router_outputs, across_layers="pooled")
        assert distance(pooled, theirs.aux_loss) < 1e-5 * SLACK
        loss = loss + case.ours.config.router_aux_loss_coef * pooled
    assert distance(loss, theirs.loss) < 1e-5 * SLACK
    assert_gradients_are_equal(gradients(case.ours, loss), gradients(case.theirs, theirs.loss))


def test_padded_batches_of_unequal_length(case):
    for side in ("left", "right"):
        check_padded_batch(case, side)


def check_padded_batch(case: Case, side: str) -> None:
    """Logits and gradients at tokens, the balance loss, and for left padding the tokens that are generated."""
    mask = torch.ones_like(case.ids)
    mask[1, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    labels = case.ids.masked_fill(mask == 0, -100)
    if side == "left":
        labels[1, 4] = -100  # the first token of a text: there it would be predicted from padding
    sparse = {"output_router_logits": True} if case.balances else {}
    ours = case.ours(case.ids, attention_mask=mask, labels=case.ids, **sparse)
    theirs = case.theirs(case.ids, attention_mask=mask, labels=labels, **sparse)
    real = mask == 1
    assert distance(ours.logits[real], theirs.logits[real]) < 1e-5 * SLACK
    cross_entropy = theirs.loss
    if sparse:
        pooled = load_balancing_loss(ours.router_outputs, across_layers="pooled", attention_mask=mask)
        assert distance(pooled, theirs.aux_loss) < 1e-5 * SLACK
        cross_entropy = theirs.loss - case.theirs.config.router_aux_loss_coef * theirs.aux_loss
    assert distance(ours.cross_entropy, cross_entropy) < 1e-5 * SLACK
    expected = gradients(case.theirs, cross_entropy)
    assert_gradients_are_equal(gradients(case.ours, ours.cross_entropy), expected)
    if side == "left":
        options = {"max_new_tokens": 5, "attention_mask": mask}
        continued = case.theirs.generate(case.ids, do_sample=False, **options)
        for use_cache in (True, False):
            assert torch.equal(case.ours.generate(case.ids, use_cache=use_cache, **options), continued)


def test_what_we_save_transformers_reads_and_gives_back(case, tmp_path):
    ours = MoEForCausalLM.from_pretrained(case.folder)
    assert ours.lm_head.weight.dtype == (torch.bfloat16 if case.bfloat16 else torch.float32)
    save_model(ours, tmp_path / "ours", max_shard_size=8000 if case.sharded else 10**9)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == case.sharded

    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == ours.model.norm.weight.dtype
    cast(theirs, torch.float32)
    with torch.no_grad():
        logits, expected = theirs(case.ids).logits, case.theirs(case.ids).logits
    assert distance(logits, expected) < 1e-5 * SLACK  # not 0: even transformers' sums depend on where memory is aligned
    for name, tensor in case.theirs.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name

    cast(theirs, torch.bfloat16 if case.bfloat16 else torch.float32)
    theirs.save_pretrained(tmp_path / "back", max_shard_size="8KB" if case.sharded else "5GB")
    back = MoEForCausalLM.from_pretrained(tmp_path / "back")
    assert back.config == ours.config
    assert back.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in back.state_dict().items():
        assert tensor.dtype == ours.state_dict()[name].dtype
        assert torch.equal(tensor, ours.state_dict()[name]), name


BINARY = ("attention_bias", "qkv_bias", "norm_topk_prob", "decoder_sparse_step", "clip_qkv")
BINARY += (
    "router_aux_loss_coef",
    "swiglu_limit",
    "rope_interleave",
    "topk_method",
    "use_qk_norm",
    "n_shared_experts",
    "n_group",
    "routed_scaling_factor",
)


def test_the_cases_cover_what_the_families_can_do():
    """Guards the sampling: every kind of setting must occur in some case of each family that has it."""
    for family in ALL:
        drawn = [random_settings(family, number) for kind, number in CASES if kind == family]
        assert {rope["rope_parameters"]["rope_type"] for rope in drawn} == {
            "default",
            "linear",
            "yarn" if family in LATER else "llama3",
        }
        assert {settings["tie_word_embeddings"] for settings in drawn} == {True, False}
        groups = {settings["num_attention_heads"] // settings["num_key_value_heads"] for settings in drawn}
        assert groups == {1} if family in LATENT else len(groups) > 1
        ranks = {settings["q_lora_rank"] for settings in drawn if family in LATENT}
        assert not ranks or (None in ranks and len(ranks) > 1)
        assert family not in LATENT or any("mscale_all_dim" in settings["rope_parameters"] for settings in drawn)
        limited = (s["topk_group"] < s["n_group"] and s.get("topk_method") != "greedy" for s in drawn if "n_group" in s)
        assert family not in GROUPED or any(limited)
        for key in BINARY:
            values = {settings.get(key) for settings in drawn}
            assert len(values) == 1 + any(key in settings for settings in drawn), (family, key)
        first = {settings.get("first_k_dense_replace", 0) > 0 for settings in drawn}
        assert len(first) == 1 + (family in GROUPED)
        windows = {settings["sliding_window"] for settings in drawn if "sliding_window" in settings}
        assert not windows or windows > {3}, family
        kinds = {str(settings["layer_types"]) for settings in drawn if family == "gpt_oss"}
        assert not kinds or len(kinds) > 1
        if family in SPARSE + LATER:
            assert {1, 2} <= {settings["num_experts_per_tok"] for settings in drawn}
            assert len({settings["num_experts_per_tok"] for settings in drawn}) >= 3


# What has to be said: GLM's default hidden size is no multiple of its heads, and DeepSeek-V2 has no default of K.
SAID = {"glm4_moe": {"head_dim": 128}, "deepseek_v2": {"num_experts_per_tok": 6}}


@pytest.mark.parametrize("family", ALL)
def test_absent_fields_mean_what_they_mean_to_transformers(family):
    said = SAID.get(family, {})
    full = transformers.AutoConfig.for_model(family, **said).to_dict()
    if family == "qwen3_moe":
        assert full.get("head_dim") is None
    found = read_config({"model_type": family, **said})
    assert found == read_config(full)
    assert full["num_hidden_layers"] == found.num_hidden_layers


OLD_ROPE = [
    {"rope_theta": 50000.0},
    {"rope_theta": 50000.0, "rope_scaling": None},
    {"rope_theta": 20000, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
]


@pytest.mark.parametrize("family", ALL)
def test_earlier_configurations_mean_what_they_mean_to_transformers(family):
    """transformers itself translates the old names; both readings must give one model."""
    settings = random_settings(family, 0)
    del settings["rope_parameters"]
    for rope in OLD_ROPE:
        old = {"torch_dtype": "float16", **settings, **rope}
        translated = transformers.AutoConfig.for_model(family, **json.loads(json.dumps(old)))
        new = json.loads(translated.to_json_string(use_diff=False))
        assert "rope_parameters" in new
        assert read_config(old | {"model_type": family}) == read_config(new), rope


def test_the_number_of_experts_has_two_names():
    for family in SPARSE:
        for name in ("num_experts", "num_local_experts"):
            assert read_config({"model_type": family, name: 16}).num_experts == 16
        with pytest.raises(ValueError, match=r"num_\w*experts=\d+: wanted \d+, as num_\w*experts says"):
            read_config({"model_type": family, "num_experts": 8, "num_local_experts": 16})


@pytest.mark.parametrize("family", ALL)
def test_our_configuration_raises_no_warning_in_transformers(family, tmp_path):
    settings = random_settings(family, 3)
    raw = write_config(read_config({"model_type": family, **settings}), family, "float32")
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    transformers.logging.set_verbosity_warning()
    transformers.logging.add_handler(handler)
    try:
        config = transformers.AutoConfig.from_pretrained(tmp_path)
    finally:
        transformers.logging.remove_handler(handler)
        transformers.logging.set_verbosity_error()
    assert heard == []
    assert config.dtype == torch.float32
    assert config.architectures == [FAMILIES[family].architecture]
    assert hasattr(transformers, FAMILIES[family].architecture)


@pytest.mark.parametrize("family", ALL)
def test_names_on_disk_are_those_that_transformers_writes(family, tmp_path):
    config = transformers.AutoConfig.for_model(family, **random_settings(family, 2))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "theirs")
    MoEForCausalLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}


def test_a_model_trained_here_opens_there(tmp_path):
    """From our side alone: a configuration written by hand, converted to a published family."""
    config = MoEConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_experts=4, moe_intermediate_size=12)
    ours = MoEForCausalLM(config, seed=3).eval()
    ours.save_pretrained(tmp_path, model_type="mixtral")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert distance(ours(ids).logits, theirs(ids).logits) < 1e-5
