"""The checks of the exercise on the cost of training (notebook 04)."""

from __future__ import annotations

from collections.abc import Callable

from minimoe.course.checks.answers import WrongAnswer, numbers
from minimoe.course.cost import training_flop
from minimoe.model import MoEConfig
from minimoe.training.presets import small_config

# Norms and biases are a small part of a model; a count by hand may leave them out.
_TOLERANCE = 0.01
_SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
_CONFIGS = {
    "a mixture with tied embeddings": MoEConfig(**_SHAPE, num_experts=8, num_experts_per_tok=2),
    "a mixture with an output head of its own": MoEConfig(
        **_SHAPE, num_experts=16, num_experts_per_tok=4, tie_word_embeddings=False
    ),
    "a dense model with an output head of its own": MoEConfig(**_SHAPE, num_experts=0, tie_word_embeddings=False),
    # Attention that is not four square matrices, a shared expert, and a router that is a large part of the model.
    "a mixture of many small experts": MoEConfig(
        **_SHAPE,
        vocab_size=512,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=64,
        num_experts_per_tok=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=32,
    ),
}


def check_training_flop(answer: Callable[[MoEConfig, int], float]) -> str:
    """Check `training_flop(config, tokens)`: the floating-point operations to train `config` on `tokens` tokens, 6 for
    each token and each weight that it is multiplied with. An answer may be off by one per cent, which leaves room for
    a count of the matrices alone.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes = {
        "You counted all experts. A token is multiplied with the weights of those that it meets: `active=True`.": (
            lambda config, tokens: 6 * (config.num_parameters() - _looked_up(config)) * tokens
        ),
        "You counted the embedding. Where the output head is a matrix of its own, the embedding is only looked up.": (
            lambda config, tokens: 6 * config.num_parameters(active=True) * tokens
        ),
        "You left out the embedding although it is tied: then the same matrix is the output head, and multiplies.": (
            lambda config, tokens: 6 * (config.num_parameters(active=True) - _embedding(config)) * tokens
        ),
        "You left out embedding and output head. The head is a matrix product like any other.": (
            lambda config, tokens: (
                6 * (config.num_parameters(active=True) - _embedding(config) - _looked_up(config)) * tokens
            )
        ),
        "You left out the router. A token is multiplied with all of it, to find its experts.": (
            lambda config, tokens: training_flop(config, tokens) - 6 * _routers(config) * tokens
        ),
        "You left out the shared expert, which every token meets.": (
            lambda config, tokens: training_flop(config, tokens) - 6 * _shared_experts(config) * tokens
        ),
        "You counted attention as four square matrices. See `num_key_value_heads` and `head_dim`.": (
            lambda config, tokens: training_flop(config, tokens) + 6 * _beyond_squares(config) * tokens
        ),
        "That is the forward pass. Training goes backwards, too, which costs twice as much again.": (
            lambda config, tokens: training_flop(config, tokens) / 3
        ),
        "That is the backward pass. Training goes forwards, too.": (
            lambda config, tokens: training_flop(config, tokens) * 2 / 3
        ),
        "A multiplication and an addition are two operations.": lambda config, tokens: (
            training_flop(config, tokens) / 2
        ),
        "This does not grow with the number of tokens.": lambda config, tokens: training_flop(config, 1),
    }
    for name, config in _CONFIGS.items():
        for tokens in (1000, 250_000):
            found, wanted = _number(answer, config, tokens), training_flop(config, tokens)
            hints = {hint: wrong(config, tokens) for hint, wrong in mistakes.items()}
            _compare(found, wanted, _TOLERANCE * wanted, hints, f"{name} and {tokens:,} tokens")
    return "Right: six operations for each token and each weight that it meets, but none for looking up an embedding."


def check_equal_compute_steps(answer: Callable[[MoEConfig, MoEConfig, int], float]) -> str:
    """Check `equal_compute_steps(model, other, steps)`: the steps of `other` that cost as much as `steps` steps of
    `model`, all with the same number of tokens. Rounded up, down or not at all: less than one step off is right, and so
    is one per cent, the slack of `check_training_flop`.

    Raises:
        WrongAnswer: with a hint.
    """
    mistakes = {
        "Upside down: the model that costs more for each token can take fewer steps.": (
            lambda model, other, steps: steps * _per_token(other) / _per_token(model)
        ),
        "You compared what the models store. What a token costs depends on the weights that it meets.": (
            lambda model, other, steps: steps * _stored(model) / _stored(other)
        ),
        "You counted the embeddings of models whose output head is a matrix of its own.": (
            lambda model, other, steps: steps * model.num_parameters(active=True) / other.num_parameters(active=True)
        ),
        "These are as many steps, not as much compute.": lambda model, other, steps: steps,
    }
    mixture, small, large = small_config(), small_config(experts=0), small_config(experts=0, experts_per_token=8)
    untied, dense = (_CONFIGS[f"a {kind} with an output head of its own"] for kind in ("mixture", "dense model"))
    pairs = {
        "the mixture and a dense model of equal total": (mixture, large),
        "two dense models": (large, small),
        "models with an output head of their own": (untied, dense),
    }
    for name, (model, other) in pairs.items():
        for steps in (500, 20_000):
            found = _number(answer, model, other, steps)
            wanted = steps * _per_token(model) / _per_token(other)
            hints = {hint: wrong(model, other, steps) for hint, wrong in mistakes.items()}
            _compare(found, wanted, max(1, _TOLERANCE * wanted), hints, f"{name} and {steps:,} steps")
    return "Right: in equal compute, steps go down as the cost of a token goes up."


def _number(answer: Callable, *inputs: object) -> float:
    """What the reader's function returns, as one number."""
    found = numbers(answer, *inputs)
    if found.numel() != 1:
        raise WrongAnswer(f"The function returned {found.numel()} numbers; wanted one.")
    return found.item()


def _compare(found: float, wanted: float, tolerance: float, hints: dict[str, float], case: str) -> None:
    """Accept what is within `tolerance` of `wanted`; else give the hint whose wrong number it is, or is nearest."""
    if abs(found - wanted) < tolerance:
        return
    nearest = min(hints, key=lambda hint: abs(found - hints[hint]))
    if abs(found - hints[nearest]) < tolerance:
        raise WrongAnswer(nearest)
    raise WrongAnswer(f"Not yet. For {case} your answer is {found:,.0f}; wanted {wanted:,.0f}.")


def _per_token(config: MoEConfig) -> int:
    return training_flop(config, 1)


def _stored(config: MoEConfig) -> int:
    return config.num_parameters() - _looked_up(config)


def _embedding(config: MoEConfig) -> int:
    return config.vocab_size * config.hidden_size


def _routers(config: MoEConfig) -> int:
    return config.num_hidden_layers * config.num_experts * config.hidden_size


def _shared_experts(config: MoEConfig) -> int:
    return config.num_hidden_layers * 3 * config.hidden_size * config.shared_expert_intermediate_size


def _beyond_squares(config: MoEConfig) -> int:
    """By how many weights four square matrices exceed the attention of `config`."""
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    return config.num_hidden_layers * config.hidden_size * (4 * config.hidden_size - heads * config.head_dim)


def _looked_up(config: MoEConfig) -> int:
    return 0 if config.tie_word_embeddings else _embedding(config)
