"""What comes over a connection is what lies in the folder, little of it moves, and no fault of a server gets past."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import httpx2
import huggingface_hub
import pytest
import torch
from huggingface_hub.utils._http import default_client_factory
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.weights import ROLES, Weights, open_weights
from minimoe.model import MoEConfig, MoEForCausalLM, remote
from minimoe.model.checkpoint import CheckpointError
from minimoe.model.opening import open_checkpoint
from minimoe.model.saving import save_model
from tests.model.test_checkpoint import LFS_POINTER
from tests.rounding import assert_near

pytestmark = pytest.mark.exact("moves bytes, and computes with the same ones on both sides")
ATTENTION = ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "norm1", "norm2")
SIZES = {"vocab_size": 2000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
DENSE = SIZES | {"num_experts": 0, "intermediate_size": 600, "attention_bias": True, "tie_word_embeddings": False}
MIXTURE = SIZES | {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 32}
MIXTURE |= {"shared_expert_gate": True, "norm_topk_prob": False, "attention_bias": True, "tie_word_embeddings": True}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "/model.safetensors"


class Request(NamedTuple):
    path: str
    range: tuple[int, int] | None  # as asked for
    headers: dict[str, str]


class Server(ThreadingHTTPServer):
    """Serves files by byte ranges and keeps account. `fault` is asked first; what it returns true for is answered."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}  # or what has a length and can be sliced like bytes
        self.fault: Callable[[Handler, Request], bool] = lambda handler, request: False
        self.requests: list[Request] = []
        self.sent = 0  # bytes of files
        self.over = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def add(self, folder: Path, under: str = "") -> str:
        """Serve the files of a folder; returns its address."""
        self.files |= {f"{under}/{file.name}": file.read_bytes() for file in folder.iterdir() if file.is_file()}
        return f"{self.address}{under}/"

    def close(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        asked = (int(asked[1]), int(asked[2]) + 1) if asked else None
        request = Request(self.path, asked, {name.lower(): value for name, value in self.headers.items()})
        self.server.requests.append(request)
        if not self.server.fault(self, request):
            self.serve(request)

    def serve(self, request: Request, *, part: float = 1, **changes: str | None) -> bool:
        """The answer, with some headers changed or left out; of the body a part, and then the line goes dead."""
        path = request.path.partition("?")[0]
        if path not in self.server.files:
            return self.say(404)
        content = self.server.files[path]
        headers = {"ETag": f'"{zlib.crc32(content[: 2**20]):x}"'}
        body = content
        if request.range:
            body = content[slice(*request.range)]
            headers["Content-Range"] = f"bytes {request.range[0]}-{request.range[0] + len(body) - 1}/{len(content)}"
        self.send_response(206 if request.range else 200)
        headers["Content-Length"] = str(len(body))
        headers |= {name.replace("_", "-"): value for name, value in changes.items()}
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        body = body[: int(len(body) * part)]
        self.server.sent += len(body)  # before the other side can have read it
        with suppress(ConnectionError):  # who asked may have read enough
            self.wfile.write(body)
        self.close_connection = part < 1
        return True

    def say(self, status: int, body: bytes = b"", **headers: str) -> bool:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return True

    def stall(self, request: Request, part: float = 0) -> bool:
        self.serve(request, part=part)
        self.wfile.flush()
        return self.server.over.wait(20)

    def log_message(self, *arguments: object) -> None:
        pass


def random_model(seed: int = 0, **settings) -> MoEForCausalLM:
    model, generator = MoEForCausalLM(MoEConfig(**settings)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(generator=generator)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A dense model of 4 MB in one file, and the same in several; a mixture; a tokenizer beside each."""
    parent = tmp_path_factory.mktemp("models")
    dense = random_model(**DENSE)
    save_model(dense, parent / "dense", model_type="qwen2")
    save_model(dense, parent / "sharded", model_type="qwen2", max_shard_size=2**21)
    save_model(random_model(**MIXTURE), parent / "mixture", model_type="qwen2_moe")
    for folder in (found := {path.name: path for path in parent.iterdir()}).values():
        Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(folder / "tokenizer.json"))
    return found


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def sleeps(monkeypatch, tmp_path) -> list[float]:
    """An empty cache, and a client in a hurry; what it would have slept."""
    slept: list[float] = []
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def read(weights: Weights, roles=ATTENTION) -> dict[tuple[str, int], torch.Tensor]:
    return {(role, layer): weights.get(role, layer) for layer in range(weights.num_layers) for role in roles}


def assert_equal(found: Weights, wanted: Weights) -> None:
    for role in ROLES:
        for layer in (None, *range(wanted.num_layers)):
            assert found.has(role, layer) == wanted.has(role, layer)
            if wanted.has(role, layer):
                assert torch.equal(found.get(role, layer), wanted.get(role, layer)), (role, layer)
                pieces = torch.cat([piece.clone() for _, piece in found.pieces(role, layer)])
                assert torch.equal(pieces, wanted.get(role, layer).flatten())


# -- what arrives, and how much moves


@pytest.mark.parametrize("name", ["dense", "sharded", "mixture"])
def test_every_tensor_is_that_of_the_folder(name, folders, server):
    address, local = server.add(folders[name], "/some/folder"), open_weights(folders[name])
    found = open_weights(address)
    assert_equal(found, local)
    assert (found.name, found.config, found.tokens) == (address, local.config, {"a": 0, "b": 1})
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert_near(found.model()(ids).logits, local.model()(ids).logits)


def test_numbers_in_few_bits_are_those_of_the_folder(folders, server, tmp_path):
    """And other weights beside them are named, where the listing is known."""
    tensors = load_file(folders["dense"] / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((1, 1), 0.25)}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(folders["dense"] / "config.json", tmp_path)
    found, local = open_checkpoint(server.add(tmp_path)), open_checkpoint(tmp_path)
    assert torch.equal(found[name], local[name]) and torch.equal(found[name], tensors[name].float() / 4)
    assert server.sent < (tmp_path / "model.safetensors").stat().st_size / 2 and found.unread == []


@pytest.mark.parametrize("name", ["sharded", "mixture"])
def test_a_model_is_run_as_that_of_the_folder(name, folders, server):
    found, local = (MoEForCausalLM.from_pretrained(place) for place in (server.add(folders[name]), folders[name]))
    assert found.config == local.config and found.tokenizer_json == local.tokenizer_json is not None
    for tensor_name, tensor in local.state_dict().items():
        assert torch.equal(found.state_dict()[tensor_name], tensor), tensor_name


@pytest.mark.parametrize("key", ["num_experts", "hidden_size"])
def test_an_absurd_size_is_refused_before_a_tensor_moves(key, folders, server):
    address = server.add(folders["mixture"])
    config = json.loads(server.files["/config.json"])
    server.files["/config.json"] = json.dumps(config | {key: 10**9}).encode()
    for opened in (open_weights, MoEForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=rf"config\.json: {key}=1000000000: wanted .* file"):
            opened(address)
    assert server.sent < len(server.files[WEIGHTS]) / 10


def test_a_file_is_read_beside_its_configuration_and_a_shard_alone_is_refused(folders, server):
    server.add(folders["dense"], "/one")
    server.add(folders["sharded"], "/many")
    assert_equal(open_weights(f"{server.address}/one{WEIGHTS}?download=true"), open_weights(folders["dense"]))
    shard = next(path for path in server.files if path.startswith("/many/model-00002"))
    with pytest.raises(CheckpointError, match=rf"{shard}: one of the \d+ files of a model; wanted their folder"):
        open_weights(server.address + shard)


@pytest.mark.parametrize("name", ["dense", "sharded"])
def test_only_what_is_asked_for_moves_and_once(name, folders, server):
    address, local = server.add(folders[name]), open_weights(folders[name])
    size = sum(len(content) for path, content in server.files.items() if path.endswith(".safetensors"))
    wanted = sum(tensor.numel() * 4 for tensor in read(local).values())
    weights = open_weights(address)
    server.requests.clear()
    found = read(weights)
    assert wanted < server.sent < wanted + size / 10 < size / 4
    assert len(server.requests) < len(found) / 2  # neighbours come together
    for path, (start, stop), _ in server.requests:
        assert start % remote.BLOCK == 0 and (stop % remote.BLOCK == 0 or stop == len(server.files[path]))
    assert all(torch.equal(tensor, found[place]) for place, tensor in read(local).items())
    before, server.requests[:] = server.sent, []
    again = read(open_weights(address))
    assert all(torch.equal(tensor, found[place]) for place, tensor in again.items())
    assert all(request.range == (0, 8) for request in server.requests) and server.sent - before < 100


def test_of_rows_those_that_are_asked_for_move_and_neighbours_together(folders, server, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 2**10)  # bytes: two rows of the embedding
    address, local = server.add(folders["dense"]), open_weights(folders["dense"])
    found = open_weights(address)
    server.requests.clear()
    before = server.sent
    ids = [1999, 700, 701, 702, 703, 20, 700]
    assert torch.equal(found.rows("embedding", ids), local.get("embedding")[ids])
    assert len(server.requests) == 3 and server.sent - before <= 7 * 2**10
    before = server.sent
    assert torch.equal(found.first_rows("up", 1, 8), local.get("up", 1)[:8])
    assert server.sent - before <= 9 * 2**9 + 2**10
    files = found.files
    assert files.moved - server.sent in range(-2000, 1) and files.unread == []  # beside it, the first bytes of each
    assert files.size == len(server.files[WEIGHTS]) and files.read == (6 + 8) * 2**9
    assert open_weights(address).files.moved == 0 and local.files.moved is None


def test_a_large_tensor_comes_in_few_requests_each_made_safe(monkeypatch, folders, server):
    monkeypatch.setattr(remote, "STEP", 2**19)
    weights = open_weights(server.add(folders["dense"]))
    server.requests.clear()
    wanted = open_weights(folders["dense"]).get("embedding")
    assert torch.equal(torch.cat([piece.clone() for _, piece in weights.pieces("embedding")]), wanted.flatten())
    assert [stop - start <= 2**19 for start, stop in (request.range for request in server.requests)] == [True] * 3


def test_every_range_is_right_and_no_byte_moves_twice(server, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 7)
    monkeypatch.setattr(remote, "STEP", 21)
    draw = random.Random(0)
    content = server.files["/model.bin"] = draw.randbytes(1000)
    for _ in range(60):
        start, stop = sorted(draw.randrange(1001) for _ in range(2))
        file = remote._Folder(server.address).find("model.bin")
        file.fill(start, stop)
        assert file.path.read_bytes()[start:stop] == content[start:stop]
    asked = [request.range for request in server.requests if request.range != (0, 8)]
    moved = [byte for first, last in asked for byte in range(first, last)]
    assert len(moved) == len(set(moved)) > 900 and max(last - first for first, last in asked) <= 21


# -- faults that pass


def cut(handler: Handler, request: Request) -> bool:
    return handler.serve(request, part=0.5)


def stall_in_the_middle(handler: Handler, request: Request) -> bool:
    return handler.stall(request, part=0.5)


PASSING = {
    "the body breaks off": cut,
    "the body stalls": stall_in_the_middle,
    "no answer comes": lambda handler, request: handler.server.over.wait(20) or True,
    "429": lambda handler, request: handler.say(429, Retry_After="7"),
    "500": lambda handler, request: handler.say(500),
    "the body is empty": lambda handler, request: handler.serve(request, part=0),
}


@pytest.mark.parametrize("fault", PASSING)
def test_faults_that_pass_are_waited_for(fault, folders, server, sleeps, monkeypatch):
    if "stalls" in fault or "no answer" in fault:
        monkeypatch.setattr(remote, "TIMEOUT", 0.7)
    address, faulty = server.add(folders["dense"]), []

    def twice(handler: Handler, request: Request) -> bool:
        if request.path != WEIGHTS or request.range == (0, 8) or len(faulty) == 2:
            return False
        faulty.append(request.range)
        return PASSING[fault](handler, request)

    server.fault = twice
    assert torch.equal(open_weights(address).get("embedding"), open_weights(folders["dense"]).get("embedding"))
    assert faulty[0] == faulty[1]
    assert sleeps == ([8, 8] if fault == "429" else [1, 2])


def test_a_redirect_is_followed_and_the_token_stays_behind(folders, server, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    elsewhere = Server()
    elsewhere.add(folders["dense"])

    def send_away(handler: Handler, request: Request) -> bool:
        return request.path.endswith(WEIGHTS) and handler.say(302, Location=f"{elsewhere.address}{WEIGHTS}?signed=1")

    server.fault = send_away
    assert_equal(open_weights(hub("dense")), open_weights(folders["dense"]))
    of_the_model = [request for request in server.requests if "/someone/dense/" in request.path]
    assert all(request.headers["authorization"] == "Bearer hf_secret" for request in of_the_model)
    assert elsewhere.requests and not any("authorization" in request.headers for request in elsewhere.requests)
    elsewhere.close()


def test_a_token_of_the_hub_goes_to_no_other_address(folders, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert_equal(open_weights(server.add(folders["dense"])), open_weights(folders["dense"]))
    assert server.requests and not any("authorization" in request.headers for request in server.requests)


def test_secrets_of_an_address_go_to_no_other(folders, server):
    elsewhere = Server()  # the same host, another port
    elsewhere.add(folders["dense"])
    address = server.add(folders["dense"]).replace("//", "//me:k3y@")
    server.fault = lambda handler, request: handler.say(
        302, Location=elsewhere.address + request.path.partition("?")[0]
    )
    assert_equal(open_weights(f"{address}model.safetensors?key=k3y"), open_weights(folders["dense"]))
    assert all("authorization" in request.headers for request in server.requests)
    assert elsewhere.requests and not any("k3y" in str(request) for request in elsewhere.requests)
    assert not any("authorization" in request.headers for request in elsewhere.requests)
    elsewhere.close()


@pytest.mark.parametrize("place", ["http://hub.test", "https://hub.test:8443", "https://cdn.hub.test"])
def test_a_token_goes_to_no_other_scheme_port_or_host(place, monkeypatch):
    """Through the client that requests go through, with answers made here."""
    asked: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        if str(request.url).startswith("https://hub.test/api/"):
            listing = {"id": "someone/model", "sha": COMMIT, "siblings": [{"rfilename": "config.json", "size": 2}]}
            return httpx2.Response(200, json=listing)
        return httpx2.Response(302, headers={"Location": f"{place}/config.json"})

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.test")
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "https://hub.test/{repo_id}/{revision}/{filename}"
    )
    client = httpx2.Client(transport=httpx2.MockTransport(answer), follow_redirects=True)
    huggingface_hub.set_client_factory(lambda: client)
    try:
        with pytest.raises(CheckpointError):
            open_weights("someone/model")
    finally:
        huggingface_hub.set_client_factory(default_client_factory)
    there = [request for request in asked if str(request.url).startswith(place + "/")]
    assert there and not any("authorization" in request.headers for request in there)
    assert all(request.headers["authorization"] == "Bearer hf_secret" for request in asked if request not in there)


def test_a_small_file_is_taken_whole_from_a_server_without_ranges(folders, server):
    server.fault = lambda handler, request: handler.serve(request._replace(range=None))
    assert_equal(open_weights(server.add(folders["dense"])), open_weights(folders["dense"]))
    assert [request.path for request in server.requests].count(WEIGHTS) == 2  # to learn its size, and all of it


# -- faults that stay


def of_tensors(answer: Callable[[Handler, Request], bool]) -> Callable[[Handler, Request], bool]:
    """Only where a tensor is asked for, so that opening succeeds."""
    return lambda handler, request: (request.range or (0, 0))[0] >= 2**20 and answer(handler, request)


def longer(handler: Handler, request: Request) -> bool:
    start, stop = request.range
    return handler.serve(
        request._replace(range=(start, stop + 9)),
        Content_Range=f"bytes {start}-{stop - 1}/{len(handler.server.files[WEIGHTS])}",
    )


STAYING = {
    "500": (lambda h, r: h.say(500), r"answered 500 Internal Server Error"),
    "no body": (lambda h, r: h.serve(r, part=0), r"without sending complete message body"),
    "silence": (lambda h, r: h.stall(r), r"timed out"),
    "another range": (
        lambda h, r: h.serve(r._replace(range=(r.range[0] - 9, r.range[1] - 9))),
        r"answered with bytes \S+, wanted bytes \S+; download the model",
    ),
    "no ranges": (lambda h, r: h.serve(r._replace(range=None)), r"answered with all of the file, wanted bytes \d+"),
    "too much": (longer, r"sent \d+ bytes, wanted \d+"),
    "another version": (lambda h, r: h.serve(r, ETag='"new"'), r'the version was "\w+", and is "new" now'),
    "another size": (
        lambda h, r: h.serve(r, Content_Range=f"bytes {r.range[0]}-{r.range[1] - 1}/5"),
        r"answered with bytes \S+/5, wanted bytes",
    ),
    "compressed": (lambda h, r: h.serve(r, Content_Encoding="gzip"), r"while decompressing"),
    "401": (lambda h, r: h.say(401), r"answered 401 Unauthorized: it does not exist, or wants a login"),
    "404": (lambda h, r: h.say(404), r"answered 404 Not Found$"),
    "in circles": (lambda h, r: h.say(302, Location=r.path), r"redirects"),
    "to plain http": (  # 0.0.0.0 is here, but not by one of the names of this machine
        lambda h, r: r.path == WEIGHTS and h.say(302, Location=f"http://0.0.0.0:{h.server.server_port}/config.json"),
        r"0\.0\.0\.0:\d+/config.json: wanted an https address",
    ),
}


@pytest.mark.parametrize("fault", STAYING)
def test_faults_that_stay_are_named_and_another_call_goes_on_from_there(fault, folders, server, monkeypatch):
    monkeypatch.setattr(remote, "STEP", 2**20)
    monkeypatch.setattr(remote, "TIMEOUT", 0.3 if fault == "silence" else 10)
    address, (answer, message) = server.add(folders["dense"]), STAYING[fault]
    weights = open_weights(address)
    server.fault = of_tensors(answer)
    with pytest.raises(CheckpointError, match=rf"^http\S+: .*{message}|^http://{message}"):
        weights.get("up", 1)
    server.fault = lambda handler, request: False
    assert torch.equal(weights.get("up", 1), open_weights(folders["dense"]).get("up", 1))
    assert_equal(open_weights(address), open_weights(folders["dense"]))


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(CheckpointError, match=r"^http://127\.0\.0\.1:9/config\.json: .*refused"):
        open_weights("http://127.0.0.1:9/")


def test_two_versions_never_mix(folders, server):
    address = server.add(folders["dense"])
    old = open_weights(address)
    old.get("q", 0)
    new = random_model(seed=1, **DENSE)
    new.save_pretrained(folders["dense"].parent / "new", model_type="qwen2")
    content = (folders["dense"].parent / "new" / "model.safetensors").read_bytes()
    assert len(content) == len(server.files[WEIGHTS]) and content != server.files[WEIGHTS]
    server.files[WEIGHTS] = content
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the version was \S+, and is \S+ now"):
        old.get("q", 1)
    assert_equal(open_weights(address), open_weights(folders["dense"].parent / "new"))
    server.add(folders["dense"])
    assert_equal(open_weights(address), open_weights(folders["dense"]))


def test_a_large_file_from_a_server_without_ranges_is_refused_unread(folders, server, monkeypatch):
    monkeypatch.setattr(remote, "STEP", 2**20)
    server.fault = lambda handler, request: handler.serve(request._replace(range=None))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* range None, wanted .* and byte ranges"):
        open_weights(server.add(folders["dense"]))


def test_a_server_that_tells_no_versions_apart_is_refused(folders, server):
    server.fault = lambda handler, request: handler.serve(request, ETag=None)
    with pytest.raises(CheckpointError, match=r"config\.json: .* version None, .*, wanted an ETag or date to tell"):
        open_weights(server.add(folders["dense"]))


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        (WEIGHTS, None, r"^http://\S+/: found neither model\.safetensors nor model\.safetensors\.index\.json"),
        ("/config.json", None, r"^http://\S+/config\.json: not found"),
        ("/config.json", b'{"model_type": "mamba"}', r"^http://\S+/config\.json: .*mamba"),
        (
            "/config.json",
            b"<html>",
            r"config\.json: wanted JSON, found a web page, as downloads give that want a login",
        ),
        ("/tokenizer.json", b"<!doctype html>", r"tokenizer\.json: wanted a vocabulary, found a web page"),
        (WEIGHTS, b"<!DOCTYPE html>" * 99, r"^http://\S+: wanted a safetensors file, found 1485 bytes .*<!DOCTYP"),
        (WEIGHTS, b"<!DOCTYPE html>" * 99, r"found 1485 bytes .*, a web page, as downloads give that want a login$"),
        (WEIGHTS, LFS_POINTER, r"wanted a safetensors file, found \d+ bytes .*, a Git LFS pointer, which stands for a"),
        (WEIGHTS, b"{}", r"^http://\S+: wanted a safetensors file, found 2 bytes"),
        (WEIGHTS, (9).to_bytes(8, "little") + b'{"a": 12}' + bytes(99), r"wanted a whole safetensors file"),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(path, content, message, folders, server):
    address = server.add(folders["dense"])
    if content is None:
        del server.files[path]
    else:
        server.files[path] = content
    with pytest.raises(CheckpointError, match=message):
        assert open_weights(address).tokens


@pytest.mark.parametrize("name", ["../dense/model.safetensors", "https://example.com/a.safetensors", "a.bin"])
def test_an_index_leads_nowhere_else(name, folders, server):
    address = server.add(folders["sharded"], "/sharded")
    index = "/sharded/model.safetensors.index.json"
    content = json.loads(server.files[index])
    content["weight_map"]["lm_head.weight"] = name
    server.files[index] = json.dumps(content).encode()
    with pytest.raises(CheckpointError, match=rf"its index names '{re.escape(name)}', wanted the name of"):
        open_weights(address)
    assert all(request.path.startswith("/sharded/") for request in server.requests)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://example.com/folder/", "wanted an https address"),
        ("ftp://127.0.0.1/", "wanted an https address"),
        ("https://", "wanted an https address"),
        ("https://host:port/", "https://: Invalid port: 'port'"),
    ],
)
def test_other_addresses_are_refused(address, message):
    with pytest.raises(CheckpointError, match=message):
        open_weights(address)


def test_secrets_in_an_address_are_neither_shown_nor_kept(folders, server, tmp_path):
    address = server.add(folders["dense"]).replace("//", "//me:k3y@")
    open_weights(f"{address}model.safetensors?key=k3y").get("q", 0)
    assert all("key=k3y" in request.path and "authorization" in request.headers for request in server.requests)
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert kept and not any("k3y" in str(path) or b"k3y" in path.read_bytes() for path in kept)
    server.fault = lambda handler, request: handler.say(404)
    with pytest.raises(CheckpointError) as caught:
        open_weights(f"{address}model.safetensors?key=k3y")
    assert "k3y" not in str(caught.value)


# -- the cache


KILLED = """
from minimoe.model import remote
from minimoe.fingerprints.weights import open_weights
remote.STEP = 2**18
weights = open_weights("someone/dense")
weights.get("k", 0)
print("attention", flush=True)
weights.get("embedding")
"""


def test_a_kill_in_the_middle_loses_only_what_was_under_way(folders, server, hub, tmp_path):
    """And HF_ENDPOINT is heeded as a person sets it."""
    hub("dense")
    stalled = threading.Event()

    def stall_later(handler: Handler, request: Request) -> bool:
        if not request.path.endswith(WEIGHTS) or server.sent < 2**19:
            return False
        stalled.set()
        return handler.stall(request, part=0.5)

    server.fault = stall_later
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"HF_ENDPOINT": server.address, "MINIMOE_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], env=environment, stdout=subprocess.PIPE, encoding="utf-8"
    )
    try:
        assert process.stdout.readline() == "attention\n"
        assert stalled.wait(30)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (kept,) = (tmp_path / "cache").rglob("model.safetensors")
    before = sum(kept.with_name("marks").read_bytes()) * remote.BLOCK
    assert 2**18 < before < kept.stat().st_size == len(server.files[f"/someone/dense/resolve/{COMMIT}{WEIGHTS}"])
    server.fault, server.sent = lambda handler, request: False, 0
    assert_equal(open_weights("someone/dense"), open_weights(folders["dense"]))
    assert server.sent - kept.stat().st_size + before < 10_000  # the rest, with listing and tokenizer


@pytest.mark.parametrize(
    "damage", ["the marks are garbage", "the marks are shorter", "the file is shorter", "the file is gone"]
)
def test_a_damaged_cache_is_fetched_again(damage, folders, server, tmp_path):
    address = server.add(folders["dense"])
    read(open_weights(address))
    (kept,) = (tmp_path / "cache").rglob("model.safetensors")
    marks = kept.with_name("marks")
    if "marks" in damage:
        marks.write_bytes(b"garbage" * 99 if "garbage" in damage else marks.read_bytes()[:-1])
    elif damage == "the file is shorter":
        os.truncate(kept, 1000)
    else:
        kept.unlink()
    assert_equal(open_weights(address), open_weights(folders["dense"]))


# -- repositories


@pytest.fixture
def hub(folders, server, monkeypatch):
    """Make the server the hub: what `hub(name)` returns is read from it."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.address + "/{repo_id}/resolve/{revision}/{filename}",
    )

    def publish(name: str, revision: str = "main") -> str:
        siblings = []
        for file in folders[name].iterdir():
            content = file.read_bytes()
            entry = {"rfilename": file.name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
            if file.suffix == ".safetensors":
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 135}
            siblings.append(entry)
        server.add(folders[name], f"/someone/{name}/resolve/{COMMIT}")
        listing = {"id": f"someone/{name}", "sha": COMMIT, "siblings": siblings}
        server.files[f"/api/models/someone/{name}/revision/{revision}"] = json.dumps(listing).encode()
        return f"someone/{name}"

    return publish


@pytest.mark.parametrize("name", ["dense", "sharded"])
def test_a_repository_is_read_at_one_commit_and_hashes_are_those_published(name, folders, hub, server):
    found, local = open_weights(hub(name)), open_weights(folders[name])
    assert found.sha256() == local.sha256()
    size = sum(len(content) for path, content in server.files.items() if path.endswith(".safetensors"))
    assert server.sent < size / 10
    assert_equal(found, local)
    assert (found.name, found.tokens) == (f"someone/{name}", {"a": 0, "b": 1})
    server.requests.clear()
    assert_equal(open_weights(f"someone/{name}"), local)
    assert [request.path for request in server.requests] == [f"/api/models/someone/{name}/revision/main?blobs=true"]


def test_a_file_that_changed_is_fetched_anew(folders, hub, server):
    """Of as many bytes as before, and small enough that the hub has no sha256 for it."""
    name = hub("dense")
    assert open_weights(name).tokens == {"a": 0, "b": 1}
    file, api = f"/someone/dense/resolve/{COMMIT}/tokenizer.json", "/api/models/someone/dense/revision/main"
    old = server.files[file]
    server.files[file] = old.replace(b'"a"', b'"c"')
    blobs = [hashlib.sha1(content).hexdigest().encode() for content in (old, server.files[file])]
    server.files[api] = server.files[api].replace(*blobs)
    assert open_weights(name).tokens == {"c": 0, "b": 1}


def test_a_revision_is_asked_for_by_name(folders, hub, server):
    hub("dense", "refs%2Fpr%2F1")
    assert_equal(open_weights("someone/dense@refs/pr/1"), open_weights(folders["dense"]))
    with pytest.raises(CheckpointError, match=r"someone/dense: no such folder here; as a repository: answered 404"):
        open_weights("someone/dense")


def test_refusals_of_the_hub_are_passed_on(hub, server, monkeypatch):
    name = hub("dense")
    gated = {"X_Error_Code": "GatedRepo", "X_Error_Message": "Access to someone/dense is restricted."}
    server.fault = lambda handler, request: "resolve" in request.path and handler.say(401, **gated)
    with pytest.raises(CheckpointError, match=r"401 .*is restricted.*: a gated repository; accept its conditions"):
        open_weights(name)
    server.fault = lambda handler, request: handler.say(401, X_Error_Message="Repository not found")
    with pytest.raises(CheckpointError, match=r"someone/dense: no such folder here; .*401 .*not found.*login"):
        open_weights(name)
    server.fault = lambda handler, request: False
    listing = "/api/models/someone/dense/revision/main"
    no_sizes = json.loads(server.files[listing])
    for sibling in no_sizes["siblings"]:
        del sibling["size"]
    for damaged, message in ((b"<html>", "as a repository: "), (json.dumps(no_sizes).encode(), "no size in the")):
        server.files[listing] = damaged
        with pytest.raises(CheckpointError, match=message):
            open_weights(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no such folder here; as a repository: HF_HUB_OFFLINE is set"):
        open_weights(name)


def test_a_pickle_is_refused_unread(hub, server):
    name, listing = hub("dense"), "/api/models/someone/dense/revision/main"
    server.files[listing] = server.files[listing].replace(b'"model.safetensors"', b'"pytorch_model.bin"')
    with pytest.raises(CheckpointError, match=r"someone/dense/pytorch_model\.bin: a pickle, .*runs whatever code"):
        open_weights(name)
    assert not any("pytorch_model" in request.path for request in server.requests)


def test_without_published_hashes_there_is_none(folders, server):
    size = (folders["dense"] / "model.safetensors").stat().st_size
    with pytest.raises(Refusal, match=rf"publishes no sha256, and computing it would move all {size} bytes"):
        open_weights(server.add(folders["dense"])).sha256()


def test_what_is_here_comes_first(folders, server, tmp_path, monkeypatch):
    monkeypatch.chdir(folders["dense"].parent.parent)
    assert_equal(open_weights(f"{folders['dense'].parent.name}/dense"), open_weights(folders["dense"]))
    for path in ("nowhere/model.safetensors", "a/b/c", "nowhere", Path("someone/dense")):
        with pytest.raises(CheckpointError, match=r"wanted a folder with config\.json"):
            open_weights(path)
    assert not server.requests


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.delitem(sys.modules, "minimoe.model.remote")
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(CheckpointError, match=r"not found here; .*httpx2: pip install 'minimoe\[remote\]'"):
        open_weights("someone/dense")
