"""The benchmark of the dense twins times what it says, and refuses twins that are none."""

import json

import pytest
import torch

from benchmarks import dense_twins
from minimoe.model import MoEConfig
from minimoe.training.loop import Settings
from minimoe.training.presets import EXPERIMENTS, small_config


@pytest.fixture
def tiny(monkeypatch):
    """Models and batches that take milliseconds."""
    shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    configs = {
        dense_twins.MIXTURE: MoEConfig(**shape, num_experts=4, num_experts_per_tok=2, intermediate_size=8),
        "dense, equal active": MoEConfig(**shape, num_experts=0, intermediate_size=16),
        "dense, equal total": MoEConfig(**shape, num_experts=0, intermediate_size=32),
    }
    monkeypatch.setattr(dense_twins, "twins", lambda: configs)
    monkeypatch.setattr(dense_twins, "Settings", lambda: Settings(batch_size=2, seq_len=8))


@pytest.mark.exact("times and prints; results are compared in other tests")
def test_prints_a_table_and_writes_every_time(tiny, tmp_path, capsys):
    file = tmp_path / "results.json"
    threads_before = torch.get_num_threads()
    dense_twins.main(["--rounds", "2", "--threads", "1", "2", "--json", str(file)])

    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["benchmark"] == "dense_twins"
    assert [result["threads"] for result in document["results"]] == [1, 2]
    printed = capsys.readouterr().out
    for result in document["results"]:
        assert list(result["seconds"]) == ["mixture", "dense, equal active", "dense, equal total"]
        own = result["seconds"]["mixture"]
        for name, seconds in result["seconds"].items():
            assert len(seconds) == 2 and min(seconds) > 0
            assert f"{1000 * result['median_seconds'][name]:.2f}" in printed
            ratio = sum(seconds) / sum(own)  # of two rounds, the median is the mean
            assert result["speed_against"][name]["of_medians"] == pytest.approx(ratio)
    assert "REACHED" not in printed.upper()
    assert torch.get_num_threads() == threads_before


def test_the_twins_are_the_models_of_the_experiments():
    names = dict(zip(dense_twins.twins(), ("moe", "dense-active", "dense-total"), strict=True))
    for name, config in dense_twins.twins().items():
        recipe = EXPERIMENTS[names[name]]
        assert config == small_config(experts=recipe.experts, experts_per_token=recipe.experts_per_token)


def test_a_step_is_that_of_the_training_loop():
    """As many tokens, and every weight of every model moves (an expert that nobody chose by its decay)."""
    settings = Settings()
    for name, trainer in dense_twins.make_trainers(dense_twins.twins(), settings.batch_size, settings.seq_len).items():
        assert trainer.ids.shape == (settings.batch_size, settings.seq_len)
        before = {key: weight.clone() for key, weight in trainer.model.state_dict().items()}
        trainer()
        still = [key for key, weight in trainer.model.state_dict().items() if torch.equal(weight, before[key])]
        assert not still, name


def test_twins_that_are_none_are_refused(monkeypatch):
    def too_wide(vocab_size, *, experts, experts_per_token):
        return small_config(vocab_size, experts=experts, experts_per_token=experts_per_token + (experts == 0))

    monkeypatch.setattr(dense_twins, "small_config", too_wide)
    with pytest.raises(AssertionError, match=r"688992 parameters: wanted 544608, to 1%"):
        dense_twins.twins()
