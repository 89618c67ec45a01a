"""The models in data/zoo: whole, what their recipe says, open to other tools, and of some use."""

import json
import re
from dataclasses import asdict
from hashlib import sha256

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from minimoe.data_files import data_path
from minimoe.lineage.tree import MEMBERS
from minimoe.lineage.zoo import derivation
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.training import Corpus, Settings
from minimoe.training.presets import small_config
from minimoe.training.tokenizer import load_tokenizer

ZOO = data_path("zoo")
FOLDERS = ("moe-planted", "moe-real", "moe-real-unbalanced")
FILES = ("config.json", "model.safetensors", "tokenizer.json", "lineage.json")
SAMPLED = {
    "moe-real": ("code", "prose", "arithmetic"),
    "moe-real-unbalanced": ("code", "prose", "arithmetic"),
    "moe-planted": ("english/kitchen", "french/harbour", "german/weather", "spanish/market", "code", "arithmetic"),
}


@pytest.fixture(params=FOLDERS)
def folder(request):
    return ZOO / request.param


@pytest.fixture
def recipe(folder):
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def listed():
    """The rows of the first table of the zoo's page, by folder."""
    table = (ZOO / "README.md").read_text(encoding="utf-8").split("| folder |")[1].split("\n\n")[0]
    return {re.search(r"`([^`]+)`", line)[1]: line for line in table.splitlines() if line.startswith("| `")}


def options(folder):
    """What the folder's command asks of `minimoe train`, as {"corpus": "real", ...}."""
    command = re.search(r"`minimoe train ([^`]+)`", listed()[folder.name])[1]
    return dict(re.findall(r"--(\w+) (\S+)", command))


def opened(folder):
    return MoEForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_every_model_is_listed_or_a_member_of_the_tree():
    members = {name for name, member in MEMBERS.items() if member.shipped}
    assert {folder.parent.name for folder in ZOO.glob("*/config.json")} == set(FOLDERS) | members
    assert listed().keys() == set(FOLDERS)


def test_members_of_the_tree_are_whole_and_say_where_they_come_from():
    digests = {corpus: getattr(Corpus, corpus)().sha256 for corpus in ("planted", "real")}
    for name in (name for name, member in MEMBERS.items() if member.shipped):
        said = json.loads((ZOO / name / "lineage.json").read_text(encoding="utf-8"))
        made = asdict(derivation(name))
        assert said["name"] == name and {key: said[key] for key in made} == made | {"parents": list(made["parents"])}
        assert said["corpus_sha256"] == digests[MEMBERS[name].options.get("corpus", "real")], name
        assert {file.name for file in (ZOO / name).iterdir()} == set(FILES), name
        assert MoEForCausalLM.from_pretrained(ZOO / name).model.embed_tokens.weight.dtype == torch.float16, name


def test_the_zoo_is_within_its_size():
    assert sum(file.stat().st_size for file in ZOO.rglob("*") if file.is_file()) < 55e6


def test_the_recipe_is_what_the_command_does(folder, recipe):
    steps = {"steps": int(options(folder)["steps"])} if "steps" in options(folder) else {}
    assert Settings(**recipe["settings"]) == Settings(**steps)
    wanted = small_config(balance=options(folder).get("balance", "loss"))
    assert MoEConfig(**recipe["config"]) == wanted == opened(folder).config
    assert f"{small_config().num_parameters():,}" in listed()["moe-real"]


def test_the_corpora_are_those_that_are_made_here():
    """That of the real model by the digests of its domains in order, which the manifest records."""
    domains = json.loads(data_path("corpora/manifest.json").read_text(encoding="utf-8"))["domains"]
    digests = [[domain, entry["sha256"]] for domain, entry in domains.items()]
    real = sha256(json.dumps(digests).encode()).hexdigest()
    made = {"moe-real": real, "moe-real-unbalanced": real, "moe-planted": Corpus.planted().sha256}
    for name, digest in made.items():
        recipe = json.loads((ZOO / name / "training.json").read_text(encoding="utf-8"))
        assert recipe["corpus_sha256"] == digest, name


def test_its_tokenizer_is_the_kits(folder):
    assert json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) == json.loads(load_tokenizer().to_str())


def test_transformers_opens_it_and_agrees(folder):
    ids = AutoTokenizer.from_pretrained(folder)("12 + 7 = 19, le matin")["input_ids"]
    assert ids == Tokenizer.from_file(str(folder / "tokenizer.json")).encode("12 + 7 = 19, le matin").ids
    ids = torch.tensor([ids])
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    assert (opened(folder)(ids).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_samples_show_what_they_continue(folder):
    """A naive Bayes classifier on pairs of tokens, which never saw the model, tells from a sample what it continued."""
    domains = SAMPLED[folder.name]
    corpus = Corpus.planted() if folder.name == "moe-planted" else Corpus.real()
    model = opened(folder)

    def pairs(ids):
        return np.asarray(ids[:-1], dtype=np.int64) * 1024 + np.asarray(ids[1:], dtype=np.int64)

    counts = [np.bincount(pairs(corpus.tokens(domain, "train")), minlength=1024**2) for domain in domains]
    log_likelihood = [np.log((count + 0.01) / (count + 0.01).sum()) for count in counts]
    prompts = torch.cat([_prompts(corpus, domain) for domain in domains])
    samples = model.generate(prompts, 60, temperature=0.7)[:, prompts.shape[1] :].numpy()
    told = [int(np.argmax([table[pairs(sample)].sum() for table in log_likelihood])) for sample in samples]
    for number, of_domain in enumerate(np.split(np.array(told), len(domains))):
        assert np.mean(of_domain == number) > 0.6, (domains[number], of_domain)  # chance is 1/3, or 1/6


def _prompts(corpus, domain):
    """Sixteen held-out stretches of twelve tokens."""
    stream = corpus.tokens(domain, "held_out")
    starts = np.linspace(0, len(stream) - 12, 16, dtype=int)
    return torch.tensor(np.stack([stream[start : start + 12] for start in starts]).astype(np.int64))
