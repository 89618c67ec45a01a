"""Corpora: streams hold the documents whole, batches depend on seed and step alone, bad folders are named."""

import io
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minimoe.progress import progress_bar
from minimoe.training import corpus as corpus_module
from minimoe.training import planted
from minimoe.training.corpus import Corpus

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def sentence(index: int) -> str:
    return f"Line {index}: " + " ".join(WORDS[(index * factor + 1) % 10] for factor in (1, 3, 7)) + ".\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache") / "minimoe"
    monkeypatch.setenv("MINIMOE_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path):
    """Two domains: 40 files, and one file of 400 lines."""
    root = tmp_path / "texts"
    for index in range(40):
        text = "".join(sentence(index * 50 + n) for n in range(30))
        write(root / "letters" / f"{index // 10}" / f"{index}.txt", text)
    write(root / "log" / "all.md", "".join(sentence(n) + ("\n" if n % 5 == 4 else "") for n in range(400)))
    return root


@pytest.fixture(scope="module")
def planted_corpus(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Corpus.planted(documents_per_domain=40)


# --- planted ----------------------------------------------------------------------------------------------


def test_planted_holds_every_document_whole(planted_corpus):
    assert planted_corpus.domains == tuple(planted.DOMAINS) and planted_corpus.vocab_size == 1024
    for domain in planted.DOMAINS:
        texts = [planted.document(domain, index) for index in range(40)]
        assert planted_corpus.documents(domain, "held_out") == texts[9::10]
        assert planted_corpus.documents(domain, "train") == [text for text in texts if text not in texts[9::10]]


def test_more_or_fewer_documents_than_there_are_are_refused():
    for count in (9, 1001):
        with pytest.raises(ValueError, match=f"documents_per_domain={count}: wanted 10 to 1000"):
            Corpus.planted(documents_per_domain=count)


# --- batches ----------------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_step_alone(planted_corpus):
    def ids(**change):
        return planted_corpus.batch(
            **{"split": "train", "batch_size": 6, "seq_len": 32, "seed": 1, "step": 7, **change}
        )

    first = ids()
    ids(step=8)
    again = ids()
    assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.domains, again.domains)
    for change in ({"step": 8}, {"seed": 2}, {"split": "held_out"}):
        assert not torch.equal(first.input_ids, ids(**change).input_ids), change


def test_a_batch_holds_windows_of_the_right_stream(planted_corpus):
    for split in ("train", "held_out"):
        batch = planted_corpus.batch(split, batch_size=16, seq_len=24, seed=0, step=0)
        assert batch.input_ids.shape == (16, 24) and batch.domains.shape == (16,)
        assert batch.input_ids.dtype == batch.domains.dtype == torch.int64
        for row, domain in zip(batch.input_ids.numpy(), batch.domains, strict=True):
            stream = planted_corpus.tokens(planted_corpus.domains[domain], split)
            windows = np.lib.stride_tricks.sliding_window_view(stream, 24)
            assert (windows == row).all(1).any()


def test_windows_reach_both_ends_of_a_stream(folder):
    corpus = Corpus.from_folder(folder / "log")
    stream = torch.from_numpy(corpus.tokens("log", "held_out").astype(np.int64))
    whole = corpus.batch("held_out", batch_size=4, seq_len=len(stream), seed=0, step=0)
    assert torch.equal(whole.input_ids, stream.expand(4, -1))
    rows = corpus.batch("held_out", batch_size=32, seq_len=len(stream) - 1, seed=0, step=0).input_ids
    assert {tuple(row) for row in rows.tolist()} == {tuple(stream[:-1].tolist()), tuple(stream[1:].tolist())}


def test_domains_are_drawn_by_their_shares_and_each_split_on_its_own(folder):
    corpus = Corpus.from_folder(folder)
    batches = {
        split: corpus.batch(split, batch_size=2000, seq_len=8, seed=0, step=0) for split in ("train", "held_out")
    }
    assert not torch.equal(batches["train"].domains, batches["held_out"].domains)
    for batch in batches.values():
        drawn = torch.bincount(batch.domains, minlength=2).numpy() / 2000
        assert np.abs(drawn - corpus.shares).max() < 5 * np.sqrt(0.25 / 2000)


def test_shares_grow_slower_than_sizes():
    shares = corpus_module._shares([1_000_000, 1_000])
    assert shares.sum() == pytest.approx(1)
    assert shares[0] / shares[1] == pytest.approx(1000**0.3)


def test_a_window_longer_than_a_stream_is_refused(planted_corpus):
    shortest = min(planted_corpus.domains, key=lambda domain: len(planted_corpus.tokens(domain, "held_out")))
    length = len(planted_corpus.tokens(shortest, "held_out"))
    with pytest.raises(ValueError, match=f"seq_len=100000: wanted 1 to {length}.*{shortest}.*held_out"):
        planted_corpus.batch("held_out", batch_size=1, seq_len=100_000, seed=0, step=0)


def test_unknown_names_are_refused(planted_corpus):
    with pytest.raises(ValueError, match=r"domain='nowhere': wanted one of .*arithmetic"):
        planted_corpus.tokens("nowhere", "train")
    with pytest.raises(ValueError, match=r"split='test': wanted one of .*held_out"):
        planted_corpus.batch("test", batch_size=1, seq_len=8, seed=0, step=0)


def test_streams_cannot_be_changed_by_accident(planted_corpus):
    with pytest.raises(ValueError, match="read-only"):
        planted_corpus.tokens("code", "train")[0] = 1


def test_encode_and_decode(planted_corpus):
    text = "Größe 3 中文 <|endoftext|>"
    ids = planted_corpus.encode(text)
    assert planted_corpus.decode(ids) == planted_corpus.decode(torch.tensor(ids)) == text
    assert planted_corpus.decode([0]) == "<|endoftext|>" and planted_corpus.decode([]) == ""


# --- from_folder ------------------------------------------------------------------------------------------


def test_a_folder_gives_a_domain_for_each_subfolder(folder):
    corpus = Corpus.from_folder(folder)
    assert corpus.domains == ("letters", "log")
    files = {path.read_text(encoding="utf-8") for path in (folder / "letters").rglob("*.txt")}
    splits = [set(corpus.documents("letters", split)) for split in ("train", "held_out")]
    assert splits[0] | splits[1] == files and not splits[0] & splits[1]
    log = (folder / "log/all.md").read_text(encoding="utf-8")
    pieces = [corpus.documents("log", split) for split in ("train", "held_out")]
    assert not set(pieces[0]) & set(pieces[1]) and all(piece in log for split in pieces for piece in split)
    assert sum(len(piece) for split in pieces for piece in split) == len(log)  # cut, but nothing lost


def test_files_in_the_folder_itself_are_a_domain_named_after_it(folder):
    assert Corpus.from_folder(folder / "log").domains == ("log",)
    write(folder / "loose.txt", "".join(sentence(n) for n in range(1000, 1400)))
    assert Corpus.from_folder(str(folder)).domains == ("letters", "log", "texts")


def test_newlines_bom_and_order_do_not_matter(folder, tmp_path):
    other = tmp_path / "other"
    for path in sorted(folder.rglob("*.*"), reverse=True):
        write(other / path.relative_to(folder), b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert Corpus.from_folder(other).sha256 == Corpus.from_folder(folder).sha256


def test_hidden_files_links_to_folders_and_empty_files_are_ignored(folder):
    before = Corpus.from_folder(folder).sha256
    write(folder / ".git" / "config", "hidden " * 500)
    write(folder / "letters" / ".hidden.txt", "hidden " * 500)
    write(folder / "letters" / "empty.txt", " \n")
    os.symlink(folder / "letters", folder / "link", target_is_directory=True)
    os.symlink(folder / "nowhere.txt", folder / "log" / "broken.txt")
    os.mkfifo(folder / "log" / "pipe")
    assert Corpus.from_folder(folder).sha256 == before


def test_repeated_files_count_once(folder):
    before = Corpus.from_folder(folder).sha256
    write(folder / "letters" / "z.txt", (folder / "letters/0/0.txt").read_bytes())
    assert Corpus.from_folder(folder).sha256 == before


def test_a_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here: no such folder"):
        Corpus.from_folder(tmp_path / "nothing-here")


def test_a_file_instead_of_a_folder(folder):
    with pytest.raises(ValueError, match=r"all\.md: found a file, wanted a folder"):
        Corpus.from_folder(folder / "log" / "all.md")


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty" / "below").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty: wanted text files, found none that holds any text"):
        Corpus.from_folder(tmp_path / "empty")


def test_only_binary_files(tmp_path):
    for data, why in ((b"text\0text", "byte 4 is NUL"), (b"caf\xe9 au lait", "byte 3 is not UTF-8")):
        write(tmp_path / "bin" / "image.png", data)
        with pytest.raises(ValueError, match=rf"wanted text files, found .*image\.png \(.*{why}"):
            Corpus.from_folder(tmp_path / "bin")


def test_binary_files_among_texts_are_named_and_ignored(folder):
    before = Corpus.from_folder(folder).sha256
    write(folder / "log" / "image.png", b"\x89PNG\0\0")
    with pytest.warns(UserWarning, match=r"1 binary files ignored, the first is .*image\.png"):
        assert Corpus.from_folder(folder).sha256 == before


def test_a_tiny_folder(tmp_path):
    write(tmp_path / "tiny" / "note.txt", "Hello.\n")
    with pytest.raises(
        ValueError,
        match=r"domain 'tiny' is too small: found \d+ tokens to train on and \d+ held out, wanted at least 64",
    ):
        Corpus.from_folder(tmp_path / "tiny")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 24))
def test_a_folder_of_some_paragraphs_always_has_both_splits(tmp_path, start, files):
    root = tmp_path / f"{start}-{files}"
    for index in range(files):
        text = "".join(sentence(start + 100 * index + n) + "\n" for n in range(-(-100 // files)))
        write(root / f"{index}.txt", text)
    corpus = Corpus.from_folder(root)
    assert len(corpus.tokens(root.name, "train")) > 2 * len(corpus.tokens(root.name, "held_out")) >= 128


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders(folder):
    path = folder / "log" / "all.md"
    for unreadable in (path, folder / "letters"):
        mode = unreadable.stat().st_mode
        unreadable.chmod(0)
        try:
            with pytest.raises(PermissionError, match=unreadable.name):
                Corpus.from_folder(folder)
        finally:
            unreadable.chmod(mode)


def test_errors_of_the_system_are_passed_on(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(corpus_module.Path, "read_bytes", refuse)
    with pytest.raises(PermissionError, match=r"letters/0/0\.txt"):
        Corpus.from_folder(folder)


# --- the cache --------------------------------------------------------------------------------------------


def same(a: Corpus, b: Corpus) -> bool:
    return a.sha256 == b.sha256 and all(
        np.array_equal(a.tokens(domain, split), b.tokens(domain, split))
        for domain in a.domains
        for split in ("train", "held_out")
    )


def test_the_second_time_nothing_is_tokenized(folder, cache, monkeypatch):
    first = Corpus.from_folder(folder)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(corpus_module, "_tokenize", None)
    assert same(first, Corpus.from_folder(folder))


def test_a_damaged_cache_is_rebuilt(folder, cache):
    first = Corpus.from_folder(folder)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    middle = len(whole) // 2
    other = io.BytesIO()
    np.savez(other, something=np.zeros(3))
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (b"", whole[:middle], flipped, b"\x80\x04garbage", other.getvalue()):
        path.write_bytes(damaged)
        assert same(first, Corpus.from_folder(folder))
        with np.load(path) as file:
            assert "digests" in file  # the damaged file was replaced


def test_a_changed_file_is_seen(folder):
    before = Corpus.from_folder(folder)
    write(folder / "log" / "all.md", (folder / "log/all.md").read_text(encoding="utf-8") + "One more line.\n")
    assert Corpus.from_folder(folder).sha256 != before.sha256


def test_another_tokenizer_does_not_use_the_kept_tokens(folder, monkeypatch):
    before = Corpus.from_folder(folder)
    other = corpus_module.load_tokenizer()
    other.enable_truncation(5)
    monkeypatch.setattr(corpus_module, "load_tokenizer", lambda: other)
    monkeypatch.setattr(corpus_module, "FEWEST_TOKENS", 1)
    after = Corpus.from_folder(folder)
    assert after.sha256 == before.sha256 and len(after.tokens("log", "train")) < len(before.tokens("log", "train"))


def test_without_a_place_to_write_it_works(folder, tmp_path, monkeypatch):
    first = Corpus.from_folder(folder)
    write(tmp_path / "file", "in the way")
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path / "file"))
    assert same(first, Corpus.from_folder(folder))


def test_an_interrupted_write_leaves_nothing(folder, cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("minimoe.atomic.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Corpus.from_folder(folder)
    assert list(cache.iterdir()) == []


# --- progress ---------------------------------------------------------------------------------------------


def test_the_bar_is_silent_under_pytest_and_shown_on_request(monkeypatch, capsys):
    monkeypatch.delenv("MINIMOE_PROGRESS", raising=False)
    assert list(progress_bar(range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("MINIMOE_PROGRESS", "1")
    assert list(progress_bar(range(3), desc="counting")) == [0, 1, 2]
    assert "counting" in capsys.readouterr().err


def test_repr_gives_the_sizes(planted_corpus):
    shown = repr(planted_corpus)
    assert planted_corpus.sha256[:16] in shown and all(domain in shown for domain in planted_corpus.domains)
