"""Members are built once and whole, go on where they were interrupted, and are told from other models."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from minimoe.data_files import data_path
from minimoe.lineage.tree import MEMBERS, Member
from minimoe.model import MoEForCausalLM
from minimoe.training import Corpus, Settings
from workshop.build_zoo import ZooBuilder, main


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """What is shipped, and nothing else."""
    return ZooBuilder(tmp_path_factory.mktemp("home"))


@pytest.fixture
def pup(monkeypatch):
    """A member that two steps of training make."""
    options = {"steps": 2, "seed": 7, "corpus": "planted", "learning_rate": 1e-3}
    monkeypatch.setitem(MEMBERS, "pup", Member(name="pup", parents=("alder",), recipe="keep_training", options=options))
    return "pup"


def vector(model):
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def tensors_of(folder):
    return MoEForCausalLM.from_pretrained(folder).state_dict()


def test_what_is_not_in_the_tree_is_refused_everywhere(zoo):
    for call in (zoo.build_one, zoo.verify, lambda name: zoo.build([name])):
        with pytest.raises(ValueError, match=r"^'alter': not in the zoo; `minimoe zoo list`"):
            call("alter")
    assert not any(zoo.home.iterdir())


@pytest.mark.exact("two makings of one member are compared to the bit")
def test_two_processes_build_what_is_missing_once(zoo):
    names = ["alder-int4", "alder-copy-gauged", "birch-int8"]
    assert sorted(zoo.build(names, processes=2)) == sorted(names)
    before = {file: file.stat().st_mtime_ns for file in zoo.home.rglob("*")}
    assert zoo.build([*names, "alder"], processes=2) == []
    assert {file: file.stat().st_mtime_ns for file in zoo.home.rglob("*")} == before
    assert {file.relative_to(zoo.home).parts[0] for file in before} == set(names)
    empty = ZooBuilder(zoo.home / "nowhere")
    for name in names:
        assert zoo.folder(name) == zoo.home / name
        assert torch.equal(vector(zoo.load(name)), vector(empty.load(name)))  # made on the spot
        said = json.loads((zoo.home / name / "lineage.json").read_text(encoding="utf-8"))
        assert (said["name"], said["parents"]) == (name, list(MEMBERS[name].parents))
        assert said["options"] == MEMBERS[name].options and said["function_unchanged"] == MEMBERS[name].exact
        assert said["tokens"] == 0 and "corpus_sha256" not in said


def test_ancestors_that_take_training_are_built_first(zoo):
    missing = zoo.missing(["alder-noisy-trained-gauged", "alder-transplant-gauged", "stranger-02-copy", "stranger-02"])
    assert missing == [
        "alder-noisy-trained",
        "alder-noisy-trained-gauged",
        "alder-transplant-gauged",
        "stranger-02",
        "stranger-02-copy",
    ]


def test_a_job_that_fails_says_why(tmp_path):
    (tmp_path / "alder-int8").touch()
    with pytest.raises(OSError, match="alder-int8"):
        ZooBuilder(tmp_path).build(["alder-int8"], processes=1)


@pytest.mark.exact("two trainings from one seed are compared to the bit")
def test_a_trained_member_is_a_whole_folder_in_float16(pup, tmp_path):
    zoo = ZooBuilder(tmp_path)
    assert not zoo.has(pup)
    zoo.build_one(pup)
    assert zoo.folder(pup) == tmp_path / pup
    assert {file.name for file in (tmp_path / pup).iterdir()} == {
        file.name for file in (data_path("zoo") / "alder").iterdir()
    }
    assert {tensor.dtype for tensor in tensors_of(tmp_path / pup).values()} == {torch.float16}
    said = json.loads((tmp_path / pup / "lineage.json").read_text(encoding="utf-8"))
    assert said["corpus_sha256"] == Corpus.planted().sha256
    assert said["tokens"] == 2 * Settings.batch_size * Settings.seq_len
    assert not list((tmp_path / ".training").iterdir())
    verified = zoo.verify(pup)
    assert verified.identical and verified.agrees and verified.loss == verified.stored_loss


def test_training_that_was_killed_before_the_member_was_written_is_not_done_again(pup, tmp_path, monkeypatch):
    zoo = ZooBuilder(tmp_path)
    with monkeypatch.context() as killed:
        killed.setattr(MoEForCausalLM, "save_pretrained", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            zoo.build_one(pup)
    assert zoo.folder(pup) is None and not zoo.has(pup)
    monkeypatch.setattr(MoEForCausalLM, "forward", raise_interrupt)
    zoo.build_one(pup)
    assert zoo.has(pup)


def raise_interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.exact("the processes it starts round as they do")
def test_a_killed_build_ends_all_its_processes_and_leaves_nothing_that_counts(tmp_path):
    """SIGKILL, while it trains. Output is closed only when the last process that could write to it has ended."""
    name = "alder-noisy-trained"
    log = tmp_path / ".training" / name / "log.jsonl"
    command = [sys.executable, "-m", "workshop.build_zoo", name, "--processes", "1", "--home", str(tmp_path)]
    build = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (log.exists() and log.read_bytes()):
        assert build.poll() is None, build.communicate()
        time.sleep(0.1)
    build.kill()
    build.communicate(timeout=60)
    assert len(log.read_text(encoding="utf-8").splitlines()) < MEMBERS[name].options["steps"]
    assert ZooBuilder(tmp_path).folder(name) is None and not ZooBuilder(tmp_path).has(name)


# --- verifying -----------------------------------------------------------------------------------------------


def test_training_again_gives_the_member_that_is_shipped(zoo):
    """To the bit on a like processor; elsewhere rounding differs, which a short training hardly amplifies."""
    verified = zoo.verify("alder-continued-0.1")
    assert verified.agrees and verified.cosine > 0.999999
    assert verified.loss == pytest.approx(verified.stored_loss, abs=1e-3)


def test_another_training_does_not_pass_for_the_one_that_is_shipped(zoo, monkeypatch):
    member = MEMBERS["alder-continued-0.1"]
    monkeypatch.setitem(MEMBERS, member.name, replace(member, options={**member.options, "steps": 4}))
    assert not zoo.verify(member.name).agrees


# --- the command line ------------------------------------------------------------------------------------------


def test_a_build_says_what_it_made(tmp_path, capsys):
    assert main(["alder", "birch", "--home", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"0 made in {tmp_path}, nothing was missing\n"
    assert main(["birch-int4", "--processes", "1", "--home", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"1 made in {tmp_path}: birch-int4\n"
    assert (tmp_path / "birch-int4" / "config.json").exists()


def test_verifying_tells_one_model_from_another(tmp_path, capsys):
    assert main(["--verify", "alder-int8", "alder-copy", "--home", str(tmp_path)]) == 0
    lines = r"alder-int8: identical to the bit; held-out loss (\S+), stored \1 nats\nalder-copy: identical .*\n"
    assert re.fullmatch(lines, capsys.readouterr().out)
    MoEForCausalLM.from_pretrained(data_path("zoo") / "birch").save_pretrained(tmp_path / "alder-int8")
    assert main(["--verify", "alder-int8", "--home", str(tmp_path)]) == 1
    line = r"alder-int8: cosine of all weights 0\.\d+; held-out loss \S+, stored \S+ nats\n"
    assert re.fullmatch(line, capsys.readouterr().out)


def test_mistakes_get_one_line(tmp_path, capsys):
    home = tmp_path / "home"
    for arguments, message in [
        (["alder-int8", "alter"], "'alter': not in the zoo"),
        (["--verify", "alter"], "'alter': not in the zoo"),
        (["--verify", "stranger-02"], "run `minimoe zoo build stranger-02 --home"),
    ]:
        fails([*arguments, "--home", str(home)], message, capsys)
    assert not home.exists()
    home.touch()
    fails(["alder-int8", "--home", str(home)], "File exists", capsys)


def fails(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("error: ") and message in said and said.count("\n") == 1
