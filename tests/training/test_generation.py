"""Text in, text out: what `generate` adds to the model's own, and what it refuses."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minimoe.data_files import data_path
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.training import generate


@pytest.fixture(scope="module")
def model():
    return MoEForCausalLM.from_pretrained(data_path("zoo/moe-real"), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(data_path("zoo/moe-real/tokenizer.json")))


SAMPLING = [{}, {"temperature": 0.8, "top_k": 40, "seed": 3}, {"temperature": 1.1, "top_p": 0.9, "seed": 4}]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_it_is_the_tokenizer_around_the_model(model, tokenizer, sampling):
    for prompt in ("def ", "Le chat", "\u4f60\u597d"):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        wanted = tokenizer.decode(model.generate(ids, 12, **sampling)[0].tolist(), skip_special_tokens=False)
        assert generate(model, prompt, 12, **sampling) == wanted
        assert wanted.startswith(prompt)


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_several_prompts_give_a_list_and_greedily_what_each_gives_alone(model, sampling):
    prompts = ["def ", "The quick brown fox jumps over", "x"]
    together = generate(model, prompts, 10, **sampling)
    assert isinstance(together, list) and len(together) == 3
    assert all(text.startswith(prompt) for text, prompt in zip(together, prompts, strict=True))
    assert generate(model, tuple(prompts), 10, **sampling) == together  # the seed decides
    if not sampling:
        assert together == [generate(model, prompt, 10) for prompt in prompts]


def test_no_prompt_gives_no_text(model):
    assert generate(model, [], 10) == []


def test_another_tokenizer_may_be_given(model):
    vocabulary = {chr(97 + number): number for number in range(26)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    small = MoEForCausalLM(MoEConfig(vocab_size=26, hidden_size=16, num_hidden_layers=1))
    found = generate(small, "cab", 5, tokenizer=letters)
    ids = small.generate(torch.tensor([[2, 0, 1]]), 5)[0].tolist()
    assert found == "".join(chr(97 + token) for token in ids) and len(found) == 8
    with pytest.raises(ValueError, match=r"tokenizer=None, and the model has no tokenizer\.json: wanted"):
        generate(small, "cab", 5)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "prompts: '' gives no token, wanted a text of at least one"),
        (["def ", ""], "prompts: '' gives no token"),
        ([3], "prompts: found 3, wanted a text or a list of texts"),
    ],
)
def test_a_prompt_without_tokens_is_refused(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, 5)


def test_settings_are_those_of_the_model_and_checked_there(model):
    with pytest.raises(ValueError, match="max_new_tokens=0: wanted at least 1"):
        generate(model, "def ", 0)
    with pytest.raises(ValueError, match=r"temperature=-1\.0: wanted 0"):
        generate(model, "def ", 1, temperature=-1.0)
