"""The published shapes, counted by us, by transformers and by those who published them."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minimoe.course.published import LARGE_MODELS, MIXTRAL_REPETITION, REAL_MODELS, read_published
from minimoe.data_files import data_path
from minimoe.model.families import write_config

FAMILIES = {
    "Qwen2.5-14B": "qwen2",
    "OLMoE-1B-7B": "olmoe",
    "Qwen1.5-MoE-A2.7B": "qwen2_moe",
    "Qwen3-30B-A3B": "qwen3_moe",
    "Mixtral-8x7B": "mixtral",
    "DeepSeek-V3": "deepseek_v3",
    "gpt-oss-20b": "gpt_oss",
}  # transformers has no Pangu Pro MoE


def test_published_totals():
    """In billions (arXiv 2505.21411; the model card)."""
    for name, total, active in (("Pangu Pro MoE", "71.99", "16.50"), ("Qwen2.5-14B", "14.77", "14.77")):
        config = REAL_MODELS[name].config
        assert f"{config.num_parameters() / 1e9:.2f}" == total
        assert f"{config.num_parameters(active=True) / 1e9:.2f}" == active


def test_published_totals_of_large_models():
    """671 and 37 billion (arXiv 2412.19437, abstract); 20.91 and 3.61, without the embedding (arXiv 2508.10925)."""
    deepseek, gpt_oss = (LARGE_MODELS[name].config for name in ("DeepSeek-V3", "gpt-oss-20b"))
    assert deepseek.num_parameters() // 10**9 == 671
    assert deepseek.num_parameters(active=True) // 10**9 == 37
    embedding = gpt_oss.vocab_size * gpt_oss.hidden_size
    assert f"{gpt_oss.num_parameters() / 1e9:.2f}" == "20.91"
    assert f"{(gpt_oss.num_parameters(active=True) - embedding) / 1e9:.2f}" == "3.61"


def test_sizes_that_models_are_named_after():
    """Qwen1.5-MoE-A2.7B, Qwen3-30B-A3B, OLMoE-1B-7B; an 8x7B shares its attention, so it is less than 8 times 7."""
    config = {name: model.config for name, model in REAL_MODELS.items()}
    assert f"{config['Qwen1.5-MoE-A2.7B'].num_parameters(active=True) / 1e9:.1f}" == "2.7"
    assert config["Qwen3-30B-A3B"].num_parameters() // 10**9 == 30
    assert config["Qwen3-30B-A3B"].num_parameters(active=True) // 10**9 == 3
    assert f"{config['OLMoE-1B-7B'].num_parameters() / 1e9:.0f}" == "7"
    assert config["OLMoE-1B-7B"].num_parameters(active=True) // 10**9 == 1
    mixtral = config["Mixtral-8x7B"]
    per_expert = dataclasses.replace(mixtral, num_experts=1, num_experts_per_tok=1).num_parameters()
    assert f"{per_expert / 1e9:.0f}" == "7"
    assert 7 * per_expert > mixtral.num_parameters() > 6 * per_expert


def test_transformers_counts_the_same():
    for name, family in FAMILIES.items():
        config = (REAL_MODELS | LARGE_MODELS)[name].config
        raw = json.loads(json.dumps(write_config(config, family, "bfloat16")))  # as a file has it
        with torch.device("meta"):  # shapes without memory
            theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
        assert theirs.num_parameters() == config.num_parameters(), name


def test_mixtral_repetition_is_as_the_paper_describes_it():
    """Section 5 of arXiv 2401.04088: near chance in the first layer, significantly above it in the others."""
    mixtral = REAL_MODELS["Mixtral-8x7B"].config
    chance = 100 / mixtral.num_experts
    assert len(MIXTRAL_REPETITION) == 8
    for by_layer in MIXTRAL_REPETITION.values():
        assert list(by_layer) == [0, 15, mixtral.num_hidden_layers - 1]
        assert chance < by_layer[0] < 1.2 * chance
        assert min(by_layer[15], by_layer[31]) > 1.5 * chance


def test_every_published_number_has_its_source():
    for path in data_path("published").glob("*.csv"):
        rows = read_published(path.stem)
        assert rows, path
        assert all(row["source"].strip() for row in rows), path
        assert None not in rows[0], f"{path}: a row has more cells than the header"


def test_a_table_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"name='claims': wanted one of .*dispute"):
        read_published("claims")


def test_table_of_shapes_agrees_with_the_configurations():
    """One number, two places: the table that readers see, and the configuration that parameters are counted from."""
    shapes = {row["quantity"]: (row["pangu"], row["qwen"]) for row in read_published("shapes")}
    configs = REAL_MODELS["Pangu Pro MoE"].config, REAL_MODELS["Qwen2.5-14B"].config
    for quantity, count in {
        "layers": lambda c: c.num_hidden_layers,
        "hidden size": lambda c: c.hidden_size,
        "attention heads": lambda c: c.num_attention_heads,
        "key-value heads": lambda c: c.num_key_value_heads,
        "head dimension": lambda c: c.head_dim,
        "vocabulary": lambda c: c.vocab_size,
        "parameters, billions": lambda c: f"{c.num_parameters() / 1e9:.2f}",
        "active parameters, billions": lambda c: f"{c.num_parameters(active=True) / 1e9:.2f}",
    }.items():
        found = tuple(str(count(config)) for config in configs)
        assert tuple(f"{float(value):g}" for value in found) == tuple(f"{float(v):g}" for v in shapes[quantity]), (
            quantity
        )
