"""Families beside those of test_families.py: one layer for one token, computed from the roles that we read, is what
transformers computes; and where there is more to a layer, its roles are the parameters of the module.

A token that is alone attends to itself: its attention is o of its own value, so queries and keys play no part here.
"""

import os
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from minimoe.fingerprints.compare import compare
from minimoe.fingerprints.verdict import SHARED
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.model.checkpoint import CheckpointError
from tests.fingerprints.test_families import DEEPSEEK, LATENT, MIXTURE, PLAIN, SIZES, TOKENS

LAYER = 1
BERT = SIZES | TOKENS | {"intermediate_size": 48, "max_position_embeddings": 64}
ENCODERS = dict.fromkeys(
    [
        *("bert", "roberta", "xlm-roberta", "camembert", "data2vec-text", "electra", "ernie", "mpnet", "roformer"),
        *("roberta-prelayernorm", "megatron-bert", "deberta", "deberta-v2", "modernbert", "nomic_bert", "gte"),
    ],
    BERT,
)
ENCODERS |= {
    "electra": BERT | {"embedding_size": 32},
    "esm": BERT | {"mask_token_id": 1},
    "eurobert": BERT | {"num_key_value_heads": 2, "head_dim": 8},
    "distilbert": {"vocab_size": 160, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
}
HYBRID = {"layer_types": ["conv", "full_attention"]}
DENSE = {
    "biogpt": BERT,
    "codegen": {"vocab_size": 160, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "exaone4": PLAIN | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "glm": PLAIN,
    "gpt_neox_japanese": PLAIN | {"intermediate_multiple_size": 2},
    "helium": PLAIN,
    "hyperclovax": PLAIN | {"use_post_norm": True},
    "lfm2": PLAIN | HYBRID | {"block_ff_dim": 48, "block_multiple_of": 8},
    "modernbert-decoder": BERT,
    "olmo3": PLAIN | {"sliding_window": 4},
    "recurrent_gemma": PLAIN | {"lru_width": 32, "block_types": ["recurrent", "attention"]},
    "smollm3": PLAIN,
    "vaultgemma": PLAIN,
    "xglm": {"vocab_size": 160, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
}


def random_model(family: str, sizes: dict, seed: int = 0) -> PreTrainedModel:
    """Without biases, and all else random: norms lie around 1, or around 0 where 1 is added to them."""
    torch.manual_seed(seed)
    make = AutoModel if family in ENCODERS else AutoModelForCausalLM
    model = make.from_config(AutoConfig.for_model(family, **sizes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() and re.search("weight|gamma", name):
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
        else:
            nn.init.zeros_(parameter)
    return model


def save(model: PreTrainedModel, folder: Path) -> Weights:
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(f"token {i}" for i in range(160)), encoding="utf-8")
    weights = open_weights(folder)
    weights.require_whole()
    return weights


def heard(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """What goes into a layer and what comes out of it, for one token."""
    found = []

    def keep(_: nn.Module, arguments: tuple, named: dict, out: Tensor | tuple) -> None:
        into = arguments[0] if arguments else named["hidden_states"]
        found.extend(tensor.flatten() for tensor in (into, out[0] if isinstance(out, tuple) else out))

    names = [name for name, _ in model.named_modules() if re.search(rf"(layers?|blocks|h)\.{LAYER}$", name)]
    hook = model.get_submodule(names[0]).register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor([[5]]))
    hook.remove()
    return found[0], found[1]


ACTIVATIONS = (F.gelu, F.silu, F.relu, lambda x: F.gelu(x, approximate="tanh"))
NORMS = (F.layer_norm, F.rms_norm)


def compute(weights: Weights, x: Tensor, norm, activation) -> list[Tensor]:
    """One layer, from its roles: its MLP after attention or beside it, and its norms before them or of sums."""

    def role(name: str) -> Tensor:
        return weights.get(name, LAYER)

    def normed(x: Tensor, name: str) -> Tensor:
        return norm(x, x.shape, role(name)) if weights.has(name, LAYER) else x

    def attend(x: Tensor) -> Tensor:
        heads, kv_heads = weights.heads(LAYER)
        values = (role("v") @ x).view(kv_heads, -1).repeat_interleave(heads // kv_heads, dim=0)
        return normed(role("o") @ values.flatten(), "norm1_after")

    def think(x: Tensor) -> Tensor:
        inner = role("up") @ x
        inner = activation(role("gate") @ x) * inner if weights.has("gate", LAYER) else activation(inner)
        return normed(role("down") @ inner, "norm2_after")

    after = x + attend(normed(x, "norm1"))
    found = [after + think(normed(after, "norm2")), after + think(normed(x, "norm2"))]
    if weights.is_encoder:
        mixed = normed(x + attend(x), "norm2")
        found.append(norm(mixed + think(mixed), x.shape, weights.get("norm_final")))
    return found


@pytest.mark.parametrize("family", [*ENCODERS, *DENSE])
def test_a_layer_from_its_roles_is_that_of_transformers(family, tmp_path):
    model = random_model(family, (ENCODERS | DENSE)[family])
    weights = save(model, tmp_path)
    assert weights.is_encoder == (family in ENCODERS)
    x, wanted = heard(model)
    found = [layer for norm in NORMS for f in ACTIVATIONS for layer in compute(weights, x, norm, f)]
    assert min((each - wanted).abs().max() for each in found) < 2e-3 * wanted.abs().max()


def test_the_first_layer_of_modernbert_meets_the_norm_of_the_embeddings(tmp_path):
    model = random_model("modernbert", BERT)
    assert torch.equal(save(model, tmp_path).get("norm1", 0), model.embeddings.norm.weight)


@pytest.mark.parametrize("family", ["mpnet", "esm", "deberta-v2", "gte"])
def test_tuned_encoders_are_recognised(family, tmp_path):
    model = random_model(family, ENCODERS[family])
    save(model, tmp_path / "a")
    for parameter in model.parameters():
        parameter.data += 0.05 * parameter.std(correction=0) * torch.randn_like(parameter)
    save(model, tmp_path / "b")
    assert compare(tmp_path / "a", tmp_path / "b").verdict == SHARED


PARTS = {  # role -> where it is in a layer
    "aria_text": (
        MIXTURE | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        {
            "gate": lambda layer: layer.mlp.experts.gate_up_proj.mT.chunk(2, dim=1)[0],
            "up": lambda layer: layer.mlp.experts.gate_up_proj.mT.chunk(2, dim=1)[1],
            "down": lambda layer: layer.mlp.experts.down_proj.mT,
        },
    ),
    "axk1": (
        DEEPSEEK | LATENT,
        {
            "norm2": lambda layer: layer.post_attention_layernorm.weight,
            "norm2_after": lambda layer: layer.mlp.post_mlp_layernorm.weight,
        },
    ),
    "granitemoe_swa": (
        MIXTURE,
        {
            "up": lambda layer: layer.block_sparse_moe.experts.gate_up_proj.chunk(2, dim=1)[1],
            "down": lambda layer: layer.block_sparse_moe.experts.down_proj,
            "router": lambda layer: layer.block_sparse_moe.router.weight,
        },
    ),
    "hy_v4": (
        MIXTURE | DEEPSEEK | LATENT | {"index_n_heads": 2, "index_head_dim": 8},
        {"shared_gate": lambda layer: layer.mlp.shared_experts.gate_proj.weight},
    ),
    "laguna": (
        MIXTURE | {"mlp_layer_types": ["dense", "sparse"], "shared_expert_intermediate_size": 16},
        {"router_bias": lambda layer: layer.mlp.gate.e_score_correction_bias},
    ),
    "lfm3": (PLAIN | HYBRID, {"norm1_after": lambda layer: layer.post_operator_norm.weight}),
    "minimax_m3_vl_text": (
        MIXTURE | {"shared_intermediate_size": 16},
        {
            "shared_gate": lambda layer: layer.mlp.shared_experts.gate_up_proj.weight.chunk(2)[0],
            "shared_down": lambda layer: layer.mlp.shared_experts.down_proj.weight,
        },
    ),
}


@pytest.mark.parametrize("family", PARTS)
def test_roles_are_the_parameters_of_transformers(family, tmp_path):
    sizes, roles = PARTS[family]
    model = random_model(family, sizes)
    weights, layer = save(model, tmp_path), model.model.layers[LAYER]
    for role, find in roles.items():
        assert torch.equal(weights.get(role, LAYER), find(layer)), role


def test_latent_queries_that_are_stored_in_another_way_are_refused_by_name(tmp_path):
    model = random_model("axk2", DEEPSEEK | LATENT | {"index_n_heads": 2, "index_head_dim": 8})
    with pytest.raises(CheckpointError, match="has no 'q' in layer 0: found o"):
        save(model, tmp_path)
