"""What `from_pretrained` and text generation make of settings that files bring along, or that nobody should give."""

import json

import pytest
import torch

from minimoe import MoEConfig, MoEForCausalLM, generate
from minimoe.model.checkpoint import CheckpointError
from minimoe.training.tokenizer import load_tokenizer

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": 2, "intermediate_size": 8}


@pytest.fixture
def folder(tmp_path):
    MoEForCausalLM(MoEConfig(**SIZES)).save_pretrained(tmp_path)
    return tmp_path


def test_the_way_experts_are_run_can_be_chosen(folder):
    model = MoEForCausalLM.from_pretrained(folder, experts_implementation="grouped")
    assert model.config.experts_implementation == model.model.layers[0].mlp.experts.implementation == "grouped"
    with pytest.raises(ValueError, match="experts_implementation='fast': wanted one of"):
        MoEForCausalLM.from_pretrained(folder, experts_implementation="fast")


@pytest.mark.parametrize("dtype", ["float32", torch.int64])
def test_a_dtype_that_is_none_of_ours(folder, dtype):
    with pytest.raises(ValueError, match=r"dtype=.*: wanted one of torch\.float64"):
        MoEForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("width", [8, 10**18])
def test_a_shared_expert_that_the_file_does_not_hold(folder, width):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    changed = config | {"shared_expert_intermediate_size": width}
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"shared_expert_intermediate_size={width}: wanted 0"):
        MoEForCausalLM.from_pretrained(folder)


def test_a_prompt_is_neither_cut_nor_filled_up():
    """Tokenizers come with the lengths that training asked for."""
    model, tokenizer, prompt = MoEForCausalLM(MoEConfig(**SIZES)), load_tokenizer(), "hello world, this is a text"
    model.tokenizer_json = tokenizer.to_str()
    wanted = generate(model, prompt, 3)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=40)
    model.tokenizer_json = tokenizer.to_str()
    assert generate(model, prompt, 3) == wanted and wanted.startswith(prompt)
