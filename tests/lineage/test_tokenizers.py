"""The tokenizer of a model goes where its weights go, and nowhere else."""

import copy

from minimoe.data_files import data_path
from minimoe.lineage import all_gauges, upcycle
from minimoe.lineage.derive import average, lerp, slerp, ties
from minimoe.lineage.recipes import INSTANT
from minimoe.lineage.tree import MEMBERS
from minimoe.lineage.upcycling import METHODS, branch_train_mix, transplant_expert
from minimoe.lineage.zoo import Zoo
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.training.tokenizer import read_tokenizer

SMALL = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 0}
SHIPPED = data_path("zoo/alder/tokenizer.json").read_text(encoding="utf-8")


def small_model(tokenizer, seed=0, **settings):
    model = MoEForCausalLM(MoEConfig(**SMALL | {"tie_word_embeddings": False} | settings), seed=seed)
    model.tokenizer_json = tokenizer
    return model


def test_a_member_that_is_made_has_the_tokenizer_of_its_parents(tmp_path):
    zoo = Zoo(tmp_path)
    for recipe in INSTANT:
        name = next(name for name, member in MEMBERS.items() if member.recipe == recipe and zoo.has(name))
        assert zoo.load(name).tokenizer_json == SHIPPED, recipe
    zoo.build_one(name)
    assert (tmp_path / name / "tokenizer.json").read_text(encoding="utf-8") == SHIPPED


def test_rows_without_text_are_not_named(tmp_path):
    extended = Zoo(tmp_path).load("alder-extended")
    tokens = read_tokenizer(extended.tokenizer_json).get_vocab()
    assert extended.config.vocab_size == len(tokens) + 64 and max(tokens.values()) == len(tokens) - 1


def test_upcycling_and_gauges():
    for method in METHODS:
        mixture = upcycle(small_model("own"), num_experts=4, num_experts_per_tok=2, method=method)
        assert mixture.tokenizer_json == all_gauges(mixture, 3).tokenizer_json == "own"
        assert copy.deepcopy(mixture).half().float().tokenizer_json == "own"


MERGES = {
    "average": lambda a, b: average([a, b]),
    "lerp": lambda a, b: lerp(a, b, 0.5),
    "slerp": lambda a, b: slerp(a, b, 0.5),
    "ties": lambda a, b: ties(a, [b]),
    "branch_train_mix": lambda a, b: branch_train_mix([a, b], num_experts_per_tok=2),
}


def test_models_of_two_tokenizers_merge_into_one_that_has_none():
    for one, other in (("own", "own"), ("own", "another"), ("own", None), (None, None)):
        models = small_model(one), small_model(other, seed=1)
        for name, merge in MERGES.items():
            assert merge(*models).tokenizer_json == (one if one == other else None), name
        assert [model.tokenizer_json for model in models] == [one, other]


def test_an_expert_from_elsewhere_brings_no_tokenizer():
    model = upcycle(small_model("own"), num_experts=4, num_experts_per_tok=2)
    assert transplant_expert(model, small_model("another"), layer=0, expert=1).tokenizer_json == "own"
