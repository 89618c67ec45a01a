"""The exercise of notebook 04: right answers of many kinds pass, known mistakes get their hint."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minimoe.course.checks import WrongAnswer, check_equal_compute_steps, check_training_flop
from minimoe.course.checks.learning import _CONFIGS
from minimoe.course.cost import training_flop
from minimoe.model import MoEForCausalLM
from minimoe.training.presets import small_config


def embedding(config):
    return config.vocab_size * config.hidden_size


def from_the_count(config, tokens):
    looked_up = 0 if config.tie_word_embeddings else embedding(config)
    return 6.0 * tokens * (config.num_parameters(active=True) - looked_up)


def matrices(config):
    """Every matrix that a token is multiplied with, by what it is for; no norms."""
    hidden, heads, kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    experts = config.num_experts_per_tok if config.num_experts else 1
    width = config.moe_intermediate_size if config.num_experts else config.intermediate_size
    layer = {
        "attention": 2 * hidden * config.head_dim * (heads + kv),
        "experts": experts * 3 * hidden * width,
        "router": config.num_experts * hidden,
        "shared": 3 * hidden * config.shared_expert_intermediate_size,
    }
    return {name: config.num_hidden_layers * size for name, size in layer.items()} | {"head": embedding(config)}


def matrix_by_matrix(config, tokens):
    return 6 * tokens * sum(matrices(config).values())


def without(name):
    return lambda config, tokens: matrix_by_matrix(config, tokens) - 6 * tokens * matrices(config)[name]


def square_attention(config, tokens):
    four = config.num_hidden_layers * 4 * config.hidden_size**2
    return without("attention")(config, tokens) + 6 * tokens * four


def as_a_tensor(config, tokens):
    return torch.tensor(from_the_count(config, tokens))


def as_an_array(config, tokens):
    return np.array([from_the_count(config, tokens)])


def counted_by_torch(config, tokens):
    """The matrix products of one real forward and backward pass."""
    ids = torch.arange(8)[None]
    with FlopCounterMode(display=False) as counter:
        MoEForCausalLM(config)(ids, labels=ids).loss.backward()
    return counter.get_total_flops() * tokens / ids.numel()


@pytest.mark.parametrize(
    "answer", [from_the_count, matrix_by_matrix, as_a_tensor, as_an_array, counted_by_torch, training_flop]
)
def test_right_counts_are_accepted(answer):
    assert check_training_flop(answer).startswith("Right")


@pytest.mark.parametrize("config", _CONFIGS.values(), ids=_CONFIGS)
def test_the_formula_agrees_with_what_torch_counts(config):
    assert counted_by_torch(config, 100) == pytest.approx(training_flop(config, 100), rel=5e-3)


@pytest.mark.parametrize("length", [32, 128])
def test_what_the_formula_leaves_out_is_attentions_comparing(length):
    """Counted with attention as two matrix products, each S x S x head_dim for each head, forwards and twice back."""
    config = small_config()
    ids = torch.zeros(2, length, dtype=torch.int64)
    counts = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(backend):
            MoEForCausalLM(config)(ids, labels=ids).loss.backward()
        counts.append(counter.get_total_flops())
    per_token = 12 * length * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert counts[1] - counts[0] == per_token * ids.numel()
    assert counts[0] == pytest.approx(training_flop(config, ids.numel()), rel=5e-3)


def exact(model, other, steps):
    return steps * training_flop(model, 1) / training_flop(other, 1)


@pytest.mark.parametrize(
    "answer",
    [
        exact,
        lambda *x: round(exact(*x)),
        lambda *x: int(exact(*x)),
        lambda *x: torch.tensor(exact(*x)).ceil(),
        lambda model, other, steps: steps * matrix_by_matrix(model, 1) / matrix_by_matrix(other, 1),
    ],
    ids=["exact", "nearest", "down", "up", "matrix by matrix"],
)
def test_right_steps_are_accepted(answer):
    assert check_equal_compute_steps(answer).startswith("Right")


@pytest.mark.parametrize(
    "answer, hint",
    [
        (
            lambda c, t: from_the_count(c, t) + 6 * t * (c.num_parameters() - c.num_parameters(active=True)),
            "all experts",
        ),
        (lambda c, t: 6 * t * c.num_parameters(active=True), "counted the embedding"),
        (lambda c, t: 6 * t * (c.num_parameters(active=True) - embedding(c)), "although it is tied"),
        (lambda c, t: matrix_by_matrix(c, t) - 6 * t * embedding(c), "although it is tied"),
        (lambda c, t: 2 * t * c.num_parameters(active=True), "forward pass"),
        (lambda c, t: 4 * t * c.num_parameters(active=True), "backward pass"),
        (without("router"), "left out the router"),
        (without("shared"), "left out the shared expert"),
        (square_attention, "four square matrices"),
        (lambda c, t: square_attention(c, t) - 6 * t * matrices(c)["router"], "Not yet. For a mixture of many small"),
        (lambda c, t: from_the_count(c, t) / 2, "two operations"),
        (lambda c, t: from_the_count(c, 1), "grow with the number of tokens"),
        (lambda c, t: 7 * from_the_count(c, t), "Not yet. For a mixture with tied embeddings and 1,000 tokens"),
        (lambda c, t: [1, 2], "2 numbers; wanted one"),
        (lambda c, t: None, "return"),
        (lambda c, t: float("nan"), "Not yet"),
    ],
)
def test_wrong_counts_get_a_hint(answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check_training_flop(answer)


def test_a_head_left_out_gets_its_hint():
    """Right where the embedding is tied, so that only the other models show the mistake."""

    def answer(config, tokens):
        head = 0 if config.tie_word_embeddings else 6 * tokens * embedding(config)
        return from_the_count(config, tokens) - head

    with pytest.raises(WrongAnswer, match="The head is a matrix product"):
        check_training_flop(answer)


@pytest.mark.parametrize(
    "answer, hint",
    [
        (lambda model, other, steps: exact(other, model, steps), "Upside down"),
        (lambda m, o, steps: steps * m.num_parameters() / o.num_parameters(), "what the models store"),
        (
            lambda m, o, steps: steps * m.num_parameters(active=True) / o.num_parameters(active=True),
            "counted the embeddings",
        ),
        (lambda model, other, steps: steps, "as many steps"),
        (lambda model, other, steps: 1 + 2 * exact(model, other, steps), "Not yet. For the mixture and a dense model"),
        (lambda model, other, steps: None, "return"),
    ],
)
def test_wrong_steps_get_a_hint(answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check_equal_compute_steps(answer)
