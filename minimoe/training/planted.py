"""The planted corpus: generated text whose labels are known and independent, kept in data/corpora/planted.

Four languages crossed with four topics, plus code and arithmetic. A document of `french/kitchen` and the document of
`german/kitchen` with the same index say the same thing. So an expert that follows the language, one that follows the
topic and one that follows neither can be told apart.

A folder there holds what the generator in `workshop/planted` made from one seed, in a file for each domain: seed-0 is
the corpus, of 1,000 documents a domain (10,000 of arithmetic, which the real corpus uses too); seed-3 has 20 documents
a domain that no model was trained on. As in the stream of tokens, `<|endoftext|>` stands between documents.
"""

from functools import cache

from minimoe.data_files import data_path
from minimoe.training.documents import HELD_OUT, TRAIN, Document
from minimoe.training.tokenizer import END_OF_TEXT

LANGUAGES = ("english", "french", "german", "spanish")
TOPICS = ("kitchen", "weather", "harbour", "market")
DOMAINS = (*(f"{language}/{topic}" for language in LANGUAGES for topic in TOPICS), "code", "arithmetic")
SEPARATOR = END_OF_TEXT + "\n"  # a line after each document


def text_file(domain: str, seed: int) -> str:
    """The name of the file that holds a domain's documents, to be given to `data_path`."""
    return f"corpora/planted/seed-{seed}/{domain.replace('/', '-')}.txt"


@cache
def texts(domain: str, *, seed: int = 0) -> tuple[str, ...]:
    """All documents of `domain` (one of `DOMAINS`) that are kept, each ending in a newline.

    Raises ValueError for an unknown domain, FileNotFoundError for a seed of which no text is kept.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain={domain!r}: wanted one of {', '.join(DOMAINS)}")
    content = data_path(text_file(domain, seed)).read_bytes().decode()  # as bytes: no newline may change
    return tuple(content.split(SEPARATOR)[:-1])


def document(domain: str, index: int, *, seed: int = 0) -> str:
    """One document of `domain`. Raises as `texts`, and ValueError for an index of which there is no document."""
    kept = texts(domain, seed=seed)
    if not 0 <= index < len(kept):
        raise ValueError(f"index={index}: wanted 0 to {len(kept) - 1}, the documents that are kept of {domain}")
    return kept[index]


def parallel(topic: str, index: int, *, seed: int = 0) -> dict[str, str]:
    """The same meaning in each language, by language. Raises as `document`."""
    return {language: document(f"{language}/{topic}", index, seed=seed) for language in LANGUAGES}


def planted_documents(domain: str, count: int) -> list[Document]:
    """The first `count` documents of the corpus in `domain`; every tenth is held out.

    The index decides the split, so the same meaning said in two languages is on the same side in both.
    """
    return [Document(text, HELD_OUT if index % 10 == 9 else TRAIN) for index, text in enumerate(texts(domain)[:count])]
