"""Four small grammars that say the same meaning in English, French, German and Spanish.

A meaning is made of `Phrase` (a noun with article, number, adjective), `Clause` (who does what, when, where)
and `Sentence` (the name of a frame and its parts). A `Language` has one method per frame; it knows agreement,
case, word order and tense, and a last `tidy` pass writes contractions and elisions as the spelling wants them.

The frames are written once, in English order, which French and Spanish share; `German` moves its verbs.
"""

# ruff: noqa: RUF012 - the tables of a language are constants

import re
from dataclasses import dataclass, replace
from functools import cache

from minimoe.training.planted_words import NUMBERS

LANGUAGES = ("english", "french", "german", "spanish")


@dataclass(frozen=True, eq=False)
class Lexeme:
    """One line of the vocabulary, equal to itself alone.

    `subject` and `object` hold the kinds that it goes with, `forms[language]` its words.
    """

    subject: frozenset[str]
    object: frozenset[str]
    forms: dict[str, tuple[str, ...]]

    @property
    def is_mass(self) -> bool:
        return self.forms["english"][-1] == "-"


def read_table(table: str) -> list[Lexeme]:
    """Parse `kinds | english | french | german | spanish` lines."""
    lexemes = []
    for line in table.strip().splitlines():
        kinds, *columns = (column.strip() for column in line.split(" | "))
        subject, _, object_ = kinds.partition(">")
        forms = {language: tuple(column.split()) for language, column in zip(LANGUAGES, columns, strict=True)}
        lexemes.append(Lexeme(frozenset(subject), frozenset(object_), forms))
    return lexemes


@dataclass(frozen=True)
class Phrase:
    """A noun phrase. `article` is "the", "a", "this", "several" or "count"; `count` is the quantity for "count"."""

    noun: Lexeme
    article: str = "the"
    plural: bool = False
    adjective: Lexeme | None = None
    count: int = 0

    @property
    def is_person(self) -> bool:
        return "p" in self.noun.subject


@dataclass(frozen=True)
class Clause:
    """Subject, verb and what goes with them.

    `tense` is present, past, background (the past of "while ..."), perfect or future; `companion` is a
    preposition of `Language.words` with its phrase; `preceding` is an object that stands before the clause;
    `time` and `place` give the words in each language; `front` names the one of the two that opens the
    sentence, or is empty.
    """

    subject: Phrase
    verb: Lexeme
    objects: tuple[Phrase, ...] = ()
    preceding: Phrase | None = None
    tense: str = "present"
    modal: str = ""
    negated: bool = False
    recipient: Phrase | None = None
    companion: tuple[str, Phrase] | None = None
    time: dict[str, str] | None = None
    place: dict[str, str] | None = None
    front: str = ""


@dataclass(frozen=True)
class Sentence:
    """The name of a frame, which is a method of `Language`, and the parts that the method takes."""

    frame: str
    parts: dict[str, object]


@dataclass(frozen=True)
class Verb:
    """The forms of a verb that the frames need. Pairs are third person (singular, plural)."""

    infinitive: str
    present: tuple[str, str]
    past: tuple[str, str]
    background: tuple[str, str]
    future: tuple[str, str]
    participle: str
    moves: bool = False  # perfect with être or sein
    prefix: str = ""  # German separable prefix


def relativised(clause: Clause) -> Clause:
    """The clause with its one object moved in front: that the cook washes."""
    return replace(clause, objects=(), preceding=clause.objects[0])


class Language:
    """English word order, which French and Spanish share. Subclasses give words and forms."""

    name: str
    words: dict[str, str]
    be: dict[str, tuple[str, str]]  # tense -> (singular, plural)
    modals: dict[str, tuple[str, str]]  # "must past" -> (singular, plural)

    def text(self, sentences: list[Sentence]) -> str:
        return " ".join(self.say(sentence) for sentence in sentences) + "\n"

    def say(self, sentence: Sentence) -> str:
        raw = getattr(self, sentence.frame)(**sentence.parts)
        spelled = self.tidy(raw).replace("_", " ").replace("*", "")
        first = 1 if spelled[0] == "¿" else 0
        return spelled[:first] + spelled[first].upper() + spelled[first + 1 :]

    def tidy(self, text: str) -> str:
        return text

    # Words

    def quantity(self, count: int) -> str:
        return NUMBERS[self.name][count - 2] if count <= 12 else str(count)

    def gender(self, noun: Lexeme) -> str:
        return noun.forms[self.name][0]

    def noun_phrase(self, phrase: Phrase, case: str = "nominative") -> str:
        raise NotImplementedError

    def verb(self, lexeme: Lexeme) -> Verb:
        raise NotImplementedError

    def predicative(self, adjective: Lexeme, subject: Phrase) -> str:
        raise NotImplementedError

    def comparative(self, adjective: Lexeme, subject: Phrase) -> str:
        return f"{self.words['more']} {self.predicative(adjective, subject)}"

    def verb_group(self, clause: Clause, plural: bool) -> str:
        raise NotImplementedError

    def copula(self, tense: str, plural: bool, adjective: Lexeme) -> str:
        return self.be[tense][plural]

    def pronoun(self, phrase: Phrase) -> str:
        raise NotImplementedError

    def objects(self, clause: Clause) -> str:
        return f" {self.words['and']} ".join(self.noun_phrase(phrase, "accusative") for phrase in clause.objects)

    def prepositional(self, preposition: str, phrase: Phrase) -> str:
        return f"{self.words[preposition]} {self.noun_phrase(phrase, 'dative')}"

    # Clauses

    def predicate(self, clause: Clause, plural: bool) -> str:
        """Everything after the subject, without what stands in front of it."""
        pieces = [self.verb_group(clause, plural), self.objects(clause)]
        if clause.recipient:
            pieces.append(self.prepositional("to", clause.recipient))
        if clause.companion:
            pieces.append(self.prepositional(*clause.companion))
        pieces += [getattr(clause, slot)[self.name] for slot in ("place", "time") if self.trails(clause, slot)]
        return " ".join(filter(None, pieces))

    def trails(self, clause: Clause, slot: str) -> bool:
        return getattr(clause, slot) is not None and clause.front != slot

    def main(self, clause: Clause) -> str:
        front = f"{getattr(clause, clause.front)[self.name]}, " if clause.front else ""
        return f"{front}{self.subordinate(clause)}"

    def subordinate(self, clause: Clause) -> str:
        return f"{self.noun_phrase(clause.subject)} {self.predicate(clause, clause.subject.plural)}"

    def attribute(self, subject: Phrase, adjective: Lexeme, tense: str, very: bool = False) -> str:
        degree = f"{self.words['very']} " if very else ""
        copula = self.copula(tense, subject.plural, adjective)
        return f"{copula} {degree}{self.predicative(adjective, subject)}"

    # Frames

    def plain(self, clause: Clause) -> str:
        return f"{self.main(clause)}."

    def state(self, subject: Phrase, adjective: Lexeme, tense: str, very: bool) -> str:
        return f"{self.noun_phrase(subject)} {self.attribute(subject, adjective, tense, very)}."

    def both(self, subject: Phrase, adjective: Lexeme, other: Lexeme, tense: str) -> str:
        """Two adjectives: big and red."""
        second = self.predicative(other, subject)
        return f"{self.noun_phrase(subject)} {self.attribute(subject, adjective, tense)} {self.words['and']} {second}."

    def there(self, phrase: Phrase, place: dict[str, str], tense: str, place_first: bool) -> str:
        there = f"{self.there_is(tense, phrase.plural)} {self.noun_phrase(phrase, 'accusative')}"
        return f"{place[self.name]}, {there}." if place_first else f"{there} {place[self.name]}."

    def there_is(self, tense: str, plural: bool) -> str:
        raise NotImplementedError

    def twice(self, clause: Clause, second: Clause, then: bool) -> str:
        """One subject, two verbs."""
        link = self.words["then" if then else "and"]
        return f"{self.main(clause)} {link} {self.predicate(second, second.subject.plural)}."

    def joined(self, clause: Clause, second: Clause, link: str) -> str:
        return f"{self.main(clause)}{self.words[link]} {self.subordinate(second)}."

    def because(self, clause: Clause, about: Phrase, adjective: Lexeme, tense: str) -> str:
        reason = f"{self.pronoun(about)} {self.attribute(about, adjective, tense)}".strip()
        return f"{self.main(clause)} {self.words['because']} {reason}."

    def who(self, clause: Clause, adjective: Lexeme, tense: str) -> str:
        """The subject of the relative clause is described."""
        subject = clause.subject
        relative = f"{self.words['who']} {self.predicate(clause, subject.plural)}"
        return f"{self.noun_phrase(subject)} {relative} {self.attribute(subject, adjective, tense)}."

    def which(self, clause: Clause, adjective: Lexeme, tense: str) -> str:
        """The object of the relative clause is described."""
        (thing,) = clause.objects
        relative = f"{self.words['which']} {self.subordinate(relativised(clause))}"
        return f"{self.noun_phrase(thing)} {relative} {self.attribute(thing, adjective, tense)}."

    def question(self, clause: Clause, was: bool) -> str:
        """Who does it? It is the subject, who is singular."""
        asked = self.predicate(replace(clause, front=""), False)
        answer = f"{self.words['it was' if was else 'it is']} {self.noun_phrase(clause.subject)}"
        return f"{self.ask(asked)} {answer[0].upper()}{answer[1:]}."

    def ask(self, predicate: str) -> str:
        return f"{self.words['asker']} {predicate}?"

    def comparison(self, subject: Phrase, other: Phrase, adjective: Lexeme, tense: str) -> str:
        compared = f"{self.copula(tense, subject.plural, adjective)} {self.comparative(adjective, subject)}"
        return f"{self.noun_phrase(subject)} {compared} {self.words['than']} {self.noun_phrase(other)}."

    def before(self, clause: Clause, later: Clause) -> str:
        """One subject: before doing the later thing, it does the first."""
        doing = f"{self.words['before']} {self.gerund(later)} {self.objects(later)}"
        return f"{doing}, {self.subordinate(clause)}."

    def gerund(self, clause: Clause) -> str:
        return self.verb(clause.verb).infinitive


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


GRAMMARS = {grammar.name: grammar() for grammar in (English, French, German, Spanish)}
