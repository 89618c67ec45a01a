"""Gauges: rewrites of a model's weights that leave its function as it is.

    fold_norms, rotate_residual, permute_residual      the residual stream
    rotate_qk, scale_qk, mix_vo, permute_heads         attention
    permute_neurons, scale_neurons                     MLPs and experts
    permute_experts, shift_router, exchange_router_scale   the mixture

Each is called as `gauge(model, seed=0)` and returns a new model, in evaluation mode and in the dtype of the old one,
which stays as it is. The seed decides all that is random. What can be done in degrees also takes an `amount`: 0 changes
nothing, 1 is the usual; factors go from 2 ** -amount to 2 ** amount. Sums are done in float64. What stays is the
prediction: `shift_router` does move router logits, and with them the z-loss.

`GAUGES` lists the gauges, in the order in which `all_gauges` composes those that apply to a model; `obstacle` says why
one does not, and so does the ValueError that calling it raises.

Shapes: H hidden size, D head size, I width of an MLP or of an expert, E experts, V vocabulary; a group is a key-value
head with the queries that share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from minimoe.lineage.derive import build_from, neurons, set_neurons, wide
from minimoe.model.attention import Attention
from minimoe.model.config import MoEConfig
from minimoe.model.layers import MLP
from minimoe.model.moe import Experts, MoELayer
from minimoe.model.transformer import MoEForCausalLM

GAUGES: dict[str, Callable[..., MoEForCausalLM]] = {}
_OBSTACLES: dict[str, Callable[[MoEConfig], str | None]] = {}  # what keeps a gauge from applying, by its name


def _gauge(find_obstacle: Callable[[MoEConfig], str | None] = lambda config: None) -> Callable:
    """List a function in `GAUGES`, and let it raise a ValueError where `find_obstacle` says why it does not apply."""

    def register(rewrite: Callable[..., MoEForCausalLM]) -> Callable[..., MoEForCausalLM]:
        @wraps(rewrite)
        @torch.no_grad()
        def checked(model: MoEForCausalLM, **options: Any) -> MoEForCausalLM:
            reason = find_obstacle(model.config)
            if reason is not None:
                raise ValueError(f"{rewrite.__name__}: {reason}")
            return rewrite(model, **options)

        GAUGES[rewrite.__name__], _OBSTACLES[rewrite.__name__] = checked, find_obstacle
        return checked

    return register


def obstacle(gauge: str, config: MoEConfig) -> str | None:
    """Why `gauge` would change the function of a model, or would have nothing to change; None: no setting
    keeps it from applying. `rotate_residual` also wants folded norms, which it checks when it is called.

    Args:
        gauge: a name in `GAUGES`.
        config: of the model.

    Raises:
        ValueError: there is no such gauge.
    """
    if gauge not in GAUGES:
        raise ValueError(f"gauge={gauge!r}: wanted one of {', '.join(GAUGES)}")
    return _OBSTACLES[gauge](config)


def all_gauges(model: MoEForCausalLM, seed: int) -> MoEForCausalLM:
    """Compose every gauge that applies to `model`.

    Args:
        model: any.
        seed: another seed, another model of the same function.
    """
    for number, (name, gauge) in enumerate(GAUGES.items()):
        if obstacle(name, model.config) is None:
            model = gauge(model, seed=seed * len(GAUGES) + number)
    return model


def _clipped(config: MoEConfig) -> str | None:
    return None if config.clip_qkv is None else f"clip_qkv={config.clip_qkv}: wanted None"


def _clipped_after_scaling(config: MoEConfig) -> str | None:
    return None if config.qk_norm == "head" else _clipped(config)  # a norm of heads scales what was clipped


def _without_router_rows(config: MoEConfig) -> str | None:
    if not any(config.is_sparse(layer) for layer in range(config.num_hidden_layers)):
        return f"num_experts={config.num_experts}, none in any layer: wanted a mixture"
    return "router='hash': wanted a router that has rows" if config.router == "hash" else None


def _without_softmax(config: MoEConfig) -> str | None:
    sigmoid = "score_func='sigmoid': wanted 'softmax'" if config.score_func == "sigmoid" else None
    return _without_router_rows(config) or sigmoid


def _without_router_scale(config: MoEConfig) -> str | None:
    return _without_router_rows(config) or (None if config.router_scale else "router_scale=False: wanted True")


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
        model: any.
        weights: [H] each, by the name of the norm ("model.layers.0.input_layernorm", ..., "model.norm").

    Raises:
        KeyError: there is no norm of that name.
        ValueError: a new weight is 0 where the old one is not.
    """
    old_head, new_head = model.model.norm.weight, weights.get("model.norm", model.model.norm.weight)
    changed = _copy(model, untied=not torch.equal(old_head, new_head.to(old_head)))
    readers = _readers(changed)
    for name, weight in weights.items():
        norm = changed.get_submodule(name).weight
        old = wide(norm).clone()
        norm.copy_(weight)
        new = wide(norm)  # as stored, so that rounding goes into the ratio
        lost = (new == 0) & (old != 0)
        if lost.any():
            place = int(lost.nonzero()[0])
            raise ValueError(f"{name}.weight[{place}]=0: wanted another number, since it is {float(old[place])} now")
        ratio = torch.where(new == old, 1.0, old / new)
        for reader in readers[name]:
            reader.copy_(wide(reader) * ratio)
    return changed


@_gauge()
def rotate_residual(model: MoEForCausalLM, *, seed: int, amount: float = 1.0) -> MoEForCausalLM:
    """Turn the residual stream by a random rotation, which RMS norms of constant weight do not notice.

    Embedding and head turn alike, so that tied embeddings stay tied. An `amount` of 1 turns planes by up to half a
    circle. (SliceGPT: Ashkboos et al. 2024, arXiv 2401.15024, section 3.1.)

    Raises:
        ValueError: a norm weighs dimensions differently; after `fold_norms` none does.
    """
    for name in _readers(model):
        weight = model.get_submodule(name).weight
        if not torch.equal(weight, weight[:1].expand_as(weight)):
            raise ValueError(
                f"{name}.weight goes from {float(weight.min()):.4g} to {float(weight.max()):.4g}: wanted one number "
                "throughout, for rotate_residual; fold_norms does that"
            )
    rotation = _skew(model.config.hidden_size, amount, _generator(seed)).matrix_exp()
    return _change_basis(model, lambda vectors: wide(vectors) @ rotation.T)


@_gauge()
def permute_residual(model: MoEForCausalLM, *, seed: int) -> MoEForCausalLM:
    """Reorder the dimensions of the residual stream and flip the signs of some. Norm weights move along."""
    generator, hidden = _generator(seed), model.config.hidden_size
    order = torch.randperm(hidden, generator=generator, device="cpu")
    sign = 1.0 - 2.0 * torch.randint(2, (hidden,), generator=generator, device="cpu")
    permuted = _change_basis(model, lambda vectors: wide(vectors)[..., order] * sign)
    for name in _readers(permuted):
        norm = permuted.get_submodule(name).weight
        norm.copy_(norm[order])
    return permuted


def _change_basis(model: MoEForCausalLM, change: Callable[[Tensor], Tensor]) -> MoEForCausalLM:
    """A copy, `change` applied to all that reads the residual stream or writes to it, [..., H]."""
    changed = _copy(model)
    vectors = [*_writers(changed), *(reader for readers in _readers(changed).values() for reader in readers)]
    for tensor in {id(tensor): tensor for tensor in vectors}.values():  # a tied head is the embedding: once
        tensor.copy_(change(tensor))
    return changed


def _readers(model: MoEForCausalLM) -> dict[str, list[Tensor]]:
    """The norms of the residual stream by name, each with the matrices [..., H] that its output goes into."""
    readers = {}
    for layer, block in enumerate(model.model.layers):
        attention = block.self_attn
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        readers[f"model.layers.{layer}.input_layernorm"] = [projection.weight for projection in projections]
        readers[f"model.layers.{layer}.post_attention_layernorm"] = [
            parameter
            for name, parameter in block.mlp.named_parameters()
            if "down_proj" not in name and not name.endswith("router_scale")
        ]
    return readers | {"model.norm": [model.lm_head.weight]}


def _writers(model: MoEForCausalLM) -> list[Tensor]:
    """What adds to the residual stream, as views [..., H]."""
    writers = [model.model.embed_tokens.weight]
    for block in model.model.layers:
        output = block.self_attn.o_proj
        writers += [output.weight.mT] if output.bias is None else [output.weight.mT, output.bias]
        writers += [parameter.mT for name, parameter in block.mlp.named_parameters() if "down_proj" in name]
    return writers


# --- attention --------------------------------------------------------------------------------------------


@_gauge()
def rotate_qk(model: MoEForCausalLM, *, seed: int, amount: float = 1.0) -> MoEForCausalLM:
    """Turn each rotary pair of a group's queries and keys by one angle: it commutes with the turns of the positions.

    An `amount` of 1 draws the angles from the whole circle. Where queries and keys are normed or clipped by the
    dimension (`qk_norm`, `clip_qkv`), only quarter turns are left, and the weights of the norm are exchanged with the
    dimensions.
    """
    changed, generator, config = _copy(model), _generator(seed), model.config
    for attention in _attentions(changed):
        angles = math.pi * _uniform(_pair_shape(config), amount, generator)
        cos, sin = angles.cos(), angles.sin()
        if config.qk_norm or config.clip_qkv:
            turns = (angles / (math.pi / 2)).round() * (math.pi / 2)
            cos, sin = turns.cos().round(), turns.sin().round()
        for name in "qk":
            projection = getattr(attention, f"{name}_proj")
            for rows in projection.parameters():
                rows.copy_(_turn_pairs(rows, cos, sin))
            if config.qk_norm:
                norm = getattr(attention, f"{name}_norm").weight
                norm.copy_(_swap_pairs(norm, sin != 0))
    return changed


@_gauge(_clipped_after_scaling)
def scale_qk(model: MoEForCausalLM, *, seed: int, amount: float = 1.0) -> MoEForCausalLM:
    """Multiply each rotary pair of a group's queries by a factor, and divide that of its keys by it.

    With `qk_norm` the factors go into the weights of the norms. Queries and keys must not be clipped after the factor.
    """
    changed, generator = _copy(model), _generator(seed)
    for attention in _attentions(changed):
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
            rows.copy_((_pairs(rows, by) * by[:, None, None, :, None]).view_as(rows))


@_gauge(_clipped)
def mix_vo(model: MoEForCausalLM, *, seed: int, amount: float = 1.0) -> MoEForCausalLM:
    """Map each group's values by an invertible matrix, and the columns of the output projection by its inverse.

    The matrix is exp(K + S): K turns planes by up to half a circle, S is diagonal and stretches by up to 2; `amount`
    multiplies both. Values must not be clipped.
    """
    changed, generator = _copy(model), _generator(seed)
    groups, size = model.config.num_key_value_heads, model.config.head_dim
    for attention in _attentions(changed):
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


@_gauge()
def permute_heads(model: MoEForCausalLM, *, seed: int) -> MoEForCausalLM:
    """Reorder the groups, and the queries within each."""
    changed, generator, config = _copy(model), _generator(seed), model.config
    queries_each = config.num_attention_heads // config.num_key_value_heads
    for attention in _attentions(changed):
        queries = _order_in_groups(config.num_key_value_heads, queries_each, generator)
        keys = queries[::queries_each] // queries_each
        orders = {"q": queries, "k": keys, "v": keys}
        for name, parameter in attention.named_parameters():
            whole = name.endswith("_norm.weight") and config.qk_norm == "head"  # one norm that all heads share
            if not (whole or name.startswith("o_proj")):
                parameter.copy_(_permute_blocks(parameter, orders[name[0]], config.head_dim))
        columns = attention.o_proj.weight.mT
        columns.copy_(_permute_blocks(columns, queries, config.head_dim))
    return changed


def _attentions(model: MoEForCausalLM) -> Iterator[Attention]:
    return (block.self_attn for block in model.model.layers)


def _pair_shape(config: MoEConfig) -> tuple[int, int]:
    """Of what is chosen for each rotary pair: [groups, D / 2]; [1, D / 2] if all heads share the weights of a norm."""
    return 1 if config.qk_norm == "head" else config.num_key_value_heads, config.head_dim // 2


def _pairs(rows: Tensor, choices: Tensor) -> Tensor:
    """Rows [heads * D, ...] as [groups, heads of a group, 2, D / 2, -1], for `choices` [groups, D / 2].

    Pair i of a head is its dimensions i and i + D / 2.
    """
    groups, half = choices.shape
    return wide(rows).reshape(groups, -1, 2, half, rows[0].numel())


def _turn_pairs(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = _pairs(rows, cos).unbind(2)
    cos, sin = cos[:, None, :, None], sin[:, None, :, None]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=2).view_as(rows)


def _swap_pairs(rows: Tensor, chosen: Tensor) -> Tensor:
    pairs = _pairs(rows, chosen)
    return pairs.flip(2).where(chosen[:, None, None, :, None], pairs).view_as(rows)


def _permute_blocks(rows: Tensor, order: Tensor, size: int) -> Tensor:
    """Reorder the blocks of `size` rows."""
    return rows.unflatten(0, (-1, size))[order].flatten(0, 1)


# --- MLPs and experts -------------------------------------------------------------------------------------


@_gauge()
def permute_neurons(model: MoEForCausalLM, *, seed: int) -> MoEForCausalLM:
    """Reorder the neurons of every MLP and of every expert, each for itself."""
    changed, generator = _copy(model), _generator(seed)
    for mlp in _mlps(changed):
        rows = neurons(mlp)
        order = _uniform(rows.shape[:-2], 1.0, generator).argsort(dim=-1)
        set_neurons(mlp, rows.take_along_dim(order[..., None, None].to(rows.device), dim=-3))
    return changed


@_gauge()
def scale_neurons(model: MoEForCausalLM, *, seed: int, amount: float = 1.0) -> MoEForCausalLM:
    """Multiply each neuron's up row by a factor, and divide its down column by it.

    A share of amount / 2 of the factors is negative. The gate has no such freedom: silu is not homogeneous.
    """
    changed, generator = _copy(model), _generator(seed)
    for mlp in _mlps(changed):
        rows = neurons(mlp)
        factors = _factors(rows.shape[:-2], amount, generator)
        negative = torch.rand(factors.shape, generator=generator, device="cpu") < amount / 2
        factors = torch.where(negative, -factors, factors)
        by = torch.stack([torch.ones_like(factors), factors, 1 / factors], dim=-1)
        set_neurons(mlp, (wide(rows) * by[..., None]).to(rows))
    return changed


def _mlps(model: MoEForCausalLM) -> Iterator[MLP | Experts]:
    """Dense MLPs, the experts of a mixture together, shared experts."""
    return (module for module in model.modules() if isinstance(module, MLP | Experts))


# --- the mixture ------------------------------------------------------------------------------------------


@_gauge(_without_router_rows)
def permute_experts(model: MoEForCausalLM, *, seed: int) -> MoEForCausalLM:
    """Reorder the experts with all that the router keeps of each; in groups, the groups and the experts in each.

    Exact where no two experts tie: of equal scores `topk` takes one by its place. The model must be a mixture whose
    router has rows, which move along.
    """
    changed, generator, groups = _copy(model), _generator(seed), model.config.n_group
    for mixture in _mixtures(changed):
        order = _order_in_groups(groups, model.config.num_experts // groups, generator)
        router = mixture.gate
        for tensor in (*router.parameters(), *router.buffers(), *mixture.experts.parameters()):
            tensor.copy_(tensor[order])
    return changed


@_gauge(_without_softmax)
def shift_router(model: MoEForCausalLM, *, seed: int, amount: float = 1.0) -> MoEForCausalLM:
    """Add one random vector to all rows of a router: all logits of a token move alike, which softmax does not notice.

    For an `amount` of 1 it has the standard deviation of the router's weights. The model must be a mixture whose router
    has rows and scores by a softmax.
    """
    changed, generator = _copy(model), _generator(seed)
    for mixture in _mixtures(changed):
        rows = wide(mixture.gate.weight)
        shift = math.sqrt(3) * _uniform(rows.shape[-1:], amount, generator)  # of variance 1
        mixture.gate.weight.copy_(rows + rows.std(correction=0) * shift)
    return changed


@_gauge(_without_router_scale)
def exchange_router_scale(model: MoEForCausalLM, *, seed: int, amount: float = 1.0) -> MoEForCausalLM:
    """Multiply an expert's `router_scale` by a factor, and divide its down projection by it.

    The router must have such a scale (Pangu Pro MoE).
    """
    changed, generator = _copy(model), _generator(seed)
    for mixture in _mixtures(changed):
        scale, down = mixture.gate.router_scale, mixture.experts.down_proj
        factors = _factors(scale.shape, amount, generator)
        scale.copy_(wide(scale) * factors)
        down.copy_(wide(down) / factors[:, None, None])
    return changed


def _mixtures(model: MoEForCausalLM) -> Iterator[MoELayer]:
    return (module for module in model.modules() if isinstance(module, MoELayer))


# --- what they share --------------------------------------------------------------------------------------


def _copy(model: MoEForCausalLM, *, untied: bool = False) -> MoEForCausalLM:
    """A model of the same weights, in memory of its own; `untied` gives it a head of its own."""
    tensors = model.state_dict()
    if untied and model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        return build_from(model, tensors, tie_word_embeddings=False)
    return build_from(model, tensors)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _uniform(shape: tuple[int, ...], amount: float, generator: torch.Generator) -> Tensor:
    """Float64 numbers from -amount to amount."""
    if not 0 <= amount < math.inf:
        raise ValueError(f"amount={amount}: wanted a finite number of at least 0")
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
