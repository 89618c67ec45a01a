"""The same tokens through different routers, drawn as grids of tokens and experts; and a playground for routers.

Shapes: T tokens, E experts, K experts per token.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from minimoe.course.figures.drawing import new_pairs, new_panels, span
from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.figures.tokens import visible
from minimoe.course.style import INK, MAIN, PALE, QUIET, token_fonts
from minimoe.model import RouterOutput, routing
from minimoe.model.balance import apply_capacity, expert_capacity, expert_load, max_violation, update_bias
from minimoe.model.config import require

_SHADES = LinearSegmentedColormap.from_list("weight", [PALE, MAIN, "#16263A"])  # darker is more, in greyscale too
_DROPPED = {"marker": "x", "color": INK, "linestyle": "", "markersize": 5, "markeredgewidth": 1.6}
_NOBODY = {"facecolor": "none", "edgecolor": "#999999", "hatch": "////", "linewidth": 0, "zorder": 1.5}
_TOKENS, _MOST_EXPERTS, _WORDS = 24, 16, 12
# Name -> RouterOutput of logits [T, E], token ids [T], K, what an expert accepts, and the number of groups.
PLAYGROUND_ROUTERS = {
    "softmax top-k": lambda logits, ids, k, capacity, groups: routing.route_topk(logits, k),
    "top-k, then softmax": lambda logits, ids, k, capacity, groups: routing.route_topk_softmax(logits, k),
    "Switch": lambda logits, ids, k, capacity, groups: routing.route_switch(logits),
    "expert choice": lambda logits, ids, k, capacity, groups: routing.route_expert_choice(logits, capacity),
    "sigmoid + bias": lambda logits, ids, k, capacity, groups: _route_biased(logits, k, _settled_bias(logits, k)),
    "MoGE": lambda logits, ids, k, capacity, groups: routing.route_grouped(logits, k, groups),
    "hash": lambda logits, ids, k, capacity, groups: routing.route_hash(ids, logits.shape[-1], k),
}
Routes = Mapping[str, RouterOutput]


@figure(listed=False)
def draw_routes(tokens: Sequence[str], routes: Routes, asked: Routes | None = None) -> Drawing:
    """One grid a router: which token goes to which expert, with what weight, what is dropped, and who gets none.

    Drawn of T pieces of text, of what each router decided for them [T, K], and, in `asked`, of what it chose before a
    capacity cut that.
    Data: router, token, expert, weight, fate ("kept" or "dropped"): a row for every slot.
    """
    kept = {name: _weights(output) for name, output in routes.items()}
    chosen = kept | {name: _weights(output) for name, output in (asked or {}).items()}
    experts = max(weights.shape[1] for weights in kept.values())
    drawn, (*grids, key) = new_pairs(len(routes) + 1, 0.092 * experts + 0.36, 1.2)
    rows, findings = [], []
    for place, (axes, (name, weights)) in enumerate(zip(grids, kept.items(), strict=True), 1):
        dropped, nobody = _met(chosen[name]) & ~_met(weights), ~_met(weights).any(1)
        _draw_grid(axes, weights, dropped, nobody)
        axes.set_title(f"{place}  {name}")
        rows += [(name, *slot) for slot in _slots(chosen[name], weights)]
        findings.append(
            f"{name}: experts a token {span(_met(weights).sum(1).numpy(), 0)}, tokens of the busiest expert "
            f"{_met(weights).sum(0).max()}, slots dropped {dropped.sum()}, tokens with no expert {nobody.sum()}."
        )
    _label_grids(grids, tokens)
    for axes in grids:  # lines are too low for every number
        axes.set_yticks(np.arange(0, experts, 2) + 0.5, range(0, experts, 2), size=10)
    shades = [Patch(facecolor=_SHADES(weight), label=f"weight {weight:g}") for weight in (0.05, 0.5, 1.0)]
    cross = Line2D([], [], **_DROPPED, label="dropped: the expert was full")
    hatch = Patch(**_NOBODY, label="no expert for this token")
    key.set_axis_off()
    key.legend(handles=[*shades, cross, hatch], loc="center", handlelength=1)
    for line, dim in (("column", 1), ("row", 0)):
        even = [name for name, weights in kept.items() if len(_met(weights).sum(dim).unique()) == 1]
        findings.append(f"As many cells in every {line}: {'; '.join(even) or 'none'}.")
    alt = f"Grids of {len(tokens)} tokens by {experts} experts, one a router. {' '.join(findings)}"
    return drawn, columns(("router", "token", "expert", "weight", "fate"), rows), alt


def _weights(output: RouterOutput) -> Tensor:
    """[T, E]: the weight that each expert's output gets, NaN where token and expert do not meet."""
    tokens, experts = output.logits.shape
    nowhere = output.weights.new_full((tokens, experts + 1), torch.nan)  # one column more for the dropped slots
    return nowhere.scatter(1, output.indices, output.weights)[:, :experts]


def _met(weights: Tensor) -> Tensor:
    return ~weights.isnan()


def _slots(chosen: Tensor, kept: Tensor) -> list[tuple]:
    """Token, expert, weight and fate of every slot, in the order of the tokens; of weights [T, E]."""
    slots = [(slot, kept[*slot]) for slot in _met(chosen).nonzero().tolist()]
    return [(*slot, weight.nan_to_num().item(), "kept" if _met(weight) else "dropped") for slot, weight in slots]


def _draw_grid(axes: Axes, weights: Tensor, dropped: Tensor, nobody: Tensor) -> None:
    """Shades for `weights` [T, E], crosses where `dropped` [T, E], and hatches for a token that meets `nobody` [T]."""
    tokens, experts = weights.shape
    axes.pcolormesh(weights.T.numpy(), cmap=_SHADES, vmin=0, vmax=1, edgecolors="white", linewidth=0.8)
    axes.plot(*(dropped.nonzero().T + 0.5), **_DROPPED)
    for token in nobody.nonzero().flatten().tolist():
        axes.add_patch(Rectangle((token, 0), 1, experts, **_NOBODY))
    axes.set(xlim=(0, tokens), ylim=(experts, 0))
    axes.set_yticks(np.arange(experts) + 0.5, range(experts), size=10)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(True)


def _label_grids(grids: Sequence[Axes], tokens: Sequence[str]) -> None:
    """Tokens below the lowest grid of each of two columns, and beside the left ones what their rows are."""
    for axes in grids[0::2]:
        axes.set_ylabel("expert")
    for axes in grids[-2:]:
        places, names = np.arange(len(tokens)) + 0.5, map(visible, tokens)
        axes.set_xticks(places, names, rotation=90, family=token_fonts(), size=10)
        axes.tick_params(labelbottom=True)


@figure(listed=False)
def draw_changes(tokens: Sequence[str], before: Routes, after: Routes, edited: int) -> Drawing:
    """One grid a router: who goes to which expert before and after the tokens from place `edited` on were replaced.

    Drawn of the T pieces of text before the edit, and of what each router decided for both texts, equally long.
    Data: router, token, expert, before, after (weights, 0 where they do not meet).
    """
    note = "■ in both texts    − only before the edit    + only after it\n"
    note += "hatched: no expert    grey: the word that was replaced"
    drawn, grids = new_pairs(len(before), 1.75, 1.05, xlabel=note)
    rows, counts = [], []
    for axes, name in zip(grids, before, strict=True):
        weights = [_weights(routes[name]) for routes in (before, after)]
        old, new = map(_met, weights)
        moved = int((old != new)[:edited].any(1).sum())
        counts.append(f"{name}: {moved}")
        _draw_grid(axes, torch.where(old & new, 0.4, torch.nan), torch.zeros_like(old), ~(old | new)[:edited].any(1))
        axes.add_patch(Rectangle((edited, 0), len(old) - edited, old.shape[1], facecolor="#EEEEEE", linewidth=0))
        for marker, changed in (("_", old & ~new), ("+", new & ~old)):
            place = changed[:edited].nonzero().T + 0.5
            axes.plot(*place, marker=marker, color=INK, linestyle="", markersize=8, markeredgewidth=2)
        axes.set_title(f"{name}: {moved} rerouted")
        for slot in (old | new).nonzero().tolist():
            rows.append((name, *slot, *(each[*slot].nan_to_num().item() for each in weights)))
    _label_grids(grids, [*tokens[:edited], *"?" * (len(tokens) - edited)])
    alt = f"""Grids of tokens by experts, before and after the last word was replaced. Of the {edited} tokens before
        that word, so many go to other experts after the edit: {"; ".join(counts)}."""
    return drawn, columns(("router", "token", "expert", "before", "after"), rows), alt


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

    The router is one of `PLAYGROUND_ROUTERS`, with 2 to 16 experts, of which a token meets k; for expert choice, on
    average. The temperature divides the logits. An expert accepts `capacity_factor` times its fair share of the slots;
    expert choice takes exactly that. The groups of experts are those of MoGE.

    Data: token, expert, weight (0 when dropped), fate ("kept" or "dropped"): a row for every slot.
    Raises ValueError where the router cannot work with these settings.
    """
    even = groups >= 1 and experts % groups == k % groups == 0
    require(router in PLAYGROUND_ROUTERS, "router", router, f"one of {', '.join(PLAYGROUND_ROUTERS)}")
    require(2 <= experts <= _MOST_EXPERTS, "experts", experts, f"2 to {_MOST_EXPERTS}")
    require(1 <= k <= experts, "k", k, f"1 to {experts}, the number of experts")
    require(temperature > 0, "temperature", temperature, "more than 0")
    require(router != "Switch" or k == 1, "k", k, "1, as Switch sends every token to one expert")
    alike = f"a divisor of experts={experts} and k={k}, as MoGE takes equally many from groups of equal size"
    require(router != "MoGE" or even, "groups", groups, alike)
    logits, ids = _made_up_logits(experts)
    capacity = expert_capacity(_TOKENS, experts, k, capacity_factor)
    choice = PLAYGROUND_ROUTERS[router](logits / temperature, ids, k, capacity, groups)
    chosen = _weights(choice)
    kept = chosen if router == "expert choice" else _weights(apply_capacity(choice, capacity))
    dropped, nobody, load = _met(chosen) & ~_met(kept), ~_met(kept).any(1), _met(chosen).sum(0)
    counts = f"{dropped.sum()} of {load.sum()} slots dropped, {nobody.sum()} of {_TOKENS} tokens without expert"
    counts = f"{counts}, MaxVio {max_violation(load):.2f}"
    unread = {"MoGE": "", "hash": "temperature or the groups"}.get(router, "groups")
    note = f"{router} does not look at the {unread}" if unread else f"{router} looks at all controls"

    marks = f"■ darker: more weight    × dropped    hatched: no expert\n{note}"
    drawn, (grid, bars) = new_panels(0.21 * experts + 1.7, 1, 2, sharey=True, width_ratios=[3.6, 1], xlabel=marks)
    drawn.suptitle(f"{router}\n{counts}", x=0.01, ha="left", size=11)  # there is no room for more
    _draw_grid(grid, kept, dropped, nobody)
    grid.set(xlabel="token", ylabel="expert")
    grid.set_xticks(np.arange(0, _TOKENS, 4) + 0.5, range(0, _TOKENS, 4))
    if router == "MoGE":
        grid.hlines(range(0, experts, experts // groups), 0, _TOKENS, color=QUIET, linewidth=1)
    places = np.arange(experts) + 0.5
    bars.barh(places, load.tolist(), 0.7, facecolor="white", edgecolor=QUIET, linestyle=":")  # who wanted the expert
    bars.barh(places, _met(kept).sum(0).tolist(), 0.7, facecolor=MAIN)  # who has it
    bars.axvline(capacity, color=INK, linestyle="--", linewidth=1)
    bars.set(title=f"load (limit {capacity})", xlabel="tokens", xlim=(0, 1.08 * max(capacity, int(load.max()))))
    bars.tick_params(axis="y", length=0)
    bars.xaxis.get_major_locator().set_params(integer=True)

    settings = f"{experts} experts, k {k}, temperature {temperature:g}, capacity factor {capacity_factor:g}"
    settings += f", {groups} groups" if router == "MoGE" else ""
    alt = f"{_TOKENS} tokens through the router {router} ({settings}): {counts}. {note}."
    return drawn, columns(("token", "expert", "weight", "fate"), _slots(chosen, kept)), alt


def _made_up_logits(experts: int) -> tuple[Tensor, Tensor]:
    """Logits [T, E] and token ids [T], the same at every call."""
    generator = torch.Generator().manual_seed(6)  # one of those without near ties
    logits = torch.randn(_MOST_EXPERTS, _TOKENS, generator=generator)
    popularity = torch.randn(_MOST_EXPERTS, 1, generator=generator)
    ids = torch.randint(_WORDS, (_TOKENS,), generator=generator)
    return (logits + popularity)[:experts].T, ids


def _route_biased(logits: Tensor, k: int, bias: Tensor) -> RouterOutput:
    """DeepSeek-V3's choice and weights, without its groups and its scaling factor."""
    return routing.route_topk(logits, k, score_func="sigmoid", norm_topk_prob=True, bias=bias)


def _settled_bias(logits: Tensor, k: int) -> Tensor:
    """The selection bias [E] after 100 updates on the same tokens."""
    bias = logits.new_zeros(logits.shape[-1])
    for _ in range(100):
        update_bias(bias, expert_load(_route_biased(logits, k, bias).indices, len(bias)), rate=0.02)
    return bias
