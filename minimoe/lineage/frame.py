"""Frames: rewrites that give a model the fingerprint of another one, its own function unchanged.

Each returns a new model in evaluation mode, in the dtype of `model`, which stays as it is. It shares no weight with the
target: that it looks like it is evidence against a fingerprint, not for descent.

Shapes: H hidden size, D head size, I width of an MLP, L layers.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from minimoe.lineage.derive import parts, require_heads, take_neurons, wide
from minimoe.lineage.gauge import map_values, replace_norms, scale_pairs
from minimoe.model.attention import Attention
from minimoe.model.config import require
from minimoe.model.transformer import Block, MoEForCausalLM


def frame_norms(model: MoEForCausalLM, target: MoEForCausalLM) -> MoEForCausalLM:
    """Give `model` the norm weights of `target`, exactly, and what reads the norms the ratio: W <- W diag(old / new).

    A final norm that changes unties the embeddings. The norms of queries and keys (`qk_norm`) stay.
    Raises ValueError: hidden size or depth differ, or the target has a 0 where the model has none.
    """
    _require_equal(model, target, "num_hidden_layers", "hidden_size")
    named = target.state_dict()
    norms = [name for name in named if name.endswith(("layernorm.weight", "model.norm.weight"))]
    return replace_norms(model, {name.removesuffix(".weight"): named[name] for name in norms})


def _require_equal(model: MoEForCausalLM, target: MoEForCausalLM, *fields: str) -> None:
    for field in fields:
        found, wanted = getattr(target.config, field), getattr(model.config, field)
        require(found == wanted, f"{field} of the target", found, f"{wanted}, as in the model")


def frame_std_profile(model: MoEForCausalLM, target: MoEForCausalLM | Mapping[str, Sequence[float]]) -> MoEForCausalLM:
    """Give the standard deviations of Q, K, V and O, layer by layer, the profile they have in `target`.

    Queries and keys exchange a factor c_i in each rotary pair, values and output columns in each dimension. For sums of
    squares p_i on one side and n_i on the other, sum p_i c_i^2 and sum n_i / c_i^2 can be made any two numbers whose
    product is at least (sum sqrt(p_i n_i))^2. Where the target asks for less in some layer, its standard deviations are
    multiplied by the smallest number, common to all layers, that brings them within reach: a correlation with the
    target does not see it. Means are taken to be 0, which those of weights nearly are.

    With `qk_norm`, Q and K stay as they are: what scales them is then no gauge.

    Args:
        model: any with grouped-query attention whose heads positions turn whole, and without `clip_qkv`.
        target: of the same depth; or its standard deviations, [L] each of "q", "k", "v" and "o".

    Raises ValueError: the model is another; the profile is not L positive numbers of each.
    """
    clip = model.config.clip_qkv
    require(clip is None, "clip_qkv", clip, "None, for frame_std_profile")
    framed_and_target = [model, *([target] if isinstance(target, MoEForCausalLM) else [])]
    require_heads("frame_std_profile", *(each.config for each in framed_and_target))
    part = model.config.partial_rotary_factor
    require(part == 1, "partial_rotary_factor", part, "1, for frame_std_profile")
    if isinstance(target, MoEForCausalLM):
        others = parts(target, Attention)
        target = {role: [float(_weight(other, role).std(correction=0)) for other in others] for role in "qkvo"}
    wanted = _check_profile(target, model.config.num_hidden_layers)
    framed = deepcopy(model).eval()
    attentions = parts(framed, Attention)
    for roles in ("vo",) if model.config.qk_norm else ("qk", "vo"):
        squares = [_squares(attention, roles, model.config.num_key_value_heads) for attention in attentions]
        sums = torch.stack([wanted[role].square() * _weight(attentions[0], role).numel() for role in roles], dim=-1)
        for attention, factors in zip(attentions, _factors(squares, sums), strict=True):
            if roles == "qk":
                scale_pairs(attention, factors)
            else:
                map_values(attention, factors.diag_embed(), (1 / factors).diag_embed())
    return framed


def _check_profile(profile: Mapping[str, Sequence[float]], layers: int) -> dict[str, Tensor]:
    checked = {}
    for role in "qkvo":
        require(role in profile, "target", sorted(profile), "'q', 'k', 'v' and 'o'")
        stds = torch.as_tensor(profile[role], dtype=torch.float64, device="cpu")
        found, positive = tuple(stds.shape), bool((stds.isfinite() & (stds > 0)).all())
        require(found == (layers,), f"shape of target[{role!r}]", found, f"({layers},), the layers")
        require(positive, f"target[{role!r}]", stds.tolist(), "finite numbers above 0")
        checked[role] = stds
    return checked


def _squares(attention: Attention, roles: str, groups: int) -> tuple[Tensor, Tensor]:
    """Sums of squares of what exchanges a factor, on either side of it.

    The rotary pairs of Q and K, [groups, D / 2] each, or the dimensions of the values in V and O, [groups, D] each.
    """
    size = attention.head_dim // 2 if roles == "qk" else attention.head_dim
    squares = (_weight(attention, role).square().sum(0 if role == "o" else 1) for role in roles)
    return tuple(each.view(groups, -1, size).sum(1) for each in squares)


def _weight(attention: Attention, role: str) -> Tensor:
    return wide(getattr(attention, f"{role}_proj").weight)


def _factors(squares: Sequence[tuple[Tensor, Tensor]], sums: Tensor) -> list[Tensor]:
    """For each layer and its squares (p, n) the c that give sum p c^2 and sum n / c^2 the profile of `sums` [L, 2]."""
    least = torch.stack([(p * n).sqrt().sum() ** 2 for p, n in squares])
    sums = sums * (least / sums.prod(-1)).max().sqrt().clamp(min=1)
    return [_solve(p, n, first, second) for (p, n), (first, second) in zip(squares, sums.tolist(), strict=True)]


def _solve(p: Tensor, n: Tensor, first: float, second: float) -> Tensor:
    """The c with sum p c^2 = first and sum n / c^2 = second.

    c^2 = sqrt(n / p) makes the product of the two sums smallest. From there, c^2 multiplied by e^s in every second unit
    and divided by it in the others raises the product as cosh(2 s) does; a factor common to all sets the quotient.
    """
    shared = (p * n).sqrt()
    if not shared.any():  # one side is all zeros: nothing to exchange
        return torch.ones_like(p)
    sign = torch.ones_like(shared)
    sign.view(-1)[1::2] = -1  # every second unit
    plus, minus = (float(shared[sign == side].sum()) for side in (1, -1))
    cosh = (first * second - plus**2 - minus**2) / (2 * plus * minus) if plus * minus else 1.0
    spread = (sign * math.acosh(max(cosh, 1.0)) / 2).exp()
    even = torch.where(shared > 0, (n / p).sqrt(), 1.0) * spread
    return (even * first / (p * even).sum()).sqrt()


@torch.no_grad()
def frame_neuron_order(model: MoEForCausalLM, target: MoEForCausalLM) -> MoEForCausalLM:
    """Give each neuron of `model` the number of one in `target` that it resembles.

    Of all orders that one is taken in which the cosines of up rows have the largest sum, layer by layer. Whoever asks,
    as `csu` does, whether neurons that resemble each other stand at the same number takes it that nobody chose them.
    Raises ValueError: one is a mixture; or depth, hidden size or width of the MLP differ.
    """
    _require_equal(model, target, "num_hidden_layers", "hidden_size", "intermediate_size")
    for role, either in (("model", model), ("target", target)):
        found = either.config.num_experts
        require(found == 0, f"num_experts of the {role}", found, "0, a dense one")
    framed = deepcopy(model).eval()
    for block, wanted in zip(framed.model.layers, target.model.layers, strict=True):
        resemblance = _directions(wanted) @ _directions(block).mT
        take_neurons(block.mlp, torch.from_numpy(linear_sum_assignment(resemblance.numpy(), maximize=True)[1]))
    return framed


def _directions(block: Block) -> Tensor:
    """The up rows of a dense layer with the norm before them folded in, of norm 1, [I, H]."""
    rows = block.mlp.up_proj.weight * block.post_attention_layernorm.weight
    return F.normalize(wide(rows), dim=1)
