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


def test_a_pivot_goes_by_the_columns_and_leaves_gaps(folder):
    table = runs.read_run("tiny", "held_out")
    for order in ([0, 1, 2], [2, 1, 0]):
        shuffled = {column: values[order] for column, values in table.items()}
        values, domains, seeds = runs.pivot(shuffled, "nats", "domain", "seed")
        assert seeds.tolist() == [0, 1] and domains.tolist() == ["code", "prose"]  # names in the order of the table
        np.testing.assert_array_equal(values, [[3.25, 3.5], [4.0, np.nan]])
    names = runs.pivot({"domain": np.array(["z", "a"]), "nats": np.array([1.0, 2.0])}, "nats", "domain")[1]
    assert names.tolist() == ["z", "a"]


def test_losses_are_means_over_the_domains_or_those_of_one():
    table = {"seed": np.array([0, 0, 1, 1]), "domain": np.array(["b", "a"] * 2), "nats": np.array([1.0, 3, 2, 6])}
    assert runs.losses(table).tolist() == [2, 4] and runs.losses(table, "a").tolist() == [3, 6]
    steps = {**table, "step": np.array([5, 5, 5, 5])}
    assert runs.losses(steps, "b").tolist() == [[1], [2]]


def test_a_missing_file_is_named_with_the_command_that_makes_it(folder):
    for name, table in (("tiny", "train"), ("unknown", "held_out")):
        wanted = rf"{name}/{table}\.csv is missing: `python -m [\w.]+ {name}` makes it"
        with pytest.raises(FileNotFoundError, match=wanted):
            runs.read_run(name, table)
    with pytest.raises(
        FileNotFoundError, match=r"step_time\.json is missing: `python -m benchmarks\.dense_twins --json"
    ):
        runs.step_times()


def test_an_unknown_table_is_refused(folder):
    with pytest.raises(ValueError, match="table='loss': wanted one of train, held_out, final"):
        runs.read_run("tiny", "loss")


def test_a_damaged_table_is_refused(folder):
    """Empty, a header only, cut short, without a number, and with half a seed."""
    header = "seed,step,domain,nats\n"
    for text in ("", header, header + "0,100,co", "seed,nats\n0,1.5\n0,\n", "seed,nats\n0.5,1\n"):
        (folder / "held_out.csv").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"tiny/held_out\.csv: not a whole table .* tiny` makes it"):
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


def test_damaged_step_times_are_refused(folder):
    for text in (
        "",
        "1",
        '{"results": []}',
        '{"results": [{"threads": 2, "seconds": {}}]}',
        '{"results": [{"threads": 1, "seconds": {"twin": [1]}}]}',
        '{"results": [{"threads": 1, "seconds": {"mixture": [1, 2, 3], "twin": [1, 2]}}]}',
    ):
        (folder.parent / "step_time.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"step_time\.json: not the times on one thread .*dense_twins --json"):
            runs.step_times()


def test_shipped_step_times_are_those_that_the_benchmark_reported():
    results = json.loads((runs.data_path("runs") / "step_time.json").read_text(encoding="utf-8"))["results"]
    reported = {name: speed["of_rounds"] for name, speed in results[0]["speed_against"].items()}
    assert results[0]["threads"] == 1
    assert runs.step_times() == pytest.approx(reported)


def test_every_shipped_table_is_that_of_an_experiment():
    tables = sorted(runs.data_path("runs").glob("*/*.csv"))
    assert len(tables) > 20
    for path in tables:
        name, table = path.parent.name, path.stem
        found = runs.read_run(name, table)
        assert name in experiments.EXPERIMENTS
        assert all(np.isfinite(column).all() for column in found.values() if column.dtype.kind == "f"), path
        if table == "held_out":
            every = experiments.EVALUATE_EVERY
            assert found["step"].max() == experiments.EXPERIMENTS[name].steps // every * every, path
