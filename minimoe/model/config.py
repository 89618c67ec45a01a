"""The settings of a model: what Hugging Face configurations call them, checked, and counted.

One frozen dataclass describes every model the kit knows: a dense Llama, a Mixtral, a Pangu Pro MoE or an
experiment of your own. `families.py` translates it to and from the `config.json` of each published family.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

ROUTERS = ("topk", "topk_softmax", "noisy_topk", "switch", "expert_choice", "grouped", "hash")
EXPERTS_IMPLEMENTATIONS = ("eager", "sorted", "grouped")
_CHOICES = {"router": ROUTERS, "experts_implementation": EXPERTS_IMPLEMENTATIONS}
_CHOICES |= {"qk_norm": (None, "head", "full"), "score_func": ("softmax", "sigmoid")}
LAYER_TYPES = ("full_attention", "sliding_attention")
ROPE_SETTINGS = {  # what each rope_type takes
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
}
ROPE_OPTIONS = {"yarn": ("attention_factor", "mscale", "mscale_all_dim")}  # what it may take besides


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Everything that fixes the shape and the function of a model.

    `num_experts = 0` gives a dense model. Otherwise a layer is sparse unless `mlp_only_layers` names it or
    `decoder_sparse_step` skips it (Qwen2-MoE's rule: layer i is sparse when (i + 1) % step == 0).
    Raises ValueError: naming the field, the value found and the value wanted.
    """

    # The transformer around the experts.
    vocab_size: int = 1024
    hidden_size: int = 96
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    intermediate_size: int | None = None  # width of a dense MLP; None: 4 * hidden_size
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None  # {"rope_type": "linear" | "llama3" | "yarn", "factor": ..., ...}
    partial_rotary_factor: float = 1.0  # the part of a head that positions turn, which comes first (GLM-4.5)
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    attention_bias: bool = False  # on q, k and v
    attention_output_bias: bool = False  # on o
    qk_norm: str | None = None  # "head": RMSNorm of each head (Qwen3); "full": of all heads at once (OLMoE)
    clip_qkv: float | None = None  # clamp q, k and v to [-c, c] (OLMoE)
    sliding_window: int | None = None  # how many keys a query sees, its own among them; None: all up to its own
    layer_types: tuple[str, ...] | None = None  # whether a layer has the window, one of LAYER_TYPES; None: all have it
    attention_sinks: bool = False  # a learned logit per head that takes attention from the keys (gpt-oss)

    # Multi-head latent attention (DeepSeek-V2). kv_lora_rank = None: grouped-query attention, and none of the others.
    kv_lora_rank: int | None = None  # size of the latent that all heads share
    q_lora_rank: int | None = None  # size of that of the queries; None: they have none
    qk_nope_head_dim: int | None = None  # dimensions of a query that know no position
    qk_rope_head_dim: int | None = None  # and those that positions turn; head_dim is the sum
    v_head_dim: int | None = None
    rope_interleave: bool = False  # rotary pairs are (2i, 2i + 1), and not (i, i + D/2)

    # The mixture.
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None  # width of an expert; None: intermediate_size
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    shared_expert_intermediate_size: int = 0  # 0: no shared expert
    shared_expert_gate: bool = False  # scale the shared expert by sigmoid(x w) (Qwen2-MoE)
    moe_bias: bool = False  # on the router, and on gate, up and down of the routed experts (gpt-oss)
    swiglu_limit: float | None = None  # of `experts.clamped_swiglu`, which they then use (gpt-oss)
    swiglu_alpha: float = 1.702

    # The router; `routing.py` has the formulas.
    router: str = "topk"
    score_func: str = "softmax"
    norm_topk_prob: bool = True  # read by router="topk" only: the others fix it
    e_score_correction_bias: bool = False  # a bias that selects but does not weigh (DeepSeek-V3)
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    router_scale: bool = False  # a learned factor per expert (Pangu Pro MoE)
    capacity_factor: float | None = None  # None: no token is ever dropped
    router_aux_loss_coef: float = 0.0
    seq_aux: bool = False  # take the balance loss in each sequence, not over the batch (DeepSeek-V3)
    router_z_loss_coef: float = 0.0

    # How it is run, and what it is called on disk.
    experts_implementation: str = "sorted"
    model_type: str = "minimoe"

    def __post_init__(self) -> None:
        self._fill("num_key_value_heads", self.num_attention_heads)
        self._check_fields()
        self._fill("head_dim", self._query_size())
        self._fill("intermediate_size", 4 * self.hidden_size)
        self._fill("moe_intermediate_size", self.intermediate_size)
        self._require("mlp_only_layers", isinstance(self.mlp_only_layers, list | tuple), "a list of layers")
        object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))
        self._check_attention()
        self._check_latent_attention()
        self._check_rope()
        self._check_windows()
        if self.num_experts:
            self._check_experts()
            self._check_router()
            self._check_loads()

    def _fill(self, name: str, default: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, default)

    def _query_size(self) -> int:
        if self.kv_lora_rank is None:
            return self.hidden_size // self.num_attention_heads
        return (self.qk_nope_head_dim or 0) + (self.qk_rope_head_dim or 0)

    def _check_fields(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind in (int, int | None):
                least = 0 if name in ("num_experts", "shared_expert_intermediate_size") else 1
                whole = isinstance(value, int) and not isinstance(value, bool)
                fits = (whole and value >= least) or (value is None and kind is not int)
                self._require(name, fits, f"a whole number of at least {least}")
            elif kind is bool:
                self._require(name, isinstance(value, bool), "True or False")
        for name, choices in _CHOICES.items():
            self._require(name, getattr(self, name) in choices, _one_of(choices))
        positive = ("rope_theta", "rms_norm_eps", "initializer_range", "routed_scaling_factor", "swiglu_alpha")
        for name in positive:
            self._require(name, _is_positive(getattr(self, name)), "a positive number")
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            value = getattr(self, name)
            self._require(name, value == 0 or _is_positive(value), "0 or a positive number")
        heads = self.num_attention_heads
        divisible = self.head_dim is not None or self.kv_lora_rank is not None or self.hidden_size % heads == 0
        self._require("hidden_size", divisible, f"a multiple of num_attention_heads={heads}, as head_dim is not given")

    def _check_attention(self) -> None:
        heads = self.num_attention_heads
        divides = heads % self.num_key_value_heads == 0
        self._require("num_key_value_heads", divides, f"a divisor of num_attention_heads={heads}")
        for name in ("clip_qkv", "swiglu_limit"):
            value = getattr(self, name)
            self._require(name, value is None or _is_positive(value), "None or a positive number")

    def _check_latent_attention(self) -> None:
        is_latent = self.kv_lora_rank is not None
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            wanted = "a whole number, as kv_lora_rank is given" if is_latent else "None, as kv_lora_rank=None"
            self._require(name, (getattr(self, name) is not None) == is_latent, wanted)
        if not is_latent:
            for name in ("q_lora_rank", "rope_interleave"):
                self._require(name, not getattr(self, name), "none, as kv_lora_rank=None asks for no latent attention")
            return
        heads, size = self.num_attention_heads, self._query_size()
        wanted = f"num_attention_heads={heads}, as all heads share one latent"
        self._require("num_key_value_heads", self.num_key_value_heads == heads, wanted)
        self._require("head_dim", self.head_dim == size, f"{size}, qk_nope_head_dim + qk_rope_head_dim")
        for name in ("qk_norm", "clip_qkv", "attention_sinks", "partial_rotary_factor"):
            default = getattr(type(self), name)
            self._require(name, getattr(self, name) == default, f"{default!r} with latent attention")

    def _check_rope(self) -> None:
        part = self.partial_rotary_factor
        self._require("partial_rotary_factor", _is_positive(part) and part <= 1, "a number above 0 and at most 1")
        name = "head_dim" if self.kv_lora_rank is None else "qk_rope_head_dim"
        fits = self.rotary_dim > 0 and self.rotary_dim % 2 == 0
        of = "" if part == 1 else f" times partial_rotary_factor={part}"
        self._require(name, fits, f"an even number{of} (rotary embeddings pair them)")
        scaling = {"rope_type": "default"} if self.rope_scaling is None else self.rope_scaling
        self._require("rope_scaling", isinstance(scaling, Mapping), "None or a mapping")
        kind = scaling.get("rope_type")
        require(kind in tuple(ROPE_SETTINGS), "rope_scaling['rope_type']", kind, _one_of(ROPE_SETTINGS))
        given = (name for name in ROPE_OPTIONS.get(kind, ()) if name in scaling)
        for name in (*ROPE_SETTINGS[kind], *given):
            found = scaling.get(name)
            fits, wanted = _is_positive(found), "a positive number"
            if name == "truncate":
                fits, wanted = isinstance(found, bool), "True or False"
            require(fits, f"rope_scaling[{name!r}]", found, wanted)
        if kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            require(high > low, "rope_scaling['high_freq_factor']", high, f"more than low_freq_factor={low}")

    def _check_windows(self) -> None:
        if self.layer_types is None:
            return
        layers = self.num_hidden_layers
        fits = isinstance(self.layer_types, list | tuple) and len(self.layer_types) == layers
        self._require("layer_types", fits, f"None or a list, with one for each of num_hidden_layers={layers}")
        for kind in self.layer_types:
            require(kind in LAYER_TYPES, "layer_types", kind, _one_of(LAYER_TYPES))
        windowed = "sliding_attention" in self.layer_types
        self._require("sliding_window", self.sliding_window is not None or not windowed, "a number, as layer_types say")
        object.__setattr__(self, "layer_types", tuple(self.layer_types))

    def _check_experts(self) -> None:
        experts, k, layers = self.num_experts, self.num_experts_per_tok, self.num_hidden_layers
        self._require("num_experts_per_tok", k <= experts, f"at most num_experts={experts}")
        for layer in self.mlp_only_layers:
            require(layer in range(layers), "mlp_only_layers", layer, f"layers from 0 to {layers - 1}")
        used = self.shared_expert_intermediate_size > 0 or not self.shared_expert_gate
        wanted = "False, since shared_expert_intermediate_size=0 means that there is no shared expert"
        self._require("shared_expert_gate", used, wanted)
        used = self.swiglu_limit is not None or self.swiglu_alpha == type(self).swiglu_alpha
        self._require("swiglu_alpha", used, f"{type(self).swiglu_alpha}, as swiglu_limit=None: it is not read")

    def _check_router(self) -> None:
        router, k, groups = self.router, self.num_experts_per_tok, self.n_group
        for name, readers in _READ_BY.items():
            default = getattr(type(self), name)
            read = router in readers or getattr(self, name) == default
            self._require(name, read, f"{default!r} for router={router!r}; it is read by {' and '.join(readers)}")
        self._require("n_group", self.num_experts % groups == 0, f"a divisor of num_experts={self.num_experts}")
        self._require("topk_group", self.topk_group <= groups, f"at most n_group={groups}")
        if router == "topk":
            reachable = self.num_experts // groups * self.topk_group
            wanted = f"at most {reachable}, the experts in topk_group groups"
            self._require("num_experts_per_tok", k <= reachable, wanted)
        if not self.router_learns and self.model_type == "minimoe":  # the formula of a published family is what it is
            reason = "the single weight of a token would always be 1, and the router would get no gradient of the loss"
            self._require("norm_topk_prob", router != "topk", f"False for num_experts_per_tok=1: {reason}")
            self._require("num_experts_per_tok", False, f"2 or more for router={router!r}: {reason}")
        if router == "switch":
            self._require("num_experts_per_tok", k == 1, "1 for router='switch'")
        if router == "grouped":
            self._require("num_experts_per_tok", k % groups == 0, f"a multiple of n_group={groups}")

    def _check_loads(self) -> None:
        router, balanced = self.router, self.router_aux_loss_coef > 0
        idle = router in ("expert_choice", "hash")
        wanted = f"0 for router={router!r}, which has nothing to balance"
        self._require("router_aux_loss_coef", not (idle and balanced), wanted)
        self._require("seq_aux", balanced or not self.seq_aux, "False, as router_aux_loss_coef=0 asks for no such loss")
        factor = self.capacity_factor
        unlimited = factor is None or factor == math.inf
        self._require("capacity_factor", unlimited or _is_positive(factor), "None or a positive number")
        wanted = "a positive number for router='expert_choice', where it sets how many tokens an expert takes"
        self._require("capacity_factor", router != "expert_choice" or factor is not None, wanted)

    def _require(self, name: str, holds: bool, wanted: str) -> None:
        require(holds, name, getattr(self, name), wanted)

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) is a mixture of experts."""
        skipped = layer in self.mlp_only_layers or (layer + 1) % self.decoder_sparse_step != 0
        return self.num_experts > 0 and not skipped

    def window(self, layer: int) -> int | None:
        """How many keys a query of layer `layer` (from 0) sees, its own among them; None: all up to its own."""
        is_full = self.layer_types is not None and self.layer_types[layer] == "full_attention"
        return None if is_full else self.sliding_window

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head positions turn."""
        return self.qk_rope_head_dim or int(self.head_dim * self.partial_rotary_factor)

    @property
    def router_learns(self) -> bool:
        """Whether the language loss has a gradient for the router. For K = 1 with weights that sum to 1 it has none."""
        normalises = self.norm_topk_prob if self.router == "topk" else self.router in ("topk_softmax", "noisy_topk")
        return self.num_experts <= 1 or self.num_experts_per_tok > 1 or not normalises

    def num_parameters(self, *, active: bool = False) -> int:
        """Number of trainable parameters; `active=True` counts only the K experts that one token meets.

        Embedding and output head are included, as in the published totals.
        """
        hidden, layers = self.hidden_size, self.num_hidden_layers
        experts = self.num_experts_per_tok if active else self.num_experts
        width = experts * self.moe_intermediate_size + self.shared_expert_intermediate_size  # of all MLPs of a mixture
        router_rows = {"hash": 0, "noisy_topk": 2}.get(self.router, 1)
        router = self.num_experts * (router_rows * hidden + self.router_scale) + hidden * self.shared_expert_gate
        biases = (self.num_experts + experts * (2 * self.moe_intermediate_size + hidden)) * self.moe_bias
        sparse = sum(map(self.is_sparse, range(layers)))
        total = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2) + hidden  # with the final norm
        total += layers * (self._attention_parameters() + 2 * hidden) + sparse * (3 * hidden * width + router + biases)
        return total + (layers - sparse) * 3 * hidden * self.intermediate_size

    def _attention_parameters(self) -> int:
        hidden, heads, query = self.hidden_size, self.num_attention_heads, self.num_attention_heads * self.head_dim
        if self.kv_lora_rank is not None:
            latent, values, rank = self.kv_lora_rank, heads * self.v_head_dim, self.q_lora_rank
            shared = latent + self.qk_rope_head_dim
            queries = hidden * query if rank is None else rank * (hidden + query + 1 + self.attention_bias)
            keys = shared * (hidden + self.attention_bias) + latent * (1 + heads * self.qk_nope_head_dim + values)
            return queries + keys + hidden * (values + self.attention_output_bias)
        key = self.num_key_value_heads * self.head_dim
        weights = 2 * hidden * (query + key) + heads * self.attention_sinks
        biases = (query + 2 * key) * self.attention_bias + hidden * self.attention_output_bias
        return weights + biases + {None: 0, "head": 2 * self.head_dim, "full": query + key}[self.qk_norm]


# Settings that a dense model does not look at: those of the mixture and of the router, as they stand above.
_NAMES = [field.name for field in fields(MoEConfig)]
MIXTURE_FIELDS = frozenset(_NAMES[_NAMES.index("num_experts") + 1 : _NAMES.index("experts_implementation")])

# Settings that only some routers read. Elsewhere they must keep their defaults: a setting is never silently ignored.
_READ_BY = {"n_group": ("topk", "grouped"), "router_scale": ("grouped",)}
_READ_BY |= {"moe_bias": tuple(router for router in ROUTERS if router != "hash")}
_READ_BY |= dict.fromkeys(("score_func", "e_score_correction_bias", "topk_group", "routed_scaling_factor"), ("topk",))


def require(holds: bool, name: str, found: object, wanted: str) -> None:
    """Raise a ValueError that says what was found under a name and what was wanted, unless it holds."""
    if not holds:
        raise ValueError(f"{name}={found!r:.99}: wanted {wanted}")


def _is_positive(value: object) -> bool:
    """Whether `value` is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _one_of(choices: Iterable) -> str:
    return "one of " + ", ".join(map(repr, choices))
