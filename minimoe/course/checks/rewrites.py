"""The checks of the exercises that rewrite weights: an MLP cut or damaged (notebook 07), a model disguised (09).

Much is free in a rewrite, so an answer is not compared with a solution: what counts is what the new weights compute.

Shapes: H hidden size, I width of an MLP, D head size; a group is a key-value head with the query heads that share it.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.course.checks.answers import WrongAnswer, judge, numbers
from minimoe.fingerprints.weight_cosine import weight_cosine
from minimoe.fingerprints.weights import open_weights
from minimoe.model import MoEConfig, MoEForCausalLM

Weights = tuple[Tensor, Tensor, Tensor]  # gate [I, H], up [I, H], down [H, I]
_NAMES = ("gate", "up", "down")
_TOLERANCE = 0.1  # of the spread and the mean of what is drawn, in standard deviations; the error of chance is a tenth
Gauge = Callable[[MoEForCausalLM, int], MoEForCausalLM]
MOVED = 1e-4  # of a logit: far above rounding, also where an answer computes in float32
_IDS = torch.arange(46).view(2, 23) * 7 % 23
HIDDEN = 0.9  # the weight cosine that a hiding gauge stays below


def check_slices(answer: Callable[[Tensor, Tensor, Tensor, int], Weights]) -> str:
    """Check `cut(gate, up, down, slices)`: an MLP as S experts, gate and up [S, I / S, H] and down [S, H, I / S]. It
    does not matter which neurons a slice holds: a token that meets all slices, each with weight 1 / S, must get what
    the MLP gives it."""

    def of_slices(*inputs: Tensor | int) -> Tensor:
        (width, hidden), slices = inputs[0].shape, inputs[-1]
        rows, columns = (slices, width // slices, hidden), (slices, hidden, width // slices)
        found = _returned(answer, *inputs, shapes=(rows, rows, columns))
        return torch.stack([_output(*parts) for parts in zip(*found, strict=True)]).mean(0)

    def reshaped(gate: Tensor, up: Tensor, down: Tensor, slices: int) -> Tensor:
        return _output(gate, up, torch.cat([*down.reshape(slices, len(down), -1)], dim=1))

    tries = [(*_random_mlp(width, hidden), slices) for width, hidden, slices in ((12, 5, 3), (8, 8, 2), (6, 4, 6))]
    mistakes = {
        "The slices add up to 1 / slices of the MLP. Every weight is 1 / slices: what it takes away must be put back, "
        "in one matrix.": lambda gate, up, down, slices: _output(gate, up, down / slices),
        "The gate is scaled too, and the SiLU is no straight line.": lambda g, u, d, s: _output(g * s, u, d),
        "Up and down are both scaled, which counts the factor twice.": lambda g, u, d, s: _output(g, u, d * s),
        "Down has the right shape and the wrong numbers: column n of down belongs to row n of gate and up. Cut its "
        "columns into parts (`chunk` along dim 1, or `unflatten` and `movedim`), do not reshape it.": reshaped,
    }
    praise = "Right: the slices together are the MLP."
    what = "what tokens get that meet all slices"
    return judge(of_slices, tries, lambda *inputs: _output(*inputs[:3]), mistakes, praise, what=what, rtol=1e-4)


def _output(gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """What an MLP gives to seven tokens, [7, H]."""
    x = torch.randn(7, gate.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gate, up, down = gate.double(), up.double(), down.double()
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def check_drop(answer: Callable[[Tensor, Tensor, Tensor, float, torch.Generator], Weights]) -> str:
    """Check `drop(gate, up, down, share, generator)`: a copy of an MLP in which round(share I) neurons are drawn anew,
    from a normal distribution with the mean and standard deviation that gate, up and down each have. The draw is the
    reader's: what must hold is which numbers stay, how many neurons are new and whether they are the same in all three,
    that another generator takes others, and how the new numbers are spread."""
    small, large = _random_mlp(40, 6), _random_mlp(400, 50)

    def drop(mlp: Weights, share: float, seed: int = 0) -> Weights:
        generator = torch.Generator().manual_seed(seed)
        return _returned(answer, *mlp, share, generator, shapes=[tensor.shape for tensor in mlp])

    def new_neurons(share: float, seed: int = 0) -> list[Tensor]:
        """Which neurons differ in gate, in up and in down: [I] each."""
        return [(new != old).any(dim) for new, old, dim in zip(drop(small, share, seed), small, (1, 1, 0), strict=True)]

    for share in (0.5, 0.25, 0.9, 0.0, 1.0):
        (gate, up, down), wanted = new_neurons(share), round(share * 40)
        if not (torch.equal(gate, up) and torch.equal(gate, down)):
            raise WrongAnswer(
                f"{gate.sum()} neurons are new in gate, {up.sum()} in up and {down.sum()} in down, and not the same "
                "ones. A neuron is a row of gate, a row of up and a column of down."
            )
        if gate.sum() != wanted:
            raise WrongAnswer(f"{gate.sum()} of 40 neurons are new at {share=}; wanted round(share * 40), {wanted}.")
    first, again, other = (new_neurons(0.25, seed)[0] for seed in (0, 0, 1))
    if not torch.equal(first, again):
        raise WrongAnswer("With the same generator, other neurons are new. Draw them from `generator`.")
    if torch.equal(first, other):
        raise WrongAnswer("Another generator takes the same neurons, so that no expert keeps what another lost.")
    gate, up, down = drop(large, 0.5)
    for name, new, old in zip(_NAMES, (gate, up, down.T), (large[0], large[1], large[2].T), strict=True):
        drawn = new[(new != old).any(1)]
        spread = min(drawn.std(0).mean(), drawn.std(1).mean()) / old.std()  # small where rows or columns are equal, too
        shift = (drawn.mean() - old.mean()) / old.std()
        if not abs(spread - 1) <= _TOLERANCE:
            raise WrongAnswer(
                f"The new numbers of {name} have {spread:.2f} times the standard deviation of the old ones. Draw one "
                "for every weight, and scale it; each of the three has a spread of its own."
            )
        if not abs(shift) <= _TOLERANCE:
            raise WrongAnswer(f"The mean of the new numbers of {name} is off by {shift:.1f} standard deviations.")
    return "Right: this share of the neurons is new, all of each, and the others are as they were."


def _random_mlp(width: int, hidden: int) -> Weights:
    """Gate, up and down, each with a mean and a spread of its own."""
    generator = torch.Generator().manual_seed(width)
    shapes = {0.5: (width, hidden), 1.0: (width, hidden), 2.0: (hidden, width)}
    return tuple(spread * (0.5 + torch.randn(shape, generator=generator)) for spread, shape in shapes.items())


def _returned(answer: Callable, *inputs: object, shapes: Sequence[tuple[int, ...]]) -> Weights:
    """The three tensors that the answer returns, in float64; a list of equal parts counts as a tensor."""
    given = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    found = answer(*given)
    for name, now, before in zip(_NAMES, given, inputs, strict=False):
        if not torch.equal(now, before):
            raise WrongAnswer(f"The {name} you were given changed. Work on a copy of it: `{name}.clone()`.")
    if not isinstance(found, tuple | list) or len(found) != 3:
        raise WrongAnswer("The function should return three things: gate, up and down.")
    found = tuple(numbers(part) for part in found)
    for name, tensor, shape in zip(_NAMES, found, shapes, strict=True):
        if tensor.shape != shape:
            raise WrongAnswer(
                f"{name} has shape {tuple(tensor.shape)}; wanted {tuple(shape)}. A neuron is a row of gate, a row of "
                "up and a column of down."
            )
    return found


@torch.no_grad()
def check_value_remix(answer: Gauge) -> str:
    """Check `remix_values(model, seed)`: a copy in which an invertible map went over the values of each key-value head,
    and the output projection undoes it. All other weights stay."""
    for model in _models():
        changed = _changed(_tried(answer, model), model)
        others = sorted(name for name in changed if "v_proj" not in name and "o_proj.weight" not in name)
        if others:
            raise WrongAnswer(f"{others[0]} changed. Only values and output projections are to be rewritten here.")
        if sum("v_proj.weight" in name for name in changed) < model.config.num_hidden_layers:
            raise WrongAnswer("The values of some layer are as they were. Every layer is to be remixed.")
        found = answer(deepcopy(model), 1)
        if model.config.num_key_value_heads > 1 and all(map(_is_one_map, model.model.layers, found.model.layers)):
            raise WrongAnswer("All key-value heads got one and the same map. Draw one for each.")
    return "Right: the values are remixed in every layer, with and without groups, and no logit moves."


def _is_one_map(old: torch.nn.Module, new: torch.nn.Module) -> bool:
    """Whether the values of all key-value heads went through one map: fitted on the first head, it serves them all."""
    rows = [block.self_attn.v_proj.weight.unflatten(0, (-1, block.self_attn.head_dim)) for block in (old, new)]
    one_map = rows[1][0] @ torch.linalg.pinv(rows[0][0])
    return torch.allclose(one_map @ rows[0], rows[1], atol=1e-6)


@torch.no_grad()
def check_gauge(answer: Gauge) -> str:
    """Check `gauge(model, seed)`: a copy of a dense model whose logits are the same, and whose weight cosine with the
    model is below 0.9. Which weights it rewrites is free; another seed gives another copy."""
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
    """Two dense models in float64: one with grouped queries, biases and a head of its own, one without any of them.
    Their weights are all far from what an initialisation would give."""
    sizes = {"num_experts": 0, "vocab_size": 23, "num_hidden_layers": 2, "head_dim": 6, "intermediate_size": 20}
    grouped = {"hidden_size": 32, "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": False}
    biases = {"attention_bias": True, "attention_output_bias": True}
    plain = {"hidden_size": 24, "num_attention_heads": 4}
    for seed, settings in enumerate((grouped | biases, plain)):
        model = MoEForCausalLM(MoEConfig(**sizes, **settings)).double().eval()
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in model.state_dict().items():
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.4, generator=generator)
        yield model


def _tried(answer: Gauge, model: MoEForCausalLM) -> MoEForCausalLM:
    """The rewritten model, once it is a copy, of the same function, and a matter of its seed."""
    copies = []
    for seed in (1, 1, 2):
        given = deepcopy(model)
        try:
            copies.append(answer(given, seed))
        except RuntimeError as error:
            if "dtype" not in str(error):
                raise
            raise WrongAnswer(
                f"The model is in {next(model.parameters()).dtype}, and what you multiply with it is not. Bring "
                "random matrices to the type of the weight: `torch.randn(...).to(weight)`."
            ) from error
        if not isinstance(copies[-1], MoEForCausalLM):
            raise WrongAnswer(f"The function returned {type(copies[-1]).__name__}; wanted the rewritten model.")
        if _changed(given, model):
            raise WrongAnswer("The model you were given changed. Work on a copy of it: `copy.deepcopy(model)`.")
    found, again, other = copies
    moved = float((found(_IDS).logits - model(_IDS).logits).abs().max())
    if not moved <= MOVED:
        raise WrongAnswer(f"A logit moves by {moved:.2g}. {_what_was_forgotten(model, found)}")
    if not _changed(found, model):
        raise WrongAnswer("The copy has the same weights: nothing was rewritten.")
    if _changed(found, again):
        raise WrongAnswer("The same seed gave two different copies. Draw from `torch.Generator().manual_seed(seed)`.")
    if not _changed(found, other):
        raise WrongAnswer("Two seeds gave the same copy. A rewrite that everybody can repeat hides little.")
    return found


def _what_was_forgotten(model: MoEForCausalLM, found: MoEForCausalLM) -> str:
    """A hint about the first part of the model that computes something else."""
    old = model.state_dict()
    new = {name: t for name, t in found.state_dict().items() if name in old and t.shape == old[name].shape}

    def same(*parts: str) -> bool:
        """Whether the logits are the same with some tensors of the rewritten model, told by how their names begin."""
        mixed = deepcopy(model)
        mixed.load_state_dict(old | {name: tensor for name, tensor in new.items() if name.startswith(parts)})
        return bool((mixed(_IDS).logits - model(_IDS).logits).abs().max() <= MOVED)

    if any("layernorm" in name or "layers" not in name for name in _changed(found, model)):
        return (
            "You changed the embedding or a norm. All that writes to the residual stream or reads from it changes "
            "along: embedding and head, q, k, v, gate and up by columns, o and down by rows, norm weights, o's bias."
        )
    for layer in (f"model.layers.{number}." for number in range(model.config.num_hidden_layers)):
        if not same(f"{layer}mlp"):
            return (
                "A neuron is a gate row, an up row and a down column. The three go together, into the same order. Only "
                "up and down can exchange a factor: silu(c x) is not c silu(x)."
            )
        attention = f"{layer}self_attn."
        if same(attention):
            continue
        if same(f"{attention}v", f"{attention}o"):
            return (
                "A query meets the key of its group: what multiplies the one divides the other, biases included. "
                "Rotary positions turn dimensions i and i + D / 2 together, so both take the same factor."
            )
        if same(f"{attention}q", f"{attention}k"):
            return (
                "Values: each group has one map of D x D, which goes over the rows of v and over its bias. The columns "
                "of o take its inverse, from the right, the same for all query heads of the group: neighbours."
            )
        break
    return "Heads: a group's rows of k and v, its heads' rows of q and their columns of o go together, biases included."


def _changed(a: MoEForCausalLM, b: MoEForCausalLM) -> set[str]:
    """The tensors of `a` that are not those of `b`."""
    theirs = b.state_dict()

    def same(name: str, tensor: Tensor) -> bool:
        return name in theirs and tensor.shape == theirs[name].shape and torch.allclose(tensor, theirs[name], 0, 1e-5)

    return {name for name, tensor in a.state_dict().items() if not same(name, tensor)}
