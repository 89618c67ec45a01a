"""Gauges: rewrites of a model's weights that leave its function as it is.

Each is called as `gauge(model, seed=0)` and returns a new model, in evaluation mode and in the dtype of the old one,
which stays as it is. The seed decides all that is random. What can be done in degrees also takes an `amount`: 0 changes
nothing, 1 is the usual; factors go from 2 ** -amount to 2 ** amount. Sums are done in float64. What stays is the
prediction: `shift_router` does move router logits, and with them the z-loss.

`GAUGES` lists the gauges, in the order in which `all_gauges` composes those that apply to a model; `obstacle` says why
one does not, and so does the ValueError that calling it raises.

Shapes: H hidden size, D head size, I width of an MLP or of an expert, E experts, V vocabulary; a group is a key-value
head with the queries that share it.
"""

import math
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from minimoe.lineage.derive import build_from, neurons, parts, set_neurons, take_heads, take_neurons, wide
from minimoe.model.attention import Attention
from minimoe.model.config import MoEConfig, require
from minimoe.model.layers import MLP
from minimoe.model.moe import Experts, MoELayer
from minimoe.model.transformer import MoEForCausalLM

# The matrices of attention that read the residual stream; the last two are of latent attention.
_INTO_ATTENTION = [f"{part}_proj.weight" for part in ("q", "k", "v", "q_a")] + ["kv_a_proj_with_mqa.weight"]
GAUGES: dict[str, Callable[..., MoEForCausalLM]] = {}
# What a gauge may need of a configuration, and what is said where it does not hold.
_NEEDS: dict[str, tuple[Callable[[MoEConfig], bool], str]] = {
    "no clipping": (lambda config: config.clip_qkv is None, "clip_qkv={.clip_qkv}: wanted None"),
    "no clipping but before the norm of a head": (
        lambda config: config.clip_qkv is None or config.qk_norm == "head",
        "clip_qkv={.clip_qkv}: wanted None",
    ),
    "heads": (
        lambda config: config.kv_lora_rank is None,
        "kv_lora_rank={.kv_lora_rank}: wanted None, heads that have keys and values of their own",
    ),
    "heads turned whole": (
        lambda config: config.partial_rotary_factor == 1,
        "partial_rotary_factor={.partial_rotary_factor}: wanted 1, heads that positions turn whole",
    ),
    "no biases of experts": (lambda config: not config.moe_bias, "moe_bias=True: wanted False"),
    "no limit of experts": (lambda config: config.swiglu_limit is None, "swiglu_limit={.swiglu_limit}: wanted None"),
    "a mixture": (
        lambda config: any(map(config.is_sparse, range(config.num_hidden_layers))),
        "num_experts={.num_experts}, none in any layer: wanted a mixture",
    ),
    "router rows": (lambda config: config.router != "hash", "router='hash': wanted a router that has rows"),
    "softmax": (lambda config: config.score_func == "softmax", "score_func='sigmoid': wanted 'softmax'"),
    "router scale": (lambda config: config.router_scale, "router_scale=False: wanted True"),
}


def _gauge(*needs: str) -> Callable:
    """List a function in `GAUGES`, and let it raise a ValueError where a model lacks one of its `needs`."""

    def register(rewrite: Callable[..., MoEForCausalLM]) -> Callable[..., MoEForCausalLM]:
        @wraps(rewrite)
        @torch.no_grad()
        def checked(model: MoEForCausalLM, **options: Any) -> MoEForCausalLM:
            reason = obstacle(rewrite.__name__, model.config)
            if reason is not None:
                raise ValueError(f"{rewrite.__name__}: {reason}")
            return rewrite(model, **options)

        checked.needs = needs
        GAUGES[rewrite.__name__] = checked
        return checked

    return register


def obstacle(gauge: str, config: MoEConfig) -> str | None:
    """Why `gauge`, a name in `GAUGES`, would change the function of a model, or would have nothing to change; None:
    no setting keeps it from applying. `rotate_residual` also wants folded norms, which it checks when it is called.

    Raises ValueError: there is no such gauge.
    """
    require(gauge in GAUGES, "gauge", gauge, f"one of {', '.join(GAUGES)}")
    for holds, words in (_NEEDS[need] for need in GAUGES[gauge].needs):
        if not holds(config):
            return words.format(config)
    return None


def all_gauges(model: MoEForCausalLM, seed: int) -> MoEForCausalLM:
    """Compose every gauge that applies to `model`; another seed gives another model of the same function."""
    for number, (name, gauge) in enumerate(GAUGES.items()):
        if obstacle(name, model.config) is None:
            model = gauge(model, seed=seed * len(GAUGES) + number)
    return model


# --- the residual stream ----------------------------------------------------------------------------------


@_gauge()
def fold_norms(model: MoEForCausalLM, *, seed: int = 0) -> MoEForCausalLM:
    """Move the weight g of every norm into the matrices that read it: W <- W diag(g), g <- 1.

    A final norm other than 1 unties the embeddings, since the head reads it and the embedding does not. The norms of
    queries and keys stay: rotary positions follow them, not a matrix.
    """
    return replace_norms(model, {name: torch.ones(model.config.hidden_size, device="cpu") for name in _readers(model)})


@torch.no_grad()
def replace_norms(model: MoEForCausalLM, weights: Mapping[str, Tensor]) -> MoEForCausalLM:
    """Give norms other weights, and what reads them the ratio: W <- W diag(old / new).

    Args:
        weights: [H] each, by the name of the norm ("model.layers.0.input_layernorm", ..., "model.norm").

    Raises:
        KeyError: there is no norm of that name.
        ValueError: a new weight is 0 where the old one is not.
    """
    tensors, before_head = model.state_dict(), model.model.norm.weight
    tied = model.config.tie_word_embeddings
    if tied and not torch.equal(weights.get("model.norm", before_head).to(before_head), before_head):
        tied = False
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    changed = build_from(model, tensors, tie_word_embeddings=tied)
    readers = _readers(changed)
    for name, weight in weights.items():
        norm = changed.get_submodule(name).weight
        old = wide(norm).clone()
        norm.copy_(weight)
        new = wide(norm)  # as stored, so that rounding goes into the ratio
        lost = ((new == 0) & (old != 0)).nonzero().flatten().tolist()
        if lost:
            number = float(old[lost[0]])
            raise ValueError(f"{name}.weight[{lost[0]}]=0: wanted another number, since it is {number} now")
        ratio = torch.where(new == old, 1.0, old / new)
        for reader in readers[name]:
            reader.copy_(wide(reader) * ratio)
    return changed


@_gauge()
def rotate_residual(model: MoEForCausalLM, *, seed: int, amount: float = 1.0) -> MoEForCausalLM:
    """Turn the residual stream by a random rotation, which RMS norms of constant weight do not notice.

    Embedding and head turn alike, so that tied embeddings stay tied. An `amount` of 1 turns planes by up to half a
    circle. (SliceGPT: Ashkboos et al. 2024, arXiv 2401.15024, section 3.1.)
    Raises ValueError: a norm weighs dimensions differently; after `fold_norms` none does.
    """
    for name in _readers(model):
        weight = model.get_submodule(name).weight
        least, most = float(weight.min()), float(weight.max())
        if least != most:
            found = f"{name}.weight goes from {least:.4g} to {most:.4g}"
            raise ValueError(f"{found}: wanted one number throughout, for rotate_residual; fold_norms does that")
    changed, generator = _begin(model, seed)
    rotation = _skew(model.config.hidden_size, amount, generator).matrix_exp()
    change_basis(changed, lambda vectors: vectors @ rotation.T)
    return changed


@_gauge()
def permute_residual(model: MoEForCausalLM, *, seed: int) -> MoEForCausalLM:
    """Reorder the dimensions of the residual stream and flip the signs of some. Norm weights move along."""
    changed, generator = _begin(model, seed)
    order = torch.randperm(model.config.hidden_size, generator=generator, device="cpu")
    sign = 1.0 - 2.0 * torch.randint(2, order.shape, generator=generator, device="cpu")
    change_basis(changed, lambda vectors: vectors[..., order] * sign)
    for name in _readers(changed):
        norm = changed.get_submodule(name).weight
        norm.copy_(norm[order])
    return changed


def change_basis(model: MoEForCausalLM, change: Callable[[Tensor], Tensor]) -> None:
    """Apply `change` to all that reads the residual stream or writes to it, [..., H] in float64, in place."""
    embedding, named = model.model.embed_tokens.weight, dict(model.named_parameters())
    biases = "o_proj.bias", "down_proj_bias"
    vectors = [embedding, *(tensor for name, tensor in named.items() if name.endswith(biases))]
    writing = "o_proj.weight", "down_proj", "down_proj.weight"
    vectors += [tensor.mT for name, tensor in named.items() if name.endswith(writing)]
    vectors += [reader for readers in _readers(model).values() for reader in readers if reader is not embedding]  # tied
    for tensor in vectors:
        tensor.copy_(change(wide(tensor)))


def _readers(model: MoEForCausalLM) -> dict[str, list[Tensor]]:
    """The norms of the residual stream by name, each with the matrices [..., H] that its output goes into."""
    readers = {}
    for layer, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn.named_parameters(), block.mlp.named_parameters()
        inputs = [tensor for name, tensor in attention if name in _INTO_ATTENTION]
        readers[f"model.layers.{layer}.input_layernorm"] = inputs
        inputs = [tensor for name, tensor in mlp if not ("down_proj" in name or name.endswith(("scale", "bias")))]
        readers[f"model.layers.{layer}.post_attention_layernorm"] = inputs
    return readers | {"model.norm": [model.lm_head.weight]}


# --- attention --------------------------------------------------------------------------------------------


@_gauge("heads", "heads turned whole")
def rotate_qk(model: MoEForCausalLM, *, seed: int, amount: float = 1.0) -> MoEForCausalLM:
    """Turn each rotary pair of a group's queries and keys by one angle: it commutes with the turns of the positions.

    An `amount` of 1 draws the angles from the whole circle. Where queries and keys are normed or clipped by the
    dimension (`qk_norm`, `clip_qkv`), only quarter turns are left, and the weights of the norm are exchanged with the
    dimensions.
    """
    changed, generator = _begin(model, seed)
    for attention in parts(changed, Attention):
        angles = math.pi * _uniform(_pair_shape(model.config), amount, generator)
        cos, sin = angles.cos(), angles.sin()
        if attention.qk_norm or attention.clip_qkv:
            turns = (angles / (math.pi / 2)).round() * (math.pi / 2)
            cos, sin = turns.cos().round(), turns.sin().round()
        for rows in (*attention.q_proj.parameters(), *attention.k_proj.parameters()):
            _map_pairs(rows, cos, -sin, sin)
        if attention.qk_norm:
            for norm in (attention.q_norm, attention.k_norm):
                _map_pairs(norm.weight, cos.abs(), sin.abs(), sin.abs())
    return changed


@_gauge("heads", "heads turned whole", "no clipping but before the norm of a head")
def scale_qk(model: MoEForCausalLM, *, seed: int, amount: float = 1.0) -> MoEForCausalLM:
    """Multiply each rotary pair of a group's queries by a factor, and divide that of its keys by it.

    With `qk_norm` the factors go into the weights of the norms. Queries and keys must not be clipped after the factor.
    """
    changed, generator = _begin(model, seed)
    for attention in parts(changed, Attention):
        scale_pairs(attention, _factors(_pair_shape(model.config), amount, generator))
    return changed


@torch.no_grad()
def scale_pairs(attention: Attention, factors: Tensor) -> None:
    """Multiply the rotary pairs of the queries by `factors`, [groups, D / 2], in place, and divide those of the keys.

    Factors into the weights of a `qk_norm` of heads are common to all groups: [1, D / 2].
    """
    for name, by in (("q", factors), ("k", 1 / factors)):
        module = getattr(attention, f"{name}_norm" if attention.qk_norm else f"{name}_proj")
        for rows in module.parameters():
            _map_pairs(rows, by, torch.zeros_like(by), torch.zeros_like(by))


@_gauge("heads", "no clipping")
def mix_vo(model: MoEForCausalLM, *, seed: int, amount: float = 1.0) -> MoEForCausalLM:
    """Map each group's values by an invertible matrix, and the columns of the output projection by its inverse.

    The matrix is exp(K + S): K turns planes by up to half a circle, S is diagonal and stretches by up to 2; `amount`
    multiplies both. Values must not be clipped.
    """
    changed, generator = _begin(model, seed)
    groups, size = model.config.num_key_value_heads, model.config.head_dim
    for attention in parts(changed, Attention):
        exponents = torch.stack([_skew(size, amount, generator) for _ in range(groups)])
        exponents += _factors((groups, size), amount, generator).log().diag_embed()
        map_values(attention, exponents.matrix_exp(), (-exponents).matrix_exp())
    return changed


@torch.no_grad()
def map_values(attention: Attention, maps: Tensor, inverses: Tensor) -> None:
    """Multiply each group's values by `maps`, [groups, D, D], in place, and undo it in the output projection."""
    groups, size, _ = maps.shape
    for rows in attention.v_proj.parameters():
        rows.copy_((maps @ wide(rows).reshape(groups, size, -1)).view_as(rows))
    columns = attention.o_proj.weight.mT
    heads = wide(columns).unflatten(0, (groups, -1, size))
    columns.copy_((inverses.mT[:, None] @ heads).flatten(0, 2))


@_gauge("heads")
def permute_heads(model: MoEForCausalLM, *, seed: int) -> MoEForCausalLM:
    """Reorder the groups, and the queries within each."""
    changed, generator = _begin(model, seed)
    groups = model.config.num_key_value_heads
    queries_each = model.config.num_attention_heads // groups
    for attention in parts(changed, Attention):
        take_heads(attention, _order_in_groups(groups, queries_each, generator), queries_each)
    return changed


def _pair_shape(config: MoEConfig) -> tuple[int, int]:
    """Of what is chosen for each rotary pair: [groups, D / 2]; [1, D / 2] if all heads share the weights of a norm."""
    return 1 if config.qk_norm == "head" else config.num_key_value_heads, config.head_dim // 2


def _map_pairs(rows: Tensor, keep: Tensor, from_second: Tensor, from_first: Tensor) -> None:
    """Map rotary pairs (x, y) of rows [heads * D, ...] to (keep x + from_second y, keep y + from_first x), in place.

    The numbers are [groups, D / 2]. Pair i of a head is its dimensions i and i + D / 2.
    """
    groups, half = keep.shape
    x, y = wide(rows).reshape(groups, -1, 2, half, rows[0].numel()).unbind(2)
    keep, from_second, from_first = (each[:, None, :, None] for each in (keep, from_second, from_first))
    rows.copy_(torch.stack([x * keep + y * from_second, y * keep + x * from_first], dim=2).view_as(rows))


# --- MLPs and experts -------------------------------------------------------------------------------------


@_gauge("no biases of experts", "no limit of experts")
def permute_neurons(model: MoEForCausalLM, *, seed: int) -> MoEForCausalLM:
    """Reorder the neurons of every MLP and of every expert, each for itself."""
    changed, generator = _begin(model, seed)
    for mlp in parts(changed, MLP, Experts):
        take_neurons(mlp, _uniform(neurons(mlp).shape[:-2], 1.0, generator).argsort(dim=-1))
    return changed


@_gauge("no biases of experts", "no limit of experts")
def scale_neurons(model: MoEForCausalLM, *, seed: int, amount: float = 1.0) -> MoEForCausalLM:
    """Multiply each neuron's up row by a factor, and divide its down column by it.

    A share of amount / 2 of the factors is negative. The gate has no such freedom: silu is not homogeneous.
    """
    changed, generator = _begin(model, seed)
    for mlp in parts(changed, MLP, Experts):
        rows = neurons(mlp)
        factors = _factors(rows.shape[:-2], amount, generator)
        negative = torch.rand(factors.shape, generator=generator, device="cpu") < amount / 2
        factors = torch.where(negative, -factors, factors)
        by = torch.stack([torch.ones_like(factors), factors, 1 / factors], dim=-1)
        set_neurons(mlp, (wide(rows) * by[..., None]).to(rows))
    return changed


# --- the mixture ------------------------------------------------------------------------------------------


@_gauge("a mixture", "router rows")
def permute_experts(model: MoEForCausalLM, *, seed: int) -> MoEForCausalLM:
    """Reorder the experts with all that the router keeps of each; in groups, the groups and the experts in each.

    Exact where no two experts tie: of equal scores `topk` takes one by its place. The model must be a mixture whose
    router has rows, which move along.
    """
    changed, generator = _begin(model, seed)
    groups = model.config.n_group
    for mixture in parts(changed, MoELayer):
        order = _order_in_groups(groups, model.config.num_experts // groups, generator)
        for tensor in (*mixture.gate.parameters(), *mixture.gate.buffers(), *mixture.experts.parameters()):
            tensor.copy_(tensor[order])
    return changed


@_gauge("a mixture", "router rows", "softmax")
def shift_router(model: MoEForCausalLM, *, seed: int, amount: float = 1.0) -> MoEForCausalLM:
    """Add one random vector to all rows of a router: all logits of a token move alike, which softmax does not notice.

    For an `amount` of 1 it has the standard deviation of the router's weights. The model must be a mixture whose router
    has rows and scores by a softmax.
    """
    changed, generator = _begin(model, seed)
    for mixture in parts(changed, MoELayer):
        rows = wide(mixture.gate.weight)
        shift = math.sqrt(3) * _uniform(rows.shape[-1:], amount, generator)  # of variance 1
        mixture.gate.weight.copy_(rows + rows.std(correction=0) * shift)
    return changed


@_gauge("a mixture", "router rows", "router scale", "no biases of experts")
def exchange_router_scale(model: MoEForCausalLM, *, seed: int, amount: float = 1.0) -> MoEForCausalLM:
    """Multiply an expert's `router_scale` by a factor, and divide its down projection by it.

    The router must have such a scale (Pangu Pro MoE).
    """
    changed, generator = _begin(model, seed)
    for mixture in parts(changed, MoELayer):
        scale, down = mixture.gate.router_scale, mixture.experts.down_proj
        factors = _factors(scale.shape, amount, generator)
        scale.copy_(wide(scale) * factors)
        down.copy_(wide(down) / factors[:, None, None])
    return changed


def _begin(model: MoEForCausalLM, seed: int) -> tuple[MoEForCausalLM, torch.Generator]:
    """A model of the same weights, in memory of its own, and where its random numbers come from."""
    return build_from(model, model.state_dict()), torch.Generator("cpu").manual_seed(seed)


def _uniform(shape: tuple[int, ...], amount: float, generator: torch.Generator) -> Tensor:
    """Float64 numbers from -amount to amount."""
    require(0 <= amount < math.inf, "amount", amount, "a finite number of at least 0")
    return amount * (2 * torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") - 1)


def _factors(shape: tuple[int, ...], amount: float, generator: torch.Generator) -> Tensor:
    return 2.0 ** _uniform(shape, amount, generator)


def _skew(size: int, amount: float, generator: torch.Generator) -> Tensor:
    """A skew-symmetric matrix; its exponential turns planes by angles up to `amount` times half a circle.

    The entries have a variance of 2/3, so that the spectrum ends near 2 sqrt(2 size / 3) (Wigner's semicircle).
    """
    entries = _uniform((size, size), amount, generator)
    return math.pi / math.sqrt(8 * size / 3) * (entries - entries.mT)


def _order_in_groups(groups: int, size: int, generator: torch.Generator) -> Tensor:
    """A permutation of groups * size things that keeps groups together."""
    outer = torch.randperm(groups, generator=generator, device="cpu")
    inner = torch.rand(groups, size, generator=generator, device="cpu").argsort(dim=-1)
    return (outer[:, None] * size + inner).flatten()
