"""The training runs behind the course, and the tables made from them.

    python -m workshop.experiments [NAME ...] [--seeds 0 1 2] [--out data/runs]

trains each (a few minutes a seed on one thread) into `runs/NAME-SEED`, continues what was interrupted, and writes

    data/runs/NAME/train.csv      every 10 steps: cross-entropy and, by layer, MaxVio and the load of each expert
    data/runs/NAME/held_out.csv   every 100 steps: held-out nats per token, by domain
    data/runs/NAME/final.csv      the same after the last step, measured on eight times as much text

All averages are over the steps since the last row. data/runs/more-seeds has the last table of five more seeds:
`python -m workshop.experiments moe dense-active --seeds 3 4 5 6 7 --out data/runs/more-seeds` writes it.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minimoe.atomic import write_atomically
from minimoe.data_files import data_path
from minimoe.model import MoEForCausalLM
from minimoe.training.corpus import Corpus
from minimoe.training.loop import evaluate, train
from minimoe.training.presets import EXPERIMENTS, Experiment, small_config

RUNS = Path("runs")
ROW_EVERY, EVALUATE_EVERY, FINAL_BATCHES = 10, 100, 64


def run(name: str, seeds: Sequence[int] = (0, 1, 2), *, runs: Path = RUNS, out: Path | None = None) -> None:
    """Train experiment `name` with each seed and write its tables.

    Args:
        name: a key of `minimoe.training.presets.EXPERIMENTS`.
        seeds: of weights and batches.
        runs: where the training runs go; a finished one is not repeated.
        out: a folder for the tables; None: data/runs/NAME.

    Raises:
        ValueError: there is no such experiment.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment {name!r}: wanted one of {', '.join(EXPERIMENTS)}")
    recipe = EXPERIMENTS[name]
    corpus = Corpus.real() if recipe.corpus == "real" else Corpus.planted()
    tables: dict[str, list[dict[str, Any]]] = {"train": [], "held_out": [], "final": []}
    for seed in seeds:
        model, log = _train(recipe, corpus, seed, runs / f"{name}-{seed}")
        tables["train"] += _summary(log, seed)
        for record in log:
            tables["held_out"] += _by_domain(record.get("held_out", {}), seed=seed, step=record["step"])
        tables["final"] += _by_domain(evaluate(model, corpus, batches=FINAL_BATCHES), seed=seed)
    for table, rows in tables.items():
        write_atomically((out or data_path("runs") / name) / f"{table}.csv", to_csv(rows).encode())


def _train(recipe: Experiment, corpus: Corpus, seed: int, out: Path) -> tuple[MoEForCausalLM, list[dict[str, Any]]]:
    config = small_config(
        corpus.vocab_size,
        experts=recipe.experts,
        experts_per_token=recipe.experts_per_token,
        balance=recipe.balance,
        score_func=recipe.score_func,
    )
    model = MoEForCausalLM(config, seed=seed)
    log = train(
        model,
        corpus,
        out=out,
        evaluate_every=EVALUATE_EVERY,
        snapshots=recipe.snapshots,
        steps=recipe.steps,
        seed=seed,
    )
    return model, log


def _summary(log: list[dict[str, Any]], seed: int) -> Iterable[dict[str, Any]]:
    """Averages over `ROW_EVERY` steps."""
    for start in range(0, len(log) - ROW_EVERY + 1, ROW_EVERY):
        records = log[start : start + ROW_EVERY]
        row = {"seed": seed, "step": records[-1]["step"]}
        row["cross_entropy"] = np.mean([record["cross_entropy"] for record in records])
        violation = np.mean([record["max_violation"] for record in records], axis=0)
        load = np.sum([record["load"] for record in records], axis=0)  # [L, E], or empty for a dense model
        for layer, counts in enumerate(load):
            row[f"max_violation_{layer}"] = violation[layer]
            row |= {f"load_{layer}_{expert}": share for expert, share in enumerate(counts / counts.sum())}
        yield row


def _by_domain(losses: dict[str, float], **where: int) -> list[dict[str, Any]]:
    return [{**where, "domain": domain, "nats": loss} for domain, loss in losses.items()]


def to_csv(rows: list[dict[str, Any]], floats: str = ".4f") -> str:
    """The rows under a header of their keys; `floats` is how numbers that are not whole are written."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        short = {name: format(value, floats) for name, value in row.items() if isinstance(value, float)}
        writer.writerow(row | short)
    return text.getvalue()


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(EXPERIMENTS), metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=data_path("runs"), help="a folder for a folder of tables each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        run(name, arguments.seeds, out=arguments.out / name)


if __name__ == "__main__":
    main()
