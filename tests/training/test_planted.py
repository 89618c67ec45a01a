"""The planted text as it is kept: the bytes of the manifest, one split for all languages, seen and unseen apart."""

import json

import pytest

from minimoe.data_files import data_path
from minimoe.training.documents import digest
from minimoe.training.planted import DOMAINS, LANGUAGES, TOPICS, document, parallel, planted_documents, texts


def test_the_kept_text_is_that_of_the_manifest():
    """Not a byte may change: checkpoints and tables record its sha256."""
    manifest = json.loads(data_path("corpora/manifest.json").read_text(encoding="utf-8"))
    assert tuple(manifest["planted"]) == DOMAINS and len(set(DOMAINS)) == 18
    for domain in DOMAINS:
        found = planted_documents(domain, 1000)
        entry = manifest["planted"][domain]
        assert (len(found), digest(found)) == (entry["documents"], entry["sha256"]), domain
    arithmetic = manifest["domains"]["arithmetic"]
    assert digest(planted_documents("arithmetic", arithmetic["documents"])) == arithmetic["sha256"]


def test_a_meaning_is_held_out_in_every_language_or_in_none():
    for topic in TOPICS:
        splits = [[held.split for held in planted_documents(f"{language}/{topic}", 30)] for language in LANGUAGES]
        assert splits == [[*["train"] * 9, "held_out"] * 3] * 4
        for language, text in parallel(topic, 19).items():
            assert text == document(f"{language}/{topic}", 19) == planted_documents(f"{language}/{topic}", 20)[19].text


def test_documents_are_read_whole_and_those_of_another_seed_are_in_no_corpus():
    content = data_path("corpora/planted/seed-3/code.txt").read_bytes().decode()
    assert "".join(text + "<|endoftext|>\n" for text in texts("code", seed=3)) == content
    for domain in DOMAINS:
        assert all(text.endswith("\n") for text in texts(domain))
        assert len(texts(domain, seed=3)) == 20 and not set(texts(domain)) & set(texts(domain, seed=3)), domain


def test_what_is_not_kept_is_refused():
    with pytest.raises(ValueError, match=r"domain='klingon/kitchen': wanted one of english/kitchen, .*arithmetic"):
        document("klingon/kitchen", 0)
    for index in (-1, 20):
        with pytest.raises(ValueError, match=rf"index={index}: wanted 0 to 19, .* of code"):
            document("code", index, seed=3)
    with pytest.raises(FileNotFoundError, match="seed-1"):
        document("code", 0, seed=1)
