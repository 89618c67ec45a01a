"""The figures of notebook 13, with traces and tables made to be known."""

import numpy as np
import pytest

from minimoe.course import figures
from minimoe.course.exchange import Exchanged
from minimoe.course.figures.scale import AT_SCALE, BATCHES, all_to_all
from minimoe.course.shipped import planted_trace
from minimoe.course.widgets import controls
from minimoe.inspection.serving import cache_bytes, distinct_in, hit_rates, step


def rows_of(data):
    return list(zip(*data.values(), strict=True))


def test_grain_sweep_shows_every_seed():
    drawn, data = figures.grain_sweep({"whole": [2.0, 2.25], "halves": [1.5, 1.75]})
    assert rows_of(data) == [("whole", 0, 2.0), ("whole", 1, 2.25), ("halves", 0, 1.5), ("halves", 1, 1.75)]
    assert drawn.get_label().endswith("2 models: whole 2.00 to 2.25; halves 1.50 to 1.75.")
    dots = [line.get_xydata().tolist() for line in drawn.axes[0].lines if len(line.get_xydata()) == 1]
    assert dots == [[[2.0, 0]], [[2.25, 0]], [[1.5, 1]], [[1.75, 1]]]


def test_experts_touched_by_one_token_and_by_many():
    drawn, data = figures.experts_touched()
    found = {(of, tokens): share for of, tokens, share in rows_of(data)}
    for name, real in AT_SCALE.items():
        assert found[name, 1] == pytest.approx(real.config.num_experts_per_tok / real.config.num_experts)
        assert found[name, BATCHES[-1]] == pytest.approx(1, abs=0.001)
    assert found["ours, counted", 16] == pytest.approx(distinct_in(planted_trace(), 16).mean() / 8)
    assert found["ours, counted", 16] < found["ours, even", 16]
    assert "DeepSeek-V3 64%" in drawn.get_label()


def test_serving_cost_is_weights_cache_and_bandwidth():
    config = AT_SCALE["Qwen3-30B-A3B"].config
    drawn, data = figures.serving_cost("Qwen3-30B-A3B", sequences=3, context=1000, memory_gb=60, bandwidth_gb=100)
    (_, _, weights), (_, _, cache), *speeds = rows_of(data)
    assert weights == pytest.approx(2 * config.num_parameters() / 1e9)
    assert cache == pytest.approx(3 * cache_bytes(config, 1000) / 1e9)
    speed = {sequences: value for _, sequences, value in speeds}
    assert speed[3] == pytest.approx(3 * 100e9 / step(config, sequences=3, past=1000).read)
    assert "that does not fit into 60 GB" in drawn.get_label()
    assert "that fits into 62 GB" in figures.serving_cost("Qwen3-30B-A3B", 3, 1000, 62)[0].get_label()
    with pytest.raises(ValueError, match="model='GPT-9': wanted one of DeepSeek-V3, gpt-oss-20b"):
        figures.serving_cost("GPT-9")


def test_the_controls_of_the_cost_redraw():
    box = controls(figures.serving_cost, model=list(AT_SCALE), memory_gb=(8, 1600, 8))
    model, memory, picture = box.children
    before = picture.value
    model.value, memory.value = "Pangu Pro MoE", 160
    assert picture.value != before and "Pangu Pro MoE in 16 bits takes 144.0 GB" in picture.value


def test_experts_in_a_cache_are_hit_rates():
    trace = planted_trace()
    _, data = figures.experts_in_a_cache(trace)
    found = {(policy, held): hits for policy, held, hits in rows_of(data)}
    for policy in ("lru", "load"):
        assert found[policy, 3] == hit_rates(trace, 3, policy).mean()
    assert found["luck", 2] == 0.25
    assert np.allclose([found[policy, 8] for policy in ("lru", "load", "luck")], 1, atol=0.01)


def test_all_to_all_shows_who_gave_what_to_whom():
    processes = [
        {"top-k": Exchanged([5, 3], 7, {}), "MoGE": Exchanged([4, 4], 8, {})},
        {"top-k": Exchanged([2, 6], 9, {}), "MoGE": Exchanged([4, 4], 8, {})},
    ]
    drawn, data = all_to_all(processes)
    assert rows_of(data)[:4] == [("top-k", 0, 0, 5), ("top-k", 0, 1, 3), ("top-k", 1, 0, 2), ("top-k", 1, 1, 6)]
    assert "with top-k, 7 and 9; with MoGE, 8 and 8." in drawn.get_label()
