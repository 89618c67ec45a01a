"""The same tokens through different routers, drawn as grids of tokens and experts; and a playground for routers.

Shapes: T tokens, E experts, K experts per token. Tokens, experts and layers count from 0, as in the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from minimoe.course.figures.drawing import check_layer, new_pairs, new_panels, set_panel_title, set_title, span
from minimoe.course.figures.register import Drawing, columns, figure, styled
from minimoe.course.figures.tokens import visible
from minimoe.course.shipped import real_text_model, route_text
from minimoe.course.style import INK, MAIN, PALE, QUIET, describe, token_fonts
from minimoe.model import (
    MoEForCausalLM,
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

_SHADES = LinearSegmentedColormap.from_list("weight", [PALE, MAIN, "#16263A"])  # darker is more, in greyscale too
_DROPPED = {"marker": "x", "color": INK, "linestyle": "", "markersize": 5, "markeredgewidth": 1.6}
_NOBODY = {"facecolor": "none", "edgecolor": "#999999", "hatch": "////", "linewidth": 0, "zorder": 1.5}
Routes = Mapping[str, RouterOutput]


@figure(model=real_text_model)
def seven_routers(text: str = TEXT, layer: int = 2, *, model: MoEForCausalLM) -> Drawing:
    """One short text through seven routers, all reading the logits of one layer, as `draw_routes` shows them."""
    tokens, input_ids, logits = _logits_of(text, layer, model)
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


def _logits_of(text: str, layer: int, model: MoEForCausalLM) -> tuple[list[str], Tensor, Tensor]:
    """The tokens of a text, their ids [T], and the router logits of one layer [T, E]."""
    tokens, input_ids, routers = route_text(text, model)
    check_layer(layer, len(routers))
    return tokens, input_ids, routers[layer].logits


@styled()
def draw_routes(tokens: Sequence[str], routes: Routes, asked: Routes | None = None) -> Drawing:
    """One grid a router: which token meets which expert, with what weight, what is dropped, and who meets nobody.

    Data: router, token, expert, weight, fate ("kept" or "dropped"): a row for every slot.

    Args:
        tokens: T pieces of text.
        routes: name -> what the router decided, [T, K]; E experts each.
        asked: name -> what that router had chosen before a capacity dropped some of it.
    """
    chosen = {name: _weights((asked or {}).get(name, output)) for name, output in routes.items()}
    kept = {name: _weights(output) for name, output in routes.items()}
    experts = max(weights.shape[1] for weights in kept.values())
    drawn, (*grids, key) = new_pairs(len(routes) + 1, 0.16 * experts + 0.36, 1.35)
    findings = []
    for place, (axes, (name, weights)) in enumerate(zip(grids, kept.items(), strict=True)):
        met, nobody, dropped = _met(weights), _nobody(weights), _dropped(chosen[name], weights)
        _draw_grid(axes, weights, dropped, nobody)
        axes.set_title(f"{place + 1}  {name}", size=11)
        findings.append(
            f"{name}: experts a token {span(met.sum(1).numpy(), 0)}, tokens of the busiest expert {met.sum(0).max()}, "
            f"slots dropped {dropped.sum()}, tokens with no expert {nobody.sum()}."
        )
    for axes in grids[0::2]:
        axes.set_ylabel("expert")
    for axes in grids[-2:]:  # the lowest of each column
        _label_tokens(axes, tokens)
    _draw_key(key)
    for line, dim in (("column", 1), ("row", 0)):
        even = [name for name, weights in kept.items() if len(_met(weights).sum(dim).unique()) == 1]
        findings.append(f"As many cells in every {line}: {'; '.join(even) or 'none'}.")
    describe(drawn, f"Grids of {len(tokens)} tokens by {experts} experts, one a router. " + " ".join(findings))
    rows = [(name, *slot) for name in routes for slot in _slots(chosen[name], kept[name])]
    return drawn, columns(("router", "token", "expert", "weight", "fate"), rows)


def _weights(output: RouterOutput) -> Tensor:
    """[T, E]: the weight that each expert's output gets, NaN where token and expert do not meet."""
    tokens, experts = output.logits.shape
    nowhere = output.weights.new_full((tokens, experts + 1), torch.nan)  # one column more for the dropped slots
    return nowhere.scatter(1, output.indices, output.weights)[:, :experts]


def _met(weights: Tensor) -> Tensor:
    return ~weights.isnan()


def _dropped(chosen: Tensor, kept: Tensor) -> Tensor:
    """[T, E]: what a router chose and a capacity took away."""
    return _met(chosen) & ~_met(kept)


def _nobody(kept: Tensor) -> Tensor:
    """[T]: whether a token meets no expert."""
    return ~_met(kept).any(1)


def _slots(chosen: Tensor, kept: Tensor) -> list[tuple]:
    """Token, expert, weight and fate of every slot, in the order of the tokens."""
    slots = (_met(chosen) | _met(kept)).nonzero()
    weights, fates = kept[*slots.T].nan_to_num(0.0), _met(kept)[*slots.T]
    return [
        (*slot, weight, "kept" if stays else "dropped")
        for slot, weight, stays in zip(slots.tolist(), weights.tolist(), fates.tolist(), strict=True)
    ]


def _draw_grid(axes: Axes, weights: Tensor, dropped: Tensor, nobody: Tensor) -> None:
    """Shades for `weights` [T, E], crosses where `dropped` [T, E], and hatches for a token that meets `nobody` [T]."""
    tokens, experts = weights.shape
    axes.pcolormesh(weights.T.numpy(), cmap=_SHADES, vmin=0, vmax=1, edgecolors="white", linewidth=0.8)
    axes.plot(*(dropped.nonzero().T + 0.5), **_DROPPED)
    for token in nobody.nonzero().flatten().tolist():
        axes.add_patch(Rectangle((token, 0), 1, experts, **_NOBODY))
    axes.set(xlim=(0, tokens), ylim=(experts, 0))
    axes.set_yticks([expert + 0.5 for expert in range(experts)], range(experts), size=10)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(True)


def _label_tokens(axes: Axes, tokens: Sequence[str]) -> None:
    places = [place + 0.5 for place in range(len(tokens))]
    axes.set_xticks(places, map(visible, tokens), rotation=90, family=token_fonts(), size=10)
    axes.tick_params(labelbottom=True)


def _draw_key(axes: Axes) -> None:
    axes.set_axis_off()
    shades = [Patch(facecolor=_SHADES(weight), label=f"weight {weight:g}") for weight in (0.05, 0.5, 1.0)]
    dropped = Line2D([], [], **_DROPPED, label="dropped: the expert was full")
    nobody = Patch(**_NOBODY, label="the token meets no expert")
    axes.legend(handles=[*shades, dropped, nobody], loc="center", frameon=False, fontsize=10, handlelength=1)


@figure(model=real_text_model)
def leak_from_the_future(text: str = TEXT, edited: str = EDITED, layer: int = 2, *, model: MoEForCausalLM) -> Drawing:
    """Replace the last word of a text, by as many tokens: which routers change the route of a token before it?"""
    tokens, ids, logits = _logits_of(text, layer, model)
    _, other_ids, other_logits = _logits_of(edited, layer, model)
    first_edited = int((ids != other_ids).nonzero()[0])
    return draw_changes(tokens, _limited_routes(logits), _limited_routes(other_logits), first_edited)


def _limited_routes(logits: Tensor) -> dict[str, RouterOutput]:
    """Four routers, of which three let an expert accept no more than its fair share."""
    one, two = (expert_capacity(*logits.shape, k, 1.0) for k in (1, 2))
    return {
        "top-2": route_topk(logits, 2),
        "Switch with a capacity": apply_capacity(route_switch(logits), one),
        "top-2 with a capacity": apply_capacity(route_topk(logits, 2), two),
        "expert choice": route_expert_choice(logits, two),
    }


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
    drawn, grids = new_pairs(len(before), 1.75, 0.85)
    rows, counts = [], []
    for axes, name in zip(grids, before, strict=True):
        old, new = _weights(before[name]), _weights(after[name])
        moved = int((_met(old) != _met(new))[:edited].any(1).sum())
        counts.append(f"{name}: {moved}")
        _draw_changed_grid(axes, _met(old), _met(new), edited)
        axes.set_title(f"{name}: {moved} rerouted", size=11)
        for token, expert in (_met(old) | _met(new)).nonzero().tolist():
            rows.append((name, token, expert, *(float(weight[token, expert].nan_to_num()) for weight in (old, new))))
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
    return drawn, columns(("router", "token", "expert", "before", "after"), rows)


def _draw_changed_grid(axes: Axes, old: Tensor, new: Tensor, edited: int) -> None:
    """One shade where token and expert meet in both texts, [T, E], and marks where they do in one of them."""
    tokens, experts = old.shape
    both = old & new
    _draw_grid(axes, torch.where(both, 0.4, torch.nan), torch.zeros_like(both), ~(old | new)[:edited].any(1))
    axes.add_patch(Rectangle((edited, 0), tokens - edited, experts, facecolor="#EEEEEE", linewidth=0))
    for marker, changed in (("_", old & ~new), ("+", new & ~old)):
        place = changed[:edited].nonzero().T + 0.5
        axes.plot(*place, marker=marker, color=INK, linestyle="", markersize=8, markeredgewidth=2)


_TOKENS, _MOST_EXPERTS, _WORDS = 24, 16, 12
PLAYGROUND_ROUTERS = (
    "softmax top-k",
    "top-k, then softmax",
    "Switch",
    "expert choice",
    "sigmoid + bias",
    "MoGE",
    "hash",
)


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
    logits, ids = _made_up_logits(experts)
    capacity = expert_capacity(len(ids), experts, k, capacity_factor)
    choice = _route(router, logits / temperature, ids, k, capacity, groups)
    chosen = _weights(choice)
    kept = chosen if router == "expert choice" else _weights(apply_capacity(choice, capacity))
    dropped, nobody, load = _dropped(chosen, kept), _nobody(kept), _met(chosen).sum(0)

    drawn, (grid, bars) = new_panels(0.21 * experts + 1.7, 1, 2, sharey=True, width_ratios=[3.6, 1])
    _draw_grid(grid, kept, dropped, nobody)
    grid.set(xlabel="token", ylabel="expert")
    grid.set_xticks([token + 0.5 for token in range(0, len(ids), 4)], range(0, len(ids), 4))
    if router == "MoGE":
        for first in range(0, experts, experts // groups):
            grid.axhline(first, color=QUIET, linewidth=1)
    _draw_load(bars, _met(kept).sum(0), load, capacity)

    counts = (
        f"{int(dropped.sum())} of {int(load.sum())} slots dropped, "
        f"{int(nobody.sum())} of {len(ids)} tokens without expert, MaxVio {max_violation(load):.2f}"
    )
    ignored = f"{router} does not look at the {'temperature or the groups' if router == 'hash' else 'groups'}"
    note = "MoGE looks at all controls" if router == "MoGE" else ignored
    set_title(drawn, f"{router}\n{counts}", size=11)
    drawn.supxlabel(f"■ darker: more weight    × dropped    hatched: no expert\n{note}", size=10)
    settings = f"{experts} experts, k {k}, temperature {temperature:g}, capacity factor {capacity_factor:g}"
    settings += f", {groups} groups" if router == "MoGE" else ""
    describe(drawn, f"{len(ids)} tokens through the router {router} ({settings}): {counts}. {note}.")
    return drawn, columns(("token", "expert", "weight", "fate"), _slots(chosen, kept))


def _check_playground(router: str, experts: int, k: int, temperature: float, groups: int) -> None:
    if router not in PLAYGROUND_ROUTERS:
        raise ValueError(f"router={router!r}: wanted one of {', '.join(PLAYGROUND_ROUTERS)}")
    if not 2 <= experts <= _MOST_EXPERTS:
        raise ValueError(f"experts={experts}: wanted 2 to {_MOST_EXPERTS}")
    if not 1 <= k <= experts:
        raise ValueError(f"k={k}: wanted 1 to {experts}, the number of experts")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: wanted more than 0")
    if router == "Switch" and k != 1:
        raise ValueError(f"k={k}: Switch sends every token to one expert, wanted k=1")
    if router == "MoGE" and (groups < 1 or experts % groups or k % groups):
        raise ValueError(
            f"groups={groups}: MoGE takes equally many experts from groups of equal size, wanted a divisor of both "
            f"experts={experts} and k={k}"
        )


def _made_up_logits(experts: int) -> tuple[Tensor, Tensor]:
    """Logits [T, E] and token ids [T], the same at every call."""
    generator = torch.Generator().manual_seed(6)  # one of those without near ties
    logits = torch.randn(_MOST_EXPERTS, _TOKENS, generator=generator)
    popularity = torch.randn(_MOST_EXPERTS, 1, generator=generator)
    ids = torch.randint(_WORDS, (_TOKENS,), generator=generator)
    return (logits + popularity)[:experts].T, ids


def _route(router: str, logits: Tensor, ids: Tensor, k: int, capacity: int, groups: int) -> RouterOutput:
    match router:
        case "softmax top-k":
            return route_topk(logits, k)
        case "top-k, then softmax":
            return route_topk_softmax(logits, k)
        case "Switch":
            return route_switch(logits)
        case "expert choice":
            return route_expert_choice(logits, capacity)
        case "sigmoid + bias":
            return _route_biased(logits, k, _settled_bias(logits, k))
        case "MoGE":
            return route_grouped(logits, k, groups)
        case "hash":
            return route_hash(ids, logits.shape[-1], k)


def _route_biased(logits: Tensor, k: int, bias: Tensor) -> RouterOutput:
    """DeepSeek-V3's choice and weights, without its groups and its scaling factor."""
    return route_topk(logits, k, score_func="sigmoid", norm_topk_prob=True, bias=bias)


def _settled_bias(logits: Tensor, k: int, updates: int = 100, rate: float = 0.02) -> Tensor:
    """The selection bias [E] after so many updates on the same tokens."""
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
    set_panel_title(axes, f"load (limit {capacity})", size=10)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
