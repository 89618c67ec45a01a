"""The checks of the exercise on hiding (notebook 09): rewrites of a model that no output shows.

A gauge is free in what it rewrites, so an answer is not compared with a solution. It is tried on two small dense models
in float64: one with grouped queries, biases and a head of its own, one without any of them. Where an output moved, the
part of the model that computes something else is looked for, and what was forgotten in it.

Shapes: H hidden size, D head size, I width of an MLP, V vocabulary; a group is a key-value head with its queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from minimoe.course.checks.answers import WrongAnswer
from minimoe.fingerprints.weight_cosine import weight_cosine
from minimoe.fingerprints.weights import open_weights
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.model.attention import Attention, rope_frequencies
from minimoe.model.layers import MLP

Gauge = Callable[[MoEForCausalLM, int], MoEForCausalLM]

MOVED = 1e-4  # of a logit: far above rounding, also where an answer computes in float32
HIDDEN = 0.9  # the weight cosine that a hiding gauge stays below
_SIZES = {"num_experts": 0, "vocab_size": 23, "num_hidden_layers": 2, "head_dim": 6, "intermediate_size": 20}
_GROUPED = {"hidden_size": 32, "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": False}
_BIASES = {"attention_bias": True, "attention_output_bias": True}
_PLAIN = {"hidden_size": 24, "num_attention_heads": 4}


@torch.no_grad()
def check_value_remix(answer: Gauge) -> str:
    """Check `remix_values(model, seed)`: a copy in which an invertible map went over the values of each key-value head,
    and the output projection undoes it. All other weights stay.

    Raises:
        WrongAnswer: with a hint.
    """
    for model in _models():
        changed = _changed(_tried(answer, model), model)
        others = sorted(name for name in changed if "v_proj" not in name and "o_proj.weight" not in name)
        if others:
            raise WrongAnswer(f"{others[0]} changed. Only values and output projections are to be rewritten here.")
        for layer in range(model.config.num_hidden_layers):
            if f"model.layers.{layer}.self_attn.v_proj.weight" not in changed:
                raise WrongAnswer(f"The values of layer {layer} are as they were. Every layer is to be remixed.")
    return "Right: the values are remixed in every layer, with and without groups, and no logit moves."


@torch.no_grad()
def check_gauge(answer: Gauge) -> str:
    """Check `gauge(model, seed)`: a copy of a dense model whose logits are the same, and whose weight cosine with the
    model is below 0.9. Which weights it rewrites is free; another seed gives another copy.

    Raises:
        WrongAnswer: with a hint.
    """
    cosines = []
    for model in _models():
        found = _tried(answer, model)
        cosines.append(weight_cosine(open_weights(model), open_weights(found)).score)
        if cosines[-1] >= HIDDEN:
            raise WrongAnswer(
                f"No logit moves, but the weight cosine is still {cosines[-1]:.2f}: wanted below {HIDDEN}. A factor "
                "turns a matrix only a little. Orders and rotations turn it far, and gauges may be combined."
            )
    return f"Right: no logit moves, and the weight cosine with the original falls to {max(cosines):.2f}."


def _models() -> Iterator[MoEForCausalLM]:
    """Two models in float64 whose weights are all far from what an initialisation would give."""
    for seed, settings in enumerate(({**_GROUPED, **_BIASES}, _PLAIN)):
        model = MoEForCausalLM(MoEConfig(**_SIZES, **settings)).double().eval()
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in model.state_dict().items():
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.4, generator=generator)
        yield model


def _tried(answer: Gauge, model: MoEForCausalLM) -> MoEForCausalLM:
    """The rewritten model, once it is a copy, of the same function, and a matter of its seed."""
    found, again, other = (_copy_by(answer, model, seed) for seed in (1, 1, 2))
    ids = torch.arange(46).view(2, 23) * 7 % 23
    wanted, logits = model(ids).logits, found(ids).logits
    if not logits.isfinite().all():
        raise WrongAnswer("Some logits are not finite. Was something divided by 0, or a map not invertible?")
    moved = float((logits - wanted).abs().max())
    if moved > MOVED:
        raise WrongAnswer(f"A logit moves by {moved:.2g}. {_hint(model, found)}")
    if not _changed(found, model):
        raise WrongAnswer("The copy has the same weights: nothing was rewritten.")
    if _changed(found, again):
        raise WrongAnswer(
            "The same seed gave two different copies. Draw from `torch.Generator().manual_seed(seed)`, not from the "
            "global stream."
        )
    if not _changed(found, other):
        raise WrongAnswer(
            "Two seeds gave the same copy. A rewrite that everybody can repeat hides little: use the seed."
        )
    return found


def _copy_by(answer: Gauge, model: MoEForCausalLM, seed: int) -> MoEForCausalLM:
    given = deepcopy(model)
    found = answer(given, seed)
    if found is None:
        raise WrongAnswer("The function returned nothing. Does it end with `return ...`?")
    if not isinstance(found, MoEForCausalLM):
        raise WrongAnswer(f"The function returned {type(found).__name__}; wanted the rewritten model.")
    if _changed(given, model):
        raise WrongAnswer("The model you were given changed. Work on a copy of it: `copy.deepcopy(model)`.")
    return found


# --- what went wrong --------------------------------------------------------------------------------------


def _hint(model: MoEForCausalLM, found: MoEForCausalLM) -> str:
    """What was forgotten, in the first part of the model that computes something else."""
    changed = _changed(found, model)
    if any("layernorm" in name or "layers" not in name for name in changed):
        return (
            "You changed the embedding or a norm. All that writes to the residual stream or reads from it changes "
            "along: embedding and head, q, k, v, gate and up by columns, o and down by rows, norm weights, o's bias."
        )
    for old, new in zip(model.model.layers, found.model.layers, strict=True):
        if not _same_function(old.mlp, new.mlp, model.config.hidden_size):
            return _about_neurons(old.mlp, new.mlp)
        if not _same_attention(old.self_attn, new.self_attn, model.config):
            return _about_attention(old.self_attn, new.self_attn, model.config)
    return "Every layer by itself computes what it did: look at the embedding, the head and the last norm."


def _about_neurons(old: MLP, new: MLP) -> str:
    gate, up, down = (_differs(_weight(old, role), _weight(new, role)) for role in ("gate", "up", "down"))
    if (gate or up) and not down:
        return (
            "The rows of gate or up changed, the columns of down did not. Neuron i writes through column i of down: it "
            "goes into the same order, and is divided by what the up row is multiplied by."
        )
    sizes = [_weight(mlp, "gate").norm(dim=1).sort().values for mlp in (old, new)]
    if _differs(*sizes):
        return "A factor went into the gate. silu(c x) is not c silu(x): only up and down can exchange a factor."
    return "A neuron is a gate row, an up row and a down column. The three go together, into the same order."


def _about_attention(old: Attention, new: Attention, config: MoEConfig) -> str:
    wrong = [roles for roles in ("qk", "vo") if not _same_attention(old, _with(old, new, roles), config)]
    if wrong == ["qk"]:
        return _about_queries(old, new)
    if wrong == ["vo"]:
        return _about_values(old, new, config.num_attention_heads, config.num_key_value_heads)
    return (
        "Heads: a group's rows of k and v, the rows of q of the heads that share it, and their columns of o go "
        "together, and their biases too."
    )


def _about_queries(old: Attention, new: Attention) -> str:
    if _bias_was_left(old, new, "q") or _bias_was_left(old, new, "k"):
        return "The weights of q or k changed, their biases did not. A bias is part of them: it takes the same map."
    return (
        "A query meets the key of its group: what multiplies the one divides the other. Rotary positions turn "
        "dimensions i and i + D / 2 together, so both take the same factor."
    )


def _about_values(old: Attention, new: Attention, heads: int, groups: int) -> str:
    size = old.head_dim
    values, remixed = (_weight(attention, "v") for attention in (old, new))  # [groups * D, H]
    mixing = remixed @ torch.linalg.pinv(values)  # [groups * D, groups * D]
    if _differs(mixing @ values, remixed):
        return "The rows of v are to be remixed, those of each head among themselves: map @ rows, from the left."
    blocks = mixing.view(groups, size, groups, size).transpose(1, 2)
    maps = blocks.diagonal().permute(2, 0, 1)  # [groups, D, D]
    if _differs(mixing, torch.block_diag(*maps)):
        return (
            "The values of one key-value head went into another. Each query head reads the values of its own group "
            "alone: one map for each group, of D x D."
        )
    if _bias_was_left(old, new, "v"):
        return "The weights of v changed, their bias did not. It is part of the value: it takes the same map."
    columns, after = (_weight(attention, "o").unflatten(1, (heads, size)) for attention in (old, new))  # [H, heads, D]
    own = torch.arange(heads) // (heads // groups)
    for hint, group, by in (
        ("The output projection is as it was: nothing undoes the map.", own, torch.eye(size).double().expand_as(maps)),
        (
            "The columns of o got the map of another group: query head i reads group i // (heads / groups), so each "
            "map is repeated for neighbours (`repeat_interleave`).",
            torch.arange(heads) % groups,
            maps.inverse(),
        ),
        ("The columns of o got the map once more. They take its inverse.", own, maps),
        ("The columns of o got the inverse transposed: o @ inverse, from the right.", own, maps.inverse().mT),
        ("The columns of o got the map transposed: o @ inverse, from the right.", own, maps.mT),
    ):
        if not _differs(after, torch.einsum("hnd,nde->hne", columns, by[group])):
            return hint
    return "Values: what o's columns of a head take from the right is the inverse of the map of its group."


def _bias_was_left(old: Attention, new: Attention, role: str) -> bool:
    bias, after = (getattr(attention, f"{role}_proj").bias for attention in (old, new))
    return bias is not None and _differs(_weight(old, role), _weight(new, role)) and not _differs(bias, after)


def _with(old: Attention, new: Attention, roles: str) -> Attention:
    """`old` with some of the projections of `new`."""
    mixed = deepcopy(old)
    for role in roles:
        setattr(mixed, f"{role}_proj", getattr(new, f"{role}_proj"))
    return mixed


def _same_attention(old: Attention, new: Attention, config: MoEConfig) -> bool:
    angles = torch.arange(5)[:, None] * rope_frequencies(config).double()
    return _same_function(old, new, config.hidden_size, angles.cos(), angles.sin(), None)


def _same_function(old: nn.Module, new: nn.Module, hidden_size: int, *others: Tensor | None) -> bool:
    x = torch.randn(1, 5, hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = (module(x, *others) for module in (old, new))
    return not _differs(*(output[0] if isinstance(output, tuple) else output for output in outputs))


def _weight(module: nn.Module, role: str) -> Tensor:
    return getattr(module, f"{role}_proj").weight


def _changed(a: MoEForCausalLM, b: MoEForCausalLM) -> set[str]:
    """The tensors of `a` that are not those of `b`."""
    theirs = b.state_dict()
    return {name for name, tensor in a.state_dict().items() if name not in theirs or _differs(tensor, theirs[name])}


def _differs(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=1e-5)
