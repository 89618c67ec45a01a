"""The methods against models whose history is known.

    python -m workshop.benchmark [--out runs/benchmark] [--processes N] [--home runs/zoo]

`score` runs every method on a pair, `run` does so for all pairs whose models are at hand (benchmark_pairs.py), and
writes scores.csv, the tables that are made of it (benchmark_tables.py), and their figures. What lies in data/zoo was
made from the whole zoo: a pair with a member that was not built keeps the scores it has there.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from inspect import signature
from itertools import permutations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from minimoe.atomic import write_atomically
from minimoe.course.figures import benchmark_results
from minimoe.course.figures.register import FIGURES, make
from minimoe.data_files import data_path
from minimoe.fingerprints.behaviour import token_agreement
from minimoe.fingerprints.compare import METHODS, Background, background_of_rows, kind_of_pair
from minimoe.fingerprints.expert_attribution import attribute_experts
from minimoe.fingerprints.palimpsest import compare_order, log_likelihoods, palimpsest
from minimoe.fingerprints.result import Result
from minimoe.fingerprints.verdict import judge
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.fingerprints.zoo_scores import read_table
from minimoe.lineage.tree import FAMILIES, MEMBERS
from minimoe.lineage.zoo import LINEAGE, Zoo, relation
from minimoe.progress import progress_bar
from minimoe.training import Settings
from minimoe.training.tokenizer import load_tokenizer
from workshop import benchmark_tables as tables
from workshop.benchmark_pairs import DROP_RATES, Pair, pairs
from workshop.family_tree import SEEDS
from workshop.training_recipes import open_corpus

P_VALUES = ("csu", "permutation_test")
WORDS = ("a", "b", "use", "kind", "relation", "shapes", "verdict")
COLUMNS = (*WORDS, "score", *METHODS, *(f"{name}_p" for name in P_VALUES), "right_layer", "drop_rate")
TITLES = {
    "times": "Seconds for a pair (this machine, now)",
    "methods": "Relatives against strangers",
    "transformations": "Share of relatives found at 1 % false positives",
    "verdicts": "Verdicts",
    "false_positives": "Strangers above published cut-offs",
    "invariance": "What each gauge leaves of a score",
    "forgery": "Framed strangers",
    "planted": "Strangers with parts of another model that do nothing",
    "promises": "How often strangers have a small p-value",
    "attribution": "Experts led back to their layer, and the share of them that is new",
    "palimpsest": "The order of a root's training, told by others",
    "calibration": "What p-values of strangers promise, by what they are",
}


# --- their scores -----------------------------------------------------------------------------------------


def score(zoo: Zoo, pair: Pair) -> dict[str, Any]:
    """Run every method on a pair.

    Returns:
        What the pair is, its scores by method, None where one refuses, the p-values as "csu_p" and so on, and the
        seconds each method took as "csu_s". Of attributed experts, "right_layer" is the share whose parent layer is
        the one with their own number, "drop_rate" the mean of the estimates.
    """
    a, b = (_weights(zoo.home, name) for name in (pair.a, pair.b))
    row = {**vars(pair), "relation": relation(pair.a, pair.b), "shapes": kind_of_pair(a, b)}
    for name, method in METHODS.items():
        start = time.perf_counter()
        result = method(a, b)
        row |= {name: result.score, f"{name}_s": time.perf_counter() - start}
        if name in P_VALUES:
            row[f"{name}_p"] = result.p_value
        if name == "expert_attribution":
            row |= _attributed(result)
    return row


def _attributed(result: Result) -> dict[str, float | None]:
    """How many experts were led back to the layer of their own number, and their mean drop rate."""
    if result.score is None:
        return {"right_layer": None, "drop_rate": None}
    parents = {key: value for key, value in result.details.items() if key.endswith("parent_layer")}
    rates = [value for key, value in result.details.items() if key.endswith("drop_rate")]
    right = [int(key.split()[1]) == value for key, value in parents.items()]
    return {"right_layer": sum(right) / len(right), "drop_rate": sum(rates) / len(rates)}


@lru_cache(maxsize=64)
def _weights(home: Path, name: str) -> Weights:
    return open_weights(Zoo(home).load(name), tokenizer=load_tokenizer())


def _score_some(home: Path, some: Sequence[Pair]) -> list[dict[str, Any]]:
    return [score(Zoo(home), pair) for pair in some]


def score_all(zoo: Zoo, wanted: Iterable[Pair], *, processes: int | None = None) -> Iterator[dict[str, Any]]:
    """`score` for many pairs, a few processes at once, in any order."""
    groups: dict[str, list[Pair]] = {}  # by family of the second model: what one process has read, it keeps
    for pair in wanted:
        groups.setdefault("-".join(pair.b.split("-")[:2]), []).append(pair)
    chunks = [group[start : start + 20] for group in groups.values() for start in range(0, len(group), 20)]
    yield from _in_processes([(_score_some, zoo.home, chunk) for chunk in chunks], processes, desc="comparing")


def _in_processes(tasks: Sequence[tuple], processes: int | None, desc: str) -> Iterator[dict[str, Any]]:
    """The rows of tasks (function, *arguments), a few at once with one thread each, in any order."""
    settings = {"mp_context": get_context("spawn"), "initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(processes, **settings) as pool:
        futures = [pool.submit(*task) for task in tasks]
        for future in progress_bar(as_completed(futures), total=len(tasks), unit="task", desc=desc, leave=True):
            yield from future.result()


# --- what pairs do not show: orders of training, and p-values that are about something else ---------------


def trials(zoo: Zoo, *, processes: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Two tables that scores.csv does not hold; members that are shipped, or need no training, are enough for them.

    Returns:
        "palimpsest": whether the order in which a root was trained is found in a suspect: "rho" and "p_value", both
        beside a reference, and both within domains beside it. "p_values": of tests of strangers, one by one, "test" as
        in `PROMISES`; the third party in "about" is a control, an expert, or how much was looked at.
    """
    known = _orders_are_known()
    tasks = [(_agreements, zoo.home, a, b) for a, b in permutations(ALIKE, 2)]
    tasks += [(_nominal, zoo.home, parent, suspect) for parent in ALIKE[:4] for suspect in MIXED]
    if known:
        tasks += [(_remembered, zoo.home, root, suspect) for root in FAMILIES for suspect in suspects(root)]
        tasks += [(_never_seen, zoo.home, root) for root in SEEDS]
    found: dict[str, list[dict[str, Any]]] = {"palimpsest": [], "p_values": []}
    for row in _in_processes(tasks, processes, desc="testing"):
        found["palimpsest" if "suspect" in row else "p_values"].append(row)
    if not known:
        found["palimpsest"] = read_table("palimpsest")
        found["p_values"] += [row for row in read_table("p_values") if row["test"] == "palimpsest"]
    found["palimpsest"].sort(key=lambda row: (row["order_of"], suspects(row["order_of"]).index(row["suspect"])))
    found["p_values"].sort(key=lambda row: (list(PROMISES).index(row["test"]), row["a"], row["b"], row["about"]))
    return found


PROMISES = {
    "csu": "exact",
    "permutation_test": "exact",
    "palimpsest": "exact",
    "expert_attribution": "nominal",
    "token_agreement, 1 control": "not about lineage",
    "token_agreement, 6 controls": "not about lineage",
}
REFERENCE = "stranger-01"
# Shipped roots that were trained on the same text, each from its own random weights.
ALIKE = ("alder", "birch", "stranger-01", "stranger-13", "deep-1", "depth-init-1", "depth-init-2", "mixture-1")
MIXED = (
    "mixture-1",
    *(f"alder-{kind}" for kind in ("btx-trained", "drop-0.5-trained", "sliced-trained")),
    *(
        f"{root}-{kind}"
        for root in ("birch", "stranger-01", "stranger-13")
        for kind in ("drop-0.5", "sliced", "gauged")
    ),
)
_ASKED = ("gauged", "finetuned", "lora", "continued-0.1", "continued-1", "continued-4", "lerp", "int4", "fewer-heads")
_ASKED += ("fewer-layers", "drop-0.5", "drop-0.9", "transplant", "distilled", "twin")


def suspects(root: str) -> list[str]:
    """Members that are asked for the order in which a root was trained, all of them at hand."""
    relatives = [root, *(f"{root}-{kind}" for kind in _ASKED)]
    trained = [f"{root}-{kind}-trained" for kind in ("copy", "sliced", "drop-0.5", "btx")] if root == "alder" else []
    return [*relatives, *trained, *(name for name in FAMILIES if name != root), "stranger-13", "deep-1", "mixture-1"]


def order_of(root: str, steps: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first example of every batch, or of the first ones, that a root was trained on.

    Returns:
        The examples, [steps, S], and the domain of each, [steps].
    """
    options = MEMBERS[root].options
    corpus, seed = open_corpus("real"), options["seed"]
    shape = {"batch_size": Settings.batch_size, "seq_len": Settings.seq_len}
    batches = [corpus.batch("train", seed=seed, step=step, **shape) for step in range(steps or options["steps"])]
    return torch.stack([batch.input_ids[0] for batch in batches]), torch.stack([batch.domains[0] for batch in batches])


def _orders_are_known() -> bool:
    """Whether the corpus, which is put together from installed packages, is that of the shipped models."""
    record = json.loads((data_path("zoo") / FAMILIES[0] / LINEAGE).read_text(encoding="utf-8"))
    return open_corpus("real").sha256 == record["corpus_sha256"]


@lru_cache(maxsize=2)
def _liked_by_reference(home: Path, root: str) -> torch.Tensor:
    return log_likelihoods(_weights(home, REFERENCE), order_of(root)[0])


def _remembered(home: Path, root: str, suspect: str) -> list[dict[str, Any]]:
    """The row of a suspect in the table of palimpsests."""
    examples, domains = order_of(root)
    liked = log_likelihoods(_weights(home, suspect), examples)
    beside = liked - _liked_by_reference(home, root)
    found = {
        "": compare_order(liked),
        "_beside_reference": compare_order(beside),
        "_within_domains": compare_order(beside, kinds=domains),
    }
    row = {"order_of": root, "suspect": suspect, "relation": relation(root, suspect) if root != suspect else "itself"}
    for how, result in found.items():
        row |= {f"rho{how}": result.score, f"p_value{how}": result.p_value}
    return [row]


def _never_seen(home: Path, root: str) -> list[dict[str, Any]]:
    """The order of the first steps of one root, told by others."""
    few, _ = order_of(root, 50)
    others = [name for name in ALIKE if name != root]
    return [
        _p_value("palimpsest", root, name, "50 steps", palimpsest(_weights(home, name), few, trials=999).p_value)
        for name in others
    ]


def _agreements(home: Path, a: str, b: str) -> list[dict[str, Any]]:
    """Whether `a` agrees more with `b` than with other strangers: with the next one, and with all."""
    others = [name for name in ALIKE if name not in (a, b)]
    following = others[ALIKE.index(b) % len(others)]
    left, right, *controls = (_weights(home, name) for name in (a, b, following, *others))
    one, all_of_them = (token_agreement(left, right, some).p_value for some in (controls[:1], controls[1:]))
    return [
        _p_value("token_agreement, 1 control", a, b, following, one),
        _p_value(f"token_agreement, {len(others)} controls", a, b, "all others", all_of_them),
    ]


def _nominal(home: Path, parent: str, suspect: str) -> list[dict[str, Any]]:
    """Of every expert of a stranger."""
    if relation(parent, suspect) != "strangers":
        return []
    return [
        _p_value("expert_attribution", parent, suspect, f"layer {found.layer} expert {found.expert}", found.nominal_p)
        for found in attribute_experts(_weights(home, parent), _weights(home, suspect))
    ]


def _p_value(test: str, a: str, b: str, about: str, p_value: float) -> dict[str, Any]:
    return {"test": test, "a": a, "b": b, "about": about, "p_value": p_value}


# --- all of it --------------------------------------------------------------------------------------------


def run(zoo: Zoo, out: Path, *, processes: int | None = None) -> list[dict[str, Any]]:
    """Score every pair whose models are at hand, take the rest from data/zoo, and write scores and tables.

    Args:
        zoo: where the models are.
        out: a folder for scores.csv, one CSV for each table and benchmark.md with all of them.
        processes: how many at once; None: as many as there are cores.

    Returns:
        The scores that were computed here.
    """
    wanted = pairs()
    there = [pair for pair in wanted if zoo.has(pair.a) and zoo.has(pair.b)]
    computed = list(score_all(zoo, there, processes=processes))
    known = read_table("scores") if len(computed) < len(wanted) else []
    rows = with_verdicts(_in_order(wanted, [*known, *map(_as_written, computed)]))
    write_atomically(out / "scores.csv", to_csv([{key: row.get(key) for key in COLUMNS} for row in rows]).encode())
    tested = trials(zoo, processes=processes)
    calibration = {"calibration": tables.calibration(rows, tested["p_values"], PROMISES)}
    written = {"times": tables.times(computed, METHODS), **all_tables(rows), **tested, **calibration}
    for name, table in written.items():
        write_atomically(out / f"{name}.csv", to_csv(table).encode())
    write_atomically(out / "benchmark.md", _page(written, len(computed), len(wanted)).encode())
    return computed


def with_verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with "verdict" and "score", reached by `judge` with the levels that calibration pairs give."""
    strangers = [row for row in rows if row["use"] == "calibration"]
    kinds = {row["shapes"] for row in rows}
    backgrounds = {shapes: background_of_rows(strangers, shapes, "the zoo") for shapes in kinds}
    return [judge_row(row, backgrounds[row["shapes"]]) for row in rows]


def judge_row(row: Mapping[str, Any], background: Background) -> dict[str, Any]:
    """A row of scores with "verdict" and "score"."""
    results = {name: Result(score=row[name], p_value=row.get(f"{name}_p")) for name in METHODS if name in row}
    verdict, _, total = judge(background.beside(results), equal_depths=row["shapes"].endswith("equal depths"))
    return {**row, "verdict": verdict, "score": total}


def all_tables(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Every table by name, from rows with verdicts."""
    methods = (*METHODS, "score")
    return {
        "methods": tables.by_method(rows, methods),
        "transformations": tables.by_transformation(rows, methods),
        "verdicts": tables.verdicts(rows),
        "false_positives": tables.false_positives(rows, METHODS),
        "invariance": tables.invariance(rows, tuple(METHODS)),
        "forgery": tables.forgery(rows, methods),
        "planted": tables.forgery(rows, methods, "planted"),
        "promises": tables.promises(rows, P_VALUES),
        "attribution": tables.attribution(rows, DROP_RATES),
    }


def _in_order(wanted: Sequence[Pair], rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a pair; of two, the later."""
    found = {(row["a"], row["b"], row["use"]): row for row in rows}
    return [found[pair.a, pair.b, pair.use] for pair in wanted if (pair.a, pair.b, pair.use) in found]


def _as_written(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its numbers as scores.csv holds them, so that computed ones tie with those that are read."""
    return {key: float(_digits(value)) if isinstance(value, float) else value for key, value in row.items()}


def _digits(value: float) -> str:
    return f"{value:.5g}"


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _digits(value) if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def _page(written: Mapping[str, list[dict[str, Any]]], computed: int, wanted: int) -> str:
    """All tables in one Markdown page; that of transformations as one row for each."""
    shown = {name: table for name, table in written.items() if name in TITLES}
    shown["transformations"] = tables.wide(written["transformations"], "transformation", "method", "tpr")
    counts = f"{computed} of {wanted} pairs compared here, the others taken from data/zoo."
    head = f"# The methods against the zoo\n\n{counts}\n"
    return head + "".join(f"\n## {TITLES[name]}\n\n{tables.to_markdown(table)}" for name, table in shown.items())


def draw(out: Path) -> list[Path]:
    """The figures of the tables in a folder, written to its folder "figures"; returns their paths."""
    paths = []
    for name, figure in FIGURES.items():
        if figure.__module__ == benchmark_results.__name__:
            arguments = [argument for argument in signature(figure).parameters if (out / f"{argument}.csv").exists()]
            paths += make([name], out / "figures", **{argument: read_table(argument, out) for argument in arguments})
    return paths


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m workshop.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="for scores, tables and figures")
    parser.add_argument("--processes", type=int, help="at once; as many as cores when left out")
    parser.add_argument("--home", type=Path, default=Path("runs/zoo"), help="of members that are not shipped")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)  # what cannot be written to is found before the work is done
    computed = run(Zoo(given.home), given.out, processes=given.processes)
    draw(given.out)
    print(f"{len(computed)} of {len(pairs())} pairs compared, the others taken from data/zoo")
    print(f"Tables in {given.out}; begin with {given.out / 'benchmark.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
