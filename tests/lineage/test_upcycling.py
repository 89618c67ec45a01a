"""Upcycled mixtures against the dense model they come from, against transformers, and against the formulas."""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch
import transformers
from torch.testing import assert_close

from minimoe.inspection.trace import record_routing
from minimoe.lineage.derive import average, lerp
from minimoe.lineage.upcycling import METHODS, branch_train_mix, transplant_expert, upcycle
from minimoe.model import MoEConfig, MoEForCausalLM
from tests.rounding import SLACK

IDS = torch.tensor([[3, 17, 0, 22, 3, 8, 11], [1, 1, 5, 20, 9, 2, 4]])
TARGETS = ("mixtral", "qwen2_moe", "pangu_pro_moe")
SIZES = {"num_experts": 8, "num_experts_per_tok": 4}
# How each method is asked for here, and what makes it exact in each family: see the head of upcycling.py.
ARGUMENTS = {"copy": {}, "split": {"granularity": 2}, "virtual_groups": {"granularity": 2}, "drop": {}}
EXACT = [("copy", "mixtral", None), ("copy", "mixtral", 0.0), ("copy", "qwen2_moe", None)]
EXACT += [("virtual_groups", "mixtral", None), ("virtual_groups", "qwen2_moe", None)]
EXACT += [(method, family, None) for method in ("copy", "virtual_groups") for family in ("glm4_moe", "deepseek_v3")]
EXACT += [("copy", "pangu_pro_moe", 0.0), ("virtual_groups", "pangu_pro_moe", 0.0)]


LATENT = {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4}
LATENT |= {"num_key_value_heads": 4, "rope_interleave": True}


def dense_model(seed: int = 0, **settings) -> MoEForCausalLM:
    """Float64, norms away from 1 and biases away from 0."""
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 24, "initializer_range": 0.3, "num_experts": 0}
    model = MoEForCausalLM(MoEConfig(**sizes | settings)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model


@torch.no_grad()
def logits(model: MoEForCausalLM) -> torch.Tensor:
    return model(IDS).logits


def vector(model: MoEForCausalLM) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def load_in_transformers(folder):
    """In float64, which only its eager experts can do."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    )


def mixture(model: MoEForCausalLM, layer: int = 0):
    return model.model.layers[layer].mlp


# --- the function -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "model_type", "router_std"), EXACT)
def test_the_function_is_unchanged(method, model_type, router_std, tmp_path):
    latent = LATENT if model_type == "deepseek_v3" else {}
    dense = dense_model(
        attention_bias=model_type in ("qwen2_moe", "pangu_pro_moe"), tie_word_embeddings=False, **latent
    )
    model = upcycle(dense, **SIZES, method=method, model_type=model_type, router_std=router_std, **ARGUMENTS[method])
    assert_close(logits(model), logits(dense), rtol=0, atol=1e-10)
    model.save_pretrained(tmp_path)
    back = MoEForCausalLM.from_pretrained(tmp_path)
    assert back.config.model_type == model_type
    assert_close(logits(back), logits(model), rtol=0, atol=1e-10)


@pytest.mark.parametrize("model_type", TARGETS)
def test_virtual_groups_of_every_size(model_type):
    dense = dense_model()
    settings = {"model_type": model_type, "router_std": 0.0 if model_type == "pangu_pro_moe" else None}
    for granularity in (1, 2, 4):
        model = upcycle(dense, **SIZES, method="virtual_groups", granularity=granularity, **settings)
        routed = 24 - model.config.shared_expert_intermediate_size
        assert model.config.moe_intermediate_size == routed // granularity
        assert_close(logits(model), logits(dense), rtol=0, atol=1e-10)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("method", ["copy", "virtual_groups"])
def test_the_function_is_unchanged_in_transformers(method, model_type, tmp_path):
    """To 1e-6 in float64: transformers computes its routers in float32."""
    dense = dense_model(**LATENT if model_type == "deepseek_v3" else {})
    shape = {"routed_scaling_factor": 2.5, "mlp_only_layers": (0,)}
    shape |= {"n_group": 2, "topk_group": 1} if method == "copy" else {}  # virtual groups are others
    settings = ARGUMENTS[method] | (shape if model_type == "deepseek_v3" else {})
    upcycle(dense, **SIZES, method=method, model_type=model_type, **settings).save_pretrained(tmp_path)
    theirs = load_in_transformers(tmp_path)
    assert theirs.config.model_type == model_type
    with torch.no_grad():
        assert_close(theirs(IDS).logits, logits(dense), rtol=0, atol=1e-6 * SLACK * float(logits(dense).abs().max()))


def test_deepseek_v3_wants_latent_attention_and_no_limit():
    with pytest.raises(ValueError, match="kv_lora_rank=None: wanted a number for model_type='deepseek_v3'"):
        upcycle(dense_model(), **SIZES, model_type="deepseek_v3")
    with pytest.raises(ValueError, match=r"swiglu_limit=7\.0: wanted None"):
        upcycle(dense_model(), **SIZES, model_type="minimoe", swiglu_limit=7.0)


def test_what_is_said_to_change_the_function_does():
    dense = dense_model()
    cases = [(method, model_type, {}) for method in ("split", "drop") for model_type in ("mixtral", "qwen2_moe")]
    cases += [("copy", model_type, {"noise": 0.1}) for model_type in TARGETS]
    cases += [("copy", "pangu_pro_moe", {}), ("virtual_groups", "pangu_pro_moe", {})]
    cases += [("copy", "qwen2_moe", {"norm_topk_prob": False})]
    for method, model_type, settings in cases:
        model = upcycle(dense, **SIZES, method=method, model_type=model_type, **ARGUMENTS[method], **settings)
        assert (logits(model) - logits(dense)).abs().max() > 1e-3, (method, model_type, settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_topk_prob": False},
        {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
        {"score_func": "sigmoid", "norm_topk_prob": False, "e_score_correction_bias": True},
        {"router": "topk_softmax"},
        {"router": "switch", "num_experts_per_tok": 1},
        {"router": "grouped", "n_group": 2},
        {"decoder_sparse_step": 2},
    ],
    ids=str,
)
def test_weights_of_any_sum_are_undone_where_the_router_has_no_preference(settings):
    dense = dense_model()
    model = upcycle(dense, **SIZES | settings, model_type="minimoe", router_std=0.0)
    assert_close(logits(model), logits(dense), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("method", "model_type"), [*zip(METHODS, (*TARGETS, "qwen2_moe"), strict=True)])
def test_everything_is_new_seeded_and_kept_in_its_dtype(method, model_type):
    dense = dense_model().train()
    before = vector(dense).clone()
    make = {**SIZES, "method": method, "model_type": model_type, **ARGUMENTS[method], "noise": 0.1}
    model = upcycle(dense, **make, seed=5)
    assert torch.equal(vector(upcycle(dense, **make, seed=5)), vector(model))
    assert not torch.equal(vector(upcycle(dense, **make, seed=6)), vector(model))
    assert not model.training
    assert model.config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert dense.training
    assert torch.equal(vector(dense), before)
    half = upcycle(dense.half(), **make)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


def test_one_seed_gives_one_router_whatever_becomes_of_the_experts():
    dense = dense_model()
    plain, noisy = (upcycle(dense, **SIZES, noise=noise, seed=3) for noise in (0.0, 0.1))
    assert torch.equal(mixture(plain).gate.weight, mixture(noisy).gate.weight)
    assert not torch.equal(mixture(plain, 0).gate.weight, mixture(plain, 1).gate.weight)
    std = upcycle(dense, num_experts=256, num_experts_per_tok=2, router_std=0.05)
    assert_close(mixture(std).gate.weight.std(), torch.tensor(0.05, dtype=torch.float64), rtol=0.1, atol=0)


# --- the experts ------------------------------------------------------------------------------------------


def rows(mlp) -> torch.Tensor:
    """Gate, up and down of each neuron side by side, [I, 3 * H]."""
    return torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T], dim=1).detach()


def expert_rows(layer, expert: int) -> torch.Tensor:
    gate, up, down = (getattr(layer.experts, f"{name}_proj")[expert] for name in ("gate", "up", "down"))
    return torch.cat([gate, up, down.T], dim=1).detach()


def test_where_the_neurons_go():
    """qwen2_moe: the first half to the shared expert, doubled against its gate; the others to the routed experts."""
    dense = dense_model()
    whole = rows(mixture(dense))
    layer = mixture(upcycle(dense, **SIZES, method="virtual_groups", granularity=2, model_type="qwen2_moe"))
    shared, double = rows(layer.shared_expert), torch.tensor([1.0, 1.0, 2.0]).repeat_interleave(16)
    assert torch.equal(shared, whole[:12] * double)
    assert not layer.shared_expert_gate.weight.any()
    for expert in range(8):
        first = 12 if expert < 4 else 18  # slice expert // (E / G)
        assert_close(expert_rows(layer, expert), whole[first : first + 6] * double)


def test_a_pangu_undoes_its_weights_in_the_router_scale():
    dense = dense_model()
    layer = mixture(upcycle(dense, **SIZES, model_type="pangu_pro_moe"))
    assert torch.equal(rows(layer.shared_expert), rows(mixture(dense))[:12])
    assert torch.equal(expert_rows(layer, 5), rows(mixture(dense))[12:])
    assert_close(layer.gate.router_scale.detach(), torch.full((8,), 8 / 4, dtype=torch.float64))


def test_split_shuffles_each_copy_and_loses_no_neuron():
    dense = dense_model()
    layer = mixture(upcycle(dense, **SIZES, method="split"))  # granularity K = 4: two copies, slices of 6
    undo = torch.tensor([1.0, 1.0, 0.25]).repeat_interleave(16)
    orders = []
    for copy in (0, 1):
        found = torch.cat([expert_rows(layer, piece * 2 + copy) for piece in range(4)]) * undo
        order = torch.cdist(found, rows(mixture(dense))).argmin(1)
        assert_close(found, rows(mixture(dense))[order])
        assert sorted(order.tolist()) == list(range(24))
        orders.append(order.tolist())
    assert orders[0] != orders[1] != list(range(24))


@pytest.mark.parametrize("model_type", ["mixtral", "pangu_pro_moe"])
def test_every_token_of_virtual_groups_meets_every_slice_equally_often(model_type):
    model = upcycle(dense_model(), **SIZES, method="virtual_groups", granularity=2, model_type=model_type)
    gate = mixture(model).gate.weight
    assert torch.equal(gate[:4], gate[4:])
    assert len(gate.unique(dim=0)) == 4
    with torch.no_grad(), record_routing(model) as trace:
        model(IDS)
    slices = torch.as_tensor(trace.indices) // 4
    assert (slices.sort(-1).values == torch.tensor([0, 0, 1, 1])).all()
    assert len(torch.as_tensor(trace.indices).flatten().unique()) > 4  # and not the same experts each time


def test_drop_replaces_its_share_of_the_neurons():
    dense = dense_model()
    for ratio in (0.0, 0.25, 0.5, 0.9, 1.0):
        layer = mixture(upcycle(dense, **SIZES, method="drop", drop_ratio=ratio))
        kept = torch.stack([(expert_rows(layer, expert) == rows(mixture(dense))) for expert in range(8)])
        assert torch.equal(kept.all(-1), kept.any(-1))  # whole neurons: gate, up and down
        assert (kept.all(-1).sum(-1) == 24 - round(24 * ratio)).all()
        assert len(kept.all(-1).unique(dim=0)) > 1 or ratio in (0, 1)  # others in each expert


def test_what_drop_draws_has_the_mean_and_spread_of_what_it_replaces():
    dense = dense_model(hidden_size=64, intermediate_size=400)
    with torch.no_grad():
        for number, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            getattr(mixture(dense), name).weight.mul_(2.0**number).add_(number)
    layer = mixture(upcycle(dense, num_experts=2, num_experts_per_tok=1, method="drop"))
    for number, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        old, new = getattr(mixture(dense), name).weight, getattr(layer.experts, name)[0]
        drawn = new[new != old]
        assert len(drawn) == 200 * 64
        assert abs(drawn.mean() - number) < 0.05 * 2**number
        assert abs(drawn.std() - 0.3 * 2**number) < 0.02 * 2**number


def test_noise_is_in_standard_deviations_of_each_projection():
    dense = dense_model(hidden_size=64, intermediate_size=100)
    with torch.no_grad():
        mixture(dense).up_proj.weight.mul_(10)
    plain, noisy = (mixture(upcycle(dense, **SIZES, noise=noise)) for noise in (0.0, 0.2))
    for name in ("gate_proj", "up_proj", "down_proj"):
        old, new = getattr(plain.experts, name), getattr(noisy.experts, name)
        assert_close((new - old).std() / old.std(), torch.tensor(0.2, dtype=torch.float64), rtol=0.03, atol=0)
        assert len((new - old).flatten(1).unique(dim=0)) == 8  # other noise in each expert


# --- several parents, one expert --------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_branch_train_mix_of_one_model_is_that_model(model_type):
    dense = dense_model()
    model = branch_train_mix([dense] * 4, num_experts_per_tok=2, model_type=model_type)
    assert_close(logits(model), logits(dense), rtol=0, atol=1e-10)


def test_branch_train_mix_puts_every_parent_in_its_place(tmp_path):
    parents = [dense_model(seed) for seed in range(3)]
    model = branch_train_mix(parents, num_experts_per_tok=2, seed=1)
    assert model.config.num_experts == 3
    for layer in range(2):
        for expert, parent in enumerate(parents):
            assert torch.equal(expert_rows(mixture(model, layer), expert), rows(mixture(parent, layer)))
    mean = average(parents).state_dict()
    outside = {name: tensor for name, tensor in model.state_dict().items() if ".mlp." not in name}
    assert_close(outside, {name: mean[name] for name in outside})
    assert len(outside) == len([name for name in mean if ".mlp." not in name])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs = load_in_transformers(tmp_path)(IDS).logits
    assert_close(theirs, logits(model), rtol=0, atol=1e-6 * SLACK * float(theirs.abs().max()))


def test_branch_train_mix_averages_the_shared_expert():
    parents = [dense_model(seed) for seed in range(2)]
    layer = mixture(branch_train_mix(parents, num_experts_per_tok=1, model_type="pangu_pro_moe"))
    expected = rows(mixture(lerp(*parents, 0.5)))[:12]
    assert_close(rows(layer.shared_expert), expected)
    assert torch.equal(expert_rows(layer, 1), rows(mixture(parents[1]))[12:])


@pytest.mark.parametrize("donor_expert", [None, 2])
def test_a_transplanted_expert_answers_as_it_did_at_home(donor_expert):
    model = upcycle(dense_model(), **SIZES)
    donor = dense_model(7) if donor_expert is None else upcycle(dense_model(7), **SIZES, method="drop")
    before = vector(model).clone()
    changed = transplant_expert(model, donor, layer=0, expert=3, donor_layer=1, donor_expert=donor_expert)
    assert torch.equal(vector(model), before)
    x = torch.randn(5, 16, dtype=torch.float64)
    only = torch.full((5, 1), 3), torch.ones(5, 1, dtype=torch.float64)
    home = mixture(donor, 1)
    there = (torch.full((5, 1), 2), only[1])
    expected = home(x) if donor_expert is None else home.experts(x, *there)
    assert_close(mixture(changed).experts(x, *only), expected)
    others = [expert for expert in range(8) if expert != 3]
    for name in ("gate_proj", "up_proj", "down_proj"):
        new, old = (getattr(mixture(each).experts, name)[others] for each in (changed, model))
        assert torch.equal(new, old)
    rest = [name for name in model.state_dict() if "layers.0.mlp.experts" not in name]
    assert all(torch.equal(changed.state_dict()[name], model.state_dict()[name]) for name in rest)


# --- what is refused --------------------------------------------------------------------------------------


REFUSED = [
    ({"method": "clone"}, "method='clone'"),
    ({"method": "copy", "granularity": 2}, "granularity=2: wanted None"),
    ({"method": "split", "granularity": 3}, "granularity=3.*num_experts=8"),
    ({"method": "split", "granularity": 0}, "granularity=0"),
    ({"method": "virtual_groups", "granularity": 8}, "granularity=8.*num_experts_per_tok=4"),
    ({"method": "split", "model_type": "qwen2_moe", "granularity": 8}, "granularity=8.*12"),
    ({"method": "virtual_groups", "router_std": 0.0}, "router_std=0"),
    ({"method": "virtual_groups", "model_type": "minimoe", "n_group": 2, "topk_group": 2}, "router='topk', n_group=2"),
    ({"method": "drop", "drop_ratio": 1.5}, r"drop_ratio=1\.5"),
    ({"method": "copy", "drop_ratio": 0.5}, r"drop_ratio=0\.5"),
    ({"noise": -1.0}, "noise=-1"),
    ({"router_std": -1.0}, "router_std=-1"),
    ({"model_type": "gpt"}, "model_type='gpt'"),
    ({"model_type": "llama"}, "model_type='llama'"),
    ({"norm_topk_prob": False}, "norm_topk_prob=False"),
    ({"model_type": "minimoe", "router": "hash"}, "router='hash'"),
    ({"model_type": "qwen2_moe", "shared_expert_intermediate_size": 24}, "shared_expert_intermediate_size=24"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
]


def test_what_cannot_be_upcycled():
    dense = dense_model()
    for arguments, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            upcycle(dense, **SIZES | arguments)
    with pytest.raises(TypeError, match="moe_intermediate_size"):  # it follows from others
        upcycle(dense, **SIZES, moe_intermediate_size=4)
    with pytest.raises(ValueError, match="attention_bias=True"):  # mixtral has no place for one
        upcycle(dense_model(attention_bias=True), **SIZES)


def test_only_dense_models_are_upcycled():
    model = upcycle(dense_model(), **SIZES)
    with pytest.raises(ValueError, match="num_experts of dense=8"):
        upcycle(model, **SIZES)
    with pytest.raises(ValueError, match=r"num_experts of parents\[1\]=8"):
        branch_train_mix([dense_model(), model], num_experts_per_tok=1)
    with pytest.raises(ValueError, match=r"models=\[\]"):
        branch_train_mix([], num_experts_per_tok=1)
    with pytest.raises(ValueError, match="intermediate_size=20"):
        branch_train_mix([dense_model(), dense_model(intermediate_size=20)], num_experts_per_tok=1)


def test_what_cannot_be_transplanted():
    dense, model = dense_model(), upcycle(dense_model(), **SIZES)
    for arguments, message in [
        ({"layer": 2}, "^layer=2: wanted 0 to 1"),
        ({"expert": 8}, "^expert=8: wanted 0 to 7"),
        ({"expert": -1}, "^expert=-1: wanted 0 to 7"),
        ({"donor_layer": 5}, "^donor_layer=5: wanted 0 to 1"),
        ({"donor_expert": 1}, "^donor_expert=1: wanted None"),
        ({"donor": model}, "^donor_expert=None: wanted 0 to 7"),
        ({"model": dense}, "^expert=0: wanted None"),
        ({"donor": dense_model(intermediate_size=20)}, r"width and hidden_size .*=\[20, 16\]: wanted \[24, 16\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            transplant_expert(**{"model": model, "donor": dense, "layer": 0, "expert": 0} | arguments)
