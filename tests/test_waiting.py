"""While something takes long: a bar that says what is at work, and Ctrl-C, which leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minimoe import atomic
from minimoe.cli import app
from minimoe.data_files import data_path
from minimoe.fingerprints import compare as comparing
from minimoe.fingerprints import fingerprint as reading
from minimoe.fingerprints import weights as opened
from minimoe.fingerprints.compare import DECIDING, compare
from minimoe.fingerprints.fingerprint import READ, fingerprint
from minimoe.progress import at_work, note
from tests.fingerprints.toys import random_model, weights
from tests.model.test_remote import WEIGHTS, Handler, Request, Server

pytestmark = pytest.mark.exact("looks at what is shown, and at what is left")
ALDER, BIRCH = (str(data_path("zoo") / name) for name in ("alder", "birch"))


# -- the bar


def names_shown(text: str) -> list[str]:
    """What stood before the bar, in order, each name once."""
    return list(dict.fromkeys(re.findall(r"\r(\w+): ", text)))


def test_the_bar_names_each_method_and_what_is_read(monkeypatch, capsys):
    pair, notes = (weights(random_model(1)), weights(random_model(2))), []
    wanted = str(compare(*pair))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("MINIMOE_PROGRESS", "1")
    monkeypatch.setattr(opened, "note", notes.append)
    assert str(compare(*pair)) == wanted
    said = capsys.readouterr()
    assert names_shown(said.err) == list(DECIDING) and said.out == ""
    assert said.err.split("\r")[-2].isspace()  # it wiped itself out
    assert {"embedding", "q of layer 2"} <= set(notes)
    fingerprint(pair[0])
    assert names_shown(capsys.readouterr().err) == list(READ)


def test_what_is_noted_stands_beside_the_bar_in_between(monkeypatch, capsys):
    monkeypatch.setenv("MINIMOE_PROGRESS", "1")
    with at_work(["adding", "dividing"]) as names:
        for name in names:
            time.sleep(0.12)  # the bar is drawn ten times a second at most
            note(f"layer 7 while {name}")
    text = capsys.readouterr().err
    assert "layer 7 while adding" in text and "layer 7 while dividing" in text
    note("nobody is at work")
    assert capsys.readouterr() == ("", "")


# -- Ctrl-C


def interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


STOPPED: dict[str, tuple[list[str], Callable[[pytest.MonkeyPatch], None]]] = {
    "in a method": (["compare", ALDER, BIRCH], lambda patch: patch.setattr(opened.Weights, "get", interrupt)),
    "in the last bit of a report": (
        ["compare", ALDER, BIRCH, "--quick"],
        lambda patch: patch.setattr(comparing, "judge", interrupt),
    ),
    "while a model is read": (
        ["fingerprint", ALDER, "-o", "alder.npz"],
        lambda patch: patch.setitem(reading.READ, "spectra", interrupt),
    ),
    "while a fingerprint is written": (
        ["fingerprint", ALDER, "-o", "alder.npz"],
        lambda patch: patch.setattr(atomic.os, "fsync", interrupt),
    ),
    "while a card is made": (
        ["card", "make", ALDER, "-o", "card.json", "--parent", BIRCH],
        lambda patch: patch.setattr(opened.Weights, "sha256", interrupt),
    ),
}


@pytest.mark.parametrize("place", STOPPED)
def test_ctrl_c_leaves_one_line_and_no_file(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command, prepare = STOPPED[place]
    prepare(monkeypatch)
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, done.stderr, done.stdout) == (130, "stopped\n", "")
    assert list(tmp_path.iterdir()) == []


def test_a_card_that_cannot_be_made_leaves_no_half_of_it(monkeypatch, tmp_path):
    def refuse(self):
        raise ValueError("no sha256 is published")

    monkeypatch.setattr(opened.Weights, "sha256", refuse)
    done = CliRunner().invoke(app, ["card", "make", ALDER, "-o", str(tmp_path / "card.json")])
    assert done.exit_code == 2 and list(tmp_path.iterdir()) == []


def test_ctrl_c_in_the_middle_of_a_download_ends_at_once_and_what_arrived_is_kept(tmp_path):
    """As a person does it, with a bar on the screen."""
    server, stalled = Server(), threading.Event()
    address = server.add(Path(ALDER))
    other = server.add(Path(ALDER), "/other")

    def stall(handler: Handler, request: Request) -> bool:
        if request.path != f"/other{WEIGHTS}" or (request.range or (0, 0))[0] == 0:
            return False
        stalled.set()
        return handler.stall(request, part=0.5)

    server.fault = stall
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    environment |= {"MINIMOE_CACHE": str(tmp_path / "cache"), "MINIMOE_PROGRESS": "1"}
    command = [sys.executable, "-m", "minimoe.cli", "compare", address, other, "--quick"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    try:
        assert stalled.wait(60)
        time.sleep(0.5)  # until it waits for the rest
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
        server.close()
    lines = error.replace("\r", "\n").split("\n")
    assert (process.returncode, out, lines[-2:]) == (130, "", ["stopped", ""]) and "Traceback" not in error
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.name for path in kept} <= {"model.safetensors", "config.json", "tokenizer.json", "marks"}
