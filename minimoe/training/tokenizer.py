"""The tokenizer: byte-level BPE of 1,024 tokens, trained once on both corpora and shipped as `data/tokenizer.json`.

`python -m minimoe.training.rebuild` trains it again.
"""

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minimoe.data_files import data_path
from minimoe.training import planted, real
from minimoe.training.documents import TRAIN, Document, planted_documents

VOCAB_SIZE = 1024
END_OF_TEXT = "<|endoftext|>"  # stands between documents; its id is 0
END_OF_TEXT_ID = 0
SHARE = 100_000  # bytes of text that each group of domains has in training
EXCERPT = 1000  # characters


def load_tokenizer() -> Tokenizer:
    """The shipped tokenizer. Text is never a command: `<|endoftext|>` typed by a person is ordinary characters.

    Raises FileNotFoundError where the file is missing.
    """
    path = data_path("tokenizer.json")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `python -m minimoe.training.rebuild` makes it")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_tokenizer(text: str) -> Tokenizer:
    """The tokenizer in the text of a tokenizer.json, as `model.tokenizer_json` has it.

    Raises ValueError where the text is something else.
    """
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing more particular
        raise ValueError(f"tokenizer.json: not a tokenizer ({error})") from error


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; over bytes as in Radford et al. 2019) of at most `vocab_size` tokens.

    All 256 bytes are in the vocabulary, so that every text has an encoding. Each digit stands alone, so that a number
    is the same tokens wherever it appears.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def training_texts() -> Iterator[str]:
    """The same number of bytes from every domain of the real corpus, and from every language, code and arithmetic of
    the planted one; none of it held out."""
    for documents in real.assemble(real.DOMAINS).values():
        yield from _share(documents, SHARE)
    for group in (*planted.LANGUAGES, "code", "arithmetic"):
        domains = [domain for domain in planted.DOMAINS if domain.split("/")[0] == group]
        for domain in domains:
            yield from _share(planted_documents(domain, 1000), SHARE // len(domains))


def _share(documents: list[Document], size: int) -> list[str]:
    """About `size` bytes of the text to train on, as excerpts evenly spaced over all of it."""
    text = "\n".join(document.text for document in documents if document.split == TRAIN)
    excerpts = [text[start : start + EXCERPT] for start in range(0, len(text), EXCERPT)]
    return excerpts[:: max(1, round(len(text.encode()) / size))]
