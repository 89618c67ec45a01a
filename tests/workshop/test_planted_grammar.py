"""The planted grammar makes the text that is kept, and that text has true labels, true statements, correct spelling."""

import ast
import contextlib
import gzip
import io
import math
import operator
import re
from collections import Counter
from itertools import product

import pytest

from minimoe.training.planted import DOMAINS, LANGUAGES, TOPICS, document, parallel, texts
from workshop.planted import planted_document
from workshop.planted.words import TOPIC_TABLES

pytestmark = pytest.mark.exact("computes nothing")
PROSE = [domain for domain in DOMAINS if "/" in domain]


def prose(language: str) -> list[str]:
    return [text for topic in TOPICS for text in texts(f"{language}/{topic}")]


# The generator


def test_the_grammar_makes_the_text_that_is_kept():
    assert tuple(TOPIC_TABLES) == TOPICS
    for domain in DOMAINS:
        for index in range(0, 1000, 41):
            assert planted_document(domain, index) == document(domain, index), (domain, index)
        for index in range(0, 20, 3):
            assert planted_document(domain, index, seed=3) == document(domain, index, seed=3), (domain, index)
    assert planted_document("arithmetic", 9999) == document("arithmetic", 9999)


def test_another_seed_or_index_gives_another_document():
    for domain in DOMAINS:
        different = {planted_document(domain, index, seed=seed) for seed in range(4) for index in range(4)}
        assert len(different) == 16, domain


def test_an_unknown_domain_or_index_is_refused():
    with pytest.raises(ValueError, match=r"domain='klingon/kitchen': wanted one of english/kitchen, .*arithmetic"):
        planted_document("klingon/kitchen", 0)
    with pytest.raises(ValueError, match="index=-1"):
        planted_document("code", -1)


# The same meaning in four languages

NUMBER_WORDS = {
    "english": ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
    "french": ["deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf", "dix", "onze", "douze"],
    "german": ["zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn", "elf", "zwölf"],
    "spanish": ["dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve", "diez", "once", "doce"],
}


def quantities(text: str, language: str) -> list[int]:
    values = {word: value for value, word in enumerate(NUMBER_WORDS[language], 2) if value != 9}  # neuf is also new
    words = re.findall(r"\w+", text.lower())
    return sorted(int(word) if word.isdigit() else values[word] for word in words if word.isdigit() or word in values)


def sentences(text: str) -> list[str]:
    return re.findall(r"[^.?]+[.?]", text.strip())


def test_the_four_languages_say_the_same():
    for topic, index in product(TOPICS, range(200)):
        said = parallel(topic, index)
        assert len({tuple(quantities(said[language], language)) for language in LANGUAGES}) == 1, said
        endings = {tuple(sentence[-1] for sentence in sentences(said[language])) for language in LANGUAGES}
        assert len(endings) == 1, said


NOUNS = {
    "kitchen": {"english": "carrots?", "french": "carottes?", "german": "Karotten?", "spanish": "zanahorias?"},
    "weather": {"english": "bridges?", "french": "ponts?", "german": "Brücken?", "spanish": "puentes?"},
    "harbour": {"english": "anchors?", "french": "ancres?", "german": "Ankern?", "spanish": "anclas?"},
    "market": {"english": "candles?", "french": "bougies?", "german": "Kerzen?", "spanish": "velas?"},
}


def test_a_noun_is_said_equally_often_in_every_language():
    for topic, index in product(TOPICS, range(200)):
        said = parallel(topic, index)
        counts = {len(re.findall(rf"\b(?:{noun})\b", said[language])) for language, noun in NOUNS[topic].items()}
        assert len(counts) == 1, said


# True labels


def trigrams(text: str) -> Counter:
    text = text.lower()
    return Counter(text[i : i + 3] for i in range(len(text) - 2))


def naive_bayes_accuracy(labelled: dict[str, list[str]], held_out: dict[str, list[str]]) -> float:
    """Train multinomial naive Bayes on character trigrams; the share of held-out texts it labels right."""
    counts = {label: sum(map(trigrams, docs), Counter()) for label, docs in labelled.items()}
    vocabulary = len(set().union(*counts.values()))
    totals = {label: count.total() + vocabulary for label, count in counts.items()}

    def score(label: str, grams: Counter) -> float:
        return sum(n * math.log((counts[label][gram] + 1) / totals[label]) for gram, n in grams.items())

    right = [
        label == max(counts, key=lambda guess: score(guess, grams))
        for label, docs in held_out.items()
        for grams in map(trigrams, docs)
    ]
    return sum(right) / len(right)


def split(domains: dict[str, list[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    def read(indices: range) -> dict[str, list[str]]:
        return {label: [document(domain, i) for domain in group for i in indices] for label, group in domains.items()}

    return read(range(60)), read(range(900, 940))


def test_languages_can_be_told_apart():
    groups = {language: [f"{language}/{topic}" for topic in TOPICS] for language in LANGUAGES}
    assert naive_bayes_accuracy(*split(groups | {"code": ["code"], "arithmetic": ["arithmetic"]})) > 0.95


def test_topics_can_be_told_apart_within_a_language():
    for language in LANGUAGES:
        domains = {topic: [f"{language}/{topic}"] for topic in TOPICS}
        assert naive_bayes_accuracy(*split(domains)) > 0.90, language


# Variety


def test_there_is_something_to_learn():
    for domain in DOMAINS:
        docs = texts(domain)
        assert len(set(docs)) == len(docs), domain
        text = "".join(docs)
        compressed = len(gzip.compress(text.encode(), 9)) / len(text.encode())
        assert 0.1 < compressed < 0.6, domain  # neither a loop nor noise
        words = Counter(re.findall(r"\w+", text))
        entropy = -sum(n / words.total() * math.log2(n / words.total()) for n in words.values())
        assert entropy > 5, domain
        if domain in PROSE:
            assert 200 < len([word for word in words if not word.isdigit()]) < 1200, domain
            sizes = Counter(len(sentences(doc)) for doc in docs)
            assert min(sizes) >= 4 and max(sizes) <= 18, domain  # a question comes with its answer
            assert max(sizes.values()) < 0.4 * len(docs), domain


# Spelling

WRONG = {
    "english": [r"\ba [aeiou]", r"\ban [^aeiou]", r"\b(a|this|one) \w+s (is|was)\b", r"\bdoes not \w+[^s]s\b"],
    "french": [
        r"\b(de|à) les? ",
        r"\b(le|la|de|ne|que|ce) (?!onze)[aeiouâéèêîôœ]",
        r"\b(le|la|de|que) hu(il|î)",
        r"'(hareng|homard|huit|onze|halle)",
        r"\b[Ii]l y (a|aura|avait) des (petit|gross?|grand|vieux|vieille|beaux|belle|joli|jeune)e?s? ",
        r"\b(vieux|beau) [aeiou]\w+[^sx\W] ",
    ],
    "german": [
        r"\bvon dem\b",
        r"\b(den|dem|einen|einem|diesen|diesem) (Matrose|Nachbar|Hirte|Pilot|Bauer|Tourist)\b",
        r"\b(das|dem|den|ein|einen|diesen) (Kartoffel|Pfanne|Wolke|Kiste|Blume)\b",
        r"[^,] (weil|während) ",
    ],
    "spanish": [
        r"\b(de|a) el ",
        r"\by h?i(?![ae])",
        r"\b(la|una) (agua|ancla)\b",
        r"(ín|ón|án|én)es\b",
        r"\b(los|las|unos|unas|estos|estas|varios|varias) \w+[^s\W\d] ",
        r"(?<!¿)Quién",
    ],
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_spelling(language):
    for text in prose(language):
        assert text.endswith(".\n") and text.count("\n") == 1
        for wrong in [*WRONG[language], "  ", r" [.,]", r"[_*|+~^#]"]:
            assert not re.search(wrong, text), (wrong, text)
        for sentence in sentences(text):
            assert sentence.lstrip(" ¿")[0].isupper() or sentence.lstrip()[0].isdigit(), sentence


SEEN = {
    "english": ["an apple", "some bread", "knives", "does not", "women", "has already"],
    "french": [
        *("du pain", "de l'eau", "aux ", "au ", "qu'il", "n'a pas", "d'éplucher", "cet ", "le hareng", "vieil homme"),
        *("sont arrivé", "de petites ", "fraîches", "l'huile", "qu'elles", "mangeait"),
    ],
    "german": [
        *("dem Matrosen", "vom ", "weil er ", "rührt", "umrühren", "zubereitet", "teure", "dunkle", "bietet"),
        *("frisches Brot", "heißen Kaffee", "kam ", "einem", "mehreren", "Äpfeln", "abtrocknet"),
    ],
    "spanish": [
        *("al ", "del ", "el agua", "el ancla", "¿Quién", "ya ha", "limones", "está", "hay", "sirvió"),
        *("aprendices", "jóvenes", "a un ", "cubierto", "las anclas"),
    ],
}


def test_the_grammar_is_seen_at_work():
    for language, forms in SEEN.items():
        everything = " ".join(prose(language))
        assert [form for form in forms if form not in everything] == [], language


# Arithmetic and code, checked by Python's own parser

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
}
COMPARISONS = {ast.Lt: operator.lt, ast.Gt: operator.gt, ast.Eq: operator.eq}


def value(node: ast.expr) -> float:
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    if isinstance(node, ast.UnaryOp):
        assert isinstance(node.op, ast.USub)
        return -value(node.operand)
    assert isinstance(node, ast.Constant) and isinstance(node.value, int)
    return node.value


def test_arithmetic_is_true():
    seen = Counter()
    for index in range(500):
        lines = document("arithmetic", index).splitlines()
        assert 6 <= len(lines) <= 14
        for line in lines:
            assert re.fullmatch(r"\(?\d+( [-+*/<>=]+ -?\(?\d+\)?)+", line), line
            statement = ast.parse(re.sub(r" = ", " == ", line), mode="eval").body
            (comparison,) = statement.ops
            assert COMPARISONS[type(comparison)](value(statement.left), value(statement.comparators[0])), line
            seen.update(re.findall(r" (\D+?) ", line))
    assert {"+", "-", "*", "//", "/", "=", "<", ">"} <= set(seen)


def test_code_parses_and_runs():
    calls = 0
    for index in range(500):
        text = document("code", index)
        tree = ast.parse(text)
        assert 1 <= sum(isinstance(node, ast.FunctionDef) for node in tree.body) <= 2
        assert text.endswith("\n") and not text.endswith("\n\n")
        namespace: dict[str, object] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(tree, f"code {index}", "exec"), namespace)
        calls += sum(not isinstance(node, ast.FunctionDef) for node in tree.body)
    assert calls > 100
