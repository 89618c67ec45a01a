"""Whether a true parent is found by its descriptor: among the zoo, and among up to two million strangers.

    python -m workshop.fleet_scale [--out data/zoo/benchmark] [--sketches runs/fleet_scale] [--home runs/zoo]

fleet.csv         by transformation, of members that come from the evaluation half: how near descendant and parent are,
                  and how often the parent is among the nearest of all members, and of all strangers
fleet_law.csv     quantiles of strangers' similarities: of the law, and of the half of the zoo that it was not fitted on
fleet_scale.csv   recall in larger stores, and what a query takes; `DRAWN` stores exist for the time of the run
fleet_cost.csv    what two million models of the hub would take, from assumptions that stand beside the numbers

`--centre` writes data/fleet/centre.npy first, the mean sketch of strangers 01 to 12: it is part of every descriptor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm, poisson, t

from minimoe.atomic import write_atomically
from minimoe.data_files import data_path
from minimoe.fingerprints.descriptor import BITS, CENTRE, WORDS, similarity, sketch, summed, to_bits
from minimoe.fingerprints.virtual_response import TABLES
from minimoe.fingerprints.weights import open_weights
from minimoe.fleet.store import RECORD, ROWS, nearest_places
from minimoe.lineage.tree import MEMBERS
from minimoe.lineage.zoo import HOME, Zoo, origins, relation
from minimoe.progress import progress_bar
from minimoe.training.tokenizer import load_tokenizer
from workshop.benchmark import to_csv
from workshop.family_tree import CALIBRATION, EVALUATION

SIZES = (10**4, 10**5, 2 * 10**6)
NEAREST = 20
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
FREEDOM = 5  # of Student's t, for strangers with tails heavier than those of a normal law
TIMED, SEARCHED = 10, 40  # queries; in drawn stores those whose parents are farthest are enough
DRAWN_AT_ONCE = 2**12
DRAWN = f"drawn bits, the {SEARCHED} farthest parents"
NORMAL, HEAVY, OTHER_TEXT = "normal", f"t, {FREEDOM} degrees of freedom", "normal, strangers that share another text"

Codes = Mapping[str, NDArray[np.uint64]]


class Query(NamedTuple):
    """A member of the zoo whose parent is looked for."""

    name: str
    parent: str
    similarity: float


# --- descriptors of the zoo -------------------------------------------------------------------------------


def sketches(zoo: Zoo, folder: Path, processes: int | None = None) -> dict[str, NDArray[np.float32]]:
    """The sketch [3, 8192] of every member at hand, kept in `folder`."""
    there = [name for name in MEMBERS if zoo.has(name)]
    missing = [name for name in there if not (folder / f"{name}.npy").exists()]
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        tasks = pool.map(_sketch, *zip(*((zoo.home, folder, name) for name in missing), strict=True)) if missing else ()
        list(progress_bar(tasks, total=len(missing), unit="model", desc="sketches"))
    return {name: np.load(folder / f"{name}.npy") for name in there}


def _sketch(home: Path, folder: Path, name: str) -> None:
    found = sketch(summed(open_weights(Zoo(home).load(name), tokenizer=load_tokenizer())))
    _save(folder / f"{name}.npy", np.stack([found[table].numpy() for table in TABLES]).astype(np.float32))


def _save(path: Path, array: NDArray) -> None:
    data = BytesIO()
    np.save(data, array)
    write_atomically(path, data.getvalue())


def code_of(found: NDArray[np.float32]) -> NDArray[np.uint64]:
    """The descriptor of a sketch."""
    return to_bits(dict(zip(TABLES, torch.from_numpy(found), strict=True)))


# --- among the members of the zoo -------------------------------------------------------------------------


def queries(codes: Codes) -> list[Query]:
    """Members with a parent of shared lineage, none of whose origins took part in the calibration."""
    found = []
    for name, member in MEMBERS.items():
        asked = name in codes and member.parents and member.parents[0] in codes and not member.kind.startswith("framed")
        if asked and relation(name, parent := member.parents[0]) == "shared lineage" and not _calibrates(name):
            found.append(Query(name, parent, float(similarity(codes[parent], codes[name]))))
    return found


def _calibrates(name: str) -> bool:
    return bool(origins(name) & set(CALIBRATION))


def by_transformation(codes: Codes, asked: Sequence[Query]) -> list[dict[str, Any]]:
    """fleet.csv. Members nearer than the parent are counted; those of one function, as near, are not."""
    groups: dict[str, list[tuple[Query, int, int]]] = {}
    for query in asked:
        nearer = [
            other
            for other, code in codes.items()
            if other not in (query.name, query.parent) and similarity(code, codes[query.name]) > query.similarity
        ]
        strangers = [other for other in nearer if relation(query.name, other) != "shared lineage"]
        for group in ("all", MEMBERS[query.name].kind or MEMBERS[query.name].recipe):
            groups.setdefault(group, []).append((query, len(nearer), len(strangers)))
    table = []
    for kind, found in groups.items():
        found_similarities = [query.similarity for query, _, _ in found]
        table.append(
            {
                "transformation": kind,
                "queries": len(found),
                "members": len(codes),
                "lowest": min(found_similarities),
                "median": median(found_similarities),
                "recall_1": mean(nearer < 1 for _, nearer, _ in found),
                "recall_20": mean(nearer < NEAREST for _, nearer, _ in found),
                "before_strangers": mean(strangers < 1 for _, _, strangers in found),
            }
        )
    return table


# --- strangers in any number ------------------------------------------------------------------------------


class Law(NamedTuple):
    """Mean and standard deviation of strangers' similarities."""

    mean: float
    std: float


def law_of_strangers(found: Mapping[str, NDArray[np.float32]]) -> Law:
    """Of pairs of strangers 01 to 12, each beside the mean of the ten others, which knows nothing of it.

    A mean of n independent models is off by a share 1 / n of what one of them is, and all others are off from it
    together: their similarities have a mean of 1 / (n + 1), of 1 / 13 beside the centre, and of 1 / 11 here.
    """
    roots, similarities = np.stack([found[name] for name in CALIBRATION]), []
    for i in range(len(roots)):
        for j in range(i):
            centre = np.delete(roots, [i, j], axis=0).mean(0)
            bits = [np.packbits((roots[k] - centre).sum(0) > 0).view(np.uint64) for k in (i, j)]
            similarities.append(float(similarity(*bits)))
    return Law(mean(similarities) * (len(roots) - 1) / (len(roots) + 1), float(np.std(similarities, ddof=1)))


def held_out_similarities(codes: Codes, *, of_another_text: bool = False) -> list[float]:
    """Of pairs of strangers of the evaluation half; or of those trained on the planted corpus, which no calibration
    has seen."""
    planted = [name for name in codes if not MEMBERS[name].parents and MEMBERS[name].options.get("corpus") == "planted"]
    names = planted if of_another_text else [name for name in EVALUATION if name in codes]
    pairs = ((a, b) for place, a in enumerate(names) for b in names[:place])
    return [float(similarity(codes[a], codes[b])) for a, b in pairs if relation(a, b) == "strangers"]


def quantiles(law: Law, drawn: Sequence[float], held_out: Sequence[float]) -> list[dict[str, float]]:
    """fleet_law.csv."""
    count = len(held_out)
    return [
        {
            "quantile": share,
            "held_out": float(np.quantile(held_out, share)),
            "normal": float(norm.ppf(min(share, 1 - 0.5 / count), *law)),  # of the highest: what is usual for so many
            "t": float(
                t.ppf(min(share, 1 - 0.5 / count), FREEDOM, law.mean, law.std * ((FREEDOM - 2) / FREEDOM) ** 0.5)
            ),
            "drawn": float(np.quantile(drawn, share)),
            "pairs": count,
        }
        for share in QUANTILES
    ]


def draw(count: int, found: Mapping[str, NDArray[np.float32]], seed: int = 0) -> Iterator[NDArray[np.uint64]]:
    """Descriptors of strangers that are not: around the mean that the centre estimates, all numbers independent.

    To models of the zoo they are as near as other strangers are, since the centre, a mean of twelve, is off by the same
    for all; they spread less. What is normal in a sketch is above 0 with a probability of its own in each place, here
    in steps of 1/256.
    """
    roots = np.stack([found[name] for name in CALIBRATION])
    std = (roots - roots.mean(0)).sum(1).std(ddof=1)
    everyone = np.stack([found[name] for name in (*CALIBRATION, *EVALUATION) if name in found]).mean(0)
    above = np.rint(256 * norm.cdf((everyone - roots.mean(0)).sum(0) / std)).astype(np.uint8)
    generator = np.random.default_rng(seed)
    for start in range(0, count, DRAWN_AT_ONCE):
        numbers = np.frombuffer(generator.bytes(min(DRAWN_AT_ONCE, count - start) * BITS), np.uint8).reshape(-1, BITS)
        yield np.packbits(numbers < above, axis=1).view(np.uint64)


def recall(asked: Sequence[Query], size: int, tail: Any, nearest: int) -> list[float]:
    """The probability that fewer than `nearest` of so many strangers are nearer than each parent."""
    return [round(float(poisson.cdf(nearest - 1, size * tail(query.similarity))), 6) for query in asked]


def by_size(codes: Codes, asked: Sequence[Query], law: Law, other_text: Law, drawn: Mapping[int, dict]) -> list[dict]:
    """fleet_scale.csv."""
    heavy = law.std * ((FREEDOM - 2) / FREEDOM) ** 0.5
    tails = {
        NORMAL: lambda x: norm.sf(x, *law),
        HEAVY: lambda x: t.sf(x, FREEDOM, law.mean, heavy),
        OTHER_TEXT: lambda x: norm.sf(x, *other_text),
    }
    table = [{"law": DRAWN, "size": size, "queries": SEARCHED, **row} for size, row in drawn.items()]
    for name, tail in tails.items():
        for size in SIZES:
            first, in_20 = (recall(asked, size, tail, nearest) for nearest in (1, NEAREST))
            table.append(
                {
                    "law": name,
                    "size": size,
                    "queries": len(asked),
                    "recall_1": mean(first),
                    "recall_20": mean(in_20),
                    **_worst(asked, in_20),
                }
            )
    return table


def _worst(asked: Sequence[Query], found: Sequence[float]) -> dict[str, Any]:
    """The transformation whose parents are found most rarely."""
    groups: dict[str, list[float]] = {}
    for query, one in zip(asked, found, strict=True):
        groups.setdefault(MEMBERS[query.name].kind or MEMBERS[query.name].recipe, []).append(one)
    kind = min(groups, key=lambda kind: mean(groups[kind]))
    return {"worst": kind, "worst_recall_20": mean(groups[kind])}


def search_drawn(codes: Codes, asked: Sequence[Query], found: Mapping[str, NDArray], folder: Path) -> dict[int, dict]:
    """The stores of drawn strangers, written as the store writes its bits, and searched for the farthest parents."""
    asked = sorted(asked, key=lambda query: query.similarity)[:SEARCHED]
    path = folder / "drawn.u64"
    with open(path, "wb") as file:
        for block in progress_bar(draw(max(SIZES), found), total=-(-max(SIZES) // DRAWN_AT_ONCE), desc="drawing"):
            file.write(block.tobytes())
    rows = {}
    try:
        for size in SIZES:
            drawn = np.memmap(path, np.uint64, mode="r", shape=(size, WORDS))
            seconds, of_processors = [], []
            for query in asked[:: max(1, len(asked) // TIMED)]:
                start, busy = time.perf_counter(), time.process_time()
                nearest_places(drawn, codes[query.name], NEAREST)
                seconds.append(time.perf_counter() - start)
                of_processors.append(time.process_time() - busy)
            nearer = _nearer(drawn, codes, asked)
            in_20 = [float(count < NEAREST) for count in nearer]
            rows[size] = {
                "recall_1": mean(count < 1 for count in nearer),
                "recall_20": mean(in_20),
                **_worst(asked, in_20),
                "seconds": median(seconds),
                "processor_seconds": median(of_processors),  # of all threads together, whatever else is running
                "megabytes": size * RECORD / 1e6,
            }
    finally:
        path.unlink()
    return rows


def _nearer(drawn: NDArray[np.uint64], codes: Codes, asked: Sequence[Query]) -> list[int]:
    """How many drawn strangers are nearer to each query than its parent; a tie counts against the parent."""
    counts = np.zeros(len(asked), np.int64)
    limits = [np.bitwise_count(codes[query.parent] ^ codes[query.name]).sum() for query in asked]
    for start in progress_bar(range(0, len(drawn), ROWS), desc="searching"):
        block = np.asarray(drawn[start : start + ROWS])
        for place, query in enumerate(asked):
            counts[place] += (np.bitwise_count(block ^ codes[query.name]).sum(1, dtype=np.int32) <= limits[place]).sum()
    return counts.tolist()


# --- on paper ---------------------------------------------------------------------------------------------

# Assumptions, none of which was measured: they are there to be changed.
MODELS = 2_000_000
ASSUMED = {
    "mean size of the weight files of a model": (2.0, "GB"),
    "share of models whose bytes are there twice": (0.3, ""),
    "bytes a second that one worker receives": (0.1, "GB/s"),
    "weights that one core describes in a second": (0.05, "GB/s"),
    "workers, one core each": (200, ""),
    "price of a core for an hour": (0.05, "units of money"),
    "price of a gigabyte received": (0.0, "units of money"),
}


def cost() -> list[dict[str, Any]]:
    """fleet_cost.csv: every assumption, and what follows from them."""
    size, twice, received, described, workers, core, traffic = (value for value, _ in ASSUMED.values())
    gigabytes = MODELS * (1 - twice) * size
    hours = gigabytes * (1 / received + 1 / described) / 3600
    follows = {
        "models": (MODELS, ""),
        "bytes moved": (gigabytes / 1e6, "PB"),
        "hours of one worker": (hours, "h"),
        "hours of all workers together": (hours / workers, "h"),
        "money": (hours * core + gigabytes * traffic, "units of money"),
        "bytes of the descriptors": (MODELS * RECORD / 1e9, "GB"),
    }
    return [
        {"what": what, "value": value, "unit": unit, "kind": kind}
        for kind, rows in (("assumed", ASSUMED), ("follows", follows))
        for what, (value, unit) in rows.items()
    ]


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=data_path("zoo/benchmark"), help="a folder for the tables")
    parser.add_argument("--sketches", type=Path, default=Path("runs/fleet_scale"), help="a folder to keep sketches in")
    parser.add_argument("--home", type=Path, default=HOME, help="a folder with the members that are not shipped")
    parser.add_argument("--processes", type=int, help="how many at once")
    parser.add_argument("--centre", action="store_true", help="measure the mean stranger anew")
    arguments = parser.parse_args()
    found = sketches(Zoo(arguments.home), arguments.sketches, arguments.processes)
    if arguments.centre:
        _save(data_path(CENTRE), np.stack([found[name] for name in CALIBRATION]).mean(0).astype(np.float16))
    codes = {name: code_of(one) for name, one in found.items()}
    asked = queries(codes)
    planted = held_out_similarities(codes, of_another_text=True)
    law, other_text = law_of_strangers(found), Law(mean(planted), float(np.std(planted, ddof=1)))
    strangers = [code for block in draw(200, found, seed=1) for code in block]
    drawn = [float(similarity(codes[name], code)) for code in strangers for name in EVALUATION if name in codes]
    scale = by_size(codes, asked, law, other_text, search_drawn(codes, asked, found, arguments.sketches))
    columns = list(scale[0])
    tables = {
        "fleet": by_transformation(codes, asked),
        "fleet_law": quantiles(law, drawn, held_out_similarities(codes)),
        "fleet_scale": [{column: row.get(column) for column in columns} for row in scale],
        "fleet_cost": cost(),
    }
    for name, table in tables.items():
        write_atomically(arguments.out / f"{name}.csv", to_csv(table).encode())


if __name__ == "__main__":
    main()
