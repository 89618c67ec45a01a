"""The transformer's parts against slow versions, and what must hold for a model with any router."""

import cmath
import copy
import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minimoe.model import MoEConfig, MoEForCausalLM, MoELayer, routing
from minimoe.model.attention import (
    Attention,
    LatentAttention,
    attend_with_sinks,
    rope_frequencies,
    rotary_angles,
    rotate,
    visible_keys,
)
from minimoe.model.balance import expert_load, load_balancing_loss, router_z_loss
from minimoe.model.layers import MLP, RMSNorm
from tests.rounding import assert_near

# The routers that differ in what they hold and in what they do; the others are variants of these.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN |= {"beta_fast": 8.0, "beta_slow": 1.0, "truncate": True}
LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "num_attention_heads": 4}
GPT_OSS = {"router": "topk_softmax", "moe_bias": True, "attention_sinks": True, "swiglu_limit": 1.0}
GPT_OSS |= {"sliding_window": 3, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
FOUR_ROUTERS = pytest.mark.parametrize(
    "router_settings", ["sigmoid and bias in groups", "noisy", "expert choice", "grouped"], indirect=True
)


def small(**settings) -> MoEConfig:
    """Weights large enough that experts, routes and attention patterns differ."""
    sizes = {
        "vocab_size": 30,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 10,
    }
    return MoEConfig(**sizes | {"num_experts": 6, "initializer_range": 0.5} | settings)


def random_ids(batch: int, length: int, seed: int = 0, vocabulary: int = 30) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


# Norm, positions, attention.


def test_rms_norm():
    norm = RMSNorm(5, eps=1e-3).double()
    norm.weight.data = torch.randn(5, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    wanted = [
        [
            value / math.sqrt(sum(v * v for v in row) / 5 + 1e-3) * w
            for value, w in zip(row, norm.weight.tolist(), strict=True)
        ]
        for row in x.tolist()
    ]
    torch.testing.assert_close(norm(x), torch.tensor(wanted, dtype=torch.float64))


def test_rms_norm_of_half_precision_is_computed_in_float32():
    """The square of 300 is beyond float16."""
    norm = RMSNorm(4, eps=1e-6).half()
    assert norm(torch.full((1, 4), 300.0).half()).tolist() == [[1.0] * 4]


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        YARN,
        YARN | {"truncate": False},
    ],
    ids=["default", "linear", "llama3", "yarn", "yarn, not cut"],
)
def test_rope_frequencies_equal_transformers(scaling):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": 500.0} | (scaling or {})
    theirs = LlamaConfig(hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters=parameters)
    ours = rope_frequencies(MoEConfig(hidden_size=64, head_dim=32, rope_theta=500.0, rope_scaling=scaling))
    torch.testing.assert_close(ours, LlamaRotaryEmbedding(theirs).inv_freq)


def test_latent_attention_is_attention_over_keys_and_values_made_of_the_latents():
    """Which are not made: the cache holds a latent and a rotary key a position, whatever the number of heads."""
    config = MoEConfig(hidden_size=16, rope_theta=50.0, **LATENT)
    attention = LatentAttention(config).double()
    for parameter in attention.parameters():
        parameter.data.normal_(0, 0.5)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    cos, sin = rotary_angles(config, torch.arange(5), x)
    output, (latent, key) = attention(x, cos, sin)
    assert (latent.shape, key.shape) == ((2, 1, 5, 12), (2, 1, 5, 4))
    own, turned = attention.q_proj(x).unflatten(-1, (4, -1)).transpose(1, 2).split([6, 4], dim=-1)
    keys, values = attention.kv_b_proj(latent[:, 0]).unflatten(-1, (4, -1)).transpose(1, 2).split([6, 5], dim=-1)
    q, k = torch.cat([own, rotate(turned, cos, sin)], -1), torch.cat([keys, key.expand(-1, 4, -1, -1)], -1)
    wanted = F.scaled_dot_product_attention(q, k, values, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, attention.o_proj(wanted))


def test_a_sink_takes_attention_and_gives_nothing():
    q, k, v = (torch.randn(2, heads, 5, 6, dtype=torch.float64) for heads in (4, 2, 2))
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    none = torch.full((4,), -torch.inf, dtype=torch.float64)
    torch.testing.assert_close(attend_with_sinks(q, k, v, none, None), plain)
    first = attend_with_sinks(q, k, v, torch.zeros_like(none), None)[
        :, :, 0
    ]  # of one key: e^l / (e^l + 1) of its value
    shared = v[:, :, 0].repeat_interleave(2, dim=1)
    logits = (q[:, :, 0] * k[:, :, 0].repeat_interleave(2, dim=1)).sum(-1, keepdim=True) / 6**0.5
    torch.testing.assert_close(first, logits.sigmoid() * shared)


def test_a_window_is_that_many_keys_the_last_of_which_is_the_query():
    wanted = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    device = torch.device("cpu")
    assert torch.equal(visible_keys(2, 3, None, device, window=3), wanted)
    real = torch.tensor([[True, True, False, True, True]])
    assert torch.equal(visible_keys(2, 3, real, device, window=3)[0, 0], wanted & real)
    assert visible_keys(5, 0, None, device, window=5) is None


def test_rotating_turns_complex_numbers():
    """Dimensions i and i + D/2 are the real and imaginary parts of one number."""
    x = torch.randn(1, 1, 3, 8, dtype=torch.float64)
    angles = torch.randn(3, 4, dtype=torch.float64)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), torch.cat([turned.real, turned.imag], -1))


def slow_attention(attention: Attention, x: numpy.ndarray, config: MoEConfig) -> numpy.ndarray:
    """One sequence [S, H], position by position and head by head."""
    weights = {name: value.detach().numpy() for name, value in attention.named_parameters()}
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def rms(vector, name):
        return vector / numpy.sqrt((vector**2).mean() + config.rms_norm_eps) * weights[f"{name}_norm.weight"]

    def project(position, name):
        vector = weights[f"{name}_proj.weight"] @ x[position] + weights.get(f"{name}_proj.bias", 0)
        if config.qk_norm == "full" and name != "v":
            vector = rms(vector, name)
        if config.clip_qkv:
            vector = numpy.clip(vector, -config.clip_qkv, config.clip_qkv)
        vectors = numpy.split(vector, len(vector) // size)
        if config.qk_norm == "head" and name != "v":
            vectors = [rms(vector, name) for vector in vectors]
        return vectors if name == "v" else [turn(vector, position) for vector in vectors]

    def turn(vector, position):
        half = size // 2
        turned = [
            complex(vector[i], vector[i + half]) * cmath.exp(1j * position * config.rope_theta ** (-2 * i / size))
            for i in range(half)
        ]
        return numpy.array([z.real for z in turned] + [z.imag for z in turned])

    q, k, v = ([project(position, name) for position in range(len(x))] for name in "qkv")
    rows = []
    for position in range(len(x)):
        mixed = []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = [q[position][head] @ k[past][shared] / math.sqrt(size) for past in range(position + 1)]
            powers = numpy.exp(scores)
            mixed.append(sum(p * v[past][shared] for past, p in enumerate(powers / powers.sum())))
        rows.append(weights["o_proj.weight"] @ numpy.concatenate(mixed) + weights.get("o_proj.bias", 0))
    return numpy.stack(rows)


@pytest.mark.parametrize(
    ("kv_heads", "settings"),
    [
        (4, {}),
        (2, {"qk_norm": "head", "head_dim": 6}),
        (1, {"qk_norm": "full", "clip_qkv": 0.8}),
        (2, {"attention_bias": True, "attention_output_bias": True}),
    ],
    ids=["plain", "norm of heads", "norm of all, clipped", "biases"],
)
def test_attention(kv_heads, settings):
    config = MoEConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=kv_heads, rope_theta=50.0, **settings)
    attention = Attention(config).double()
    for parameter in attention.parameters():
        parameter.data.normal_(0, 0.5)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    angles = torch.arange(5.0)[:, None].double() * rope_frequencies(config).double()
    output, _ = attention(x, angles.cos(), angles.sin(), None)
    wanted = numpy.stack([slow_attention(attention, sequence.numpy(), config) for sequence in x])
    torch.testing.assert_close(output, torch.from_numpy(wanted), rtol=1e-5, atol=1e-6)  # float32 frequencies


# The mixture, with every router.


def double_layer(settings: dict, **more) -> MoELayer:
    return MoELayer(small(**settings | more), seed=1).double().eval()


ROUTED_BY = [
    ({"norm_topk_prob": False}, lambda logits, gate: routing.route_topk(logits, 2)),
    ({}, lambda logits, gate: routing.route_topk(logits, 2, norm_topk_prob=True)),
    (
        {"score_func": "sigmoid", "e_score_correction_bias": True, "n_group": 3, "topk_group": 1},
        lambda logits, gate: routing.route_topk(
            logits,
            2,
            score_func="sigmoid",
            norm_topk_prob=True,
            bias=gate.e_score_correction_bias,
            n_group=3,
            topk_group=1,
        ),
    ),
    (
        {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": False},
        lambda logits, gate: routing.route_topk(logits, 2, n_group=2, topk_group=1, routed_scaling_factor=2.5),
    ),
    ({"router": "topk_softmax"}, lambda logits, gate: routing.route_topk_softmax(logits, 2)),
    ({"router": "noisy_topk"}, lambda logits, gate: routing.route_topk_softmax(logits, 2)),
    ({"router": "switch", "num_experts_per_tok": 1}, lambda logits, gate: routing.route_switch(logits)),
    (
        {"router": "expert_choice", "capacity_factor": 0.7},
        lambda logits, gate: routing.route_expert_choice(logits, 2),  # floor(10 tokens * 2 / 6 experts * 0.7)
    ),
    ({"router": "grouped", "n_group": 2}, lambda logits, gate: routing.route_grouped(logits, 2, 2)),
    (
        {"router": "grouped", "n_group": 2, "router_scale": True},
        lambda logits, gate: routing.route_grouped(logits, 2, 2, router_scale=gate.router_scale),
    ),
]


@pytest.mark.parametrize(("settings", "route"), ROUTED_BY, ids=[str(settings) for settings, _ in ROUTED_BY])
def test_the_configuration_names_the_router(settings, route):
    """Every setting reaches the function; the bias and the scales are moved, so that leaving them out shows."""
    layer = double_layer(settings)
    for values in (layer.gate.e_score_correction_bias, layer.gate.router_scale):
        if values is not None:
            values.data = torch.rand(6, dtype=torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    logits = x.flatten(0, 1) @ layer.gate.weight.T
    for found, wanted in zip(layer(x)[1], route(logits, layer.gate), strict=True):
        torch.testing.assert_close(found, wanted)


def test_one_expert_is_a_dense_mlp(router_settings):
    one = {"num_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
    layer = double_layer(
        router_settings, **one, norm_topk_prob=True, shared_expert_intermediate_size=0, shared_expert_gate=False
    )
    mlp = MLP(8, 10).double()
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(mlp, name).weight.data = getattr(layer.experts, name).data[0]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x, random_ids(2, 5))[0], mlp(x))


@pytest.mark.parametrize("router", ["topk", "topk_softmax", "noisy_topk", "switch", "expert_choice"])
def test_relabelling_experts_with_their_router_rows_changes_nothing(router):
    k = 1 if router == "switch" else 3
    settings = {"router": router, "num_experts_per_tok": k}
    layer = double_layer(settings, capacity_factor=1.0 if router in ("switch", "expert_choice") else None)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    before = layer(x)[0]
    order = torch.randperm(6)
    for parameter in [*layer.gate.parameters(), *layer.experts.parameters()]:
        parameter.data = parameter.data[order]
    torch.testing.assert_close(layer(x)[0], before)


@pytest.mark.parametrize("router_settings", ["softmax", "switch with capacity", "expert choice"], indirect=True)
def test_infinite_capacity_equals_none(router_settings):
    """Expert choice always has a capacity: there, E / K lets every expert take every token."""
    none = 6 / 2 if router_settings["router"] == "expert_choice" else None
    free, infinite = (double_layer(router_settings, capacity_factor=factor) for factor in (none, math.inf))
    x, ids = torch.randn(2, 7, 8, dtype=torch.float64), random_ids(2, 7)
    torch.testing.assert_close(free(x, ids)[0], infinite(x, ids)[0])


def test_gradcheck_of_a_layer(router_settings):
    layer = double_layer(router_settings, hidden_size=4, num_attention_heads=1, intermediate_size=3)
    x, ids = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True), random_ids(1, 4)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, values, (x, ids))[0]

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), nondet_tol=1e-9, fast_mode=True)


@pytest.mark.parametrize("gated", [False, True])
def test_shared_expert_is_added(gated):
    settings = {"shared_expert_intermediate_size": 6, "shared_expert_gate": gated}
    layer = double_layer(settings)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    output, chosen = layer(x)
    shared, flat = layer.shared_expert, x[0]
    wanted = (F.silu(flat @ shared.gate_proj.weight.T) * (flat @ shared.up_proj.weight.T)) @ shared.down_proj.weight.T
    if gated:
        wanted = wanted / (1 + (-flat @ layer.shared_expert_gate.weight.T).exp())
    torch.testing.assert_close(output[0] - layer.experts(flat, chosen.indices, chosen.weights), wanted)


def test_a_token_whose_slots_are_all_dropped_passes_by_the_residual_alone():
    config = small(num_hidden_layers=1, router="switch", num_experts_per_tok=1, capacity_factor=0.1)
    model = MoEForCausalLM(config).double()
    output = model(torch.tensor([[3, 3]]), output_router_logits=True)  # the same token twice, and room for one
    block = model.model.layers[0]
    x = model.model.embed_tokens.weight[[3, 3]][None]
    angles = torch.arange(2)[:, None] * rope_frequencies(config)
    x = x + block.self_attn(block.input_layernorm(x), angles.cos().double(), angles.sin().double(), None)[0]
    passed = F.linear(model.model.norm(x), model.model.embed_tokens.weight)
    assert output.router_outputs[0].indices.eq(output.router_outputs[0].indices[0]).all()
    torch.testing.assert_close(output.logits[0, 1], passed[0, 1])
    assert not torch.allclose(output.logits[0, 0], passed[0, 0])


def test_expert_choice_serves_every_expert_equally():
    layer = double_layer({"router": "expert_choice", "capacity_factor": 1.5, "num_experts_per_tok": 2})
    chosen = layer(torch.randn(2, 6, 8, dtype=torch.float64))[1]
    assert expert_load(chosen.indices, 6).tolist() == [6] * 6  # 12 tokens * 2 / 6 experts * 1.5


def test_the_hash_router_sees_tokens_and_nothing_else():
    layer = double_layer({"router": "hash"})
    ids = random_ids(2, 6)
    one, two = (layer(torch.randn(2, 6, 8, dtype=torch.float64), ids)[1] for _ in range(2))
    assert all(map(torch.equal, one, two))
    with pytest.raises(ValueError, match="input_ids=None: wanted the token ids, which router='hash' needs"):
        layer(torch.randn(2, 6, 8, dtype=torch.float64))


# The model, with every router.


def test_editing_a_token_leaves_earlier_logits_alone(router_settings):
    """Expert choice is the exception: there, an earlier token's route depends on a later token."""
    model = MoEForCausalLM(small(**router_settings), seed=2).double().eval()
    ids = random_ids(1, 8)
    before = model(ids).logits
    change = 0.0
    for token in range(30):
        edited = ids.clone()
        edited[0, 5] = token
        after = model(edited).logits
        change = max(change, (after - before)[0, :5].abs().max().item())
        if token != ids[0, 5]:
            assert not torch.allclose(after[0, 5:], before[0, 5:])
    if router_settings["router"] == "expert_choice":
        assert change > 1e-3
    else:
        assert change < 1e-12


def test_capacity_with_second_choices_looks_ahead():
    """A later token's first choice goes before an earlier token's second, so that this router is not causal either."""
    model = MoEForCausalLM(small(capacity_factor=0.5), seed=2).double().eval()
    ids = random_ids(1, 8)
    changes = []
    for token in range(30):
        edited = ids.clone()
        edited[0, 5] = token
        changes.append((model(edited).logits - model(ids).logits)[0, :5].abs().max().item())
    assert max(changes) > 1e-3


@pytest.mark.exact("two calls of one model are compared to the bit")
def test_router_noise_is_on_in_training_only():
    model = MoEForCausalLM(small(router="noisy_topk"))
    ids = random_ids(2, 6)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


@FOUR_ROUTERS
def test_every_implementation_of_the_experts_makes_the_same_model(router_settings):
    """Rows of 8 and 12 float32 numbers are multiples of 16 bytes, as the grouped product wants them.

    Every gradient within 1e-4 of the largest: a sum that nearly cancels keeps the rounding of what it is made of.
    """
    ids, gradients = random_ids(2, 6), []
    for name in ("eager", "sorted", "grouped"):
        model = MoEForCausalLM(small(**router_settings, intermediate_size=12, experts_implementation=name)).eval()
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for wanted, *others in zip(*gradients, strict=True):
        for found in others:
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * max(0.1, float(wanted.abs().max())))


@FOUR_ROUTERS
def test_a_bfloat16_model_routes_in_float32(router_settings):
    """The router's product is taken in float32: it equals that of the rounded numbers, widened."""
    layer = MoELayer(small(**router_settings)).bfloat16().eval()
    assert layer.gate.bfloat16() is layer.gate  # as of any module
    x, ids = torch.randn(2, 6, 8).bfloat16(), random_ids(2, 6)
    output, chosen = layer(x, ids)
    assert output.dtype == torch.bfloat16 and output.isfinite().all()
    assert chosen.logits.dtype == chosen.weights.dtype == torch.float32
    torch.testing.assert_close(chosen.logits, x.flatten(0, 1).float() @ layer.gate.weight.float().T)


@pytest.fixture
def uninitialised_memory_is_nan():
    """`torch.empty` and its kind return NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@FOUR_ROUTERS
def test_no_parameter_is_left_uninitialised(router_settings):
    biases = {"tie_word_embeddings": False, "attention_bias": True, "attention_output_bias": True}
    for extras in ({}, biases | {"qk_norm": "head"}, biases | {"qk_norm": "full"}):
        model = MoEForCausalLM(small(**router_settings, **extras, mlp_only_layers=[0]))
        assert model.model.layers[1].is_sparse and not model.model.layers[0].is_sparse
        layer = MoELayer(small(**router_settings))
        for name, value in [*model.state_dict().items(), *layer.state_dict().items()]:
            assert value.isfinite().all(), name
        assert model(random_ids(1, 3)).logits.isfinite().all()


def test_weights_come_from_the_seed_alone():
    before = torch.random.get_rng_state()
    one, same, other = (MoEForCausalLM(small(router="noisy_topk"), seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


# Cache.


WITH_CACHES = [{}, {"num_key_value_heads": 1, "qk_norm": "head"}, {"num_experts": 0}]
WITH_CACHES += [GPT_OSS, LATENT | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}}]


@pytest.mark.parametrize("settings", WITH_CACHES, ids=str)
def test_prefill_in_chunks_and_steps_equals_one_forward(settings):
    model = MoEForCausalLM(small(**settings)).double().eval()
    ids = random_ids(2, 11)
    whole = model(ids, use_cache=True)
    parts, cache = [], None
    for part in ids.split([4, 3, 1, 1, 2], dim=1):
        output = model(part, cache=cache, use_cache=True)
        parts.append(output.logits)
        cache = output.cache
    assert_near(torch.cat(parts, 1), whole.logits, 1e-10)
    for ours, wanted in zip(cache, whole.cache, strict=True):
        for found, expected in zip(ours, wanted, strict=True):
            assert_near(found, expected, 1e-10)


def test_a_cache_can_be_continued_twice():
    model = MoEForCausalLM(small()).eval()
    start, cache = random_ids(1, 4), model(random_ids(1, 4), use_cache=True).cache
    for seed in (1, 2):
        more = random_ids(1, 3, seed)
        whole = model(torch.cat([start, more], 1)).logits[:, 4:]
        assert_near(model(more, cache=cache).logits, whole)


# Loss.


def test_loss_is_that_of_the_next_token():
    model = MoEForCausalLM(small()).double()
    ids = random_ids(2, 5)
    labels = ids.clone()
    labels[0, 2] = labels[1, 4] = -100
    output = model(ids, labels=labels)
    losses = []
    for row, logits in zip(labels.tolist(), output.logits.tolist(), strict=True):
        for scores, label in zip(logits[:-1], row[1:], strict=True):
            if label != -100:
                losses.append(math.log(sum(map(math.exp, scores))) - scores[label])
    assert len(losses) == 6
    assert output.cross_entropy.item() == pytest.approx(sum(losses) / 6)
    assert output.loss.item() == output.cross_entropy.item()
    assert output.aux_loss is None and output.router_outputs is None


def test_in_training_router_losses_are_added_with_their_coefficients():
    model = MoEForCausalLM(
        small(num_hidden_layers=3, mlp_only_layers=[1], router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    )
    ids = random_ids(2, 5)
    output = model(ids, labels=ids, output_router_logits=True)
    assert len(output.router_outputs) == 2
    aux, z = load_balancing_loss(output.router_outputs), router_z_loss(output.router_outputs)
    torch.testing.assert_close(output.aux_loss, aux)
    torch.testing.assert_close(output.loss, output.cross_entropy + 0.5 * aux + 0.25 * z)
    plain = model(ids, labels=ids)
    torch.testing.assert_close(plain.loss, output.loss)
    assert plain.router_outputs is None
    assert model(ids, output_router_logits=True).loss is None
    for evaluated in (model.eval()(ids, labels=ids), model(ids, labels=ids, output_router_logits=True)):
        assert evaluated.loss.item() == evaluated.cross_entropy.item()
        torch.testing.assert_close(evaluated.cross_entropy, output.cross_entropy)


def test_a_loss_in_each_sequence_is_the_mean_of_the_losses_of_sequences_alone():
    model = MoEForCausalLM(small(router_aux_loss_coef=0.5, seq_aux=True))
    over_the_batch = MoEForCausalLM(small(router_aux_loss_coef=0.5))
    ids = random_ids(3, 7)
    alone = [over_the_batch(row[None], output_router_logits=True).aux_loss for row in ids]
    together = model(ids, output_router_logits=True).aux_loss
    torch.testing.assert_close(together, torch.stack(alone).mean())
    assert not torch.isclose(together, over_the_batch(ids, output_router_logits=True).aux_loss)


def test_the_router_output_is_the_choice_before_any_capacity():
    settings = {"num_experts_per_tok": 1, "router": "switch"}
    free, tight = (MoEForCausalLM(small(**settings, capacity_factor=factor)) for factor in (None, 0.1))
    ids = random_ids(2, 6)
    first = [model(ids, output_router_logits=True).router_outputs[0] for model in (free, tight)]
    assert torch.equal(first[0].indices, first[1].indices)
    for one, other in zip(*first, strict=True):
        assert_near(one, other)
    assert not torch.allclose(free(ids).logits, tight(ids).logits)


def test_a_dense_model_has_no_router_losses():
    ids = random_ids(1, 4)
    output = MoEForCausalLM(small(num_experts=0))(ids, labels=ids, output_router_logits=True)
    assert output.aux_loss is None and output.router_outputs == ()
    assert output.loss.item() == output.cross_entropy.item()


@given(st.integers(1, 3), st.integers(2, 6), st.integers(0, 10))
def test_every_parameter_learns(batch, length, seed):
    """Untied, with a shared expert and its gate: one backward reaches every parameter."""
    config = small(shared_expert_intermediate_size=4, shared_expert_gate=True, tie_word_embeddings=False)
    model = MoEForCausalLM(config)
    ids = random_ids(batch, length, seed)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


# Bad input.


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 30]], r"input_ids holds token id 30: wanted 0 to 29 \(vocab_size - 1\)"),
        ([[0, -1]], "input_ids holds token id -1: wanted 0 to 29"),
        ([0, 1], r"input_ids has shape \(2,\): wanted \[batch >= 1, sequence >= 1\]"),
        (torch.zeros(0, 4, dtype=torch.long), r"input_ids has shape \(0, 4\): wanted"),
    ],
)
def test_impossible_input_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        MoEForCausalLM(small())(torch.as_tensor(ids, dtype=torch.long))


def test_labels_of_another_shape():
    with pytest.raises(ValueError, match=r"labels has shape \(1, 3\): wanted \(1, 4\), that of input_ids"):
        MoEForCausalLM(small())(random_ids(1, 4), labels=random_ids(1, 3))


def test_a_router_weight_that_is_no_number():
    model = MoEForCausalLM(small())
    model.model.layers[1].mlp.gate.weight.data[2, 3] = math.nan
    with pytest.raises(ValueError, match=r"router logits of token 0 are \[.*nan.*\]: wanted finite numbers"):
        model(random_ids(1, 4))


# What others build upon.


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_a_module_that_hooks_and_adapters_see(tied):
    model, ids = MoEForCausalLM(small(tie_word_embeddings=tied)).double(), random_ids(2, 5)
    plain, seen = model(ids).logits, []
    model.lm_head.register_forward_hook(lambda head, inputs, output: seen.append(output))
    hooked = model(ids).logits
    assert_near(hooked, plain)
    assert seen[0] is hooked

    class LowRank(torch.nn.Module):
        """An adapter as libraries make them: it stands in the place of a Linear and calls it."""

        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base, self.a = base, torch.nn.Parameter(torch.randn_like(base.weight))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.a.T

    assert isinstance(model.lm_head, torch.nn.Linear)
    model.lm_head = LowRank(model.lm_head)
    adapted = model(ids, labels=ids)
    assert not torch.allclose(adapted.logits, plain)
    adapted.loss.backward()
    assert model.lm_head.a.grad.any()


def test_a_tied_head_holds_no_weight_and_cannot_come_apart():
    model = MoEForCausalLM(small())
    assert not list(model.lm_head.parameters()) and "lm_head.weight" not in model.state_dict()
    twin = copy.deepcopy(model)
    for changed in (twin, twin.double(), twin.to("meta").to_empty(device="cpu")):
        assert changed.lm_head.weight is changed.model.embed_tokens.weight
        assert changed.lm_head.weight is not model.model.embed_tokens.weight
    model.model.embed_tokens = torch.nn.Embedding(30, 8)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 0
    assert (model(random_ids(1, 3)).logits[..., 7] == 0).all()


def test_the_cache_is_kept_only_when_asked_for():
    model, ids = MoEForCausalLM(small()), random_ids(1, 4)
    assert model(ids).cache is None
    cache = model(ids, use_cache=True).cache
    assert model(ids[:, :1], cache=cache).cache is None
    assert model(ids[:, :1], cache=cache, use_cache=True).cache[0][0].shape[2] == 5


@pytest.mark.parametrize("router_settings", [{"router": "noisy_topk"}, {"router": "switch", "num_experts_per_tok": 1}])
def test_gradient_checkpointing_changes_memory_and_nothing_else(router_settings):
    settings = router_settings | {"router_z_loss_coef": 0.1}
    plain, thrifty = (MoEForCausalLM(small(**settings)).double() for _ in range(2))
    thrifty.gradient_checkpointing_enable()
    kept, losses, ids = [], [], random_ids(2, 40)
    for model in (plain, thrifty):
        torch.manual_seed(0)  # of a noisy router
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = model(ids, labels=ids).loss
        loss.backward()
        kept.append(sum(saved))
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1]) and kept[1] < 0.7 * kept[0]
    for (name, parameter), other in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
    thrifty.gradient_checkpointing_disable()
    assert not thrifty.model.gradient_checkpointing
