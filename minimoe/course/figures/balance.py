"""Who is busy: the load of experts while a model trains, averages that hide a collapse, and experts on devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from minimoe.course.figures.register import Drawing, figure, styled
from minimoe.course.runs import read_run, where
from minimoe.course.style import INK, MAIN, PALE, QUIET, SERIES, describe, expert_colour, new_figure
from minimoe.model import RouterOutput, route_grouped, route_topk
from minimoe.model.balance import load_balancing_loss

STARVING = 0.25  # of a fair share: what an expert gets less than to count as starving
_POINTS, _LAST = 30, 20  # points of a curve; steps at the end of a run, over which a share is taken
SKEWS = [step / 4 for step in range(9)]


# --- a run, step by step ---------------------------------------------------------------------------------------------


@styled()
def load_curves(log: Sequence[dict[str, Any]], title: str = "Share of the choices") -> Drawing:
    """How each layer's choices spread over its experts while a model trains: one band an expert, busiest at the bottom.

    Args:
        log: what `minimoe.training.train` returned.
        title: of the figure.

    Data: layer, step (the last of those averaged), expert, share (of the layer's choices).
    """
    load = torch.tensor([record["load"] for record in log], dtype=torch.float64)  # [steps, L, E]
    width = max(1, len(load) // _POINTS)
    windows = load.split(width)
    steps = torch.tensor([len(window) for window in windows]).cumsum(0).tolist()
    shares = torch.stack([_shares(window) for window in windows])  # [points, L, E]
    points, layers, experts = shares.shape
    drawn = new_figure(2.6)
    panels = drawn.subplots(1, layers, sharex=True, sharey=True, squeeze=False)[0]
    for layer, axes in enumerate(panels):
        _bands(axes, steps, shares[:, layer])
        axes.set_title(f"layer {layer}", size=11, weight="normal")
    panels[0].set(ylabel="share of choices", yticks=[0, 0.25, 0.5, 0.75, 1], ylim=(0, 1))
    drawn.supxlabel("training step", size=11)
    drawn.suptitle(title, x=0.01, ha="left", size=12, weight="bold")
    describe(
        drawn,
        f"Stacked areas for {layers} layers: the share of the choices that each of {experts} experts receives over "
        f"{len(log)} training steps. {title}: {_finding(shares, _shares(load[-_LAST:]))}.",
    )
    index = [(layer, point, expert) for layer in range(layers) for point in range(points) for expert in range(experts)]
    data = {
        "layer": [layer for layer, _, _ in index],
        "step": [steps[point] for _, point, _ in index],
        "expert": [expert for _, _, expert in index],
        "share": [shares[point, layer, expert].item() for layer, point, expert in index],
    }
    return drawn, data


def _shares(load: Tensor) -> Tensor:
    """[steps, L, E] counts -> [L, E], the part of all choices that each expert received."""
    total = load.sum(0)
    return total / total.sum(-1, keepdim=True)


def _bands(axes: Axes, steps: list[int], shares: Tensor) -> None:
    order = shares[-1].argsort(descending=True).tolist()
    bottom = torch.zeros(len(steps), dtype=shares.dtype)
    for expert in order:
        top = bottom + shares[:, expert]
        axes.fill_between(steps, bottom, top, color=expert_colour(expert), edgecolor="white", linewidth=0.8)
        if shares[-1, expert] > 0.08:  # else there is no room for its number
            middle = (bottom[-1] + top[-1]).item() / 2
            axes.annotate(
                str(expert), (steps[-1], middle), (-5, 0), textcoords="offset points", ha="right", va="center", size=10
            )
        bottom = top
    axes.margins(x=0)


def _finding(points: Tensor, end: Tensor) -> str:
    """In words that another machine, which trains a slightly different model, would also find.

    Args:
        points: the shares drawn, [points, L, E].
        end: the shares over the last steps, [L, E].
    """
    worst = max(_starving(shares) for shares in points[: (len(points) + 1) // 2])
    first = "more than one expert in ten" if worst > 0.1 else "hardly any expert"
    starving = _starving(end)
    last = "more than one in five" if starving > 0.2 else "hardly any" if starving < 0.1 else "some"
    return f"at some point of the first half {first} gets less than a quarter of a fair share, at the end {last}"


def _starving(shares: Tensor) -> float:
    """The part of all experts that get less than `STARVING` of a fair share; shares [L, E]."""
    return (shares * shares.shape[-1] < STARVING).double().mean().item()


# --- averages --------------------------------------------------------------------------------------------------------


@figure()
def hidden_by_averaging() -> Drawing:
    """Two layers, and four sequences, that each use one expert only, and their averages, which look balanced.

    Data: kind ("layer" or "sequence"), row (a number, or "average"), expert, share (of the tokens), loss (of the row).
    """
    drawn = new_figure(2.9)
    data = {"kind": [], "row": [], "expert": [], "share": [], "loss": []}
    left, right = drawn.subplots(1, 2, width_ratios=[1, 1.5])
    for axes, kind, number in ((left, "layer", 2), (right, "sequence", 4)):
        rows = _collapsed(number)
        average = RouterOutput(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
        names = [*map(str, range(number)), "average"]
        shares = [_share_of_tokens(output) for output in (*rows, average)]
        losses = [load_balancing_loss([output]).item() for output in (*rows, average)]
        _share_table(axes, kind, names, shares, losses)
        for name, row, loss in zip(names, shares, losses, strict=True):
            for expert, share in enumerate(row):
                for column, value in zip(data.values(), (kind, name, expert, share, loss), strict=True):
                    column.append(value)
    describe(
        drawn,
        "Two tables of the share of tokens that each expert gets. Two layers that each use one of 2 experts have a "
        "balance loss of 2.0 each; their average is balanced, with a loss of 1.0. Four sequences that each use one of "
        "4 experts have a loss of 4.0 each; their average is balanced, with a loss of 1.0.",
    )
    return drawn, data


def _collapsed(number: int, tokens: int = 6) -> list[RouterOutput]:
    """`number` routers over as many experts, K = 1: router i sends each of its `tokens` tokens to expert i, with a
    probability close to 1."""
    certain = 8.0 * torch.eye(number, dtype=torch.float64)
    return [route_topk(row.repeat(tokens, 1), 1) for row in certain]


def _share_of_tokens(output: RouterOutput) -> list[float]:
    experts = output.logits.shape[-1]
    return (torch.bincount(output.indices.flatten(), minlength=experts).double() / len(output.indices)).tolist()


def _share_table(axes: Axes, kind: str, names: list[str], shares: list[list[float]], losses: list[float]) -> None:
    experts = len(shares[0])
    for row, values in enumerate(shares):
        row += 0.3 * (names[row] == "average")  # set apart
        for expert, share in enumerate(values):
            axes.barh(
                row, 1, 0.9, left=expert, color=MAIN if share == 1 else PALE if share else "white", edgecolor=QUIET
            )
            axes.text(
                expert + 0.5,
                row,
                f"{share:.2f}".rstrip("0").rstrip("."),
                ha="center",
                va="center",
                color="white" if share == 1 else INK,
            )
        axes.text(experts + 0.2, row, f"{losses[round(row - 0.2)]:.1f}", va="center", weight="bold")
    axes.text(experts + 0.2, -0.85, "loss", va="center", color=QUIET)
    axes.set(xlim=(0, experts + 0.9), ylim=(len(names) - 0.1, -1.2), xticks=[e + 0.5 for e in range(experts)])
    axes.set_xticklabels(range(experts))
    axes.set_yticks([*range(len(names) - 1), len(names) - 0.7], names)
    axes.set(xlabel="expert", ylabel=kind, title=f"{len(names) - 1} {kind}s and their average")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


# --- what balance costs ----------------------------------------------------------------------------------------------

_PRICE_COLUMNS = ("balanced_by", "seed", "max_violation", "together", "starving", "nats")
BALANCED_BY = {"balance-none": "nothing", "moe": "the loss", "balance-bias": "the bias"}  # experiments of data/runs


@figure()
def price_of_balance() -> Drawing:
    """How uneven the load is at the end of training, and the held-out loss: without balancing, by a loss, by a bias.

    Data: balanced_by, seed, max_violation (of a step and layer; mean over layers and the last 100 steps), together
    (MaxVio of a layer's load summed over these steps; mean over layers), starving (the share of the experts that get
    less than `STARVING` of a fair share of these steps' choices), nats (held-out loss per token, mean over domains).
    """
    rows = [row for run, name in BALANCED_BY.items() for row in _results(run, name)]
    data = {name: list(column) for name, column in zip(_PRICE_COLUMNS, zip(*rows, strict=True), strict=True)}
    drawn = new_figure(3.2)
    left, middle, right = drawn.subplots(1, 3)
    for axes, column in ((left, "max_violation"), (middle, "together"), (right, "nats")):
        for seed, style in zip(sorted(set(data["seed"])), SERIES, strict=False):
            values = [value for of, value in zip(data["seed"], data[column], strict=True) if of == seed]
            axes.plot([name.replace(" ", "\n") for name in BALANCED_BY.values()], values, label=f"seed {seed}", **style)
        axes.set(xlabel="balanced by")
        axes.margins(x=0.15)
    for axes, title in ((left, "Uneven in one step"), (middle, "Over 100 steps"), (right, "Held-out loss")):
        axes.set_title(title, size=11, weight="normal")
    for axes in (left, middle):
        axes.set(ylim=(0, 2), yticks=[0, 0.5, 1, 1.5, 2], ylabel="MaxVio (0: balanced)")
    right.set(ylabel="nats per token")
    middle.legend(frameon=False, loc="upper right", handlelength=1.8)
    describe(drawn, _price_alt(data))
    return drawn, data


def _results(run: str, name: str) -> list[tuple[str, int, float, float, float, float]]:
    train, final = read_run(run, "train"), read_run(run, "final")
    rows = []
    for seed in sorted(set(final["seed"].tolist())):
        last = {column: values[-10:].mean() for column, values in where(train, seed=seed).items()}  # rows of 10 steps
        violation = [value for column, value in last.items() if column.startswith("max_violation")]
        shares = [value for column, value in last.items() if column.startswith("load")]
        shares = np.reshape(shares, (len(violation), -1))  # [layers, experts]
        fair = shares / shares.mean(1, keepdims=True)  # 1: a fair share
        together, starving = fair.max(1).mean() - 1, (fair < STARVING).mean()
        nats = where(final, seed=seed)["nats"].mean()
        rows.append((name, seed, *map(float, (np.mean(violation), together, starving, nats))))
    return rows


def _price_alt(data: dict[str, list]) -> str:
    parts, nats = [], {}
    for name in BALANCED_BY.values():
        here = [row for row in zip(*data.values(), strict=True) if row[0] == name]
        _, _, violation, together, starving, nats[name] = zip(*here, strict=True)
        parts.append(
            f"balanced by {name}, MaxVio is {_range(violation)} in one step and {_range(together)} over 100 steps, "
            f"{np.mean(starving):.0%} of the experts starve, and the held-out loss is {_range(nats[name], 3)}"
        )
    orders = {tuple(np.argsort(values)) for values in nats.values()}
    lines = "do not cross" if len(orders) == 1 else "cross"
    return (
        f"Three plots, a line for each of {len(nats['nothing'])} seeds; those of the held-out loss {lines}: "
        f"{'; '.join(parts)} nats per token."
    )


def _range(values: Sequence[float], digits: int = 2) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


# --- devices ---------------------------------------------------------------------------------------------------------


class Placed(NamedTuple):
    """What one rule makes of a batch whose experts lie on devices."""

    load: Tensor  # [devices, experts on each]: slots, the busiest expert first
    kept: float  # of the router's probability, the part that goes to the chosen experts; mean over tokens

    @property
    def time(self) -> float:
        """Of the slowest device, and so of the step, in units of perfect balance."""
        per_device = self.load.sum(-1)
        return (per_device.max() / per_device.mean()).item()


def place_experts(
    experts: int, k: int, devices: int, skew: float, tokens: int, *, seed: int = 0
) -> tuple[Placed, Placed]:
    """Route one batch by top-k and by MoGE, with the experts placed on devices in blocks of neighbours.

    The expert of popularity rank r = 1, 2, ... is the first choice of a share of tokens in proportion to r ** -skew
    (Zipf's law; Gumbel noise makes it so). Which expert has which rank is drawn at random.

    Args:
        experts: E, a multiple of `devices`.
        k: experts per token, a multiple of `devices`, which MoGE needs.
        devices: how many; one group of MoGE each.
        skew: 0 makes all experts equally popular.
        tokens: in the batch.
        seed: of the tokens and of the ranks.

    Raises:
        ValueError: a multiple is none, or k is more than the experts.
    """
    if experts % devices:
        raise ValueError(f"experts={experts}: wanted a multiple of devices={devices}, to place as many on each")
    if k % devices or k > experts:
        raise ValueError(
            f"k={k}: wanted a multiple of devices={devices} up to experts={experts}, as MoGE takes as many from each"
        )
    draw = torch.Generator().manual_seed(seed)
    rank = 1 + torch.randperm(experts, generator=draw)
    gumbel = -(-torch.rand(tokens, experts, generator=draw, dtype=torch.float64).log()).log()
    logits = gumbel - skew * rank.log()
    return tuple(_placed(output, devices) for output in (route_topk(logits, k), route_grouped(logits, k, devices)))


def _placed(output: RouterOutput, devices: int) -> Placed:
    experts = output.logits.shape[-1]
    load = torch.bincount(output.indices.flatten(), minlength=experts).double().view(devices, -1)
    return Placed(load.sort(descending=True).values, output.weights.sum(-1).mean().item())


@figure()
def device_simulator(experts: int = 64, k: int = 8, devices: int = 8, skew: float = 1.0, tokens: int = 1024) -> Drawing:
    """Top-k against MoGE with experts on devices: who works how long, and how much probability the choice keeps.

    Data: rule, what ("work of device", "time at skew", "probability kept at skew"), x (the device, or the skew), value
    (work and time in units of perfect balance).

    Raises:
        ValueError: as `place_experts`.
    """
    rules = ("top-k", "MoGE")
    here = dict(zip(rules, place_experts(experts, k, devices, skew, tokens), strict=True))
    curves = dict(
        zip(rules, zip(*(place_experts(experts, k, devices, s, tokens) for s in SKEWS), strict=True), strict=True)
    )
    drawn = new_figure(5.6)
    (left, right), (time, kept) = drawn.subplots(2, 2)
    for axes, rule, colour in ((left, "top-k", MAIN), (right, "MoGE", PALE)):
        _device_bars(axes, here[rule], colour, f"{rule}: the step takes {here[rule].time:.2f}")
    tallest = max(placed.time for placed in here.values())
    left.set(ylim=(0, 1.15 * tallest), ylabel="work (1: perfect balance)")
    right.set(ylim=(0, 1.15 * tallest))
    for rule, style in zip(rules, SERIES, strict=False):
        time.plot(SKEWS, [placed.time for placed in curves[rule]], label=rule, **style)
        kept.plot(SKEWS, [placed.kept for placed in curves[rule]], label=rule, **style)
    time.set(ylabel="time (1: perfect balance)", ylim=(0, 1.1 * max(placed.time for placed in curves["top-k"])))
    kept.set(ylabel="probability of the chosen", ylim=(0, 1))
    time.set_title("The slowest device sets the time", size=11, weight="normal")
    kept.set_title(f"MoGE keeps {_lost(here):.0%} less", size=11, weight="normal")
    for axes in (time, kept):
        axes.axvline(skew, color=QUIET, linestyle=":", linewidth=1)
        axes.set(xlabel="skew of the experts' popularity")
    time.legend(frameon=False)
    describe(drawn, _devices_alt(experts, k, devices, skew, tokens, here))
    return drawn, _devices_data(here, curves)


def _device_bars(axes: Axes, placed: Placed, colour: str, title: str) -> None:
    """A bar a device, made of its experts."""
    work = (placed.load / placed.load.sum(-1).mean()).numpy()
    bottom = np.zeros(len(work))
    for of_expert in work.T:
        axes.bar(range(len(work)), of_expert, 0.8, bottom=bottom, color=colour, edgecolor="white", linewidth=0.7)
        bottom += of_expert
    axes.bar(range(len(work)), bottom, 0.8, facecolor="none", edgecolor=MAIN)
    axes.axhline(1, color=INK, linestyle="--", linewidth=1)
    axes.set(xlabel="device", xticks=range(len(work)))
    axes.set_title(title, size=11, weight="normal")


def _lost(here: dict[str, Placed]) -> float:
    """The part of the probability kept by top-k that MoGE gives up."""
    return 1 - here["MoGE"].kept / here["top-k"].kept


def _devices_alt(experts: int, k: int, devices: int, skew: float, tokens: int, here: dict[str, Placed]) -> str:
    topk, moge = here["top-k"], here["MoGE"]
    return (
        f"{tokens} tokens, {k} of {experts} experts each, on {devices} devices, skew {skew:g}. With top-k the slowest "
        f"device needs {topk.time:.2f} times as long as in perfect balance, with MoGE {moge.time:.2f} times. The "
        f"chosen experts hold {topk.kept:.0%} of the router's probability with top-k and {moge.kept:.0%} with MoGE, "
        f"which is {_lost(here):.0%} less. Two plots below show time and probability against the skew."
    )


def _devices_data(here: dict[str, Placed], curves: dict[str, tuple[Placed, ...]]) -> dict[str, list]:
    rows = []
    for rule, placed in here.items():
        work = placed.load.sum(-1) / placed.load.sum(-1).mean()
        rows += [(rule, "work of device", float(device), value) for device, value in enumerate(work.tolist())]
        rows += [(rule, "time at skew", s, at.time) for s, at in zip(SKEWS, curves[rule], strict=True)]
        rows += [(rule, "probability kept at skew", s, at.kept) for s, at in zip(SKEWS, curves[rule], strict=True)]
    return {
        name: list(column) for name, column in zip(("rule", "what", "x", "value"), zip(*rows, strict=True), strict=True)
    }
