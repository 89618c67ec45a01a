"""Recipes with training, against formulas, linear algebra and the shipped alder."""

import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from minimoe.data_files import data_path
from minimoe.lineage.recipes import SHAPES
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.training import Corpus
from workshop.training_recipes import distil, from_scratch, keep_training, open_corpus, train_lora

ROLES = ("q", "k", "v", "o")
UNTRAINED = {"steps": 1, "learning_rate": 0.0, "batch_size": 1, "seq_len": 8}  # one step that moves nothing


def alder():
    return MoEForCausalLM.from_pretrained(data_path("zoo") / "alder", dtype=torch.float32)


def vector(model):
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


# --- from scratch --------------------------------------------------------------------------------------------


def test_by_depth_gives_the_standard_deviations_that_are_stated():
    usual, by_depth = (
        from_scratch(out=None, shape="deep", initialisation=kind, weights=5, seed=0, corpus="planted", **UNTRAINED)
        for kind in ("usual", "by depth")
    )
    assert_close(by_depth.model.embed_tokens.weight, usual.model.embed_tokens.weight, rtol=0, atol=0)
    for layer, (block, usual_block) in enumerate(zip(by_depth.model.layers, usual.model.layers, strict=True)):
        usual_weights = usual_block.state_dict()
        for name, weight in block.state_dict().items():
            if weight.dim() == 1:
                assert bool((weight == 1).all())
                continue
            fan_in = {"down_proj": SHAPES["deep"].intermediate_size}.get(name.split(".")[1], SHAPES["deep"].hidden_size)
            assert float(weight.std()) == pytest.approx((2 * fan_in * (layer + 1)) ** -0.5, rel=0.05)
            assert float(usual_weights[name].std()) == pytest.approx(SHAPES["deep"].initializer_range, rel=0.05)


def test_twins_start_from_the_same_weights_whatever_they_read():
    settings = {"out": None, **UNTRAINED}
    first = from_scratch(weights=1, seed=1, corpus="real", **settings)
    assert torch.equal(vector(from_scratch(weights=1, seed=2, corpus="planted", **settings)), vector(first))
    assert not torch.equal(vector(from_scratch(weights=2, seed=1, corpus="real", **settings)), vector(first))


def test_the_corpora_are_the_usual_ones():
    assert open_corpus("planted").sha256 == Corpus.planted().sha256
    assert open_corpus("real").sha256 == Corpus.real().sha256


# --- low-rank updates ----------------------------------------------------------------------------------------


@pytest.mark.exact("two trainings from one seed are compared to the bit")
def test_lora_changes_the_attention_matrices_alone_and_each_by_its_rank_at_most(tmp_path):
    settings = {"corpus": "planted", "steps": 3, "learning_rate": 1e-2, "warmup_steps": 0, "seq_len": 32}
    tuned, before = train_lora(alder(), out=tmp_path, rank=8, seed=4, **settings), alder().state_dict()
    changed = {name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.layers.{layer}.self_attn.{role}_proj.weight" for layer in range(4) for role in ROLES}
    for name in changed:
        values = torch.linalg.svdvals(tuned.state_dict()[name].double() - before[name].double())
        assert values[0] > 1e-3 > 1e-3 * values[7] > values[8]  # rounding is left
    assert tuned.state_dict().keys() == before.keys() and all(weight.requires_grad for weight in tuned.parameters())
    assert not list(tmp_path.iterdir())
    assert torch.equal(vector(train_lora(alder(), out=None, rank=8, seed=4, **settings)), vector(tuned))
    assert not torch.equal(vector(train_lora(alder(), out=None, rank=8, seed=5, **settings)), vector(tuned))


# --- distillation --------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL |= {"vocab_size": 1024, "intermediate_size": 24, "num_experts": 0}
SHORT = {"weights": 9, "seed": 3, "corpus": "planted", "steps": 4, "seq_len": 16, "learning_rate": 1e-2}


def small_model(seed, **settings):
    """Its predictions are far from even."""
    model = MoEForCausalLM(MoEConfig(**SMALL | settings), seed=seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model


def test_a_student_is_scored_on_all_that_the_teacher_predicts(tmp_path):
    """The loss of the first step, from the batch and the two models before it."""
    teacher = small_model(1)
    distil(teacher, out=tmp_path, **SHORT)
    student = MoEForCausalLM(teacher.config, seed=9)
    ids = Corpus.planted().batch("train", batch_size=8, seq_len=16, seed=3, step=0).input_ids
    with torch.no_grad():
        wanted, found = (model(ids).logits.double().numpy()[:, :-1] for model in (teacher, student))
    p, q = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) for logits in (wanted, found))
    labels = np.take_along_axis(q, ids.numpy()[:, 1:, None], -1)
    record = log_of(tmp_path)[0]
    assert record["loss"] == pytest.approx(-(p * np.log(q)).sum(-1).mean(), rel=1e-5)
    assert record["cross_entropy"] == pytest.approx(-np.log(labels).mean(), rel=1e-5)
    assert abs(record["loss"] - record["cross_entropy"]) > 1e-3


def test_a_student_shares_no_weight_and_its_teacher_stays(tmp_path):
    teacher = small_model(1)
    before = vector(teacher).clone()
    student = distil(teacher, out=tmp_path, **SHORT)
    assert torch.equal(vector(teacher), before)
    assert student.state_dict().keys() == teacher.state_dict().keys()
    assert not {tensor.data_ptr() for tensor in student.parameters()} & {t.data_ptr() for t in teacher.parameters()}
    assert {parameter.grad is None for parameter in teacher.parameters()} == {True}
    back = MoEForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(vector(back), vector(student))
    start = vector(MoEForCausalLM(teacher.config, seed=9))
    unmoved = vector(distil(teacher, out=None, **SHORT | {"learning_rate": 0.0}))
    assert torch.equal(unmoved, start)


def test_a_student_comes_to_predict_what_its_teacher_does():
    def distance(student):
        with torch.no_grad():
            p, q = (model(ids).logits.log_softmax(-1) for model in (teacher, student))
        return float((p.exp() * (p - q)).sum(-1).mean())

    teacher = small_model(1)
    ids = Corpus.planted().batch("held_out", batch_size=8, seq_len=16, seed=0, step=0).input_ids
    longer = SHORT | {"steps": 100, "warmup_steps": 10}
    by_text = keep_training(
        MoEForCausalLM(teacher.config, seed=9), out=None, **{k: v for k, v in longer.items() if k != "weights"}
    )
    taught = distance(distil(teacher, out=None, **longer))
    assert taught < 0.8 * distance(MoEForCausalLM(teacher.config, seed=9))
    assert taught < distance(by_text)


@pytest.mark.exact("two trainings from one seed are compared to the bit")
def test_a_student_that_was_interrupted_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    teacher, batch, asked = small_model(1), Corpus.batch, []

    def killing(self, *arguments, step, **options):
        asked.append(step)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return batch(self, *arguments, step=step, **options)

    whole = distil(teacher, out=None, **SHORT)
    monkeypatch.setattr(Corpus, "batch", killing)
    with pytest.raises(KeyboardInterrupt):
        distil(teacher, out=tmp_path, save_every=2, **SHORT)
    resumed = distil(teacher, out=tmp_path, save_every=2, **SHORT)
    assert asked == [0, 1, 2, 3, 2, 3]
    assert torch.equal(vector(resumed), vector(whole))
    assert [record["step"] for record in log_of(tmp_path)] == [1, 2, 3, 4]
