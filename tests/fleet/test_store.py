"""A store keeps what was written whatever happens, and finds what is near."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from minimoe.fingerprints import descriptor
from minimoe.fleet.store import FILE, Described, Failed, Store

pytestmark = pytest.mark.exact("bits and words; no number is rounded")


def described(number: int, name: str | None = None) -> Described:
    code = np.random.default_rng(number).integers(0, 2**64, descriptor.WORDS, dtype=np.uint64)
    facts = {"family": "toy", "num_layers": 2, "hidden_size": 24, "num_experts": 0}
    return Described(name=name or f"model-{number}", stamp="1 1", sha256=f"{number:064}", code=code, **facts)


def near_copy(found: Described, bits: int, number: int) -> Described:
    """Another model whose descriptor differs in the first so many bits."""
    flat = np.unpackbits(found.code.view(np.uint8))
    flat[:bits] ^= 1
    return replace(described(number), code=np.packbits(flat).view(np.uint64))


def test_nearest_against_a_sort_of_all(tmp_path):
    models = [described(number) for number in range(30)]
    models += [near_copy(models[7], 100 * step, 100 + step) for step in range(5)]
    with Store(tmp_path) as store:
        for model in models:
            store.record(model)
        found = store.nearest(models[7].code, 12)
    distances = [int(np.unpackbits((model.code ^ models[7].code).view(np.uint8)).sum()) for model in models]
    expected = sorted(range(len(models)), key=lambda place: distances[place])[:12]
    assert [near.names for near in found] == [(models[place].name,) for place in expected]
    assert [near.similarity for near in found] == [np.cos(np.pi * distances[place] / 8192) for place in expected]


def test_fewer_models_than_asked_for(tmp_path):
    with Store(tmp_path) as store:
        assert store.nearest(described(0).code) == []
        store.record(described(0))
        assert [near.similarity for near in store.nearest(described(0).code)] == [1.0]


def test_equal_bytes_are_one_model(tmp_path):
    with Store(tmp_path) as store:
        for name in ("b", "a", "b"):
            store.record(described(1, name))
        assert len(store) == 1
        assert [near.names for near in store.nearest(described(1).code)] == [("a", "b")]


def test_failures_and_changed_files(tmp_path):
    with Store(tmp_path) as store:
        store.record(Failed(name="a", stamp="1 1", reason="no file"))
        assert not store.has("a", "1 1") and store.failures() == {"a": "no file"}
        store.record(described(1, "a"))
        assert store.has("a", "1 1") and not store.has("a", "2 2") and not store.failures()
        store.record(described(2, "a"))  # the file was written anew
        assert [near.names for near in store.nearest(described(1).code)] == [("a",)]
        assert store.stats()["models"] == 2 and store.stats()["names"] == 1


def test_bits_are_written_anew_where_they_are_missing_or_torn(tmp_path):
    with Store(tmp_path) as store:
        for number in range(5):
            store.record(described(number))
        store.nearest(described(0).code)
        (codes,) = tmp_path.glob("codes-*.u64")
        whole = codes.read_bytes()
        for damaged in (b"", whole[:1500], whole + b"beyond"):
            codes.write_bytes(damaged)
            assert store.nearest(described(3).code)[0].names == ("model-3",)
            assert codes.read_bytes() == whole


def test_another_version_is_refused_by_name(tmp_path, monkeypatch):
    Store(tmp_path).close()
    monkeypatch.setattr(descriptor, "VERSION", 7)
    with pytest.raises(ValueError, match="schema 1 and descriptors of version 1, wanted 1 and 7"):
        Store(tmp_path)


def test_no_store(tmp_path):
    (tmp_path / FILE).write_bytes(b"something else" * 1000)
    with pytest.raises(ValueError, match=r"fleet\.duckdb: found no store"):
        Store(tmp_path)


def test_what_was_committed_outlives_the_process(tmp_path):
    """A process that is killed while it writes leaves all that it said it had written, and a store that opens."""
    program = f"""
import os
from tests.fleet.test_store import Store, described
store = Store({str(tmp_path)!r})
for number in range(10**6):
    store.record(described(number))
    print(number, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, encoding="utf-8") as writer:
        said = [int(writer.stdout.readline()) for _ in range(20)]
        with pytest.raises(OSError, match="another process has it open"):
            Store(tmp_path)
        os.kill(writer.pid, signal.SIGKILL)
    with Store(tmp_path) as store:
        assert store.models().keys() >= {f"model-{number}" for number in said}
        assert store.nearest(described(19).code)[0].names == ("model-19",)
        store.record(described(10**7))
