"""The models in data/zoo: whole, what their recipe says, open to other tools, and of some use."""

import json
import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from minimoe.data_files import data_path
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.training import Corpus, Settings
from minimoe.training.presets import small_config
from minimoe.training.tokenizer import load_tokenizer

FOLDER = data_path("zoo/moe-real")


@pytest.fixture(scope="module")
def model():
    return MoEForCausalLM.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def recipe():
    return json.loads((FOLDER / "training.json").read_text())


def test_every_folder_is_listed_with_its_command():
    page = (FOLDER.parent / "README.md").read_text()
    rows = {re.search(r"`([^`]+)`", line)[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert rows.keys() == {folder.name for folder in FOLDER.parent.iterdir() if folder.is_dir()}
    assert all("minimoe train" in row for row in rows.values())


def test_the_recipe_is_what_the_command_does_by_default(model, recipe):
    assert recipe["settings"] == vars(Settings())
    assert MoEConfig(**recipe["config"]) == small_config()
    assert f"{model.config.num_parameters():,}" in (FOLDER.parent / "README.md").read_text()


def test_the_corpus_is_that_of_the_manifest(recipe):
    """The recipe's hash is over the domains' hashes in order, which the manifest records."""
    from hashlib import sha256

    domains = json.loads(data_path("corpora/manifest.json").read_text())["domains"]
    digests = [[domain, entry["sha256"]] for domain, entry in domains.items()]
    assert recipe["corpus_sha256"] == sha256(json.dumps(digests).encode()).hexdigest()


def test_its_tokenizer_is_the_kits():
    assert json.loads((FOLDER / "tokenizer.json").read_text()) == json.loads(load_tokenizer().to_str())


def test_transformers_opens_it_and_agrees(model):
    ids = AutoTokenizer.from_pretrained(FOLDER)("12 + 7 = 19, le matin")["input_ids"]
    assert ids == Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode("12 + 7 = 19, le matin").ids
    ids = torch.tensor([ids])
    wanted = AutoModelForCausalLM.from_pretrained(FOLDER)(ids).logits
    assert (model(ids).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_samples_show_code_prose_and_arithmetic_apart(model):
    """A naive Bayes classifier on pairs of tokens, which never saw the model, tells from a sample what it continued."""
    corpus = Corpus.real(domains=["code", "prose", "arithmetic"])

    def pairs(ids):
        return np.asarray(ids[:-1], dtype=np.int64) * 1024 + np.asarray(ids[1:], dtype=np.int64)

    counts = [np.bincount(pairs(corpus.tokens(domain, "train")), minlength=1024**2) for domain in corpus.domains]
    log_likelihood = [np.log((count + 0.01) / (count + 0.01).sum()) for count in counts]
    for number, domain in enumerate(corpus.domains):
        prompts = _prompts(corpus, domain)
        samples = model.generate(prompts, 60, temperature=0.7)[:, prompts.shape[1] :].numpy()
        told = [int(np.argmax([table[pairs(sample)].sum() for table in log_likelihood])) for sample in samples]
        assert np.mean(np.array(told) == number) > 0.6, (domain, told)  # chance is 1/3


def _prompts(corpus, domain):
    """Sixteen held-out stretches of twelve tokens."""
    stream = corpus.tokens(domain, "held_out")
    starts = np.linspace(0, len(stream) - 12, 16, dtype=int)
    return torch.tensor(np.stack([stream[start : start + 12] for start in starts]).astype(np.int64))
