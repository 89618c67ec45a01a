"""What serving costs: formulas against counts of what the code does, a cache against Python's own."""

from functools import lru_cache
from itertools import combinations, product

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from minimoe.inspection import record_routing
from minimoe.inspection.serving import (
    cache_bytes,
    changed_by_others,
    distinct_experts,
    distinct_in,
    expert_size,
    hit_rates,
    same_choices,
    step,
)
from minimoe.lineage.derive import quantise
from minimoe.model import MoEConfig, MoEForCausalLM

SHAPE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_experts": 8}
SHAPE |= {"moe_intermediate_size": 48, "intermediate_size": 64, "experts_implementation": "eager"}
LATENT = {"kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
MODELS = {
    "grouped queries": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "tied": {"num_key_value_heads": 1},
    "latents": {**LATENT, "shared_expert_intermediate_size": 16, "mlp_only_layers": (0,), "tie_word_embeddings": False},
    "biases": {"router": "topk_softmax", "moe_bias": True, "attention_sinks": True, "sliding_window": 4},
    "MoGE": {"router": "grouped", "n_group": 2, "router_scale": True, "shared_expert_intermediate_size": 16},
    "dense": {"num_experts": 0},
}


def build(**settings):
    return MoEForCausalLM(MoEConfig(**SHAPE | settings)).eval()


class Read(TorchDispatchMode):
    """Counts the bytes of a model's parameters, and of a cache, that some operation reads, each of them once."""

    VIEWS = ("view", "expand", "unsqueeze", "transpose", "permute", "select", "split", "detach", "alias", "slice", "t.")

    def __init__(self, model, cache=()):
        super().__init__()
        self.stores = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *cache)}
        self.read = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if name.startswith("embedding"):  # which reads rows
            table, ids = args[:2]
            rows = table.data_ptr() + 4 * table.shape[1] * ids.unique()
            self.read |= {(row + 4 * i) for row in rows.tolist() for i in range(table.shape[1])}
        elif not name.startswith(self.VIEWS) and not name.startswith("_unsafe_view"):
            tensors = [
                leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
            ]
            nothing = any(tensor.numel() == 0 for tensor in tensors)  # an expert without tokens
            for tensor in tensors:
                if tensor.untyped_storage().data_ptr() in self.stores and not nothing:
                    self.read |= set(addresses(tensor))
        return func(*args, **(kwargs or {}))


def addresses(tensor):
    """Of every number of a tensor in float32."""
    offsets = torch.zeros(tensor.shape, dtype=torch.int64)
    for axis, stride in enumerate(tensor.stride()):
        index = torch.arange(tensor.shape[axis]) * stride * 4
        offsets += index.view([-1 if i == axis else 1 for i in range(tensor.dim())])
    return (offsets + tensor.data_ptr()).flatten().tolist()


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_a_step_reads_what_the_formula_says(settings):
    """Prefill of two texts, then a step of decoding: every parameter and every number of the cache that is read."""
    model, past = build(**settings), None
    ids = torch.arange(10).view(2, 5)
    for new, seen in ((ids, 0), (torch.tensor([[11], [12]]), 5)):
        held = [tensor for layer in past or () for tensor in layer]
        with torch.no_grad(), Read(model, held) as counted:
            output = model(new, cache=past, use_cache=True, output_router_logits=True)
        chosen = output.router_outputs or ()
        distinct = sum(len(layer.indices.unique()) for layer in chosen) / max(len(chosen), 1)
        cost = step(model.config, sequences=2, new=new.shape[1], past=seen, bits=32, distinct=distinct)
        assert 4 * len(counted.read) == cost.read
        assert cost.cache == sum(tensor.nbytes for tensor in held)
        past = output.cache


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_a_step_computes_what_the_formula_says(settings):
    """torch's own count of products, less those between tokens, which the formula leaves out; it counts vectors too."""
    model = build(**settings | {"hidden_size": 64, "vocab_size": 512})
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(torch.arange(12).view(2, 6))
    of_all = counted.get_flop_counts()["Global"]
    between = sum(flop for operation, flop in of_all.items() if "attention" in str(operation))
    if settings.get(
        "attention_sinks"
    ):  # two products of [heads, 6, 16] and [heads, 16, 6], of two texts and three layers
        between = 2 * 2 * 3 * 4 * 2 * 6 * 6 * 16
    assert sum(of_all.values()) - between == pytest.approx(step(model.config, sequences=2, new=6).flop, rel=0.02)


def test_the_cache_is_as_large_as_the_formula_says():
    for settings in MODELS.values():
        model = build(**settings)
        cache = model(torch.arange(7)[None], use_cache=True).cache
        assert sum(tensor.nbytes for layer in cache for tensor in layer) == cache_bytes(model.config, 7, bits=32)


def test_expert_size_is_what_an_expert_more_adds():
    for settings in (MODELS["grouped queries"], MODELS["biases"]):
        configs = [MoEConfig(**SHAPE | settings | {"num_experts": experts}) for experts in (8, 9)]
        router = configs[0].hidden_size + configs[0].moe_bias
        assert configs[1].num_parameters() - configs[0].num_parameters() == 3 * (expert_size(configs[0]) + router)


def test_few_bits_make_experts_small_and_nothing_else():
    config = build(**MODELS["latents"]).config
    whole, small = step(config, past=9), step(config, past=9, expert_bits=4)
    assert small == whole._replace(experts=whole.experts / 4)
    assert whole.seconds(bandwidth=10, compute=1e30) == whole.read / 10
    assert whole.seconds(bandwidth=1e30, compute=10) == whole.flop / 10


def test_distinct_experts_by_enumeration():
    """All ways in which three tokens can choose two of four experts."""
    ways = product(combinations(range(4), 2), repeat=3)
    counts = [len(set().union(*way)) for way in ways]
    assert distinct_experts(4, 2, 3) == pytest.approx(np.mean(counts))
    assert distinct_experts(64, 8, 1) == 8
    with pytest.raises(ValueError, match="k=5: wanted 1 to num_experts=4"):
        distinct_experts(4, 5, 1)


@pytest.fixture(scope="module")
def trace():
    model = build(router_aux_loss_coef=0.0)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight *= 40
    generator = torch.Generator().manual_seed(0)
    with record_routing(model) as trace:
        model((96 * torch.rand(6, 50, generator=generator) ** 3).long())
    return trace


def test_distinct_experts_of_a_trace(trace):
    """One token touches its K, all together all that are there; between them, the mean over all pairs."""
    assert distinct_in(trace, 1).tolist() == [2, 2, 2]
    assert distinct_in(trace, len(trace), draws=1).tolist() == [len(np.unique(layer)) for layer in trace.indices]
    counts = [
        len({int(expert) for t in pair for expert in trace.indices[1, t]}) for pair in combinations(range(300), 2)
    ]
    assert distinct_in(trace, 2, draws=4000)[1] == pytest.approx(np.mean(counts), abs=0.05)
    with pytest.raises(ValueError, match="tokens=301: wanted 1 to 300"):
        distinct_in(trace, 301)


def test_lru_is_that_of_python(trace):
    for held in (1, 3, 8):
        for rate, layer in zip(hit_rates(trace, held), trace.indices, strict=True):
            ask = lru_cache(maxsize=held)(int)
            for expert in layer.flatten():
                ask(int(expert))
            assert rate == ask.cache_info().hits / layer.size
    assert (hit_rates(trace, 8) == [1 - len(np.unique(layer)) / layer.size for layer in trace.indices]).all()


def test_the_load_aware_cache_by_hand(trace):
    """Of 0 0 1 2 1 with two places: 0 stays, as it was asked for most, and 1 leaves for 2."""
    by_hand = trace.select(np.arange(300) < 5)
    by_hand.indices = np.array([[[0], [0], [1], [2], [1]]], dtype=np.int16)
    by_hand.layers = (0,)
    assert hit_rates(by_hand, 2, "load").tolist() == [1 / 5]
    assert hit_rates(by_hand, 2, "lru").tolist() == [2 / 5]
    for held, policy in ((0, "lru"), (9, "lru"), (2, "fifo")):
        with pytest.raises(ValueError, match="wanted"):
            hit_rates(trace, held, policy)


def test_same_choices(trace):
    assert same_choices(trace, trace).tolist() == [1, 1, 1]
    other = trace.select(np.ones(300, dtype=bool))
    other.indices = (trace.indices + 1) % 8
    expected = [np.mean([len({*a} & {*b}) / 2 for a, b in zip(x, y, strict=True)])
                for x, y in zip(trace.indices, other.indices, strict=True)]  # fmt: skip
    assert same_choices(trace, other) == pytest.approx(expected)
    with pytest.raises(ValueError, match="wanted a trace of the same tokens"):
        same_choices(trace, trace.select(np.arange(300) < 9))


def test_experts_alone_can_be_quantised():
    """Nothing but their matrices changes, by half a step of a row at most."""
    model = build(**MODELS["latents"])
    for bits in (8, 4):
        before, after = model.state_dict(), quantise(model, bits, experts_only=True).state_dict()
        for name, tensor in after.items():
            if ".mlp.experts." in name:
                step_size = before[name].abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
                assert ((tensor - before[name]).abs() <= step_size * 0.5001).all()
                assert not torch.equal(tensor, before[name])
            else:
                assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("rule", [{"router": "topk"}, {"router": "grouped", "n_group": 2}, {"router": "topk_softmax"}])
def test_another_request_changes_mine_only_where_a_capacity_makes_them_compete(rule):
    ids, others = torch.arange(20)[None], torch.full((3, 20), 5)
    assert changed_by_others(build(**rule).double(), ids, others) < 1e-12
    crowded = build(**rule, capacity_factor=0.5).double()
    assert changed_by_others(crowded, ids, others) > 1e-6
