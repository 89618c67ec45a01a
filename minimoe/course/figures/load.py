"""Who is busy: the load of experts while a model trains, averages that hide a collapse, and experts on devices."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimoe.course.cost import place_experts
from minimoe.course.figures.drawing import heatmap, label_right, new_panels, note, span
from minimoe.course.figures.register import Drawing, cell_columns, columns, figure
from minimoe.course.runs import Table, read_runs, where
from minimoe.course.style import INK, QUIET, SERIES, expert_colour
from minimoe.model import RouterOutput, route_topk
from minimoe.model.balance import expert_load, load_balancing_loss

STARVING = 0.25  # of a fair share: what an expert gets less than to count as starving
_POINTS, _LAST = 30, 20  # points of a curve; steps at the end of a run, over which a share is taken
BALANCED_BY = {  # experiments of data/runs; scores are those of a softmax where nothing is said
    "nothing": "balance-none",
    "the loss": "moe",
    "loss, sigmoid": "balance-loss-sigmoid",
    "bias, sigmoid": "balance-bias",
}
SKEWS = [step / 4 for step in range(9)]


@figure(listed=False)
def load_curves(log: Sequence[dict[str, Any]], title: str = "Share of the choices") -> Drawing:
    """How each layer's choices spread over its experts while a model trains: one band an expert, busiest at the bottom.

    Drawn of the log that `minimoe.training.train` returns. Data: layer, step (the last of those averaged), expert,
    share (of the layer's choices).
    """
    load = torch.tensor([record["load"] for record in log], dtype=torch.float64)  # [steps, L, E]
    windows = load.split(max(1, len(load) // _POINTS))
    steps = np.cumsum([len(window) for window in windows])
    shares = torch.stack([_shares(window) for window in windows], dim=1)  # [L, points, E]
    layers, points, experts = shares.shape
    drawn, panels = new_panels(2.6, 1, layers, sharex=True, sharey=True, title=title, xlabel="training step")
    for layer, (axes, of_layer) in enumerate(zip(panels, shares.numpy(), strict=True)):
        order = (-of_layer[-1]).argsort(kind="stable")
        bands, colours = of_layer[:, order].T, [expert_colour(expert) for expert in order]
        axes.stackplot(steps, bands, colors=colours, edgecolor="white", linewidth=0.8)
        for expert, share, top in zip(order, bands[:, -1], bands[:, -1].cumsum(), strict=True):
            if share > 0.08:  # else there is no room for its number
                note(axes, str(expert), (steps[-1], top - share / 2), -5)
        axes.set(title=f"layer {layer}", xmargin=0)
    panels[0].set(ylabel="share of choices", yticks=[0, 0.25, 0.5, 0.75, 1], ylim=(0, 1))

    # In words that another machine, which trains a slightly different model, would also find.
    worst = max(_starving(shares[:, point]) for point in range((points + 1) // 2))
    first = "more than one expert in ten" if worst > 0.1 else "hardly any expert"
    starving = _starving(_shares(load[-_LAST:]))
    last = "more than one in five" if starving > 0.2 else "hardly any" if starving < 0.1 else "some"
    alt = f"""Stacked areas for {layers} layers: the share of the choices that each of {experts} experts receives over
        {len(log)} training steps. {title}: at some point of the first half {first} gets less than a quarter of a fair
        share, at the end {last}."""
    places = {"layer": range(layers), "step": steps, "expert": range(experts)}
    return drawn, cell_columns(places, share=shares.numpy()), alt


def _shares(load: Tensor) -> Tensor:
    """[steps, L, E] counts -> [L, E], the part of all choices that each expert received."""
    return load.sum(0) / load.sum((0, -1))[:, None]


def _starving(shares: Tensor) -> float:
    """The part of all experts that get less than `STARVING` of a fair share; shares [L, E]."""
    return (shares * shares.shape[-1] < STARVING).double().mean().item()


def collapsed_routers(number: int) -> list[RouterOutput]:
    """`number` routers over as many experts, K = 1: router i sends each of six tokens to expert i, with a probability
    close to 1."""
    return [route_topk(row.repeat(6, 1), 1) for row in 8.0 * torch.eye(number, dtype=torch.float64)]


@figure(routers=lambda: {"layer": collapsed_routers(2), "sequence": collapsed_routers(4)})
def hidden_by_averaging(routers: Mapping[str, Sequence[RouterOutput]]) -> Drawing:
    """The load and the balance loss of several layers, or sequences, and of all their tokens together.

    Of each kind it takes some router outputs with as many experts, one a layer or a sequence. Those shipped use one
    expert each: two layers, and four sequences, whose averages look balanced.
    Data: kind ("layer" or "sequence"), row (a number, or "average"), expert, share (of the choices), loss (of the row).
    """
    drawn, panels = new_panels(2.9, 1, len(routers))
    rows, findings = [], []
    for axes, (kind, outputs) in zip(panels, routers.items(), strict=True):
        together = RouterOutput(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))
        experts, names = together.logits.shape[-1], [*map(str, range(len(outputs))), "average"]
        loads = [expert_load(output.indices, experts).double() for output in (*outputs, together)]
        shares = torch.stack([load / load.sum() for load in loads]).numpy()
        losses = [load_balancing_loss([output]).item() for output in (*outputs, together)]
        heatmap(axes, shares, "g", rows=names, size=11)
        axes.axhline(len(outputs) - 0.5, color="white", linewidth=5)
        axes.set(title=f"{len(outputs)} {kind}s and their average", xlabel="expert", ylabel=kind)
        label_right(axes, range(len(losses)), [f"{loss:.1f}" for loss in losses], "balance loss")
        rows += [(kind, names[row], expert, share, losses[row]) for (row, expert), share in np.ndenumerate(shares)]
        of_each = f"{len(outputs)} {kind}s have a balance loss of {span(losses[:-1], 1)}"
        findings.append(f"{of_each}, their average {losses[-1]:.1f}")
    alt = f"Tables of the share of tokens that each expert gets. {'; '.join(findings)}."
    return drawn, columns(("kind", "row", "expert", "share", "loss"), rows), alt


@figure(runs=partial(read_runs, BALANCED_BY, "train", "final"))
def price_of_balance(runs: Mapping[str, tuple[Table, Table]]) -> Drawing:
    """How uneven the load is at the end of training, and the held-out loss: without balancing, by a loss, by a bias.

    The bias goes with scores by sigmoid, as in DeepSeek-V3, so the loss is there with both kinds of scores.

    Data: balanced_by, seed, max_violation (of a step and layer; mean over layers and the last 100 steps), together
    (MaxVio of a layer's load summed over these steps; mean over layers), starving (the share of the experts that get
    less than `STARVING` of a fair share of these steps' choices), nats (held-out loss per token, mean over domains).
    Drawn of what balanced each run -> its tables "train" and "final", as `read_run` returns them; of equal seeds.
    """
    seeds = np.unique([final["seed"] for _, final in runs.values()])
    ends = np.array([[_end_of_run(*tables, seed) for seed in seeds] for tables in runs.values()])  # [runs, seeds, 4]
    by_run = dict(zip(("max_violation", "together", "starving", "nats"), ends.transpose(2, 0, 1), strict=True))
    titles = {"max_violation": "Uneven in one step", "together": "Over 100 steps", "nats": "Held-out loss"}
    drawn, panels = new_panels(3.6, 1, 3)
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for seed, values, style in zip(seeds, by_run[name].T, SERIES, strict=False):
            axes.plot(list(runs), values, label=f"seed {seed}", **style)
        axes.set(title=title, xlabel="balanced by", ylabel="nats per token", xmargin=0.15)
        axes.set_xticks(range(len(runs)), runs, rotation=35, ha="right", rotation_mode="anchor")
    for axes in panels[:2]:
        axes.set(ylabel="MaxVio (0: balanced)", ylim=(0, 2), yticks=[0, 0.5, 1, 1.5, 2])
    panels[1].legend(loc="upper right", handlelength=1.8)
    parts = [
        f"balanced by {name}, MaxVio is {span(violation)} in one step and {span(together)} over 100 steps, "
        f"{starving.mean():.0%} of the experts starve, and the held-out loss is {span(nats, 3)}"
        for name, violation, together, starving, nats in zip(runs, *by_run.values(), strict=True)
    ]
    orders = np.unique(by_run["nats"].argsort(1), axis=0)
    alt = f"""Three plots, a line for each of {len(seeds)} seeds; those of the held-out loss
        {"do not cross" if len(orders) == 1 else "cross"}: {"; ".join(parts)} nats per token."""
    return drawn, cell_columns({"balanced_by": runs, "seed": seeds}, **by_run), alt


def _end_of_run(train: Table, final: Table, seed: int) -> tuple[float, float, float, float]:
    """Of one seed what `price_of_balance` shows."""
    last = {column: values[-10:].mean() for column, values in where(train, seed=seed).items()}  # rows of 10 steps
    violation = [value for column, value in last.items() if column.startswith("max_violation")]
    shares = np.reshape([value for column, value in last.items() if column.startswith("load")], (len(violation), -1))
    fair = shares / shares.mean(1, keepdims=True)  # [layers, experts]; 1: a fair share
    nats = where(final, seed=seed)["nats"].mean()
    return np.mean(violation), fair.max(1).mean() - 1, (fair < STARVING).mean(), nats


@figure()
def device_simulator(experts: int = 64, k: int = 8, devices: int = 8, skew: float = 1.0, tokens: int = 1024) -> Drawing:
    """Top-k against MoGE with experts on devices: who works how long, and how much probability the choice keeps.

    Data: rule, what ("work of device", "time at skew", "probability kept at skew"), x (the device, or the skew), value
    (work and time in units of perfect balance). Raises what `place_experts` raises.
    """
    here = place_experts(experts, k, devices, skew, tokens)
    by_skew = [place_experts(experts, k, devices, each, tokens) for each in SKEWS]
    lost = 1 - here["MoGE"].kept / here["top-k"].kept
    drawn, (*bars, below_left, below_right) = new_panels(5.6, 2, 2)
    rows = []
    for axes, style, (rule, placed) in zip(bars, SERIES, here.items(), strict=False):
        work = placed.work.numpy()  # [devices, experts on each]
        stacks = {"bottom": (work.cumsum(1) - work).flat, "edgecolor": "white", "linewidth": 1}
        axes.bar(np.indices(work.shape)[0].flat, work.flat, 0.8, color=style["color"], **stacks)
        axes.bar(range(devices), work.sum(1), 0.8, facecolor="none", edgecolor=style["color"])
        axes.axhline(1, color=INK, linestyle="--", linewidth=1)
        axes.set(title=f"{rule}: the step takes {placed.time:.2f}", xlabel="device", xticks=range(devices))
        axes.set_ylim(0, 1.15 * max(each.time for each in here.values()))
        times, kept = zip(*((each[rule].time, each[rule].kept) for each in by_skew), strict=True)
        below_left.plot(SKEWS, times, label=rule, **style)
        below_right.plot(SKEWS, kept, **style)
        rows += [(rule, "work of device", float(device), of_device) for device, of_device in enumerate(work.sum(1))]
        rows += [(rule, "time at skew", *point) for point in zip(SKEWS, times, strict=True)]
        rows += [(rule, "probability kept at skew", *point) for point in zip(SKEWS, kept, strict=True)]
    bars[0].set_ylabel("work (1: perfect balance)")
    for axes in (below_left, below_right):
        axes.axvline(skew, color=QUIET, linestyle=":", linewidth=1)
        axes.set(xlabel="skew of the experts' popularity", ylim=(0, 1))
    below_left.set(title="The slowest device sets the time", ylabel="time (1: perfect balance)")
    below_left.set_ylim(0, 1.1 * max(each["top-k"].time for each in by_skew))
    below_right.set(title=f"MoGE keeps {lost:.0%} less", ylabel="probability of the chosen")
    below_left.legend()
    alt = f"""{tokens} tokens, {k} of {experts} experts each, on {devices} devices, skew {skew:g}. With top-k the
        slowest device needs {here["top-k"].time:.2f} times as long as in perfect balance, with MoGE
        {here["MoGE"].time:.2f} times. The chosen experts hold {here["top-k"].kept:.0%} of the router's probability with
        top-k and {here["MoGE"].kept:.0%} with MoGE, which is {lost:.0%} less. Two plots below show time and probability
        against the skew."""
    return drawn, columns(("rule", "what", "x", "value"), rows), alt
