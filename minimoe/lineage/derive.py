"""Models made from other models without training: merged, pruned, deepened, extended, quantised.

Each returns a new model in evaluation mode, with the tokenizer of the old, and leaves its inputs as they are. Sums are
done in float64 and stored in the dtype of the (first) input. A `Derivation` keeps where a model came from. What merges
models raises a ValueError where there is none, or where their configurations differ, and names the field.

Shapes: H hidden size, D head size, I width of an MLP or of an expert, E experts, L layers.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from minimoe.model.attention import Attention
from minimoe.model.config import MoEConfig, require
from minimoe.model.experts import swiglu
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


def build_from(origin: MoEForCausalLM, tensors: Mapping[str, Tensor], **changes: Any) -> MoEForCausalLM:
    """What became of `origin`: a model of these tensors, of its tokenizer, and of its configuration after `changes`."""
    model = build(replace(origin.config, **changes), tensors)
    model.tokenizer_json = origin.tokenizer_json
    return model


def parts(model: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    """The modules of these kinds in a model, layer by layer."""
    return [module for module in model.modules() if isinstance(module, kinds)]


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float64 on the CPU: some devices have no float64."""
    return tensor.detach().to("cpu", torch.float64)


# --- merging ----------------------------------------------------------------------------------------------

# What models to be merged need not have in common: it changes no output.
_FREE = {"max_position_embeddings", "initializer_range", "experts_implementation", "model_type"}
_FREE |= {"router_aux_loss_coef", "seq_aux", "router_z_loss_coef"}


def average(models: Sequence[MoEForCausalLM]) -> MoEForCausalLM:
    """The mean of every weight: a uniform model soup (Wortsman et al. 2022, arXiv 2203.05482, section 2)."""
    return _merge(models, lambda *weights: torch.stack(weights).mean(0))


def lerp(a: MoEForCausalLM, b: MoEForCausalLM, t: float) -> MoEForCausalLM:
    """(1 - t) a + t b, weight by weight: `a` at t = 0, `b` at t = 1."""
    return _merge([a, b], lambda x, y: torch.lerp(x, y, t))


def slerp(a: MoEForCausalLM, b: MoEForCausalLM, t: float) -> MoEForCausalLM:
    """Turn every matrix of `a`, taken as one vector, towards that of `b` (Shoemake 1985, SIGGRAPH).

    With w the angle between them: sin((1 - t) w) / sin(w) * a + sin(t w) / sin(w) * b. Where two vectors are equally
    long, all between them are too, which a straight line cuts short. Where sin(w) = 0 or one of them is 0, it is the
    straight line. Every expert's matrix turns on its own.
    """

    def norm(tensor: Tensor) -> Tensor:
        return torch.linalg.vector_norm(tensor, dim=(-2, -1) if tensor.dim() > 1 else -1, keepdim=True)

    def turn(x: Tensor, y: Tensor) -> Tensor:
        both = (norm(x) > 0) & (norm(y) > 0)
        u, v = x / norm(x).where(both, 1), y / norm(y).where(both, 1)
        angle = 2 * torch.atan2(norm(u - v), norm(u + v))  # near 0, more precise than the arc cosine
        curved = both & (angle.sin() > 1e-9)
        angle = angle.where(curved, 1)  # any angle whose sine is not 0
        turned = (((1 - t) * angle).sin() * x + (t * angle).sin() * y) / angle.sin()
        return turned.where(curved, torch.lerp(x, y, t))

    return _merge([a, b], turn)


def ties(
    base: MoEForCausalLM, models: Sequence[MoEForCausalLM], *, density: float = 0.2, weight: float = 1.0
) -> MoEForCausalLM:
    """Add to `base` what its descendants agree on (TIES: Yadav et al. 2023, arXiv 2306.01708, algorithm 1).

    A task vector is a descendant minus the base. Trim: each keeps its largest numbers. Elect: every weight gets the
    sign of the sum over the trimmed vectors. Merge: it moves by the mean of those numbers that have this sign.

    Args:
        density: share of a task vector that is kept, over all weights at once; 1 trims nothing.
        weight: what the merged task vector is multiplied by (lambda).

    Raises ValueError: density is outside (0, 1].
    """
    require(0 < density <= 1, "density", density, "above 0 and at most 1")
    _require_alike(models, base)
    family = [base, *models]
    vectors = torch.stack([parameters_to_vector(map(wide, model.state_dict().values())) for model in family])
    tasks = vectors[1:] - vectors[0]
    largest = tasks.abs().topk(round(density * tasks.shape[1])).indices
    trimmed = torch.zeros_like(tasks).scatter(1, largest, tasks.gather(1, largest))
    agreeing = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    merged = vectors[0] + weight * (trimmed * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
    pieces = iter(merged.split([tensor.numel() for tensor in base.state_dict().values()]))
    return _merge(family, lambda old, *_: next(pieces).view_as(old))


def _merge(models: Sequence[MoEForCausalLM], rule: Callable[..., Tensor]) -> MoEForCausalLM:
    """Apply `rule` to the tensors that have one name, in their order.

    Where the models have different tokenizers, an id stands for no text: the result has none.
    """
    _require_alike(models)
    states = [model.state_dict() for model in models]
    merged = {name: rule(*(wide(state[name]) for state in states)).to(tensor) for name, tensor in states[0].items()}
    model = build_from(models[0], merged)
    if len({each.tokenizer_json for each in models}) > 1:
        model.tokenizer_json = None
    return model


def _require_alike(models: Sequence[MoEForCausalLM], base: MoEForCausalLM | None = None) -> None:
    """Refuse no models, and models that differ from `base`, or from the first of them, in what changes outputs."""
    require(len(models) > 0, "models", [], "at least one")
    wanted = asdict((models[0] if base is None else base).config)
    for model in models:
        for name, found in asdict(model.config).items():
            alike = name in _FREE or found == wanted[name]
            require(alike, name, found, f"{wanted[name]!r}, as in the model it is merged with")


@torch.no_grad()
def graft_mlps(model: MoEForCausalLM, donor: MoEForCausalLM) -> MoEForCausalLM:
    """Put all MLPs of `donor` in the place of those of `model`, as they are: each layer's, mixtures with their routers.

    Between residual streams that have nothing in common they say nothing of use; training makes the two one model.
    Raises ValueError: configurations differ.
    """
    _require_alike([model, donor])
    taken = {name: tensor for name, tensor in donor.state_dict().items() if ".mlp." in name}
    return build_from(model, model.state_dict() | taken)


# --- width ------------------------------------------------------------------------------------------------


def prune_neurons(model: MoEForCausalLM, keep: float) -> MoEForCausalLM:
    """Keep the strongest neurons of every MLP, expert and shared expert, in their order.

    A neuron is as strong as the product of the norms of its gate row, up row and down column: where one of them is 0,
    it adds nothing. No data are needed.

    Args:
        keep: share of the width that stays, of each kind of MLP; rounded, at least one neuron.

    Raises ValueError: keep is outside (0, 1].
    """
    require(0 < keep <= 1, "keep", keep, "above 0 and at most 1")

    def shorter(width: int) -> int:
        return max(1, round(keep * width)) if width else 0

    pruned = deepcopy(model)
    for mlp in parts(pruned, MLP, Experts):
        strength = torch.linalg.vector_norm(wide(neurons(mlp)), dim=-1).prod(-1)
        take_neurons(mlp, strength.topk(shorter(strength.shape[-1]), dim=-1).indices.sort(dim=-1).values)
    names = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    widths = {name: shorter(getattr(model.config, name)) for name in names}
    return build_from(model, pruned.state_dict(), **widths)


def neurons(mlp: MLP | Experts) -> Tensor:
    """An MLP as what it is a sum of: per neuron a gate row, an up row and a down column, [I, 3, H].

    A copy; of experts, [E, I, 3, H].
    """
    gate, up, down = _projections(mlp)
    return torch.stack([gate, up, down.mT], dim=-2).detach()


def set_neurons(mlp: MLP | Experts, rows: Tensor) -> None:
    """Write what `neurons` reads, of any width, into `mlp`."""
    gate, up, down = _projections(mlp)
    gate.data, up.data, down.data = (row.contiguous() for row in (rows[..., 0, :], rows[..., 1, :], rows[..., 2, :].mT))


def take_neurons(mlp: MLP | Experts, order: Tensor) -> None:
    """Keep these neurons of an MLP, [n], or of each of its experts, [E, n], in this order, in place."""
    rows = neurons(mlp)
    set_neurons(mlp, rows.take_along_dim(order[..., None, None].to(rows.device), dim=-3))


def _projections(mlp: MLP | Experts) -> list[Tensor]:
    projections = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if isinstance(mlp, MLP):
        return [projection.weight for projection in projections]
    require(not mlp.biases, "moe_bias", True, "False, experts whose neurons are three vectors each")
    require(mlp.act is swiglu, "swiglu_limit", mlp.act, "None, experts whose neurons are silu(gate) * up")
    return projections


def prune_heads(model: MoEForCausalLM, num_key_value_heads: int) -> MoEForCausalLM:
    """Keep the strongest key-value heads of every layer, each with the queries that share it, in their order.

    A group is as strong as the product of the norms of its value rows and of its output columns: without either
    it adds nothing. The size of a head stays.
    Raises ValueError: there are not that many.
    """
    config, found = model.config, model.config.num_key_value_heads
    require_heads("prune_heads", config)
    fits = 1 <= num_key_value_heads <= found
    require(fits, "num_key_value_heads", num_key_value_heads, f"1 to {found}, those of the model")
    queries_each = config.num_attention_heads // found
    pruned = deepcopy(model)
    for attention in parts(pruned, Attention):
        values = wide(attention.v_proj.weight).unflatten(0, (found, -1))
        outputs = wide(attention.o_proj.weight).unflatten(1, (found, -1))
        strength = values.norm(dim=(1, 2)) * outputs.norm(dim=(0, 2))
        strongest = strength.topk(num_key_value_heads).indices.sort().values
        queries = strongest[:, None] * queries_each + torch.arange(queries_each, device="cpu")
        take_heads(attention, queries.flatten(), queries_each)
    heads = queries_each * num_key_value_heads
    return build_from(model, pruned.state_dict(), num_attention_heads=heads, num_key_value_heads=num_key_value_heads)


def require_heads(caller: str, *configs: MoEConfig) -> None:
    """Raise a ValueError for multi-head latent attention, whose heads share what their keys and values are made of."""
    for config in configs:
        rank = config.kv_lora_rank
        require(rank is None, "kv_lora_rank", rank, f"None for {caller}, heads that have keys and values of their own")


def take_heads(attention: Attention, queries: Tensor, queries_each: int) -> None:
    """Keep these query heads, [n], and the key-value heads that they share, in this order, in place.

    The `queries_each` queries of a key-value head stand next to each other.
    """
    keys, size = queries[::queries_each] // queries_each, attention.head_dim
    for name, parameter in attention.named_parameters():
        whole = name.endswith("_norm.weight") and attention.qk_norm == "head"  # one norm that all heads share
        if name == "o_proj.weight":
            parameter.data = parameter.data.unflatten(1, (-1, size))[:, queries].flatten(1, 2)
        elif name == "sinks":
            parameter.data = parameter.data[queries]
        elif not whole and name != "o_proj.bias":
            kept = queries if name.startswith("q_") else keys
            parameter.data = parameter.data.unflatten(0, (-1, size))[kept].flatten(0, 1)


def prune_layers(model: MoEForCausalLM, layers: Collection[int]) -> MoEForCausalLM:
    """Remove whole `layers`, counted from 0; those around them join (Gromov et al. 2024, arXiv 2403.17887).

    Raises ValueError: a layer is not there, or none would be left.
    """
    present = range(model.config.num_hidden_layers)
    require(set(layers) < set(present), "layers", sorted(layers), f"some, but not all, of 0 to {len(present) - 1}")
    return _with_layers(model, [layer for layer in present if layer not in layers])


def depth_upscale(model: MoEForCausalLM, removed: int) -> MoEForCausalLM:
    """Two copies of all layers on top of each other, less the seam (SOLAR: Kim et al. 2023, arXiv 2312.15166, fig. 1).

    The lower copy loses its last `removed` layers, the upper one its first: 2 (L - removed) layers in all. In the paper
    L = 32, and `removed` is m = 8.
    Raises ValueError: removed is not 0 to L - 1.
    """
    layers = model.config.num_hidden_layers
    require(0 <= removed < layers, "removed", removed, f"0 to {layers - 1}, less than the {layers} layers there are")
    return _with_layers(model, [*range(layers - removed), *range(removed, layers)])


def _with_layers(model: MoEForCausalLM, order: Sequence[int]) -> MoEForCausalLM:
    """The model whose layer i is a copy of layer `order[i]`."""
    config = model.config
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("model.layers.")}
    for new, old in enumerate(order):
        tensors |= model.model.layers[old].state_dict(prefix=f"model.layers.{new}.")
    kinds = config.layer_types and tuple(config.layer_types[old] for old in order)
    dense = tuple(new for new, old in enumerate(order) if not config.is_sparse(old)) if config.num_experts else ()
    changes = {"num_hidden_layers": len(order), "mlp_only_layers": dense, "layer_types": kinds}
    return build_from(model, tensors, **changes, decoder_sparse_step=1)


def extend_vocabulary(model: MoEForCausalLM, new_tokens: int, *, seed: int = 0) -> MoEForCausalLM:
    """Append `new_tokens` rows to the embedding and to the output head, with the mean and spread of those there are.

    Each new number is drawn from a normal distribution with the mean and standard deviation of its column (Hewitt 2021,
    Initializing New Word Embeddings for Pretrained Language Models; without his covariances). The logits of the old
    tokens stay what they were, their probabilities do not. The tokenizer stays as well: the new ids have no text yet.
    Raises ValueError: new_tokens is below 1.
    """
    require(new_tokens >= 1, "new_tokens", new_tokens, "at least 1")
    generator = torch.Generator("cpu").manual_seed(seed)
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):  # the second only where it is not tied to the first
            old = wide(tensor)
            noise = torch.randn(new_tokens, old.shape[1], generator=generator, device="cpu").double()
            tensors[name] = torch.cat([tensor, (old.mean(0) + old.std(0) * noise).to(tensor)])
    return build_from(model, tensors, vocab_size=model.config.vocab_size + new_tokens)


def quantise(model: MoEForCausalLM, bits: int, *, experts_only: bool = False) -> MoEForCausalLM:
    """Round the matrices of all layers to integers of `bits` bits, one scale per row, and store what these stand for.

    Symmetric, round to nearest: with s = max |row| / (2^(bits - 1) - 1), each weight becomes the multiple of s next to
    it, at most s / 2 away (Dettmers et al. 2022, arXiv 2208.07339, section 2.1, row-wise). Embedding, output head,
    routers, norms and biases stay, as usual. 8 and 4 bits are usual. With `experts_only`, so does all but the routed
    experts, where most weights of a mixture lie.
    Raises ValueError: bits is not 2 to 8.
    """
    require(bits in range(2, 9), "bits", bits, "a whole number from 2 to 8")
    tensors = model.state_dict()
    for name, weight in tensors.items():
        routes = ".mlp.gate." in name or ".shared_expert_gate." in name
        kept = ".mlp.experts." not in name or name.endswith("_bias") if experts_only else routes
        if name.startswith("model.layers.") and weight.dim() > 1 and not kept:
            rows = wide(weight)
            step = rows.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
            tensors[name] = ((rows / step.where(step > 0, 1)).round() * step).to(weight)
    return build_from(model, tensors)
