"""The checks of the exercise on making relatives (notebook 07)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.course.checks.answers import WrongAnswer
from minimoe.model.experts import eager_experts

MLP = tuple[Tensor, Tensor, Tensor]  # gate [I, H], up [I, H], down [H, I]
_NAMES = ("gate", "up", "down")
_TOLERANCE = 0.1  # of the spread and the mean of what is drawn, in standard deviations; the error of chance is a tenth


# --- slices -----------------------------------------------------------------------------------------------


def check_slices(answer: Callable[[Tensor, Tensor, Tensor, int], MLP]) -> str:
    """Check `cut(gate, up, down, slices)`: an MLP as S experts, gate and up [S, I / S, H] and down [S, H, I / S].

    It does not matter which neurons a slice holds: a token that meets all slices, each with weight 1 / S, must get what
    the MLP gives it.

    Raises:
        WrongAnswer: with a hint.
    """
    for width, hidden, slices in ((12, 5, 3), (8, 8, 2), (6, 4, 6)):
        mlp = _random_mlp(width, hidden, seed=width)
        x = torch.randn(7, hidden, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = _returned(answer, *mlp, slices)
        wanted_shapes = 2 * [(slices, width // slices, hidden)] + [(slices, hidden, width // slices)]
        for name, tensor, shape in zip(_NAMES, found, wanted_shapes, strict=True):
            if tuple(tensor.shape) != shape:
                raise WrongAnswer(
                    f"{name} has shape {tuple(tensor.shape)}; wanted {shape}. A slice is a part of the neurons: rows "
                    "of gate and up, columns of down."
                )
        _compare_outputs(_mixed(x, found), x, mlp, slices)
    return "Right: the slices together are the MLP."


def _compare_outputs(found: Tensor, x: Tensor, mlp: MLP, slices: int) -> None:
    gate, up, down = mlp = tuple(tensor.double() for tensor in mlp)
    if _equal(found, _run(x, *mlp)):
        return
    mistakes = {
        "The slices add up to 1 / slices of the MLP. Every weight is 1 / slices: what it takes away must be put back, "
        "in one matrix.": (gate, up, down / slices),
        "You divided by the number of slices, and the weights 1 / slices divide once more. Multiply.": (
            gate,
            up,
            down / slices**2,
        ),
        "The gate is scaled too. It goes through the SiLU, which is no straight line: scale down (or up) alone.": (
            gate * slices,
            up,
            down,
        ),
        "You scaled all three. Only one factor may change, and not the gate: scale down.": (
            gate * slices,
            up * slices,
            down,
        ),
        "Up and down are both scaled: their product counts the factor twice. Scale one of them.": (
            gate,
            up,
            down * slices,
        ),
    }
    for hint, wrong in mistakes.items():
        if _equal(found, _run(x, *wrong)):
            raise WrongAnswer(hint)
    if any(_equal(found * factor, _run(x, *wrong)) for wrong in _torn(mlp, slices) for factor in (1, slices)):
        raise WrongAnswer(
            "Down has the right shape and the wrong numbers: column n of down belongs to row n of gate and up. Cut its "
            "columns into parts (`chunk` along dim 1, or `unflatten` and `movedim`), do not reshape it."
        )
    gap = float((found - _run(x, *mlp)).abs().max())
    raise WrongAnswer(
        f"Not yet: a token that meets all slices gets something else than from the MLP, by up to {gap:.2g}. Are row n "
        "of gate, row n of up and column n of down in the same slice?"
    )


def _torn(mlp: MLP, slices: int) -> list[MLP]:
    """The MLPs that slices add up to if down is cut in another order than gate and up, scaled as it should be."""
    gate, up, down = mlp
    reshaped = torch.cat([*down.reshape(slices, len(down), -1)], dim=1)
    dealt = torch.cat([down[:, start::slices] for start in range(slices)], dim=1)
    undealt = torch.cat([gate[start::slices] for start in range(slices)])
    also_up = torch.cat([up[start::slices] for start in range(slices)])
    return [(gate, up, reshaped), (gate, up, dealt), (undealt, also_up, down)]


# --- dropped neurons --------------------------------------------------------------------------------------


def check_drop(answer: Callable[[Tensor, Tensor, Tensor, float, torch.Generator], MLP]) -> str:
    """Check `drop(gate, up, down, share, generator)`: a copy of an MLP in which round(share I) neurons are drawn anew,
    from a normal distribution with the mean and standard deviation that gate, up and down each have.

    The draw is the reader's: what must hold is which numbers stay, how many neurons are new and whether they are the
    same in all three, that another generator takes others, and how the new numbers are spread.

    Raises:
        WrongAnswer: with a hint.
    """
    width = 40
    for share in (0.5, 0.25, 0.9, 0.0, 1.0):
        mlp = _random_mlp(width, 6, seed=3)
        found = _dropped(answer, mlp, share, seed=0)
        _check_which(mlp, found, share)
    first, again, other = (_new(mlp, _dropped(answer, mlp, 0.25, seed))[0] for seed in (0, 0, 1))
    if not torch.equal(first, again):
        raise WrongAnswer("With the same generator, other neurons are new. Draw them from `generator`.")
    if torch.equal(first, other):
        raise WrongAnswer(
            "Another generator takes the same neurons. Then all experts are new in the same place, and no expert keeps "
            "what another lost: draw the neurons at random, from `generator`."
        )
    _check_spread(answer)
    return "Right: this share of the neurons is new, all of each, and the others are as they were."


def _check_which(mlp: MLP, found: MLP, share: float) -> None:
    """Whether whole neurons are new, and as many as wanted."""
    width = len(mlp[0])
    wanted = round(share * width)
    new_gate, new_up, new_down = news = _new(mlp, found)
    rows_of_down = (found[2] != mlp[2]).any(1)
    counts = [int(new.sum()) for new in news]
    if wanted and not any(counts):
        raise WrongAnswer("Nothing is new. Do the drawn numbers get into what you return?")
    for name, count in zip(_NAMES, counts, strict=True):
        if wanted and not count:
            raise WrongAnswer(f"{name} is as it was. A neuron is a row of gate, a row of up and a column of down.")
    if counts[0] and counts[2] == width != counts[0] and not rows_of_down.all():
        raise WrongAnswer("In down you replaced rows. A neuron writes with a column of down: down[:, n].")
    if not (torch.equal(new_gate, new_up) and torch.equal(new_gate, new_down)):
        raise WrongAnswer(
            "Gate, up and down have different neurons replaced, so that many more than the share are damaged. Draw the "
            "neurons once, and use them three times."
        )
    if counts[0] == width - wanted != wanted:
        raise WrongAnswer(f"{counts[0]} of {width} neurons are new for share={share}: that is the share to keep.")
    if counts[0] != wanted:
        raise WrongAnswer(
            f"{counts[0]} of {width} neurons are new for share={share}; wanted {wanted}, round(share * {width}). "
            "(A coin for each neuron gives that only on average.)"
        )


def _check_spread(answer: Callable) -> None:
    """Whether the new numbers have the mean and the spread of the old ones."""
    mlp = _random_mlp(400, 50, seed=4)
    found = _dropped(answer, mlp, 0.5, seed=5)
    for name, new, old, tensor in zip(_NAMES, _new(mlp, found), mlp, found, strict=True):
        drawn = tensor[:, new] if name == "down" else tensor[new]
        if not drawn.any():
            raise WrongAnswer(f"The new neurons of {name} are 0. That is pruning; draw them instead.")
        if min(drawn.std(0).mean(), drawn.std(1).mean()) < (1 - _TOLERANCE) * drawn.std():
            raise WrongAnswer(f"Many of the new numbers of {name} are equal. Draw one for every weight.")
        spread, shift = float(drawn.std() / old.std()), float((drawn.mean() - old.mean()) / old.std())
        if abs(spread - 1) > _TOLERANCE:
            raise WrongAnswer(
                f"The new numbers of {name} have {spread:.2f} times the standard deviation of the old ones. Scale what "
                "you draw; each of the three has a spread of its own."
            )
        if abs(shift) > _TOLERANCE:
            raise WrongAnswer(f"The mean of the new numbers of {name} is off by {shift:.1f} standard deviations.")


def _new(mlp: MLP, found: MLP) -> list[Tensor]:
    """Which neurons differ in gate, in up and in down: [I] each."""
    (gate, up, down), (new_gate, new_up, new_down) = mlp, found
    return [(new_gate != gate).any(1), (new_up != up).any(1), (new_down != down).any(0)]


def _dropped(answer: Callable, mlp: MLP, share: float, seed: int) -> MLP:
    found = _returned(answer, *mlp, share, torch.Generator().manual_seed(seed))
    for name, new, old in zip(_NAMES, found, mlp, strict=True):
        if new.shape != old.shape:
            raise WrongAnswer(f"{name} has shape {tuple(new.shape)}; wanted {tuple(old.shape)}, as it was.")
    return found


# --- both -------------------------------------------------------------------------------------------------


def _returned(answer: Callable, *inputs: object) -> MLP:
    """The three tensors that the answer returns, in float64; a list of equal parts counts as a tensor."""
    given = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    found = answer(*given)
    if found is None:
        raise WrongAnswer("The function returned nothing. Does it end with `return ...`?")
    for name, now, before in zip(_NAMES, given, inputs, strict=False):
        if not torch.equal(now, before):
            raise WrongAnswer(f"The {name} you were given changed. Work on a copy of it: `{name}.clone()`.")
    if not isinstance(found, tuple | list) or len(found) != 3:
        raise WrongAnswer("Return three things: gate, up and down.")
    try:
        parts = [torch.stack(tuple(part)) if isinstance(part, tuple | list) else part for part in found]
        return tuple(torch.as_tensor(part).detach().double() for part in parts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongAnswer("Gate, up and down: wanted a tensor each, or a list of tensors of one shape.") from error


def _random_mlp(width: int, hidden: int, seed: int) -> MLP:
    """Gate, up and down, each with a mean and a spread of its own."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (width, hidden), (width, hidden), (hidden, width)
    return tuple(
        spread * (0.5 + torch.randn(shape, generator=generator))
        for shape, spread in zip(shapes, (0.5, 1.0, 2.0), strict=True)
    )


def _run(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _mixed(x: Tensor, experts: MLP) -> Tensor:
    """What [T, H] get that meet all experts, each with the same weight."""
    count = len(experts[0])
    indices = torch.arange(count).expand(len(x), count)
    return eager_experts(x, indices, torch.full(indices.shape, 1 / count, dtype=x.dtype), *experts)


def _equal(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
