"""What was measured in the shipped training runs (`minimoe.training.experiments` makes them), read from data/runs."""

from __future__ import annotations

import csv
import json

import numpy as np

from minimoe.data_files import data_path

PLANTED = ("planted-batch", "planted-sequence")  # the runs whose routers were measured
PROFILES = ("profiles/4-layers", "profiles/8-layers", "profiles/8-layers-by-depth")  # strangers, while they trained
# Each table, and the command that makes it.
TABLES = {
    **dict.fromkeys(("train", "held_out", "final"), "python -m minimoe.training.experiments"),
    **dict.fromkeys(("specialization", "ablation"), "python -m workshop.measurements"),
    "std": "python -m workshop.profiles",
}
_WHOLE, _TEXT = ("seed", "step", "layer", "expert"), ("domain", "group", "metric")
_KINDS = {**dict.fromkeys(_WHOLE, int), **dict.fromkeys(_TEXT, str)}  # every other column holds floats

Table = dict[str, np.ndarray]


def read_run(name: str, table: str) -> Table:
    """One table of a shipped run, all seeds, as columns of equal length.

    Args:
        name: of the experiment, a folder of data/runs.
        table: "train" (seed, step, cross_entropy in nats per token and, where there are experts, max_violation_LAYER
            and load_LAYER_EXPERT), "held_out" (seed, step, domain, nats) or "final" (seed, domain, nats); of the
            planted runs also "specialization" and "ablation" (see `workshop.measurements`); of "profiles/..."
            only "std" (see `workshop.profiles`).

    Returns:
        Column name -> array: int64 for counts from 0 (seed, step, layer, expert), str for names, else float64.

    Raises:
        ValueError: there is no such table, or the file is damaged.
        FileNotFoundError: no such run is shipped.
    """
    if table not in TABLES:
        raise ValueError(f"table={table!r}: wanted one of {', '.join(TABLES)}")
    path = data_path("runs") / name / f"{table}.csv"
    remedy = f"`{TABLES[table]} {name}` makes it"
    try:
        header, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
        columns = list(zip(*rows, strict=True))
        return {
            column: np.array(values, dtype=_KINDS.get(column, float))
            for column, values in zip(header, columns, strict=True)
        }
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a whole table ({error}); {remedy}") from error


def where(table: Table, **values: int | str) -> Table:
    """The rows of `table` in which every named column has the given value, as `where(table, seed=0)`."""
    keep = np.logical_and.reduce([table[column] == value for column, value in values.items()])
    return {column: cells[keep] for column, cells in table.items()}


def profile_at(table: Table, *, seed: int, step: int) -> Table:
    """The standard deviations of q, k, v and o of one model, each [L], from a table of `read_run(name, "std")`."""
    rows = where(table, seed=seed, step=step)
    return {role: rows[role] for role in "qkvo"}


def step_times() -> dict[str, float]:
    """What a training step of each model of `benchmarks.dense_twins` costs on one thread; the mixture's is 1.

    The median of `step_time_ratios`, which raises what this raises.
    """
    return {name: float(np.median(ratios)) for name, ratios in step_time_ratios().items()}


def step_time_ratios() -> dict[str, np.ndarray]:
    """The same for each round of the measurement [rounds], in which every model took one step.

    Raises:
        FileNotFoundError: data/runs/step_time.json is missing.
        ValueError: the file is damaged, or holds no measurement on one thread.
    """
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
