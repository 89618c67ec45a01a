"""Many models read by many processes, on this machine or on a cluster of Dask, into one store.

One task reads one model. The process that holds the store writes down each result as it comes, so that a worker that is
killed, or this process, loses no more than what it had in its hands: Dask gives the task of a lost worker to another
one, and whoever adds the same names again goes on where it ended.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from minimoe.fingerprints.descriptor import describe
from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.weights import open_weights
from minimoe.fleet.store import Described, Failed, Store
from minimoe.progress import progress_bar

AHEAD = 4  # tasks a worker may have waiting
TRIES = 3  # of a task that fails for a reason that may pass, such as a disk that is not there


def add(
    store: Store, names: Iterable[str], *, scheduler: str | None = None, workers: int | None = None
) -> dict[str, Described | Failed]:
    """Read the models that the store does not have, and write each down as soon as it is read.

    A program that calls this without a `scheduler` needs `if __name__ == "__main__":`, since it starts processes.

    Args:
        names: whatever `open_weights` takes that is text; files and folders go by their whole path. Those that failed
            before are tried again.
        scheduler: the address of a Dask cluster whose workers can open the names; None: processes of this machine.
        workers: how many of these; None: as many as Dask finds fit.

    Returns:
        What was read now, by name.

    Raises:
        ModuleNotFoundError: dask.distributed is not installed.
        OSError: the scheduler does not answer.
    """
    names = dict.fromkeys(str(Path(name).absolute()) if Path(name).exists() else name for name in names)
    wanted = {name: stamp for name in names if not store.has(name, stamp := stamp_of(name))}
    found: dict[str, Described | Failed] = {}
    if wanted:
        with _client(scheduler, workers) as client:
            results = _read_all(client, wanted)
            for result in progress_bar(results, total=len(wanted), unit="model", desc="fleet"):
                store.record(result)
                found[result.name] = result
    return found


def read(name: str, stamp: str) -> Described | Failed:
    """Describe one model: the task that a worker is given. Whoever names no readable model gets the reason back."""
    import torch

    torch.set_num_threads(1)
    try:
        weights = open_weights(name)
        weights.require_whole()
        code = describe(weights)
    except (ValueError, KeyError, FileNotFoundError, NotADirectoryError) as error:
        return Failed(name=name, stamp=stamp, reason=str(error))
    try:
        sha256 = weights.sha256()
    except Refusal:  # on a server that publishes none: then the name stands for the bytes
        sha256 = f"of {name}"
    return Described(
        name=name,
        stamp=stamp,
        sha256=sha256,
        code=code,
        family=weights.family,
        num_layers=weights.num_layers,
        hidden_size=weights.hidden_size,
        num_experts=weights.num_experts,
    )


def stamp_of(name: str) -> str:
    """Size and time of the files under a name; of one that is elsewhere, nothing."""
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    seen = [file.stat() for file in files if file.is_file()]
    return f"{sum(one.st_size for one in seen)} {max(one.st_mtime_ns for one in seen)}" if seen else ""


def _read_all(client: Any, wanted: dict[str, str]) -> Iterator[Described | Failed]:
    """The result of every model in any order; few tasks wait at a time, however many models there are."""
    from dask.distributed import as_completed

    waiting, names = iter(wanted.items()), {}

    def submit(some: Iterable[tuple[str, str]]) -> list[Any]:
        futures = {client.submit(read, *one, pure=False, retries=TRIES - 1): one for one in some}
        names.update({future.key: one for future, one in futures.items()})
        return list(futures)

    running = as_completed(submit(islice(waiting, AHEAD * max(1, len(client.nthreads())))))
    for future in running:
        name, stamp = names.pop(future.key)
        error = future.exception()
        reason = f"{type(error).__name__}: {error}"
        yield future.result() if error is None else Failed(name=name, stamp=stamp, reason=reason)
        running.update(submit(islice(waiting, 1)))


@contextmanager
def _client(scheduler: str | None, workers: int | None) -> Iterator[Any]:
    try:
        from dask.distributed import Client, LocalCluster
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to add models takes dask.distributed: pip install 'minimoe[fleet]'") from error
    if scheduler is not None:
        with Client(scheduler) as client:
            yield client
    else:
        settings = {"n_workers": workers, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
        with LocalCluster(**settings) as cluster, Client(cluster) as client:
            yield client
