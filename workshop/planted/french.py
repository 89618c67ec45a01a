"""How a meaning is said in French."""

# ruff: noqa: RUF012 - the tables of a language are constants

import re
from functools import cache

from workshop.planted.grammar import Clause, Language, Lexeme, Phrase, Verb


class French(Language):
    name = "french"
    words = {
        "and": "et", "then": "puis", "but": ", mais", "while": " pendant que", "also": " et", "because": "parce que",
        "who": "qui", "which": "que", "it is": "c'est", "it was": "c'était", "than": "que",
        "before": "avant de", "very": "très", "more": "plus", "to": "à", "with": "avec", "about": "de",
    }  # fmt: skip
    be = {"present": ("est", "sont"), "past": ("était", "étaient"), "future": ("sera", "seront")}
    have = ("a", "ont")
    modals = {
        "must present": ("doit", "doivent"), "must past": ("devait", "devaient"),
        "can present": ("peut", "peuvent"), "can past": ("pouvait", "pouvaient"),
        "want present": ("veut", "veulent"), "want past": ("voulait", "voulaient"),
    }  # fmt: skip
    contractions = {"de le": "du", "de les": "des", "à le": "au", "à les": "aux"}

    def tidy(self, text: str) -> str:
        vowel = r"(?=[aeiouhâàéèêîôûœ])"
        text = re.sub(rf"\b(l)[ea] {vowel}", r"\1'", text)
        text = re.sub(r"\b(de|à) (les?) ", lambda match: self.contractions[match[0].strip()] + " ", text)
        text = re.sub(rf"\b(d|n|qu)e {vowel}", r"\1'", text)
        return re.sub(rf"\bce {vowel}", "cet ", text)

    def noun_phrase(self, phrase: Phrase, case: str = "nominative") -> str:
        gender, singular, *given = phrase.noun.forms["french"]
        noun = (given[0] if given else french_plural(singular)) if phrase.plural else singular
        feminine, adjective, before = gender == "f", "", False
        if phrase.adjective:
            before = phrase.adjective.forms["french"][0].startswith("^")
            adjective = self.predicative(phrase.adjective, phrase)
            prevocalic = phrase.adjective.forms["french"][2:]
            if before and prevocalic and not phrase.plural and not feminine and singular[0] in "aeiouhéœ":
                adjective = prevocalic[0]
        if phrase.article == "count":
            article = self.quantity(phrase.count)
        elif phrase.plural:
            some = "de" if before else "des"
            article = {"the": "les", "this": "ces", "several": "plusieurs", "a": some}[phrase.article]
        elif phrase.article == "a" and phrase.noun.is_mass:
            article = "de la" if feminine else "de le"
        else:
            pair = {"the": ("le", "la"), "this": ("ce", "cette"), "a": ("un", "une")}[phrase.article]
            article = pair[feminine]
        return " ".join(filter(None, [article, adjective, noun] if before else [article, noun, adjective]))

    @cache  # noqa: B019 - a grammar lives as long as the program
    def verb(self, lexeme: Lexeme) -> Verb:
        infinitive, *given = lexeme.forms["french"]
        moves, infinitive = infinitive.startswith("+"), infinitive.removeprefix("+")
        if infinitive.endswith("er"):
            singular = given[0] if given else infinitive[:-1]
            plural, participle, future = singular + "nt", infinitive[:-2] + "é", singular + "r"
            stem = re.sub("g$", "ge", re.sub("c$", "ç", infinitive[:-2]))
        else:
            singular, plural, participle = given
            stem, future = re.sub("nn$", "n", plural[:-3]), infinitive.removesuffix("e")
        imperfect = (stem + "ait", stem + "aient")
        return Verb(
            infinitive,
            (singular, plural),
            imperfect,
            imperfect,
            (future + "a", future + "ont"),
            participle,
            moves,
        )

    def verb_group(self, clause: Clause, plural: bool) -> str:
        verb = self.verb(clause.verb)
        if clause.modal:
            return f"{self.modals[f'{clause.modal} {clause.tense}'][plural]} {verb.infinitive}"
        rest = ""
        if clause.tense in ("past", "perfect"):
            finite, rest = (self.be["present"] if verb.moves else self.have)[plural], verb.participle
            # With être it agrees with the subject, else with an object before it: les pommes qu'il a lavées.
            if agrees := clause.subject if verb.moves else clause.preceding:
                rest = french_agree(rest, self.gender(agrees.noun) == "f", agrees.plural)
        else:
            finite = getattr(verb, clause.tense)[plural]
        if clause.negated:
            finite = f"ne {finite} pas"
        already = "déjà" if clause.tense == "perfect" else ""
        return " ".join(filter(None, [finite, already, rest]))

    def predicative(self, adjective: Lexeme, subject: Phrase) -> str:
        masculine, *given = adjective.forms["french"]
        masculine = masculine.removeprefix("^")
        if self.gender(subject.noun) == "f":
            feminine = given[0] if given else masculine.removesuffix("e") + "e"
            return feminine + "s" * subject.plural
        return french_plural(masculine) if subject.plural else masculine

    def pronoun(self, phrase: Phrase) -> str:
        return ("elle" if self.gender(phrase.noun) == "f" else "il") + "s" * phrase.plural

    def there_is(self, tense: str, plural: bool) -> str:
        return {"present": "il y a", "past": "il y avait", "future": "il y aura"}[tense]

    def ask(self, predicate: str) -> str:
        return f"qui {predicate} ?"


def french_plural(word: str) -> str:
    if word[-1] in "sxz":
        return word
    if word.endswith("au"):
        return word + "x"
    return word[:-1] + "ux" if word.endswith("al") else word + "s"


def french_agree(participle: str, feminine: bool, plural: bool) -> str:
    form = participle + "e" * feminine
    return form if not plural or form.endswith("s") else form + "s"
