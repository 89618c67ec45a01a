"""A mixture and dense models: how they learnt, given the same tokens, compute or time, and where they ended."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from minimoe.course.cost import training_flop
from minimoe.course.figures.drawing import heatmap, label_rows, new_panels, note
from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.runs import ALL, MIXTURE, RUNS, TWINS, Table, better, config_of, losses, read_run, step_times
from minimoe.course.style import INK, SERIES
from minimoe.training.loop import Settings

_UNITS = {"tokens": "million tokens", "compute": "compute, 10$^{12}$ FLOP", "time": "time, steps of the mixture"}
_ZOOM = 0.4  # of the way: what a zoomed picture leaves out
_STYLES = dict(zip(RUNS["tokens"], SERIES, strict=False))
_SHIPPED = {
    "mixture": partial(read_run, RUNS["tokens"][MIXTURE], "final"),
    "twins": lambda: {run: read_run(run, "final") for run in TWINS},
}


class Progress(NamedTuple):
    """How a model learnt with each of several seeds."""

    held_out: Table  # as `read_run` returns them
    final: Table
    step_cost: float  # what a step adds to the x axis: tokens, compute or time


def twins_by_cost() -> dict[str, dict[str, Progress]]:
    """The shipped runs of `RUNS`, each with the cost of a step, in the units that the figure gives."""
    tokens = Settings().batch_size * Settings().seq_len
    costs = {
        "tokens": lambda model, run: tokens / 1e6,
        "compute": lambda model, run: training_flop(config_of(run), tokens) / 1e12,
        "time": lambda model, run: step_times()[model],
    }

    def progress(same: str, model: str, run: str) -> Progress:
        return Progress(read_run(run, "held_out"), read_run(run, "final"), costs[same](model, run))

    return {same: {model: progress(same, model, run) for model, run in runs.items()} for same, runs in RUNS.items()}


@figure(runs=twins_by_cost)
def learning_curves(runs: Mapping[str, Mapping[str, Progress]], domain: str = ALL, zoom: bool = False) -> Drawing:
    """Held-out loss of several models against what training costs; each seed as a thin line, their mean as a thick one.

    Drawn of what the models were given the same amount of, for a panel each -> name of a model -> how it learnt.
    `zoom` leaves out the first part, where the loss falls fastest.
    Data: same (what the runs were given the same amount of), model, seed, x (how much of it by then), nats.
    """
    drawn, panels = new_panels(3.9, 1, len(runs), sharey=True, title=f"Learning curves, {domain}")
    rows, ends = [], []
    for axes, (same, models) in zip(panels, runs.items(), strict=True):
        for style, (model, run) in zip(SERIES, models.items(), strict=False):
            steps, nats = np.unique(run.held_out["step"]), losses(run.held_out, domain)
            keep = steps > (_ZOOM * steps.max() if zoom else 0)
            x, nats = steps[keep] * run.step_cost, nats[:, keep]
            axes.plot(x, nats.T, color=style["color"], linewidth=0.6, alpha=0.6)
            axes.plot(x, nats.mean(0), **style, linewidth=1.6, markersize=4, markevery=3, label=model)
            rows += [(same, model, seed, x[at], loss) for (seed, at), loss in np.ndenumerate(nats)]
        axes.set_title(f"same {same}")
        axes.set_xlabel(_UNITS.get(same, same), size=10)
        final = ", ".join(f"{model} {losses(run.final, domain).mean():.2f}" for model, run in models.items())
        ends.append(f"same {same}: {final}")
    panels[0].set_ylabel("held-out nats per token")
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    alt = f"""Held-out loss ({domain}) of several models while they train, a panel for each cost: {", ".join(runs)}. A
        line for each seed, and their mean. Nats per token at the end: {"; ".join(ends)}."""
    return drawn, columns(("same", "model", "seed", "x", "nats"), rows), alt


@figure(**_SHIPPED)
def final_gaps(mixture: Table, twins: Mapping[str, Table]) -> Drawing:
    """By how much each dense model ends above or below the mixture with the same seed; mean over the domains.
    Drawn of tables "final". Data: run, seed, gap (nats per token; positive: the mixture is better)."""
    gaps = {run: losses(final) - losses(mixture) for run, final in twins.items()}
    title = "Right of the line the mixture ends lower, left of it the dense model"
    drawn, (axes,) = new_panels(0.5 * len(gaps) + 1.5, title=title)
    axes.axvline(0, color=INK, linewidth=1)
    for place, (run, gap) in enumerate(gaps.items()):
        style = _STYLES.get(TWINS.get(run, (run,))[0], SERIES[2])
        axes.plot(gap, [place] * len(gap), style["marker"], color=style["color"], markersize=6, fillstyle="none")
        end, points = (gap.max(), 9) if gap.mean() > 0 else (gap.min(), -9)
        note(axes, f"{gap.mean():+.3f}", (end, place), points)
    label_rows(axes, [_label(run) for run in gaps])
    axes.margins(x=0.2)
    axes.set_xlabel("nats per token more than the mixture; marks: seeds, number: mean", size=10, loc="right")
    parts = [f"{_label(run, ' ')} {gap.mean():+.3f}, {gap.min():+.3f} to {gap.max():+.3f}" for run, gap in gaps.items()]
    alt = f"""Marks on a line for each dense model, one a seed: its final held-out loss minus that of the mixture, in
        nats per token, mean over the domains. Mean, and range over the seeds: {"; ".join(parts)}."""
    rows = [(run, *of_seed) for run, gap in gaps.items() for of_seed in enumerate(gap)]
    return drawn, columns(("run", "seed", "gap"), rows), alt


def _label(run: str, between: str = "\n") -> str:
    return between.join(TWINS.get(run, (run,)))


@figure(**_SHIPPED)
def gaps_by_domain(mixture: Table, twins: Mapping[str, Table]) -> Drawing:
    """The same for each kind of text, mean over the seeds, marked where all seeds agree on who is better.

    Data: run, domain, gap (mean over the seeds, nats per token), better ("mixture", "dense", or "open" where the
    seeds differ).
    """
    domains = list(dict.fromkeys(mixture["domain"].tolist()))
    gaps = {(run, domain): losses(twins[run], domain) - losses(mixture, domain) for run in twins for domain in domains}
    rows = [(*place, gap.mean(), better(gap)) for place, gap in gaps.items()]
    mean, who = (np.reshape([row[column] for row in rows], (len(twins), len(domains))) for column in (2, 3))
    texts = {
        "title": "Nats per token more than the mixture, by kind of text",
        "xlabel": "shaded: the mixture is better with every seed; bold: the dense model; neither: seeds differ",
    }
    drawn, (axes,) = new_panels(0.46 * len(twins) + 1.5, **texts)
    shade = np.where(who == "mixture", 0.25, 0)
    heatmap(axes, mean, "+.3f", rows=[*map(_label, twins)], columns=domains, shade=shade, bold=who == "dense")
    axes.tick_params(labeltop=True, labelbottom=False, labelsize=10)
    counts = ", ".join(f"{each} {(who == each).sum()}" for each in ("mixture", "dense", "open"))
    won = "; ".join(f"{_label(run, ' ')}: {domain}" for run, domain, _, ahead in rows if ahead == "dense")
    alt = f"""A table of final held-out losses minus the mixture's, dense models by kinds of text. Who is better with
        every seed, in how many cells (open: seeds differ): {counts}. Where it is the dense model:
        {won or "nowhere"}."""
    return drawn, columns(("run", "domain", "gap", "better"), rows), alt
