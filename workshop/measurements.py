"""What the routers of the planted runs follow, and what each expert is worth: the tables behind notebook 06.

    python -m workshop.measurements [NAME ...] [--seeds 0 1 2]

reads the models that `python -m workshop.experiments NAME` left in runs/, measures them on held-out text, and
writes

    data/runs/NAME/specialization.csv   seed, step, metric, layer; value, null, low, high, as in `Measured`; the metrics
                                        are `INFORMATION`, max_violation, saturation (of a snapshot), and agreement
                                        with the finished model of the next seed, the last with the first
    data/runs/NAME/ablation.csv         seed, layer, expert, group; share, the part of the group's tokens that the
                                        expert gets, and nats, what they lose per token without it, from low to high
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimoe.atomic import write_atomically
from minimoe.course.held_out import STRETCHES, record, stretches
from minimoe.course.runs import PLANTED
from minimoe.data_files import data_path
from minimoe.inspection import RoutingTrace, record_routing
from minimoe.inspection.ablation import ablate
from minimoe.inspection.metrics import (
    domain_specialization,
    matched_agreement,
    max_violation,
    mutual_information,
    router_saturation,
)
from minimoe.inspection.nulls import Measured
from minimoe.model import MoEForCausalLM
from minimoe.progress import progress_bar
from minimoe.training.corpus import Corpus
from workshop.experiments import EXPERIMENTS, RUNS, to_csv

# A label, or a label given another.
INFORMATION = (
    "token",
    "position",
    "domain",
    "language",
    "topic",
    "domain given token",
    "language given token",
    "topic given token",
)
Row = dict[str, Any]


def information(trace: RoutingTrace, metric: str) -> Measured:
    """`mutual_information` for one of `INFORMATION`, such as "language" or "language given token".

    Topics are dealt out within each language, since the corpus holds as many stretches of every topic in each: dealt
    out over all of them, the large effect of the language would hide the small one of the topic.
    """
    of, _, given = metric.partition(" given ")
    return mutual_information(trace, of, given or None, within="language" if of == "topic" else None)


def groups(corpus: Corpus) -> dict[str, list[str]]:
    """The domains of each language, and what stands alone: code and arithmetic."""
    found: dict[str, list[str]] = {}
    for domain in corpus.domains:
        found.setdefault(domain.split("/")[0], []).append(domain)
    return found


def ablation_text(corpus: Corpus) -> list[tuple[Tensor, Tensor]]:
    """For each group `STRETCHES` stretches, as many from each of its domains, with the number of the group."""
    return [
        (stretches(corpus, domain, STRETCHES // len(domains)), torch.full((STRETCHES // len(domains),), number))
        for number, domains in enumerate(groups(corpus).values())
        for domain in domains
    ]


def measure(
    name: str, seeds: Sequence[int] = (0, 1, 2), *, runs: Path = RUNS, out: Path | None = None, corpus: Corpus
) -> None:
    """Measure the models of experiment `name`, each seed and snapshot, and write both tables.

    Args:
        name: one of `PLANTED`.
        seeds: which were trained.
        runs: where their folders are.
        out: a folder for the tables; None: data/runs/NAME.
        corpus: the planted one.

    Raises:
        FileNotFoundError: a model was not trained yet; no table is written.
        ValueError: `name` is unknown.
    """
    if name not in PLANTED:
        raise ValueError(f"the routers of experiment {name!r} are not measured; choose one of {', '.join(PLANTED)}")
    found: list[Row] = []
    removed: list[Row] = []
    finished: list[RoutingTrace] = []
    for seed in progress_bar(seeds, desc=name, unit="seed"):
        final = _load(name, seed, runs)
        trace = record(final, corpus)
        for step in EXPERIMENTS[name].snapshots:
            earlier = record(_load(name, seed, runs, step), corpus)
            found += _specialization(earlier, seed=seed, step=step)
            found += _rows(router_saturation(earlier, trace), seed=seed, step=step, metric="saturation")
        found += _specialization(trace, seed=seed, step=EXPERIMENTS[name].steps)
        removed += _ablation(final, corpus, seed)
        finished.append(trace)
    for seed, ours, theirs in zip(seeds, finished, [*finished[1:], finished[0]], strict=True):
        agreement = matched_agreement(ours, theirs)
        found += _rows(agreement, seed=seed, step=EXPERIMENTS[name].steps, metric="agreement")
    for table, rows in (("specialization", found), ("ablation", removed)):
        content = to_csv(rows, ".6g")  # the smallest shares of information are below a thousandth
        write_atomically((out or data_path("runs") / name) / f"{table}.csv", content.encode())


def _load(name: str, seed: int, runs: Path, step: int | None = None) -> MoEForCausalLM:
    folder = runs / f"{name}-{seed}" / ("" if step is None else f"step-{step}")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"there is no model in {folder}; `python -m workshop.experiments {name} --seeds {seed}` trains it"
        )
    return MoEForCausalLM.from_pretrained(folder)


def _specialization(trace: RoutingTrace, **where: int) -> Iterator[Row]:
    for metric in INFORMATION:
        yield from _rows(information(trace, metric), **where, metric=metric)
    yield from _rows(max_violation(trace), **where, metric="max_violation")


def _rows(measured: Measured, **where: int | str) -> Iterator[Row]:
    for layer, numbers in enumerate(zip(*(field.tolist() for field in measured), strict=True)):
        yield {**where, "layer": layer, **dict(zip(measured._fields, numbers, strict=True))}


def _ablation(model: MoEForCausalLM, corpus: Corpus, seed: int) -> Iterator[Row]:
    names, text = list(groups(corpus)), ablation_text(corpus)
    lost = ablate(model, text, names)
    with torch.no_grad(), record_routing(model) as trace:
        for ids, group in text:
            trace.label([names[number] for number in group])
            model(ids)
    share = domain_specialization(trace, draws=1).value  # [L, groups, E]
    for layer, expert, group in np.ndindex(lost.value.shape):
        here = (layer, expert, group)
        yield {
            "seed": seed,
            "layer": layer,
            "expert": expert,
            "group": names[group],
            "share": float(share[layer, group, expert]),
            "nats": float(lost.value[here]),
            "low": float(lost.low[here]),
            "high": float(lost.high[here]),
        }


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=PLANTED, metavar="NAME", help=", ".join(PLANTED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = Corpus.planted()
    for name in arguments.names:
        measure(name, arguments.seeds, corpus=corpus)


if __name__ == "__main__":
    main()
