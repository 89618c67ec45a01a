"""Make the two files in `data/` that follow from the corpora: `python -m minimoe.training.rebuild`.

To be run when the planted corpus, the sources of the real one or the tokenizer's recipe have changed. It needs the
language packs (`pip install 'minimoe[text]'`) and replaces each file whole or not at all.
"""

import json

from minimoe.atomic import write_atomically
from minimoe.data_files import data_path
from minimoe.training import real, tokenizer


def rebuild_tokenizer() -> None:
    """Train on both corpora and write `data/tokenizer.json`."""
    trained = tokenizer.train_tokenizer(tokenizer.training_texts())
    path = data_path("tokenizer.json")
    write_atomically(path, trained.to_str(pretty=True).encode() + b"\n")
    print(f"{path}: {trained.get_vocab_size():,} tokens")


def rebuild_manifest() -> None:
    """Assemble every domain of the real corpus and write `data/corpora/manifest.json`."""
    assembled = real.assemble(real.available_domains(real.DOMAINS))
    domains = {domain: real.describe(domain, documents) for domain, documents in assembled.items()}
    path = data_path("corpora/manifest.json")
    write_atomically(path, json.dumps({"domains": domains}, indent=2).encode() + b"\n")
    for domain, entry in domains.items():
        print(f"{domain:12} {entry['documents']:6,} documents {entry['bytes']:12,} bytes  {entry['sha256'][:16]}")
    print(path)


if __name__ == "__main__":
    rebuild_tokenizer()
    rebuild_manifest()
