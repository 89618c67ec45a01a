"""The verdict of `compare` on models that did not exist when its levels were set.

    python -m benchmarks.new_strangers [--roots 16] [--home runs/new_strangers] [--out data/zoo/benchmark]

Roots are trained by the zoo's recipe from seeds that the zoo does not use. Each is compared with every other, with the
shipped roots of its shape, and with two descendants of its own: rewritten by all gauges, and upcycled by drop (r = .5)
and then rewritten. Training takes a quarter of an hour on two cores; what lies in `--home` already is not trained
again. new_strangers.csv gets a row a pair: "a", "b", "relation", "verdict" and "score".
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path

import torch

from minimoe.atomic import write_atomically
from minimoe.data_files import data_path
from minimoe.fingerprints.compare import compare
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.lineage import all_gauges, upcycle
from minimoe.lineage.tree import MEMBERS
from minimoe.model import MoEForCausalLM
from minimoe.progress import progress_bar
from minimoe.training.tokenizer import load_tokenizer
from workshop.experiments import to_csv
from workshop.family_tree import MIXTURE
from workshop.training_recipes import from_scratch

FIRST_SEED = 10_001  # the zoo has none above 2,100
SHIPPED = ("alder", "birch", "stranger-01", "stranger-13")
STEPS = MEMBERS["alder"].options["steps"]


def train(folder: Path, seed: int, steps: int = STEPS) -> None:
    """A root by the recipe of the zoo, rounded to float16 as its members are."""
    torch.set_num_threads(1)
    model = from_scratch(out=folder / ".training", weights=seed, seed=seed, steps=steps)
    model.half().save_pretrained(folder)


def compared(homes: dict[str, Path]) -> Iterator[tuple[str, str, str]]:
    """Pairs of names and their relation; what follows a "+" was made of the model before it."""
    new = [name for name in homes if name not in SHIPPED]
    yield from ((a, b, "strangers") for a, b in combinations(homes, 2) if a in new or b in new)
    yield from ((name, f"{name}+{kind}", "shared lineage") for name in new for kind in ("gauged", "drop-gauged"))


def open_named(name: str, homes: dict[str, Path]) -> Weights:
    """A root, or a descendant that is made on the spot."""
    root, _, kind = name.partition("+")
    model = MoEForCausalLM.from_pretrained(homes[root], dtype=torch.float32)
    if kind == "drop-gauged":
        model = upcycle(model, method="drop", drop_ratio=0.5, seed=1, **MIXTURE)
    return open_weights(all_gauges(model, seed=1) if kind else model, tokenizer=load_tokenizer())


def verdict(a: str, b: str, relation: str, homes: dict[str, Path]) -> dict[str, str | float]:
    """A row of the table."""
    torch.set_num_threads(1)
    report = compare(open_named(a, homes), open_named(b, homes))
    return {"a": a, "b": b, "relation": relation, "verdict": report.verdict, "score": report.score}


def run(roots: int, home: Path, steps: int = STEPS) -> list[dict[str, str | float]]:
    """Train what is missing, and compare."""
    homes = {f"new-{number:02}": home / f"new-{number:02}" for number in range(1, roots + 1)}
    missing = [(folder, FIRST_SEED + place) for place, folder in enumerate(homes.values())]
    missing = [(folder, seed, steps) for folder, seed in missing if not (folder / "config.json").exists()]
    homes |= {name: data_path("zoo") / name for name in SHIPPED}
    pairs = [(*pair, homes) for pair in compared(homes)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for _ in progress_bar(pool.map(train, *zip(*missing, strict=True)), total=len(missing), desc="training"):
            pass
        return list(progress_bar(pool.map(verdict, *zip(*pairs, strict=True)), total=len(pairs), desc="comparing"))


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.new_strangers", description=__doc__.splitlines()[0])
    parser.add_argument("--roots", type=int, default=16)
    parser.add_argument("--home", type=Path, default=Path("runs/new_strangers"))
    parser.add_argument("--out", type=Path, default=data_path("zoo") / "benchmark")
    given = parser.parse_args(arguments)
    rows = run(given.roots, given.home)
    write_atomically(given.out / "new_strangers.csv", to_csv(rows).encode())
    for (relation, said), count in sorted(Counter((row["relation"], row["verdict"]) for row in rows).items()):
        print(f"{relation}: {said} in {count} pairs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
