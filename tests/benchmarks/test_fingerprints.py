"""The benchmark of streamed statistics times what it says, tells memory apart, and refuses a peer that disagrees."""

import json

import pytest
import torch

from benchmarks import fingerprints
from minimoe.model.checkpoint import Checkpoint


@pytest.fixture
def tiny(monkeypatch):
    """Layers of 150 kB."""
    monkeypatch.setattr(fingerprints, "HIDDEN_SIZE", 64)


def test_the_checkpoint_has_the_size_asked_for(tiny, tmp_path):
    fingerprints.make_checkpoint(tmp_path, gigabytes=2e-3)
    checkpoint = Checkpoint(tmp_path)
    assert sum(file.stat().st_size for file in checkpoint.files) == pytest.approx(2e6, rel=0.1)
    assert checkpoint.dtype == torch.bfloat16


@pytest.mark.exact("times and prints; results are compared in other tests")
def test_prints_a_table_and_writes_every_time(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fingerprints, "in_fresh_process", lambda call, *arguments: call(*arguments))  # seconds each
    monkeypatch.setattr(fingerprints, "extra_memory", lambda folder, way: 3.0 if way == fingerprints.OURS else 500.0)
    file = tmp_path / "results.json"
    arguments = ["--gigabytes", "0.001", "--rounds", "2", "--threads", "1", "--json", str(file)]
    fingerprints.main(arguments)
    speed, memory = json.loads(file.read_text(encoding="utf-8"))["results"]
    ways = {fingerprints.OURS, fingerprints.PEER, fingerprints.READ, fingerprints.BUFFER}
    assert set(speed["seconds"]) == ways and all(len(times) == 2 for times in speed["seconds"].values())
    assert [(target["peer"], target["wanted"]) for target in speed["targets"]] == [
        (fingerprints.PEER, 4.0),
        (fingerprints.READ, 0.6),
    ]
    assert memory["extra_megabytes"] == {fingerprints.OURS: 3.0, fingerprints.PEER: 500.0} and memory["reached"]
    assert "memory: 3 MB" in capsys.readouterr().out


@pytest.mark.exact("starts processes, which are not reached")
def test_memory_of_a_pass_is_seen(tmp_path):
    """A matrix of 33 MB as stored, which the peer holds in float32 as well."""
    fingerprints.make_checkpoint(tmp_path, gigabytes=0.1)
    assert fingerprints.extra_memory(tmp_path, fingerprints.OURS) < 20
    assert fingerprints.extra_memory(tmp_path, fingerprints.PEER) > 60


def test_a_peer_that_computes_something_else_is_named(tiny, tmp_path):
    fingerprints.make_checkpoint(tmp_path, gigabytes=1e-3)
    calls = fingerprints.ways(tmp_path)
    fingerprints.assert_same_results(calls)
    wrong = calls[fingerprints.PEER]()
    wrong[3] *= 1.01
    with pytest.raises(AssertionError, match="matrix 3"):
        fingerprints.assert_same_results(calls | {fingerprints.PEER: lambda: wrong})
