"""A checkpoint that lies elsewhere: only configuration, headers and the tensors asked for are moved, by byte ranges.

What has arrived is kept in `cache_folder()/remote`: of each version of each remote file a sparse file of the full size,
and beside it a list of the ranges that it really holds. A range enters the list when its bytes are on the disk, so that
a kill at any moment loses at most what was under way. A version is what the hub says of a file's content, and elsewhere
its ETag; an answer of another version is an error, never mixed in. Nothing that arrives is ever executed.

Byte ranges: RFC 9110, section 14.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar
from urllib.parse import quote

import httpx
from huggingface_hub import HfApi, ModelInfo, constants, get_token, hf_hub_url

from minimoe.atomic import write_atomically
from minimoe.data_files import cache_folder
from minimoe.model.checkpoint import Checkpoint, CheckpointError, HashUnknownError

WAITS = (0.5, 1, 2, 4, 8)  # seconds before each new attempt; an attempt that moved something starts them again
LONGEST_WAIT = 60  # seconds that a server may ask for
TIMEOUT = 20  # seconds without a byte
BLOCK = 2**16  # ranges are widened to multiples of it: norms and biases come with their neighbours
STEP = 2**25  # bytes asked for, and made safe, at once
SMALL = 2**24  # files up to this size are taken whole from servers that know no ranges
_LENGTH = 8  # bytes that a safetensors file starts with: the length of its header
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")

T = TypeVar("T")


class RemoteCheckpoint(Checkpoint):
    """A `Checkpoint` in a repository of the Hugging Face hub or at an address.

    Args:
        source: "owner/name" or "owner/name@revision"; or the https address of a folder, or of a safetensors file that
            holds a whole model beside its config.json. http is for this machine alone.

    Raises:
        CheckpointError: as for `Checkpoint`; or the server refuses, breaks off for good, ignores ranges, or another
            version appears while it is read. Reading a tensor raises it, too.
    """

    def __init__(self, source: str) -> None:
        self._files: dict[Path, _File] = {}
        if "://" in source:
            self._place = place = _Folder(source)
        else:
            self._place = place = _Repository(*source.split("@"))
        self.path = place.address
        self._open(place.only)

    def beside(self, name: str) -> Path | None:
        """Fetch another file, whole; of a safetensors file, the header."""
        file = self._place.find(name)
        if file is None:
            return None
        self._files[file.path] = file
        file.fill(0, _header_size(file) if name.endswith(".safetensors") else file.size)
        return file.path

    def hashes(self) -> list[str]:
        """The sha256 of each file that it reads, as published.

        Raises:
            HashUnknownError: of one there is none.
        """
        files = [self._files[path] for path in self.files]
        hashes = [file.sha256 for file in files if file.sha256 is not None]
        if len(hashes) < len(files):
            size = sum(file.size for file in files)
            raise HashUnknownError(
                f"{self.path}: publishes no sha256, and computing it would move all {size} bytes; to compare the "
                "files, download them and open their folder"
            )
        return hashes

    @property
    def files(self) -> list[Path]:
        """Where the safetensors files are kept, as far as they have arrived, in the order of their names."""
        return sorted(super().files, key=lambda path: path.name)

    def _shard(self, name: str) -> Path:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise CheckpointError(f"{self.path}: its index names {name!r:.80}, wanted the name of a safetensors file")
        return self._wanted(name)

    def _listing(self) -> list[str]:
        return self._place.names

    def _open_at(self, path: Path, start: int, size: int) -> BinaryIO:
        self._files[path].fill(start, start + size)
        return super()._open_at(path, start, size)


class _Address(str):
    """Errors name files as `path / name`: so they do for an address."""

    def __truediv__(self, name: str) -> _Address:
        return _Address(f"{self.removesuffix('/')}/{name}")


# -- places


class _Folder:
    """A folder at an address; or one file in it, named by `only`."""

    names: tuple[str, ...] = ()  # a server does not say

    def __init__(self, address: str) -> None:
        try:
            url = httpx.URL(address)
        except httpx.InvalidURL as error:
            raise CheckpointError(f"{address}: wanted an https address ({error})") from error
        name = url.path.rpartition("/")[2]
        self.only = name if name.endswith(".safetensors") else None
        self._url = url if self.only or not name else url.copy_with(path=f"{url.path}/")
        self.address = _Address(_public(self._url.join(".")))
        self._server = _Server(url)

    def find(self, name: str) -> _File | None:
        url = self._url.join(quote(name)).copy_with(query=self._url.query or None)
        found = self._server.probe(url)
        if found is None:
            return None
        size, version = found
        if version is None:
            raise CheckpointError(
                f"{_public(url)}: found neither ETag nor Last-Modified in the answer, wanted one to tell versions "
                "apart; download the model and open its folder"
            )
        return _File(self._server, url, self.address / name, size, version, tag=version)


class _Repository:
    """A model of the Hugging Face hub, at one commit: what a file of it holds never changes."""

    only = None

    def __init__(self, name: str, revision: str = "main") -> None:
        self._name, self._endpoint = name, HfApi().endpoint
        self.address = _Address(f"{self._endpoint}/{name}")
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._server = _Server(httpx.URL(self._endpoint), headers)
        try:
            info = self._info(revision)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: no such folder here; as a repository: {error}") from error
        self._commit, self._files = info.sha, {file.rfilename: file for file in info.siblings}

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def find(self, name: str) -> _File | None:
        file = self._files.get(name)
        if file is None:
            return None
        url = httpx.URL(hf_hub_url(self._name, name, revision=self._commit, endpoint=self._endpoint))
        sha256 = file.lfs.sha256 if file.lfs else None
        return _File(self._server, url, self.address / name, file.size, sha256 or file.blob_id, sha256=sha256)

    def _info(self, revision: str) -> ModelInfo:
        """The commit and its files; `HfApi.model_info` would try once."""
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError("HF_HUB_OFFLINE is set")
        address = f"{self._endpoint}/api/models/{self._name}/revision/{quote(revision, safe='')}"
        listing = self._server.whole(httpx.URL(f"{address}?blobs=true"))
        try:
            info = ModelInfo(**json.loads(listing))
            if info.sha and all(type(file.size) is int and file.blob_id for file in info.siblings):
                return info
        except (ValueError, TypeError, KeyError):
            pass
        raise CheckpointError(f"{address}: wanted a commit and its files with their sizes, found {listing!r:.80}")


# -- one file, as far as it has arrived


@dataclass
class _File:
    """One version of a remote file, and what of it lies in the cache."""

    server: _Server
    url: httpx.URL
    address: str  # under which it is kept, with the version and size
    size: int
    version: str
    tag: str | None = None  # the ETag or date that every answer must bear; None: the url itself stands for the content
    sha256: str | None = None  # as published

    def __post_init__(self) -> None:
        self._identity = {"address": self.address, "version": self.version, "size": self.size}
        digest = hashlib.sha256(json.dumps(self._identity).encode()).hexdigest()[:32]
        self.path = cache_folder() / "remote" / digest / self.address.rpartition("/")[2]
        self._list = self.path.with_name("held.json")

    def fill(self, start: int, stop: int) -> None:
        """Fetch what is missing of the bytes from `start` to `stop`."""
        held = self._read_list()
        if not held:
            self._make_room()
        start, stop = start - start % BLOCK, min(-(-stop // BLOCK) * BLOCK, self.size)
        for here, end in _gaps(held, start, stop):
            while here < end:
                asked = here, min(here + STEP, end)
                here = _patiently(self.url, lambda asked=asked: self._receive(*asked))

    def _make_room(self) -> None:
        """A file of the full size that takes no place, and no list: one that is left over would tell of lost bytes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._list.unlink(missing_ok=True)
        with self.path.open("ab") as file:
            file.truncate(self.size)

    def _receive(self, start: int, stop: int) -> int:
        """Keep what one answer brings; returns where it ended, which is before `stop` where it broke off."""
        with self.server.answer(self.url, start, stop) as response:
            here = first = self._first(response, start, stop)
            limit = stop if response.status_code == httpx.codes.PARTIAL_CONTENT else self.size
            fault: Exception | None = None
            with self.path.open("r+b") as file:
                file.seek(first)
                try:
                    for block in response.iter_raw():
                        self._check(here + len(block) <= limit, f"sent more than {limit - first} bytes")
                        here += file.write(block)
                except httpx.TransportError as error:
                    fault = error
                file.flush()
                os.fsync(file.fileno())
        self._keep(first, here)
        if here <= start:
            raise fault or _AgainError("the answer ended early")
        return here

    def _first(self, response: httpx.Response, start: int, stop: int) -> int:
        """Where the body of an answer starts, once it has been found to be what was asked for."""
        found = _describe(response)
        self._check(self.tag in (None, found.tag), f"the version was {self.tag}, and is {found.tag} now")
        self._check(found.size in (self.size, None), f"the size was {self.size} bytes, and is {found.size} now")
        if response.status_code == httpx.codes.PARTIAL_CONTENT:
            self._check(found.range == (start, stop), f"answered with bytes {found.range}, wanted {(start, stop)}")
            return start
        self._check(
            self.size <= SMALL or stop - start == self.size,
            f"the server ignores byte ranges: it answered with all {self.size} bytes, wanted {stop - start} of them; "
            "download the model and open its folder",
        )
        return 0

    def _check(self, good: bool, found: str) -> None:
        if not good:
            raise CheckpointError(f"{_public(self.url)}: {found}")

    def _keep(self, start: int, stop: int) -> None:
        held = _merge([*self._read_list(), (start, stop)])
        write_atomically(self._list, json.dumps(self._identity | {"held": held}).encode())

    def _read_list(self) -> list[tuple[int, int]]:
        try:
            whole = self.path.stat().st_size == self.size
            return [(start, stop) for start, stop in json.loads(self._list.read_bytes())["held"] if whole]
        except (OSError, ValueError, TypeError, KeyError):
            return []


def _header_size(file: _File) -> int:
    """The bytes before the first tensor; where they cannot be, of the little that shows it."""
    file.fill(0, _LENGTH)
    with file.path.open("rb") as opened:
        start = opened.read(_LENGTH)
    size = _LENGTH + int.from_bytes(start, "little")
    file._check(size <= file.size, f"wanted a safetensors file, found {file.size} bytes that start with {start!r}")
    return size


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes in as few ranges as possible, in order."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        elif start < stop:
            merged.append((start, stop))
    return merged


def _gaps(held: list[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """What of the bytes from `start` to `stop` is not held."""
    gaps = []
    for first, last in [*held, (stop, stop)]:
        if start < min(first, stop):
            gaps.append((start, min(first, stop)))
        start = max(start, last)
    return gaps


# -- the server


class _AgainError(Exception):
    """An answer that may be another one later."""

    def __init__(self, found: str, wait: float = 0) -> None:
        super().__init__(found)
        self.wait = wait


class _Server:
    """Answers to GET requests, those that say no turned into errors."""

    def __init__(self, url: httpx.URL, headers: dict[str, str] | None = None) -> None:
        self._client = httpx.Client(
            headers={**(headers or {}), "Accept-Encoding": "identity"},  # ranges are of the bytes themselves
            follow_redirects=True,  # httpx keeps a token from other servers
            timeout=TIMEOUT,
            event_hooks={"request": [partial(_check_scheme, local=url.host in _THIS_MACHINE)]},
        )
        weakref.finalize(self, self._client.close)

    def probe(self, url: httpx.URL) -> tuple[int, str | None] | None:
        """Size and version of a file, from the answer to a small range; None if there is no such file."""

        def ask() -> tuple[int, str | None] | None:
            with self.answer(url, 0, _LENGTH, optional=True) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()  # little, and the connection can be used again
                if response.status_code == httpx.codes.NOT_FOUND:
                    return None
                found = _describe(response)
                if found.size is None:
                    raise CheckpointError(f"{_public(url)}: the answer does not say how long the file is")
                return found.size, found.tag

        return _patiently(url, ask)

    def whole(self, url: httpx.URL) -> bytes:
        """A small document."""

        def ask() -> bytes:
            with self.answer(url) as response:
                return response.read()

        return _patiently(url, ask)

    @contextmanager
    def answer(
        self, url: httpx.URL, start: int = 0, stop: int | None = None, *, optional: bool = False
    ) -> Iterator[httpx.Response]:
        headers = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        try:
            with self._client.stream("GET", url, headers=headers) as response:
                if not (optional and response.status_code == httpx.codes.NOT_FOUND):
                    _check_status(response, url, headers)
                yield response
        except httpx.TooManyRedirects as error:
            raise CheckpointError(f"{_public(url)}: redirected without end") from error


def _check_scheme(request: httpx.Request, local: bool) -> None:
    """Of every request, those that follow a redirect included; `local`: whether the first went to this machine."""
    url = request.url
    plain = url.scheme == "http" and local and url.host in _THIS_MACHINE
    if not url.host or (url.scheme != "https" and not plain):
        raise CheckpointError(f"{_public(url)}: wanted an https address")


class _Description(NamedTuple):
    size: int | None  # of the whole file
    tag: str | None
    range: tuple[int, int] | str


def _describe(response: httpx.Response) -> _Description:
    """What the headers of an answer say about the file and the part that follows."""
    headers = response.headers
    tag = headers.get("ETag") or headers.get("Last-Modified")
    if response.status_code != httpx.codes.PARTIAL_CONTENT:
        size = headers.get("Content-Length")
        return _Description(None if size is None else int(size), tag, "all")
    said = headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", said)
    if match is None:
        return _Description(None, tag, said)
    first, last, size = map(int, match.groups())
    return _Description(size, tag, (first, last + 1))


def _check_status(response: httpx.Response, url: httpx.URL, asked: dict[str, str]) -> None:
    status = response.status_code
    message = response.headers.get("X-Error-Message", "")
    found = f"answered {status} {response.reason_phrase}" + (f" ({message})" if message else "")
    if status in (408, 425, 429) or status >= 500:
        wait = response.headers.get("Retry-After", "")
        raise _AgainError(found, int(wait) if wait.isdecimal() else 0)
    if status in (200, 206):
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding == "identity":
            return
        found = f"answered in {encoding}, wanted the bytes themselves"
    elif response.headers.get("X-Error-Code") == "GatedRepo":
        found += ": a gated repository; accept its conditions on its page, and log in with `hf auth login` or HF_TOKEN"
    elif status in (401, 403):
        found += ": it does not exist, or wants a login; for the hub, use `hf auth login` or HF_TOKEN"
    elif status == 416:
        found += f": wanted {asked.get('Range')}, found {response.headers.get('Content-Range', 'no Content-Range')}"
    raise CheckpointError(f"{_public(url)}: {found}")


def _patiently(url: httpx.URL, attempt: Callable[[], T]) -> T:
    """Try again after faults that may pass."""
    waits = iter(WAITS)
    while True:
        try:
            return attempt()
        except _AgainError as error:
            fault, asked = error, error.wait
        except httpx.TransportError as error:
            fault, asked = error, 0
        wait = next(waits, None)
        if wait is None or asked > LONGEST_WAIT:
            raise CheckpointError(
                f"{_public(url)}: {str(fault) or type(fault).__name__}"
                + (f", and asks to wait {asked} s" if asked else "")
                + "; given up. What had arrived is kept, and another call goes on from there"
            ) from fault
        time.sleep(max(wait, asked))


def _public(url: httpx.URL) -> str:
    """An address without what may be secret in it."""
    return str(url.copy_with(query=None, fragment=None, userinfo=b""))
