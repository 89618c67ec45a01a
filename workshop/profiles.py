"""The std profiles of strangers while they train: the tables behind notebook 08.

    python -m workshop.profiles [NAME ...]

trains roots by the recipe of the zoo, each for half as long, into runs/NAME-SEED (a quarter of an hour on one thread in
all), continues what was interrupted, and writes

    data/runs/NAME/std.csv    seed, step, layer; q, k, v, o, the standard deviation of that matrix of the layer
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from minimoe.atomic import write_atomically
from minimoe.data_files import data_path
from minimoe.fingerprints.std_profile import ATTENTION
from minimoe.fingerprints.weights import open_weights
from workshop.experiments import RUNS, to_csv
from workshop.training_recipes import from_scratch

STEPS, SNAPSHOTS = 400, (0, 25, 50, 100, 200, 300)  # and the finished model
SEEDS = (201, 202, 203, 204, 205)  # of weights and batches; no member of the zoo has them
SETTINGS = {"corpus": "real", "steps": STEPS, "snapshots": SNAPSHOTS}
PROFILES: Mapping[str, Mapping[str, Any]] = {
    "profiles/4-layers": {"shape": "dense"},
    "profiles/8-layers": {"shape": "deep"},
    "profiles/8-layers-by-depth": {"shape": "deep", "initialisation": "by depth"},
}


def run(name: str, *, runs: Path = RUNS, out: Path | None = None, **settings: Any) -> None:
    """Train the strangers `name` and write their table.

    Args:
        name: a key of `PROFILES`.
        runs: where the training runs go; a finished one is not repeated.
        out: a folder for the table; None: data/runs/NAME.
        **settings: of `from_scratch`, instead of those in `SETTINGS`.

    Raises:
        ValueError: there is no such name.
    """
    if name not in PROFILES:
        raise ValueError(f"there are no profiles {name!r}; choose one of {', '.join(PROFILES)}")
    rows = []
    for seed in SEEDS:
        folder = runs / f"{name}-{seed}"
        recipe = {**SETTINGS, **PROFILES[name], **settings}
        from_scratch(out=folder, weights=seed, seed=seed, **recipe)
        for step in recipe["snapshots"]:
            rows += _profile(folder / f"step-{step}", seed=seed, step=step)
        rows += _profile(folder, seed=seed, step=recipe["steps"])
    write_atomically((out or data_path("runs") / name) / "std.csv", to_csv(rows, ".6g").encode())


def _profile(folder: Path, **where: int) -> Iterator[dict[str, Any]]:
    weights = open_weights(folder)
    for layer in range(weights.num_layers):
        yield {**where, "layer": layer} | {role: weights.statistics(role, layer).std for role in ATTENTION}


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PROFILES), metavar="NAME", help=", ".join(PROFILES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        run(name)


if __name__ == "__main__":
    main()
