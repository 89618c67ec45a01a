"""Derivations against what they should be: computed again by hand, or equal to something known."""

from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from minimoe.lineage.derive import (
    Derivation,
    average,
    depth_upscale,
    extend_vocabulary,
    lerp,
    neurons,
    prune_heads,
    prune_layers,
    prune_neurons,
    quantise,
    set_neurons,
    slerp,
    ties,
)
from minimoe.model import Experts, MoEConfig, MoEForCausalLM
from minimoe.model.attention import rotary_angles
from minimoe.model.layers import MLP

IDS = torch.tensor([[3, 17, 0, 22, 3, 8, 11], [1, 1, 5, 20, 9, 2, 4]])
DENSE = {"num_experts": 0, "tie_word_embeddings": False, "attention_bias": True, "attention_output_bias": True}
KINDS = {
    "dense": DENSE | {"qk_norm": "head"},
    "mixture": {"num_experts": 3, "shared_expert_intermediate_size": 4, "shared_expert_gate": True, "qk_norm": "full"},
    "every second layer": {"num_experts": 3, "decoder_sparse_step": 2, "e_score_correction_bias": True},
    "pangu": {"num_experts": 4, "router": "grouped", "n_group": 2, "router_scale": True} | DENSE | {"num_experts": 4},
}


def random_model(seed: int = 0, **settings) -> MoEForCausalLM:
    """Float64, every weight away from what an initialisation would give."""
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 10, "moe_intermediate_size": 6}
    model = MoEForCausalLM(MoEConfig(**sizes | settings)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(1.0 if "norm" in name or "scale" in name else 0.0, 0.4, generator=generator)
    return model


@pytest.fixture(params=KINDS)
def settings(request) -> dict:
    return KINDS[request.param]


@torch.no_grad()
def logits(model: MoEForCausalLM, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).logits


def assert_same(a: MoEForCausalLM, b: MoEForCausalLM, **tolerance) -> None:
    assert a.config == b.config
    assert_close(dict(a.state_dict()), dict(b.state_dict()), **tolerance)


def vector(model: MoEForCausalLM) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def test_a_derivation_is_a_fact():
    made = Derivation(parents=("a", "b"), recipe="lerp, t = 0.5", seed=0, tokens=0, function_unchanged=False)
    with pytest.raises(FrozenInstanceError):
        made.tokens = 1


# Each derivation, on any model, given a second and a third model of its shape.
DERIVATIONS = {
    "average": lambda a, b, c: average([a, b, c]),
    "lerp": lambda a, b, c: lerp(a, b, 0.3),
    "slerp": lambda a, b, c: slerp(a, b, 0.3),
    "ties": lambda a, b, c: ties(a, [b, c], density=0.5),
    "prune_neurons": lambda a, b, c: prune_neurons(a, 1.0),
    "prune_heads": lambda a, b, c: prune_heads(a, a.config.num_key_value_heads),
    "prune_layers": lambda a, b, c: prune_layers(a, [1]),
    "depth_upscale": lambda a, b, c: depth_upscale(a, 1),
    "extend_vocabulary": lambda a, b, c: extend_vocabulary(a, 2),
    "quantise": lambda a, b, c: quantise(a, 8),
}


@pytest.mark.parametrize("name", DERIVATIONS)
def test_the_result_is_new_and_the_inputs_stay(name, tmp_path):
    for kind in KINDS.values():
        models = [random_model(seed, **kind).train() for seed in range(3)]
        before = [vector(model).clone() for model in models]
        made = DERIVATIONS[name](*models)
        assert not made.training
        assert all(parameter.requires_grad and parameter.dtype == torch.float64 for parameter in made.parameters())
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.fill_(7.0)
        for model, old in zip(models, before, strict=True):
            assert model.training
            assert torch.equal(vector(model), old)
        made.save_pretrained(tmp_path)
        assert_same(MoEForCausalLM.from_pretrained(tmp_path), made)
    halves = [model.bfloat16() for model in models]
    assert {parameter.dtype for parameter in DERIVATIONS[name](*halves).parameters()} == {torch.bfloat16}


# --- merging ----------------------------------------------------------------------------------------------


def test_merges_against_arithmetic(settings):
    a, b = random_model(1, **settings), random_model(2, **settings)
    for merge in (lerp, slerp):
        assert_same(merge(a, b, 0.0), a)
        assert_same(merge(a, b, 1.0), b)
    assert_close(vector(lerp(a, b, 0.3)), 0.7 * vector(a) + 0.3 * vector(b))
    assert_close(vector(average([a, b, b])), (vector(a) + 2 * vector(b)) / 3)


def scaled(model: MoEForCausalLM, factor: float) -> MoEForCausalLM:
    other = MoEForCausalLM(model.config).double().eval()
    other.load_state_dict({name: factor * tensor for name, tensor in model.state_dict().items()})
    return other


def test_slerp_of_parallel_opposite_and_zero_tensors_is_lerp(settings):
    a = random_model(**settings)
    for factor in (3.0, 0.0, -2.0):
        b = scaled(a, factor)
        assert_same(slerp(a, b, 0.4), lerp(a, b, 0.4))


def test_slerp_keeps_the_norm_and_turns_at_constant_speed():
    a, b = random_model(1, num_experts=3), random_model(2, num_experts=3)
    start, end = (model.model.layers[0].mlp.experts.up_proj[1] for model in (a, b))
    with torch.no_grad():
        end *= start.norm() / end.norm()

    def expert(t: float) -> torch.Tensor:
        return slerp(a, b, t).model.layers[0].mlp.experts.up_proj[1].detach().flatten()

    def angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cosine_similarity(x, y, dim=0).acos()

    path = [expert(t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert_close(torch.stack([point.norm() for point in path]), path[0].norm().expand(5))
    steps = torch.stack([angle(x, y) for x, y in pairwise(path)])
    assert_close(steps, (angle(path[0], path[-1]) / 4).expand(4))


def moved(base: MoEForCausalLM, by: torch.Tensor) -> MoEForCausalLM:
    """`base` with a task vector added."""
    other = MoEForCausalLM(base.config).double().eval()
    pieces = (vector(base) + by).split([tensor.numel() for tensor in base.state_dict().values()])
    shaped = zip(base.state_dict().items(), pieces, strict=True)
    other.load_state_dict({name: piece.view_as(tensor) for (name, tensor), piece in shaped})
    return other


def test_ties_adds_task_vectors_that_do_not_meet(settings):
    base = random_model(**settings)
    noise = torch.randn(2, len(vector(base)), dtype=torch.float64)
    noise[0, ::2], noise[1, 1::2] = 0, 0
    merged = ties(base, [moved(base, noise[0]), moved(base, noise[1])], density=1.0)
    assert_close(vector(merged), vector(base) + noise.sum(0))


def test_ties_against_a_slow_version():
    base = random_model(num_experts=0)
    size = len(vector(base))
    tasks = torch.randn(3, size, dtype=torch.float64)
    found = vector(ties(base, [moved(base, task) for task in tasks], density=0.3, weight=0.7)) - vector(base)
    trimmed = []
    for task in tasks.tolist():
        kept = set(sorted(range(size), key=lambda i, task=task: -abs(task[i]))[: round(0.3 * size)])
        trimmed.append([task[i] if i in kept else 0.0 for i in range(size)])
    expected = []
    for numbers in zip(*trimmed, strict=True):
        elected = [number for number in numbers if number * sum(numbers) > 0]
        expected.append(0.7 * sum(elected) / len(elected) if elected else 0.0)
    assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_merging_refuses_what_does_not_fit():
    a, b = random_model(**DENSE), random_model(**DENSE | {"rope_theta": 500.0})
    deeper = random_model(**DENSE | {"num_hidden_layers": 5})
    for merge in (
        lambda x: lerp(a, x, 0.5),
        lambda x: slerp(a, x, 0.5),
        lambda x: ties(a, [x]),
        lambda x: average([a, x]),
    ):
        with pytest.raises(ValueError, match="rope_theta=500"):
            merge(b)
        with pytest.raises(ValueError, match="num_hidden_layers=5"):
            merge(deeper)
    renamed = random_model(**DENSE | {"model_type": "llama", "router_aux_loss_coef": 0.1})
    assert_same(lerp(a, renamed, 0.5), a)
    for density in (0.0, 1.1):
        with pytest.raises(ValueError, match=rf"density={density}: wanted above 0 and at most 1"):
            ties(a, [a], density=density)
    for merge in (average, lambda models: ties(a, models)):
        with pytest.raises(ValueError, match=r"models=\[\]: wanted at least one"):
            merge([])


# --- width ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["gate", "up", "down"])
@pytest.mark.parametrize("kind", ["mixture", "every second layer"])
def test_pruned_neurons_are_those_that_add_nothing(where, kind):
    """Half of the neurons of each MLP are silenced, at random places: without them, the logits are the same."""
    model, heard = random_model(**KINDS[kind]), []
    for block in model.model.layers:
        mixture = block.is_sparse
        for mlp in filter(None, [block.mlp.experts, block.mlp.shared_expert] if mixture else [block.mlp]):
            rows = neurons(mlp)
            silent = torch.rand(rows.shape[:-2]).argsort(-1) < rows.shape[-3] // 2
            rows[..., ("gate", "up", "down").index(where), :][silent] = 0
            set_neurons(mlp, rows)
            heard.append(rows[~silent])
    pruned = prune_neurons(model, 0.5)
    mlps = [module for module in pruned.modules() if isinstance(module, MLP | Experts)]
    for mlp, rows in zip(mlps, heard, strict=True):
        assert torch.equal(neurons(mlp).view_as(rows), rows)  # in their old order
    config = pruned.config
    assert (config.intermediate_size, config.moe_intermediate_size) == (5, 3)
    assert config.shared_expert_intermediate_size == model.config.shared_expert_intermediate_size // 2
    assert pruned.config.num_parameters() == sum(parameter.numel() for parameter in pruned.parameters())
    assert_close(logits(pruned), logits(model), rtol=0, atol=1e-10)


def test_neurons_of_an_mlp_are_its_terms():
    mlp = random_model(num_experts=0).model.layers[0].mlp
    x = torch.randn(16, dtype=torch.float64)
    terms = [F.silu(gate @ x) * (up @ x) * down for gate, up, down in neurons(mlp)]
    assert_close(sum(terms), mlp(x).detach())
    experts = random_model(num_experts=3).model.layers[0].mlp.experts
    assert_close(neurons(experts)[1, 2, 2], experts.down_proj[1, :, 2].detach())


@pytest.mark.parametrize("kind", ["dense", "every second layer", "pangu"])
def test_pruned_heads_are_those_that_add_nothing(kind):
    """One key-value head of each layer is silenced, in its values or outputs: without it, the logits are the same."""
    model = random_model(**KINDS[kind])
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            attention, silent = block.self_attn, layer // 2
            if layer % 2:
                attention.o_proj.weight.view(16, 2, 8)[:, silent] = 0
                continue
            attention.v_proj.weight.view(2, 4, 16)[silent] = 0
            if attention.v_proj.bias is not None:
                attention.v_proj.bias.view(2, 4)[silent] = 0
    pruned = prune_heads(model, 1)
    assert (pruned.config.num_attention_heads, pruned.config.num_key_value_heads, pruned.config.head_dim) == (2, 1, 4)
    assert_close(logits(pruned), logits(model), rtol=0, atol=1e-10)


def test_pruned_heads_keep_their_part_of_a_norm_over_all_heads():
    model = random_model(qk_norm="full")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[:4] = 0
    old, new = (each.model.layers[1].self_attn for each in (model, prune_heads(model, 1)))
    for name, kept in {
        "q_norm": slice(8, 16),
        "k_norm": slice(4, 8),
        "q_proj": slice(8, 16),
        "k_proj": slice(4, 8),
    }.items():
        assert torch.equal(getattr(new, name).weight, getattr(old, name).weight[kept])
    assert torch.equal(new.o_proj.weight, old.o_proj.weight[:, 8:])


def test_prune_refuses_what_is_not_there():
    model = random_model(**DENSE)
    for keep in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"keep={keep}: wanted above 0 and at most 1"):
            prune_neurons(model, keep)
    for heads in (0, 3):
        with pytest.raises(ValueError, match=f"num_key_value_heads={heads}: wanted 1 to 2"):
            prune_heads(model, heads)


# --- depth ------------------------------------------------------------------------------------------------


@torch.no_grad()
def run_layers(model: MoEForCausalLM, order: list[int]) -> torch.Tensor:
    """The logits when these blocks run one after the other, by hand."""
    x = model.model.embed_tokens(IDS)
    cos, sin = rotary_angles(model.config, torch.arange(IDS.shape[1]), x)
    for layer in order:
        x = model.model.layers[layer](x, IDS, cos, sin, None)[0]
    head = model.lm_head
    return model.model.norm(x) @ head.weight.T


def test_pruned_layers_are_not_run(settings):
    model = random_model(**settings)
    for removed in ([0], [3], [1, 2], (0, 2, 3)):
        kept = [layer for layer in range(4) if layer not in removed]
        pruned = prune_layers(model, removed)
        assert pruned.config.num_hidden_layers == len(kept)
        assert_close(logits(pruned), run_layers(model, kept), rtol=0, atol=1e-10)


def test_windows_and_sinks_go_along_with_layers_and_heads():
    kinds = ("sliding_attention", "full_attention", "full_attention", "sliding_attention")
    model = random_model(num_experts=0, sliding_window=3, layer_types=kinds, attention_sinks=True)
    assert prune_layers(model, [1]).config.layer_types == (kinds[0], *kinds[2:])
    model.model.layers[0].self_attn.v_proj.weight.data[:4] *= 1e-3  # of the first group, which goes
    pruned = prune_heads(model, 1).model.layers[0].self_attn
    assert torch.equal(pruned.sinks, model.model.layers[0].self_attn.sinks[2:])


def test_latent_attention_has_no_heads_to_prune():
    latent = {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4}
    model = random_model(num_experts=0, num_key_value_heads=4, **latent)
    with pytest.raises(ValueError, match="kv_lora_rank=6: wanted None for prune_heads"):
        prune_heads(model, 1)


def test_depth_upscaling_stacks_two_copies_less_the_seam(settings):
    model = random_model(**settings)
    for removed, order in enumerate([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 1, 2, 3], [0, 1, 2, 3], [0, 3]]):
        deeper = depth_upscale(model, removed)
        assert deeper.config.num_hidden_layers == len(order)
        assert_close(logits(deeper), run_layers(model, order), rtol=0, atol=1e-10)


def test_the_copies_of_a_layer_can_be_trained_apart():
    deeper = depth_upscale(random_model(num_experts=0), 0)
    first, second = (deeper.model.layers[layer].mlp.up_proj.weight for layer in (0, 4))
    assert torch.equal(first, second)
    with torch.no_grad():
        first.zero_()
    assert second.any()


def test_layers_that_are_not_there():
    model = random_model(num_experts=0)
    for layers in ([4], [-1], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match=r"layers=\[.*\]: wanted some, but not all, of 0 to 3"):
            prune_layers(model, layers)
    for removed in (-1, 4):
        with pytest.raises(ValueError, match=f"removed={removed}: wanted 0 to 3"):
            depth_upscale(model, removed)


# --- vocabulary, precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_old_tokens_keep_their_logits_and_new_ones_get_some_like_theirs(tied):
    model = random_model(num_experts=0, vocab_size=400, tie_word_embeddings=tied)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] += 5
    larger = extend_vocabulary(model, 600, seed=3)
    assert larger.config.vocab_size == 1000
    assert_close(logits(larger)[..., :400], logits(model), rtol=0, atol=1e-10)
    for name in ["model.embed_tokens.weight", "lm_head.weight"][: 1 if tied else 2]:
        old, new = model.state_dict()[name], larger.state_dict()[name][400:]
        assert_close(new.mean(0), old.mean(0), rtol=0, atol=5 * 0.4 * (1 / 400 + 1 / 600) ** 0.5)
        assert_close(new.std(0), old.std(0), rtol=0.2, atol=0)
    assert logits(larger, torch.tensor([[999, 400]])).isfinite().all()
    assert_same(extend_vocabulary(model, 600, seed=3), larger)
    assert not torch.equal(vector(extend_vocabulary(model, 600, seed=4)), vector(larger))
    with pytest.raises(ValueError, match="new_tokens=0: wanted at least 1"):
        extend_vocabulary(model, 0)


UNTOUCHED = ("embed_tokens", "lm_head", "norm", "bias", ".mlp.gate.", "shared_expert_gate")


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_few_and_near(bits, settings):
    model = random_model(**settings)
    after = quantise(model, bits).state_dict()
    touched = 0
    for name, weight in model.state_dict().items():
        if any(part in name for part in UNTOUCHED):
            assert torch.equal(after[name], weight), name
            continue
        touched += 1
        step = weight.abs().amax(-1, keepdim=True) / (127 if bits == 8 else 7)
        assert ((after[name] - weight).abs() <= step / 2 + 1e-12).all(), name
        assert_close(after[name] / step, (after[name] / step).round(), rtol=0, atol=1e-9)
        assert_close(after[name].abs().amax(-1), weight.abs().amax(-1))  # the largest of a row is hit exactly
    assert touched >= 7 * 4


def test_quantising_twice_changes_no_more():
    once = quantise(random_model(num_experts=3), 4)
    assert_same(quantise(once, 4), once)


def test_quantising_leaves_a_row_of_zeros_and_refuses_other_widths():
    model = random_model(num_experts=0)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[2] = 0
    assert not quantise(model, 8).model.layers[0].mlp.up_proj.weight[2].any()
    for bits in (1, 9, 4.5):
        with pytest.raises(ValueError, match=f"bits={bits}: wanted a whole number from 2 to 8"):
            quantise(model, bits)
