"""The planted corpus: text whose labels are a design, not a guess.

Four languages crossed with four topics, plus code and arithmetic. A document of `french/kitchen` and the
document of `german/kitchen` with the same index say the same thing: a *meaning* is drawn from (seed, topic,
index) without looking at the language, and each grammar of `planted_grammar` then says it. So an expert that
follows the language, one that follows the topic and one that follows neither can be told apart against truth.

Every document depends on (seed, domain, index) alone, so any subset in any order gives the same bytes.
Randomness is `random.Random(integer).random()`, whose stream Python keeps fixed across versions.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from typing import TypeVar

from minimoe.training.planted_grammar import GRAMMARS, LANGUAGES, Clause, Lexeme, Phrase, Sentence, read_table
from minimoe.training.planted_words import (
    COUNT_VERB,
    GIVING_VERBS,
    OPPOSITES,
    PEOPLE_ADJECTIVES,
    PEOPLE_NOUNS,
    PEOPLE_VERBS,
    TALK_VERB,
    TIMES,
    TOPIC_TABLES,
)

TOPICS = tuple(TOPIC_TABLES)
DOMAINS = (*(f"{language}/{topic}" for language in LANGUAGES for topic in TOPICS), "code", "arithmetic")

Item = TypeVar("Item")


def document(domain: str, index: int, *, seed: int = 0) -> str:
    """One whole document of `domain` (one of `DOMAINS`), ending in a newline.

    Prose has 4 to 9 sentences on one line (a question counts with its answer), code one or two functions,
    arithmetic 6 to 14 true statements.
    Raises ValueError for an unknown domain or a negative index.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain is {domain!r}; known domains: {', '.join(DOMAINS)}")
    check_index(index)
    if domain == "code":
        return code_document(Dice(seed, domain, index))
    if domain == "arithmetic":
        return arithmetic_document(Dice(seed, domain, index))
    language, topic = domain.split("/")
    return GRAMMARS[language].text(meaning(topic, index, seed))


def parallel(topic: str, index: int, *, seed: int = 0) -> dict[str, str]:
    """The same meaning in each language: `{language: document(f"{language}/{topic}", index, seed=seed)}`.

    Raises ValueError for an unknown topic or a negative index.
    """
    if topic not in TOPICS:
        raise ValueError(f"topic is {topic!r}; known topics: {', '.join(TOPICS)}")
    check_index(index)
    sentences = meaning(topic, index, seed)
    return {language: GRAMMARS[language].text(sentences) for language in LANGUAGES}


def check_index(index: int) -> None:
    if index < 0:
        raise ValueError(f"index is {index}; it must be 0 or more")


class Dice:
    """Random choices that depend on the key alone, whatever the machine and Python version."""

    def __init__(self, *key: object) -> None:
        digest = sha256("\0".join(map(str, key)).encode()).digest()
        self.random = random.Random(int.from_bytes(digest[:8], "big")).random

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def pick(self, items: Sequence[Item]) -> Item:
        return items[int(self.random() * len(items))]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` different items, in random order."""
        pool = list(items)
        return [pool.pop(int(self.random() * len(pool))) for _ in range(count)]


# Meanings


class Topic:
    """The words of one topic, with those that every topic shares."""

    def __init__(self, name: str) -> None:
        nouns, verbs, adjectives, places = TOPIC_TABLES[name]
        self.nouns = read_table(PEOPLE_NOUNS) + read_table(nouns)
        # A topic's own verbs come twice as often.
        self.verbs = read_table(verbs) * 2 + read_table(PEOPLE_VERBS)
        self.transitive = [verb for verb in self.verbs if verb.object]
        words = read_table(PEOPLE_ADJECTIVES) + read_table(adjectives)
        self.adjectives = {noun: [word for word in words if word.subject & noun.subject] for noun in self.nouns}
        self.places = [dict(zip(LANGUAGES, row, strict=True)) for row in read_rows(places)]
        self.things = frozenset().union(*(noun.subject for noun in self.nouns)) - {"p"}
        self.handled = self.things & HANDLED


HANDLED = frozenset("vfktcsgdh")  # the kinds of nouns that people give, show and count


def read_rows(table: str) -> list[list[str]]:
    return [[column.strip() for column in line.split("|")] for line in table.strip().splitlines()]


@cache
def topic_words(name: str) -> Topic:
    return Topic(name)


@cache
def times(tense: str) -> list[dict[str, str]]:
    rows = read_rows(TIMES)
    return [dict(zip(LANGUAGES, row[1:], strict=True)) for row in rows if row[0] == tense]


@cache
def lexemes(table: str) -> list[Lexeme]:
    return read_table(table)


def meaning(topic: str, index: int, seed: int) -> list[Sentence]:
    """What the document says, in no language yet."""
    return Storyteller(topic, Dice(seed, topic, index)).story()


class Storyteller:
    """Draws the sentences of one document from a small cast of its own, in mostly one tense."""

    def __init__(self, topic: str, dice: Dice) -> None:
        self.dice = dice
        self.words = topic_words(topic)
        people = [noun for noun in self.words.nouns if "p" in noun.subject]
        things = [noun for noun in self.words.nouns if "p" not in noun.subject]
        self.cast = dice.sample(people, 3) + dice.sample(things, dice.between(6, 10))
        self.places = dice.sample(self.words.places, 2)
        self.usual_tense = dice.pick(("present", "past", "past", "future"))

    def story(self) -> list[Sentence]:
        return [getattr(self, self.dice.pick(FRAMES))() for _ in range(self.dice.between(4, 9))]

    # Parts of sentences

    def tense(self, *allowed: str) -> str:
        if self.usual_tense in allowed and self.dice.chance(0.7):
            return self.usual_tense
        return self.dice.pick(allowed)

    def noun(self, kinds: frozenset[str], countable: bool) -> Lexeme:
        """A noun of these kinds, from the cast if it has one."""

        def fitting(nouns: list[Lexeme]) -> list[Lexeme]:
            return [noun for noun in nouns if noun.subject & kinds and not (countable and noun.is_mass)]

        return self.dice.pick(fitting(self.cast) or fitting(self.words.nouns))

    def phrase(self, kinds: str | frozenset[str], articles: str) -> Phrase:
        """A noun of these kinds with one of the articles, each as likely as it is often named."""
        noun = self.noun(frozenset(kinds), countable=articles == "count")
        article = self.dice.pick(articles.split())
        if noun.is_mass and article in ("several", "count"):
            article = "the"
        plural = not noun.is_mass and (article in ("several", "count") or self.dice.chance(0.35))
        largest = 5 if "p" in noun.subject else self.dice.pick((12, 60))
        count = self.dice.between(2, largest) if article == "count" else 0
        adjective = self.dice.pick(self.words.adjectives[noun]) if self.dice.chance(0.3) else None
        return Phrase(noun, article, plural, adjective, count)

    def person(self) -> Phrase:
        return self.phrase("p", "the the the the this a several count")

    def somebody_else(self, person: Phrase) -> Phrase:
        return replace(person, noun=self.dice.pick([noun for noun in self.cast[:3] if noun is not person.noun]))

    def adjective(self, phrase: Phrase) -> Lexeme:
        """Another adjective than the one that the phrase has."""
        return self.dice.pick(self.others(phrase.noun, phrase.adjective))

    def others(self, noun: Lexeme, adjective: Lexeme | None) -> list[Lexeme]:
        """The adjectives that a noun can have beside the given one."""
        words = self.words.adjectives[noun]
        return [word for word in words if compatible(word, adjective)] if adjective else words

    def clause(self, tense: str, subject: Phrase | None = None, transitive: bool = False) -> Clause:
        """Subject, verb and object that go together. A given subject must be a person."""
        pool = self.words.transitive if transitive else self.words.verbs
        verb = self.dice.pick([verb for verb in pool if "p" in verb.subject] if subject else pool)
        if subject is None:
            subject = self.person() if "p" in verb.subject else self.phrase(verb.subject, "the the the this")
        if not verb.object:
            return Clause(subject, verb, tense=tense)
        objects = (self.phrase(verb.object, "the the this a a count"),)
        if "p" not in verb.object and self.dice.chance(0.15):
            second = self.phrase(verb.object, "the a count")
            objects += (second,) if second.noun is not objects[0].noun else ()
        if "e" in verb.object:  # people watch the wind, not some wind
            objects = tuple(replace(it, article="the") if it.noun.is_mass else it for it in objects)
        return Clause(subject, verb, objects, tense=tense)

    def setting(self, clause: Clause) -> Clause:
        """Add a time or a place or both; of two, one opens the sentence."""
        dice = self.dice
        time = place = None
        if clause.tense in ("present", "past", "future") and dice.chance(0.45):
            number, words = str(dice.between(2, 12)), dice.pick(times(clause.tense))
            time = {language: words[language].replace("#", number) for language in LANGUAGES}
        if clause.subject.is_person and not clause.negated and dice.chance(0.45):
            place = dice.pick(self.places)
        slots = [name for name, value in (("time", time), ("place", place)) if value]
        front = dice.pick(slots) if len(slots) == 2 or (slots and dice.chance(0.5)) else ""
        return replace(clause, time=time, place=place, front=front)

    # Frames

    def plain(self) -> Sentence:
        tense = self.tense("present", "past", "perfect", "future")
        return Sentence("plain", {"clause": self.setting(self.clause(tense))})

    def denied(self) -> Sentence:
        clause = self.clause(self.tense("present", "past", "future"), transitive=True)
        objects = (replace(clause.objects[0], article=self.dice.pick(("the", "this")), count=0),)
        return Sentence("plain", {"clause": self.setting(replace(clause, objects=objects, negated=True))})

    def modal(self) -> Sentence:
        clause = self.clause(self.tense("present", "past"))
        modal = self.dice.pick(("must", "can", "want")) if clause.subject.is_person else "can"
        place = self.dice.pick(self.places) if clause.subject.is_person and self.dice.chance(0.4) else None
        return Sentence("plain", {"clause": replace(clause, modal=modal, place=place)})

    def given(self) -> Sentence:
        giver, recipient = self.person(), self.phrase("p", "the the this a several")
        if giver.noun is recipient.noun:
            recipient = self.somebody_else(recipient)
        thing = self.phrase(self.words.handled, "the the a a count")
        tense = self.tense("present", "past", "perfect", "future")
        verb = self.dice.pick(lexemes(GIVING_VERBS))
        return Sentence("plain", {"clause": Clause(giver, verb, (thing,), tense=tense, recipient=recipient)})

    def talked(self) -> Sentence:
        about, talk = (TALK_VERB, "about", self.words.things), (TALK_VERB, "with", "p")
        verb, preposition, kinds = self.dice.pick((about, talk, (PEOPLE_VERBS, "with", "p")))
        subject, other = self.person(), self.phrase(kinds, "the the this several count")
        if subject.noun is other.noun:
            other = self.somebody_else(other)
        tense, verb = self.tense("present", "past", "future"), self.dice.pick(lexemes(verb))
        clause = Clause(subject, verb, tense=tense, companion=(preposition, other))
        return Sentence("plain", {"clause": self.setting(clause)})

    def counted(self) -> Sentence:
        first, second = (self.phrase(self.words.handled, "count") for _ in range(2))
        objects = (first, second) if first.noun is not second.noun else (first,)
        tense = self.tense("present", "past", "perfect")
        clause = Clause(self.person(), lexemes(COUNT_VERB)[0], objects, tense=tense)
        return Sentence("plain", {"clause": self.setting(clause)})

    def state(self) -> Sentence:
        subject = self.described()
        parts = {"subject": subject, "adjective": self.adjective(subject), "very": self.dice.chance(0.4)}
        return Sentence("state", parts | {"tense": self.tense("present", "past", "future")})

    def described(self) -> Phrase:
        """Something to say an adjective about: it has none yet."""
        kinds = "p" if self.dice.chance(0.3) else self.words.things
        return replace(self.phrase(kinds, "the the this"), adjective=None)

    def both(self) -> Sentence:
        """Two adjectives that take the same Spanish verb, ser or estar."""
        subject = self.described()
        first = self.adjective(subject)
        estar = takes_estar(first)
        others = [word for word in self.others(subject.noun, first) if takes_estar(word) == estar]
        if not others:
            return self.state()
        parts = {"subject": subject, "adjective": first, "other": self.dice.pick(others)}
        return Sentence("both", parts | {"tense": self.tense("present", "past", "future")})

    def there(self) -> Sentence:
        phrase = self.phrase(self.words.things, "a several count")
        if phrase.noun.is_mass:
            phrase = replace(phrase, article="a")
        parts = {"phrase": phrase, "place": self.dice.pick(self.places), "place_first": self.dice.chance(0.5)}
        return Sentence("there", parts | {"tense": self.tense("present", "past", "future")})

    def twice(self) -> Sentence:
        tense = self.tense("present", "past")
        subject = self.person()
        first, second = self.clause(tense, subject), self.clause(tense, subject)
        if first.verb is second.verb:
            return Sentence("plain", {"clause": first})
        parts = {"clause": self.setting(first), "second": second}
        return Sentence("twice", parts | {"then": self.dice.chance(0.4)})

    def joined(self) -> Sentence:
        link = self.dice.pick(("but", "while", "also"))
        tense = self.tense("present", "past")
        second = self.clause("background" if link == "while" and tense == "past" else tense)
        parts = {"clause": self.setting(self.clause(tense)), "second": second}
        return Sentence("joined", parts | {"link": link})

    def because(self) -> Sentence:
        tense = self.tense("present", "past", "future")
        clause = self.clause(tense, self.person())
        about = clause.subject
        if clause.objects and self.dice.chance(0.5):
            about = clause.objects[-1]
            clause = replace(clause, objects=(about,))
        parts = {"clause": clause, "about": about, "adjective": self.adjective(about)}
        return Sentence("because", parts | {"tense": "past" if tense == "past" else "present"})

    def who(self) -> Sentence:
        clause = self.clause(self.tense("present", "past"), replace(self.phrase("p", "the"), adjective=None))
        parts = {"clause": clause, "adjective": self.adjective(clause.subject), "tense": clause.tense}
        return Sentence("who", parts)

    def which(self) -> Sentence:
        subject = self.phrase("p", "the the this a")
        clause = self.clause(self.tense("present", "past"), subject, transitive=True)
        thing = replace(clause.objects[0], article="the", count=0, adjective=None)
        clause = replace(clause, objects=(thing,))
        parts = {"clause": clause, "adjective": self.adjective(thing), "tense": clause.tense}
        return Sentence("which", parts)

    def question(self) -> Sentence:
        subject = replace(self.phrase("p", "the"), plural=False)
        tense = self.tense("present", "past")
        clause = self.setting(self.clause(tense, subject, transitive=True))
        return Sentence("question", {"clause": clause, "was": tense == "past"})

    def comparison(self) -> Sentence:
        subject = self.described()
        adjective = self.adjective(subject)
        rivals = [noun for noun, words in self.words.adjectives.items() if adjective in words]
        noun = self.dice.pick([noun for noun in rivals if noun is not subject.noun])
        other = Phrase(noun, plural=subject.plural and not noun.is_mass)
        parts = {"subject": subject, "other": other, "adjective": adjective}
        return Sentence("comparison", parts | {"tense": self.tense("present", "past", "future")})

    def before(self) -> Sentence:
        tense = self.tense("present", "past")
        subject = self.phrase("p", "the the this")
        later, clause = self.clause(tense, subject, transitive=True), self.clause(tense, subject)
        if later.verb is clause.verb:
            return Sentence("plain", {"clause": clause})
        return Sentence("before", {"clause": clause, "later": later})


# Each frame is as likely as it is often named.
FRAMES = (
    *("plain", "plain", "plain", "denied", "modal", "given", "talked", "counted", "state", "both", "there"),
    *("there", "twice", "joined", "joined", "because", "who", "which", "question", "comparison", "before"),
)


def takes_estar(adjective: Lexeme) -> bool:
    return adjective.forms["spanish"][0].startswith("~")


def compatible(one: Lexeme, other: Lexeme) -> bool:
    """Whether a thing can be both: big and red, but not wet and dry."""
    return one is not other and {one.forms["english"][0], other.forms["english"][0]} not in OPPOSITES


# Arithmetic


def arithmetic_document(dice: Dice) -> str:
    return "".join(statement(dice) + "\n" for _ in range(dice.between(6, 14)))


def statement(dice: Dice) -> str:
    """One true statement about numbers of up to three digits."""
    kind = dice.pick(("+", "+", "-", "*", "//", "/", "compare", "three"))
    a, b = number(dice), number(dice)
    if kind == "+":
        return f"{a} + {b} = {a + b}"
    if kind == "-":
        return f"{a} - {b} = {a - b}"
    if kind == "*":
        b = dice.between(0, 30)
        return f"{a} * {b} = {a * b}"
    if kind == "//":
        b = dice.between(2, 30)
        return f"{a} // {b} = {a // b}"
    if kind == "/":
        divisor, quotient = dice.between(2, 30), dice.between(1, 33)
        return f"{divisor * quotient} / {divisor} = {quotient}"
    if kind == "compare":
        return f"{a} {'<' if a < b else '>' if a > b else '=='} {b}"
    b, c = dice.between(2, 12), dice.between(2, 12)
    return dice.pick((f"{a} + {b} * {c} = {a + b * c}", f"({a} + {b}) * {c} = {(a + b) * c}"))


def number(dice: Dice) -> int:
    return dice.between(0, dice.pick((9, 99, 999)))


# Code


def split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FUNCTION_VERBS = split("get count find make build check compute collect update scan measure reduce")
FUNCTION_NOUNS = split("total score value items words result size limit price level index table step record")
FUNCTION_NAMES = [f"{verb}_{noun}" for verb in FUNCTION_VERBS for noun in FUNCTION_NOUNS]
NUMBER_NAMES = split("n m a b x y size limit start width height depth")
LIST_NAMES = split("values items numbers data rows scores prices points weights")
TEXT_NAMES = split("text word line name label message title key")
RESULT_NAMES = split("total result out answer found acc best count")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def code_document(dice: Dice) -> str:
    """One or two small functions; each runs, ends and may be followed by a line that uses it."""
    names = dice.sample(FUNCTION_NAMES, 2)
    bodies = (number_function, list_function, text_function, loop_function, choice_function, table_function)
    return "\n\n".join(dice.pick(bodies)(dice, name) for name in names[: dice.between(1, 2)])


def number_of(dice: Dice, names: Sequence[str], depth: int = 2) -> str:
    """An integer expression over `names` that cannot fail: it divides by positive constants alone."""
    left = dice.pick(names)
    if depth > 1 and dice.chance(0.4):
        left = f"({number_of(dice, names, depth - 1)})"
    if dice.chance(0.3):
        return f"{left} {dice.pick(('//', '%'))} {dice.between(2, 12)}"
    right = dice.pick([*(name for name in names if name != left), str(dice.between(1, 20))])
    operator = dice.pick(("+", "+", "-", "*"))
    if dice.chance(0.2):
        return f"abs({left} - {right})" if operator == "-" else f"{dice.pick(('max', 'min'))}({left}, {right})"
    return f"{left} {operator} {right}"


def condition(dice: Dice, name: str) -> str:
    return dice.pick(
        (
            f"{name} {dice.pick(('>', '<', '>=', '<=', '!='))} {dice.between(0, 50)}",
            f"{name} % {dice.between(2, 7)} == {dice.between(0, 1)}",
            f"{dice.between(0, 9)} < {name} < {dice.between(10, 60)}",
        )
    )


def usage(dice: Dice, name: str, *arguments: str) -> str:
    call = f"{name}({', '.join(arguments)})"
    line = dice.pick((f"{dice.pick(RESULT_NAMES)} = {call}", f"print({call})", ""))
    return f"\n\n{line}\n" if line else ""


def some_numbers(dice: Dice) -> str:
    return f"[{', '.join(str(dice.between(0, 60)) for _ in range(dice.between(2, 6)))}]"


def some_word(dice: Dice) -> str:
    return "".join(dice.pick(LETTERS) for _ in range(dice.between(2, 7)))


def number_function(dice: Dice, name: str) -> str:
    a, b = dice.sample(NUMBER_NAMES, 2)
    result = dice.pick(RESULT_NAMES)
    lines = [f"def {name}({a}, {b}):", f"    {result} = {number_of(dice, (a, b))}"]
    for _ in range(dice.between(0, 2)):
        lines.append(f"    {dice.pick((result, a, b))} = {number_of(dice, (a, b, result))}")
    lines.append(f"    return {number_of(dice, (result, a), 1)}")
    return "\n".join(lines) + "\n" + usage(dice, name, str(dice.between(0, 40)), str(dice.between(1, 40)))


def list_function(dice: Dice, name: str) -> str:
    values, result = dice.pick(LIST_NAMES), dice.pick(RESULT_NAMES)
    item = dice.pick(("x", "v", "item", "value"))
    new = number_of(dice, (item,))
    style = dice.pick(("sum", "append", "comprehension", "best"))
    if style == "comprehension":
        kept = f" if {condition(dice, item)}" if dice.chance(0.6) else ""
        wrap = dice.pick(("[{}]", "sum([{}])", "sorted([{}])", "len([{}])"))
        body = [f"    return {wrap.format(f'{new} for {item} in {values}{kept}')}"]
    else:
        start, step = {
            "sum": ("0", f"{result} {dice.pick(('+=', '-='))} {new}"),
            "append": ("[]", f"{result}.append({new})"),
            "best": (str(dice.between(0, 9)), f"{result} = {dice.pick(('max', 'min'))}({result}, {new})"),
        }[style]
        body = [f"    {result} = {start}", f"    for {item} in {values}:"]
        if dice.chance(0.6):
            body += [f"        if {condition(dice, item)}:", f"            {step}"]
        else:
            body += [f"        {step}"]
        body.append(f"    return {result}")
    return "\n".join([f"def {name}({values}):", *body]) + "\n" + usage(dice, name, some_numbers(dice))


def text_function(dice: Dice, name: str) -> str:
    text, result, letter = dice.pick(TEXT_NAMES), dice.pick(RESULT_NAMES), dice.pick(("c", "ch", "letter"))
    chosen = "".join(dice.sample(LETTERS, dice.between(1, 5)))
    style = dice.pick(("count", "replace", "method", "join"))
    if style == "method":
        change = dice.pick(("upper()", "strip()", "title()", f"replace({chosen[0]!r}, {some_word(dice)!r})"))
        extra = dice.pick((f" + {some_word(dice)!r}", "[::-1]", f"[:{dice.between(1, 9)}]", ""))
        body = [f"    {result} = {text}.{change}{extra}"]
    elif style == "join":
        separator = dice.pick((" ", "-", ", ", "_", ""))
        body = [
            f"    {result} = [{letter} for {letter} in {text} if {letter} {dice.pick(('in', 'not in'))} {chosen!r}]",
            f"    {result} = {separator!r}.join({result})",
        ]
    else:
        piece = str(dice.between(1, 5)) if style == "count" else dice.pick((letter, f"{letter}.upper()"))
        start = "0" if style == "count" else "''"
        body = [
            f"    {result} = {start}",
            f"    for {letter} in {text}:",
            f"        if {letter} {dice.pick(('in', 'not in'))} {chosen!r}:",
            f"            {result} += {piece}",
        ]
    body.append(f"    return {result}")
    return "\n".join([f"def {name}({text}):", *body]) + "\n" + usage(dice, name, repr(some_word(dice)))


def loop_function(dice: Dice, name: str) -> str:
    """A loop that ends: over a range, or while a number shrinks."""
    n, result = dice.pick(NUMBER_NAMES), dice.pick(RESULT_NAMES)
    body = [f"    {result} = {dice.between(0, 9)}"]
    if dice.chance(0.5):
        i = dice.pick(("i", "j", "k"))
        bounds = dice.pick((n, f"{dice.between(0, 3)}, {n}", f"0, {n}, {dice.between(2, 4)}"))
        body += [f"    for {i} in range({bounds}):"]
        body += [f"        {result} {dice.pick(('+=', '-='))} {number_of(dice, (i, n))}"]
    else:
        shrink = dice.pick((f"{n} -= {dice.between(1, 5)}", f"{n} //= {dice.between(2, 9)}"))
        body += [f"    while {n} > 0:", f"        {result} += {number_of(dice, (n,))}", f"        {shrink}"]
    body.append(f"    return {result}")
    return "\n".join([f"def {name}({n}):", *body]) + "\n" + usage(dice, name, str(dice.between(0, 40)))


def choice_function(dice: Dice, name: str) -> str:
    n = dice.pick(NUMBER_NAMES)
    answers = dice.sample(TEXT_NAMES + FUNCTION_NOUNS, 3) if dice.chance(0.5) else None
    results = [repr(word) for word in answers] if answers else [number_of(dice, (n,)) for _ in range(3)]
    lines = [f"def {name}({n}):", f"    if {condition(dice, n)}:", f"        return {results[0]}"]
    if dice.chance(0.6):
        lines += [f"    elif {condition(dice, n)}:", f"        return {results[1]}"]
    lines += dice.pick(([f"    return {results[2]}"], ["    else:", f"        return {results[2]}"]))
    return "\n".join(lines) + "\n" + usage(dice, name, str(dice.between(0, 60)))


def table_function(dice: Dice, name: str) -> str:
    values, key = dice.pick(LIST_NAMES), dice.pick("kvx")
    table = dice.pick(("table", "counts", "groups", "seen"))
    group = dice.pick((key, f"{key} % {dice.between(2, 9)}", f"{key} // {dice.between(2, 9)}"))
    lines = [f"def {name}({values}):", f"    {table} = {{}}", f"    for {key} in {values}:"]
    lines.append(f"        {table}[{group}] = {table}.get({group}, 0) + {number_of(dice, (key,), 1)}")
    result = dice.pick((table, f"sorted({table})", f"len({table})", f"max({table}, default=0)"))
    lines.append(f"    return {result}")
    return "\n".join(lines) + "\n" + usage(dice, name, some_numbers(dice))
