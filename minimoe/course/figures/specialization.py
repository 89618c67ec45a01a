"""What the experts of the planted models follow: the shipped one live, all of them from the tables of data/runs.

Experts and layers count from 0, as in the code. A share of information is that of `mutual_information`: 1 says that the
label decides which experts a token meets.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from minimoe.course.figures.register import Drawing, figure
from minimoe.course.measurements import NAMES, record
from minimoe.course.runs import read_run, where
from minimoe.course.style import INK, MAIN, QUIET, SERIES, describe, new_figure
from minimoe.data_files import data_path
from minimoe.inspection import RoutingTrace
from minimoe.inspection import metrics as sp
from minimoe.model import MoEForCausalLM
from minimoe.training.corpus import Corpus

_FILL = LinearSegmentedColormap.from_list("white to main", ["white", MAIN])
_BALANCE = dict(zip(NAMES, ("loss over the batch", "loss in each sequence"), strict=True))


@cache
def _trace() -> RoutingTrace:
    """How the shipped mixture that was trained on the planted corpus routes held-out text of every domain."""
    model = MoEForCausalLM.from_pretrained(data_path("zoo/moe-planted"), dtype=torch.float32)
    return record(model, Corpus.planted())


# --- who meets whom ---------------------------------------------------------------------------------------


@figure
def expert_use(label: str = "domain", layer: int = 1) -> Drawing:
    """Share of the tokens of each domain, language or topic that meet each expert, and of all tokens.

    Data: label (the last is "all"), expert, share, chance and low: of the load-aware null, and the lower end of the
    95 % interval; empty for "all". For topics both keep the language fixed.

    Raises:
        ValueError: there is no such layer, or `label` is another one.
    """
    trace = _trace()
    if layer not in range(trace.num_layers):
        raise ValueError(f"layer={layer}: wanted 0 to {trace.num_layers - 1}")
    share, chance, low, _ = (field[layer] for field in _expert_use(label))
    names = [*sp.labels(trace, label).names, "all"]
    drawn = new_figure(0.33 * len(names) + 1.35)
    axes = drawn.subplots()
    everything = chance[:1]
    _cells(axes, np.concatenate([share, everything]), above=np.concatenate([low > chance, everything < 0]))
    axes.axhline(len(share) - 0.5, color="white", linewidth=5)
    axes.set(yticks=range(len(names)), yticklabels=names, xticks=range(trace.num_experts))
    axes.set_xlabel("expert (bold: more than chance)")
    drawn.suptitle(
        f"Layer {layer}: per cent of the tokens that meet an expert", x=0.01, ha="left", size=12, weight="bold"
    )
    row, expert = np.unravel_index((share - chance).argmax(), share.shape)
    describe(
        drawn,
        f"A table of {label} by expert in layer {layer}: how many per cent of the tokens meet the expert. It is most "
        f"above all tokens for {names[row]} and expert {expert}: {share[row, expert]:.0%} against "
        f"{chance[row, expert]:.0%}. Of the {share.size} shares, {(low > chance).sum()} are more than chance.",
    )
    rows, experts = np.indices((len(names), trace.num_experts))
    return drawn, {
        "label": [names[row] for row in rows.flat],
        "expert": experts.flatten().tolist(),
        "share": np.concatenate([share, everything]).flatten().tolist(),
        "chance": [*chance.flatten().tolist(), *[""] * trace.num_experts],
        "low": [*low.flatten().tolist(), *[""] * trace.num_experts],
    }


@cache
def _expert_use(label: str) -> sp.Measured:
    return sp.domain_specialization(_trace(), label, within="language" if label == "topic" else None)


def _cells(axes: Axes, values: np.ndarray, above: np.ndarray | None = None, largest: float = 1.0) -> None:
    """A heat map of `values` [rows, columns] with every number written, in hundredths; bold where `above`."""
    axes.imshow(values, cmap=_FILL, vmin=0, vmax=largest, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        bold = above is not None and above[row, column]
        axes.text(
            column,
            row,
            f"{100 * value:.0f}".replace("-0", "0"),
            ha="center",
            va="center",
            size=10,
            weight="bold" if bold else "normal",
            color="white" if value > 0.9 * largest else INK,
        )
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


# --- what they follow -------------------------------------------------------------------------------------


@figure
def followed_labels() -> Drawing:
    """Share of the routing that each label accounts for, by layer, in three trained models; and what chance gives.

    Data: metric, layer, seed, value, chance.
    """
    table = where(read_run(NAMES[0], "specialization"), step=_last_step())
    panels = {
        "alone": ("token", "language", "topic", "position"),
        "once the token is known": ("language given token", "topic given token"),
    }
    drawn = new_figure(4.2)
    both = drawn.subplots(1, 2, sharey=True)
    styles = dict(zip(panels["alone"], SERIES, strict=False))
    for axes, (title, metrics) in zip(both, panels.items(), strict=True):
        for metric in metrics:
            style = styles[metric.split()[0]]
            layers, value, chance = _by_layer(where(table, metric=metric))
            axes.plot(layers, value.mean(0), **style, label=metric.split()[0])
            axes.plot(np.tile(layers, (len(value), 1)).T, value.T, color=style["color"], marker=".", linestyle="")
            axes.plot(layers, chance.mean(0), color=style["color"], linestyle=style["linestyle"], linewidth=1)
        axes.set(xticks=layers, xlabel="layer", yscale="log", ylim=(5e-5, 1))
        axes.set_title(title, weight="normal")
    both[0].set_ylabel("share of the routing information")
    both[1].legend(*both[0].get_legend_handles_labels(), frameon=False, fontsize=10, loc=(0.02, 0.12))
    both[1].text(0.05, 0.04, "no markers: chance", transform=both[1].transAxes, color=QUIET, size=10)
    drawn.suptitle("What tells which experts a token meets", x=0.01, ha="left", size=12, weight="bold")
    parts = []
    for metrics in panels.values():
        for metric in metrics:
            _, value, chance = _by_layer(where(table, metric=metric))
            parts.append(f"{metric} {value.min():.4f} to {value.max():.4f}, chance up to {chance.max():.4f}")
    describe(drawn, f"Curves over 4 layers, from three trained models. Share of the routing: {'; '.join(parts)}.")
    shown = [row in sum(panels.values(), ()) for row in table["metric"]]
    columns = {"metric": "metric", "layer": "layer", "seed": "seed", "value": "value", "chance": "null"}
    return drawn, {name: table[column][shown].tolist() for name, column in columns.items()}


def _last_step() -> int:
    return int(read_run(NAMES[0], "specialization")["step"].max())


def _by_layer(rows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Layers [L], values and nulls [seeds, L] of one metric at one step."""
    layers, seeds = np.unique(rows["layer"]), np.unique(rows["seed"])
    order = np.lexsort((rows["layer"], rows["seed"]))
    value, null = (rows[column][order].reshape(len(seeds), len(layers)) for column in ("value", "null"))
    return layers, value, null


@figure
def routing_over_training() -> Drawing:
    """While a mixture trains: how many choices are already the final ones, and what the routers follow.

    Data: metric, step, layer, value, chance (means of three trainings).
    """
    table = read_run(NAMES[0], "specialization")
    steps = np.unique(table["step"])
    drawn = new_figure(3.9)
    left, right = drawn.subplots(1, 2)
    data: dict[str, list] = {name: [] for name in ("metric", "step", "layer", "value", "chance")}

    def curve(metric: str, layer: int) -> np.ndarray:
        rows = where(table, metric=metric, layer=layer)
        there = [step for step in steps if step in rows["step"]]
        means = [[rows[column][rows["step"] == step].mean() for step in there] for column in ("value", "null")]
        for step, value, chance in zip(there, *means, strict=True):
            for name, cell in zip(data, (metric, int(step), layer, float(value), float(chance)), strict=True):
                data[name].append(cell)
        return np.array(means)

    for layer, style in zip(np.unique(table["layer"]).tolist(), SERIES, strict=False):
        value, chance = curve("saturation", layer)
        left.plot(range(len(value)), value, **style, label=f"layer {layer}")
    left.plot(range(len(chance)), chance, color=QUIET, linewidth=0.8)
    left.text(len(chance) - 1, chance[-1] - 0.02, "chance", color=QUIET, size=10, ha="right", va="top")
    left.set(ylim=(0, 1), ylabel="share of the final choices")
    left.set_title("already as at the end", weight="normal")
    peaks = {}
    for metric, style in zip(("token", "language", "topic"), SERIES, strict=False):
        value = np.mean([curve(metric, int(layer))[0] for layer in np.unique(table["layer"])], axis=0)
        right.plot(range(len(steps)), value, **style, label=metric)
        peaks[metric] = f"{metric} {value[0]:.2f} at the start, {value.max():.2f} at most, {value[-1]:.2f} at the end"
    right.set(ylim=(0, 1), ylabel="share of the routing information")
    right.set_title("what the routers follow", weight="normal")
    for axes, until, corner in ((left, len(steps) - 1, "upper left"), (right, len(steps), "upper right")):
        axes.set(xticks=range(until), xlabel="training step")
        axes.set_xticklabels(steps[:until], size=10)
        axes.legend(frameon=False, fontsize=10, loc=corner)
    final = ", ".join(
        f"{v:.2f}"
        for m, s, v in zip(data["metric"], data["step"], data["value"], strict=True)
        if m == "saturation" and s == steps[-2]
    )
    describe(
        drawn,
        f"Two plots over the training step, means of three trainings. Left: share of the final choices already made, "
        f"by layer; at step {steps[-2]} it is {final}. Right: share of the routing information, mean over the layers: "
        f"{'; '.join(peaks.values())}.",
    )
    return drawn, data


# --- two ways to balance ----------------------------------------------------------------------------------


@figure
def batch_or_sequence() -> Drawing:
    """What language accounts for, and the loss, when the balance loss looks at the batch or at each sequence.

    Data: balance, measure ("language" by layer, or "loss": nats per token, mean over the domains), layer, seed, value.
    """
    drawn = new_figure(3.9)
    left, right = drawn.subplots(1, 2, width_ratios=[1.6, 1])
    data: dict[str, list] = {name: [] for name in ("balance", "measure", "layer", "seed", "value")}
    parts = []
    of_seed: list[np.ndarray] = []
    for place, (name, style) in enumerate(zip(NAMES, SERIES, strict=False)):
        table = where(read_run(name, "specialization"), step=_last_step(), metric="language")
        layers, value, _ = _by_layer(table)
        left.plot(layers, value.mean(0), **style, label=_BALANCE[name])
        left.plot(np.tile(layers, (len(value), 1)).T, value.T, color=style["color"], marker=".", linestyle="")
        final = read_run(name, "final")
        seeds = np.unique(final["seed"])
        losses = np.array([where(final, seed=seed)["nats"].mean() for seed in seeds])
        of_seed.append(losses)
        right.plot(np.full(len(losses), place), losses, color=style["color"], marker=style["marker"], linestyle="")
        for seed, of_layers, loss in zip(seeds.tolist(), value.tolist(), losses.tolist(), strict=True):
            for layer, share in enumerate(of_layers):
                _append(data, _BALANCE[name], "language", layer, seed, share)
            _append(data, _BALANCE[name], "loss", "", seed, loss)
        parts.append(
            f"{_BALANCE[name]}: language {value.min():.3f} to {value.max():.3f}, loss {losses.min():.2f} to "
            f"{losses.max():.2f} nats"
        )
    left.set(xticks=layers, xlabel="layer", ylabel="share of the routing information", ylim=(0, 0.25))
    left.set_title("what language tells", weight="normal")
    left.legend(frameon=False, fontsize=10, loc="upper right")
    right.plot([0, 1], of_seed, color=QUIET, linewidth=0.8, zorder=0)
    for seed, loss in zip(seeds, of_seed[1], strict=True):
        right.annotate(f"seed {seed}", (1, loss), (8, 0), textcoords="offset points", va="center", size=10)
    right.set(xticks=[0, 1], xlim=(-0.3, 1.9), ylabel="held-out nats per token")
    right.locator_params(axis="y", nbins=5)
    right.set_xticklabels(["batch", "sequence"])
    right.set_title("what it costs", weight="normal")
    describe(drawn, f"Left: curves over the layers, right: losses; three trainings each. {'; '.join(parts)}.")
    return drawn, data


def _append(data: dict[str, list], *row: object) -> None:
    for column, cell in zip(data.values(), row, strict=True):
        column.append(cell)


# --- what an expert is worth ------------------------------------------------------------------------------


@figure
def ablation_map(seed: int = 0) -> Drawing:
    """What each group of domains loses when one expert is removed, for every expert of a trained model.

    Data: layer, group, expert, nats (per token).

    Raises:
        ValueError: no model was trained with this seed.
    """
    table = _of_seed(read_run(NAMES[0], "ablation"), seed)
    nats, _, groups, _ = _pivot(table, "nats", "layer", "group", "expert")
    layers, _, experts = nats.shape
    drawn = new_figure(5.0)
    grid = drawn.subplots(2, -(-layers // 2), sharex=True, sharey=True)
    for layer, axes in enumerate(grid.flat):
        _cells(axes, nats[layer], largest=nats[layer].max())
        axes.set(yticks=range(len(groups)), yticklabels=groups, xticks=range(experts))
        axes.set_title(f"layer {layer}", weight="normal")
    drawn.supxlabel("expert that is removed", size=11)
    drawn.suptitle("Loss added, in hundredths of a nat per token", x=0.01, ha="left", size=12, weight="bold")
    most = [
        f"layer {layer} up to {nats[layer].max():.2f} ({groups[row]}, expert {expert})"
        for layer in range(layers)
        for row, expert in [np.unravel_index(nats[layer].argmax(), nats[layer].shape)]
    ]
    describe(
        drawn,
        f"Four tables, one a layer, of {len(groups)} groups of domains by {experts} experts: nats per token that "
        f"removing the expert adds. {'; '.join(most)}. Each layer has its own shades.",
    )
    where_from = np.indices(nats.shape).reshape(3, -1)
    return drawn, {
        "layer": where_from[0].tolist(),
        "group": [groups[row] for row in where_from[1]],
        "expert": where_from[2].tolist(),
        "nats": nats.flatten().tolist(),
    }


def _pivot(table: dict[str, np.ndarray], column: str, *by: str) -> tuple[np.ndarray, ...]:
    """A column as an array with an axis for each of `by`, and the entries of these axes: names in the order of the
    table, numbers ascending. The rows of the table may have any order."""
    axes = []
    for name in by:
        entries, first = np.unique(table[name], return_index=True)
        axes.append(entries[first.argsort()] if entries.dtype.kind == "U" else entries)
    places = tuple((table[name][:, None] == entries).argmax(1) for name, entries in zip(by, axes, strict=True))
    values = np.full([len(entries) for entries in axes], np.nan)
    values[places] = table[column]
    return values, *axes


def use_and_worth() -> tuple[np.ndarray, np.ndarray]:
    """Of the models balanced over the batch: the share of a group's tokens that meet an expert, and the nats per token
    that the group loses without it, both [seeds, L, E, groups]."""
    table = read_run(NAMES[0], "ablation")
    share, nats = (_pivot(table, column, "seed", "layer", "expert", "group")[0] for column in ("share", "nats"))
    return share, nats


def _of_seed(table: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    found = np.unique(table["seed"]).tolist()
    if seed not in found:
        raise ValueError(f"seed={seed}: wanted one of {', '.join(map(str, found))}")
    return where(table, seed=seed)


@figure
def load_and_worth() -> Drawing:
    """How much an expert is used against what its removal costs: over all text, and within one group of domains.

    Data: view ("expert" or "expert and group"), seed, layer, share, nats.
    """
    data: dict[str, list] = {name: [] for name in ("view", "seed", "layer", "share", "nats")}
    share, nats = use_and_worth()
    drawn = new_figure(4.0)
    both = drawn.subplots(1, 2, sharey=True)
    views = {"expert": (share.mean(-1), nats.mean(-1)), "expert and group": (share, nats)}
    for axes, (view, (x, y)) in zip(both, views.items(), strict=True):
        for layer, style in enumerate(SERIES[: share.shape[1]]):
            axes.plot(
                x[:, layer].flatten(),
                y[:, layer].clip(1e-3).flatten(),
                color=style["color"],
                marker=style["marker"],
                markersize=4,
                linestyle="",
                label=f"layer {layer}",
            )
        for seed, layer in np.ndindex(x.shape[:2]):
            for a, b in zip(x[seed, layer].flat, y[seed, layer].flat, strict=True):
                _append(data, view, seed, layer, float(a), float(b))
        axes.set(xlabel="share of the tokens that meet it", yscale="log", xlim=(0, None))
    both[0].set_ylabel("nats lost without it (log; at least 0.001)")
    both[0].set_title("each expert, all groups alike", weight="normal")
    both[1].set_title("each expert in each group", weight="normal")
    both[0].legend(frameon=False, fontsize=10, loc=(0, 0.43), handletextpad=0.1)
    overall = rank_correlations(share.mean(-1), nats.mean(-1))
    within = np.stack([rank_correlations(share[..., group], nats[..., group]) for group in range(share.shape[-1])])
    describe(
        drawn,
        "Two scatter plots of the loss that removing an expert adds against the share of the tokens that meet it. Mean "
        f"rank correlation within a layer of a model: over all text {overall.mean():.2f}, within one group of domains "
        f"{within.mean():.2f}.",
    )
    return drawn, data


def rank_correlations(share: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation in each layer of each model, [seeds, L], of two arrays [seeds, L, ...]."""
    from scipy.stats import spearmanr

    found = [
        spearmanr(share[model_layer], nats[model_layer], axis=None).statistic
        for model_layer in np.ndindex(share.shape[:2])
    ]
    return np.array(found).reshape(share.shape[:2])
