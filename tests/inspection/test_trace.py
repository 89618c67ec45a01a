"""Recorded routes, held against what models return, against transformers, and against what the experts computed."""

import dataclasses
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.nn.functional as F
import transformers

from minimoe.inspection import RoutingTrace, record_routing
from minimoe.inspection import trace as trace_module
from minimoe.inspection.trace import DTYPES, ROUTED, TraceError, model_id
from minimoe.model import MoEConfig, MoEForCausalLM

transformers.logging.set_verbosity_error()

VOCAB = 40
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


def tiny(seed: int = 0, **settings) -> MoEForCausalLM:
    defaults = {"num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 3}
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2, "moe_intermediate_size": 8}
    return MoEForCausalLM(MoEConfig(**sizes | defaults | settings, initializer_range=0.3), seed=seed).eval()


def theirs(family: str) -> torch.nn.Module:
    """A small model of transformers, with routers that decide."""
    settings = {"num_local_experts" if family == "mixtral" else "num_experts": 5, "num_experts_per_tok": 2}
    if family in ("qwen2_moe", "qwen3_moe"):
        settings |= {"moe_intermediate_size": 8, "mlp_only_layers": [1]}
    if family in ("qwen2_moe", "olmoe"):
        settings["norm_topk_prob"] = family == "olmoe"  # the other way round than by default
    if family == "qwen2_moe":
        settings["shared_expert_intermediate_size"] = 8
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3}
    config = transformers.AutoConfig.for_model(
        family, **sizes, **settings, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=None
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def some_ids(rows: int = 2, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def record(model: torch.nn.Module, *batches: torch.Tensor, path: Path | None = None) -> RoutingTrace:
    """Batch i is labelled "domain i"."""
    with torch.no_grad(), record_routing(model, path) as trace:
        for number, ids in enumerate(batches):
            trace.label(f"domain {number}")
            model(ids)
    return trace


def assert_equal(a: RoutingTrace, b: RoutingTrace) -> None:
    for name in DTYPES:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    for name in ("domain_names", "layers", "num_experts", "model_id"):
        assert getattr(a, name) == getattr(b, name), name


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- what is recorded


def drop(indices: np.ndarray, capacity: int, experts: int) -> np.ndarray:
    """Brute force: all first choices in order, then all second ones; what finds its expert full becomes `experts`."""
    free, result = [capacity] * experts, np.full_like(indices, experts)
    for slot in range(indices.shape[1]):
        for token in range(len(indices)):
            expert = indices[token, slot]
            if expert < experts and free[expert]:
                free[expert] -= 1
                result[token, slot] = expert
    return result


@pytest.mark.exact("two runs of one model are compared to the bit")
def test_every_router_of_ours(router_settings):
    """The trace is what the model says it chose, less what a capacity drops."""
    check_router(router_settings)
    if router_settings["router"] != "expert_choice":
        check_router(router_settings | {"capacity_factor": 0.6})


def check_router(router_settings: dict) -> None:
    model, ids = tiny(**router_settings, mlp_only_layers=(1,)), some_ids()
    trace = record(model, ids)
    chosen = model(ids, output_router_logits=True).router_outputs
    assert trace.layers == (0, 2)
    assert (len(trace), trace.num_layers, trace.num_experts) == (18, 2, 6)
    factor = model.config.capacity_factor
    for layer, output in enumerate(chosen):
        indices, weights = output.indices.numpy(), output.weights.detach().numpy()
        assert trace.k == indices.shape[1]
        if factor and model.config.router != "expert_choice":
            indices = drop(indices, int(18 * trace.k / 6 * factor), 6)
            assert (indices == 6).any() or factor == 1.0
        np.testing.assert_array_equal(trace.indices[layer], indices)
        np.testing.assert_array_equal(trace.weights[layer], np.where(indices == 6, 0, weights).astype(np.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_transformers(family):
    """The trace is the top k of the router logits that transformers itself returns."""
    model, ids = theirs(family), some_ids()
    trace = record(model, ids)
    logits = model(ids, output_router_logits=True).router_logits
    assert trace.layers == ((0, 2) if family.startswith("qwen") else (0, 1, 2))
    assert (trace.num_experts, trace.k, len(logits)) == (5, 2, trace.num_layers)
    for layer, layer_logits in enumerate(logits):
        weights, indices = layer_logits.float().softmax(-1).topk(2)
        if getattr(model.config, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        np.testing.assert_array_equal(trace.indices[layer], indices.numpy())
        np.testing.assert_allclose(trace.weights[layer], weights.detach().numpy(), rtol=1e-4)
    np.testing.assert_array_equal(trace.token_ids, ids.flatten())


@pytest.mark.parametrize(
    "settings", [{}, {"capacity_factor": 0.6}, {"router": "expert_choice", "capacity_factor": 1.0}]
)
def test_the_layer_computed_what_the_trace_says(settings):
    """The sum over a token's slots of weight * expert(x), from the trace alone, is what the layer put out."""
    model, seen = tiny(num_hidden_layers=1, **settings), []
    layer = model.model.layers[0].mlp
    hook = layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output[0])))
    trace = record(model, some_ids())
    hook.remove()
    x, y = (tensor.flatten(0, 1) for tensor in seen[0])
    for token in range(len(trace)):
        wanted = torch.zeros_like(y[token])
        for expert, weight in zip(trace.indices[0, token], trace.weights[0, token], strict=True):
            if expert < 6:
                gate, up, down = (w[expert] for w in layer.experts.parameters())
                wanted += float(weight) * F.linear(F.silu(F.linear(x[token], gate)) * F.linear(x[token], up), down)
        torch.testing.assert_close(y[token], wanted, rtol=1e-4, atol=1e-5)


def test_tokens_documents_positions_and_labels():
    first, second = some_ids(2, 5), some_ids(1, 3, seed=1)
    model = tiny()
    with record_routing(model) as trace:
        model(second)  # before any label
        trace.label(["code", "prose"])
        model(first)
        trace.label("code")
        model(input_ids=second)
        trace.label([None])
        model(second)
    pieces = (second, first, second, second)
    np.testing.assert_array_equal(trace.token_ids, torch.cat([ids.flatten() for ids in pieces]))
    assert trace.documents.tolist() == [0] * 3 + [1] * 5 + [2] * 5 + [3] * 3 + [4] * 3
    assert trace.positions.tolist() == [0, 1, 2, *range(5), *range(5), 0, 1, 2, 0, 1, 2]
    assert trace.domain_names == ("code", "prose")
    assert trace.domains.tolist() == [-1] * 3 + [0] * 5 + [1] * 5 + [0] * 3 + [-1] * 3
    assert {name: getattr(trace, name).dtype for name in DTYPES} == DTYPES
    assert "19 tokens" in repr(trace)
    other = dataclasses.replace(trace, documents=trace.documents + 1)  # a trace like any other now
    np.testing.assert_array_equal(other.documents - 1, trace.documents)


def test_documents_that_come_in_pieces():
    model = tiny()
    with record_routing(model) as trace:
        trace.label("a", documents=["x", "y"])
        model(some_ids(2, 2))
        trace.label("a", documents=["y", "z"])
        model(some_ids(2, 2))
        trace.label("a")
        model(some_ids(1, 2))
    assert trace.documents.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 3, 3]
    assert trace.positions.tolist() == [0, 1] * 5


def test_labels_that_do_not_fit_the_batch():
    model = tiny()
    for documents in (["x"], ["x", "y", "z"]):
        with pytest.raises(ValueError, match="documents: wanted 2"), record_routing(model) as trace:
            trace.label("a", documents=documents)
            model(some_ids(2))
    with pytest.raises(ValueError, match="3 domains: wanted 2"), record_routing(model) as trace:
        trace.label(["a", "b", "c"])
        model(some_ids(2))


# --- caches and padding


def by_document(trace: RoutingTrace) -> np.ndarray:
    """The order that puts each document's tokens together."""
    return np.lexsort((trace.positions, trace.documents))


@pytest.mark.parametrize("make", [tiny, lambda: theirs("mixtral"), lambda: theirs("qwen2_moe")])
def test_generate_makes_one_document_a_row(make):
    """What was recorded token by token is what one forward over the finished text records."""
    model, ids = make(), some_ids(2, 4)
    with record_routing(model) as trace:
        text = model.generate(ids, max_new_tokens=5)
        model.generate(ids[:1], max_new_tokens=3)  # begins another document
    assert trace.documents.max() == 2
    whole = record(model, text[:, :-1])  # the model has not seen the last token
    two = trace.select(trace.documents < 2)
    order = by_document(two)
    for name in ("token_ids", "positions", "documents"):
        np.testing.assert_array_equal(getattr(two, name)[order], getattr(whole, name), err_msg=name)
    np.testing.assert_array_equal(two.indices[:, order], whole.indices)
    np.testing.assert_allclose(two.weights[:, order], whole.weights, rtol=1e-3, atol=1e-5)


def test_a_cache_of_text_that_was_not_recorded():
    model, ids = tiny(), some_ids()
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match=r"2 rows of 9 tokens.* 0 rows of 0"), record_routing(model):
        model(ids[:, :1], cache=cache)
    with pytest.raises(ValueError, match=r"2 rows of 9 tokens.* 2 rows of 4"), record_routing(model):
        model(ids[:, :4])
        model(ids[:, :1], cache=cache)


def test_padding_is_left_out():
    """A text that is padded on the left has the trace that it has alone, in a forward and in generate()."""
    model = theirs("mixtral")
    short, long = some_ids(1, 4), some_ids(1, 7, seed=1)
    ids = torch.cat([F.pad(short, (3, 0)), long])
    mask = (ids != 0).long()
    with record_routing(model) as trace:
        model.generate(ids, attention_mask=mask, max_new_tokens=3)
    with record_routing(model) as alone:
        model.generate(short, max_new_tokens=3)
        model.generate(long, max_new_tokens=3)
    assert len(trace) == 4 + 7 + 2 * 2
    order, order_alone = by_document(trace), by_document(alone)
    for name in ("token_ids", "positions", "documents"):
        np.testing.assert_array_equal(getattr(trace, name)[order], getattr(alone, name)[order_alone], err_msg=name)
    np.testing.assert_array_equal(trace.indices[:, order], alone.indices[:, order_alone])


def test_a_mask_that_does_not_tell_the_padding():
    model, ids = theirs("mixtral"), some_ids()
    with pytest.raises(ValueError, match=r"attention_mask: found \(2, 1, 9, 9\)"), record_routing(model):
        model(ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))


# --- the model is left alone


@pytest.mark.exact("two runs of one model are compared to the bit")
@pytest.mark.parametrize("training", [False, True])
def test_recording_changes_nothing(training):
    model, ids = tiny(router="noisy_topk").train(training), some_ids()

    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()  # forgets the gradients, rather than to fill them with 0
        output = model(ids, labels=ids, output_router_logits=True)
        output.loss.backward()
        return [
            output.logits,
            *(p.grad for p in model.parameters() if p.grad is not None),
            *(o.indices for o in output.router_outputs),
        ]

    before = run()
    with record_routing(model) as trace:
        within = run()
    for tensors in (within, run()):
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    np.testing.assert_array_equal(trace.indices, torch.stack(within[-3:]))  # the noise is in the trace
    assert hooks(model) == 0


def test_an_exception_leaves_the_model_and_no_trace(tmp_path):
    model, ids, path = tiny(), some_ids(), tmp_path / "routes"
    record(model, ids, path=path)
    old = path.read_bytes()
    with pytest.raises(KeyError), record_routing(model, path) as trace:
        model(ids)
        with pytest.raises(AttributeError, match="indices: a trace has its fields once"):
            _ = trace.indices
        raise KeyError("mine")
    assert hooks(model) == 0
    with pytest.raises(AttributeError, match="num_layers: a trace has its fields once"):
        _ = trace.num_layers
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.exact("two runs of one model are compared to the bit")
def test_a_forward_that_fails_is_not_recorded():
    model, ids = tiny(), some_ids()
    hook = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with record_routing(model) as trace:
        with pytest.raises(ZeroDivisionError):
            model(ids)
        hook.remove()
        model(ids)
    with record_routing(model) as undisturbed:
        model(ids)
    assert_equal(trace, undisturbed)


@pytest.mark.exact("two runs of one model are compared to the bit")
def test_nested_recordings():
    model, ids, other = tiny(), some_ids(), some_ids(seed=1)
    with record_routing(model) as outer:
        outer.label("domain 0")
        model(ids)
        with record_routing(model) as inner:
            inner.label("domain 0")
            outer.label("domain 1")
            model(other)
    assert_equal(outer, record(model, ids, other))
    assert_equal(inner, record(model, other))


def test_a_model_that_changes_within_the_block():
    model, ids = tiny(), some_ids()
    with pytest.raises(TraceError, match="weights of the model changed"), record_routing(model):
        model(ids, labels=ids).loss.backward()
        torch.optim.SGD(model.parameters(), 0.1).step()


# --- on disk


@pytest.mark.exact("two runs of one model are compared to the bit")
def test_streaming_gives_the_same_trace(tmp_path):
    model, batches = tiny(capacity_factor=1.0), [some_ids(seed=seed, length=3 + seed) for seed in range(4)]
    path = tmp_path / "new" / "routes"
    streamed = record(model, *batches, path=path)
    assert isinstance(streamed, RoutingTrace)
    assert_equal(streamed, record(model, *batches))
    assert_equal(streamed, RoutingTrace.load(path))
    assert list(path.parent.iterdir()) == [path]


def test_streaming_holds_one_forward(tmp_path):
    """Of 80 forwards of the same size a streamed recording holds one at a time, another holds all."""
    model, ids, forwards = tiny(num_hidden_layers=2, hidden_size=4), some_ids(4, 256), 80
    peaks = []
    for path in (tmp_path / "routes", None):
        tracemalloc.start()
        trace = record(model, *[ids] * forwards, path=path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        size = sum(getattr(trace, name).nbytes for name in DTYPES)
        del trace
    assert size == 80 * 1024 * (2 * 2 * 6 + 14)
    streamed, held = peaks
    assert held > size
    assert streamed < size / 4


def test_save_and_load(tmp_path):
    trace = record(tiny(capacity_factor=0.5), some_ids(), some_ids(1, 5))
    path = tmp_path / "folder" / "routes.safetensors"
    trace.save(path)
    loaded = RoutingTrace.load(path)
    assert_equal(loaded, trace)
    loaded.save(path)  # onto the file that it is mapped from
    assert_equal(RoutingTrace.load(path), loaded)
    assert list(path.parent.iterdir()) == [path]
    assert loaded != trace and len({loaded, trace, loaded}) == 2  # each is itself alone, and can be a key


def test_the_file_is_a_safetensors_file(tmp_path):
    trace = record(tiny(), some_ids())
    trace.save(tmp_path / "routes")
    arrays = safetensors.numpy.load_file(tmp_path / "routes")
    assert set(arrays) == set(DTYPES)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, getattr(trace, name))


def test_loading_reads_nothing_but_the_header(tmp_path):
    path, tokens = tmp_path / "routes", 10**6
    zeros = {name: np.zeros((1, tokens, 2) if name in ROUTED else tokens, dtype) for name, dtype in DTYPES.items()}
    RoutingTrace(**zeros, domain_names=("a",), layers=(0,), num_experts=2, model_id="").save(path)
    tracemalloc.start()
    loaded = RoutingTrace.load(path)
    assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 100
    tracemalloc.stop()
    assert all(getattr(loaded, name).flags.aligned for name in DTYPES)


def test_select():
    trace = record(tiny(), some_ids(), some_ids(seed=1))
    assert_equal(trace.select("domain 1"), trace.select(trace.documents >= 2))
    assert trace.select("domain 1").token_ids.tolist() == some_ids(seed=1).flatten().tolist()
    np.testing.assert_array_equal(trace.select("domain 1").indices, trace.indices[:, 18:])
    with pytest.raises(TraceError, match=r"no domain 'x': wanted one of \('domain 0', 'domain 1'\)"):
        trace.select("x")
    with pytest.raises(TraceError, match="none of them 0"):
        trace.select(trace.documents > 99)


# --- what goes wrong


def test_a_file_cut_short(tmp_path):
    path = tmp_path / "routes"
    record(tiny(), some_ids(), path=path)
    whole = path.read_bytes()
    for kept in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(TraceError, match=f"routes: these {kept} bytes"):
            RoutingTrace.load(path)


def test_files_that_are_no_trace(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        RoutingTrace.load(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError, match="found a folder"), record_routing(tiny(), tmp_path):
        pass
    tiny().save_pretrained(tmp_path)
    with pytest.raises(TraceError, match=r"found format and version .*, wanted \('minimoe routing trace', '1'\)"):
        RoutingTrace.load(tmp_path / "model.safetensors")


def test_a_trace_of_another_version(tmp_path, monkeypatch):
    trace = record(tiny(), some_ids())
    monkeypatch.setattr(trace_module, "VERSION", "2")
    trace.save(tmp_path / "routes")
    monkeypatch.undo()
    with pytest.raises(TraceError, match=r"found .*'2'\), wanted .*'1'\)"):
        RoutingTrace.load(tmp_path / "routes")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "routes"
    old = record(tiny(), some_ids(), path=path)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        record(tiny(seed=1), some_ids(), path=path)
    assert_equal(RoutingTrace.load(path), old)
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_that_is_killed_leaves_the_old_file(tmp_path):
    """And nothing else: neither half a trace, nor the scratch files."""
    path = tmp_path / "routes"
    old = record(tiny(), some_ids(), path=path)
    program = """
import os, signal, sys, torch
from minimoe.inspection import record_routing
from minimoe.model import MoEConfig, MoEForCausalLM
model = MoEForCausalLM(MoEConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
with record_routing(model, sys.argv[1]):
    for _ in range(20):
        model(torch.zeros(4, 128, dtype=torch.int64))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run([sys.executable, "-c", program, str(path)], cwd=root)
    assert killed.returncode == -signal.SIGKILL
    assert_equal(RoutingTrace.load(path), old)
    assert list(tmp_path.iterdir()) == [path]


def test_model_id_is_that_of_the_weights(tmp_path):
    model = tiny()
    trace = record(model, some_ids())
    model.save_pretrained(tmp_path)
    same = [model, MoEForCausalLM.from_pretrained(tmp_path), model.to(torch.float64)]
    assert {model_id(each) for each in same} == {trace.model_id}
    assert model_id(tiny(seed=1)) != trace.model_id


def test_model_id_sees_every_tensor_and_setting():
    """Also those away from the router: a model fine-tuned with its routers frozen is another model."""
    model = tiny(capacity_factor=1.0, vocab_size=20000)  # the embedding is larger than the sample that is taken of it
    ids = {model_id(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter[-1] += 0.01  # the last row, the last expert
        ids.add(model_id(model))
    ids |= {model_id(tiny(norm_topk_prob=value)) for value in (True, False)}
    assert len(ids) == 1 + len(list(model.parameters())) + 2


def test_models_and_calls_that_cannot_be_recorded():
    with pytest.raises(ValueError, match="MoEForCausalLM has no layer with"), record_routing(tiny(num_experts=0)):
        pass
    with pytest.raises(ValueError, match="Linear has no layer with"), record_routing(torch.nn.Linear(2, 2)):
        pass
    model = theirs("mixtral")
    with pytest.raises(ValueError, match="input_ids=None"), record_routing(model):
        model(inputs_embeds=torch.zeros(1, 2, 16))
    with pytest.raises(TraceError, match="the model was not called"), record_routing(model):
        model.model(some_ids())  # the decoder alone


def test_experts_that_were_bypassed():
    """Were a layer to run its experts otherwise than by calling them, the trace would lack them: an error instead."""
    model = tiny(num_hidden_layers=2)
    experts = model.model.layers[1].mlp.experts
    with pytest.raises(TraceError, match=r"\{0: 18\}, but the batch has \{0: 18, 1: 18\}"), record_routing(model):
        model(some_ids())
        experts.__class__ = type("Fused", (type(experts),), {"__call__": lambda self, *args: self.forward(*args)})
        model(some_ids())


def test_arrays_that_do_not_belong_together():
    trace = record(tiny(), some_ids())
    arrays = trace._arrays() | trace._facts()
    with pytest.raises(TraceError, match=r"weights: found float64 \(3, 18, 2\), wanted float32 \(3, 18, 2\)"):
        RoutingTrace(**arrays | {"weights": trace.weights.astype(float)})
    with pytest.raises(TraceError, match=r"domains: found int16 \(17,\), wanted int16 \(18,\)"):
        RoutingTrace(**arrays | {"domains": trace.domains[1:]})
    with pytest.raises(TraceError, match=r"weights: found float32 \(3, 18, 2\), wanted float32 \(2, 18, 2\)"):
        RoutingTrace(**arrays | {"layers": (0, 1)})
