"""The checks of the exercises on a trained mixture: what it costs, and what its routers follow (notebooks 04 to 06).

Shapes: T tokens, K experts per token.
"""

from collections.abc import Callable
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from minimoe.course.checks.answers import WrongAnswer, compare, judge, numbers
from minimoe.course.cost import training_flop
from minimoe.model import MoEConfig
from minimoe.training.presets import small_config

Labels = np.ndarray  # [T] int64
_ONE_PER_CENT = 0.01  # norms and biases are a small part of a model; a count by hand may leave them out
_SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
_UNTIED = MoEConfig(**_SHAPE, num_experts=16, num_experts_per_tok=4, tie_word_embeddings=False)
_UNTIED_DENSE = MoEConfig(**_SHAPE, num_experts=0, tie_word_embeddings=False)
# Attention that is not four square matrices, a shared expert, and a router that is a large part of the model.
_FEW_KEYS = {"vocab_size": 512, "num_key_value_heads": 2, "head_dim": 32}
_SHARED = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 32}
_MANY_EXPERTS = MoEConfig(**_SHAPE, **_FEW_KEYS, **_SHARED, num_experts=64, num_experts_per_tok=4)


def check_training_flop(answer: Callable[[MoEConfig, int], float]) -> str:
    """Check `training_flop(config, tokens)`: the floating-point operations to train `config` on `tokens` tokens, 6 for
    each token and each weight that it is multiplied with. An answer may be off by one per cent, which leaves room for
    a count of the matrices alone."""
    mistakes = {
        "You counted all experts, and a token meets only some.": lambda config, tokens: 6 * _stored(config) * tokens,
        "You counted the embedding. Where the output head is a matrix of its own, the embedding is only looked "
        "up.": lambda config, tokens: 6 * config.num_parameters(active=True) * tokens,
        "That is the forward pass. Backwards it costs twice as much again.": lambda *inputs: training_flop(*inputs) / 3,
    }
    models = {
        "a mixture with tied embeddings": MoEConfig(**_SHAPE, num_experts=8, num_experts_per_tok=2),
        "a mixture with an output head of its own": _UNTIED,
        "a dense model with an output head of its own": _UNTIED_DENSE,
        "a mixture of many small experts": _MANY_EXPERTS,
    }
    for name, config in models.items():
        tries, what = [(config, 1000), (config, 250_000)], f"your answer for {name}"
        judge(answer, tries, training_flop, mistakes, praise="", what=what, atol=0, rtol=_ONE_PER_CENT)
    return "Right: six operations for each token and each weight that it meets, but none for looking up an embedding."


def check_equal_compute_steps(answer: Callable[[MoEConfig, MoEConfig, int], float]) -> str:
    """Check `equal_compute_steps(model, other, steps)`: the steps of `other` that cost as much as `steps` steps of
    `model`, all with the same number of tokens. Rounded up, down or not at all: one step off is right, and so is one
    per cent, the slack of `check_training_flop`."""

    def right(model: MoEConfig, other: MoEConfig, steps: int) -> float:
        return steps * training_flop(model, 1) / training_flop(other, 1)

    mixture, small, large = small_config(), small_config(experts=0), small_config(experts=0, experts_per_token=8)
    pairs = [(large, small), (mixture, large), (_UNTIED, _UNTIED_DENSE)]
    tries = [(*pair, steps) for pair in pairs for steps in (500, 20_000)]
    mistakes = {
        "Upside down: the dearer model takes fewer steps.": lambda model, other, steps: right(other, model, steps),
        "You compared what the models store. What a token costs depends on the weights that it "
        "meets.": lambda model, other, steps: steps * _stored(model) / _stored(other),
        "These are as many steps, not as much compute.": lambda model, other, steps: steps,
    }
    praise = "Right: in equal compute, steps go down as the cost of a token goes up."
    return judge(answer, tries, right, mistakes, praise, atol=1, rtol=_ONE_PER_CENT)


def _stored(config: MoEConfig) -> int:
    """The weights that are multiplied with some token; an embedding that is no output head is looked up."""
    return config.num_parameters() - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)


def check_repetition(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Check `repetition(choices, documents)`: from the choices [T, K], best first, and the document [T] of each token,
    the share of the pairs of neighbours in one document that have the same first choice."""

    def same(choices: Tensor) -> Tensor:
        return (choices[1:, 0] == choices[:-1, 0]).double()

    def within(pairs: Tensor, documents: Tensor) -> Tensor:
        return pairs[documents[1:] == documents[:-1]]

    tries = [_routed(4, (9, 2, 14)), _routed(5, (3, 5, 4, 20))]  # some repeat across a boundary, too
    mistakes = {
        "You also paired the last token of one document with the first of the next.": lambda x, _: same(x).mean(),
        "You divided by the number of tokens, not of pairs.": lambda x, d: within(same(x), d).sum() / len(x),
        "You compared all choices, not only the first.": lambda x, d: within(x[1:] == x[:-1], d).double().mean(),
    }
    praise = "Right: only pairs within a document, only first choices, divided by the number of pairs."
    return judge(answer, tries, lambda choices, documents: within(same(choices), documents).mean(), mistakes, praise)


def check_chance_by_load(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Check `chance_by_load(choices, num_experts)`: from the choices [T, K], best first, how often two tokens drawn
    independently share a first choice: sum p_i^2."""

    def squares(chosen: Tensor) -> Tensor:
        return torch.bincount(chosen.flatten()).double().square().sum()

    tries = [(_routed(2, (40,))[0], 6), (_routed(3, (25,))[0], 6)]
    mistakes = {
        "That is 1 / E, which is right only if the load is even.": lambda choices, experts: 1 / experts,
        "Your shares are those of all choices, not of the first.": lambda x, _: squares(x) / x.numel() ** 2,
        "You added up squared counts, not squared shares.": lambda choices, experts: squares(choices[:, 0]),
    }
    praise = "Right: at least 1 / E, and equal to it only when the load is even."
    return judge(answer, tries, lambda choices, experts: squares(choices[:, 0]) / len(choices) ** 2, mistakes, praise)


def _routed(seed: int, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Choices [T, 2] of six unevenly liked experts, and the document of each token."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(lengths), 6, generator=generator) + torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0, -3.0])
    return logits.topk(2).indices, torch.repeat_interleave(torch.tensor(lengths))


def check_mutual_information(answer: Callable[[Labels, Labels], float]) -> str:
    """Check `information(labels, experts)`: what the label of a token tells about its expert, in nats, from two arrays
    [T] of whole numbers that need not begin at 0."""
    rng = np.random.default_rng(0)
    labels = rng.choice([2, 3, 700], size=60, p=[0.6, 0.3, 0.1])
    related = np.where(rng.random(60) < 0.7, labels % 4, rng.integers(4, size=60))
    unrelated = rng.permutation(np.arange(60) % 5) + 1
    tries = [(labels, related), (labels, unrelated)]
    mistakes = {
        "These are bits. The task asks for nats.": lambda *inputs: _information(*inputs) / np.log(2),
        "This is what is still unknown once the label is told, H(expert | label). Information is what was gained: "
        "H(expert) minus this.": lambda x, experts: _information(experts, experts) - _information(x, experts),
        "Not a number: some label never meets some expert, and log 0 has no value.": lambda labels, experts: np.nan,
    }
    praise = "Right: the information in nats, also where a pair never occurs."
    return judge(answer, tries, _information, mistakes, praise)


def check_information_by_chance(answer: Callable[[Labels, Labels, Labels, int], float]) -> str:
    """Check `chance(labels, experts, documents, shuffles)`: the mean of the information, in nats, when the labels are
    dealt out anew among the documents, `shuffles` times. All tokens of a document [T] share a label. The answer is
    random: it must be within 5 standard errors of the mean over all ways to deal, which are few here."""
    for seed in (57, 38):  # texts in which the median over all dealings is far from their mean
        text = labels, experts, documents = _few_documents(seed)
        _, first, number = np.unique(documents, return_index=True, return_inverse=True)
        ways = sorted(set(permutations(labels[first].tolist())))  # to deal the labels; all are alike to a shuffle
        possible = np.array([_information(np.array(way)[number], experts) for way in ways])
        found = numbers(answer(*(column.copy() for column in text), 1000))
        if found.numel() == 1 and abs(possible - found.item()).min() < 1e-7:
            raise WrongAnswer(
                "This is what one order of the labels gives. The task asks for the mean of many, each of them another: "
                "is every shuffle used, and does the loop not begin with the same seed every time?"
            )
        rng = np.random.default_rng(1)
        of_tokens = np.mean([_information(rng.permutation(labels), experts) for _ in range(200)])
        hint = (
            "You shuffled the tokens. Then no document is left whole, and chance looks smaller than it is: the tokens "
            "of a document resemble each other for many reasons. Give each document one label."
        )
        compare(found, possible.mean(), {hint: of_tokens}, atol=5 * possible.std() / 1000**0.5)
    return "Right: this is how much a router that ignores the label would seem to know."


def _few_documents(seed: int) -> tuple[Labels, Labels, Labels]:
    """Labels, experts and documents of a short text: seven documents, four with one label, two and one with others."""
    rng = np.random.default_rng([seed, 1])
    number = np.repeat(np.arange(7), rng.integers(10, 40, size=7))
    labels = rng.permutation([3, 3, 3, 3, 0, 0, 12])[number]
    favourite = rng.permutation([0, 0, 0, 0, 1, 2, 3])[number]
    experts = np.where(rng.random(len(number)) < 0.7, favourite, rng.integers(4, size=len(number)))
    return labels, experts, rng.permutation(7)[number] + 5


def _information(labels: Labels, experts: Labels) -> float:
    from sklearn.metrics import mutual_info_score

    return mutual_info_score(labels, experts)
