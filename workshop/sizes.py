"""How scores of strangers, and of relatives, depend on size.

    python -m workshop.sizes train [--home runs/sizes]
    python -m workshop.sizes score [--home runs/sizes] [--zoo runs/zoo] [--out data/zoo/sizes]

The first trains the models of sizes_grid.py, in its order, on one thread. The second compares the pairs of
sizes_pairs.py whose models are at hand, by the methods that enter the verdict, and writes
scores.csv, one row a pair, and the tables of sizes_tables.py. Both go on where they were interrupted; a row that lacks
a method is made anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from minimoe.atomic import write_atomically
from minimoe.fingerprints.compare import DECIDING, METHODS, kind_of_pair
from minimoe.fingerprints.verdict import P_VALUE
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.fingerprints.zoo_scores import Rows, read_table
from minimoe.lineage.tree import MEMBERS
from minimoe.lineage.zoo import HOME as ZOO_HOME
from minimoe.lineage.zoo import Zoo
from minimoe.progress import progress_bar
from minimoe.training import Settings
from minimoe.training.tokenizer import load_tokenizer
from workshop import sizes_tables as tables
from workshop.benchmark import to_csv
from workshop.sizes_grid import GRID, HOME, train_all
from workshop.sizes_pairs import Models, Pair, pairs, split_name

OUT = Path("data/zoo/sizes")
P_VALUES = tuple(name for name in DECIDING if METHODS[name].scale is P_VALUE)
CORRELATIONS = tuple(name for name in DECIDING if name not in P_VALUES)
SIZES = tuple(f"{fact}_{side}" for fact in ("width", "depth", "steps", "tokens") for side in "ab")
COLUMNS = ("a", "b", "use", "kind", "shapes", *SIZES, "shared_tokens", *DECIDING, *(f"{name}_p" for name in P_VALUES))
SAVE_EVERY = 20  # pairs


def score(pair: Pair, a: Weights, b: Weights) -> dict[str, Any]:
    """One row of scores.csv: what the pair is, how large its models are, and its scores, None where a method refuses.

    "steps" and "tokens" are those of all training that a model and its ancestors went through.
    """
    row = {**vars(pair), "shapes": kind_of_pair(a, b), "shared_tokens": len(a.tokens.keys() & b.tokens.keys())}
    for side, weights in (("a", a), ("b", b)):
        steps = steps_of(getattr(pair, side))
        tokens = steps * Settings.batch_size * Settings.seq_len
        facts = {"width": weights.hidden_size, "depth": weights.num_layers, "steps": steps, "tokens": tokens}
        row |= {f"{fact}_{side}": value for fact, value in facts.items()}
    for name in DECIDING:
        result = METHODS[name](a, b)
        row |= {name: result.score, f"{name}_p": result.p_value}
    return {column: row[column] for column in COLUMNS}


def steps_of(name: str) -> int:
    """That a model was trained for, its root's included."""
    root, kinds = split_name(name)
    if root in MEMBERS:
        return MEMBERS[root].options["steps"]
    trained = GRID.get(f"{root}-{kinds[0]}") if kinds else None
    return GRID[root].steps + (trained.steps if trained else 0)


def score_all(models: Models, wanted: Sequence[Pair], out: Path) -> Rows:
    """The rows of all pairs whose models are at hand, in `out`/scores.csv, those that were there before included."""

    @lru_cache(maxsize=96)
    def read(name: str) -> Weights:
        model = models.load(name)
        return open_weights(model, tokenizer=None if model.tokenizer_json else load_tokenizer())

    known = read_table("scores", out) if (out / "scores.csv").exists() else []
    found = {(row["a"], row["b"]): row for row in known if row.keys() == set(COLUMNS)}
    missing = [pair for pair in wanted if (pair.a, pair.b) not in found and models.has(pair.a) and models.has(pair.b)]
    for number, pair in enumerate(progress_bar(missing, unit="pair", desc="comparing", leave=True), 1):
        found[pair.a, pair.b] = score(pair, read(pair.a), read(pair.b))
        if number % SAVE_EVERY == 0 or number == len(missing):
            rows = [found[pair.a, pair.b] for pair in wanted if (pair.a, pair.b) in found]
            write_atomically(out / "scores.csv", to_csv(rows).encode())
    return read_table("scores", out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m workshop.sizes", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "score"))
    parser.add_argument("--home", type=Path, default=HOME, help="of the models of other sizes")
    parser.add_argument("--zoo", type=Path, default=ZOO_HOME, help="of the zoo's models that are not shipped")
    parser.add_argument("--out", type=Path, default=OUT, help="for the tables")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.what == "train":
        train_all(given.home)
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    rows = score_all(Models(given.home, Zoo(given.zoo)), pairs(), given.out)
    for name, table in tables.all_tables(rows, DECIDING, CORRELATIONS).items():
        write_atomically(given.out / f"{name}.csv", to_csv(table).encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
