"""What was measured in the shipped training runs (`workshop.experiments` makes them), read from data/runs."""

import csv
import json
from collections.abc import Mapping

import numpy as np

from minimoe.data_files import data_path
from minimoe.model import MoEConfig
from minimoe.model.config import require
from minimoe.training.presets import EXPERIMENTS, small_config

PLANTED = ("planted-batch", "planted-sequence")  # the runs whose routers were measured
TABLES = {  # each table, and the command that makes it
    **dict.fromkeys(("train", "held_out", "final"), "python -m workshop.experiments"),
    **dict.fromkeys(("specialization", "ablation"), "python -m workshop.measurements"),
    "std": "python -m workshop.profiles",
}
_KINDS = {  # what a column holds if not floats
    **dict.fromkeys(("seed", "step", "layer", "expert"), int),
    **dict.fromkeys(("domain", "group", "metric"), str),
}

MIXTURE, EQUAL_ACTIVE, EQUAL_TOTAL = "mixture", "dense, equal active", "dense, equal total"
# The runs to compare, by what they were given the same amount of. With equal active parameters, equal tokens are equal
# compute, so one run serves both.
RUNS = {
    "tokens": {MIXTURE: "moe", EQUAL_ACTIVE: "dense-active", EQUAL_TOTAL: "dense-total"},
    "compute": {MIXTURE: "moe", EQUAL_ACTIVE: "dense-active", EQUAL_TOTAL: "dense-total-compute"},
    "time": {MIXTURE: "moe", EQUAL_ACTIVE: "dense-active-clock", EQUAL_TOTAL: "dense-total-clock"},
}
# Every dense model and what it was given as much of as the mixture; each run once.
TWINS = {
    "dense-active": (EQUAL_ACTIVE, "same tokens and compute"),
    "dense-active-clock": (EQUAL_ACTIVE, "same time"),
    "dense-total": (EQUAL_TOTAL, "same tokens"),
    "dense-total-compute": (EQUAL_TOTAL, "same compute"),
    "dense-total-clock": (EQUAL_TOTAL, "same time"),
}
ALL = "all domains"

Table = dict[str, np.ndarray]


def read_run(name: str, table: str) -> Table:
    """One table of a shipped run, all seeds, as columns of equal length.

    Args:
        name: of the experiment, a folder of data/runs.
        table: "train" (seed, step, cross_entropy in nats per token and, where there are experts, max_violation_LAYER
            and load_LAYER_EXPERT), "held_out" (seed, step, domain, nats) or "final" (seed, domain, nats); of the
            planted runs also "specialization" and "ablation" (see `workshop.measurements`); of "profiles/..."
            only "std" (see `workshop.profiles`).

    Counts from 0 (seed, step, layer, expert) are int64, names str, and all else float64. Raises ValueError where there
    is no such table or the file is damaged, FileNotFoundError where no such run is shipped.
    """
    require(table in TABLES, "table", table, f"one of {', '.join(TABLES)}")
    path = data_path("runs") / name / f"{table}.csv"
    remedy = f"`{TABLES[table]} {name}` makes it"
    try:
        header, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        return {column: np.array(values, dtype=_KINDS.get(column, float)) for column, values in columns.items()}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a whole table ({error}); {remedy}") from error


def read_runs(runs: Mapping[str, str], *tables: str) -> dict[str, tuple[Table, ...]]:
    """Some tables of several shipped runs, given as what each is called -> its name."""
    return {called: tuple(read_run(name, table) for table in tables) for called, name in runs.items()}


def pivot(table: Table, column: str, *by: str) -> tuple[np.ndarray, ...]:
    """A column of `table` as an array with an axis for each column in `by`, and the entries of each of these axes:
    numbers ascending, or names in the order of the table. NaN where the table has no row."""
    columns = [table[name] for name in by]
    axes = [np.array([*dict.fromkeys(cells)]) if cells.dtype.kind == "U" else np.unique(cells) for cells in columns]
    places = tuple((cells[:, None] == entries).argmax(1) for cells, entries in zip(columns, axes, strict=True))
    values = np.full([len(entries) for entries in axes], np.nan)
    values[places] = table[column]
    return values, *axes


def where(table: Table, **values: int | str) -> Table:
    """The rows of `table` in which every named column has the given value, as `where(table, seed=0)`."""
    keep = np.logical_and.reduce([table[column] == value for column, value in values.items()])
    return {column: cells[keep] for column, cells in table.items()}


def step_times() -> dict[str, float]:
    """What a training step of each model of `benchmarks.dense_twins` costs on one thread; the mixture's is 1. The
    median of `step_time_ratios`, which raises what this raises."""
    return {name: float(np.median(ratios)) for name, ratios in step_time_ratios().items()}


def step_time_ratios() -> dict[str, np.ndarray]:
    """The same for each round of the measurement [rounds], in which every model took one step. Raises
    FileNotFoundError without data/runs/step_time.json, ValueError where that is damaged, or not of one thread."""
    path = data_path("runs") / "step_time.json"
    remedy = f"`python -m benchmarks.dense_twins --json {path}` makes it"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        (seconds,) = (result["seconds"] for result in results if result["threads"] == 1)
        return {name: np.array(rounds) / np.array(seconds["mixture"]) for name, rounds in seconds.items()}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: {remedy}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the times on one thread ({error}); {remedy}") from error


def config_of(run: str) -> MoEConfig:
    """The model that was trained in a shipped run."""
    recipe = EXPERIMENTS[run]
    return small_config(experts=recipe.experts, experts_per_token=recipe.experts_per_token, balance=recipe.balance)


def final_losses(run: str, domain: str = ALL) -> np.ndarray:
    """Held-out nats per token after the last step, one number a seed: of one domain, or the mean of all. Raises what
    `losses` and `read_run` raise."""
    return losses(read_run(run, "final"), domain)


def final_differences(run: str, domain: str = ALL) -> np.ndarray:
    """By how many nats per token a run ends above the mixture, seed by seed. Positive: the mixture is better."""
    return final_losses(run, domain) - final_losses(RUNS["tokens"][MIXTURE], domain)


def losses_while_training(run: str, domain: str = ALL) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n], and the held-out nats per token after each of them [seeds, n]: of one domain, or the mean of all.
    Raises what `losses` and `read_run` raise."""
    table = read_run(run, "held_out")
    return np.unique(table["step"]), losses(table, domain)


def better(gap: np.ndarray) -> str:
    """Who ends lower with every seed, "mixture" or "dense", or "open" where seeds differ; of dense minus mixture."""
    return "mixture" if gap.min() > 0 else "dense" if gap.max() < 0 else "open"


def losses(table: Table, domain: str = ALL) -> np.ndarray:
    """Held-out nats per token in a table "final" [seeds], or "held_out" [seeds, steps]: of one domain, or their mean.
    Raises ValueError where there is no such domain."""
    by = ("seed", "step", "domain") if "step" in table else ("seed", "domain")
    nats, *_, domains = pivot(table, "nats", *by)
    if domain == ALL:
        return nats.mean(-1)
    require(domain in domains, "domain", domain, f"one of {', '.join([ALL, *domains])}")
    return nats[..., domains.tolist().index(domain)]
