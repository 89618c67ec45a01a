"""modelDNA, a tool people compare checkpoints with today, on the pairs of workshop/benchmark.py, beside our methods.

    python -m benchmarks.modeldna [--python PATH] [--out data/zoo/benchmark]

`--python` names an interpreter in whose environment modelDNA is installed (`pip install modeldna`, from PyPI). Its
`compare_pair`, which is what its command `modeldna compare SUSPECT CANDIDATE` calls, is given every pair whose members
are at hand, in its default mode, as Hugging Face folders, the second member as the suspect; it answers alike the other
way round. Without `--python`, the answers that lie in the folder are taken, and the tables made anew.

    modeldna_scores.csv           its probability that one derives from the other, and its verdict; for pairs that it
                                  rules out no probability, and its reason
    modeldna.csv                  it and our methods, on exactly the same pairs
    modeldna_transformations.csv  the share of relatives that each finds at 1 % false positives, for each transformation
    modeldna_verdicts.csv         what it and our `compare` say by themselves, for each use of a pair

A pair that a method refuses ranks lowest for that method, as everywhere in the benchmark. modelDNA refuses models of
different depth, heads or MLP width; the second half of modeldna.csv leaves these pairs out, for all methods.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minimoe.atomic import write_atomically
from minimoe.fingerprints.compare import METHODS
from minimoe.fingerprints.verdict import SAME, SHARED
from minimoe.fingerprints.zoo_scores import read_table
from minimoe.lineage.zoo import Zoo
from minimoe.progress import progress_bar
from minimoe.training.tokenizer import load_tokenizer
from workshop import benchmark_tables as tables
from workshop.experiments import to_csv

Rows = Sequence[Mapping[str, Any]]
ANSWERS = "modeldna_scores.csv"
USES = ("evaluation", "positive", "forgery", "twins", "student")
SHOWN = ("modeldna", "score", *METHODS)  # "score" is that of our `compare`
PAIR = ("a", "b", "use", "kind", "shapes")
# By which words, in which column, a tool says that two models are related. "SAME_FAMILY_UNRESOLVED" is modelDNA's
# word for a probability between .5 and .9, where it abstains.
RELATED = {
    "modeldna": ("modeldna_verdict", {"EXACT_COPY", "QUANTIZED_COPY", "FINE_TUNE", "SAME_LINEAGE", "LIKELY_MERGE"}),
    "score": ("verdict", {SAME, SHARED}),
}
# Run by the other interpreter: a file with [[suspect, candidate], ...] in, a line of JSON for each out.
DRIVER = """
import json, sys
from modeldna import __version__
from modeldna.scan import compare_pair

for suspect, candidate in json.load(open(sys.argv[1], encoding="utf-8")):
    try:
        *_, verdict = compare_pair(suspect, candidate)
        score, word, reason = verdict.probability, verdict.verdict.value, verdict.candidates[0].ruled_out
    except Exception as error:
        score, word, reason = None, None, f"{type(error).__name__}: {error}"
    print(json.dumps({"score": score, "verdict": word, "reason": reason, "version": __version__}), flush=True)
"""


# --- its answers ------------------------------------------------------------------------------------------


def export(zoo: Zoo, names: Iterable[str], home: Path) -> dict[str, Path]:
    """A Hugging Face folder for each member: where it lies, or, for what is made when asked for, one in `home`."""
    folders = {}
    for name in progress_bar(names, unit="model", desc="exporting"):
        folder = zoo.folder(name)
        if folder is None:
            folder = home / name
            zoo.load(name).save_pretrained(folder)
            write_atomically(folder / "tokenizer.json", load_tokenizer().to_str(pretty=True).encode())
        folders[name] = folder
    return folders


def ask(python: str, questions: Sequence[tuple[Path, Path]]) -> Iterator[dict[str, Any]]:
    """What modelDNA says of each (suspect, candidate): "score", "verdict", "reason" and its "version".

    One process with one thread answers all of them.

    Raises:
        RuntimeError: it ended before the last answer.
    """
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "questions.json"
        file.write_text(json.dumps([[str(path) for path in question] for question in questions]), encoding="utf-8")
        command = [python, "-c", DRIVER, str(file)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, encoding="utf-8", env=os.environ | one_thread
        ) as process:
            answered = 0
            for line in progress_bar(process.stdout, total=len(questions), unit="pair", desc="modelDNA"):
                answered += 1
                yield json.loads(line)
    if answered < len(questions):
        raise RuntimeError(
            f"{python}: exit status {process.returncode} after {answered} of {len(questions)} pairs; wanted an"
            " interpreter with modelDNA, as after `pip install modeldna`"
        )


def answers(zoo: Zoo, rows: Rows, python: str) -> list[dict[str, Any]]:
    """Rows of modeldna_scores.csv, for those of scores.csv whose members are at hand."""
    there = [row for row in rows if zoo.has(row["a"]) and zoo.has(row["b"])]
    with tempfile.TemporaryDirectory() as home:
        folders = export(zoo, dict.fromkeys(row[side] for row in there for side in "ab"), Path(home))
        questions = [(folders[row["b"]], folders[row["a"]]) for row in there]
        found = list(ask(python, questions))
    return [{**{key: row[key] for key in PAIR}, **answer} for row, answer in zip(there, found, strict=True)]


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The rows of a modeldna_scores.csv, the score as a number, empty cells as None."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = [{key: value or None for key, value in row.items()} for row in csv.DictReader(file)]
    return [{**row, "score": row["score"] and float(row["score"])} for row in rows]


# --- beside ours ------------------------------------------------------------------------------------------


def join(rows: Rows, answered: Rows) -> list[dict[str, Any]]:
    """The rows of scores.csv that modelDNA was asked about, with "modeldna", its score, and "modeldna_verdict"."""
    found = {_key(row): row for row in answered}
    return [
        {**row, "modeldna": found[_key(row)]["score"], "modeldna_verdict": found[_key(row)]["verdict"]}
        for row in rows
        if _key(row) in found
    ]


def all_tables(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Every table by the name of its file, from joined rows."""
    return {
        "modeldna": by_method(rows),
        "modeldna_transformations": by_transformation(rows),
        "modeldna_verdicts": verdicts(rows),
    }


def by_method(rows: Rows) -> list[dict[str, Any]]:
    """Each method on all pairs, and on those to which modelDNA gives a score: its ranking, and what it decides."""
    scored = [row for row in rows if row["modeldna"] is not None]
    return [
        {"pairs": pairs, **line, **_decisions(some, line["method"])}
        for pairs, some in (("all", rows), ("scored by modelDNA", scored))
        for line in tables.by_method(some, SHOWN)
    ]


def _decisions(rows: Rows, method: str) -> dict[str, Any]:
    """How many relatives, strangers and framed strangers a tool calls related by itself; None for what decides nothing.

    "false_positives_high" is the upper end of the exact 95 % interval of their share.
    """
    relatives, strangers, framed = (_of_use(rows, use) for use in ("positive", "evaluation", "forgery"))
    found, false, fooled = (_called(some, method) for some in (relatives, strangers, framed))
    return {
        "strangers_refused": sum(row[method] is None for row in strangers),
        "relatives_called": found,
        "false_positives": false,
        "false_positives_high": None if false is None else tables.interval(false, len(strangers))[1],
        "framed": len(framed),
        "framed_called": fooled,
    }


def by_transformation(rows: Rows) -> list[dict[str, Any]]:
    """The share of relatives found at 1 % false positives, a column a method; "_called": those it calls related."""
    lines = tables.by_transformation(rows, SHOWN)
    sizes = {line["transformation"]: line for line in lines}
    table = []
    for line in tables.wide(lines, "transformation", "method", "tpr"):
        kind = line.pop("transformation")
        some = [row for row in _of_use(rows, "positive") if row["kind"] == kind]
        called = {f"{tool}_called": _called(some, tool) for tool in RELATED}
        refused = {"modeldna_refused": sum(row["modeldna"] is None for row in some)}
        sizes_of_it = {name: sizes[kind][name] for name in ("relatives", "strangers")}
        table.append({"transformation": kind, **sizes_of_it, **line, **called, **refused})
    return table


def verdicts(rows: Rows) -> list[dict[str, Any]]:
    """How often modelDNA and our `compare` said what, for each use of a pair, and for each frame."""
    uses = [row["kind"] if row["use"] == "forgery" else row["use"] for row in rows]
    said = Counter(
        (use, tool, row[column]) for tool, (column, _) in RELATED.items() for use, row in zip(uses, rows, strict=True)
    )
    return [
        {"use": use, "tool": tool, "verdict": verdict, "pairs": count}
        for wanted in dict.fromkeys(uses)
        for (use, tool, verdict), count in said.items()
        if use == wanted
    ]


def _called(rows: Rows, method: str) -> int | None:
    if method not in RELATED:
        return None
    column, words = RELATED[method]
    return sum(row[column] in words for row in rows)


def _of_use(rows: Rows, use: str) -> Rows:
    return [row for row in rows if row["use"] == use]


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["a"], row["b"], row["use"]


# --- the command ------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with the given command line; None: that of the process."""
    parser = argparse.ArgumentParser(description="Compare modelDNA with the methods of minimoe on the zoo.")
    parser.add_argument(
        "--python", metavar="PATH", help="an interpreter with modelDNA; none: take the answers there are"
    )
    parser.add_argument("--out", type=Path, default=Path("data/zoo/benchmark"), help="where scores.csv lies")
    arguments = parser.parse_args(argv)
    out = arguments.out
    if not (out / "scores.csv").exists():
        parser.error(f"{out / 'scores.csv'}: no such file; `python -m workshop.benchmark --out {out}` writes it")
    if arguments.python is None and not (out / ANSWERS).exists():
        parser.error(f"{out / ANSWERS}: no such file; --python PATH makes it")
    torch.set_num_threads(1)
    rows = [row for row in read_table("scores", out) if row["use"] in USES]
    if arguments.python is not None:
        _update(out / ANSWERS, rows, answers(Zoo(), rows, arguments.python))
    joined = join(rows, read_answers(out / ANSWERS))
    print(f"{len(joined)} of {len(rows)} pairs in the tables")
    for name, table in all_tables(joined).items():
        write_atomically(out / f"{name}.csv", to_csv(table, ".5g").encode())
        print(f"\n{name}\n\n{tables.to_markdown(table)}")


def _update(path: Path, rows: Rows, new: Rows) -> None:
    """Write the answers in the order of `rows`; a pair whose members are not at hand keeps what is said of it there."""
    known = read_answers(path) if path.exists() else []
    found = {_key(row): row for row in (*known, *new)}
    write_atomically(path, to_csv([found[_key(row)] for row in rows if _key(row) in found], ".5g").encode())
    print(f"{len(new)} of {len(rows)} pairs compared by modelDNA now")


if __name__ == "__main__":
    main()
