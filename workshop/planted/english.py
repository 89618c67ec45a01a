"""How a meaning is said in English."""

# ruff: noqa: RUF012 - the tables of a language are constants

import re
from functools import cache

from workshop.planted.grammar import Clause, Language, Lexeme, Phrase, Verb


class English(Language):
    name = "english"
    words = {
        "and": "and", "then": "and then", "but": ", but", "while": " while", "also": " and", "because": "because",
        "who": "who", "which": "that", "asker": "who", "it is": "it is", "it was": "it was", "than": "than",
        "before": "before", "very": "very", "more": "more", "to": "to", "with": "with", "about": "about",
    }  # fmt: skip
    be = {"present": ("is", "are"), "past": ("was", "were"), "future": ("will be", "will be")}
    modals = {
        "must present": ("must", "must"), "must past": ("had to", "had to"),
        "can present": ("can", "can"), "can past": ("could", "could"),
        "want present": ("wants to", "want to"), "want past": ("wanted to", "wanted to"),
    }  # fmt: skip

    def tidy(self, text: str) -> str:
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)

    def gender(self, noun: Lexeme) -> str:
        first, *rest = noun.forms["english"]
        return first if first in ("m", "f") and rest else "n"

    def noun_phrase(self, phrase: Phrase, case: str = "nominative") -> str:
        singular, *given = (form for form in phrase.noun.forms["english"] if form not in ("m", "f"))
        noun = (given[0] if given else english_s(singular)) if phrase.plural else singular
        article = {
            "the": "the",
            "this": "these" if phrase.plural else "this",
            "a": "some" if phrase.plural or phrase.noun.is_mass else "a",
            "several": "several",
        }.get(phrase.article) or self.quantity(phrase.count)
        adjective = f"{phrase.adjective.forms['english'][0]} " if phrase.adjective else ""
        return f"{article} {adjective}{noun}"

    @cache  # noqa: B019 - a grammar lives as long as the program
    def verb(self, lexeme: Lexeme) -> Verb:
        base, *given = lexeme.forms["english"]
        head, gap, tail = base.partition("_")
        tail = gap + tail
        if given:
            past, participle = given[:2]
        else:
            stem = head[:-1] + "i" if re.search(r"[^aeiou]y$", head) else head.removesuffix("e")
            past = participle = f"{stem}ed{tail}"
        return Verb(
            base,
            (english_s(head) + tail, base),
            (past, past),
            (past, past),
            (f"will {base}",) * 2,
            participle,
        )

    def gerund(self, clause: Clause) -> str:
        head, gap, tail = clause.verb.forms["english"][0].partition("_")
        given = clause.verb.forms["english"][3:]
        return given[0] if given else head.removesuffix("e") + "ing" + gap + tail

    def verb_group(self, clause: Clause, plural: bool) -> str:
        verb = self.verb(clause.verb)
        if clause.modal:
            return f"{self.modals[f'{clause.modal} {clause.tense}'][plural]} {verb.infinitive}"
        if clause.negated:
            auxiliary = {"present": "do" if plural else "does", "past": "did", "future": "will"}[clause.tense]
            return f"{auxiliary} not {verb.infinitive}"
        if clause.tense == "perfect":
            return f"{'have' if plural else 'has'} already {verb.participle}"
        return getattr(verb, clause.tense)[plural]

    def predicative(self, adjective: Lexeme, subject: Phrase) -> str:
        return adjective.forms["english"][0]

    def comparative(self, adjective: Lexeme, subject: Phrase) -> str:
        positive, *comparative = adjective.forms["english"]
        return comparative[0] if comparative else f"more {positive}"

    def pronoun(self, phrase: Phrase) -> str:
        return "they" if phrase.plural else {"m": "he", "f": "she", "n": "it"}[self.gender(phrase.noun)]

    def there_is(self, tense: str, plural: bool) -> str:
        return f"there {self.be[tense][plural]}"


def english_s(word: str) -> str:
    """Add the s of plurals and of the third person: box, boxes; berry, berries."""
    if re.search(r"(s|sh|ch|x|z|[aiou]to)$", word):
        return word + "es"
    return word[:-1] + "ies" if re.search(r"[^aeiou]y$", word) else word + "s"
