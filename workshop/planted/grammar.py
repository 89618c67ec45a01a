"""What the four small grammars share, which say the same meaning in English, French, German and Spanish.

A meaning is made of `Phrase` (a noun with article, number, adjective), `Clause` (who does what, when, where)
and `Sentence` (the name of a frame and its parts). A `Language` has one method per frame; it knows agreement,
case, word order and tense, and a last `tidy` pass writes contractions and elisions as the spelling wants them.

The frames are written once here, in English order, which French and Spanish share; german.py moves its verbs.
"""

from dataclasses import dataclass, replace

from workshop.planted.words import NUMBERS

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
