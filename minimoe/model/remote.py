"""A checkpoint on a server: only configuration, headers and the tensors asked for are moved, by byte ranges.

What has arrived is kept in `cache_folder()/remote`: of each version of each remote file a sparse file of the full size,
and beside it a file of marks, a byte for each block. A block is marked when its bytes are on the disk, so that a kill
at any moment loses at most the request under way. A version is what the hub says of a file's content, and elsewhere its
ETag; an answer of another version is an error, never mixed in. Nothing that arrives is ever executed.

Requests, repeating them after faults, tokens and the listing of a repository are left to huggingface_hub. The cache is
ours, because that of fsspec 2026.9 ("blockcache") marks a block before it has arrived: after one refused request it
gave 100,000 zeros for a tensor and asked the server no more. The checks of what an answer holds are ours, because
`HfFileSystem` takes whatever comes: from a server that ignores byte ranges, the beginning of the file.

Byte ranges: RFC 9110, section 14.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, http_backoff, http_stream_backoff

from minimoe.data_files import cache_folder
from minimoe.model.checkpoint import Checkpoint
from minimoe.model.stored import CheckpointError, HashUnknownError, describe

BLOCK = 2**16  # bytes; ranges are widened to multiples of it: norms and biases come with their neighbours
STEP = 2**24  # bytes that a request asks for at most; files up to this size are taken whole where there are no ranges
TIMEOUT = 20  # seconds without a byte
_LENGTH = 8  # bytes that a safetensors file starts with: the length of its header
_THIS_MACHINE = {"localhost", "127.0.0.1", "::1"}


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
        self._place = _Folder(source) if "://" in source else _Repository(*source.split("@"))
        self.path = self._place.address
        self._open(self._place.only)

    def beside(self, name: str) -> Path | None:
        """Fetch another file, whole; of a safetensors file, the header."""
        file = self._place.find(name)
        if file is None:
            return None
        file = self._files.setdefault(file.path, file)
        file.fill(0, _header_size(file) if name.endswith(".safetensors") else file.size)
        return file.path

    @property
    def bytes_moved(self) -> int:
        """What came over the network, so far; what was in the cache did not."""
        return sum(file.moved for file in self._files.values())

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

    def __truediv__(self, name: str) -> "_Address":
        return _Address(f"{self.removesuffix('/')}/{name}")


class _Folder:
    """A folder at an address; or one file in it, named by `only`."""

    names: tuple[str, ...] = ()  # a server does not say

    def __init__(self, source: str) -> None:
        with _errors_of(source.partition("://")[0] + "://"):
            url = httpx2.URL(source)
        _require_https(url, url.host)
        name = url.path.rpartition("/")[2]
        self.only = name if name.endswith(".safetensors") else None
        folder = url.join(".") if self.only or not name else url.copy_with(path=f"{url.path}/")
        self.address = _Address(_public(folder))
        # Apart from the address, which stands in errors and in the log of huggingface_hub: they may be secret.
        self._request = {
            "params": url.query.decode() or None,
            "auth": (url.username, url.password) if url.userinfo else None,
        }

    def find(self, name: str) -> "_File | None":
        url = self.address / quote(name)
        asked = self._request | {"headers": {"Range": f"bytes=0-{_LENGTH - 1}", "Accept-Encoding": "identity"}}
        with _errors_of(url), http_stream_backoff("GET", url, **asked, timeout=TIMEOUT) as response:
            if response.status_code == 404:
                return None
            _check_answer(response, url)
            ranges, version = response.headers.get("Content-Range"), _version(response)
            size = ranges.rpartition("/")[2] if ranges else response.headers.get("Content-Length", "")
        if version is None or not size.isdecimal() or (ranges is None and int(size) > STEP):
            raise CheckpointError(
                f"{url}: found version {version}, length {size or None} and range {ranges}, wanted an ETag or date "
                "to tell versions apart, a length and byte ranges; download the model and open its folder"
            )
        return _File(url, url, self._request, int(size), version, tag=version)


class _Repository:
    """A model of the Hugging Face hub, at one commit: what a file of it holds never changes."""

    only = None

    def __init__(self, name: str, revision: str = "main") -> None:
        api = HfApi()
        self._name, self.address = name, _Address(f"{api.endpoint}/{name}")
        with _errors_of(f"{name}: no such folder here; as a repository"):
            info = api.model_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT)
        self._commit, self._files = info.sha, {file.rfilename: file for file in info.siblings}

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def find(self, name: str) -> "_File | None":
        file = self._files.get(name)
        if file is None:
            return None
        if file.size is None:
            raise CheckpointError(f"{self.address / name}: found no size in the listing, wanted that of every file")
        url = hf_hub_url(self._name, name, revision=self._commit, endpoint=HfApi().endpoint)
        sha256 = file.lfs.sha256 if file.lfs else None
        request = {"headers": build_hf_headers()}
        return _File(url, self.address / name, request, file.size, sha256 or file.blob_id, sha256=sha256)


@dataclass
class _File:
    """One version of a remote file, and what of it lies in the cache."""

    url: str
    address: str  # under which it is kept, with version and size
    request: dict[str, Any]  # what a request bears beside the url
    size: int
    version: str
    tag: str | None = None  # the ETag or date that every answer must bear; None: the url itself stands for the content
    sha256: str | None = None  # as published
    moved: int = 0  # bytes that arrived

    @cached_property
    def path(self) -> Path:
        identity = json.dumps([self.address, self.version, self.size])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
        return cache_folder() / "remote" / digest / self.address.rpartition("/")[2]

    def fill(self, start: int, stop: int) -> None:
        """Fetch what is missing of the bytes from `start` to `stop`."""
        held = self._read_marks()
        blocks = range(start // BLOCK, -(-min(stop, self.size) // BLOCK))
        for (is_held, _), run in groupby(blocks, lambda block: (held[block], block * BLOCK // STEP)):
            if not is_held:
                wanted = list(run)
                self._fetch(wanted[0] * BLOCK, min((wanted[-1] + 1) * BLOCK, self.size))

    def _read_marks(self) -> bytes:
        """1 for each block that has arrived; where there are none, a file of the full size that takes no place."""
        marks, count = self.path.with_name("marks"), -(-self.size // BLOCK)
        if self.path.is_file() and self.path.stat().st_size == self.size and marks.is_file():
            held = marks.read_bytes()
            if len(held) == count and set(held) <= {0, 1}:
                return held
        self.path.parent.mkdir(parents=True, exist_ok=True)
        marks.unlink(missing_ok=True)  # first: they would tell of bytes that are lost
        with self.path.open("ab") as file:
            file.truncate(self.size)
        marks.write_bytes(bytes(count))
        return bytes(count)

    def _fetch(self, start: int, stop: int) -> None:
        """Ask for a range that starts with a block, and keep what the answer brings."""
        asked = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}  # the bytes themselves
        request = self.request | {"headers": self.request.get("headers", {}) | asked}
        with _errors_of(self.url):
            response = http_backoff("GET", self.url, **request, timeout=TIMEOUT)
        _check_answer(response, self.url)
        version, found = _version(response), response.headers.get("Content-Range", "all of the file")
        if self.tag not in (None, version):
            raise CheckpointError(f"{self.url}: the version was {self.tag}, and is {version} now")
        if response.status_code == 200 and self.size <= STEP:
            start, stop = 0, self.size
        elif found != (wanted := f"bytes {start}-{stop - 1}/{self.size}"):
            raise CheckpointError(
                f"{self.url}: answered with {found}, wanted {wanted}; download the model and open its folder"
            )
        if len(response.content) != stop - start:
            raise CheckpointError(f"{self.url}: sent {len(response.content)} bytes, wanted {stop - start}")
        self.moved += stop - start
        with self.path.open("r+b") as file:
            file.seek(start)
            file.write(response.content)
            file.flush()
            os.fsync(file.fileno())
        with self.path.with_name("marks").open("r+b") as marks:
            marks.seek(start // BLOCK)
            marks.write(b"\1" * -(-(stop - start) // BLOCK))


def _header_size(file: _File) -> int:
    """How many bytes stand before the first tensor. A CheckpointError where the first 8 bytes cannot say so."""
    file.fill(0, _LENGTH)  # a block at least
    with file.path.open("rb") as opened:
        start = opened.read(64)
    size = _LENGTH + int.from_bytes(start[:_LENGTH], "little")
    if size > file.size:
        found = f"{file.size} bytes that start with {start[:_LENGTH]!r}"
        kind = f", {describe(start)}" if describe(start) else ""
        raise CheckpointError(f"{file.address}: wanted a safetensors file, found {found}{kind}")
    return size


def _version(response: httpx2.Response) -> str | None:
    return response.headers.get("ETag") or response.headers.get("Last-Modified")


def _public(url: httpx2.URL) -> str:
    """An address without what may be secret in it."""
    return str(url.copy_with(query=None, fragment=None, userinfo=b""))


def _require_https(url: httpx2.URL, first_host: str) -> None:
    """Of every address on the way, from the first to where redirects lead; http stays on this machine."""
    plain = url.scheme == "http" and {first_host, url.host} <= _THIS_MACHINE
    if not url.host or (url.scheme != "https" and not plain):
        raise CheckpointError(f"{_public(url)}: wanted an https address")


def _check_answer(response: httpx2.Response, url: str) -> None:
    visited = [answer.url for answer in (*response.history, response)]
    for place in visited:
        _require_https(place, visited[0].host)
    if response.status_code not in (200, 206):
        raise CheckpointError(f"{url}: {_refusal(response)}")


def _refusal(response: httpx2.Response) -> str:
    message = response.headers.get("X-Error-Message", "")
    found = f"answered {response.status_code} {response.reason_phrase}" + (f" ({message})" if message else "")
    if response.headers.get("X-Error-Code") == "GatedRepo":
        return f"{found}: a gated repository; accept its conditions on its page, and log in with `hf auth login`"
    if response.status_code in (401, 403):
        return f"{found}: it does not exist, or wants a login; for the hub, use `hf auth login` or HF_TOKEN"
    return found


@contextmanager
def _errors_of(place: str) -> Iterator[None]:
    """Turn what huggingface_hub raises, once it has given up, into an error that shows no secret."""
    try:
        yield
    except CheckpointError:
        raise
    except OfflineModeIsEnabled:
        raise CheckpointError(f"{place}: HF_HUB_OFFLINE is set; unset it, or name a local folder") from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"{place}: {_refusal(error.response)}") from None
    except (httpx2.RequestError, httpx2.InvalidURL, ValueError) as error:
        raise CheckpointError(f"{place}: {str(error) or type(error).__name__}") from error
