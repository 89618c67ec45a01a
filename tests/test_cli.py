"""The command line, as a person types it."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minimoe.cli import app
from minimoe.data_files import data_path
from minimoe.lineage.tree import MEMBERS
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.model.families import FAMILIES

runner = CliRunner()
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of two easily told domains."""
    folder = tmp_path_factory.mktemp("texts")
    for domain, sentence in {"cats": "The cat sat on the mat. ", "sums": "1 + 1 = 2\n"}.items():
        (folder / domain).mkdir()
        for number in range(30):
            (folder / domain / f"{number}.txt").write_text(sentence * 20 + f"({number})", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "with space"
    result = runner.invoke(app, ["train", "--corpus", str(texts), "--out", str(out), "--steps", "3"])
    assert result.exit_code == 0, result.output
    return out, result.output


def test_train_shows_size_losses_samples_and_the_next_command(trained):
    out, output = trained
    model = MoEForCausalLM.from_pretrained(out)
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in output
    losses = {name: float(loss) for name, loss in re.findall(r"^  (cats|sums) +([\d.]+)$", output, re.M)}
    assert losses.keys() == {"cats", "sums"}
    assert all(0 < loss < 8 for loss in losses.values())
    assert "--- cats" in output and "--- sums" in output
    assert "minimoe sample" in output and re.search(r"^Trained in \d+ s", output, re.M)
    assert model.config.model_type == "mixtral"


@pytest.mark.exact("two trainings from one seed are compared to the bit")
def test_train_is_repeatable_and_a_finished_run_is_not_taken_again(trained, texts, tmp_path):
    train = ["train", "--corpus", str(texts), "--steps", "3", "--out", str(tmp_path)]
    runner.invoke(app, train)
    assert (tmp_path / "model.safetensors").read_bytes() == (trained[0] / "model.safetensors").read_bytes()
    log = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    runner.invoke(app, train)
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == log


def test_train_variants(trained, texts, tmp_path):
    for place, (arguments, model_type, has) in enumerate(
        [
            (["--experts", "0"], "llama", "intermediate_size=256"),
            (["--balance", "bias"], "minimoe", "e_score_correction_bias=True"),
            (["--balance", "none"], "mixtral", "router_aux_loss_coef=0.0"),
            (["--experts-per-token", "1"], "minimoe", "norm_topk_prob=False"),  # or the router would learn nothing
        ]
    ):
        out = tmp_path / str(place)
        result = runner.invoke(app, ["train", "--corpus", str(texts), "--out", str(out), "--steps", "1", *arguments])
        assert result.exit_code == 0, result.output
        config = MoEForCausalLM.from_pretrained(out).config
        assert config.model_type == model_type and has in repr(config), arguments
    dense, mixture = (MoEForCausalLM.from_pretrained(folder).config for folder in (tmp_path / "0", trained[0]))
    routers = sum(map(mixture.is_sparse, range(4))) * mixture.num_experts * mixture.hidden_size
    assert dense.num_parameters() == mixture.num_parameters(active=True) - routers


def test_sample_continues_the_prompt_and_depends_on_the_seed(trained):
    def sample(*arguments):
        result = runner.invoke(
            app, ["sample", str(trained[0]), "--prompt", "The cat", "--max-new-tokens", "8", *arguments]
        )
        assert result.exit_code == 0, result.output
        return result.output

    assert sample().startswith("The cat")
    assert sample("--seed", "1") == sample("--seed", "1") != sample("--seed", "2")
    assert sample("--temperature", "0", "--seed", "1") == sample("--top-k", "1", "--seed", "2")


def fails(arguments, message, status=1):
    """One line says why."""
    result = runner.invoke(app, arguments)
    assert result.exit_code == status
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1


def test_mistakes_get_one_line(tmp_path, monkeypatch, texts):
    monkeypatch.chdir(tmp_path)
    fails(["sample", "nowhere"], "nowhere")
    fails(["train", "--corpus", "no/such/folder", "--out", "unused"], "no/such/folder")
    too_many = ["--experts", "2", "--experts-per-token", "3"]
    fails(["train", "--corpus", str(texts), "--out", "unused", *too_many], "num_experts_per_tok=3: wanted at most")
    assert not (tmp_path / "unused").exists()
    (tmp_path / "file").touch()  # refused before the corpus is read
    fails(["train", "--corpus", "no/such/folder", "--out", "file/run"], "file/run: cannot be made or written to")


@pytest.mark.filterwarnings("default")
def test_warnings_get_one_line(texts, tmp_path):
    folder = tmp_path / "texts"
    shutil.copytree(texts, folder)
    (folder / "cats" / "picture.png").write_bytes(b"\0\1\2")
    result = runner.invoke(app, ["train", "--corpus", str(folder), "--out", str(tmp_path / "run"), "--steps", "1"])
    assert result.exit_code == 0
    assert re.search(r"^warning: .*picture.png", result.stderr, re.MULTILINE)
    assert "UserWarning" not in result.stderr


def test_the_hint_can_be_pasted(trained):
    hint = shlex.split(trained[1].strip().splitlines()[-1])
    assert hint[:2] == ["minimoe", "sample"]
    assert runner.invoke(app, [*hint[1:], "--max-new-tokens", "2"]).exit_code == 0


def test_sample_names_a_damaged_tokenizer(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}", encoding="utf-8")
    fails(["sample", str(tmp_path / "model")], "tokenizer.json: not a tokenizer")


def test_a_very_low_temperature_is_greedy(trained):
    def sample(temperature):
        return runner.invoke(app, ["sample", str(trained[0]), "--prompt", "The", "--temperature", temperature]).output

    assert sample("1e-40") == sample("0")


def test_sample_needs_a_tokenizer_and_a_prompt(trained, tmp_path):
    MoEForCausalLM(MoEConfig(num_hidden_layers=1)).save_pretrained(tmp_path)
    fails(["sample", str(tmp_path)], "the model has no tokenizer.json: wanted one")
    fails(["sample", str(trained[0]), "--prompt", ""], "wanted a text of at least one")


def test_a_run_with_other_settings_is_refused(trained, texts):
    out, _ = trained
    before = json.loads((out / "training.json").read_text(encoding="utf-8"))
    fails(["train", "--corpus", str(texts), "--out", str(out), "--steps", "4"], "steps=3 there, 4 asked for")
    assert json.loads((out / "training.json").read_text(encoding="utf-8")) == before


# --- the zoo


def zoo(home, *arguments):
    return runner.invoke(app, ["zoo", *arguments, "--home", str(home)])


def test_zoo_list_names_members_by_a_pattern_and_where_they_are(tmp_path):
    result = zoo(tmp_path, "list", "alder-i*")
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1) for line in result.output.splitlines()]
    assert lines[:-1] == [[f"alder-int{x}", "made when asked for"] for x in ("8", "4", "8-gauged", "4-gauged")]
    assert lines[-1] == ["4", f"of {len(MEMBERS)} members"]
    assert re.search(r"^alder +/.*zoo/alder$", zoo(tmp_path, "list", "alder").output, re.M)
    assert re.search(r"^stranger-02 +not built$", zoo(tmp_path, "list", "stranger-02").output, re.M)
    everything = zoo(tmp_path, "list").output.splitlines()
    assert [line.split()[0] for line in everything[:-1]] == list(MEMBERS)


def test_zoo_show_tells_the_whole_way(tmp_path):
    result = zoo(tmp_path, "show", "alder-ties")
    assert result.exit_code == 0
    steps = re.findall(r"^(\S+)$", result.output, re.M)
    assert steps == ["alder", "alder-finetuned", "alder-continued-1", "alder-ties"]
    last = result.output.split("\nalder-ties\n")[1]
    assert "from      alder, alder-finetuned, alder-continued-1\n" in last
    assert "by        merge_by_ties(density=0.2)\n" in last and "tokens    0\n" in last
    assert "function  its own\n" in last and "led to    alder-ties-gauged\n" in last and "no folder yet" in last
    assert "tokens    819,200\n" in result.output and "from      random weights\n" in result.output


def test_zoo_path_makes_a_folder_once(tmp_path):
    result = zoo(tmp_path, "path", "alder-gauged")
    assert result.exit_code == 0 and result.output.strip() == str(tmp_path / "alder-gauged")
    before = (tmp_path / "alder-gauged" / "model.safetensors").stat().st_mtime_ns
    assert zoo(tmp_path, "path", "alder-gauged").output == result.output
    assert (tmp_path / "alder-gauged" / "model.safetensors").stat().st_mtime_ns == before
    assert "lies in" in zoo(tmp_path, "show", "alder-gauged").output
    assert zoo(tmp_path, "path", "alder").output.strip().endswith("/zoo/alder")


@pytest.mark.exact("the processes it starts round as they do")
def test_what_trains_runs_in_the_workshop_and_keeps_its_status(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, status, said in [
        (["build", "alder", "birch"], 0, "0 made in home, nothing was missing"),
        (["verify", "stranger-02"], 1, "run `minimoe zoo build stranger-02 --home home`"),
    ]:
        command = [sys.executable, "-m", "minimoe.cli", "zoo", *arguments, "--home", "home"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == status and said in done.stdout + done.stderr


@pytest.mark.exact("the processes it starts round as they do")
def test_the_site_is_written_and_served_until_it_is_stopped(tmp_path):
    command = [sys.executable, "-u", "-m", "minimoe.cli", "site", "--serve", "--out", str(tmp_path / "pages")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "BROWSER": "true"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
    ) as server:
        address = next(re.search(r"http://\S+", line) for line in server.stdout if "http://" in line)[0]
        with urllib.request.urlopen(address) as answer:
            assert b"Watch a mixture of experts read" in answer.read()
        os.killpg(server.pid, signal.SIGINT)
    assert server.returncode == 130  # as after every Ctrl-C
    assert (tmp_path / "pages" / "claim.html").exists()


def test_zoo_mistakes_get_one_line(tmp_path):
    home = tmp_path / "home"
    for arguments, message in [
        (["show", "alter"], "'alter': not in the zoo; `minimoe zoo list` names its members"),
        (["path", "alter"], "'alter': not in the zoo"),
        (["path", "stranger-02"], "run `minimoe zoo build stranger-02 --home"),
        (["path", "stranger-02-copy"], "run `minimoe zoo build stranger-02 --home"),
    ]:
        fails(["zoo", *arguments, "--home", str(home)], message)
    assert not home.exists()


# --- cards


def test_a_card_is_made_filled_in_and_checked(tmp_path):
    card, child, parent = tmp_path / "a card.json", data_path("zoo") / "alder-finetuned", data_path("zoo") / "alder"
    result = runner.invoke(app, ["card", "make", str(child), "--parent", str(parent), "-o", str(card)])
    assert result.exit_code == 0, result.output
    command = shlex.split(result.output.splitlines()[-1])
    assert command[:3] == ["minimoe", "card", "check"]
    result = runner.invoke(app, command[1:])
    assert result.exit_code == 1
    assert 'mismatch  recipe: found ""; wanted words' in result.output.splitlines()
    content = json.loads(card.read_text(encoding="utf-8"))
    content |= {"recipe": "fine-tuned", "licence": "Apache-2.0"}
    content["data"] |= {"description": "generated", "licence": "Apache-2.0"}
    content["parents"][0]["licence"] = "Apache-2.0"
    card.write_text(json.dumps(content), encoding="utf-8")
    result = runner.invoke(app, [*command[1:], "--parent", str(parent)])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].startswith("confirmed parents[0] alder: shared lineage")
    result = runner.invoke(app, [*command[1:-1], str(parent)])
    assert result.exit_code == 1 and re.search("^mismatch  weights: found [0-9a-f]{64}; wanted", result.output, re.M)


def test_cards_that_cannot_be_read_or_written_get_one_line(tmp_path):
    alder = str(data_path("zoo") / "alder")
    (tmp_path / "card.json").write_text("{", encoding="utf-8")
    for arguments, message in [
        (["check", str(tmp_path / "none.json"), alder], "none.json"),
        (["check", str(tmp_path / "card.json"), alder], "card.json: wanted JSON"),
        (["make", str(tmp_path / "nowhere"), "-o", str(tmp_path / "new.json")], "nowhere"),
        (["make", alder, "-o", str(tmp_path / "card.json")], "card.json: there already"),
        (["make", alder, "-o", str(tmp_path / "card")], "wanted a name that ends in .json"),
    ]:
        fails(["card", *arguments], message, status=2)


def test_families_lists_those_that_run_and_those_that_are_read_with_the_reason():
    result = runner.invoke(app, ["families"])
    assert result.exit_code == 0
    running, reason, reading = result.output.split("\n\n")
    assert [line.split()[0] for line in running.splitlines()] == list(FAMILIES)
    assert "the methods that run a model refuse them" in reason
    names = set(re.findall(r"[\w.-]+", reading))
    assert names >= {"gpt2", "gemma3", "phi3", "bert"}
    assert not names & {
        "deepseek2",
        "gpt-oss",
        "glm4moe",
        "llama",
        "qwen2moe",
        "olmoe",
        "mamba",
        "t5",
        "clip",
    }  # they run, or have no such attention
