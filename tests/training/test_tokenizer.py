"""The shipped tokenizer: every text survives it, digits stand alone."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from minimoe.data_files import data_path
from minimoe.training import tokenizer as tokenizer_module
from minimoe.training.tokenizer import END_OF_TEXT, END_OF_TEXT_ID, load_tokenizer

SAMPLE = [
    "Der Hafen ist still. El puerto está en calma.",
    "def total(values):\n    return sum(values)\n",
    "Le marché ouvre à huit heures : 17 + 25 = 42",
    "打开文件 关闭文件 保存文件",
] * 5


@pytest.fixture(scope="module")
def shipped():
    return load_tokenizer()


def test_the_shipped_file_has_1024_tokens_and_all_bytes(shipped):
    vocabulary = shipped.get_vocab()
    assert sorted(vocabulary.values()) == list(range(1024))
    assert vocabulary[END_OF_TEXT] == END_OF_TEXT_ID == 0
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert len(alphabet) == 256 and set(alphabet) <= set(vocabulary)


def test_the_shipped_file_is_a_standard_one():
    transformers = pytest.importorskip("transformers")
    loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=str(data_path("tokenizer.json")))
    for text in SAMPLE:
        assert loaded(text).input_ids == load_tokenizer().encode(text).ids


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_every_text_survives(shipped, text):
    ids = shipped.encode(text).ids
    assert shipped.decode(ids, skip_special_tokens=False) == text
    assert END_OF_TEXT_ID not in ids


def test_awkward_texts_survive(shipped):
    basic_plane = "".join(chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000)
    for text in ("<|endoftext|>", "a<|endoftext|>b", "e\u0301\u200d", "👩‍🔧", "\U0010ffff", basic_plane):
        ids = shipped.encode(text).ids
        assert shipped.decode(ids, skip_special_tokens=False) == text
        assert END_OF_TEXT_ID not in ids


@given(number=st.integers(min_value=0, max_value=10**12))
def test_a_digit_is_a_token(shipped, number):
    tokens = shipped.encode(f"x{number}y").tokens
    assert tokens == ["x", *str(number), "y"]


def test_no_token_but_a_digit_holds_one(shipped):
    assert [token for token in shipped.get_vocab() if len(token) > 1 and set(token) & set("0123456789")] == []


def test_a_missing_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tokenizer_module, "data_path", lambda name: tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"python -m workshop.rebuild"):
        load_tokenizer()
