"""What the experts of a mixture follow, and what each is worth: a trace, or the tables of data/runs.

Experts and layers count from 0, as in the code. A share of information is that of `mutual_information`: 1 says that the
label decides which experts a token meets.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from minimoe.course.figures.drawing import (
    check_layer,
    curve_with_seeds,
    heatmap,
    new_pairs,
    new_panels,
    set_panel_title,
    set_title,
    span,
)
from minimoe.course.figures.register import Drawing, cell_columns, columns, figure
from minimoe.course.runs import PLANTED, Table, pivot, read_run, where
from minimoe.course.shipped import held_out_trace
from minimoe.course.style import QUIET, SERIES, describe
from minimoe.inspection import RoutingTrace
from minimoe.inspection.labels import labels
from minimoe.inspection.metrics import domain_specialization


@figure(trace=held_out_trace)
def expert_use(trace: RoutingTrace, label: str = "domain", layer: int = 1) -> Drawing:
    """Share of the tokens of each domain, language or topic that meet each expert, and of all tokens.

    Data: label (the last is "all"), expert, share, chance and low: of the load-aware null, and the lower end of the
    95 % interval; empty for "all". For topics both keep the language fixed.

    Raises:
        ValueError: there is no such layer, or `label` is another one.
    """
    check_layer(layer, trace.num_layers)
    measured = domain_specialization(trace, label, within="language" if label == "topic" else None)
    share, chance, low, _ = (field[layer] for field in measured)
    names = labels(trace, label).names
    above = low > chance

    drawn, (axes,) = new_panels(0.33 * len(names) + 1.68)
    share_and_all = np.vstack([share, chance[:1]])
    bold = np.vstack([above, np.zeros_like(above[:1])])
    heatmap(axes, 100 * share_and_all, "z.0f", rows=[*names, "all"], top=100, bold=bold)
    axes.axhline(len(share) - 0.5, color="white", linewidth=5)
    axes.set_xlabel("expert (bold: more than chance)")
    set_title(drawn, f"Layer {layer}: per cent of the tokens that meet an expert")

    row, expert = np.unravel_index((share - chance).argmax(), share.shape)
    describe(
        drawn,
        f"A table of {label} by expert in layer {layer}: how many per cent of the tokens meet the expert. It is most "
        f"above all tokens for {names[row]} and expert {expert}: {share[row, expert]:.0%} against "
        f"{chance[row, expert]:.0%}. Of the {share.size} shares, {above.sum()} are more than chance.",
    )
    chance, low = (np.vstack([values, np.full_like(values[:1], np.nan)]) for values in (chance, low))
    places = {"label": [*names, "all"], "expert": range(trace.num_experts)}
    return drawn, cell_columns(places, share=share_and_all, chance=chance, low=low)


_FOLLOWED = {
    "alone": ("token", "language", "topic", "position"),
    "once the token is known": ("language given token", "topic given token"),
}


@figure(table=partial(read_run, PLANTED[0], "specialization"))
def followed_labels(table: Table) -> Drawing:
    """Share of the routing that each label accounts for, by layer, in each trained model; and what chance gives.

    Data: metric, layer, seed, value, chance.

    Args:
        table: "specialization", as `read_run` returns it; its last step is drawn.
    """
    table = where(table, step=table["step"].max())
    drawn, both = new_panels(4.2, 1, 2, sharey=True)
    styles = dict(zip(_FOLLOWED["alone"], SERIES, strict=False))
    parts = []
    for axes, (title, metrics) in zip(both, _FOLLOWED.items(), strict=True):
        for metric in metrics:
            here, label = where(table, metric=metric), metric.split()[0]
            value, seeds, layers = pivot(here, "value", "seed", "layer")
            chance, *_ = pivot(here, "null", "seed", "layer")
            curve_with_seeds(axes, layers, value, styles[label], label)
            axes.plot(layers, chance.mean(0), **styles[label] | {"marker": ""}, linewidth=1)
            parts.append(f"{metric} {span(value, 4)}, chance up to {chance.max():.4f}")
        axes.set(xticks=layers, xlabel="layer", yscale="log", ylim=(5e-5, 1))
        set_panel_title(axes, title, size=12)
    both[0].set_ylabel("share of the routing information")
    both[1].legend(*both[0].get_legend_handles_labels(), frameon=False, fontsize=10, loc=(0.02, 0.12))
    both[1].text(0.05, 0.04, "no markers: chance", transform=both[1].transAxes, color=QUIET, size=10)
    set_title(drawn, "What tells which experts a token meets")
    describe(
        drawn,
        f"Curves over {len(layers)} layers, of {len(seeds)} trained models. Share of the routing: {'; '.join(parts)}.",
    )
    shown = np.isin(table["metric"], sum(_FOLLOWED.values(), ()))
    cells = zip(*(table[name][shown] for name in ("metric", "layer", "seed", "value", "null")), strict=True)
    return drawn, columns(("metric", "layer", "seed", "value", "chance"), cells)


@figure(table=partial(read_run, PLANTED[0], "specialization"))
def routing_over_training(table: Table) -> Drawing:
    """While a mixture trains: how many choices are already the final ones, and what the routers follow.

    Data: metric, step, layer, value, chance (means over the seeds).

    Args:
        table: "specialization", as `read_run` returns it.
    """
    followed = ("token", "language", "topic")
    means = {
        metric: [pivot(where(table, metric=metric), of, "seed", "layer", "step")[0].mean(0) for of in ("value", "null")]
        for metric in ("saturation", *followed)
    }  # value and chance, each [layers, steps]; no saturation at the last step
    layers, steps = (np.unique(table[name]) for name in ("layer", "step"))
    drawn, (left, right) = new_panels(3.9, 1, 2)
    saturation, chance = means["saturation"]
    for layer, curve, style in zip(layers, saturation, SERIES, strict=False):
        left.plot(curve, **style, label=f"layer {layer}")
    left.plot(chance[-1], color=QUIET, linewidth=0.8)
    left.text(len(steps) - 2, chance[-1, -1] - 0.02, "chance", color=QUIET, size=10, ha="right", va="top")
    _finish_panel(left, "already as at the end", "share of the final choices", steps[:-1], "upper left")
    parts = []
    for metric, style in zip(followed, SERIES, strict=False):
        share = means[metric][0].mean(0)
        right.plot(share, **style, label=metric)
        parts.append(f"{metric} {share[0]:.2f} at the start, {share.max():.2f} at most, {share[-1]:.2f} at the end")
    _finish_panel(right, "what the routers follow", "share of the routing information", steps, "upper right")
    describe(
        drawn,
        "Two plots over the training step, means of several trainings. Left: share of the final choices already made, "
        f"by layer; at step {steps[-2]} it is {', '.join(f'{share:.2f}' for share in saturation[:, -1])}. Right: share "
        f"of the routing information, mean over the layers: {'; '.join(parts)}.",
    )
    rows = [
        (metric, steps[step], layers[layer], value[layer, step], chance[layer, step])
        for metric, (value, chance) in means.items()
        for layer, step in np.ndindex(value.shape)
    ]
    return drawn, columns(("metric", "step", "layer", "value", "chance"), rows)


def _finish_panel(axes: Axes, title: str, label: str, steps: np.ndarray, corner: str) -> None:
    axes.set(ylim=(0, 1), ylabel=label, xlabel="training step")
    axes.set_xticks(range(len(steps)), steps, size=10)
    axes.legend(frameon=False, fontsize=10, loc=corner)
    set_panel_title(axes, title, size=12)


def _both_balances() -> dict[str, tuple[Table, Table]]:
    names = dict(zip(("loss over the batch", "loss in each sequence"), PLANTED, strict=True))
    return {balance: (read_run(name, "specialization"), read_run(name, "final")) for balance, name in names.items()}


@figure(runs=_both_balances)
def batch_or_sequence(runs: Mapping[str, tuple[Table, Table]]) -> Drawing:
    """What language accounts for, and the loss, when the balance loss looks at the batch or at each sequence.

    Data: balance, measure ("language" by layer, or "loss": nats per token, mean over the domains), layer, seed, value.

    Args:
        runs: what the balance loss is -> the tables "specialization" and "final" of the run, as `read_run` returns
            them, with the same seeds; their last step is drawn.
    """
    drawn, (left, right) = new_panels(3.9, 1, 2, width_ratios=[1.6, 1])
    rows, parts, losses = [], [], []
    for place, (style, (balance, (followed, final))) in enumerate(zip(SERIES, runs.items(), strict=False)):
        last = where(followed, metric="language", step=followed["step"].max())
        value, seeds, layers = pivot(last, "value", "seed", "layer")
        nats = pivot(final, "nats", "seed", "domain")[0].mean(1)
        curve_with_seeds(left, layers, value, style, balance)
        right.plot(np.full(len(nats), place), nats, **style | {"linestyle": ""})
        for seed, of_layers, loss in zip(seeds, value, nats, strict=True):
            rows += [(balance, "language", layer, seed, share) for layer, share in zip(layers, of_layers, strict=True)]
            rows.append((balance, "loss", None, seed, loss))
        parts.append(f"{balance}: language {span(value, 3)}, loss {span(nats)} nats")
        losses.append(nats)
    left.set(xticks=layers, xlabel="layer", ylabel="share of the routing information", ylim=(0, 0.25))
    set_panel_title(left, "what language tells", size=12)
    left.legend(frameon=False, fontsize=10, loc="upper right")
    right.plot(range(len(losses)), losses, color=QUIET, linewidth=0.8, zorder=0)
    for seed, loss in zip(seeds, losses[-1], strict=True):
        right.annotate(f"seed {seed}", (place, loss), (8, 0), textcoords="offset points", va="center", size=10)
    right.set(xlim=(-0.3, place + 0.9), ylabel="held-out nats per token")
    right.set_xticks(range(len(runs)), [balance.split()[-1] for balance in runs])
    right.locator_params(axis="y", nbins=5)
    set_panel_title(right, "what it costs", size=12)
    describe(drawn, f"Left: curves over the layers, right: losses; {len(seeds)} trainings each. {'; '.join(parts)}.")
    return drawn, columns(("balance", "measure", "layer", "seed", "value"), rows)


@figure(table=partial(read_run, PLANTED[0], "ablation"))
def ablation_map(table: Table, seed: int = 0) -> Drawing:
    """What each group of domains loses when one expert is removed, for every expert of a trained model.

    Data: layer, group, expert, nats (per token).

    Args:
        table: "ablation", as `read_run` returns it.
        seed: of the model.

    Raises:
        ValueError: no model was trained with this seed.
    """
    seeds = np.unique(table["seed"]).tolist()
    if seed not in seeds:
        raise ValueError(f"seed={seed}: wanted one of {', '.join(map(str, seeds))}")
    nats, layers, groups, experts = pivot(where(table, seed=seed), "nats", "layer", "group", "expert")
    drawn, panels = new_pairs(len(layers), 2.5)
    parts = []
    for values, layer, axes in zip(nats, layers, panels, strict=True):
        heatmap(axes, 100 * values, "z.0f", rows=groups, columns=experts, top=100 * values.max())
        set_panel_title(axes, f"layer {layer}", size=12)
        group, expert = np.unravel_index(values.argmax(), values.shape)
        parts.append(f"layer {layer} up to {values.max():.2f} ({groups[group]}, expert {experts[expert]})")
    drawn.supxlabel("expert that is removed", size=11)
    set_title(drawn, "Loss added, in hundredths of a nat per token")
    describe(
        drawn,
        f"{len(layers)} tables, one a layer, of {len(groups)} groups of domains by {len(experts)} experts: nats per "
        f"token that removing the expert adds. {'; '.join(parts)}. Each layer has its own shades.",
    )
    return drawn, cell_columns({"layer": layers, "group": groups, "expert": experts}, nats=nats)


def use_and_worth(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """The share of a group's tokens that meet an expert, and the nats per token that the group loses without it, both
    [seeds, L, E, groups], of a table "ablation"."""
    share, nats = (pivot(table, column, "seed", "layer", "expert", "group")[0] for column in ("share", "nats"))
    return share, nats


@figure(table=partial(read_run, PLANTED[0], "ablation"))
def load_and_worth(table: Table) -> Drawing:
    """How much an expert is used against what its removal costs: over all text, and within one group of domains.

    Data: view ("expert" or "expert and group"), seed, layer, share, nats.

    Args:
        table: "ablation", as `read_run` returns it.
    """
    share, nats = use_and_worth(table)
    views = {"expert": (share.mean(-1), nats.mean(-1)), "expert and group": (share, nats)}
    drawn, both = new_panels(4.0, 1, 2, sharey=True)
    rows = []
    for axes, (view, (x, y)) in zip(both, views.items(), strict=True):
        for layer, style in zip(range(x.shape[1]), SERIES, strict=False):
            points = x[:, layer].flatten(), y[:, layer].clip(1e-3).flatten()
            axes.plot(*points, **style | {"linestyle": ""}, markersize=4, label=f"layer {layer}")
        rows += [(view, *place[:2], x[place], y[place]) for place in np.ndindex(x.shape)]
        axes.set(xlabel="share of the tokens that meet it", yscale="log", xlim=(0, None))
    both[0].set_ylabel("nats lost without it (log; at least 0.001)")
    set_panel_title(both[0], "each expert, all groups alike", size=12)
    set_panel_title(both[1], "each expert in each group", size=12)
    both[0].legend(frameon=False, fontsize=10, loc=(0, 0.43), handletextpad=0.1)
    overall = rank_correlations(share.mean(-1), nats.mean(-1))
    within = np.stack([rank_correlations(share[..., group], nats[..., group]) for group in range(share.shape[-1])])
    describe(
        drawn,
        "Two scatter plots of the loss that removing an expert adds against the share of the tokens that meet it. Mean "
        f"rank correlation within a layer of a model: over all text {overall.mean():.2f}, within one group of domains "
        f"{within.mean():.2f}.",
    )
    return drawn, columns(("view", "seed", "layer", "share", "nats"), rows)


def rank_correlations(share: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation in each layer of each model, [seeds, L], of two arrays [seeds, L, ...]."""
    from scipy.stats import spearmanr

    models = share.shape[:2]
    found = [spearmanr(share[place], nats[place], axis=None).statistic for place in np.ndindex(models)]
    return np.reshape(found, models)
