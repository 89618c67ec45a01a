"""The checks of notebooks 04 to 06 accept every right answer and name each known mistake."""

from collections import Counter
from fractions import Fraction
from itertools import groupby, pairwise
from math import log

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

from minimoe.course import checks
from minimoe.course.checks import WrongAnswer
from minimoe.course.cost import training_flop


def embedding(config):
    return config.vocab_size * config.hidden_size


def flop_from_the_count(config, tokens):
    looked_up = 0 if config.tie_word_embeddings else embedding(config)
    return np.array([6.0 * tokens * (config.num_parameters(active=True) - looked_up)])


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


def flop_of_matrices(config, tokens, without=None):
    return 6 * tokens * sum(size for name, size in matrices(config).items() if name != without)


def flop_of_all_experts(config, tokens):
    return flop_from_the_count(config, tokens) + 6 * tokens * (
        config.num_parameters() - config.num_parameters(active=True)
    )


def steps_exactly(model, other, steps):
    return steps * training_flop(model, 1) / training_flop(other, 1)


def steps_by_matrices(model, other, steps):
    return torch.tensor(steps * flop_of_matrices(model, 1) / flop_of_matrices(other, 1)).ceil()


def pair_by_pair(choices, documents):
    rows = zip(choices[:, 0].tolist(), documents.tolist(), strict=True)
    pairs = [a == b for (a, d), (b, e) in pairwise(rows) if d == e]
    return Fraction(sum(pairs), len(pairs))


def document_by_document(choices, documents):
    rows = zip(documents.tolist(), choices[:, 0].tolist(), strict=True)
    texts = [[expert for _, expert in text] for _, text in groupby(rows, key=lambda row: row[0])]
    same = sum(a == b for text in texts for a, b in pairwise(text))
    return [same / sum(len(text) - 1 for text in texts)]


def within(documents):
    return documents[1:] == documents[:-1]


def all_pairs(choices, num_experts):
    return (choices[:, None, 0] == choices[:, 0]).double().mean()


def counted(choices, num_experts):
    return sum((count / len(choices)) ** 2 for count in Counter(choices[:, 0].tolist()).values())


def information_by_counting(labels, experts):
    together, of_label, of_expert = Counter(zip(labels, experts, strict=True)), Counter(labels), Counter(experts)
    n = len(labels)
    return sum(c / n * log(c * n / (of_label[x] * of_expert[e])) for (x, e), c in together.items())


def entropy(*columns):
    shares = np.array(list(Counter(zip(*columns, strict=True)).values())) / len(columns[0])
    return -(shares * np.log(shares)).sum()


def information_with_log_of_zero(labels, experts):
    table = np.zeros((1001, 50))
    np.add.at(table, (labels, experts), 1 / len(labels))
    with np.errstate(all="ignore"):
        return (table * np.log(table / (table.sum(1, keepdims=True) * table.sum(0)))).sum()


def dealing(deal, summary=np.mean, seed=3):
    """`chance` in which `deal(labels, label of each document, document of each token, rng)` gives the new labels."""

    def answer(labels, experts, documents, shuffles):
        rng = np.random.default_rng(seed)
        _, first, number = np.unique(documents, return_index=True, return_inverse=True)
        new = [deal(labels, labels[first], number, rng) for _ in range(shuffles)]
        return summary([entropy(each) + entropy(experts) - entropy(each, experts) for each in new])

    return answer


def dealt(labels, known, number, rng):
    return rng.permutation(known)[number]


def dealt_by_dictionary(labels, experts, documents, shuffles):
    """Right, and it spoils what it was given."""
    names = sorted(set(documents))
    label_of = dict(zip(documents, labels, strict=True))
    rng, total = np.random.default_rng(5), 0
    for _ in range(shuffles):
        new = dict(zip(names, rng.permutation([label_of[name] for name in names]), strict=True))
        total += information_by_counting([new[document] for document in documents], experts.tolist())
    labels[:] = experts[:] = documents[:] = 0
    return [total / shuffles]


RIGHT = [
    (checks.check_training_flop, flop_from_the_count),
    (checks.check_training_flop, flop_of_matrices),
    (checks.check_equal_compute_steps, steps_exactly),
    (checks.check_equal_compute_steps, lambda *x: int(steps_exactly(*x))),
    (checks.check_equal_compute_steps, steps_by_matrices),
    (checks.check_repetition, pair_by_pair),
    (checks.check_repetition, document_by_document),
    (checks.check_chance_by_load, all_pairs),
    (checks.check_chance_by_load, counted),
    (checks.check_mutual_information, mutual_info_score),
    (checks.check_mutual_information, information_by_counting),
    (checks.check_information_by_chance, dealt_by_dictionary),
    *[(checks.check_information_by_chance, dealing(dealt, seed=seed)) for seed in range(2)],
]


@pytest.mark.parametrize(("check", "answer"), RIGHT)
def test_right_answers_are_accepted(check, answer):
    assert check(answer).startswith("Right")


WRONG = [
    (checks.check_training_flop, flop_of_all_experts, "all experts"),
    (checks.check_training_flop, lambda c, t: 6 * t * c.num_parameters(active=True), "counted the embedding"),
    (checks.check_training_flop, lambda c, t: flop_of_matrices(c, t, without="head"), "mixture with tied embeddings"),
    (checks.check_training_flop, lambda c, t: flop_of_matrices(c, t) / 3, "forward pass"),
    (
        checks.check_training_flop,
        lambda c, t: flop_of_matrices(c, t, without="router"),
        "your answer for a mixture of many small experts is",
    ),
    (checks.check_equal_compute_steps, lambda a, b, steps: steps_exactly(b, a, steps), "Upside down"),
    (
        checks.check_equal_compute_steps,
        lambda a, b, steps: steps * a.num_parameters() / b.num_parameters(),
        "what the models store",
    ),
    (checks.check_equal_compute_steps, lambda a, b, steps: steps, "as many steps"),
    (
        checks.check_equal_compute_steps,
        lambda a, b, steps: steps * a.num_parameters(active=True) / b.num_parameters(active=True),
        "Not yet",
    ),
    (checks.check_repetition, lambda c, d: (c[1:, 0] == c[:-1, 0]).double().mean(), "first of the next"),
    (checks.check_repetition, lambda c, d: float(pair_by_pair(c, d)) * within(d).sum() / len(d), "number of tokens"),
    (checks.check_repetition, lambda c, d: (c[1:] == c[:-1])[within(d)].double().mean(), "all choices"),
    (checks.check_chance_by_load, lambda c, e: 1 / e, "1 / E"),
    (checks.check_chance_by_load, lambda c, e: all_pairs(c.reshape(-1, 1), e), "all choices"),
    (checks.check_chance_by_load, lambda c, e: torch.bincount(c[:, 0]).square().sum(), "squared counts"),
    (checks.check_mutual_information, lambda x, e: mutual_info_score(x, e) / log(2), "bits"),
    (checks.check_mutual_information, lambda x, e: entropy(x, e) - entropy(x), r"H\(expert \| label\)"),
    (checks.check_mutual_information, information_with_log_of_zero, "log 0"),
    (checks.check_information_by_chance, lambda x, e, d, s: mutual_info_score(x, e), "one order"),
    (checks.check_information_by_chance, dealing(dealt, lambda found: found[0]), "one order"),
    (checks.check_information_by_chance, dealing(dealt, np.median), "one order"),
    (
        checks.check_information_by_chance,
        dealing(lambda x, known, number, rng: rng.permutation(x)),
        "shuffled the tokens",
    ),
    (
        checks.check_information_by_chance,
        dealing(lambda x, known, number, rng: rng.choice(known, len(known))[number]),
        "Not yet",
    ),
    (
        checks.check_information_by_chance,
        dealing(lambda x, known, number, rng: np.roll(x, rng.integers(1, len(x)))),
        "Not yet",
    ),
]


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_wrong_answers_are_rejected_with_a_hint(check, answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check(answer)
