"""The benchmark of the metrics measures all of them, keeps its limit, and refuses a peer that disagrees."""

import inspect as python_inspect
import json

import numpy as np
import pytest
import torch

from benchmarks import inspection
from minimoe.inspection import metrics
from minimoe.inspection.nulls import Measured

SMALL = inspection.Size(layers=2, tokens=1500, experts=8, k=2, documents=40)


@pytest.fixture
def tiny(monkeypatch):
    """Sizes that take milliseconds."""
    monkeypatch.setattr(inspection, "SIZES", (SMALL,))
    monkeypatch.setattr(inspection, "PEER_SIZE", inspection.Size(1, 3000, 4, 1, 60))
    monkeypatch.setattr(inspection, "PEER_SHUFFLES", 40)


def test_sizes_are_a_million_routed_tokens():
    for size in inspection.SIZES:
        assert size.layers * size.tokens * size.k == 1_000_000


def test_every_metric_is_timed():
    """All public functions of the module that return a measurement."""
    trace = inspection.make_trace(SMALL)
    calls = inspection.calls_of_all(trace, inspection.make_trace(SMALL, router=1))
    timed = {name.split(",")[0] for name in calls}
    functions = python_inspect.getmembers(metrics, python_inspect.isfunction)
    public = {
        name
        for name, function in functions
        if function.__annotations__.get("return") is metrics.Measured
        and function.__module__ == metrics.__name__
        and not name.startswith("_")
    }
    assert timed == public
    for name, call in calls.items():
        assert isinstance(call(), Measured), name


@pytest.mark.exact("times and prints; results are compared in other tests")
@pytest.mark.parametrize("limit", [1e-9, 1e9])
def test_prints_a_table_and_writes_every_time(limit, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspection, "LIMIT", limit)
    file = tmp_path / "results.json"
    threads_before = torch.get_num_threads()
    inspection.main(["--rounds", "2", "--threads", "1", "2", "--json", str(file)])

    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert [result["threads"] for result in results] == [1, 1, 2, 2]
    printed = capsys.readouterr().out
    assert printed.count("6,000 routed tokens") == 2
    for result in results[::2]:
        seconds = list(result["seconds"].values())
        assert all(len(times) == 2 and min(times) > 0 for times in seconds)
        assert result["median_total"] == pytest.approx(np.median(np.sum(seconds, axis=0)))
        assert result["reached"] == (limit > 1)
    assert printed.count("NOT REACHED: wanted below") == (0 if limit > 1 else 2)
    for result in results[1::2]:
        assert set(result["seconds"]) == {inspection.OURS, inspection.PEER}
        (target,) = result["targets"]
        assert target["found"] == min(result["speed_against"][inspection.PEER].values())
    assert torch.get_num_threads() == threads_before


def test_a_peer_that_computes_something_else_is_named(tiny):
    calls = inspection.peers(inspection.make_trace(inspection.PEER_SIZE))
    inspection.assert_same_results(calls)
    honest = calls[inspection.PEER]()
    for name in Measured._fields:
        wrong = honest._replace(**{name: getattr(honest, name) * 1.2})
        with pytest.raises(AssertionError, match=rf"\b{name}\b"):
            inspection.assert_same_results(calls | {inspection.PEER: lambda wrong=wrong: wrong})
