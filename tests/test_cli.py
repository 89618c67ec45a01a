"""The command line, as a person types it."""

import json
import re
import shlex
import shutil

import pytest
from typer.testing import CliRunner

from minimoe.cli import app
from minimoe.model import MoEConfig, MoEForCausalLM

runner = CliRunner()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of two easily told domains."""
    folder = tmp_path_factory.mktemp("texts")
    for domain, sentence in {"cats": "The cat sat on the mat. ", "sums": "1 + 1 = 2\n"}.items():
        (folder / domain).mkdir()
        for number in range(30):
            (folder / domain / f"{number}.txt").write_text(sentence * 20 + f"({number})")
    return folder


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "moe"
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
    assert f"minimoe sample {out}" in output and re.search(r"^Trained in \d+ s", output, re.M)
    assert model.config.model_type == "mixtral"


def test_train_is_repeatable_and_a_finished_run_is_not_taken_again(trained, texts, tmp_path):
    out, _ = trained
    again = tmp_path / "again"
    runner.invoke(app, ["train", "--corpus", str(texts), "--out", str(again), "--steps", "3"])
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    log = (again / "log.jsonl").read_text()
    runner.invoke(app, ["train", "--corpus", str(texts), "--out", str(again), "--steps", "3"])
    assert (again / "log.jsonl").read_text() == log


@pytest.mark.parametrize(
    ("arguments", "model_type", "has"),
    [
        (["--experts", "0"], "llama", "intermediate_size=256"),
        (["--balance", "bias"], "minimoe", "e_score_correction_bias=True"),
        (["--balance", "none"], "mixtral", "router_aux_loss_coef=0.0"),
    ],
)
def test_train_variants(texts, tmp_path, arguments, model_type, has):
    result = runner.invoke(
        app, ["train", "--corpus", str(texts), "--out", str(tmp_path / "x"), "--steps", "1", *arguments]
    )
    assert result.exit_code == 0, result.output
    config = MoEForCausalLM.from_pretrained(tmp_path / "x").config
    assert config.model_type == model_type
    assert has in repr(config)


def test_dense_twin_has_equal_active_parameters(texts, tmp_path):
    counts = {}
    for experts in ("0", "8"):
        result = runner.invoke(
            app,
            ["train", "--corpus", str(texts), "--out", str(tmp_path / experts), "--steps", "1", "--experts", experts],
        )
        config = MoEForCausalLM.from_pretrained(tmp_path / experts).config
        routers = sum(config.is_sparse(layer) for layer in range(4)) * config.num_experts * config.hidden_size
        counts[experts] = config.num_parameters(active=True) - routers
        assert result.exit_code == 0
    assert counts["0"] == counts["8"]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "nowhere"], "nowhere"),
        (["train", "--corpus", "no/such/folder", "--out", "unused"], "no/such/folder"),
        (
            ["train", "--experts", "2", "--experts-per-token", "3", "--out", "unused"],
            "num_experts_per_tok=3: wanted at most",
        ),
    ],
)
def test_mistakes_get_one_line(arguments, message, tmp_path, monkeypatch, texts):
    monkeypatch.chdir(tmp_path)
    if "--experts" in arguments:
        arguments = [*arguments, "--corpus", str(texts)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "unused").exists()


def test_a_place_that_cannot_be_written_to_is_refused_before_the_corpus_is_read(tmp_path):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "run"
    result = runner.invoke(app, ["train", "--corpus", "no/such/folder", "--out", str(out)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {out}: cannot be made or written to")


@pytest.mark.filterwarnings("default")
def test_warnings_get_one_line(texts, tmp_path):
    folder = tmp_path / "texts"
    shutil.copytree(texts, folder)
    (folder / "cats" / "picture.png").write_bytes(b"\0\1\2")
    result = runner.invoke(app, ["train", "--corpus", str(folder), "--out", str(tmp_path / "run"), "--steps", "1"])
    assert result.exit_code == 0
    assert re.search(r"^warning: .*picture.png", result.stderr, re.MULTILINE)
    assert "UserWarning" not in result.stderr


def test_the_hint_can_be_pasted(texts, tmp_path):
    out = tmp_path / "with space"
    result = runner.invoke(app, ["train", "--corpus", str(texts), "--out", str(out), "--steps", "1"])
    hint = shlex.split(result.output.strip().splitlines()[-1])
    assert hint[:2] == ["minimoe", "sample"]
    assert runner.invoke(app, [*hint[1:], "--max-new-tokens", "2"]).exit_code == 0


def test_sample_names_a_damaged_tokenizer(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    result = runner.invoke(app, ["sample", str(tmp_path / "model")])
    assert result.exit_code == 1
    assert re.match(r"error: .*tokenizer.json: not a tokenizer", result.stderr)


def test_a_very_low_temperature_is_greedy(trained):
    def sample(temperature):
        return runner.invoke(app, ["sample", str(trained[0]), "--prompt", "The", "--temperature", temperature]).output

    assert sample("1e-40") == sample("0")


def test_sample_needs_a_tokenizer_and_a_prompt(trained, tmp_path):
    MoEForCausalLM(MoEConfig(num_hidden_layers=1)).save_pretrained(tmp_path)
    result = runner.invoke(app, ["sample", str(tmp_path)])
    assert result.exit_code == 1 and "has no tokenizer.json: wanted one" in result.stderr
    result = runner.invoke(app, ["sample", str(trained[0]), "--prompt", ""])
    assert result.exit_code == 1 and "wanted at least one character" in result.stderr


def test_a_run_with_other_settings_is_refused(trained, texts):
    out, _ = trained
    before = json.loads((out / "training.json").read_text())
    result = runner.invoke(app, ["train", "--corpus", str(texts), "--out", str(out), "--steps", "4"])
    assert result.exit_code == 1 and "steps=3 there, 4 asked for" in result.stderr
    assert json.loads((out / "training.json").read_text()) == before
