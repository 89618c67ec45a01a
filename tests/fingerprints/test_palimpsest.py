"""A model remembers the order of its training; one that never saw it says nothing of it, exactly so."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from scipy import stats

from minimoe.fingerprints.palimpsest import compare_order, log_likelihoods, palimpsest
from minimoe.fingerprints.weights import open_weights
from minimoe.model import MoEConfig, MoEForCausalLM
from tests.fingerprints.toys import Vocabulary, disturbed, gauged, random_model, weights

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": 0}


@pytest.fixture(scope="module")
def examples():
    """Of random tokens, [200, 12], in the order of training."""
    return torch.randint(40, (200, 12), generator=torch.Generator().manual_seed(0))


def trained_on(examples, seed=0, *, rate=1e-2, start=None):
    """A model that met each pair of examples once, one after the other; from random weights, or from `start`."""
    model = MoEForCausalLM(MoEConfig(**SIZES, intermediate_size=64), seed=seed)
    if start is not None:
        model.load_state_dict(start.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for batch in examples.split(2):
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def parent(examples):
    return trained_on(examples)


@pytest.fixture(scope="module")
def stranger(examples):
    """Trained on the same examples in another order."""
    return trained_on(examples[torch.randperm(200, generator=torch.Generator().manual_seed(1))], seed=1)


def test_the_order_of_training_is_remembered(examples, parent, stranger):
    found = palimpsest(weights(parent), examples)
    assert found.score > 0.2 and found.p_value < 1e-3
    assert palimpsest(weights(disturbed(parent, 0.3)), examples).p_value < 0.01
    assert palimpsest(weights(parent), examples, trials=9).p_value == 0.1  # no p-value is 0
    assert palimpsest(weights(stranger), examples).p_value > 0.01
    assert palimpsest(weights(parent), examples.flip(0)).p_value > 0.999  # one-sided


def test_blind_spots(examples, parent):
    """What long training has written over, and what was met at a learning rate of nearly 0."""
    others = torch.randint(40, (800, 12), generator=torch.Generator().manual_seed(2))
    assert palimpsest(weights(trained_on(others, start=parent)), examples).p_value > 0.01
    assert palimpsest(weights(trained_on(examples, rate=1e-6)), examples).p_value > 0.01


def test_a_student_remembers_the_order_of_its_teacher(examples, parent):
    """No weight in common: it learns what the teacher says of other text."""
    student = MoEForCausalLM(MoEConfig(**SIZES, intermediate_size=64), seed=3)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for ids in torch.randint(40, (300, 16, 12), generator=torch.Generator().manual_seed(4)):
        with torch.no_grad():
            wanted = parent(ids).logits.softmax(-1)
        optimizer.zero_grad()
        F.cross_entropy(student(ids).logits.flatten(0, 1), wanted.flatten(0, 1)).backward()
        optimizer.step()
    assert palimpsest(weights(student.eval()), examples).p_value < 0.01


def test_a_reference_takes_out_how_hard_the_examples_are():
    """Of each example another share, in no order, is made of the ten commonest tokens: easy for everyone."""
    gains = []
    for seed in (2, 3, 4):
        generator = torch.Generator().manual_seed(seed)
        examples = torch.randint(40, (200, 12), generator=generator)
        hard = torch.rand(200, 12, generator=generator) > torch.rand(200, 1, generator=generator)
        examples = examples.where(hard, examples % 10)
        suspect = weights(trained_on(examples))
        other = weights(trained_on(examples[torch.randperm(200, generator=generator)], seed=1))
        plain, against = (palimpsest(suspect, examples, reference=r, trials=1).score for r in (None, other))
        gains.append(against - plain)
    assert sum(gains) / 3 > 0.05  # .15 give or take .07 each: training comes out differently on another processor


def test_kinds_take_out_that_one_of_them_came_later(examples, parent):
    """A model that likes the second kind better, and no example for when it came; and one that remembers as well."""
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.rand(200, generator=generator) < torch.linspace(0.2, 0.8, 200)).long()
    likes = 5.0 * kinds + torch.randn(200, generator=generator, dtype=torch.float64)
    remembers = likes + torch.linspace(0, 2, 200)
    assert compare_order(likes).p_value < 1e-3
    assert compare_order(likes, kinds=kinds).p_value > 0.01
    found = compare_order(remembers, kinds=kinds)
    centred = [float(x - remembers[kinds == kind].mean()) for x, kind in zip(remembers, kinds, strict=True)]
    assert found.p_value < 1e-3 and found.score == pytest.approx(stats.spearmanr(range(200), centred).statistic)
    asked = palimpsest(weights(parent), examples, kinds=kinds, trials=9)
    assert asked == compare_order(log_likelihoods(weights(parent), examples), kinds=kinds, trials=9)


def test_p_values_of_a_model_that_never_saw_the_order_are_uniform(examples, stranger):
    """With T = 19 there are 20 possible values, equally likely; the same with a reference."""
    generator = torch.Generator().manual_seed(0)
    for reference in (None, weights(MoEForCausalLM(MoEConfig(**SIZES), seed=5))):
        found = [
            palimpsest(
                weights(stranger), examples[torch.randperm(200, generator=generator)[:20]],
                reference=reference, trials=19, seed=n,
            ).p_value
            for n in range(100)
        ]  # fmt: skip
        counts = torch.histc(torch.tensor(found), bins=5, min=0.025, max=1.025)
        assert stats.chisquare(counts.numpy()).pvalue > 0.01


def test_against_scipy_and_the_loss(examples, parent, stranger):
    """Spearman's rho and, where Student's approximation holds, its p-value; likelihoods one example at a time."""
    liked = log_likelihoods(weights(parent), examples)
    with torch.no_grad():
        expected = [-11 * float(parent(example[None], labels=example[None]).loss) for example in examples]
    torch.testing.assert_close(liked, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    for suspect in (parent, stranger):
        found = palimpsest(weights(suspect), examples)
        known = stats.spearmanr(range(200), log_likelihoods(weights(suspect), examples), alternative="greater")
        assert found.score == pytest.approx(known.statistic)
        assert found.p_value == pytest.approx(known.pvalue, abs=0.02)


def test_equal_examples_share_their_rank(parent):
    """Two likelihoods only: the random orders that repeat the score are counted."""
    ids = torch.randint(40, (2, 8)).repeat_interleave(6, dim=0)
    found = palimpsest(weights(parent), ids, trials=4999)
    rho = abs(stats.spearmanr(range(12), [0] * 6 + [1] * 6).statistic)
    assert found.score == pytest.approx(rho) or found.score == pytest.approx(-rho)
    exact = 1 / 924 if found.score > 0 else 1.0  # one of the 12 over 6 ways
    assert found.p_value == pytest.approx(exact, abs=0.002) and found.p_value > 1 / 5000


def test_gauges_change_nothing(examples):
    model = random_model(num_experts=4)
    score = palimpsest(weights(model), examples[:60], trials=1).score
    for name, copy in gauged(model).items():
        assert palimpsest(weights(copy), examples[:60], trials=1).score == pytest.approx(score, abs=1e-3), name


def test_refusals(tmp_path, examples, parent):
    for wrong in (examples[:9], examples[:, :1], examples[0]):
        with pytest.raises(ValueError, match=r"sequences has shape .*: wanted"):
            palimpsest(weights(parent), wrong)
    with pytest.raises(ValueError, match="token id 40: wanted 0 to 39"):
        palimpsest(weights(parent), examples + 1)
    assert "all examples are equally likely" in palimpsest(weights(parent), examples[:1].repeat(20, 1)).refused
    damaged = random_model(num_experts=4)
    damaged.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    assert "model.layers.1.self_attn.q_proj.weight: nan at [0, 0]" in palimpsest(weights(damaged), examples).refused
    huge = disturbed(parent, 0.0)
    huge.model.norm.weight.data[:] = 3e38
    assert "likelihoods are not finite" in palimpsest(weights(huge), examples).refused
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=160, hidden_size=16, num_attention_heads=2))
    encoder.save_pretrained(tmp_path)
    assert "is an encoder" in palimpsest(open_weights(tmp_path, tokenizer=Vocabulary()), examples).refused
