"""Processes that compute together: how they meet, what they send each other, and how all end when one does.

n processes, ranks 0 to n - 1. `torchrun` starts them on one machine or on several, `run_processes` on this one.
"""

import faulthandler
import gc
import os
import pickle
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from minimoe.model.config import require

BEAT, PATIENCE = 0.5, 20  # seconds from one sign of life to the next; how many may be missing
ENDS_WITHIN = 30  # seconds after one process is gone until the last other one has ended, saying which it was
LAUNCH = "a start by `torchrun --nproc-per-node 2 -m minimoe train --expert-parallel`"


@dataclass
class Sent:
    """What one process did in the collectives of one kind."""

    calls: int = 0
    bytes: int = 0  # that it sent to others
    seconds: float = 0.0  # in the collective, once all were there
    waited: float = 0.0  # until all were there; 0 unless `Ranks.meets`


@dataclass
class Ranks:
    """The processes of a run. All their collectives go through here, and are counted in `sent`, by kind.

    Bytes are those of the payload that go to other processes: of an all-to-all the rows for them, of a gather one copy
    for each, of a sum 2 (n - 1) / n of its size, which is what a ring sends (Patarasuk & Yuan 2009).

    With `meets`, the processes meet before each collective, and the time until all are there is counted apart: the
    whole is a little slower for it.
    """

    mesh: DeviceMesh
    meets: bool = False
    sent: dict[str, Sent] = field(default_factory=dict)

    @property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group()

    @property
    def device(self) -> str:
        """Where this process computes."""
        return self.mesh.device_type

    @property
    def rank(self) -> int:
        return self.mesh.get_rank()

    @property
    def size(self) -> int:
        return self.mesh.size()

    def note(self, kind: str, sent: float) -> Sent:
        """Count one call of a kind, and the bytes it sends."""
        counted = self.sent.setdefault(kind, Sent())
        counted.calls += 1
        counted.bytes += round(sent)
        return counted

    @contextmanager
    def _counting(self, kind: str, sent: float) -> Iterator[None]:
        counted, start = self.note(kind, sent), time.perf_counter()
        if self.meets:
            dist.barrier(self.group)
        there = time.perf_counter()
        yield
        counted.waited += there - start if self.meets else 0.0
        counted.seconds += time.perf_counter() - there

    def all_to_all(self, kind: str, rows: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
        """Give `to[r]` consecutive rows to each rank r; returns the `of[r]` rows that each gave, in order of rank.

        rows: [sum(to), ...]. Returns [sum(of), ...].
        """
        received = rows.new_empty(sum(of), *rows.shape[1:])
        row = rows[0].nbytes if len(rows) else 0
        with self._counting(kind, (len(rows) - to[self.rank]) * row):
            dist.all_to_all_single(received, rows.contiguous(), list(of), list(to), self.group)
        return received

    def all_gather(self, kind: str, tensor: Tensor) -> Tensor:
        """[n, ...]: the `tensor` [...] of every rank."""
        gathered = tensor.new_empty(self.size * tensor.numel())
        with self._counting(kind, (self.size - 1) * tensor.nbytes):
            dist.all_gather_single(gathered, tensor.flatten(), self.group)
        return gathered.view(self.size, *tensor.shape)

    def sum(self, kind: str, tensor: Tensor) -> Tensor:
        """The sum over ranks of a tensor of one shape."""
        total = tensor.clone()
        with self._counting(kind, ring_bytes(tensor, self.size)):
            dist.all_reduce(total, group=self.group)
        return total


def ring_bytes(tensor: Tensor, size: int) -> float:
    """What each of `size` processes sends where a ring adds up one tensor of each."""
    return 2 * (size - 1) / size * tensor.nbytes


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other processes that torchrun started, over nccl where there are GPUs, else over gloo.

    Whatever ends one of them (a kill, a crash, a machine that is gone) ends the others within `ENDS_WITHIN` seconds,
    with a message that names it. Raises ValueError where nobody started them together, or there are fewer GPUs than
    processes on a machine.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
               if name not in os.environ]  # fmt: skip
    if missing:
        raise ValueError(f"{', '.join(missing)}: not in the environment, wanted {LAUNCH}")
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    device = "cuda" if gpus else "cpu"
    if gpus:
        require(local < gpus, "LOCAL_RANK", local, f"less than {gpus}, the GPUs of this machine: one process for each")
        torch.cuda.set_device(local)
    if int(os.environ["RANK"]) > 0:
        os.environ["MINIMOE_PROGRESS"] = "0"  # one bar is enough
    dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(minutes=10))
    with _together(device) as ranks:
        yield ranks


@contextmanager
def _together(device: str) -> Iterator[Ranks]:
    """Watch each other while the processes of the group work, and leave it together."""
    ranks = Ranks(init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("expert",)))
    watch = _Watch(dist.distributed_c10d._get_default_store(), ranks)
    try:
        yield ranks
    except RuntimeError as error:  # what a collective raises when another process is gone
        print(f"rank {ranks.rank}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        watch.join(BEAT * (PATIENCE + 4))  # which ends this process, if one is missing
        raise
    dist.barrier(ranks.group)
    watch.stopped.set()
    watch.join()
    _leave(ranks)  # together: nobody is gone while another still watches


def _leave(ranks: Ranks) -> None:
    """Leave the group when all do, and end its threads: those that live while Python shuts down may abort it."""
    dist.barrier(ranks.group)
    del ranks.mesh  # which keeps the group, and the group its threads
    dist.destroy_process_group()
    gc.collect()


class _Watch(threading.Thread):
    """Gives a sign of life every `BEAT` seconds, and ends this process when another has missed `PATIENCE` of its own.

    It counts its own beats instead of looking at the clock: a laptop that slept has missed none.
    """

    def __init__(self, store: dist.Store, ranks: Ranks) -> None:
        super().__init__(daemon=True)
        self.store, self.rank, self.stopped = store.clone(), ranks.rank, threading.Event()
        self.keys = [f"minimoe/alive/{rank}" for rank in range(ranks.size)]
        self.where = f"pid {os.getpid()} on {socket.gethostname()}"
        self._beat(0)
        dist.barrier(ranks.group)  # each has given its first sign
        self.start()

    def _beat(self, number: int) -> None:
        self.store.set(self.keys[self.rank], f"{number} {self.where}")

    def run(self) -> None:
        last, missed, beat = {}, {}, 0
        while not self.stopped.wait(BEAT):
            beat += 1
            try:
                self._beat(beat)
                signs = [sign.decode() for sign in self.store.multi_get(self.keys)]
            except RuntimeError:
                self._end("rank 0 or the launcher, which holds what the processes tell each other, is gone")
            for rank, sign in enumerate(signs):
                missed[rank] = missed.get(rank, 0) + 1 if last.get(rank) == sign else 0
                last[rank] = sign
                if missed[rank] >= PATIENCE:
                    where = sign.split(" ", 1)[1]
                    self._end(f"rank {rank} ({where}) has given no sign of life for {BEAT * PATIENCE:.0f} s")

    def _end(self, what: str) -> None:
        if not self.stopped.is_set():
            remedy = "this process ends too. The same command goes on from the last saved state"
            print(f"error: {what}: {remedy}", file=sys.stderr, flush=True)
            os._exit(1)


def run_processes(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(ranks, *arguments)` returns in each of `size` new processes on this machine, of one thread each.

    Over gloo. They write nothing to the screen. `function` must be one that can be imported.
    Raises torch.multiprocessing.ProcessRaisedException or ProcessExitedException, naming the process, where one fails,
    with what it had written as a note.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(_one_of_several, (size, folder, function, arguments), nprocs=size)
        except (ProcessRaisedException, ProcessExitedException) as error:
            error.add_note((Path(folder) / f"{error.error_index}.txt").read_text(encoding="utf-8", errors="replace"))
            raise
        return [pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def _one_of_several(rank: int, size: int, folder: str, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    with open(Path(folder) / f"{rank}.txt", "wb") as written:  # gloo says who met whom
        os.dup2(written.fileno(), 1)
        os.dup2(written.fileno(), 2)
    faulthandler.enable()
    meeting = f"file://{Path(folder) / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=timedelta(minutes=2))
    ranks = Ranks(init_device_mesh("cpu", (size,), mesh_dim_names=("expert",)))
    result = function(ranks, *arguments)
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    _leave(ranks)
