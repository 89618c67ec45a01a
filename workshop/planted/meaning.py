"""What a planted document says, in no language yet: sentences drawn from (seed, topic, index)."""

from dataclasses import replace
from functools import cache

from workshop.planted.dice import Dice
from workshop.planted.grammar import LANGUAGES, Clause, Lexeme, Phrase, Sentence, read_table
from workshop.planted.words import (
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
