"""Plants: parts of another model put into a stranger, where they do nothing.

Each returns a new model in evaluation mode, in the dtype of `model`, which stays as it is, and computes what it did. A
file then holds weights of a model that has no part in what it says: evidence against whoever counts parts.

What is planted is translated first, by least squares over all tokens, so that it reads and writes the stranger's
embeddings about as it did those of the other model. The layer that it comes from has the same number, or the same place
where depths differ. Sums are done in float64.

Shapes: H hidden size, I width of an MLP or of an expert, E experts, n neurons that are planted; a group is a key-value
head with the queries that share it. H', I' and E' are those of the other model.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimoe.lineage.derive import build_from, neurons, require_heads, set_neurons, wide
from minimoe.lineage.upcycling import upcycle
from minimoe.model.config import require
from minimoe.model.moe import MoELayer
from minimoe.model.transformer import Block, MoEForCausalLM

# --- neurons ----------------------------------------------------------------------------------------------


def plant_dead_neurons(
    model: MoEForCausalLM,
    other: MoEForCausalLM,
    *,
    share: float = 1.0,
    scale: float = 1e-6,
    first: bool = False,
    seed: int = 0,
) -> MoEForCausalLM:
    """Widen each MLP, and each routed expert, by neurons of `other` whose output is next to nothing.

    Args:
        share: of the neurons of `other`, drawn at random, that are planted; they keep their order.
        scale: what their down columns are multiplied by; logits move by about as much.
        first: whether they stand before the model's own neurons: those that they came from have the same numbers.
        seed: of the choice.

    Raises ValueError: share is outside (0, 1]; the vocabularies differ in size.
    """
    return _plant_neurons(model, other, lambda rows, _: [_times(rows, 1, 1, scale)], share, first, seed)


def plant_cancelling_neurons(
    model: MoEForCausalLM,
    other: MoEForCausalLM,
    *,
    way: str = "opposite",
    share: float = 1.0,
    first: bool = False,
    seed: int = 0,
) -> MoEForCausalLM:
    """Widen each MLP, and each routed expert, by neurons of `other` and by more that undo them exactly.

    Each speaks as loudly as it did in `other`. With s(g, u) = silu(g x) (u x) for a neuron of gate row g and up row u:

        "opposite"  s(g, u) - s(g, u)
        "halves"    s(g, u) - 2 s(g, u / 2)
        "sums"      s(g, u) - s(g, r) - s(g, u - r), with a random row r: no neuron undoes another one
        "products"  s(g, u) - s(-g, u) - s(u, g) + s(-u, g), where both differences are (g x) (u x)
        "squares"   s(g, u) - s(-g, u) - (s(a, a) - s(-a, a) - s(b, b) + s(-b, b)) / 4, with a = g + u and b = g - u
                    made of g and u of equal length: no neuron reads what the one that it undoes does
        "spans"     the same with five squares of directions that mix g and u with a third, random one: none is near the
                    plane of g and u

    The last three hold as silu(z) - silu(-z) = z.

    Args: as for `plant_dead_neurons`; with `first`, what undoes them still stands last.
    Raises ValueError: there is no such way; or as there.
    """
    require(way in _CANCELLING, "way", way, f"one of {', '.join(_CANCELLING)}")
    return _plant_neurons(model, other, _CANCELLING[way], share, first, seed)


def _times(rows: Tensor, gate: float, up: float, down: float) -> Tensor:
    """Neurons [..., 3, H] with their three faces multiplied."""
    return rows * torch.tensor([gate, up, down], dtype=rows.dtype, device="cpu")[:, None]


def _sums(rows: Tensor, generator: torch.Generator) -> list[Tensor]:
    gate, up, down = rows.unbind(-2)
    drawn = torch.randn(up.shape, generator=generator, dtype=up.dtype, device="cpu") * up.std()
    return [rows, *(torch.stack([gate, part, -down], dim=-2) for part in (drawn, up - drawn))]


def _products(rows: Tensor, _: torch.Generator) -> list[Tensor]:
    exchanged = rows[..., [1, 0, 2], :]
    return [rows, _times(rows, -1, 1, -1), _times(exchanged, 1, 1, -1), _times(exchanged, -1, 1, 1)]


def _squares(rows: Tensor, _: torch.Generator) -> list[Tensor]:
    rows = _of_equal_length(rows)
    gate, up, _ = rows.unbind(-2)
    return _undone_by_squares(rows, {1 / 4: gate + up, -1 / 4: gate - up}.items())


def _spans(rows: Tensor, generator: torch.Generator) -> list[Tensor]:
    """The squares of five axes around the third direction, with shares that add up to the product of the others."""
    rows = _of_equal_length(rows)
    gate, up, _ = rows.unbind(-2)
    third = torch.randn(gate.shape, generator=generator, dtype=gate.dtype, device="cpu")
    third *= 3 * gate.norm(dim=-1, keepdim=True) / third.norm(dim=-1, keepdim=True)
    angles = (torch.arange(5, dtype=rows.dtype, device="cpu") + 0.25) * (2 * math.pi / 5)
    axes = torch.stack([2 * angles.cos(), 2 * angles.sin(), torch.ones_like(angles)], dim=1) / math.sqrt(5)
    product = torch.zeros(9, 1, dtype=rows.dtype, device="cpu")
    product[[1, 3]] = 0.5  # of the first two directions
    shares = torch.linalg.lstsq((axes[:, :, None] * axes[:, None]).flatten(1).mT, product).solution.flatten()
    sides = (axes @ torch.stack([gate, up, third], dim=-2)).unbind(-2)
    return _undone_by_squares(rows, zip(shares.tolist(), sides, strict=True))


def _of_equal_length(rows: Tensor) -> Tensor:
    """The same neurons with up rows as long as their gate rows."""
    gate, up, down = rows.unbind(-2)
    longer = gate.norm(dim=-1, keepdim=True) / up.norm(dim=-1, keepdim=True)
    return torch.stack([gate, longer * up, down / longer], dim=-2)


def _undone_by_squares(rows: Tensor, squares: Iterable[tuple[float, Tensor]]) -> list[Tensor]:
    """Neurons, the same with opposite gates, and (side x)^2 from a pair of neurons for each share and side."""
    copies, down = [rows, _times(rows, -1, 1, -1)], rows[..., 2, :]
    for share, side in squares:
        copies += [torch.stack([sign * side, side, -sign * share * down], dim=-2) for sign in (1, -1)]
    return copies


_Copies = Callable[[Tensor, torch.Generator], list[Tensor]]  # of neurons [..., n, 3, H], themselves first
_CANCELLING: Mapping[str, _Copies] = {
    "opposite": lambda rows, _: [rows, _times(rows, 1, 1, -1)],
    "halves": lambda rows, _: [rows, _times(rows, 1, 0.5, -2)],
    "sums": _sums,
    "products": _products,
    "squares": _squares,
    "spans": _spans,
}


@torch.no_grad()
def _plant_neurons(
    model: MoEForCausalLM, other: MoEForCausalLM, copies: _Copies, share: float, first: bool, seed: int
) -> MoEForCausalLM:
    require(0 < share <= 1, "share", share, "above 0 and at most 1")
    generator = torch.Generator("cpu").manual_seed(seed)
    planted = build_from(model, model.state_dict())
    translation = _translate(model, other)
    width = min(_of_layer(block).shape[1] for block in other.model.layers)
    count, added = max(1, round(share * width)), 0
    for ours, theirs in _same_layers(planted, other):
        rows = translation.neurons(ours, theirs)
        kept = torch.randperm(rows.shape[1], generator=generator, device="cpu")[:count].sort().values
        source, *counterparts = copies(rows[:, kept], generator)
        experts = ours.mlp.experts if ours.is_sparse else ours.mlp
        own = neurons(experts)
        places = torch.arange(len(own) if ours.is_sparse else 1, device="cpu") % len(rows)  # expert e takes from e
        new = [(each[places] if ours.is_sparse else each[0]).to(own) for each in (source, *counterparts)]
        set_neurons(experts, torch.cat([new[0], own, *new[1:]] if first else [own, *new], dim=-3))
        added = len(new) * count
    names = ("intermediate_size", "moe_intermediate_size")
    return build_from(model, planted.state_dict(), **{name: getattr(model.config, name) + added for name in names})


# --- heads ------------------------------------------------------------------------------------------------


def plant_dead_heads(
    model: MoEForCausalLM, other: MoEForCausalLM, *, scale: float = 1e-7, gain: float = 1.0, turn: bool = False
) -> MoEForCausalLM:
    """Append all groups of heads of `other` to those of each layer, with an output that is next to nothing.

    Args:
        scale: what their output columns are multiplied by; logits move by about as much.
        gain: what their queries and keys are multiplied by: whoever adds up what heads attend to hears them above all.
        turn: translate by the rotation that fits best (orthogonal Procrustes), as `aligned_cka` turns residual streams.

    Raises ValueError: heads or their groups differ in size, queries are normed over all heads at once, or the
    vocabularies differ in size.
    """
    return _plant_heads(model, other, gain, turn, (scale,))


def plant_cancelling_heads(
    model: MoEForCausalLM, other: MoEForCausalLM, *, gain: float = 1.0, turn: bool = False
) -> MoEForCausalLM:
    """Append all groups of heads of `other` twice to those of each layer, with opposite outputs.

    The arguments and errors are those of `plant_dead_heads`.
    """
    return _plant_heads(model, other, gain, turn, (1.0, -1.0))


@torch.no_grad()
def _plant_heads(
    model: MoEForCausalLM, other: MoEForCausalLM, gain: float, turn: bool, factors: Sequence[float]
) -> MoEForCausalLM:
    config, theirs = model.config, other.config
    require_heads("planted heads", config, theirs)
    sinks = config.attention_sinks or theirs.attention_sinks
    require(not sinks, "attention_sinks", sinks, "False: planted heads have none")
    require(theirs.head_dim == config.head_dim, "head_dim of the other", theirs.head_dim, f"{config.head_dim}")
    each, wanted = (x.num_attention_heads // x.num_key_value_heads for x in (theirs, config))
    require(each == wanted, "queries in a group of the other", each, f"{wanted}, as in the model")
    require(config.qk_norm != "full", "qk_norm", "full", "None or 'head': this norm would see the planted heads")
    planted, translation = build_from(model, model.state_dict()), _translate(model, other, turn=turn)
    for block, source in _same_layers(planted, other):
        ours, donor = block.self_attn, source.self_attn
        norms = block.input_layernorm, source.input_layernorm
        for role in "qkv":
            by = len(factors) * [1.0 if role == "v" else gain]
            to, of = getattr(ours, f"{role}_proj"), getattr(donor, f"{role}_proj")
            _append(to.weight, translation.read(of.weight, *norms), by)
            if to.bias is not None:
                _append(to.bias, torch.zeros(len(of.weight)) if of.bias is None else wide(of.bias), by)
        ours.o_proj.weight.data = ours.o_proj.weight.data.mT
        _append(ours.o_proj.weight, translation.write(donor.o_proj.weight.mT), factors)
        ours.o_proj.weight.data = ours.o_proj.weight.data.mT.contiguous()
    names = ("num_attention_heads", "num_key_value_heads")
    heads = {name: getattr(config, name) + len(factors) * getattr(theirs, name) for name in names}
    return build_from(model, planted.state_dict(), **heads)


def _append(parameter: Tensor, rows: Tensor, factors: Sequence[float]) -> None:
    """Append `rows` to a parameter, in place, once for each factor, multiplied by it."""
    parameter.data = torch.cat([parameter.data, *((factor * rows).to(parameter) for factor in factors)])


# --- experts, tokens --------------------------------------------------------------------------------------


@torch.no_grad()
def plant_unreached_expert(model: MoEForCausalLM, other: MoEForCausalLM, *, seed: int = 0) -> MoEForCausalLM:
    """Give each mixture one more expert, that of its layer in `other`, which no token is ever sent to.

    Its router row is the mean of all rows, and it has a selection bias two below the others', which no score makes up
    for. A dense model is first made a mixture of four copies, two per token. The result is a "minimoe": few families
    have a selection bias.

    Args:
        other: dense, or a mixture, whose first expert is taken; its MLPs at most as wide as the experts of `model`.
        seed: of the router of a model that was dense.

    Raises ValueError: the router is not "topk" without groups, or its weights depend on experts that are not chosen;
    the MLPs of `other` are wider; the vocabularies differ in size.
    """
    if not model.config.num_experts:
        model = upcycle(model, num_experts=4, num_experts_per_tok=2, model_type="minimoe", seed=seed)
    config = model.config
    require(config.router == "topk", "router", config.router, "'topk', which takes a selection bias")
    require(config.n_group == 1, "n_group", config.n_group, "1")
    alone = config.norm_topk_prob or config.score_func == "sigmoid"
    require(alone, "norm_topk_prob", config.norm_topk_prob, "True: one more expert would change the other weights")
    tensors, translation = model.state_dict(), _translate(model, other)
    for layer, (ours, theirs) in enumerate(_same_layers(model, other)):
        if isinstance(ours.mlp, MoELayer):
            gate, own, rows = ours.mlp.gate, neurons(ours.mlp.experts), translation.neurons(ours, theirs)[0]
            fits = len(rows) <= own.shape[1]
            require(fits, "width of an MLP of the other", len(rows), f"at most {own.shape[1]}, that of the experts")
            expert = torch.zeros_like(own[:1])  # neurons that it lacks are 0
            expert[0, : len(rows)] = rows.to(own)
            bias = gate.e_score_correction_bias
            bias = torch.zeros(config.num_experts, device=own.device) if bias is None else bias
            prefix = f"model.layers.{layer}.mlp"
            tensors[f"{prefix}.gate.weight"] = torch.cat([gate.weight, gate.weight.mean(0, keepdim=True)])
            tensors[f"{prefix}.gate.e_score_correction_bias"] = torch.cat([bias, bias.min()[None] - 2])
            both = torch.cat([own, expert])
            faces = both[..., 0, :], both[..., 1, :], both[..., 2, :].mT
            for role, face in zip(("gate", "up", "down"), faces, strict=True):
                tensors[f"{prefix}.experts.{role}_proj"] = face.contiguous()
    changes = {"num_experts": config.num_experts + 1, "e_score_correction_bias": True, "model_type": "minimoe"}
    return build_from(model, tensors, **changes)


@torch.no_grad()
def plant_embedding_rows(model: MoEForCausalLM, other: MoEForCausalLM, *, tokens: Sequence[int]) -> MoEForCausalLM:
    """Give some tokens the rows that they have in the embedding and in the head of `other`, as they are there.

    On text without these tokens the logits of all others stay; those of `tokens` themselves become others.
    Raises ValueError: the hidden sizes differ; a token is not there in both.
    """
    found, wanted = other.config.hidden_size, model.config.hidden_size
    require(found == wanted, "hidden_size of the other", found, f"{wanted}, as in the model")
    rows = min(model.config.vocab_size, other.config.vocab_size)
    require(all(0 <= token < rows for token in tokens), "tokens", [*tokens], f"numbers from 0 to {rows - 1}")
    planted = build_from(model, model.state_dict())
    ends = {planted.model.embed_tokens: other.model.embed_tokens, planted.lm_head: other.lm_head}
    for ours, theirs in ends.items():
        ours.weight[list(tokens)] = theirs.weight[list(tokens)].to(ours.weight)
    return planted


# --- translation ------------------------------------------------------------------------------------------


class _Translation(NamedTuple):
    """From the residual stream of another model into that of the first, [H', H] each."""

    reading: Tensor
    writing: Tensor

    def read(self, rows: Tensor, norm: Any, other_norm: Any) -> Tensor:
        """Rows [..., H'] that read what `other_norm` gives, as rows [..., H] that read what `norm` gives."""
        return wide(rows) * wide(other_norm.weight) @ self.reading / wide(norm.weight)

    def write(self, columns: Tensor) -> Tensor:
        """What is written, [..., H'], as [..., H]."""
        return wide(columns) @ self.writing

    def neurons(self, ours: Block, theirs: Block) -> Tensor:
        """The neurons of a layer of the other model, [E', I', 3, H]; a dense one has E' = 1."""
        rows = _of_layer(theirs)
        norms = ours.post_attention_layernorm, theirs.post_attention_layernorm
        return torch.cat([self.read(rows[..., :2, :], *norms), self.write(rows[..., 2:, :])], dim=-2)


def _translate(model: MoEForCausalLM, other: MoEForCausalLM, *, turn: bool = False) -> _Translation:
    """What fits best over all tokens, before the layers and after them: any map, or a rotation."""
    found, wanted = other.config.vocab_size, model.config.vocab_size
    require(found == wanted, "vocab_size of the other", found, f"{wanted}, as in the model")
    ends = []
    for each in (model, other):
        embedding = wide(each.model.embed_tokens.weight)
        size = embedding.square().mean(1, keepdim=True).sqrt()
        ends.append((embedding / size.where(size > 0, 1), wide(each.lm_head.weight) * wide(each.model.norm.weight)))
    fit = _procrustes if turn else lambda ours, theirs: torch.linalg.lstsq(ours, theirs).solution
    return _Translation(*(fit(ours, theirs).mT for ours, theirs in zip(*ends, strict=True)))


def _procrustes(ours: Tensor, theirs: Tensor) -> Tensor:
    """The map [H, H'] with singular values 1 that takes `ours` [V, H] closest to `theirs` (Schoenemann 1966)."""
    left, _, right = torch.linalg.svd(ours.mT @ theirs, full_matrices=False)
    return left @ right


def _of_layer(block: Block) -> Tensor:
    """The neurons of a layer, [E, I, 3, H]; a dense one has E = 1."""
    return neurons(block.mlp.experts) if block.is_sparse else neurons(block.mlp)[None]


def _same_layers(model: MoEForCausalLM, other: MoEForCausalLM) -> Iterator[tuple[Block, Block]]:
    """Each layer of `model` with the one at the same place in `other`."""
    ours, theirs = model.model.layers, other.model.layers
    return ((block, theirs[place * len(theirs) // len(ours)]) for place, block in enumerate(ours))
