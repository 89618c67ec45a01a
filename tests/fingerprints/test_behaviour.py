"""What models do is read rightly, no gauge changes it, p-values keep to their nulls, and likeness is not descent."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from scipy import stats

from minimoe.fingerprints.behaviour import (
    adjusted_information,
    behaviour,
    hidden_cka,
    holm,
    moved_probability,
    predictions,
    routing_agreement,
    sign_test,
    token_agreement,
)
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.derive import prune_layers
from tests.fingerprints.toys import KINDS, Vocabulary, disturbed, gauged, random_model, weights
from tests.rounding import assert_near

METHODS = (token_agreement, hidden_cka, routing_agreement)
MIXTURES = [kind for kind, settings in KINDS.items() if settings.get("num_experts")]


# --- what is read off -------------------------------------------------------------------------------------


def test_behaviour_against_the_model():
    """Known tokens only, in an order of their own, more prompts than run at once."""
    for kind in KINDS:
        model = random_model(**KINDS[kind]).float()
        tokens, prompts = [f"t{number}" for number in range(150, 10, -1)], torch.randint(140, (70, 5))
        found = behaviour(weights(model), tokens, prompts)
        states = []
        for block in model.model.layers:
            block.register_forward_hook(lambda block, inputs, outputs, states=states: states.append(outputs[0][:, -1]))
        with torch.no_grad():
            output = model(150 - prompts, output_router_logits=True)
        logits = output.logits[:, -1, torch.arange(150, 10, -1)]
        assert found.choices.tolist() == logits.argmax(-1).tolist()
        assert_near(found.states, torch.stack(states))
        expected = [choice.logits.argmax(-1).tolist() for choice in output.router_outputs or ()]
        assert found.routes.tolist() == expected


def test_gauges():
    for kind in KINDS:
        model, stranger = random_model(**KINDS[kind]), random_model(1, **KINDS[kind])
        methods = METHODS if kind in MIXTURES else METHODS[:2]
        original, other = weights(model), weights(stranger)  # what is read of them is kept
        for name, copy in gauged(model).items():
            rewritten = weights(copy)
            for method in methods:
                assert method(original, rewritten, prompts=60).score > 0.98, (method, name)
        for method in methods:
            assert abs(method(original, other).score) < 0.1, method


def test_tokens_are_matched_by_string():
    """The same model with its tokens in another order, and one without a third of them."""
    model = random_model(num_experts=4)
    order = torch.randperm(160)
    renumbered = random_model(num_experts=4)
    renumbered.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data[order]
    renumbered.lm_head.weight.data = model.lm_head.weight.data[order]
    names = Vocabulary()
    names._tokens = {f"t{token}": place for place, token in enumerate(order.tolist())}
    for other in (open_weights(renumbered, tokenizer=names), open_weights(model, tokenizer=Vocabulary(130))):
        for method in METHODS:
            assert method(weights(model), other).score > 0.99, method


def test_layers_that_do_nothing_are_left_out():
    """Hidden states are aligned where depths differ; one repeated by an idle layer finds its own."""
    deep = random_model(num_hidden_layers=5)
    for layer in (1, 4):
        for linear in (deep.model.layers[layer].self_attn.o_proj, deep.model.layers[layer].mlp.down_proj):
            for parameter in linear.parameters():
                parameter.data.zero_()
    shallow = prune_layers(deep, [1, 4])
    for pair in ((deep, shallow), (shallow, deep)):
        assert hidden_cka(*map(weights, pair)).score > 0.999


def test_an_expert_cut_in_two_is_still_found():
    """Top-1 with two copies of each expert: which copy is taken changes nothing, but half of the choice is new."""
    settings = {"num_experts_per_tok": 1, "model_type": "mixtral"}  # whose only weight is 1
    model, doubled = random_model(num_experts=4, **settings), random_model(num_experts=8, **settings)
    state = model.state_dict()
    for name, tensor in doubled.state_dict().items():
        copies = len(tensor) // len(state[name])
        tensor.copy_(torch.cat([state[name]] * copies))
        if "mlp.gate" in name:
            tensor[4:] += 1e-5 * torch.randn_like(tensor[4:])
    assert token_agreement(weights(model), weights(doubled)).score > 0.99
    assert 0.6 < routing_agreement(weights(model), weights(doubled)).score < 0.9


# --- p-values ---------------------------------------------------------------------------------------------


def test_the_sign_test_is_uniform_or_conservative_against_exchangeable_controls():
    """`b` and the controls agree with `a` equally often, each as likely as the other on every prompt."""
    p_values = []
    for _ in range(1000):
        easy = torch.rand(200)
        agrees = torch.rand(4, 200) < easy
        p_values.append(
            (sign_test(agrees[0], agrees[1]), holm([sign_test(agrees[0], other) for other in agrees[1:]])[-1])
        )
    one, all_three = torch.tensor(p_values).T
    for level in (0.01, 0.05, 0.2, 0.5):
        allowed = stats.binom.ppf(0.999, 1000, level) / 1000
        assert (one <= level).double().mean() <= allowed and (all_three <= level).double().mean() <= allowed
    assert (one <= 0.05).double().mean() > 0.02  # and not uselessly so


def test_statistics_against_scipy_and_the_definition():
    wins, losses = torch.rand(50) < 0.7, torch.rand(50) < 0.4
    alone, other = int((wins & ~losses).sum()), int((losses & ~wins).sum())
    assert sign_test(wins, losses) == pytest.approx(stats.binomtest(alone, alone + other, alternative="greater").pvalue)
    assert sign_test(wins, wins) == 1
    p_values = [0.04, 0.01, 0.03, 0.2]
    for adjusted, p in zip(holm(p_values), sorted(p_values), strict=True):
        assert not _rejected_by_holm(p_values, p, adjusted - 1e-9) and _rejected_by_holm(p_values, p, adjusted + 1e-9)


def _rejected_by_holm(p_values, p, level):
    """Step down from the smallest as long as it is at most level / how many are left."""
    left = sorted(p_values)
    while left and left[0] <= level / len(left):
        left.pop(0)
    return p not in left


def test_adjusted_information():
    x = torch.randint(4, (3000,))
    assert adjusted_information(x, torch.tensor([2, 0, 3, 1])[x]) == pytest.approx(1)
    by_chance = [adjusted_information(torch.randint(4, (60,)), torch.randint(8, (60,))) for _ in range(200)]
    assert abs(sum(by_chance) / 200) < 4 * torch.tensor(by_chance).std() / 200**0.5  # not biased, few tokens or not
    assert adjusted_information(torch.zeros(9), torch.ones(9)) == 0


def test_controls_and_what_the_p_value_needs_of_them():
    """A descendant beats all strangers; a stranger is beaten by some; a control that is a closer copy settles it."""
    model = random_model()
    strangers = [weights(random_model(seed)) for seed in range(1, 5)]
    child = weights(disturbed(model, 0.1))
    found = token_agreement(child, weights(model), strangers)
    assert (
        found.score > found.details["closest_control"] + 0.2
        and found.p_value < 1e-9
        and found.details["rank_p"] == 1 / 5
    )
    assert token_agreement(weights(model), strangers[0], strangers[1:]).p_value > 0.01
    found = token_agreement(child, weights(model), [*strangers, child])
    assert found.p_value == 1 and found.details["closest_control"] == 1 and found.details["rank_p"] == 2 / 6
    assert token_agreement(child, weights(model)).p_value is None


# --- blind spots ------------------------------------------------------------------------------------------


def test_a_distilled_stranger_passes_for_a_descendant():
    """Trained on what the model says, from weights of its own: it beats every control, for no weight in common."""
    model, student = random_model().float(), random_model(1).float()
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for _ in range(60):
        ids = torch.randint(160, (32, 8))
        with torch.no_grad():
            wanted = model(ids).logits.softmax(-1)
        loss = F.cross_entropy(student(ids).logits.flatten(0, 1), wanted.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    controls = [weights(random_model(seed)) for seed in (2, 3, 4)]
    found = token_agreement(weights(student.eval()), weights(model), controls, prompts=1024)
    assert found.p_value < 1e-9 and found.score > 3 * found.details["closest_control"]


def test_equal_agreement_with_another_head_is_not_seen_in_tokens_but_in_states():
    """Stolen layers under a new head: other tokens are chosen, the states are the same."""
    model, thief = random_model(), random_model()
    thief.lm_head.weight.data = random_model(1).lm_head.weight.data
    assert token_agreement(weights(model), weights(thief)).score < 0.1
    assert hidden_cka(weights(model), weights(thief)).score > 0.999


# --- refusals ---------------------------------------------------------------------------------------------


def test_refusals(tmp_path):
    model, mixture = random_model(), random_model(num_experts=4)
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=160, hidden_size=16, num_attention_heads=2))
    encoder.save_pretrained(tmp_path)
    encoder = open_weights(tmp_path, tokenizer=Vocabulary())
    for method, plain in ((token_agreement, model), (hidden_cka, model), (routing_agreement, mixture)):
        assert "0 shared tokens: wanted at least 128" in method(weights(plain), weights(plain, prefix="other")).refused
        damaged = disturbed(plain, 0.0)
        damaged.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
        assert (
            "model.layers.1.self_attn.q_proj.weight: nan at [0, 0]" in method(weights(plain), weights(damaged)).refused
        )
        with pytest.raises(ValueError, match="prompts=3: wanted at least 4"):
            method(weights(plain), weights(plain), prompts=3)
    for method in (token_agreement, hidden_cka):
        assert "is an encoder: it predicts no next token" in method(weights(model), encoder).refused
    assert "is dense: it has no routers" in routing_agreement(weights(mixture), weights(model)).refused
    few = weights(random_model(vocab_size=127))
    assert "127 shared tokens" in token_agreement(weights(model), weights(model), [few]).refused
    huge = disturbed(model, 0.0)
    huge.model.norm.weight.data[:] = 3e38
    huge.model.layers[2].mlp.down_proj.weight.data[:] = 3e38
    assert "what a model computes is not finite" in hidden_cka(weights(model), weights(huge)).refused
    for parameter in model.parameters():
        parameter.data.zero_()
    assert "chooses the same token after every prompt" in token_agreement(weights(mixture), weights(model)).refused
    assert "hidden states of a layer are all 0" in hidden_cka(weights(mixture), weights(model)).refused


# --- how much probability moves ---------------------------------------------------------------------------


def test_moved_probability_is_what_must_be_moved():
    ids, models = torch.arange(12).view(2, 6), (random_model(seed).float() for seed in (0, 1))
    ours, theirs = (predictions(each, ids) for each in models)
    pairs = zip(ours.flatten(0, 1), theirs.flatten(0, 1), strict=True)
    wanted = np.mean([(x - y).clamp(min=0).sum().item() for x, y in pairs])
    assert moved_probability(ours, theirs) == pytest.approx(wanted, abs=1e-5)
    assert moved_probability(ours, ours) == 0
