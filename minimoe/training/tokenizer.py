"""The tokenizer: byte-level BPE of 1,024 tokens, trained on both corpora by `workshop.rebuild`: data/tokenizer.json."""

from tokenizers import Tokenizer

from minimoe.data_files import data_path

VOCAB_SIZE = 1024
END_OF_TEXT = "<|endoftext|>"  # stands between documents; its id is 0
END_OF_TEXT_ID = 0


def load_tokenizer() -> Tokenizer:
    """The shipped tokenizer. Text is never a command: `<|endoftext|>` typed by a person is ordinary characters.

    Raises FileNotFoundError where the file is missing.
    """
    path = data_path("tokenizer.json")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; `python -m workshop.rebuild` makes it")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_tokenizer(text: str) -> Tokenizer:
    """The tokenizer in the text of a tokenizer.json, as in `model.tokenizer_json`; raises ValueError for other text."""
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing more particular
        raise ValueError(f"tokenizer.json: not a tokenizer ({error})") from error
