"""A store of descriptors: one folder, one kilobyte a model, safe against a crash at any time.

    fleet.duckdb    what is known: models by sha256, and every name that was added, with the reason where it failed
    codes-ID.u64    a copy of the bits in it, to be searched; whatever is missing of it is written anew

DuckDB keeps what was committed whatever happens afterwards, and one process at a time may open the file. Of the stores
that were measured (docs/fleet.md) it is the smallest that holds numbers and words, gives them out as SQL and Parquet,
and survives being killed; bits are searched faster where they lie side by side, which is what the copy is for.
"""

import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minimoe.fingerprints import descriptor

SCHEMA = 1
FILE = "fleet.duckdb"
ROWS = 512  # descriptors looked at together: half a megabyte stays in the processor's cache
RECORD = 8 * descriptor.WORDS
_TABLES = """
    CREATE TABLE about (schema INTEGER, descriptor INTEGER, id TEXT);
    CREATE TABLE models (place INTEGER PRIMARY KEY, sha256 TEXT UNIQUE, code BLOB, family TEXT, num_layers INTEGER,
                         hidden_size INTEGER, num_experts INTEGER);
    CREATE TABLE sources (name TEXT PRIMARY KEY, stamp TEXT, sha256 TEXT, reason TEXT);
"""


@dataclass(frozen=True, kw_only=True)
class Described:
    """What is known of a model; `code` is its descriptor [128]."""

    name: str
    stamp: str  # of its files, by which a change is noticed
    sha256: str
    code: NDArray[np.uint64]
    family: str
    num_layers: int
    hidden_size: int
    num_experts: int


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A model that could not be read, and why."""

    name: str
    stamp: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Near:
    """A model of the store beside the one that was asked about."""

    names: tuple[str, ...]  # all under which its bytes were added
    similarity: float
    sha256: str


class Kept(NamedTuple):
    """What a tree needs of a model of the store."""

    code: NDArray[np.uint64]
    hidden_size: int


class Store:
    """The descriptors in a folder; a context manager, and one at a time.

    Raises:
        ModuleNotFoundError: duckdb is not installed.
        ValueError: the store has another version than this package, or is none; both are named.
        OSError: another process has it open.
    """

    def __init__(self, folder: str | Path) -> None:
        duckdb = _duckdb()
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._db = duckdb.connect(str(self.folder / FILE))
        except duckdb.IOException as error:
            if "lock" in str(error):
                raise OSError(f"{self.folder / FILE}: another process has it open") from error
            raise ValueError(f"{self.folder / FILE}: found no store of models ({error})") from error
        try:
            self._id = self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> str:
        if not self._db.execute("SHOW TABLES").fetchall():
            with self._transaction():
                self._db.execute(_TABLES)
                row = [SCHEMA, descriptor.VERSION, uuid.uuid4().hex[:8]]
                self._db.execute("INSERT INTO about VALUES (?, ?, ?)", row)
        schema, version, name = self._db.execute("SELECT * FROM about").fetchone()
        if (schema, version) != (SCHEMA, descriptor.VERSION):
            found = f"found schema {schema} and descriptors of version {version}"
            raise ValueError(f"{self.folder}: {found}, wanted {SCHEMA} and {descriptor.VERSION}: begin a new store")
        return name

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes open it."""
        self._db.close()

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM models").fetchone()[0]

    def record(self, found: Described | Failed) -> None:
        """Keep what was found under a name, in place of what was known of it; equal bytes are one model."""
        with self._transaction():
            if isinstance(found, Described):
                code = np.ascontiguousarray(found.code).tobytes()
                if len(code) != RECORD:
                    raise ValueError(f"{found.name}: a descriptor of {len(code)} bytes, wanted {RECORD}")
                facts = [found.sha256, code, found.family, found.num_layers, found.hidden_size, found.num_experts]
                place = "(SELECT coalesce(max(place) + 1, 0) FROM models)"
                self._db.execute(f"INSERT OR IGNORE INTO models SELECT {place}, ?, ?, ?, ?, ?, ?", facts)
                row = [found.name, found.stamp, found.sha256, None]
            else:
                row = [found.name, found.stamp, None, found.reason]
            self._db.execute("INSERT OR REPLACE INTO sources VALUES (?, ?, ?, ?)", row)

    def has(self, name: str, stamp: str) -> bool:
        """Whether a model was read under this name, and its files have not changed since."""
        asked = "SELECT count(*) FROM sources WHERE name = ? AND stamp = ? AND sha256 IS NOT NULL"
        return self._db.execute(asked, [name, stamp]).fetchone()[0] > 0

    def failures(self) -> dict[str, str]:
        """Name -> why it could not be read."""
        return dict(self._db.execute("SELECT name, reason FROM sources WHERE sha256 IS NULL ORDER BY name").fetchall())

    def models(self) -> dict[str, Kept]:
        """Every model, under the first of its names in the order of the alphabet."""
        asked = """SELECT min(name), any_value(code), any_value(hidden_size) FROM sources JOIN models USING (sha256)
                   GROUP BY sha256 ORDER BY min(name)"""
        rows = self._db.execute(asked).fetchall()
        return {name: Kept(np.frombuffer(code, np.uint64), hidden_size) for name, code, hidden_size in rows}

    def stats(self) -> dict[str, int]:
        """How many models, names, failures and bytes, and how many models of each family."""
        names, failed = self._db.execute("SELECT count(*), count(*) FILTER (sha256 IS NULL) FROM sources").fetchone()
        size = sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())
        families = self._db.execute("SELECT family, count(*) FROM models GROUP BY family ORDER BY 2 DESC, 1").fetchall()
        counts = {"models": len(self), "names": names, "failed": failed, "bytes": size}
        return counts | {f"family {family}": count for family, count in families}

    def nearest(self, code: NDArray[np.uint64], count: int = 20) -> list[Near]:
        """The models whose bits are most like `code` [128], the nearest first; of equals, those added first."""
        codes, found = self._codes(), {}
        places = nearest_places(codes, code, count).tolist()
        asked = "SELECT place, sha256, name FROM models JOIN sources USING (sha256) WHERE place IN ? ORDER BY name"
        for place, sha256, name in self._db.execute(asked, [places]).fetchall():
            found.setdefault(place, (sha256, []))[1].append(name)
        similarities = descriptor.similarity(np.asarray(codes[places]), code)
        return [
            Near(names=tuple(found[place][1]), similarity=float(similar), sha256=found[place][0])
            for place, similar in zip(places, similarities, strict=True)
            if place in found  # else its name stands for other bytes by now
        ]

    def _codes(self) -> NDArray[np.uint64]:
        """The bits of all models [M, 128], as they lie on the disk."""
        path, count = self.folder / f"codes-{self._id}.u64", len(self)
        with open(path, "ab") as file:
            there = min(file.tell() // RECORD, count)
            file.truncate(there * RECORD)  # a crash may have left part of a record
            if there < count:
                missing = self._db.execute("SELECT code FROM models WHERE place >= ? ORDER BY place", [there])
                while rows := missing.fetchmany(4096):
                    file.write(b"".join(code for (code,) in rows))
                file.flush()
                os.fsync(file.fileno())
        if not count:
            return np.empty((0, descriptor.WORDS), np.uint64)
        return np.memmap(path, np.uint64, mode="r", shape=(count, descriptor.WORDS))

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._db)


class _Transaction:
    """All of a block in the database, or nothing."""

    def __init__(self, db: Any) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN")

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


def nearest_places(codes: NDArray[np.uint64], code: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """Where in `codes` [M, 128] the `count` lie that differ from `code` in the fewest bits; of equals, the first."""

    def differing(start: int) -> NDArray[np.int32]:
        return np.bitwise_count(codes[start : start + ROWS] ^ code).sum(1, dtype=np.int32)

    with ThreadPoolExecutor() as pool:  # numpy lets other threads run while it counts
        distances = np.concatenate([np.empty(0, np.int32), *pool.map(differing, range(0, len(codes), ROWS))])
    if count < len(distances):
        near = np.flatnonzero(distances <= np.partition(distances, count - 1)[count - 1])
    else:
        near = np.arange(len(distances))
    return near[np.argsort(distances[near], kind="stable")][:count]


def _duckdb() -> Any:
    try:
        import duckdb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a store of models needs duckdb: pip install 'minimoe[fleet]'") from error
    return duckdb
