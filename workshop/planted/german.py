"""How a meaning is said in German, with its verbs second in main clauses and last in subordinate ones."""

# ruff: noqa: RUF012 - the tables of a language are constants

import re
from functools import cache

from workshop.planted.grammar import Clause, Language, Lexeme, Phrase, Verb, relativised


class German(Language):
    """Verb second in main clauses, verb last in subordinate ones."""

    name = "german"
    words = {
        "and": "und", "then": "und", "but": ", aber", "while": ", während", "also": " und", "because": "weil",
        "asker": "wer", "it is": "es ist", "it was": "es war", "than": "als", "very": "sehr",
        "with": "mit", "about": "von",
    }  # fmt: skip
    be = {"present": ("ist", "sind"), "past": ("war", "waren")}
    have = ("hat", "haben")
    will = ("wird", "werden")
    modals = {
        "must present": ("muss", "müssen"), "must past": ("musste", "mussten"),
        "can present": ("kann", "können"), "can past": ("konnte", "konnten"),
        "want present": ("will", "wollen"), "want past": ("wollte", "wollten"),
    }  # fmt: skip
    the = {
        "nominative": {"m": "der", "f": "die", "n": "das", "plural": "die"},
        "accusative": {"m": "den", "f": "die", "n": "das", "plural": "die"},
        "dative": {"m": "dem", "f": "der", "n": "dem", "plural": "den"},
    }
    strong = {
        "nominative": {"m": "er", "f": "e", "n": "es", "plural": "e"},
        "accusative": {"m": "en", "f": "e", "n": "es", "plural": "e"},
        "dative": {"m": "em", "f": "er", "n": "em", "plural": "en"},
    }

    def tidy(self, text: str) -> str:
        return re.sub(r"\bvon dem ", "vom ", text)

    def gender(self, noun: Lexeme) -> str:
        return noun.forms["german"][0].replace("w", "m")

    def noun_phrase(self, phrase: Phrase, case: str = "nominative") -> str:
        declension, singular, *given = phrase.noun.forms["german"]
        key = "plural" if phrase.plural else self.gender(phrase.noun)
        strong = self.strong[case][key]
        weak = "e" if not phrase.plural and (case == "nominative" or (case == "accusative" and key != "m")) else "en"
        noun = singular
        if phrase.plural:
            noun = given[0] if given else singular
            if case == "dative" and noun[-1] not in "ns":
                noun += "n"
        elif declension == "w" and case != "nominative":
            noun = given[0]
        if phrase.article == "the":
            article, ending = self.the[case][key], weak
        elif phrase.article == "this":
            article, ending = f"dies{strong}", weak
        elif phrase.article == "several":
            article, ending = f"mehrere{'n' if case == 'dative' else ''}", strong
        elif phrase.article == "count":
            article, ending = self.quantity(phrase.count), strong
        elif phrase.plural or phrase.noun.is_mass:
            article, ending = "", strong
        else:
            uninflected = (key == "n" and case != "dative") or (key == "m" and case == "nominative")
            article, ending = "ein" if uninflected else f"ein{strong}", "en" if case == "dative" else strong
        adjective = german_stem(phrase.adjective.forms["german"][0]) + ending if phrase.adjective else ""
        return " ".join(filter(None, [article, adjective, noun]))

    @cache  # noqa: B019 - a grammar lives as long as the program
    def verb(self, lexeme: Lexeme) -> Verb:
        infinitive, *given = lexeme.forms["german"]
        moves, infinitive = infinitive.startswith("+"), infinitive.removeprefix("+")
        prefix, _, base = infinitive.rpartition("|")
        if given:
            singular, past, participle = given
        else:
            stem = base[:-2] if base.endswith("en") else base[:-1]
            singular = stem + ("et" if re.search(r"[td]$|[^aeiourlmnh][mn]$", stem) else "t")
            past = singular + "e"
            inseparable = re.match(r"(be|ver|er|ent|zer|emp|über)", stem) or stem.endswith("ier")
            participle = singular if inseparable else "ge" + singular
        past_plural = past + ("n" if past.endswith("e") else "en")
        pasts = (past, past_plural)
        return Verb(prefix + base, (singular, base), pasts, pasts, self.will, prefix + participle, moves, prefix)

    def parts(self, clause: Clause, plural: bool, front: str = "") -> tuple[str, str, str]:
        """(finite verb, middle field, what closes the verbal bracket) of a clause."""
        verb, close = self.verb(clause.verb), ""
        if clause.modal:
            finite, close = self.modals[f"{clause.modal} {clause.tense}"][plural], verb.infinitive
        elif clause.tense == "perfect":
            finite, close = (self.be["present"] if verb.moves else self.have)[plural], verb.participle
        elif clause.tense == "future":
            finite, close = self.will[plural], verb.infinitive
        else:
            finite, close = getattr(verb, clause.tense)[plural], verb.prefix
        objects = [self.objects(clause)]
        already = "schon" if clause.tense == "perfect" else ""
        definite = clause.objects and clause.objects[0].article in ("the", "this")
        middle = [
            clause.time["german"] if clause.time and front != "time" else "",
            self.noun_phrase(clause.recipient, "dative") if clause.recipient else "",
            *([*objects, already] if definite else [already, *objects]),
            self.prepositional(*clause.companion) if clause.companion else "",
            "nicht" if clause.negated else "",
            clause.place["german"] if clause.place and front != "place" else "",
        ]
        return finite, " ".join(filter(None, middle)), close

    def predicate(self, clause: Clause, plural: bool) -> str:
        return " ".join(filter(None, self.parts(clause, plural, clause.front)))

    def main(self, clause: Clause) -> str:
        subject = self.noun_phrase(clause.subject)
        finite, middle, close = self.parts(clause, clause.subject.plural, clause.front)
        if clause.front:
            return " ".join(filter(None, [getattr(clause, clause.front)["german"], finite, subject, middle, close]))
        return " ".join(filter(None, [subject, finite, middle, close]))

    def last(self, clause: Clause) -> str:
        """The predicate with its finite verb last."""
        finite, middle, close = self.parts(clause, clause.subject.plural, clause.front)
        glue = "" if close and close == self.verb(clause.verb).prefix else " "
        return f"{middle} {close}{glue}{finite}".strip().replace("  ", " ")

    def subordinate(self, clause: Clause) -> str:
        return f"{self.noun_phrase(clause.subject)} {self.last(clause)}"

    def attribute(self, subject: Phrase, adjective: Lexeme, tense: str, very: bool = False) -> str:
        degree = "sehr " if very else ""
        finite, close = self.copula_parts(tense, subject.plural)
        return f"{finite} {degree}{adjective.forms['german'][0]}{close}"

    def copula_parts(self, tense: str, plural: bool) -> tuple[str, str]:
        return (self.will[plural], " sein") if tense == "future" else (self.be[tense][plural], "")

    def pronoun(self, phrase: Phrase) -> str:
        return "sie" if phrase.plural else {"m": "er", "f": "sie", "n": "es"}[self.gender(phrase.noun)]

    def both(self, subject: Phrase, adjective: Lexeme, other: Lexeme, tense: str) -> str:
        finite, close = self.copula_parts(tense, subject.plural)
        both = f"{adjective.forms['german'][0]} und {other.forms['german'][0]}"
        return f"{self.noun_phrase(subject)} {finite} {both}{close}."

    def there(self, phrase: Phrase, place: dict[str, str], tense: str, place_first: bool) -> str:
        finite, close = {"present": ("gibt", ""), "past": ("gab", ""), "future": ("wird", " geben")}[tense]
        thing, where = self.noun_phrase(phrase, "accusative"), place["german"]
        return f"{where} {finite} es {thing}{close}." if place_first else f"es {finite} {where} {thing}{close}."

    def twice(self, clause: Clause, second: Clause, then: bool) -> str:
        finite, middle, close = self.parts(second, second.subject.plural)
        then_word = "dann" if then else ""
        return f"{self.main(clause)} und {' '.join(filter(None, [finite, then_word, middle, close]))}."

    def joined(self, clause: Clause, second: Clause, link: str) -> str:
        say = self.subordinate if link == "while" else self.main
        return f"{self.main(clause)}{self.words[link]} {say(second)}."

    def because(self, clause: Clause, about: Phrase, adjective: Lexeme, tense: str) -> str:
        finite, close = self.copula_parts(tense, about.plural)
        reason = f"{self.pronoun(about)} {adjective.forms['german'][0]}{close} {finite}"
        return f"{self.main(clause)}, weil {reason}."

    def relative_pronoun(self, phrase: Phrase, case: str) -> str:
        return self.the[case]["plural" if phrase.plural else self.gender(phrase.noun)]

    def who(self, clause: Clause, adjective: Lexeme, tense: str) -> str:
        subject = clause.subject
        relative = f"{self.relative_pronoun(subject, 'nominative')} {self.last(clause)}"
        return f"{self.noun_phrase(subject)}, {relative}, {self.attribute(subject, adjective, tense)}."

    def which(self, clause: Clause, adjective: Lexeme, tense: str) -> str:
        (thing,) = clause.objects
        pronoun = self.relative_pronoun(thing, "accusative")
        relative = f"{pronoun} {self.subordinate(relativised(clause))}"
        return f"{self.noun_phrase(thing)}, {relative}, {self.attribute(thing, adjective, tense)}."

    def comparison(self, subject: Phrase, other: Phrase, adjective: Lexeme, tense: str) -> str:
        positive, *given = adjective.forms["german"]
        comparative = given[0] if given else german_stem(positive) + "er"
        finite, close = self.copula_parts(tense, subject.plural)
        return f"{self.noun_phrase(subject)} {finite} {comparative}{close} als {self.noun_phrase(other)}."

    def before(self, clause: Clause, later: Clause) -> str:
        finite, middle, close = self.parts(clause, clause.subject.plural)
        rest = " ".join(filter(None, [finite, self.pronoun(clause.subject), middle, close]))
        return f"bevor {self.subordinate(later)}, {rest}."


def german_stem(adjective: str) -> str:
    """The adjective before an ending: dunkel, dunkl-; teuer, teur-; müde, müd-."""
    return re.sub(r"e(l)$|(?<=u)e(r)$|e$", lambda match: match[1] or match[2] or "", adjective)
