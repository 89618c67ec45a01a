"""How each published family writes a model down: the keys of its config.json, the names of its tensors.

One table per family; the functions at the end interpret them. `read_config` and `write_config` translate
between a `config.json` and a `MoEConfig`, `Family.on_disk` between the names of tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from minimoe.model.config import LAYER_TYPES, MIXTURE_FIELDS, ROPE_OPTIONS, ROPE_SETTINGS, MoEConfig, require


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets one family's checkpoints apart. What is not said here is as the defaults of `MoEConfig` have it."""

    model_type: str
    architecture: str  # the class that transformers builds
    keys: Mapping[str, str]  # MoEConfig field -> key of config.json
    defaults: Mapping[str, Any]  # MoEConfig field -> the value that an absent key stands for
    fixed: Mapping[str, Any]  # MoEConfig field -> its one value in this family, which no key sets
    supported: Mapping[str, tuple] = field(default_factory=dict)  # further keys, as in `_SUPPORTED_VALUES`
    optional: tuple[str, ...] = ("router_z_loss_coef",)  # keys that are written only where they say something
    written: Mapping[str, Any] = field(default_factory=dict)  # further keys of every configuration, which are not read
    renames: tuple[tuple[str, str], ...] = ()  # parts of tensor names: ours, on disk
    fused_experts: bool = False  # whether all experts lie in one tensor, as layout.py has it
    rows: tuple[str, ...] = ()  # tensors (by the end of their name on disk) stored as [1, n] instead of [n]
    topk_methods: tuple[str, str] | None = None  # values of topk_method: for a choice without groups, and with them
    disk_type: str | None = None  # model_type in config.json, where it is spelt differently
    aliases: tuple[str, ...] = ()  # further spellings, in lower case

    def on_disk(self, name: str) -> str:
        """The name on disk of the tensor that the model calls `name`, with one tensor per expert."""
        for ours, theirs in self.renames:
            name = name.replace(ours, theirs)
        return name


_OF_THEIR_OWN = ("model_type", "rope_theta", "rope_scaling")  # are read and written by code of their own
_DEFAULTS = {each.name: each.default for each in fields(MoEConfig) if each.name not in _OF_THEIR_OWN}
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
_MIXTURE_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


def _same(*names: str) -> dict[str, str]:
    return dict(zip(names, names, strict=True))


def _sizes(*sizes: int | None) -> dict[str, Any]:
    """What is absent in a config.json: these sizes, in the order of the names above, and an output head of its own."""
    return {"tie_word_embeddings": False, **dict(zip((*_SIZES, *_MIXTURE_SIZES), sizes, strict=False))}


_DECODER = _same(*_SIZES, "rms_norm_eps", "initializer_range", "tie_word_embeddings")
_HEAD_DIM, _WINDOW = _same("head_dim"), _same("sliding_window")
_ONE_BIAS_KEY = {"attention_bias": "attention_bias", "attention_output_bias": "attention_bias"}
_MIXTURE = _same("num_experts", "num_experts_per_tok", "router_aux_loss_coef", "router_z_loss_coef")
_QWEN_MIXTURE = _MIXTURE | _same("moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob")
_SHARED = _same("shared_expert_intermediate_size")
_DEEPSEEK_MIXTURE = _same("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
_DEEPSEEK_MIXTURE |= _same("routed_scaling_factor", "router_z_loss_coef") | {"num_experts": "n_routed_experts"}
_DEEPSEEK_MIXTURE |= {"mlp_only_layers": "first_k_dense_replace", "shared_expert_intermediate_size": "n_shared_experts"}
_DEEPSEEK_LOSS = {"router_aux_loss_coef": "aux_loss_alpha", "seq_aux": "seq_aux"}
_DEEPSEEK_OPTIONAL = ("aux_loss_alpha", "seq_aux", "router_z_loss_coef")
_LATENT = _ONE_BIAS_KEY | _same("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_SHARED_EXPERTS = ((".shared_expert.", ".shared_experts."),)
_SIGMOID = {"score_func": "sigmoid", "e_score_correction_bias": True}
_GPT_OSS = _WINDOW | _same("layer_types", "swiglu_limit", "swiglu_alpha") | {"num_experts": "num_local_experts"}
_NOT_CUT = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_EXPERTS_ONLY = {"moe_intermediate_size": "intermediate_size"}  # no dense layer, hence one width

# The defaults are those of transformers' configuration classes; a test compares them.
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=_DECODER | _HEAD_DIM | _ONE_BIAS_KEY,
    defaults=_sizes(32000, 4096, 11008, 32, 32, None, 2048),
    fixed={"num_experts": 0},
)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=_DECODER | _HEAD_DIM | _WINDOW,
    defaults=_sizes(32000, 4096, 14336, 32, 32, 8, 131072) | {"sliding_window": 4096},
    fixed={"num_experts": 0},
)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=_DECODER | _HEAD_DIM,
    defaults=_sizes(151936, 4096, 22016, 32, 32, 32, 32768),
    fixed={"num_experts": 0, "attention_bias": True},
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    keys=_DECODER | _HEAD_DIM | _ONE_BIAS_KEY,
    defaults=_sizes(151936, 4096, 22016, 32, 32, 32, 32768) | {"head_dim": 128},
    fixed={"num_experts": 0, "qk_norm": "head"},
)

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    keys=_DECODER | _HEAD_DIM | _WINDOW | _MIXTURE | _EXPERTS_ONLY | {"num_experts": "num_local_experts"},
    defaults=_sizes(32000, 4096, 14336, 32, 32, 8, 131072, 8, 2, 14336)
    | {"rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001},
    fixed={"norm_topk_prob": True},
    renames=((".mlp.", ".block_sparse_moe."), (".gate_proj.", ".w1."), (".up_proj.", ".w3."), (".down_proj.", ".w2.")),
)

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    keys=_DECODER | _HEAD_DIM | _QWEN_MIXTURE | _SHARED | {"attention_bias": "qkv_bias"},
    defaults=_sizes(151936, 2048, 5632, 24, 16, 16, 32768, 60, 4, 1408)
    | {"attention_bias": True, "norm_topk_prob": False, "shared_expert_intermediate_size": 5632}
    | {"router_aux_loss_coef": 0.001},
    fixed={"shared_expert_gate": True},
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    keys=_DECODER | _HEAD_DIM | _ONE_BIAS_KEY | _QWEN_MIXTURE,
    defaults=_sizes(151936, 2048, 6144, 24, 32, 4, 32768, 128, 8, 768)
    | {"norm_topk_prob": False, "router_aux_loss_coef": 0.001},
    fixed={"qk_norm": "head"},
)

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    keys=_DECODER | _ONE_BIAS_KEY | _MIXTURE | _EXPERTS_ONLY | _same("norm_topk_prob", "clip_qkv"),
    defaults=_sizes(50304, 2048, 2048, 16, 16, None, 4096, 64, 8, 2048)
    | {"rms_norm_eps": 1e-5, "norm_topk_prob": False, "router_aux_loss_coef": 0.01},
    fixed={"qk_norm": "full"},
)

GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    keys=_DECODER
    | _HEAD_DIM
    | _DEEPSEEK_MIXTURE
    | _same("attention_bias", "norm_topk_prob", "partial_rotary_factor")
    | {"qk_norm": "use_qk_norm", "router_aux_loss_coef": "router_aux_loss_coef"},
    defaults=_sizes(151552, 4096, 10944, 46, 96, 8, 131072, 128, 8, 1408)
    | {"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "qk_norm": False}
    | {"mlp_only_layers": 1, "shared_expert_intermediate_size": 1},
    fixed=_SIGMOID,
    optional=("router_aux_loss_coef", "router_z_loss_coef"),
    renames=_SHARED_EXPERTS,
    written={"num_nextn_predict_layers": 0},
)

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    keys=_DECODER | _LATENT | _DEEPSEEK_MIXTURE | _DEEPSEEK_LOSS,
    defaults=_sizes(102400, 4096, 11008, 32, 32, None, 2048, 64, None, 1407)
    | {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    | {"mlp_only_layers": 0, "shared_expert_intermediate_size": 2},
    fixed={"norm_topk_prob": False, "rope_interleave": True},
    supported={"norm_topk_prob": (False, None), "scoring_func": ("softmax", None), "moe_layer_freq": (1, None)},
    optional=_DEEPSEEK_OPTIONAL,
    renames=_SHARED_EXPERTS,
    topk_methods=("greedy", "group_limited_greedy"),
)

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    keys=_DECODER | _LATENT | _DEEPSEEK_MIXTURE | _DEEPSEEK_LOSS | _same("rope_interleave", "norm_topk_prob"),
    defaults=_sizes(129280, 7168, 18432, 61, 128, 128, 4096, 256, 8, 2048)
    | {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    | {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "rope_interleave": True}
    | {"mlp_only_layers": 3, "shared_expert_intermediate_size": 1},
    fixed=_SIGMOID,
    supported={"scoring_func": ("sigmoid", None), "moe_layer_freq": (1, None)},
    optional=_DEEPSEEK_OPTIONAL,
    renames=_SHARED_EXPERTS,
    written={"num_nextn_predict_layers": 0},
    topk_methods=("noaux_tc", "noaux_tc"),
)

GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    keys=_DECODER | _HEAD_DIM | _ONE_BIAS_KEY | _MIXTURE | _EXPERTS_ONLY | _GPT_OSS,
    defaults=_sizes(201088, 2880, 2880, 36, 64, 8, 131072, 128, 4, 2880)
    | {"head_dim": 64, "rms_norm_eps": 1e-5, "attention_bias": True, "attention_output_bias": True}
    | {"sliding_window": 128, "swiglu_limit": 7.0, "router_aux_loss_coef": 0.001, "rope_theta": 150000.0}
    | {"rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096} | _NOT_CUT},
    fixed={"router": "topk_softmax", "moe_bias": True, "attention_sinks": True},
    renames=((".mlp.gate.", ".mlp.router."),),
    fused_experts=True,
)

# As in its published configuration and vllm-ascend's implementation. Neither has a key for the number of groups: it is
# that of the active experts. `n_group` is ours, for models where it is not.
PANGU_PRO_MOE = Family(
    model_type="pangu_pro_moe",
    architecture="PanguProMoEForCausalLM",
    keys=_DECODER | _MIXTURE | _SHARED | _same("moe_intermediate_size", "mlp_only_layers", "n_group"),
    defaults=_sizes(153376, 5120, None, 48, 40, 8, 131072, 64, 8, 1344)
    | {"rms_norm_eps": 1e-5, "rope_theta": 16000000.0, "n_group": None}
    | {"shared_expert_intermediate_size": 5376, "router_aux_loss_coef": 0.001},
    fixed={"attention_bias": True, "attention_output_bias": True}
    | {"router": "grouped", "router_scale": True, "norm_topk_prob": False},
    optional=("mlp_only_layers", "n_group", "router_z_loss_coef"),
    renames=((".mlp.gate.router_scale", ".mlp.router_scale"),),
    rows=(".mlp.router_scale",),
    disk_type="PanguProMoE",
    aliases=("pangupromoe", "pangumoe"),
)

# Our own layout, for models that no published family can express.
MINIMOE = Family(
    model_type="minimoe", architecture="MoEForCausalLM", keys=_same(*_DEFAULTS), defaults={}, fixed={}, optional=()
)

_DENSE = LLAMA, MISTRAL, QWEN2, QWEN3
_MIXTURES = MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE, GPT_OSS, PANGU_PRO_MOE
FAMILIES = {family.model_type: family for family in (*_DENSE, *_MIXTURES, MINIMOE)}

# Keys that would change what the model computes, and the values that leave it as it is here. Not among them are those
# that only training looks at: router_jitter_noise, attention_dropout, output_router_logits.
_SUPPORTED_VALUES: dict[str, tuple] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
}
# Keys that do not hold the value of their field: how it is read, given the fields before it, and how it is written.
OTHERWISE: dict[str, tuple[Callable[[Any, Mapping[str, Any]], Any], Callable[[MoEConfig], Any]]] = {
    "first_k_dense_replace": (
        lambda count, given: tuple(range(_whole("first_k_dense_replace", count, "num_hidden_layers", given))),
        lambda config: len(config.mlp_only_layers),
    ),
    "n_shared_experts": (
        lambda count, given: (
            _whole("n_shared_experts", count) * _whole("moe_intermediate_size", given["moe_intermediate_size"])
        ),
        lambda config: config.shared_expert_intermediate_size // config.moe_intermediate_size,
    ),
    "use_qk_norm": (lambda used, _: "head" if used else None, lambda config: config.qk_norm == "head"),
}
_MOST_LAYERS = 10_000  # of which a list is made before they are compared with a file
_OTHER_NAME = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}

# BERT encoders (Devlin et al. 2018, arXiv 1810.04805): no model here runs them, but their weights can be compared.
BERT = "bert"


def find_family(model_type: object) -> Family:
    """The family called `model_type`, in any case.

    Raises ValueError: there is none; the message lists those there are.
    """
    name = str(model_type).lower()
    found = next((each for each in FAMILIES.values() if name in (each.model_type, *each.aliases)), None)
    require(found is not None, "model_type", model_type, f"one of {', '.join(FAMILIES)}")
    return found


def read_config(raw: Mapping[str, Any]) -> MoEConfig:
    """Translate the content of a `config.json`, of today's transformers or of earlier ones.

    Raises ValueError: naming the key, the value found and the value wanted.
    """
    if raw.get("model_type") == BERT:
        said = f"model_type={BERT!r}: an encoder, which can be compared but not run"
        raise ValueError(f"{said}; wanted one of {', '.join(FAMILIES)}")
    family = find_family(raw.get("model_type"))
    for key, (usual, *others) in (_SUPPORTED_VALUES | family.supported).items():
        found = usual if key in family.keys.values() else raw.get(key, usual)
        require(found in (usual, *others), key, found, f"{usual!r}, all that is supported")
    quantised = raw.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
    wanted = "no quantization_config: weights in float64, float32, float16 or bfloat16; or a format that is read: fp8, "
    wanted += "fbgemm_fp8, mxfp4, compressed-tensors, modelopt, or bitsandbytes with load_in_8bit"
    require(quantised is None, "quantization_config['quant_method']", method, wanted)
    config = MoEConfig(**_read_fields(family, raw), model_type=family.model_type)
    for name, wanted in (("num_experts", "at least 1"), ("kv_lora_rank", "a number"), ("swiglu_limit", "a number")):
        found = getattr(config, name)
        fits = bool(found) or name not in family.keys or family is MINIMOE
        require(fits, family.keys.get(name), found, f"{wanted} for model_type={family.model_type!r}")
    kinds = raw.get("layer_types") or []
    fits = "layer_types" in family.keys or all(kind == "full_attention" for kind in kinds)
    require(fits, "layer_types", kinds, "'full_attention' for every layer")
    return config


def write_config(config: MoEConfig, model_type: str | None, dtype: str) -> dict[str, Any]:
    """The content of a `config.json` that transformers 5 reads, and tools that know only the earlier names.

    model_type: the family; None: `config.model_type`. dtype: of the parameters, such as "float32".
    Raises ValueError: the family cannot express the model; the message names the fields.
    """
    family = find_family(config.model_type if model_type is None else model_type)
    rope = _canonical(config.rope_scaling or {}, "rope_scaling", config.max_position_embeddings)
    config = replace(config, rope_scaling=rope)
    raw = {
        "architectures": [family.architecture],
        "model_type": family.disk_type or family.model_type,
        "dtype": dtype,
        "torch_dtype": dtype,
        "hidden_act": "silu",
        # Nothing here knows special tokens. Left out, they would default to ids that may lie outside the vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "rope_theta": float(config.rope_theta),
        "rope_scaling": rope,
        "rope_parameters": {"rope_theta": float(config.rope_theta), **(rope or {"rope_type": "default"})},
    }
    raw |= {key: getattr(config, name) for name, key in family.keys.items() if key not in OTHERWISE}
    raw |= {key: OTHERWISE[key][1](config) for key in family.keys.values() if key in OTHERWISE} | family.written
    if family.topk_methods:
        raw["topk_method"] = family.topk_methods[config.n_group > 1]
    _require_expressible(config, family, raw)
    for key in family.optional:
        shorter = {name: value for name, value in raw.items() if name != key}
        if _read_fields(family, shorter) == _read_fields(family, raw):
            raw = shorter
    return raw


def _read_fields(family: Family, raw: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: _lookup(raw, key, (_DEFAULTS | family.defaults)[name]) for name, key in family.keys.items()}
    given |= {name: OTHERWISE[key][0](given[name], given) for name, key in family.keys.items() if key in OTHERWISE}
    if given.get("mlp_only_layers", ()) is None:
        given["mlp_only_layers"] = ()
    if family is GPT_OSS and given["layer_types"] is None:  # every second layer sees all, and the first does not
        layers = given["num_hidden_layers"]
        fits = type(layers) is int and 0 <= layers <= _MOST_LAYERS
        require(fits, "num_hidden_layers", layers, f"a number up to {_MOST_LAYERS}, as there are no layer_types")
        given["layer_types"] = tuple(LAYER_TYPES[1 - layer % 2] for layer in range(layers))
    for name in ("n_group", "topk_group"):
        if given.get(name, 1) is None:  # Pangu Pro MoE takes one expert from each group
            given[name] = given["num_experts_per_tok"] if family.fixed.get("router") == "grouped" else 1
    if family.topk_methods:
        method, (plain, in_groups) = raw.get("topk_method", family.topk_methods[0]), family.topk_methods
        require(method in (plain, in_groups), "topk_method", method, f"{plain} or {in_groups}")
        if method != in_groups:
            given |= {"n_group": 1, "topk_group": 1}
        given["seq_aux"] = bool(given["seq_aux"] and given["router_aux_loss_coef"])  # published with a coefficient of 0
    return {**family.fixed, **given, **_read_rope(raw, family, given)}


def _whole(key: str, found: Any, limit: str = "", given: Mapping[str, Any] | None = None) -> int:
    """A count, checked before anything is made of it; at most what is `given` for the field `limit`."""
    most = given[limit] if given else None
    fits = type(found) is int and found >= 0 and (given is None or (type(most) is int and found <= most))
    require(fits, key, found, f"a whole number from 0 on{f', at most {limit}={most}' if limit else ''}")
    return found


def _lookup(raw: Mapping[str, Any], key: str, default: Any) -> Any:
    other = _OTHER_NAME.get(key, key)
    if key in raw and other in raw:
        require(raw[key] == raw[other], key, raw[key], f"{raw[other]!r}, as {other} says")
    return raw.get(key, raw.get(other, default))


def _read_rope(raw: Mapping[str, Any], family: Family, given: Mapping[str, Any]) -> dict[str, Any]:
    """Base, scaling and part, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    found = raw.get(key) or family.defaults.get("rope_scaling") or {}
    require(isinstance(found, Mapping), key, found, "an object")
    nested = any(isinstance(value, Mapping) for value in found.values())
    require(not nested, key, found, "one set of rope parameters for all layers")
    theta = found.get("rope_theta", raw.get("rope_theta", family.defaults.get("rope_theta", 10000.0)))
    scaling = _canonical(found, key, given["max_position_embeddings"])
    usual = given.get("partial_rotary_factor", 1)
    part = found.get("partial_rotary_factor", usual)
    fits = part == 1 or "partial_rotary_factor" in given
    require(fits, f"{key}['partial_rotary_factor']", part, "1, all that is supported")
    return {"rope_theta": theta, "rope_scaling": scaling, "partial_rotary_factor": part}


def _canonical(scaling: Mapping[str, Any], key: str, max_positions: int) -> dict[str, Any] | None:
    """A scaling in the one form that `MoEConfig` has it in; None: there is none."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    require(kind in tuple(ROPE_SETTINGS), f"{key}['rope_type']", kind, f"one of {', '.join(ROPE_SETTINGS)}")
    if kind == "default":
        return None
    missing = {"original_max_position_embeddings": max_positions, "beta_fast": 32, "beta_slow": 1, "truncate": True}
    settings = {name: scaling.get(name) for name in ROPE_SETTINGS[kind]}
    settings = {name: missing.get(name) if value is None else value for name, value in settings.items()}
    options = {name: scaling[name] for name in ROPE_OPTIONS.get(kind, ()) if scaling.get(name)}
    return {"rope_type": kind, **settings, **options}


def _require_expressible(config: MoEConfig, family: Family, raw: Mapping[str, Any]) -> None:
    """Read back what was written: what does not return cannot be expressed."""
    looked_at = _fields_that_matter(config)
    unset = looked_at & _DEFAULTS.keys() - family.keys.keys() - {"head_dim", "moe_intermediate_size"}  # derived
    fixed = {name: family.fixed.get(name, _DEFAULTS[name]) for name in unset}
    lost = {name: value for name, value in fixed.items() if getattr(config, name) != value}
    if not lost:
        back = read_config(raw)
        lost = {name: getattr(back, name) for name in looked_at if getattr(config, name) != getattr(back, name)}
    if lost:
        listed = "; ".join(f"{name}={getattr(config, name)!r}: wanted {lost[name]!r}" for name in sorted(lost))
        reason = f"cannot express this model ({listed}); model_type='minimoe' can"
        raise ValueError(f"model_type={family.model_type!r} {reason}")


def _fields_that_matter(config: MoEConfig) -> set[str]:
    """The fields that a model of this kind looks at. What else a router does not read has its default."""
    names = {*_DEFAULTS, "rope_theta", "rope_scaling"} - {"experts_implementation"}
    if config.num_experts == 0:
        return names - MIXTURE_FIELDS
    if config.router != "topk":
        names.remove("norm_topk_prob")
    if all(config.is_sparse(layer) for layer in range(config.num_hidden_layers)):
        names.remove("intermediate_size")
    return names
