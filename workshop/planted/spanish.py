"""How a meaning is said in Spanish."""

# ruff: noqa: RUF012 - the tables of a language are constants

import re
from functools import cache

from workshop.planted.grammar import Clause, Language, Lexeme, Phrase, Verb


class Spanish(Language):
    name = "spanish"
    words = {
        "and": "y", "then": "y luego", "but": ", pero", "while": " mientras", "also": " y", "because": "porque",
        "who": "que", "which": "que", "it is": "es", "it was": "fue", "than": "que",
        "before": "antes de", "very": "muy", "more": "más", "to": "a", "with": "con", "about": "de",
    }  # fmt: skip
    be = {"present": ("es", "son"), "past": ("era", "eran"), "future": ("será", "serán")}
    be_now = {"present": ("está", "están"), "past": ("estaba", "estaban"), "future": ("estará", "estarán")}
    modals = {
        "must present": ("debe", "deben"), "must past": ("debía", "debían"),
        "can present": ("puede", "pueden"), "can past": ("podía", "podían"),
        "want present": ("quiere", "quieren"), "want past": ("quería", "querían"),
    }  # fmt: skip
    articles = {
        "the": ("el", "la", "los", "las"), "this": ("este", "esta", "estos", "estas"),
        "a": ("un", "una", "unos", "unas"), "several": ("", "", "varios", "varias"),
    }  # fmt: skip

    def tidy(self, text: str) -> str:
        text = re.sub(r"\b(a|de) el ", lambda match: {"a": "al ", "de": "del "}[match[1]], text)
        return re.sub(r"\by (?=h?i(?![ae]))", "e ", text)

    def noun_phrase(self, phrase: Phrase, case: str = "nominative") -> str:
        gender, singular, *given = phrase.noun.forms["spanish"]
        noun = (given[0] if given else spanish_plural(singular)) if phrase.plural else singular
        if phrase.article == "count":
            article = self.quantity(phrase.count)
        elif phrase.article == "a" and phrase.noun.is_mass:
            article = ""
        else:
            feminine = gender == "f" or (gender == "a" and (phrase.plural or phrase.article == "this"))
            article = self.articles[phrase.article][2 * phrase.plural + feminine]
        adjective = self.predicative(phrase.adjective, phrase) if phrase.adjective else ""
        personal = "a" if case == "accusative" and phrase.is_person else ""
        return " ".join(filter(None, [personal, article, noun, adjective]))

    @cache  # noqa: B019 - a grammar lives as long as the program
    def verb(self, lexeme: Lexeme) -> Verb:
        infinitive, *given = lexeme.forms["spanish"]
        stem, is_ar = infinitive[:-2], infinitive.endswith("ar")
        endings = ("a", "ó", "aron", "ado") if is_ar else ("e", "ió", "ieron", "ido")
        forms = [stem + ending for ending in endings]
        for i, form in enumerate(given):
            forms[i] = forms[i] if form == "." else form
        singular, past, past_plural, participle = forms
        background = stem + ("aba" if is_ar else "ía")
        return Verb(
            infinitive, (singular, singular + "n"), (past, past_plural), (background, background + "n"),
            (infinitive + "á", infinitive + "án"), participle,
        )  # fmt: skip

    def verb_group(self, clause: Clause, plural: bool) -> str:
        verb = self.verb(clause.verb)
        if clause.modal:
            return f"{self.modals[f'{clause.modal} {clause.tense}'][plural]} {verb.infinitive}"
        if clause.tense == "perfect":
            return f"ya {'han' if plural else 'ha'} {verb.participle}"
        return "no " * clause.negated + getattr(verb, clause.tense)[plural]

    def copula(self, tense: str, plural: bool, adjective: Lexeme) -> str:
        be = self.be_now if adjective.forms["spanish"][0].startswith("~") else self.be
        return be[tense][plural]

    def predicative(self, adjective: Lexeme, subject: Phrase) -> str:
        masculine, *plural = adjective.forms["spanish"]
        masculine = masculine.removeprefix("~")
        form = masculine
        if self.gender(subject.noun) != "m" and masculine.endswith("o"):
            form = masculine[:-1] + "a"
        if not subject.plural:
            return form
        return plural[0] if plural else spanish_plural(form)

    def pronoun(self, phrase: Phrase) -> str:
        return ""

    def there_is(self, tense: str, plural: bool) -> str:
        return {"present": "hay", "past": "había", "future": "habrá"}[tense]

    def ask(self, predicate: str) -> str:
        return f"¿quién {predicate}?"


def spanish_plural(word: str) -> str:
    if word[-1] in "aeiouáéó":
        return word + "s"
    if word[-1] == "n":  # limón, limones
        return word[:-2] + word[-2].translate(str.maketrans("áéíóú", "aeiou")) + "nes"
    return word[:-1] + "ces" if word.endswith("z") else word + "es"
