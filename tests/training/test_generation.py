"""Text in, text out: what `generate` adds to the model's own, and what it refuses."""

from itertools import product

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


def test_it_is_the_tokenizer_around_the_model(model, tokenizer):
    for sampling, prompt in product(SAMPLING, ("def ", "Le chat", "\u4f60\u597d")):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        wanted = tokenizer.decode(model.generate(ids, 12, **sampling)[0].tolist(), skip_special_tokens=False)
        assert generate(model, prompt, 12, **sampling) == wanted
        assert wanted.startswith(prompt)


def test_several_prompts_give_a_list_and_greedily_what_each_gives_alone(model):
    prompts = ["def ", "The quick brown fox jumps over", "x"]
    for sampling in SAMPLING:
        together = generate(model, prompts, 10, **sampling)
        assert isinstance(together, list) and len(together) == 3
        assert all(text.startswith(prompt) for text, prompt in zip(together, prompts, strict=True))
        assert generate(model, tuple(prompts), 10, **sampling) == together  # the seed decides
    assert generate(model, prompts, 10) == [generate(model, prompt, 10) for prompt in prompts]
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


def test_impossible_prompts_and_settings_are_refused(model):
    for prompts in ("", ["def ", ""]):
        with pytest.raises(ValueError, match="prompts: '' gives no token"):
            generate(model, prompts, 5)
    with pytest.raises(ValueError, match="prompts: found 3, wanted a text"):
        generate(model, [3], 5)
    with pytest.raises(ValueError, match="max_new_tokens=0: wanted at least 1"):
        generate(model, "def ", 0)
    with pytest.raises(ValueError, match=r"temperature=-1\.0: wanted 0"):
        generate(model, "def ", 1, temperature=-1.0)
