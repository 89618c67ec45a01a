"""The benchmark of experts over processes times what it says, and its arithmetic is that of the published numbers."""

import json

import pytest

from benchmarks import parallel
from minimoe.course.published import read_published


@pytest.mark.exact("times and prints; results are compared in other tests")
def test_prints_tables_and_writes_every_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parallel, "SETTINGS", dict(list(parallel.SETTINGS.items())[:2]))
    file = tmp_path / "results.json"
    parallel.main(["--rounds", "1", "--steps", "1", "--json", str(file)])
    small, large, even, skewed, paper = json.loads(file.read_text(encoding="utf-8"))["results"]
    for speed in small, large:
        assert list(speed["seconds"]) == [parallel.ALONE, parallel.TWO]
        assert speed["targets"][0]["wanted"] == parallel.WANTED
        assert {"dispatch", "combine", "gradients", "load"} <= speed["two"]["sent"].keys()
    shared = [speed["two"]["sent"]["gradients"]["bytes"] for speed in (small, large)]
    assert shared[0] == shared[1]  # of all but the experts, whatever the experts' width
    assert skewed["MoGE"]["rows"][0] == skewed["MoGE"]["rows"][1]
    assert skewed["top-k"]["simulated"] > even["top-k"]["simulated"] > 1
    assert [row["nodes"] for row in paper["on_paper"]] == [1, 2, 4, 8, 16, 32, 64]
    printed = capsys.readouterr().out
    assert "2 processes" in printed and "reported speeds" in printed


def test_the_arithmetic_by_hand():
    """Two nodes: nearly every token goes to the other one, 4096 x 7168 bytes at 50 GB/s, and as reported at 43."""
    row = parallel.on_paper()[1]
    assert row["dispatch"] == pytest.approx(row["crossing"] * 4096 * 7168 / 50e9)
    assert row["combine as reported"] == pytest.approx(row["crossing"] * 4096 * 7168 * 2 / 43e9)
    assert row["crossing"] == pytest.approx(1, abs=0.02)
    assert all(row["source"] for row in read_published("links"))
