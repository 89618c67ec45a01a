"""Make the files in `data/` that follow from the corpora: `python -m workshop.rebuild`.

To be run when the planted grammar, the sources of the real corpus or the tokenizer's recipe have changed: it writes the
planted text, trains the tokenizer on both corpora, and records the sha256 of every domain in the manifest. It needs the
language packs (`pip install 'minimoe[text]'`) and replaces each file whole or not at all.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minimoe.atomic import write_atomically
from minimoe.data_files import data_path
from minimoe.progress import progress_bar
from minimoe.training import planted, real
from minimoe.training.documents import TRAIN, Document, digest
from minimoe.training.tokenizer import END_OF_TEXT, VOCAB_SIZE
from workshop.planted import planted_document

CORPUS_DOCUMENTS, UNSEEN_DOCUMENTS = 1000, 20  # of each planted domain, with seed 0 and with seed 3
SHARE = 100_000  # bytes of text that each group of domains has in the training of the tokenizer
EXCERPT = 1000  # characters
LICENCE = "BSD-3-Clause"  # of every package that the real corpus is read from


# --- the planted text -------------------------------------------------------------------------------------


def rebuild_planted() -> None:
    """Write the documents of the planted corpus, and those that no model was trained on, to data/corpora/planted."""
    for domain in progress_bar(planted.DOMAINS, desc="planting", unit="domain", leave=False):
        whole = real.ARITHMETIC_DOCUMENTS if domain == "arithmetic" else CORPUS_DOCUMENTS
        for seed, count in ((0, whole), (3, UNSEEN_DOCUMENTS)):
            documents = (planted_document(domain, index, seed=seed) for index in range(count))
            text = "".join(document + planted.SEPARATOR for document in documents)
            write_atomically(data_path(planted.text_file(domain, seed)), text.encode())
    planted.texts.cache_clear()


# --- the tokenizer ----------------------------------------------------------------------------------------


def rebuild_tokenizer() -> None:
    """Train on both corpora and write `data/tokenizer.json`."""
    trained = train_tokenizer(training_texts())
    path = data_path("tokenizer.json")
    write_atomically(path, trained.to_str(pretty=True).encode() + b"\n")
    print(f"{path}: {trained.get_vocab_size():,} tokens")


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
            yield from _share(planted.planted_documents(domain, CORPUS_DOCUMENTS), SHARE // len(domains))


def _share(documents: list[Document], size: int) -> list[str]:
    """About `size` bytes of the text to train on, as excerpts evenly spaced over all of it."""
    text = "\n".join(document.text for document in documents if document.split == TRAIN)
    excerpts = [text[start : start + EXCERPT] for start in range(0, len(text), EXCERPT)]
    return excerpts[:: max(1, round(len(text.encode()) / size))]


# --- the manifest -----------------------------------------------------------------------------------------


def rebuild_manifest() -> None:
    """Record both corpora, domain by domain, in `data/corpora/manifest.json`."""
    assembled = real.assemble(real.available_domains(real.DOMAINS))
    domains = {domain: real_entry(domain, documents) for domain, documents in assembled.items()}
    kept = {domain: planted.planted_documents(domain, CORPUS_DOCUMENTS) for domain in planted.DOMAINS}
    manifest = {"domains": domains, "planted": {domain: entry(documents) for domain, documents in kept.items()}}
    path = data_path("corpora/manifest.json")
    write_atomically(path, json.dumps(manifest, indent=2).encode() + b"\n")
    for domain, found in [*domains.items(), *manifest["planted"].items()]:
        print(f"{domain:16} {found['documents']:6,} documents {found['bytes']:12,} bytes  {found['sha256'][:16]}")
    print(path)


def real_entry(domain: str, documents: list[Document]) -> dict[str, Any]:
    """What the manifest says of a domain of the real corpus."""
    packages = [
        {
            "name": package,
            "version": real.installed_version(package),
            "licence": LICENCE,
            "files": len(real.source_files(package)),
        }
        for package in real.PACKAGES[domain]
    ]
    return {"packages": packages, **entry(documents)}


def entry(documents: list[Document]) -> dict[str, Any]:
    """How much text a domain has, and its sha256."""
    return {
        "documents": len(documents),
        "bytes": sum(len(document.text.encode()) for document in documents),
        "sha256": digest(documents),
    }


if __name__ == "__main__":
    rebuild_planted()
    rebuild_tokenizer()
    rebuild_manifest()
