"""The files that follow from the corpora: one command writes each, and training the tokenizer twice gives the same."""

import json
import subprocess
import sys

import pytest

from minimoe.data_files import data_path
from minimoe.training import planted, real
from workshop import rebuild
from workshop.rebuild import train_tokenizer

pytestmark = pytest.mark.exact("computes nothing")
SAMPLE = [
    "Der Hafen ist still. El puerto está en calma.",
    "def total(values):\n    return sum(values)\n",
    "Le marché ouvre à huit heures : 17 + 25 = 42",
    "打开文件 关闭文件 保存文件",
] * 5


@pytest.fixture
def data(monkeypatch, tmp_path):
    """An empty folder in the place of data/."""
    for module in (real, rebuild):
        monkeypatch.setattr(module, "data_path", lambda name: tmp_path / name)
    return tmp_path


def test_training_is_deterministic_across_processes():
    script = (
        "import json, sys\n"
        "from workshop.rebuild import train_tokenizer\n"
        "print(train_tokenizer(json.load(sys.stdin), vocab_size=320).to_str())"
    )
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, input=json.dumps(SAMPLE), capture_output=True, encoding="utf-8", check=True)
    for _ in range(5):
        assert json.loads(run.stdout) == json.loads(train_tokenizer(SAMPLE, vocab_size=320).to_str())


def test_a_frequent_word_becomes_a_token():
    assert "ĠHafen" in train_tokenizer(SAMPLE, vocab_size=512).encode(" Hafen").tokens


def test_retraining_replaces_the_file_whole(data, monkeypatch):
    monkeypatch.setattr(rebuild, "training_texts", lambda: SAMPLE)
    rebuild.rebuild_tokenizer()
    written = (data / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(written) == json.loads(train_tokenizer(SAMPLE).to_str())
    assert [path.name for path in data.iterdir()] == ["tokenizer.json"]


def test_the_planted_text_is_written_as_it_is_kept(data, monkeypatch):
    monkeypatch.setattr(planted, "DOMAINS", ("french/kitchen", "code"))
    monkeypatch.setattr(rebuild, "CORPUS_DOCUMENTS", 15)
    kept = planted.texts("french/kitchen")
    rebuild.rebuild_planted()
    written = (data / "corpora/planted/seed-0/french-kitchen.txt").read_bytes().decode()
    assert written == "".join(text + "<|endoftext|>\n" for text in kept[:15])
    assert len(list(data.rglob("*.txt"))) == 4


def test_the_manifest_is_written_by_one_command(data, monkeypatch, capsys):
    shipped = json.loads(data_path("corpora/manifest.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(real, "available_domains", lambda domains: ("arithmetic",))
    rebuild.rebuild_manifest()
    assert real.read_manifest() == {"arithmetic": shipped["domains"]["arithmetic"]}
    assert json.loads((data / "corpora/manifest.json").read_text(encoding="utf-8"))["planted"] == shipped["planted"]
    assert "arithmetic" in capsys.readouterr().out
