"""Models read by processes of a real cluster, one of which is killed."""

import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from dask import distributed

from minimoe.fingerprints.descriptor import describe
from minimoe.fingerprints.weights import open_weights
from minimoe.fleet.adding import add, read, stamp_of
from minimoe.fleet.store import Described, Failed, Store
from tests.fleet.models import folders

pytestmark = pytest.mark.exact("of other processes, which an imitated rounding does not reach")


class Counting(Store):
    """A store that counts what is recorded, and at the third calls `then`."""

    def __init__(self, folder, then):
        super().__init__(folder)
        self.recorded, self.then = Counter(), then

    def record(self, found):
        super().record(found)
        self.recorded[found.name] += 1
        if self.recorded.total() == 3:
            self.then()


def test_a_killed_worker_loses_nothing(tmp_path):
    names = folders(tmp_path, 10)
    again, bad = str(tmp_path / "again"), str(tmp_path / "bad")
    shutil.copytree(names[0], again)
    shutil.copytree(names[0], bad)
    weights = Path(bad, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    settings = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**settings) as cluster, distributed.Client(cluster) as client:
        pids = client.run(os.getpid)
        assert len(set(pids.values())) == 2 and os.getpid() not in pids.values()
        victim = min(pids.values())
        with Counting(tmp_path / "store", lambda: os.kill(victim, signal.SIGKILL)) as store:
            found = add(store, [bad, *names, again, str(tmp_path / "none")], scheduler=cluster.scheduler_address)
            assert set(store.recorded.values()) == {1} and store.recorded.keys() == found.keys()
            assert victim not in client.run(os.getpid).values()
            assert len(store) == 10 and store.stats()["names"] == 13
            assert store.failures().keys() == {bad, str(tmp_path / "none")}
            assert "model.safetensors" in store.failures()[bad]
            nearest = store.nearest(describe(open_weights(names[0])))[0]
            assert set(nearest.names) == {names[0], again}
            assert not add(store, names, scheduler="tcp://127.0.0.1:1")  # nothing is left to be done
    assert all(isinstance(found[name], Described) for name in names)


def test_reading(tmp_path):
    (name,) = folders(tmp_path, 1)
    stamp = stamp_of(name)
    assert read(name, stamp).sha256 == open_weights(name).sha256()
    os.utime(Path(name, "model.safetensors"), ns=(0, 10**18 * 2))
    assert stamp_of(name) != stamp
    missing = read(str(tmp_path / "none"), "")
    assert isinstance(missing, Failed) and "none" in missing.reason
