"""What the experts of a mixture follow, and what each is worth: of a trace, or of tables as `read_run` returns them.

A share of information is that of `mutual_information`: 1 says that the label decides which experts a token goes to.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
from scipy.stats import spearmanr

from minimoe.course.figures.drawing import curve_with_seeds, heatmap, new_pairs, new_panels, note, span
from minimoe.course.figures.register import Drawing, cell_columns, columns, figure
from minimoe.course.runs import PLANTED, Table, pivot, read_run, read_runs, where
from minimoe.course.shipped import held_out_trace
from minimoe.course.style import INK, QUIET, SERIES
from minimoe.inspection import RoutingTrace
from minimoe.inspection.labels import labels
from minimoe.inspection.metrics import domain_specialization
from minimoe.model.config import require

_FOLLOWED = {
    "alone": ("token", "language", "topic"),
    "once the token is known": ("language given token", "topic given token"),
}
_BALANCES = {"loss over the batch": PLANTED[0], "loss in each sequence": PLANTED[1]}


@figure(trace=held_out_trace)
def expert_use(trace: RoutingTrace, label: str = "domain", layer: int = 1) -> Drawing:
    """Share of the tokens of each domain, language or topic that go to each expert, and of all tokens.

    Data: label (the last is "all"), expert, share, chance and low: of the load-aware null, and the lower end of the
    95 % interval; empty for "all". For topics both keep the language fixed.
    Raises ValueError where there is no such layer, or `label` is another one.
    """
    require(layer in range(trace.num_layers), "layer", layer, f"0 to {trace.num_layers - 1}")
    measured = domain_specialization(trace, label, within="language" if label == "topic" else None)
    share, chance, low, _ = (field[layer] for field in measured)
    names = [*labels(trace, label).names, "all"]
    row, expert = np.unravel_index((share - chance).argmax(), share.shape)
    alt = f"""A table of {label} by expert in layer {layer}: how many per cent of the tokens go to the expert. It is
        most above all tokens for {names[row]} and expert {expert}: {share[row, expert]:.0%} against
        {chance[row, expert]:.0%}. Of the {share.size} shares, {(low > chance).sum()} are more than chance."""

    title = f"Layer {layer}: per cent of the tokens that go to an expert"
    drawn, (axes,) = new_panels(0.33 * len(names) + 1.35, title=title)
    nothing = np.full_like(chance[:1], np.nan)
    share, chance, low = (np.vstack(rows) for rows in ((share, chance[:1]), (chance, nothing), (low, nothing)))
    heatmap(axes, 100 * share, "z.0f", rows=names, top=100, bold=low > chance)
    axes.axhline(len(share) - 1.5, color="white", linewidth=5)
    axes.set_xlabel("expert (bold: more than chance)")
    places = {"label": names, "expert": range(trace.num_experts)}
    return drawn, cell_columns(places, share=share, chance=chance, low=low), alt


@figure(table=partial(read_run, PLANTED[0], "specialization"))
def followed_labels(table: Table) -> Drawing:
    """Share of the routing that each label accounts for, by layer, in each trained model; and what chance gives.
    Drawn of the last step of a table "specialization". Data: metric, layer, seed, value, chance."""
    table = where(table, step=table["step"].max())
    drawn, both = new_panels(4.2, 1, 2, sharey=True, title="How much of the routing each label explains")
    styles = dict(zip(_FOLLOWED["alone"], SERIES, strict=False))
    parts = []
    for axes, (title, metrics) in zip(both, _FOLLOWED.items(), strict=True):
        for metric in metrics:
            here, label = where(table, metric=metric), metric.split()[0]
            value, seeds, layers = pivot(here, "value", "seed", "layer")
            chance, *_ = pivot(here, "null", "seed", "layer")
            curve_with_seeds(axes, layers, value, styles[label], label)
            axes.plot(layers, chance.mean(0), **styles[label] | {"marker": ""}, linewidth=1)
            name = {"xy": (layers[1], value.mean(0)[1]), "xytext": (0, 7), "color": styles[label]["color"]}
            axes.annotate(label, **name, textcoords="offset points", ha="center", va="bottom", weight="bold")
            parts.append(f"{metric} {span(value, 4)}, chance up to {chance.max():.4f}")
        axes.set(title=title, xticks=layers, xlabel="layer", yscale="log", ylim=(5e-5, 1))
    both[0].set_ylabel("share of the routing information")
    key = "large marks: mean of the models\nsmall dots: each model\nthin lines: chance"
    both[1].text(0.05, 0.05, key, transform=both[1].transAxes, color=QUIET, size=10, linespacing=1.5)
    alt = f"Curves over {len(layers)} layers, of {len(seeds)} trained models. Share of the routing: {'; '.join(parts)}."
    shown = np.isin(table["metric"], sum(_FOLLOWED.values(), ()))
    cells = zip(*(table[name][shown] for name in ("metric", "layer", "seed", "value", "null")), strict=True)
    return drawn, columns(("metric", "layer", "seed", "value", "chance"), cells), alt


@figure(table=partial(read_run, PLANTED[0], "specialization"))
def routing_over_training(table: Table) -> Drawing:
    """While a mixture trains: how many choices are already the final ones, and what the routers follow.
    Drawn of a table "specialization". Data: metric, step, layer, value, chance (means over the seeds)."""
    followed = ("token", "language", "topic")
    layers, steps = (np.unique(table[name]) for name in ("layer", "step"))
    means = {
        metric: [pivot(where(table, metric=metric), of, "seed", "layer", "step")[0].mean(0) for of in ("value", "null")]
        for metric in ("saturation", *followed)
    }  # value and chance, each [layers, steps]; no saturation at the last step
    saturation, chance = means["saturation"]
    drawn, (left, right) = new_panels(3.9, 1, 2)
    for layer, curve, style in zip(layers, saturation, SERIES, strict=False):
        left.plot(curve, **style, label=f"layer {layer}")
    left.plot(chance[-1], color=QUIET, linewidth=0.8)
    left.text(len(steps) - 2, chance[-1, -1] - 0.02, "chance", color=QUIET, size=10, ha="right", va="top")
    left.set(title="already as at the end", ylabel="share of the final choices")
    parts = []
    for metric, style in zip(followed, SERIES, strict=False):
        share = means[metric][0].mean(0)
        right.plot(share, **style, label=metric)
        parts.append(f"{metric} {share[0]:.2f} at the start, {share.max():.2f} at most, {share[-1]:.2f} at the end")
    right.set(title="what the routers follow", ylabel="share of the routing information")
    for axes, shown, corner in ((left, steps[:-1], "upper left"), (right, steps, "upper right")):
        axes.set(ylim=(0, 1), xlabel="training step")
        axes.set_xticks(range(len(shown)), shown, size=10)
        axes.legend(loc=corner)
    last = ", ".join(f"{share:.2f}" for share in saturation[:, -1])
    alt = f"""Two plots over the training step, means of several trainings. Left: share of the final choices already
        made, by layer; at step {steps[-2]} it is {last}. Right: share of the routing information, mean over the layers:
        {"; ".join(parts)}."""
    rows = [
        (metric, steps[step], layers[layer], value[layer, step], chance[layer, step])
        for metric, (value, chance) in means.items()
        for layer, step in np.ndindex(value.shape)
    ]
    return drawn, columns(("metric", "step", "layer", "value", "chance"), rows), alt


@figure(runs=partial(read_runs, _BALANCES, "specialization", "final"))
def batch_or_sequence(runs: Mapping[str, tuple[Table, Table]]) -> Drawing:
    """What language accounts for, and the loss, when the balance loss looks at the batch or at each sequence.

    Drawn of what the balance loss is -> its tables "specialization" and "final", of equal seeds; the last step counts.
    Data: balance, measure ("language" by layer, or "loss": nats per token, mean over the domains), layer, seed, value.
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
    left.set(title="what language tells", ylabel="share of the routing information", ylim=(0, 0.25))
    left.set(xlabel="layer", xticks=layers)
    left.legend(loc="upper right")
    right.plot(range(len(losses)), losses, color=QUIET, linewidth=0.8, zorder=0)
    for seed, loss in zip(seeds, losses[-1], strict=True):
        note(right, f"seed {seed}", (place, loss), 8)
    right.set(title="what it costs", xlim=(-0.3, place + 0.9), ylabel="held-out nats per token")
    right.set_xticks(range(len(runs)), [balance.split()[-1] for balance in runs])
    right.locator_params(axis="y", nbins=5)
    alt = f"Left: curves over the layers, right: losses; {len(seeds)} trainings each. {'; '.join(parts)}."
    return drawn, columns(("balance", "measure", "layer", "seed", "value"), rows), alt


@figure(table=partial(read_run, PLANTED[0], "ablation"))
def ablation_map(table: Table, seed: int = 0) -> Drawing:
    """What each group of domains loses when one expert is removed, for every expert of a trained model.

    Drawn of a table "ablation". Data: layer, group, expert, nats (per token).
    Raises ValueError where no model was trained with this seed.
    """
    require(seed in table["seed"], "seed", seed, f"one of {', '.join(map(str, np.unique(table['seed'])))}")
    nats, layers, groups, experts = pivot(where(table, seed=seed), "nats", "layer", "group", "expert")
    texts = {"title": "Loss added, in hundredths of a nat per token", "xlabel": "expert that is removed"}
    drawn, panels = new_pairs(len(layers), 2.5, **texts)
    parts = []
    for values, layer, axes in zip(nats, layers, panels, strict=True):
        heatmap(axes, 100 * values, "z.0f", rows=groups, columns=experts, top=100 * values.max())
        axes.set_title(f"layer {layer}")
        group, expert = np.unravel_index(values.argmax(), values.shape)
        parts.append(f"layer {layer} up to {values.max():.2f} ({groups[group]}, expert {experts[expert]})")
    alt = f"""{len(layers)} tables, one a layer, of {len(groups)} groups of domains by {len(experts)} experts: nats per
        token that removing the expert adds. {"; ".join(parts)}. Each layer has its own shades."""
    return drawn, cell_columns({"layer": layers, "group": groups, "expert": experts}, nats=nats), alt


def use_and_worth(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """The share of a group's tokens that go to an expert, and the nats per token that the group loses without it, both
    [seeds, L, E, groups], of a table "ablation"."""
    share, nats = (pivot(table, column, "seed", "layer", "expert", "group")[0] for column in ("share", "nats"))
    return share, nats


@figure(table=partial(read_run, PLANTED[0], "ablation"))
def load_and_worth(table: Table) -> Drawing:
    """How much an expert is used against what its removal costs, a panel each layer: over all text, and within one
    group of domains. Drawn of a table "ablation". Data: view ("expert" or "expert and group"), seed, layer, share,
    nats."""
    share, nats = use_and_worth(table)
    views = {"expert": (share.mean(-1), nats.mean(-1)), "expert and group": (share, nats)}
    looks = {
        "expert": {"label": "an expert, mean of the groups", "color": INK, "marker": "D"},
        "expert and group": {"label": "an expert in one group", **SERIES[1], "marker": "o", "fillstyle": "none"},
    }
    texts = {"xlabel": "share of the tokens that go to the expert", "ylabel": "nats lost without it (at least 0.001)"}
    drawn, panels = new_pairs(share.shape[1], 2.3, 0.6, **texts)
    rows = []
    for view, (x, y) in reversed(views.items()):
        for layer, axes in enumerate(panels):
            look = {**looks[view], "linestyle": "", "markersize": 4}
            axes.plot(x[:, layer].ravel(), y[:, layer].clip(1e-3).ravel(), **look)
            axes.set(title=f"layer {layer}", yscale="log", xlim=(0, 1))
        rows = [(view, *place[:2], x[place], y[place]) for place in np.ndindex(x.shape)] + rows
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    overall = rank_correlations(share.mean(-1), nats.mean(-1)).mean()
    within = np.mean([rank_correlations(share[..., group], nats[..., group]) for group in range(share.shape[-1])])
    alt = f"""Scatter plots, one a layer, of the loss that removing an expert adds against its share of the tokens.
        Mean rank correlation within a layer of a model: over all text {overall:.2f}, within one group of domains
        {within:.2f}."""
    return drawn, columns(("view", "seed", "layer", "share", "nats"), rows), alt


def rank_correlations(share: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation in each layer of each model, [seeds, L], of two arrays [seeds, L, ...]."""
    models = share.shape[:2]
    found = [spearmanr(share[place], nats[place], axis=None).statistic for place in np.ndindex(models)]
    return np.reshape(found, models)
