"""How often the direction between two relatives of the zoo is told, and told right.

    python -m workshop.directions [--out data/zoo/benchmark] [--home runs/zoo]

writes direction.csv, a row for every two kinds of relatives, and direction.md, which adds them up. The limits in
minimoe/fingerprints/direction.py were chosen on the half "calibration": alder, strangers 01 to 12, mixture-1 and what
was made of them. Birch, the other strangers and mixture-2 are the half "evaluation". Members that were not built are
left out, and counted.

Beside it stand two rules that are simpler: the model with more outliers (MoTHer: Horwitz et al. 2024, arXiv 2405.18432,
section 4), or with the longer neurons, is the ancestor, or the descendant, whichever is right more often in the half
"calibration".
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch

from minimoe.atomic import write_atomically
from minimoe.fingerprints.direction import direction
from minimoe.fingerprints.folded import each_mlp
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.lineage.tree import FAMILIES, MEMBERS
from minimoe.lineage.zoo import Zoo, ancestors, origins
from minimoe.progress import progress_bar
from minimoe.training.tokenizer import load_tokenizer
from workshop.benchmark import to_csv
from workshop.benchmark_tables import to_markdown
from workshop.family_tree import CALIBRATION, EVALUATION

HALVES = {"calibration": ("alder", *CALIBRATION, "mixture-1"), "evaluation": ("birch", *EVALUATION[2:], "mixture-2")}
REWRITES = ("all_gauges", "one_gauge")
CHANGES = {
    "trained": ("finetuned", "lora", "continued-0.1", "continued-1", "continued-4"),
    "merged": ("lerp", "slerp", "ties", "btx", "btx-trained", "transplant", "transplant-trained"),
    "rounded": ("int8", "int4"),
    "other shape": ("fewer-neurons", "fewer-heads", "fewer-layers", "deepened", "extended"),
}
RULES = ("outliers", "length")


def members(root: str, zoo: Zoo) -> list[str]:
    """A root and all that has weights of it alone or mixed, one by one gauges left out, as far as it is at hand."""
    family = (name for name in MEMBERS if name == root or name.startswith(f"{root}-"))
    return [
        name
        for name in family
        if (name == root or (MEMBERS[name].parents and root in ancestors(name) and root in origins(name)))
        and not MEMBERS[name].recipe.startswith(("frame", "one_gauge"))
        and zoo.has(name)
    ]


def plain(name: str) -> str:
    """What a member was before it was rewritten."""
    return plain(MEMBERS[name].parents[0]) if MEMBERS[name].recipe in REWRITES else name


def relation_of(a: str, b: str) -> str:
    """ "a" or "b", the ancestor of the other; "same", of one function; "cousins"."""
    if plain(a) == plain(b):
        return "same"
    older = {side: {plain(one) for one in ancestors(name)} for side, name in (("b", a), ("a", b))}
    return next((side for side, name in (("a", a), ("b", b)) if plain(name) in older[side]), "cousins")


def asked(root: str, zoo: Zoo) -> list[tuple[str, str]]:
    """Every ancestor as it is beside all its descendants; all cousins as they are, but every fifth pair of those of
    strangers; and every fifth pair of cousins of which one was rewritten."""
    family = members(root, zoo)
    as_they_are = [name for name in family if plain(name) == name]
    as_they_are, mixed = list(combinations(as_they_are, 2)), list(product(as_they_are, set(family) - set(as_they_are)))
    some = [pair for pair in as_they_are if relation_of(*pair) == "cousins"][:: 1 if root in FAMILIES else 5]
    some += [pair for pair in sorted(mixed) if relation_of(*pair) == "cousins"][::5]
    return [pair for pair in (*as_they_are, *sorted(mixed)) if relation_of(*pair) != "cousins"] + some


@lru_cache(maxsize=128)
def _open(home: Path, name: str) -> Weights:
    return open_weights(Zoo(home).load(name), tokenizer=load_tokenizer())


@lru_cache(maxsize=1024)
def simple_numbers(home: Path, name: str) -> dict[str, float]:
    """The mean kurtosis of the matrices of a model, and the mean squared length of the gates of its neurons."""
    weights = _open(home, name)
    kurtosis, length = [], []
    for layer in range(weights.num_layers):
        for role in ("q", "k", "v", "o", "gate", "up", "down"):
            numbers = weights.get(role, layer).double().flatten()
            around = numbers - numbers.mean()
            kurtosis.append(float((around**4).mean() / (around**2).mean() ** 2))
        length += [float(mlp.gate.double().square().sum(-1).mean()) for _, mlp in each_mlp(weights, layer)]
    return {"outliers": sum(kurtosis) / len(kurtosis), "length": sum(length) / len(length)}


def observe(zoo: Zoo, half: str) -> Iterator[dict[str, Any]]:
    """What is said of every pair of a half."""
    for root in filter(zoo.has, HALVES[half]):
        for number, pair in enumerate(asked(root, zoo)):
            a, b = pair if number % 2 else pair[::-1]
            truth, found = relation_of(a, b), direction(_open(zoo.home, a), _open(zoo.home, b))
            kind = next((MEMBERS[name].kind for side, name in (("b", a), ("a", b)) if truth == side), "")
            row = {"half": half, "truth": truth, "said": found.ancestor, "by_shape": found.by_shape}
            row |= {"a": MEMBERS[a].kind or "root", "b": MEMBERS[b].kind or "root", "kind": kind}
            for rule in RULES if truth in ("a", "b") else ():
                more = max(("a", a), ("b", b), key=lambda side: simple_numbers(zoo.home, side[1])[rule])[0]
                row[rule] = more == truth
            yield row


def by_kinds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows added up over roots: a row for each half and two kinds, the ancestor first."""
    counts: dict[tuple[str, ...], Counter] = {}
    for row in rows:
        kinds = (row["a"], row["b"]) if row["truth"] == "a" else (row["b"], row["a"])
        truth = "ancestor" if row["truth"] in ("a", "b") else row["truth"]
        place = (row["half"], truth, *(kinds if truth == "ancestor" else sorted(kinds)))
        counts.setdefault(place, Counter())[_outcome(row)] += 1
    names = ("half", "truth", "first", "second")
    return [dict(zip(names, place, strict=True)) | _counts(counter) for place, counter in sorted(counts.items())]


def _outcome(row: dict[str, Any]) -> str:
    return "cannot_tell" if row["said"] is None else "right" if row["said"] == row["truth"] else "wrong"


def _counts(counter: Counter) -> dict[str, int]:
    return {"pairs": counter.total()} | {outcome: counter[outcome] for outcome in ("right", "wrong", "cannot_tell")}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each half and group of pairs; of ancestors by what the descendant became."""
    calibration = [row for row in rows if row["half"] == "calibration"]
    table = []
    for half in HALVES:
        own = [row for row in rows if row["half"] == half]
        ancestor = [row for row in own if row["truth"] in ("a", "b")]
        groups = {"an ancestor and its descendant": ancestor}
        for change in dict.fromkeys((*CHANGES, "a mixture")):
            groups[f"the descendant: {change}"] = [row for row in ancestor if change_of(row["kind"]) == change]
        groups |= {
            "told by shapes": [row for row in own if row["said"] and row["by_shape"]],
            "told by numbers alone": [row for row in own if row["said"] and not row["by_shape"]],
            "cousins": [row for row in own if row["truth"] == "cousins"],
            "one function": [row for row in own if row["truth"] == "same"],
        }
        for group, some in groups.items():
            row = {"half": half, "pairs of": group, **_counts(Counter(map(_outcome, some)))}
            row["right, of answers"] = _percent(row["right"], row["right"] + row["wrong"])
            row["answered"] = _percent(row["right"] + row["wrong"], row["pairs"])
            for rule in RULES:
                known = [pair[rule] for pair in some if rule in pair]
                usual = [pair[rule] for pair in calibration if rule in pair]
                flipped = 2 * sum(usual) < len(usual)
                row[f"right by {rule}"] = _percent(sum(one != flipped for one in known), len(known))
            table.append(row)
    return table


def change_of(kind: str) -> str:
    """What a descendant of this kind became."""
    kind = kind.removeprefix("mixture-").removesuffix("-gauged").removeprefix("gauged-")
    return next((change for change, kinds in CHANGES.items() if kind in kinds), "a mixture")


def _percent(some: int, of: int) -> str:
    return f"{some / of:.0%}" if of else ""


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m workshop.directions", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="for direction.csv and direction.md")
    parser.add_argument("--home", type=Path, default=Path("runs/zoo"), help="of members that are not shipped")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    zoo = Zoo(given.home)
    there, everything = (sum(len(members(root, one)) for root in sum(HALVES.values(), ())) for one in (zoo, _Whole()))
    rows = [row for half in HALVES for row in progress_bar(observe(zoo, half), desc=half, unit="pair", leave=True)]
    head = f"# Which of two relatives is the ancestor\n\n{there} of {everything} members were at hand.\n\n"
    write_atomically(given.out / "direction.csv", to_csv(by_kinds(rows)).encode())
    write_atomically(given.out / "direction.md", (head + to_markdown(summary(rows))).encode())
    return 0


class _Whole:
    """A zoo in which every member was built."""

    def has(self, name: str) -> bool:
        return True


if __name__ == "__main__":
    raise SystemExit(main())
