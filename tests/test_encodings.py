"""The command line opens no file in the encoding of the machine: what one computer writes, every other reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minimoe.data_files import data_path

ROOT = Path(__file__).resolve().parent.parent
MODEL = str(data_path("zoo/alder"))
GROUPS = ("train", "sample", "figures", "compare", "fingerprint", "card make", "card check")
ZOO = ("list", "show", "build", "path", "verify", "benchmark")
HELP = [[*command.split(), "--help"] for command in ("", *GROUPS, "card", "zoo", *(f"zoo {name}" for name in ZOO))]
COMMANDS = [
    *HELP,
    ["train", "--corpus", "texts", "--out", "run", "--steps", "1"],
    ["sample", "run", "--max-new-tokens", "2"],
    ["figures", "parameters_total_active"],
    ["compare", MODEL, str(data_path("zoo/birch"))],
    ["fingerprint", MODEL, "--out", "alder.npz"],
    ["compare", "--json", MODEL, "alder.npz"],
    ["card", "make", MODEL, "--out", "card.json"],
    ["card", "check", "card.json", MODEL],
    ["zoo", "list"],
    ["zoo", "show", "alder-gauged"],
    ["zoo", "path", "alder"],
]
# One process for all: each would take seconds to import torch.
PROGRAM = """
import json, sys
from minimoe.cli import app

for arguments in json.loads(sys.argv[1]):
    try:
        app(arguments)
    except SystemExit as ended:
        if ended.code and arguments[:2] != ["card", "check"]:  # words are still missing from the card
            sys.exit(f"minimoe {' '.join(arguments)}: exit status {ended.code}")
"""
# matplotlib writes its list of fonts, once for every user, in the encoding of the machine.
EXEMPT = "ignore::EncodingWarning:matplotlib.font_manager"
STRICT = ("-X", "warn_default_encoding", "-W", "error::EncodingWarning", "-W", EXEMPT)


def run_strictly(program: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MINIMOE_PROGRESS": "0"}
    command = [sys.executable, *STRICT, "-c", program, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")


def test_no_command_opens_a_file_without_an_encoding(tmp_path):
    for number in range(30):
        path = tmp_path / "texts" / "one" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("Où est le chat ? " * 40 + str(number), encoding="utf-8")
    done = run_strictly(PROGRAM, json.dumps(COMMANDS), folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("call", ["open('x', 'w')", "import subprocess; subprocess.run(['true'], text=True)"])
def test_a_missing_encoding_would_be_seen(call, tmp_path):
    done = run_strictly(call, folder=tmp_path)
    assert done.returncode == 1 and "EncodingWarning: 'encoding' argument not specified" in done.stderr
