"""A mixture and its dense twins: how they learnt, given the same tokens, compute or time, and where they ended."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from minimoe.course.cost import training_flop
from minimoe.course.figures.drawing import heatmap, new_panels, set_panel_title, set_title, shared_legend
from minimoe.course.figures.register import Drawing, columns, figure
from minimoe.course.runs import (
    ALL,
    EQUAL_TOTAL,
    MIXTURE,
    RUNS,
    TWINS,
    Table,
    better,
    config_of,
    losses,
    read_run,
    step_times,
)
from minimoe.course.style import INK, SERIES, describe
from minimoe.training.loop import Settings

_UNITS = {"tokens": "million tokens", "compute": "compute, 10$^{12}$ FLOP", "time": "time, steps of the mixture"}
_ZOOM = 0.4  # of the way: what a zoomed picture leaves out
_STYLES = dict(zip(RUNS["tokens"], SERIES, strict=False))


class Progress(NamedTuple):
    """How a model learnt with each of several seeds."""

    held_out: Table  # as `read_run` returns them
    final: Table
    step_cost: float  # what a step adds to the x axis: tokens, compute or time


def twins_by_cost() -> dict[str, dict[str, Progress]]:
    """The shipped runs of `RUNS`, each with the cost of a step, in the units that the figure gives."""
    settings = Settings()
    tokens = settings.batch_size * settings.seq_len
    costs = {
        "tokens": lambda model, run: tokens / 1e6,
        "compute": lambda model, run: training_flop(config_of(run), tokens) / 1e12,
        "time": lambda model, run: step_times()[model],
    }
    return {
        same: {
            model: Progress(read_run(run, "held_out"), read_run(run, "final"), costs[same](model, run))
            for model, run in runs.items()
        }
        for same, runs in RUNS.items()
    }


@figure(runs=twins_by_cost)
def learning_curves(runs: Mapping[str, Mapping[str, Progress]], domain: str = ALL, zoom: bool = False) -> Drawing:
    """Held-out loss of several models against what training costs; each seed as a thin line, their mean as a thick one.

    Args:
        runs: what the models were given the same amount of, for a panel each -> name of a model -> how it learnt.
        domain: of the held-out text, or `ALL` for the mean over them.
        zoom: leave out the first part, where the loss falls fastest.

    Data: same (what the runs were given the same amount of), model, seed, x (how much of it by then), nats.
    """
    drawn, panels = new_panels(3.9, 1, len(runs), sharey=True)
    rows, ends = [], []
    for axes, (same, models) in zip(panels, runs.items(), strict=True):
        for style, (model, run) in zip(SERIES, models.items(), strict=False):
            steps, nats = np.unique(run.held_out["step"]), losses(run.held_out, domain)
            keep = steps > (_ZOOM * steps.max() if zoom else 0)
            x, nats = steps[keep] * run.step_cost, nats[:, keep]
            axes.plot(x, nats.T, color=style["color"], linewidth=0.6, alpha=0.6)
            axes.plot(x, nats.mean(0), **style, linewidth=1.6, markersize=4, markevery=3, label=model)
            rows += [(same, model, seed, x[at], loss) for (seed, at), loss in np.ndenumerate(nats)]
        set_panel_title(axes, f"same {same}")
        axes.set_xlabel(_UNITS.get(same, same), size=10)
        final = ", ".join(f"{model} {losses(run.final, domain).mean():.2f}" for model, run in models.items())
        ends.append(f"same {same}: {final}")
    panels[0].set_ylabel("held-out nats per token")
    shared_legend(drawn, panels[0], "outside lower center", columns=3)
    set_title(drawn, f"Learning curves, {domain}")
    describe(
        drawn,
        f"Held-out loss ({domain}) of several models while they train, a panel for each cost: {', '.join(runs)}. A "
        f"line for each seed, and their mean. Nats per token at the end: {'; '.join(ends)}.",
    )
    return drawn, columns(("same", "model", "seed", "x", "nats"), rows)


_final_of_mixture = partial(read_run, RUNS["tokens"][MIXTURE], "final")


def _final_of_twins() -> dict[str, Table]:
    return {run: read_run(run, "final") for run in TWINS}


@figure(mixture=_final_of_mixture, twins=_final_of_twins)
def final_gaps(mixture: Table, twins: Mapping[str, Table]) -> Drawing:
    """By how much each dense twin ends above or below the mixture with the same seed; mean over the domains.

    Data: run, seed, gap (nats per token; positive: the mixture is better).

    Args:
        mixture: its table "final", as `read_run` returns it.
        twins: the same of each run to compare.
    """
    gaps = {run: losses(final) - losses(mixture) for run, final in twins.items()}
    drawn, (axes,) = new_panels(0.5 * len(gaps) + 1.5)
    axes.axvline(0, color=INK, linewidth=1)
    for row, (run, gap) in enumerate(gaps.items()):
        style = _STYLES[TWINS.get(run, (EQUAL_TOTAL,))[0]]
        axes.plot(gap, [row] * len(gap), style["marker"], color=style["color"], markersize=6, fillstyle="none")
        end, side, away = (gap.max(), "left", 9) if gap.mean() > 0 else (gap.min(), "right", -9)
        beside = {"textcoords": "offset points", "ha": side, "va": "center", "size": 10}
        axes.annotate(f"{gap.mean():+.3f}", (end, row), (away, 0), **beside)
    low, high = (end(0, *map(end, gaps.values())) for end in (min, max))
    axes.set(yticks=range(len(gaps)), yticklabels=map(_label, gaps), ylim=(len(gaps) - 0.5, -0.5))
    axes.set_xlim(low - 0.2 * (high - low), high + 0.2 * (high - low))
    axes.set_xlabel("nats per token more than the mixture; marks: seeds, number: mean", size=10, loc="right")
    set_title(drawn, "Right of the line the mixture ends lower, left of it the twin")
    ranges = "; ".join(
        f"{_label(run, ' ')} {gap.mean():+.3f}, {gap.min():+.3f} to {gap.max():+.3f}" for run, gap in gaps.items()
    )
    describe(
        drawn,
        "Marks on a line for each dense twin, one a seed: its final held-out loss minus that of the mixture, in nats "
        f"per token, mean over the domains. Mean, and range over the seeds: {ranges}.",
    )
    return drawn, columns(("run", "seed", "gap"), [(run, *item) for run in gaps for item in enumerate(gaps[run])])


def _label(run: str, between: str = "\n") -> str:
    return between.join(TWINS.get(run, (run,)))


@figure(mixture=_final_of_mixture, twins=_final_of_twins)
def gaps_by_domain(mixture: Table, twins: Mapping[str, Table]) -> Drawing:
    """The same for each kind of text, mean over the seeds, marked where all seeds agree on who is better.

    Data: run, domain, gap (mean over the seeds, nats per token), better ("mixture", "twin", or "open" where the seeds
    differ).

    Args:
        mixture, twins: as for `final_gaps`.
    """
    domains = list(dict.fromkeys(mixture["domain"].tolist()))
    gaps = {(run, domain): losses(twins[run], domain) - losses(mixture, domain) for run in twins for domain in domains}
    rows = [(*place, gap.mean(), better(gap)) for place, gap in gaps.items()]
    mean, who = (np.reshape([row[column] for row in rows], (len(twins), len(domains))) for column in (2, 3))
    drawn, (axes,) = new_panels(0.46 * len(twins) + 1.5)
    shade = np.where(who == "mixture", 0.25, 0)
    heatmap(axes, mean, "+.3f", rows=[*map(_label, twins)], columns=domains, shade=shade, bold=who == "twin")
    axes.tick_params(labeltop=True, labelbottom=False, labelsize=10)
    set_title(drawn, "Nats per token more than the mixture, by kind of text")
    drawn.supxlabel("shaded: the mixture is better with every seed; bold: the twin; neither: seeds differ", size=10)
    counts = ", ".join(f"{who} {sum(row[3] == who for row in rows)}" for who in ("mixture", "twin", "open"))
    won = "; ".join(f"{_label(run, ' ')}: {domain}" for run, domain, _, who in rows if who == "twin")
    describe(
        drawn,
        "A table of final held-out losses minus the mixture's, dense twins by kinds of text. Who is better with every "
        f"seed, in how many cells (open: seeds differ): {counts}. Where it is the twin: {won or 'nowhere'}.",
    )
    return drawn, columns(("run", "domain", "gap", "better"), rows)
