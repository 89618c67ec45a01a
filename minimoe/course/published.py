"""Real models as configurations of the kit: their shapes as published, so that their parameters can be counted."""

from __future__ import annotations

from typing import NamedTuple

from minimoe.model import MoEConfig


class RealModel(NamedTuple):
    """A published model, and where its shape was published."""

    config: MoEConfig
    source: str


_UNTIED = {"tie_word_embeddings": False}

# DeepSeek-V3 (latent attention) and gpt-oss (biases in its experts) have parts that MoEConfig does not describe.
REAL_MODELS = {
    "Qwen2.5-14B": RealModel(
        MoEConfig(
            **_UNTIED,
            vocab_size=152064,
            hidden_size=5120,
            num_hidden_layers=48,
            num_attention_heads=40,
            num_key_value_heads=8,
            intermediate_size=13824,
            attention_bias=True,
            num_experts=0,
        ),
        "model configuration",
    ),
    "OLMoE-1B-7B": RealModel(
        MoEConfig(
            **_UNTIED,
            vocab_size=50304,
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=16,
            qk_norm="full",
            num_experts=64,
            num_experts_per_tok=8,
            moe_intermediate_size=1024,
            norm_topk_prob=False,
        ),
        "model configuration",
    ),
    "Qwen1.5-MoE-A2.7B": RealModel(
        MoEConfig(
            **_UNTIED,
            vocab_size=151936,
            hidden_size=2048,
            num_hidden_layers=24,
            num_attention_heads=16,
            attention_bias=True,
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            shared_expert_gate=True,
            norm_topk_prob=False,
        ),
        "model configuration",
    ),
    "Qwen3-30B-A3B": RealModel(
        MoEConfig(
            **_UNTIED,
            vocab_size=151936,
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            qk_norm="head",
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        "model configuration",
    ),
    "Mixtral-8x7B": RealModel(
        MoEConfig(
            **_UNTIED,
            vocab_size=32000,
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=14336,
        ),
        "arXiv 2401.04088",
    ),
    "Pangu Pro MoE": RealModel(
        MoEConfig(
            **_UNTIED,
            vocab_size=153376,
            hidden_size=5120,
            num_hidden_layers=48,
            num_attention_heads=40,
            num_key_value_heads=8,
            attention_bias=True,
            attention_output_bias=True,
            num_experts=64,
            num_experts_per_tok=8,
            moe_intermediate_size=1344,
            shared_expert_intermediate_size=5376,
            router="grouped",
            n_group=8,
            norm_topk_prob=False,
            router_scale=True,
        ),
        "arXiv 2505.21411",
    ),
}
