"""The generator of the planted corpus: text whose labels are a design, not a guess.

Four languages crossed with four topics, plus code and arithmetic. A document of `french/kitchen` and the document of
`german/kitchen` with the same index say the same thing: a *meaning* is drawn from (seed, topic, index) without looking
at the language, and each grammar then says it. So an expert that follows the language, one that follows the topic and
one that follows neither can be told apart against truth.

Every document depends on (seed, domain, index) alone. What the course uses of them is kept as text in
data/corpora/planted, which `python -m workshop.rebuild` writes and `minimoe.training.planted` reads.
"""

from minimoe.training.planted import DOMAINS
from workshop.planted.arithmetic import arithmetic_document
from workshop.planted.dice import Dice
from workshop.planted.english import English
from workshop.planted.french import French
from workshop.planted.german import German
from workshop.planted.meaning import meaning
from workshop.planted.programs import code_document
from workshop.planted.spanish import Spanish

GRAMMARS = {grammar.name: grammar() for grammar in (English, French, German, Spanish)}


def planted_document(domain: str, index: int, *, seed: int = 0) -> str:
    """One whole document of `domain` (one of `minimoe.training.planted.DOMAINS`), ending in a newline.

    Prose has 4 to 9 sentences on one line (a question counts with its answer), code one or two functions,
    arithmetic 6 to 14 true statements.
    Raises ValueError for an unknown domain or a negative index.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain={domain!r}: wanted one of {', '.join(DOMAINS)}")
    if index < 0:
        raise ValueError(f"index={index}: wanted at least 0")
    if domain == "code":
        return code_document(Dice(seed, domain, index))
    if domain == "arithmetic":
        return arithmetic_document(Dice(seed, domain, index))
    language, topic = domain.split("/")
    return GRAMMARS[language].text(meaning(topic, index, seed))
