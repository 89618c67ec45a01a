"""The same tokens through different routers, drawn as grids of tokens and experts; and a playground for routers.

Shapes: T tokens, E experts, K experts per token. Tokens, experts and layers count from 0, as in the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from torch import Tensor

from minimoe.course.figures.register import Data, Drawing, figure, styled
from minimoe.course.figures.tokens import shipped_model, visible
from minimoe.course.style import INK, MAIN, PALE, QUIET, describe, new_figure, token_fonts
from minimoe.model import (
    RouterOutput,
    route_expert_choice,
    route_grouped,
    route_hash,
    route_switch,
    route_topk,
    route_topk_softmax,
)
from minimoe.model.balance import apply_capacity, expert_capacity, expert_load, max_violation, update_bias

# Two texts of 16 tokens that differ in the last word, chosen among many because each router's habit shows in them.
TEXT, EDITED = "if the bank is full, open the bank", "if the bank is full, open the letter"
TEXT_LAYER = 2  # of the shipped model
PLAYGROUND_ROUTERS = (
    "softmax top-k",
    "top-k, then softmax",
    "Switch",
    "expert choice",
    "sigmoid + bias",
    "MoGE",
    "hash",
)
_PLAYGROUND_TOKENS, _PLAYGROUND_EXPERTS, _PLAYGROUND_WORDS = 24, 16, 12

_SHADES = LinearSegmentedColormap.from_list("weight", [PALE, MAIN, "#16263A"])  # darker is more, in greyscale too
_DROPPED = {"marker": "x", "color": INK, "linestyle": "", "markersize": 5, "markeredgewidth": 1.6}
_NOBODY = {"facecolor": "none", "edgecolor": "#999999", "hatch": "////", "linewidth": 0, "zorder": 1.5}
Routes = Mapping[str, RouterOutput]


class Caught(NamedTuple):
    """What one router of the shipped model scored, for one text of T tokens."""

    tokens: list[str]  # T pieces of text
    input_ids: Tensor  # [T]
    logits: Tensor  # [T, E]


def catch_logits(text: str, layer: int = TEXT_LAYER) -> Caught:
    """Run the shipped model on `text` and return the logits of the router of `layer`."""
    model, tokenizer = shipped_model()
    ids = torch.tensor(tokenizer.encode(text).ids)
    with torch.no_grad():
        routers = model(ids[None], output_router_logits=True).router_outputs
    return Caught([tokenizer.decode([i]) for i in ids.tolist()], ids, routers[layer].logits)


@styled()
def draw_routes(tokens: Sequence[str], routes: Routes, asked: Routes | None = None) -> Drawing:
    """One grid a router: which token meets which expert, with what weight, what is dropped, and who meets nobody.

    Data: router, token, expert, weight, fate ("kept" or "dropped"): a row for every slot.

    Args:
        tokens: T pieces of text.
        routes: name -> what the router decided, [T, K]; E experts each.
        asked: name -> what that router had chosen before a capacity dropped some of it.
    """
    asked = asked or {}
    lines = -(-(len(routes) + 1) // 2)  # one more for the key
    experts = max(output.logits.shape[-1] for output in routes.values())
    drawn = new_figure(lines * (0.16 * experts + 0.36) + 1.35)
    grids = drawn.subplots(lines, 2, sharex=True, sharey=True).flatten()
    rows, findings = [], []
    for place, (axes, (name, output)) in enumerate(zip(grids, routes.items(), strict=False)):
        dropped = _met(asked.get(name, output)) & ~_met(output)
        _draw_grid(axes, _weights(output), _met(output), dropped)
        _hatch_nobody(axes, _met(output))
        axes.set_title(f"{place + 1}  {name}", size=11)
        rows += [(name, *slot) for slot in _slots(output, dropped)]
        findings.append(_finding(name, output, dropped))
    for axes in grids[0::2]:
        axes.set_ylabel("expert")
    _draw_key(grids[len(routes)])
    for axes in grids[len(routes) + 1 :]:
        axes.set_axis_off()
    for axes in grids[len(routes) - 2 : len(routes)]:  # the lowest of each column
        _label_tokens(axes, tokens)
    findings += [_evenness("column", routes, dim=1), _evenness("row", routes, dim=0)]
    describe(drawn, f"Grids of {len(tokens)} tokens by {experts} experts, one a router. " + " ".join(findings))
    return drawn, _table(rows, "router", "token", "expert", "weight", "fate")


def _weights(output: RouterOutput) -> Tensor:
    """[T, E]: the weight that each expert's output gets, 0 where token and expert do not meet."""
    tokens, experts = output.logits.shape
    return output.weights.new_zeros(tokens, experts + 1).scatter(1, output.indices, output.weights)[:, :experts]


def _met(output: RouterOutput) -> Tensor:
    """[T, E]: whether token and expert meet."""
    tokens, experts = output.logits.shape
    met = torch.zeros(tokens, experts + 1, dtype=torch.bool).scatter(1, output.indices, True)
    return met[:, :experts]


def _slots(output: RouterOutput, dropped: Tensor) -> list[tuple]:
    """Token, expert, weight and fate of every slot, in the order of the tokens."""
    weights = _weights(output)
    return [
        (token, expert, float(weights[token, expert]), "dropped" if dropped[token, expert] else "kept")
        for token, expert in (_met(output) | dropped).nonzero().tolist()
    ]


def _table(rows: list[tuple], *names: str) -> Data:
    return {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def _draw_grid(axes: Axes, weights: Tensor, met: Tensor, dropped: Tensor) -> None:
    tokens, experts = weights.shape
    shown = weights.where(met, torch.nan).T.numpy()
    axes.pcolormesh(shown, cmap=_SHADES, vmin=0, vmax=1, edgecolors="white", linewidth=0.8)
    token, expert = dropped.nonzero().T + 0.5
    axes.plot(token, expert, **_DROPPED)
    axes.set(xlim=(0, tokens), ylim=(experts, 0))
    axes.set_yticks([expert + 0.5 for expert in range(experts)], [str(expert) for expert in range(experts)], size=10)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(True)


def _hatch_nobody(axes: Axes, met: Tensor) -> None:
    for token in (~met.any(1)).nonzero().flatten().tolist():
        axes.add_patch(Rectangle((token, 0), 1, met.shape[1], **_NOBODY))


def _label_tokens(axes: Axes, tokens: Sequence[str]) -> None:
    axes.set_xticks(
        [place + 0.5 for place in range(len(tokens))],
        [visible(token) for token in tokens],
        rotation=90,
        family=token_fonts(),
        size=10,
    )
    axes.tick_params(labelbottom=True)


def _draw_key(axes: Axes) -> None:
    axes.set_axis_off()
    left, right = axes.get_xlim()
    _, bottom = sorted(axes.get_ylim())
    cell, line = (right - left) / 16, bottom / 8
    entries = [(f"weight {weight:.2f}".rstrip("0").rstrip("."), weight) for weight in (0.05, 0.5, 1.0)]
    for row, (label, weight) in enumerate(entries):
        axes.add_patch(
            Rectangle((2 * cell, (row + 1.5) * line), cell, line, facecolor=_SHADES(weight), edgecolor="white")
        )
        axes.text(3.6 * cell, (row + 2) * line, label, va="center", size=10)
    axes.plot([2.5 * cell], [5 * line], **_DROPPED)
    axes.text(3.6 * cell, 5 * line, "dropped: the expert was full", va="center", size=10)
    axes.add_patch(Rectangle((2 * cell, 5.5 * line), cell, line, **_NOBODY))
    axes.text(3.6 * cell, 6 * line, "the token meets no expert", va="center", size=10)


def _finding(name: str, output: RouterOutput, dropped: Tensor) -> str:
    per_token, load = _met(output).sum(1), _met(output).sum(0)
    least, most = int(per_token.min()), int(per_token.max())
    experts = f"{most}" if least == most else f"{least} to {most}"
    sentence = f"{name}: experts a token {experts}, tokens of the busiest expert {int(load.max())}"
    if dropped.any():
        sentence += f", slots dropped {int(dropped.sum())}"
    if least == 0:
        sentence += f", tokens with no expert {int((per_token == 0).sum())}"
    return sentence + "."


def _evenness(line: str, routes: Routes, dim: int) -> str:
    even = [name for name, output in routes.items() if len(_met(output).sum(dim).unique()) == 1]
    return f"As many cells in every {line}: {'; '.join(even) or 'none'}."


@figure()
def seven_routers() -> Drawing:
    """One short text through seven routers, all reading the logits of one layer of the shipped model."""
    tokens, input_ids, logits = catch_logits(TEXT)
    length, experts = logits.shape
    switch = route_switch(logits)
    routes = {
        "softmax top-k": route_topk(logits, 2),
        "top-k, then softmax": route_topk_softmax(logits, 2),
        "Switch": apply_capacity(switch, expert_capacity(length, experts, 1, 1.0)),
        "expert choice": route_expert_choice(logits, expert_capacity(length, experts, 2, 1.0)),
        "sigmoid + bias": _route_biased(logits, 2, _settled_bias(logits, 2, updates=1, rate=0.1)),
        "MoGE": route_grouped(logits, 2, 2),
        "hash": route_hash(input_ids, experts),
    }
    return draw_routes(tokens, routes, asked={"Switch": switch})


@styled()
def draw_changes(tokens: Sequence[str], before: Routes, after: Routes, edited: int) -> Drawing:
    """One grid a router: who met whom before and after the tokens from place `edited` on were replaced.

    Data: router, token, expert, before, after (weights, 0 where they do not meet).

    Args:
        tokens: T pieces of text, before.
        before: name -> what the router decided for them.
        after: the same for the edited text, which has as many tokens.
        edited: the first token that differs.
    """
    drawn = new_figure(-(-len(before) // 2) * 1.75 + 0.85)
    grids = drawn.subplots(-(-len(before) // 2), 2, sharex=True, sharey=True).flatten()
    rows, counts = [], []
    for axes, name in zip(grids, before, strict=False):
        old, new = _met(before[name]), _met(after[name])
        moved = int((old != new)[:edited].any(1).sum())
        counts.append(f"{name}: {moved}")
        _draw_changed_grid(axes, old, new, edited)
        axes.set_title(f"{name}: {moved} rerouted", size=11)
        weights = _weights(before[name]), _weights(after[name])
        for token, expert in (old | new).nonzero().tolist():
            rows.append((name, token, expert, *(float(weight[token, expert]) for weight in weights)))
    for axes in grids[0::2]:
        axes.set_ylabel("expert")
    for axes in grids[-2:]:
        _label_tokens(axes, [*tokens[:edited], *"?" * (len(tokens) - edited)])
    drawn.supxlabel("■ in both texts    − only before the edit    + only after it    hatched: no expert", size=10)
    describe(
        drawn,
        f"Grids of tokens by experts, before and after the last word was replaced. Of the {edited} "
        f"tokens before that word, so many meet other experts after the edit: {'; '.join(counts)}.",
    )
    return drawn, _table(rows, "router", "token", "expert", "before", "after")


def _draw_changed_grid(axes: Axes, old: Tensor, new: Tensor, edited: int) -> None:
    _draw_grid(axes, (old & new) * 0.4, old & new, torch.zeros_like(old))
    _hatch_nobody(axes, (old | new)[:edited])
    axes.add_patch(Rectangle((edited, 0), len(old) - edited, old.shape[1], facecolor="#EEEEEE", linewidth=0))
    for marker, changed in (("_", old & ~new), ("+", new & ~old)):
        token, expert = changed[:edited].nonzero().T + 0.5
        axes.plot(token, expert, marker=marker, color=INK, linestyle="", markersize=8, markeredgewidth=2)


@figure()
def leak_from_the_future() -> Drawing:
    """Replace the last word of a text: which routers change the route of a token before it?"""
    tokens, ids, logits = catch_logits(TEXT)
    _, other_ids, other_logits = catch_logits(EDITED)
    first_edited = int((ids != other_ids).nonzero()[0])
    return draw_changes(tokens, _with_limits(logits), _with_limits(other_logits), first_edited)


def _with_limits(logits: Tensor) -> dict[str, RouterOutput]:
    tokens, experts = logits.shape
    one, two = (expert_capacity(tokens, experts, k, 1.0) for k in (1, 2))
    return {
        "top-2": route_topk(logits, 2),
        "Switch with a capacity": apply_capacity(route_switch(logits), one),
        "top-2 with a capacity": apply_capacity(route_topk(logits, 2), two),
        "expert choice": route_expert_choice(logits, two),
    }


@figure()
def playground(
    router: str = "softmax top-k",
    experts: int = 8,
    k: int = 2,
    temperature: float = 1.0,
    capacity_factor: float = 1.25,
    groups: int = 2,
) -> Drawing:
    """Made-up logits of 24 tokens through a router of your choice.

    The logits are drawn once, with some experts more popular than others; another expert leaves those of the first as
    they are. Tokens share 12 words, which only the hash looks at. The bias is the one that 100 updates settle on.
    MaxVio is that of the load before anything is dropped.

    Data: token, expert, weight (0 when dropped), fate ("kept" or "dropped"): a row for every slot.

    Args:
        router: one of `PLAYGROUND_ROUTERS`.
        experts: E, 2 to 16.
        k: experts per token; for expert choice, on average.
        temperature: divides the logits.
        capacity_factor: an expert accepts this times its fair share of the slots; expert choice takes exactly that.
        groups: of experts, for MoGE.

    Raises:
        ValueError: the router cannot work with these settings.
    """
    _check_playground(router, experts, k, temperature, groups)
    logits, ids = _made_up(experts)
    capacity = expert_capacity(len(ids), experts, k, capacity_factor)
    asked = _route(router, logits / temperature, ids, k, capacity, groups)
    kept = asked if router == "expert choice" else apply_capacity(asked, capacity)
    dropped, load = _met(asked) & ~_met(kept), _met(asked).sum(0)

    drawn = new_figure(0.21 * experts + 1.7)
    grid, bars = drawn.subplots(1, 2, sharey=True, width_ratios=[3.6, 1])
    _draw_grid(grid, _weights(kept), _met(kept), dropped)
    _hatch_nobody(grid, _met(kept))
    grid.set(xlabel="token", ylabel="expert")
    grid.set_xticks([token + 0.5 for token in range(0, len(ids), 4)], [str(token) for token in range(0, len(ids), 4)])
    if router == "MoGE":
        for first in range(0, experts, experts // groups):
            grid.axhline(first, color=QUIET, linewidth=1)
    _draw_load(bars, _met(kept).sum(0), load, capacity)

    counts = ", ".join(
        (
            f"{int(dropped.sum())} of {int(load.sum())} slots dropped",
            f"{int((~_met(kept).any(1)).sum())} of {len(ids)} tokens without expert",
            f"MaxVio {max_violation(load):.2f}",
        )
    )
    drawn.suptitle(f"{router}\n{counts}", x=0.01, ha="left", size=11, weight="bold")
    drawn.supxlabel(f"■ darker: more weight    × dropped    hatched: no expert\n{_unused(router)}", size=10)
    settings = f"{experts} experts, k {k}, temperature {temperature:g}, capacity factor {capacity_factor:g}"
    settings += f", {groups} groups" if router == "MoGE" else ""
    describe(drawn, f"{len(ids)} tokens through the router {router} ({settings}): {counts}. {_unused(router)}.")
    return drawn, _table(_slots(kept, dropped), "token", "expert", "weight", "fate")


def _check_playground(router: str, experts: int, k: int, temperature: float, groups: int) -> None:
    if router not in PLAYGROUND_ROUTERS:
        raise ValueError(f"router={router!r}: wanted one of {', '.join(PLAYGROUND_ROUTERS)}")
    if not 2 <= experts <= _PLAYGROUND_EXPERTS:
        raise ValueError(f"experts={experts}: wanted 2 to {_PLAYGROUND_EXPERTS}")
    if not 1 <= k <= experts:
        raise ValueError(f"k={k}: wanted 1 to {experts}, the number of experts")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: wanted more than 0")
    if router == "Switch" and k != 1:
        raise ValueError(f"k={k}: Switch sends every token to one expert, wanted k=1")
    if groups < 1:
        raise ValueError(f"groups={groups}: wanted at least 1")
    if router == "MoGE" and (experts % groups or k % groups):
        raise ValueError(
            f"groups={groups}: MoGE takes equally many experts from groups of equal size, wanted a divisor of both "
            f"experts={experts} and k={k}"
        )


def _made_up(experts: int) -> tuple[Tensor, Tensor]:
    """Logits [T, E] and token ids [T], the same at every call."""
    generator = torch.Generator().manual_seed(6)  # one of those without near ties
    logits = torch.randn(_PLAYGROUND_EXPERTS, _PLAYGROUND_TOKENS, generator=generator)
    popularity = torch.randn(_PLAYGROUND_EXPERTS, 1, generator=generator)
    ids = torch.randint(_PLAYGROUND_WORDS, (_PLAYGROUND_TOKENS,), generator=generator)
    return (logits + popularity)[:experts].T, ids


def _route(router: str, logits: Tensor, ids: Tensor, k: int, capacity: int, groups: int) -> RouterOutput:
    if router == "softmax top-k":
        return route_topk(logits, k)
    if router == "top-k, then softmax":
        return route_topk_softmax(logits, k)
    if router == "Switch":
        return route_switch(logits)
    if router == "expert choice":
        return route_expert_choice(logits, capacity)
    if router == "sigmoid + bias":
        return _route_biased(logits, k, _settled_bias(logits, k))
    if router == "MoGE":
        return route_grouped(logits, k, groups)
    return route_hash(ids, logits.shape[-1], k)


def _route_biased(logits: Tensor, k: int, bias: Tensor) -> RouterOutput:
    """DeepSeek-V3's choice and weights, without its groups and its scaling factor."""
    return route_topk(logits, k, score_func="sigmoid", norm_topk_prob=True, bias=bias)


def _settled_bias(logits: Tensor, k: int, updates: int = 100, rate: float = 0.02) -> Tensor:
    bias = logits.new_zeros(logits.shape[-1])
    for _ in range(updates):
        update_bias(bias, expert_load(_route_biased(logits, k, bias).indices, len(bias)), rate)
    return bias


def _draw_load(axes: Axes, kept: Tensor, asked: Tensor, capacity: int) -> None:
    """Bars of the tokens that an expert has, within those that wanted it."""
    rows = [expert + 0.5 for expert in range(len(kept))]
    axes.barh(rows, asked.tolist(), 0.7, facecolor="white", edgecolor=QUIET, linestyle=":")
    axes.barh(rows, kept.tolist(), 0.7, facecolor=MAIN)
    axes.axvline(capacity, color=INK, linestyle="--", linewidth=1)
    axes.set(xlabel="tokens", xlim=(0, 1.08 * max(capacity, int(asked.max()))))
    axes.set_title(f"load (limit {capacity})", size=10, weight="normal")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _unused(router: str) -> str:
    if router == "MoGE":
        return "MoGE looks at all controls"
    return f"{router} does not look at the {'temperature or the groups' if router == 'hash' else 'groups'}"
