"""Impossible settings are refused by name; parameter counts are those of the model built, and of published models."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimoe.model import Experts, MoEConfig, MoEForCausalLM

LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}


def divisors(number: int) -> st.SearchStrategy[int]:
    return st.sampled_from([d for d in range(1, number + 1) if number % d == 0])


@st.composite
def configs(draw, **fixed) -> MoEConfig:
    """Small models with every optional part present or absent; `fixed` holds the settings of the mixture."""
    heads = draw(st.integers(1, 6))
    layers = draw(st.integers(1, 4))
    return MoEConfig(
        vocab_size=draw(st.integers(1, 50)),
        hidden_size=2 * heads * draw(st.integers(1, 4)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=draw(st.none() | divisors(heads)),
        head_dim=draw(st.sampled_from([None, 2, 6])),
        intermediate_size=draw(st.none() | st.integers(1, 20)),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        attention_output_bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from([None, "head", "full"])),
        attention_sinks=draw(st.booleans()),
        moe_intermediate_size=draw(st.none() | st.integers(1, 20)),
        decoder_sparse_step=draw(st.integers(1, 3)),
        mlp_only_layers=draw(st.lists(st.integers(0, layers - 1), unique=True)),
        **fixed,
    )


@given(data=st.data())
def test_parameter_counts_are_those_of_the_model(router_settings, data):
    check_parameter_counts(data.draw(configs(**router_settings)))


@given(configs(num_experts=0))
def test_parameter_counts_of_a_dense_model(config):
    check_parameter_counts(config)
    assert config.num_parameters(active=True) == config.num_parameters()


@given(configs(num_experts=0), st.none() | st.integers(1, 9))
def test_parameter_counts_of_latent_attention(config, rank):
    others = {"head_dim": None, "num_key_value_heads": None, "qk_norm": None, "attention_sinks": False}
    check_parameter_counts(dataclasses.replace(config, **others, **LATENT, q_lora_rank=rank))


@given(st.integers(1, 12), st.data())
def test_parameter_counts_with_any_number_of_experts(experts, data):
    k, shared = data.draw(st.integers(1, experts)), data.draw(st.integers(0, 5))
    gate = shared > 0 and data.draw(st.booleans())
    check_parameter_counts(
        data.draw(
            configs(
                num_experts=experts,
                num_experts_per_tok=k,
                norm_topk_prob=k > 1,
                shared_expert_intermediate_size=shared,
                shared_expert_gate=gate,
            )
        )
    )


def check_parameter_counts(config: MoEConfig) -> None:
    with torch.device("meta"):
        model = MoEForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    expert_parameters = sum(
        p.numel() for module in model.modules() if isinstance(module, Experts) for p in module.parameters()
    )
    idle = expert_parameters * (config.num_experts - config.num_experts_per_tok) // max(1, config.num_experts)
    assert config.num_parameters() == total
    assert config.num_parameters(active=True) == total - idle


IMPOSSIBLE = [
    ({"vocab_size": 0}, "vocab_size=0: wanted a whole number of at least 1"),
    ({"hidden_size": 96.0}, "hidden_size=96.0: wanted a whole number"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True: wanted a whole number"),
    ({"num_attention_heads": "4"}, "num_attention_heads='4': wanted a whole number"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok=0: wanted a whole number of at least 1"),
    ({"rope_theta": float("nan")}, "rope_theta=nan: wanted a positive number"),
    ({"rope_theta": float("inf")}, "rope_theta=inf: wanted a positive number"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no': wanted True or False"),
    ({"rope_scaling": [1]}, "rope_scaling=.1.: wanted None or a mapping"),
    ({"mlp_only_layers": None}, "mlp_only_layers=None: wanted a list of layers"),
    ({"hidden_size": None}, "hidden_size=None: wanted a whole number of at least 1"),
    ({"router_aux_loss_coef": -0.01}, "router_aux_loss_coef=-0.01: wanted 0 or a positive number"),
    ({"capacity_factor": "1.25"}, "capacity_factor='1.25': wanted None or a positive number"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3: wanted a divisor of num_attention_heads=4"),
    ({"head_dim": 5}, "head_dim=5: wanted an even number"),
    ({"hidden_size": 98, "num_attention_heads": 4}, "hidden_size=98: wanted a multiple of num_attention_heads=4"),
    ({"qk_norm": "layer"}, "qk_norm='layer': wanted one of None, 'head', 'full'"),
    ({"clip_qkv": 0}, "clip_qkv=0: wanted None or a positive number"),
    ({"rope_scaling": {}}, r"rope_scaling\['rope_type'\]=None: wanted one of 'default', 'linear', 'llama3'"),
    ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, r"rope_scaling\['rope_type'\]='su': wanted one of"),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        r"rope_scaling\['original_max_.*'\]=None: wanted a positive",
    ),
    ({"partial_rotary_factor": 0.0}, "partial_rotary_factor=0.0: wanted a number above 0 and at most 1"),
    (
        {"head_dim": 6, "partial_rotary_factor": 0.5},
        "head_dim=6: wanted an even number times partial_rotary_factor=0.5",
    ),
    ({"sliding_window": 0}, "sliding_window=0: wanted a whole number of at least 1"),
    (
        {"layer_types": ["full_attention"]},
        "layer_types=.*: wanted None or a list, with one for each of num_hidden_layers=4",
    ),
    ({"layer_types": ["linear_attention"] * 4}, "layer_types='linear_attention': wanted one of 'full_attention'"),
    ({"layer_types": ["sliding_attention"] * 4}, "sliding_window=None: wanted a number, as layer_types say"),
    ({"v_head_dim": 4}, "v_head_dim=4: wanted None, as kv_lora_rank=None"),
    ({"q_lora_rank": 4}, "q_lora_rank=4: wanted none, as kv_lora_rank=None asks for no latent attention"),
    ({"kv_lora_rank": 4}, "qk_nope_head_dim=None: wanted a whole number, as kv_lora_rank is given"),
    (LATENT | {"qk_rope_head_dim": 3}, "qk_rope_head_dim=3: wanted an even number"),
    (LATENT | {"num_key_value_heads": 2}, "num_key_value_heads=2: wanted num_attention_heads=4, as all heads"),
    (LATENT | {"head_dim": 8}, "head_dim=8: wanted 10, qk_nope_head_dim [+] qk_rope_head_dim"),
    (LATENT | {"qk_norm": "head"}, "qk_norm='head': wanted None with latent attention"),
    ({"router": "hash", "moe_bias": True}, "moe_bias=True: wanted False for router='hash'"),
    ({"swiglu_alpha": 1.5}, "swiglu_alpha=1.5: wanted 1.702, as swiglu_limit=None: it is not read"),
    ({"swiglu_limit": -1.0}, "swiglu_limit=-1.0: wanted None or a positive number"),
    ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\['factor'\]=None: wanted a positive number"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        r"rope_scaling\['original_max_position_embeddings'\]=None: wanted a positive number",
    ),
    (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        r"rope_scaling\['high_freq_factor'\]=4.0: wanted more than low_freq_factor=4.0",
    ),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok=9: wanted at most num_experts=8"),
    ({"mlp_only_layers": [4]}, "mlp_only_layers=4: wanted layers from 0 to 3"),
    ({"shared_expert_gate": True}, "shared_expert_gate=True: wanted False, since shared_expert_intermediate_size=0"),
    ({"experts_implementation": "fast"}, "experts_implementation='fast': wanted one of 'eager', 'sorted', 'grouped'"),
    ({"router": "random"}, "router='random': wanted one of 'topk'"),
    ({"score_func": "relu"}, "score_func='relu': wanted one of 'softmax', 'sigmoid'"),
    ({"n_group": 3}, "n_group=3: wanted a divisor of num_experts=8"),
    ({"n_group": 4, "topk_group": 5}, "topk_group=5: wanted at most n_group=4"),
    (
        {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
        "num_experts_per_tok=3: wanted at most 2, the experts in",
    ),
    ({"router": "grouped", "n_group": 4}, "num_experts_per_tok=2: wanted a multiple of n_group=4"),
    ({"router": "switch"}, "num_experts_per_tok=2: wanted 1 for router='switch'"),
    ({"seq_aux": True}, "seq_aux=True: wanted False, as router_aux_loss_coef=0"),
    ({"router": "hash", "router_aux_loss_coef": 0.01}, "router_aux_loss_coef=0.01: wanted 0 for router='hash'"),
    (
        {"router": "expert_choice", "capacity_factor": 1.0, "router_aux_loss_coef": 0.01},
        "router_aux_loss_coef=0.01: wanted 0 for router='expert_choice'",
    ),
    ({"router": "hash", "score_func": "sigmoid"}, "score_func='sigmoid': wanted 'softmax' for router='hash'"),
    (
        {"router": "topk_softmax", "n_group": 2},
        "n_group=2: wanted 1 for router='topk_softmax'; it is read by topk and grouped",
    ),
    ({"router_scale": True}, "router_scale=True: wanted False for router='topk'; it is read by grouped"),
    (
        {"router": "topk_softmax", "e_score_correction_bias": True},
        "e_score_correction_bias=True: wanted False for router='topk_softmax'; it is read by topk",
    ),
    ({"capacity_factor": 0.0}, "capacity_factor=0.0: wanted None or a positive number"),
    ({"router": "expert_choice"}, "capacity_factor=None: wanted a positive number for router='expert_choice'"),
    (
        {"num_experts_per_tok": 1},
        "norm_topk_prob=True: wanted False for num_experts_per_tok=1: the single weight of a token would always be 1",
    ),
    (
        {"num_experts_per_tok": 1, "router": "topk_softmax"},
        "num_experts_per_tok=1: wanted 2 or more for router='topk_softmax': the single weight of a token",
    ),
]


@pytest.mark.parametrize(("settings", "message"), IMPOSSIBLE, ids=[str(settings) for settings, _ in IMPOSSIBLE])
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MoEConfig(**settings)


@pytest.mark.parametrize("router", ["topk", "topk_softmax", "noisy_topk", "switch", "grouped"])
@pytest.mark.parametrize(("normalised", "k"), [(True, 1), (False, 1), (True, 2)])
def test_a_router_learns_where_the_loss_has_a_gradient_for_it(router, normalised, k):
    """As a published family, whose formula stands, each can be built, and asked."""
    if router == "switch" and k == 2:
        return
    settings = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "num_experts": 4}
    settings |= {"router": router, "norm_topk_prob": normalised, "num_experts_per_tok": k, "initializer_range": 0.5}
    config = MoEConfig(**settings, model_type="mixtral")
    model, ids = MoEForCausalLM(config).double(), torch.arange(20)[None]
    model(ids, labels=ids).loss.backward()
    gradient = model.model.layers[0].mlp.gate.weight.grad.abs().max()
    assert config.router_learns == (gradient > 1e-6)
    assert config.router_learns or gradient < 1e-12


def test_one_expert_alone_leaves_nothing_to_learn():
    assert MoEConfig(num_experts=1, num_experts_per_tok=1).router_learns


def test_what_is_left_out_is_derived():
    config = MoEConfig(hidden_size=64, num_attention_heads=8)
    assert (config.num_key_value_heads, config.head_dim) == (8, 8)
    assert config.intermediate_size == config.moe_intermediate_size == 256
    assert dataclasses.replace(config, head_dim=6).head_dim == 6
    assert MoEConfig(hidden_size=98, num_attention_heads=4, head_dim=6).head_dim == 6


def test_a_configuration_does_not_change():
    config = MoEConfig(mlp_only_layers=[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_experts = 4
    assert config.mlp_only_layers == (1,)
    with pytest.raises(TypeError):
        MoEConfig(1024)  # positions mean nothing in so long a list


def test_which_layers_are_sparse():
    def sparse(**settings) -> list[int]:
        config = MoEConfig(num_hidden_layers=6, **settings)
        return [layer for layer in range(6) if config.is_sparse(layer)]

    assert sparse() == [0, 1, 2, 3, 4, 5]
    assert sparse(num_experts=0) == []
    assert sparse(decoder_sparse_step=2) == [1, 3, 5]
    assert sparse(mlp_only_layers=(0, 3), decoder_sparse_step=2) == [1, 5]
