"""Models made from other models without training: merged, pruned, deepened, extended, quantised.

    average, lerp, slerp, ties     merge models of one shape
    prune_neurons, prune_heads     make a model narrower
    prune_layers, depth_upscale    make a model shallower, or deeper
    extend_vocabulary              make room for new tokens
    quantise                       round the weights to integers, store what these stand for

Each returns a new model in evaluation mode, with the tokenizer of the old, and leaves its inputs as they are. Sums are
done in float64 and stored in the dtype of the (first) input. A `Derivation` keeps where a model came from.

Shapes: H hidden size, D head size, I width of an MLP or of an expert, E experts, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minimoe.model.attention import Attention
from minimoe.model.config import MoEConfig
from minimoe.model.layers import MLP
from minimoe.model.moe import Experts
from minimoe.model.transformer import MoEForCausalLM


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """How one model came from others: the truth that fingerprints are tested on."""

    parents: tuple[str, ...]  # names of the models it was made from; none: a root
    recipe: str  # what was done, in words and numbers
    seed: int  # of all that is random in it
    tokens: int  # seen in training since the parents
    function_unchanged: bool  # whether it computes what its one parent computes


def build(config: MoEConfig, tensors: Mapping[str, Tensor]) -> MoEForCausalLM:
    """A model of these tensors, in memory of its own."""
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float64 on the CPU: some devices have no float64."""
    return tensor.detach().to("cpu", torch.float64)


def build_from(origin: MoEForCausalLM, tensors: Mapping[str, Tensor], **changes: Any) -> MoEForCausalLM:
    """What became of `origin`: a model of these tensors, of its tokenizer, and of its configuration after `changes`."""
    model = build(replace(origin.config, **changes), tensors)
    model.tokenizer_json = origin.tokenizer_json
    return model


# --- merging ----------------------------------------------------------------------------------------------

# What models to be merged need not have in common: it changes no output.
_FREE = {
    "max_position_embeddings",
    "initializer_range",
    "router_aux_loss_coef",
    "seq_aux",
    "router_z_loss_coef",
    "experts_implementation",
    "model_type",
}


def average(models: Sequence[MoEForCausalLM]) -> MoEForCausalLM:
    """The mean of every weight: a uniform model soup (Wortsman et al. 2022, arXiv 2203.05482, section 2).

    Raises:
        ValueError: there is no model, or the configurations differ; the field is named.
    """
    if not models:
        raise ValueError("models=[]: wanted at least one")
    return _merge(models, lambda *weights: torch.stack(weights).mean(0))


def lerp(a: MoEForCausalLM, b: MoEForCausalLM, t: float) -> MoEForCausalLM:
    """(1 - t) a + t b, weight by weight: `a` at t = 0, `b` at t = 1.

    Raises:
        ValueError: the configurations differ; the field is named.
    """
    return _merge([a, b], lambda x, y: torch.lerp(x, y, t))


def slerp(a: MoEForCausalLM, b: MoEForCausalLM, t: float) -> MoEForCausalLM:
    """Turn every matrix of `a`, taken as one vector, towards that of `b` (Shoemake 1985, SIGGRAPH).

    With w the angle between them: sin((1 - t) w) / sin(w) * a + sin(t w) / sin(w) * b. Where two vectors are equally
    long, all between them are too, which a straight line cuts short. Where sin(w) = 0 or one of them is 0, it is the
    straight line. Every expert's matrix turns on its own.

    Raises:
        ValueError: the configurations differ; the field is named.
    """
    return _merge([a, b], lambda x, y: _slerp(x, y, t))


def _slerp(x: Tensor, y: Tensor, t: float) -> Tensor:
    def norm(tensor: Tensor) -> Tensor:
        return torch.linalg.vector_norm(tensor, dim=(-2, -1) if x.dim() > 1 else -1, keepdim=True)

    both = (norm(x) > 0) & (norm(y) > 0)
    u, v = x / norm(x).where(both, 1), y / norm(y).where(both, 1)
    angle = 2 * torch.atan2(norm(u - v), norm(u + v))  # near 0, more precise than the arc cosine
    curved = both & (angle.sin() > 1e-9)
    angle = angle.where(curved, 1)  # any angle whose sine is not 0
    turned = (((1 - t) * angle).sin() * x + (t * angle).sin() * y) / angle.sin()
    return turned.where(curved, torch.lerp(x, y, t))


def ties(
    base: MoEForCausalLM, models: Sequence[MoEForCausalLM], *, density: float = 0.2, weight: float = 1.0
) -> MoEForCausalLM:
    """Add to `base` what its descendants agree on (TIES: Yadav et al. 2023, arXiv 2306.01708, algorithm 1).

    A task vector is a descendant minus the base. Trim: each keeps its largest numbers. Elect: every weight gets the
    sign of the sum over the trimmed vectors. Merge: it moves by the mean of those numbers that have this sign.

    Args:
        base: the common ancestor.
        models: its descendants.
        density: share of a task vector that is kept, over all weights at once; 1 trims nothing.
        weight: what the merged task vector is multiplied by (lambda).

    Raises:
        ValueError: density is outside (0, 1], there is no model, or a configuration differs from that of the base.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density={density}: wanted above 0 and at most 1")
    if not models:
        raise ValueError("models=[]: wanted at least one")
    _require_alike([base, *models])
    start = _vector(base)
    trimmed = torch.stack([_trim(_vector(model) - start, density) for model in models])
    agreeing = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    merged = start + weight * (trimmed * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
    tensors = base.state_dict()
    pieces = merged.split([tensor.numel() for tensor in tensors.values()])
    named = zip(tensors.items(), pieces, strict=True)
    return _merged([base, *models], {name: piece.view_as(tensor).to(tensor) for (name, tensor), piece in named})


def _vector(model: MoEForCausalLM) -> Tensor:
    return torch.cat([wide(tensor).flatten() for tensor in model.state_dict().values()])


def _trim(vector: Tensor, density: float) -> Tensor:
    """Zero all but the largest numbers."""
    kept = vector.abs().topk(round(density * len(vector))).indices
    return torch.zeros_like(vector).index_copy(0, kept, vector[kept])


def _merge(models: Sequence[MoEForCausalLM], rule: Callable[..., Tensor]) -> MoEForCausalLM:
    """Apply `rule` to the tensors that have one name."""
    _require_alike(models)
    states = [model.state_dict() for model in models]
    merged = {name: rule(*(wide(state[name]) for state in states)).to(tensor) for name, tensor in states[0].items()}
    return _merged(models, merged)


def _merged(models: Sequence[MoEForCausalLM], tensors: Mapping[str, Tensor]) -> MoEForCausalLM:
    """A model of these tensors. Where the models have different tokenizers, an id stands for no text: it has none."""
    model = build_from(models[0], tensors)
    if len({each.tokenizer_json for each in models}) > 1:
        model.tokenizer_json = None
    return model


def _require_alike(models: Sequence[MoEForCausalLM]) -> None:
    wanted = asdict(models[0].config)
    for model in models[1:]:
        for name, found in asdict(model.config).items():
            if name not in _FREE and found != wanted[name]:
                raise ValueError(f"{name}={found!r}: wanted {wanted[name]!r}, as in the model it is merged with")


# --- width ------------------------------------------------------------------------------------------------


def prune_neurons(model: MoEForCausalLM, keep: float) -> MoEForCausalLM:
    """Keep the strongest neurons of every MLP, expert and shared expert, in their order.

    A neuron is as strong as the product of the norms of its gate row, up row and down column: where one of them is 0,
    it adds nothing. No data are needed.

    Args:
        model: dense or a mixture.
        keep: share of the width that stays, of each kind of MLP; rounded, at least one neuron.

    Raises:
        ValueError: keep is outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep}: wanted above 0 and at most 1")

    def shorter(width: int) -> int:
        return max(1, round(keep * width)) if width else 0

    pruned = deepcopy(model)
    for module in pruned.modules():
        if isinstance(module, MLP | Experts):
            rows = neurons(module)
            strength = torch.linalg.vector_norm(wide(rows), dim=-1).prod(-1)
            strongest = strength.topk(shorter(strength.shape[-1]), dim=-1).indices.sort(dim=-1).values
            set_neurons(module, rows.take_along_dim(strongest[..., None, None].to(rows.device), dim=-3))
    names = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    widths = {name: shorter(getattr(model.config, name)) for name in names}
    return build_from(model, pruned.state_dict(), **widths)


def neurons(mlp: MLP | Experts) -> Tensor:
    """An MLP as what it is a sum of: per neuron a gate row, an up row and a down column.

    Returns:
        A copy, [I, 3, H]; of experts, [E, I, 3, H].
    """
    gate, up, down = _projections(mlp)
    return torch.stack([gate, up, down.mT], dim=-2).detach()


def set_neurons(mlp: MLP | Experts, rows: Tensor) -> None:
    """Write what `neurons` reads, of any width, into `mlp`."""
    gate, up, down = _projections(mlp)
    gate.data, up.data, down.data = (row.contiguous() for row in (rows[..., 0, :], rows[..., 1, :], rows[..., 2, :].mT))


def _projections(mlp: MLP | Experts) -> list[Tensor]:
    projections = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return [projection.weight for projection in projections] if isinstance(mlp, MLP) else projections


def prune_heads(model: MoEForCausalLM, num_key_value_heads: int) -> MoEForCausalLM:
    """Keep the strongest key-value heads of every layer, each with the queries that share it, in their order.

    A group is as strong as the product of the norms of its value rows and of its output columns: without either
    it adds nothing. The size of a head stays.

    Args:
        model: any.
        num_key_value_heads: how many stay.

    Raises:
        ValueError: there are not that many.
    """
    config, found = model.config, model.config.num_key_value_heads
    if not 1 <= num_key_value_heads <= found:
        raise ValueError(f"num_key_value_heads={num_key_value_heads}: wanted 1 to {found}, those of the model")
    pruned = deepcopy(model)
    for block in pruned.model.layers:
        _keep_strongest_groups(block.self_attn, found, num_key_value_heads)
    heads = config.num_attention_heads // found * num_key_value_heads
    return build_from(model, pruned.state_dict(), num_attention_heads=heads, num_key_value_heads=num_key_value_heads)


def _keep_strongest_groups(attention: Attention, groups: int, kept: int) -> None:
    values = wide(attention.v_proj.weight).unflatten(0, (groups, -1))
    outputs = wide(attention.o_proj.weight).unflatten(1, (groups, -1))
    strength = values.norm(dim=(1, 2)) * outputs.norm(dim=(0, 2))
    chosen = strength.topk(kept).indices.sort().values
    for name, parameter in attention.named_parameters():
        whole = name.endswith("_norm.weight") and attention.qk_norm == "head"  # one norm that all heads share
        if name == "o_proj.weight":
            parameter.data = parameter.data.unflatten(1, (groups, -1))[:, chosen].flatten(1, 2)
        elif not whole and name != "o_proj.bias":
            parameter.data = parameter.data.unflatten(0, (groups, -1))[chosen].flatten(0, 1)


# --- depth ------------------------------------------------------------------------------------------------


def prune_layers(model: MoEForCausalLM, layers: Collection[int]) -> MoEForCausalLM:
    """Remove whole layers; those around them join (Gromov et al. 2024, arXiv 2403.17887).

    Args:
        model: of L layers.
        layers: which to remove, from 0.

    Raises:
        ValueError: a layer is not there, or none would be left.
    """
    present = range(model.config.num_hidden_layers)
    missing = [layer for layer in layers if layer not in present]
    if missing or len(set(layers)) == len(present):
        raise ValueError(f"layers={sorted(layers)}: wanted some, but not all, of 0 to {len(present) - 1}")
    return _with_layers(model, [layer for layer in present if layer not in layers])


def depth_upscale(model: MoEForCausalLM, removed: int) -> MoEForCausalLM:
    """Two copies of all layers on top of each other, less the seam (SOLAR: Kim et al. 2023, arXiv 2312.15166, fig. 1).

    The lower copy loses its last `removed` layers, the upper one its first: 2 (L - removed) layers in all.

    Args:
        model: of L layers.
        removed: m in the paper; L = 32 and m = 8 there.

    Raises:
        ValueError: removed is not 0 to L - 1.
    """
    layers = model.config.num_hidden_layers
    if not 0 <= removed < layers:
        raise ValueError(f"removed={removed}: wanted 0 to {layers - 1}, less than the {layers} layers there are")
    return _with_layers(model, [*range(layers - removed), *range(removed, layers)])


def _with_layers(model: MoEForCausalLM, order: Sequence[int]) -> MoEForCausalLM:
    """The model whose layer i is a copy of layer `order[i]`."""
    config = model.config
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.layers.")}
    for new, old in enumerate(order):
        tensors |= model.model.layers[old].state_dict(prefix=f"model.layers.{new}.")
    dense = tuple(new for new, old in enumerate(order) if not config.is_sparse(old)) if config.num_experts else ()
    return build_from(model, tensors, num_hidden_layers=len(order), mlp_only_layers=dense, decoder_sparse_step=1)


# --- vocabulary, precision --------------------------------------------------------------------------------


def extend_vocabulary(model: MoEForCausalLM, new_tokens: int, *, seed: int = 0) -> MoEForCausalLM:
    """Append rows to the embedding and to the output head, with the mean and spread of those there are.

    Each new number is drawn from a normal distribution with the mean and standard deviation of its column (Hewitt 2021,
    Initializing New Word Embeddings for Pretrained Language Models; without his covariances). The logits of the old
    tokens stay what they were, their probabilities do not. The tokenizer stays as well: the new ids have no text yet.

    Args:
        model: of V tokens.
        new_tokens: how many more.
        seed: of the draw.

    Raises:
        ValueError: new_tokens is below 1.
    """
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens}: wanted at least 1")
    generator = torch.Generator("cpu").manual_seed(seed)
    tensors = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name not in tensors:  # a tied head is the embedding
            continue
        old = wide(tensors[name])
        noise = torch.randn(new_tokens, old.shape[1], generator=generator, device="cpu").double()
        new = old.mean(0) + old.std(0) * noise
        tensors[name] = torch.cat([tensors[name], new.to(tensors[name])])
    return build_from(model, tensors, vocab_size=model.config.vocab_size + new_tokens)


def quantise(model: MoEForCausalLM, bits: int) -> MoEForCausalLM:
    """Round the matrices of all layers to integers of `bits` bits, one scale per row, and store what these stand for.

    Symmetric, round to nearest: with s = max |row| / (2^(bits - 1) - 1), each weight becomes the multiple of s next to
    it, at most s / 2 away (Dettmers et al. 2022, arXiv 2208.07339, section 2.1, row-wise). Embedding, output head,
    routers, norms and biases stay, as usual.

    Args:
        model: any.
        bits: 8 and 4 are usual.

    Raises:
        ValueError: bits is not 2 to 8.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits!r}: wanted a whole number from 2 to 8")
    tensors = model.state_dict()
    for name, weight in tensors.items():
        routes = ".mlp.gate." in name or ".shared_expert_gate." in name
        if name.startswith("model.layers.") and weight.dim() > 1 and not routes:
            rows = wide(weight)
            step = rows.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
            tensors[name] = ((rows / step.where(step > 0, 1)).round() * step).to(weight)
    return build_from(model, tensors)
