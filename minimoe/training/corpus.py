"""Corpora: text of several domains as streams of token ids, split for good into text to train on and text held out.

planted.py, real.py and folder.py give the documents of the three corpora. Here all three are the same thing: for each
domain and split one stream of ids, `<|endoftext|>` before every document and after the last. B batch, S sequence.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from minimoe.atomic import replace_atomically
from minimoe.data_files import cache_folder
from minimoe.model.config import require
from minimoe.progress import progress_bar
from minimoe.training import planted, real
from minimoe.training.documents import HELD_OUT, SPLITS, TRAIN, Document, digest
from minimoe.training.folder import read_folder
from minimoe.training.tokenizer import END_OF_TEXT_ID, load_tokenizer

FEWEST_TOKENS = 64  # that a domain must have in each split
CODE = ("corpus.py", "documents.py", "real.py")  # what the cache holds was made by these files as they are

Documents = dict[str, list[Document]]  # by domain
Streams = dict[str, dict[str, np.ndarray]]  # domain -> split -> ids, uint16


class Batch(NamedTuple):
    """What one training step sees. The labels are the ids themselves: the model shifts them."""

    input_ids: torch.Tensor  # [B, S] int64
    domains: torch.Tensor  # [B] int64, index into Corpus.domains


class Corpus:
    """Token streams by domain. Make one with `planted`, `real` or `from_folder`.

    domains: the names, in order. vocab_size: 1,024. tokenizer: a `tokenizers.Tokenizer`.
    sha256: of the names, text and splits of all domains in order; the tokenizer has no part in it.
    digests: the same for each domain. shares: the probability of each domain in a batch.
    """

    def __init__(self, streams: Streams, digests: dict[str, str], tokenizer: Tokenizer):
        self.domains = tuple(streams)
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        self.digests = digests
        self.sha256 = hashlib.sha256(json.dumps(list(digests.items())).encode()).hexdigest()
        self._streams = streams
        for splits in streams.values():
            for ids in splits.values():
                ids.flags.writeable = False
        self.shares = _shares([len(splits[TRAIN]) for splits in streams.values()])

    @classmethod
    def planted(cls, *, documents_per_domain: int = 1000) -> "Corpus":
        """Generated text with known labels: four languages x four topics, code and arithmetic; see training/planted.py.

        Every tenth document is held out.
        Raises ValueError for fewer than 10 documents, which would leave none held out, or more than 1,000.
        """
        fits, wanted = 10 <= documents_per_domain <= 1000, "10 to 1000, as many as data/corpora/planted holds"
        require(fits, "documents_per_domain", documents_per_domain, wanted)
        found = {domain: planted.planted_documents(domain, documents_per_domain) for domain in planted.DOMAINS}
        return cls._prepare(f"planted {_digests(found)}", lambda: found)

    @classmethod
    def real(cls, *, domains: Sequence[str] | None = None) -> "Corpus":
        """Code, prose, French, Chinese, English and arithmetic out of installed packages; see `training/real.py`.

        domains: some of these, or None for all whose packages are installed; a warning names the rest and how to
        get them. Another warning tells when the installed versions give other text than the tested ones.
        Raises ValueError for an unknown domain, ModuleNotFoundError for a named one whose package is missing.
        """
        wanted = real.available_domains(domains)
        corpus = cls._prepare(f"real {wanted} {real.sources_sha256(wanted)}", lambda: real.assemble(wanted))
        real.check_against_manifest(corpus.digests)
        return corpus

    @classmethod
    def from_folder(cls, path: str | Path) -> "Corpus":
        """Your own text files (UTF-8): one domain for each subfolder, with all that lies below it; files directly in
        the folder make one more, named after the folder.

        A document is a file; in a domain of fewer than 20 files, it is a run of neighbouring paragraphs. A tenth of
        the documents is held out. Hidden files, links to folders and empty files are ignored; binary ones are too,
        with a warning.
        Raises FileNotFoundError, PermissionError, or ValueError when the path is a file or holds too little text.
        """
        found = read_folder(Path(path))
        return cls._prepare(f"folder {_digests(found)}", lambda: found)

    @classmethod
    def _prepare(cls, recipe: str, assemble: Callable[[], Documents]) -> "Corpus":
        """Assemble and tokenize, or take what an earlier call with the same recipe, tokenizer and code left."""
        tokenizer = load_tokenizer()
        code = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in CODE)
        key = hashlib.sha256("\0".join((recipe, tokenizer.to_str(), code)).encode()).hexdigest()
        cache = cache_folder() / f"corpus-{key[:32]}.npz"
        kept = _read_cache(cache)
        if kept is None:
            documents = assemble()
            kept = _tokenize(documents, tokenizer), _digests(documents)
            _write_cache(cache, *kept)
        return cls(*kept, tokenizer)

    def batch(self, split: str, *, batch_size: int, seq_len: int, seed: int, step: int) -> Batch:
        """Windows of `seq_len` tokens, each from the stream of a domain drawn by `shares`, starting anywhere in it.

        Stateless: the same seed and step (both >= 0) give the same batch on every machine, so a resumed run needs no
        record of where it was. Returns input_ids [B, S] and domains [B].
        Raises ValueError when a domain's stream is shorter than `seq_len`.
        """
        streams = [self.tokens(domain, split) for domain in self.domains]
        shortest, domain = min((len(stream), domain) for stream, domain in zip(streams, self.domains, strict=True))
        wanted = f"1 to {shortest}, the number of tokens that domain {domain!r} has in split {split!r}"
        require(0 < seq_len <= shortest, "seq_len", seq_len, wanted)
        # raw 64-bit words: numpy promises them to stay the same, but not what its distributions make of them
        words = np.random.PCG64([seed, step, SPLITS.index(split)]).random_raw(2 * batch_size)
        draws, places = words[:batch_size] / 2.0**64, words[batch_size:]
        domains = np.searchsorted(np.cumsum(self.shares)[:-1], draws, side="right")
        windows = np.empty((batch_size, seq_len), dtype=np.int64)
        for row, (domain, place) in enumerate(zip(domains, places, strict=True)):
            start = int(place) % (len(streams[domain]) - seq_len + 1)
            windows[row] = streams[domain][start : start + seq_len]
        return Batch(torch.from_numpy(windows), torch.from_numpy(domains.astype(np.int64)))

    def tokens(self, domain: str, split: str) -> np.ndarray:
        """The stream of a domain's split: ids, uint16, read-only. Raises ValueError for an unknown domain or split."""
        require(domain in self._streams, "domain", domain, f"one of {list(self.domains)}")
        require(split in SPLITS, "split", split, f"one of {list(SPLITS)}")
        return self._streams[domain][split]

    def documents(self, domain: str, split: str = HELD_OUT) -> list[str]:
        """The text of a domain's documents, in the order of the stream."""
        stream = self.tokens(domain, split)
        ends = np.flatnonzero(stream == END_OF_TEXT_ID)
        return [self.decode(stream[start + 1 : end]) for start, end in pairwise(ends)]

    def encode(self, text: str) -> list[int]:
        """Token ids of any text; `decode` gives it back unchanged."""
        return self.tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int] | np.ndarray | torch.Tensor) -> str:
        """The text of token ids; bytes that are no UTF-8, as at a cut, come out as U+FFFD."""
        return self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def __repr__(self) -> str:
        rows = (
            f"  {domain:20} {len(splits[TRAIN]):10,} train {len(splits[HELD_OUT]):9,} held out   share {share:.3f}"
            for (domain, splits), share in zip(self._streams.items(), self.shares, strict=True)
        )
        return "\n".join((f"Corpus of {len(self.domains)} domains, in tokens; sha256 {self.sha256[:16]}", *rows))


def _shares(sizes: list[int]) -> np.ndarray:
    """Probabilities in proportion to size ** 0.3: in proportion to the size, the small domains would hardly be seen;
    all alike, they would be read over and over while most of the large ones goes unread."""
    weights = np.array(sizes, dtype=np.float64) ** 0.3
    return weights / weights.sum()


def _digests(documents: Documents) -> dict[str, str]:
    return {domain: digest(texts) for domain, texts in documents.items()}


def _tokenize(documents: Documents, tokenizer: Tokenizer) -> Streams:
    """Streams of ids. Raises ValueError when a domain has too few tokens in a split."""
    streams = {domain: {} for domain in documents}
    size = sum(len(document.text) for texts in documents.values() for document in texts)
    with progress_bar(total=size, desc="tokenizing", unit="char", unit_scale=True, leave=False) as bar:
        for domain, texts in documents.items():
            for split in SPLITS:
                ids = [END_OF_TEXT_ID]
                for text in (document.text for document in texts if document.split == split):
                    ids += tokenizer.encode(text).ids
                    ids.append(END_OF_TEXT_ID)
                    bar.update(len(text))
                streams[domain][split] = np.array(ids, dtype=np.uint16)
            train, held_out = (len(streams[domain][split]) for split in SPLITS)
            if min(train, held_out) < FEWEST_TOKENS:
                found = f"domain {domain!r} is too small: found {train} tokens to train on and {held_out} held out"
                raise ValueError(f"{found}, wanted at least {FEWEST_TOKENS} of each; add text")
    return streams


def _write_cache(path: Path, streams: Streams, digests: dict[str, str]) -> None:
    """Keep the streams. A folder that cannot be written to costs only the time that the cache would save."""
    numbered = enumerate(streams.values())
    arrays = {f"{index}-{split}": ids for index, splits in numbered for split, ids in splits.items()}
    with suppress(OSError), replace_atomically(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, digests=np.array(json.dumps(digests)), **arrays)


def _read_cache(path: Path) -> tuple[Streams, dict[str, str]] | None:
    """What was kept, or None where there is nothing whole: zip files carry a checksum of each array."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            digests = json.loads(str(file["digests"]))
            streams = [{split: file[f"{index}-{split}"] for split in SPLITS} for index in range(len(digests))]
            return dict(zip(digests, streams, strict=True)), digests
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
