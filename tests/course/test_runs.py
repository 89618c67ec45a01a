"""Tables of shipped runs: read as they were written, refused when they are not whole."""

import json

import numpy as np
import pytest

from minimoe.course import runs
from workshop import experiments

ROWS = [
    {"seed": 0, "step": 100, "domain": "code", "nats": 3.25},
    {"seed": 0, "step": 100, "domain": "prose", "nats": 4.0},
    {"seed": 1, "step": 100, "domain": "code", "nats": 3.5},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run called "tiny", whose held-out table was written by the code that writes the shipped ones."""
    monkeypatch.setattr(runs, "data_path", lambda name: tmp_path / name)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "held_out.csv").write_text(experiments.to_csv(ROWS), encoding="utf-8")
    return tmp_path / "runs" / "tiny"


def test_a_table_is_read_as_it_was_written(folder):
    table = runs.read_run("tiny", "held_out")
    assert [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)] == ROWS
    assert [column.dtype.kind for column in table.values()] == ["i", "i", "U", "f"]


def test_rows_are_chosen_by_value(folder):
    table = runs.read_run("tiny", "held_out")
    assert runs.where(table, domain="code")["nats"].tolist() == [3.25, 3.5]
    assert runs.where(table, domain="code", seed=1)["nats"].tolist() == [3.5]
    assert runs.where(table, seed=7)["nats"].tolist() == []


@pytest.mark.parametrize("name, table", [("tiny", "train"), ("unknown", "held_out")])
def test_a_missing_file_is_named_with_the_command_that_makes_it(folder, name, table):
    wanted = rf"{name}/{table}\.csv is missing: `python -m workshop\.experiments {name}` makes it"
    with pytest.raises(FileNotFoundError, match=wanted):
        runs.read_run(name, table)


def test_an_unknown_table_is_refused(folder):
    with pytest.raises(ValueError, match="table='loss': wanted one of train, held_out, final"):
        runs.read_run("tiny", "loss")


@pytest.mark.parametrize(
    "text",
    ["", "seed,step,domain,nats\n", "seed,step,domain,nats\n0,100,co", "seed,nats\n0,1.5\n0,\n", "seed,nats\n0.5,1\n"],
    ids=["empty", "header only", "cut short", "a number is missing", "half a seed"],
)
def test_a_damaged_file_is_refused(folder, text):
    (folder / "held_out.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"tiny/held_out\.csv: not a whole table .*experiments tiny` makes it"):
        runs.read_run("tiny", "held_out")


def test_step_times_are_shares_of_the_mixtures_round_by_round(folder):
    results = [
        {"threads": threads, "seconds": {"mixture": [2.0, 4.0, 1.0], "twin": twin}}
        for threads, twin in ((1, [1.0, 3.0, 5.0]), (2, [1.0, 1.0, 1.0]))
    ]
    (folder.parent / "step_time.json").write_text(json.dumps({"results": results}), encoding="utf-8")
    ratios = {name: values.tolist() for name, values in runs.step_time_ratios().items()}
    assert ratios == {"mixture": [1.0, 1.0, 1.0], "twin": [0.5, 0.75, 5.0]}
    assert runs.step_times() == {"mixture": 1.0, "twin": 0.75}


def test_shipped_step_times_are_those_that_the_benchmark_reported():
    results = json.loads((runs.data_path("runs") / "step_time.json").read_text(encoding="utf-8"))["results"]
    reported = {name: speed["of_rounds"] for name, speed in results[0]["speed_against"].items()}
    assert results[0]["threads"] == 1
    assert runs.step_times() == pytest.approx(reported)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "1",
        '{"results": []}',
        '{"results": [{"threads": 2, "seconds": {}}]}',
        '{"results": [{"threads": 1, "seconds": {"twin": [1]}}]}',
        '{"results": [{"threads": 1, "seconds": {"mixture": [1, 2, 3], "twin": [1, 2]}}]}',
    ],
)
def test_damaged_step_times_are_refused(folder, text):
    (folder.parent / "step_time.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"step_time\.json: not the times on one thread .*dense_twins --json"):
        runs.step_times()


def test_missing_step_times_are_named_with_the_command_that_makes_them(folder):
    with pytest.raises(
        FileNotFoundError, match=r"step_time\.json is missing: `python -m benchmarks\.dense_twins --json"
    ):
        runs.step_times()


def shipped():
    folder = runs.data_path("runs")
    return sorted((path.parent.name, path.stem) for path in folder.glob("*/*.csv"))


@pytest.mark.parametrize("name, table", shipped())
def test_every_shipped_table_is_that_of_an_experiment(name, table):
    found = runs.read_run(name, table)
    assert name in experiments.EXPERIMENTS
    assert all(np.isfinite(column).all() for column in found.values() if column.dtype.kind == "f")
    if table == "held_out":
        every = experiments.EVALUATE_EVERY
        assert found["step"].max() == experiments.EXPERIMENTS[name].steps // every * every
