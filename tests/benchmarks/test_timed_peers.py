"""The benchmarks run, report what they measured, and refuse to time peers that disagree."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import decode, moe_layer, timing, train_step
from minimoe.model import MoEConfig, MoEForCausalLM
from tests.rounding import assert_near

SMALL = moe_layer.Size(tokens=32, hidden=16, width=8, experts=4, k=2)
MANY = moe_layer.Size(tokens=32, hidden=16, width=8, experts=32, k=4)
SMALL_CONFIG = MoEConfig(
    vocab_size=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    router_aux_loss_coef=0.01,
)


@pytest.fixture
def tiny(monkeypatch):
    """Sizes that take milliseconds."""
    monkeypatch.setattr(moe_layer, "SIZES", (SMALL, MANY))
    monkeypatch.setattr(train_step, "CONFIG", SMALL_CONFIG)
    monkeypatch.setattr(train_step, "BATCH", 2)
    monkeypatch.setattr(train_step, "LENGTH", 8)
    monkeypatch.setattr(decode, "CONFIG", SMALL_CONFIG)
    monkeypatch.setattr(decode, "PROMPT", 4)
    monkeypatch.setattr(decode, "NEW", 3)


@pytest.mark.exact("times and prints; results are compared in other tests")
@pytest.mark.parametrize("benchmark, sizes, peers", [(moe_layer, 2, 7), (train_step, 1, 3), (decode, 4, 3)])
def test_benchmark_prints_a_table_and_writes_every_time(benchmark, sizes, peers, tiny, tmp_path, capsys):
    file = tmp_path / "results.json"
    threads_before = torch.get_num_threads()
    benchmark.main(["--rounds", "2", "--threads", "1", "2", "--json", str(file)])

    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["measured_with"]["torch"] == torch.__version__
    assert sorted(result["threads"] for result in document["results"]) == [1] * sizes + [2] * sizes
    printed = capsys.readouterr().out
    for result in document["results"]:
        assert len(result["seconds"]) == peers
        for peer, seconds in result["seconds"].items():
            assert len(seconds) == 2
            assert min(seconds) > 0 or result.get("part") == "decode"  # a difference of two times, tiny here
            assert f"{1000 * result['median_seconds'][peer]:.2f}" in printed
        for target in result["targets"]:
            both_ratios = result["speed_against"][target["peer"]].values()
            assert target["found"] == min(both_ratios)
            assert target["reached"] == all(ratio >= target["wanted"] for ratio in both_ratios)
    verdicts = [target["reached"] for result in document["results"] for target in result["targets"]]
    assert printed.count("  reached ") == sum(verdicts)
    assert printed.count("  NOT REACHED ") == len(verdicts) - sum(verdicts)
    assert torch.get_num_threads() == threads_before


def test_commands_name_a_bad_number_of_rounds(capsys):
    for benchmark in (moe_layer, train_step, decode):
        for rounds in ("0", "-1", "2.5", "many"):
            with pytest.raises(SystemExit, match="2"):
                benchmark.main([f"--rounds={rounds}"])
            assert f"--rounds: {rounds!r}: wanted a whole number of at least 1" in capsys.readouterr().err


def test_peers_of_a_layer_agree_and_one_that_computes_something_else_is_named():
    moe_layer.assert_same_results(moe_layer.layer_peers(MANY, moe_layer.make_problem(MANY)))
    peers = moe_layer.layer_peers(SMALL, moe_layer.make_problem(SMALL))
    moe_layer.assert_same_results(peers)
    honest = peers["transformers eager"]()
    for place, tensor in enumerate(["output", "d hidden_states", "d weights", "d gate", "d up", "d down"]):
        wrong = [result * 1.001 if number == place else result for number, result in enumerate(honest)]
        with pytest.raises(AssertionError, match=f"transformers eager, {tensor}:"):
            moe_layer.assert_same_results(peers | {"transformers eager": lambda wrong=wrong: tuple(wrong)})


class MultiplyAdds(TorchDispatchMode):
    """Counts those of every matrix product made inside the block, backward included."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten._grouped_mm):
            left, right, *_ = args
            self.count += left.shape[0] * left.shape[1] * right.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [SMALL, MANY])
def test_yardsticks_multiply_as_much_as_the_layer(size):
    problem = moe_layer.make_problem(size)
    steps = moe_layer.layer_peers(size, problem) | moe_layer.yardsticks(size, problem)
    three_products_and_their_two_gradients = 3 * 3 * size.tokens * size.k * size.hidden * size.width
    for name in ("minimoe sorted", "minimoe eager", "transformers eager", "dense SwiGLU", "matrix products"):
        with MultiplyAdds() as products:
            steps[name]()
        assert products.count == three_products_and_their_two_gradients, name


def test_dense_yardstick_is_a_layer_with_one_expert():
    size = moe_layer.Size(tokens=32, hidden=16, width=8, experts=1, k=1)
    problem = moe_layer.make_problem(size)
    output, x, gate, up, down = moe_layer.yardsticks(size, problem)[moe_layer.DENSE]()
    layer = moe_layer.layer_peers(size, problem)["transformers eager"]()
    wanted = dict(zip(("output", "x", "weights", "gate", "up", "down"), layer, strict=True))
    assert_near(output, wanted["output"])
    assert_near(x, wanted["x"])
    for name, found in (("gate", gate), ("up", up), ("down", down)):
        assert_near(found, wanted[name][0])


def test_peers_that_generate_other_tokens_are_named(tiny):
    peers = decode.make_peers(batch=2)
    decode.assert_same_tokens(peers)
    honest = peers["transformers eager"]
    other = honest._replace(generate=lambda: honest.generate().flip(1))
    with pytest.raises(AssertionError, match="transformers eager: generated"):
        decode.assert_same_tokens(peers | {"transformers eager": other})


def test_decoding_is_what_generation_takes_beyond_the_prompt(monkeypatch):
    seconds = {("a", "prefill"): [1.0, 2.0], ("a", "generate"): [5.0, 4.0]}
    monkeypatch.setattr(decode, "measure", lambda calls, rounds: seconds)
    parts = decode.measure_parts({"a": decode.Peer(prefill=None, generate=None)}, rounds=2)
    assert parts == {"prefill": {"a": [1.0, 2.0]}, "decode": {"a": [4.0, 2.0]}}


def test_models_with_other_weights_are_not_timed(tiny):
    ids = torch.randint(SMALL_CONFIG.vocab_size, (2, 8), generator=torch.Generator().manual_seed(0))
    theirs = train_step.their_model(MoEForCausalLM(SMALL_CONFIG, seed=1), "eager")
    with pytest.raises(AssertionError, match="cross-entropy:"):
        train_step.assert_same_losses(MoEForCausalLM(SMALL_CONFIG), theirs, ids)


def test_a_training_step_follows_transformers(tiny):
    """Same weights, one step each, same cross-entropy afterwards: the steps that are timed do the same work."""
    trainers = train_step.make_trainers()
    ids = next(iter(trainers.values())).ids
    before = trainers["minimoe"].model(ids, labels=ids).cross_entropy.item()
    after = {}
    for name, trainer in trainers.items():
        trainer()
        output = trainer.model.eval()(input_ids=ids, labels=ids)  # in training ours adds the balance loss
        after[name] = output.loss.item()
    assert after["minimoe"] < before - 1e-3
    assert after == pytest.approx(dict.fromkeys(after, after["minimoe"]), rel=1e-3)


def test_every_round_calls_everyone_in_a_rotating_order():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = timing.measure(calls, rounds=4)
    orders = ["".join(called[i : i + 3]) for i in range(0, len(called), 3)]
    assert len(orders) == timing.WARM_UP + 4
    assert orders[timing.WARM_UP :] == ["abc", "bca", "cab", "abc"]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_speed_of_two_lists_worked_by_hand():
    speed = timing.Speed.compare(ours=[1.0, 2.0, 4.0], peer=[3.0, 2.0, 4.0])
    assert speed == (3.0 / 2.0, 1.0)  # medians 3 and 2; ratios 3, 1, 1
