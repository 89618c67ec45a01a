"""A mixture and its dense twins: how they learnt, given the same tokens, compute or time, and where they ended."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy import ndarray

from minimoe.course.cost import training_flop
from minimoe.course.figures.register import Drawing, figure
from minimoe.course.runs import read_run, step_times, where
from minimoe.course.style import INK, PALE, QUIET, SERIES, describe, new_figure
from minimoe.model import MoEConfig
from minimoe.training.experiments import EXPERIMENTS
from minimoe.training.loop import Settings
from minimoe.training.presets import small_config

MIXTURE, EQUAL_ACTIVE, EQUAL_TOTAL = "mixture", "dense, equal active", "dense, equal total"
# The runs to compare, by what they were given the same amount of. With equal active parameters, equal tokens are equal
# compute, so one run serves both.
RUNS = {
    "tokens": {MIXTURE: "moe", EQUAL_ACTIVE: "dense-active", EQUAL_TOTAL: "dense-total"},
    "compute": {MIXTURE: "moe", EQUAL_ACTIVE: "dense-active", EQUAL_TOTAL: "dense-total-compute"},
    "time": {MIXTURE: "moe", EQUAL_ACTIVE: "dense-active-clock", EQUAL_TOTAL: "dense-total-clock"},
}
ALL = "all domains"
_UNITS = {"tokens": "million tokens", "compute": "compute, 10$^{12}$ FLOP", "time": "time, steps of the mixture"}
_ZOOM = 0.4  # of the way: what a zoomed picture leaves out


def config_of(run: str) -> MoEConfig:
    """The model that was trained in a shipped run."""
    recipe = EXPERIMENTS[run]
    return small_config(experts=recipe.experts, experts_per_token=recipe.experts_per_token, balance=recipe.balance)


def final_losses(run: str, domain: str = ALL) -> ndarray:
    """Held-out nats per token after the last step, one number a seed: of one domain, or the mean of all.

    Raises:
        ValueError: there is no such domain; else as `read_run`.
    """
    table = _of_domain(read_run(run, "final"), domain)
    return np.array([where(table, seed=seed)["nats"].mean() for seed in np.unique(table["seed"])])


def final_differences(run: str, domain: str = ALL) -> ndarray:
    """By how many nats per token a run ends above the mixture, seed by seed. Positive: the mixture is better."""
    return final_losses(run, domain) - final_losses(RUNS["tokens"][MIXTURE], domain)


def losses_while_training(run: str, domain: str = ALL) -> tuple[ndarray, ndarray]:
    """Steps [n], and the held-out nats per token after each of them [seeds, n]: of one domain, or the mean of all.

    Raises:
        ValueError: there is no such domain; else as `read_run`.
    """
    table = _of_domain(read_run(run, "held_out"), domain)
    steps, seeds = np.unique(table["step"]), np.unique(table["seed"])
    return steps, np.array([[where(table, seed=seed, step=step)["nats"].mean() for step in steps] for seed in seeds])


def _of_domain(table: dict[str, ndarray], domain: str) -> dict[str, ndarray]:
    domains = [ALL, *dict.fromkeys(table["domain"].tolist())]
    if domain not in domains:
        raise ValueError(f"domain={domain!r}: wanted one of {', '.join(domains)}")
    return table if domain == ALL else where(table, domain=domain)


# --- on the way -------------------------------------------------------------------------------------------------------


@figure()
def learning_curves(domain: str = ALL, zoom: bool = False) -> Drawing:
    """Held-out loss of the mixture and its dense twins, against tokens, compute and time; three seeds each.

    Args:
        domain: of the held-out text, or `ALL` for the mean over them.
        zoom: leave out the first part, where the loss falls fastest.

    Data: same (what the runs were given the same amount of), model, seed, x (how much of it by then), nats.
    """
    rows = []
    drawn = new_figure(3.9)
    panels = drawn.subplots(1, 3, sharey=True)
    for axes, (same, runs) in zip(panels, RUNS.items(), strict=True):
        for style, (model, run) in zip(SERIES, runs.items(), strict=False):
            steps, losses = losses_while_training(run, domain)
            keep = steps > (_ZOOM * EXPERIMENTS[run].steps if zoom else 0)
            x, losses = steps[keep] * _step_cost(same, model), losses[:, keep]
            _curve(axes, x, losses, model, style)
            rows += [
                (same, model, seed, at, nats)
                for seed, row in enumerate(losses.tolist())
                for at, nats in zip(x.tolist(), row, strict=True)
            ]
        axes.set_title(f"same {same}", size=11, weight="normal")
        axes.set_xlabel(_UNITS[same], size=10)
    panels[0].set_ylabel("held-out nats per token")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _title(drawn, f"Learning curves, {domain}")
    describe(drawn, _curves_alt(domain))
    return drawn, _columns("same model seed x nats", rows)


def _curve(axes: Axes, x: ndarray, losses: ndarray, label: str, style: dict) -> None:
    """The mean over the seeds [seeds, n], and each seed as a thin line."""
    axes.plot(x, losses.T, color=style["color"], linewidth=0.6, alpha=0.6)
    axes.plot(x, losses.mean(0), **style, linewidth=1.6, markersize=4, markevery=3, label=label)


def _step_cost(same: str, model: str) -> float:
    """What one training step adds to the x axis."""
    if same == "time":
        return step_times()[model]
    settings = Settings()
    tokens = settings.batch_size * settings.seq_len
    return tokens / 1e6 if same == "tokens" else training_flop(config_of(RUNS[same][model]), tokens) / 1e12


def _curves_alt(domain: str) -> str:
    ends = "; ".join(
        f"same {same}: " + ", ".join(f"{model} {final_losses(run, domain).mean():.2f}" for model, run in runs.items())
        for same, runs in RUNS.items()
    )
    return (
        f"Held-out loss ({domain}) of a mixture and two dense twins, falling as they train, in three panels: against "
        f"tokens, compute and time, three seeds each. Nats per token at the end: {ends}."
    )


def _columns(names: str, rows: list[tuple]) -> dict[str, list]:
    return {name: list(column) for name, column in zip(names.split(), zip(*rows, strict=True), strict=True)}


# --- at the end -------------------------------------------------------------------------------------------------------

# Every twin and what it was given as much of as the mixture; each run once.
TWINS = {
    "dense-active": (EQUAL_ACTIVE, "same tokens and compute"),
    "dense-active-clock": (EQUAL_ACTIVE, "same time"),
    "dense-total": (EQUAL_TOTAL, "same tokens"),
    "dense-total-compute": (EQUAL_TOTAL, "same compute"),
    "dense-total-clock": (EQUAL_TOTAL, "same time"),
}
_LABELS = ["\n".join(words) for words in TWINS.values()]
_STYLES = dict(zip(RUNS["tokens"], SERIES, strict=False))


@figure()
def final_gaps() -> Drawing:
    """By how much each dense twin ends above or below the mixture with the same seed; mean over the domains.

    Data: run, seed, gap (nats per token; positive: the mixture is better).
    """
    gaps = {run: final_differences(run) for run in TWINS}
    drawn = new_figure(0.5 * len(gaps) + 1.5)
    axes = drawn.subplots()
    axes.axvline(0, color=INK, linewidth=1)
    for row, (run, gap) in enumerate(gaps.items()):
        style = _STYLES[TWINS[run][0]]
        axes.plot(gap, [row] * len(gap), style["marker"], color=style["color"], markersize=6, fillstyle="none")
        end, side = (gap.max(), "left") if gap.mean() > 0 else (gap.min(), "right")
        away = (9 if side == "left" else -9, 0)
        axes.annotate(f"{gap.mean():+.3f}", (end, row), away, textcoords="offset points", ha=side, va="center", size=10)
    low, high = min(0, *map(np.min, gaps.values())), max(0, *map(np.max, gaps.values()))
    axes.set(yticks=range(len(gaps)), yticklabels=_LABELS, ylim=(len(gaps) - 0.5, -0.5))
    axes.set_xlim(low - 0.2 * (high - low), high + 0.2 * (high - low))
    axes.set_xlabel("nats per token more than the mixture; marks: seeds, number: mean", size=10, loc="right")
    _title(drawn, "Right of the line the mixture ends lower, left of it the twin")
    ranges = "; ".join(f"{' '.join(TWINS[run])} {_range(gap)}" for run, gap in gaps.items())
    describe(
        drawn,
        "Marks on a line for each dense twin, one a seed: its final held-out loss minus that of the mixture, in nats "
        f"per token, mean over the domains. Mean, and range over the seeds: {ranges}.",
    )
    return drawn, _columns(
        "run seed gap", [(run, s, value) for run in gaps for s, value in enumerate(gaps[run].tolist())]
    )


def _range(gap: ndarray) -> str:
    return f"{gap.mean():+.3f}, {gap.min():+.3f} to {gap.max():+.3f}"


@figure()
def gaps_by_domain() -> Drawing:
    """The same for each kind of text, mean over the seeds, marked where all seeds agree on who is better.

    Data: run, domain, gap (mean over the seeds, nats per token), better ("mixture", "twin", or "open" where the seeds
    differ).
    """
    domains = list(dict.fromkeys(read_run(RUNS["tokens"][MIXTURE], "final")["domain"].tolist()))
    rows = []
    for run in TWINS:
        for domain in domains:
            gap = final_differences(run, domain)
            rows.append((run, domain, gap.mean(), better(gap)))
    drawn = new_figure(0.46 * len(TWINS) + 1.5)
    axes = drawn.subplots()
    for place, (_, _, mean, who) in enumerate(rows):
        _cell(axes, *divmod(place, len(domains)), f"{mean:+.3f}", who)
    axes.set(xlim=(-0.5, len(domains) - 0.5), ylim=(len(TWINS) - 0.5, -0.5))
    axes.set(xticks=range(len(domains)), xticklabels=domains, yticks=range(len(TWINS)), yticklabels=_LABELS)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=10)
    axes.spines[:].set_visible(False)
    _title(drawn, "Nats per token more than the mixture, by kind of text")
    drawn.supxlabel("shaded: the mixture is better with every seed; hatched: the twin; white: seeds differ", size=10)
    counts = ", ".join(f"{who} {sum(row[3] == who for row in rows)}" for who in ("mixture", "twin", "open"))
    twins = "; ".join(f"{' '.join(TWINS[run])}: {domain}" for run, domain, _, who in rows if who == "twin")
    describe(
        drawn,
        "A table of final held-out losses minus the mixture's, dense twins by kinds of text. Who is better with every "
        f"seed, in how many cells (open: seeds differ): {counts}. Where it is the twin: {twins or 'nowhere'}.",
    )
    return drawn, _columns("run domain gap better", rows)


def better(gap: ndarray) -> str:
    """Who ends lower with every seed, "mixture" or "twin", or "open" where the seeds differ; of twin minus mixture."""
    return "mixture" if gap.min() > 0 else "twin" if gap.max() < 0 else "open"


def _cell(axes: Axes, row: int, column: int, text: str, who: str) -> None:
    fill, edge, hatch = {
        "mixture": (PALE, PALE, None),
        "twin": ("#FDF1EA", "#E8A98A", "///"),
        "open": ("white", QUIET, None),
    }[who]
    corner = (column - 0.47, row - 0.44)
    axes.add_patch(Rectangle(corner, 0.94, 0.88, facecolor=fill, edgecolor=edge, hatch=hatch, linewidth=0.6))
    axes.text(column, row, text, ha="center", va="center", size=10, bbox={"facecolor": fill, "linewidth": 0, "pad": 1})


def _title(drawn: Figure, text: str) -> None:
    drawn.suptitle(text, x=0.01, ha="left", size=12, weight="bold")
