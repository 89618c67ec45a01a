"""A configuration that cannot belong to the file beside it: refused from the header, before memory or time is taken."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from minimoe.fingerprints.weights import open_weights
from minimoe.model import MoEForCausalLM
from minimoe.model.checkpoint import CheckpointError
from tests.model.test_checkpoint import LAYOUTS, small_model

pytestmark = pytest.mark.exact("computes nothing")
ABSURD = (10**9, 10**18, 0, -1)
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_experts",
    "num_local_experts",
)
SIZES_OF_BERT = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
OPEN_ALL = """
import json, resource, sys
from minimoe import MoEForCausalLM, compare, open_weights

resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
for folder in sys.stdin.read().splitlines():
    said = []
    for call in (MoEForCausalLM.from_pretrained, open_weights, lambda folder: compare(folder, folder)):
        try:
            call(folder)
            said.append(None)
        except ValueError as error:
            said.append(f"{type(error).__name__} {error}")
    print(json.dumps(said))
"""


def open_all(folders: list[Path]) -> list[list[str | None]]:
    """What each way to open says of each folder, in a process that may take 3 GB and two minutes for all of them."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN_ALL],
        input="\n".join(map(str, folders)),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def altered(folder: Path, **changes) -> Path:
    """The same weights beside another configuration."""
    other = folder.with_name(f"{folder.name} {changes}")
    other.mkdir()
    os.link(folder / "model.safetensors", other / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return other


def original(layout: str, folder: Path) -> Path:
    """A small model of a layout, as it should be."""
    if layout == "bert":
        sizes = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
        BertModel(BertConfig(**sizes, intermediate_size=10)).save_pretrained(folder)
    elif layout == "int8":
        small_model(num_experts=0).save_pretrained(folder, model_type="llama")
        folder = altered(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    else:
        small_model(**LAYOUTS[layout]).save_pretrained(folder, model_type=layout)
    return folder


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """layout -> (key, value, what each way to open says), from one process for all of them."""
    cases, folders = [], []
    for layout in (*LAYOUTS, "int8", "bert"):
        folder = original(layout, tmp_path_factory.mktemp(layout) / "a")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        keys = SIZES_OF_BERT if layout == "bert" else [key for key in SIZES if config.get(key)]
        for key, value in product(keys, ABSURD):
            if (key, value) != ("num_experts", 0):
                cases.append((layout, key, value))
                folders.append(altered(folder, **{key: value}))
    found = {}
    for (layout, key, value), messages in zip(cases, open_all(folders), strict=True):
        found.setdefault(layout, []).append((key, value, messages))
    return found


@pytest.mark.parametrize("layout", [*LAYOUTS, "int8"])
def test_an_absurd_size_is_refused_by_name_before_anything_is_built(layout, said, tmp_path):
    MoEForCausalLM.from_pretrained(original(layout, tmp_path / "a"))  # as it is, it is read
    assert len({key for key, *_ in said[layout]}) >= 6
    for key, value, messages in said[layout]:
        if key == "intermediate_size" and messages == [None] * 3:
            assert layout in ("qwen2_moe", "deepseek_v2", "pangu_pro_moe", "minimoe") and value > 0  # no dense layer
            continue
        if value <= 0 and key.endswith(("intermediate_size", "experts")) and messages[1:] == [None] * 2:
            del messages[1:]  # to read and compare, the tensors say how many experts there are, and how wide
        if key == "num_key_value_heads" and layout.startswith("deepseek") and messages[1:] == [None] * 2:
            del messages[1:]  # the tensors say what keys are made of
        for message in messages:
            assert message.startswith("CheckpointError") and f"={value}" in message, (key, value, message)
            if value > 0:
                assert f"{key}={value}" in message or "hidden_size=16: wanted a multiple of num_attention" in message


def test_the_message_says_what_the_file_holds(tmp_path):
    small_model().save_pretrained(tmp_path / "a", model_type="mixtral")
    for key, value, held in (
        ("num_hidden_layers", 10**9, "wanted at most 2, the layers that the file holds"),
        ("num_local_experts", 10**9, "wanted at most 4, the experts of a layer that the file holds"),
        ("vocab_size", 30, "wanted 29, the rows of model.embed_tokens.weight in the file"),
        ("hidden_size", 32, "wanted 16, the columns of model.embed_tokens.weight in the file"),
        ("head_dim", 10, "wanted a product of 16, the rows of model.layers.0.self_attn.q_proj.weight in the file"),
        (
            "intermediate_size",
            9,
            "wanted 8, the rows of model.layers.0.block_sparse_moe.experts.0.w1.weight in the file",
        ),
    ):
        with pytest.raises(CheckpointError) as caught:
            open_weights(altered(tmp_path / "a", **{key: value}))
        assert "config.json: " in str(caught.value) and f"{key}={value}: {held}" in str(caught.value)


def test_layers_past_the_last_are_no_business_of_a_comparison_and_no_part_of_a_model(tmp_path):
    small_model(num_experts=0, num_hidden_layers=3).save_pretrained(tmp_path / "a", model_type="llama")
    fewer = altered(tmp_path / "a", num_hidden_layers=2)
    assert open_weights(fewer).num_layers == 2
    with pytest.raises(CheckpointError, match=r"9 tensors unexpected: model\.layers\.2\."):
        MoEForCausalLM.from_pretrained(fewer)


def test_bert(said, tmp_path):
    assert open_weights(original("bert", tmp_path / "a")).num_layers == 3
    assert {key for key, *_ in said["bert"]} == set(SIZES_OF_BERT)
    for key, value, (run, *opened) in said["bert"]:
        assert "model_type='bert': an encoder, which can be compared but not run; wanted one of llama" in run
        for message in opened:
            assert message.startswith("CheckpointError") and f"={value}" in message, (key, value, message)
