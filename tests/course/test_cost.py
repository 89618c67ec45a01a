"""What training costs by the formula, and what torch counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minimoe.course.cost import training_flop
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.training.presets import small_config

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
CONFIGS = {
    "tied": small_config(),
    "untied": MoEConfig(**SHAPE, num_experts=16, num_experts_per_tok=4, tie_word_embeddings=False),
    "shared expert, few keys": MoEConfig(
        **SHAPE, num_key_value_heads=2, num_experts=64, moe_intermediate_size=16, shared_expert_intermediate_size=32
    ),
}


def counted(config, ids):
    """The matrix products of one real forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        MoEForCausalLM(config)(ids, labels=ids).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_formula_agrees_with_what_torch_counts(config):
    assert counted(config, torch.arange(8)[None]) == pytest.approx(training_flop(config, 8), rel=5e-3)


def test_what_the_formula_leaves_out_is_attentions_comparing():
    """Counted with attention as two matrix products, each S x S x head_dim for each head, forwards and twice back."""
    config, ids = small_config(), torch.zeros(2, 32, dtype=torch.int64)
    counts = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            counts.append(counted(config, ids))
    per_token = 12 * 32 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert counts[1] - counts[0] == per_token * ids.numel()
