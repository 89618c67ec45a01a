"""The figures of notebook 06, of traces and tables made to be known."""

import numpy as np
import pytest

from minimoe.course import figures
from minimoe.course.figures.specialists import rank_correlations, use_and_worth
from minimoe.course.runs import read_run
from minimoe.course.shipped import held_out_trace
from minimoe.inspection import RoutingTrace

STRETCH, STRETCHES = 16, 6  # tokens in a document; documents of each domain
NAMES = ("english/sea", "english/food", "french/sea", "french/food")
FOLLOWED = ("token", "language", "topic", "position", "language given token", "topic given token")


def trace_following(label):
    """One layer of 4 experts, two for a token: expert 0 or 1 by its language or topic, and 2 or 3 by turns."""
    number = len(NAMES) * STRETCHES * STRETCH
    domains = np.arange(number) // (STRETCHES * STRETCH)
    half = domains // 2 if label == "language" else domains % 2
    indices = np.stack([half, 2 + np.arange(number) % 2], axis=-1)[None]
    return RoutingTrace(
        indices=indices.astype(np.int16),
        weights=np.full(indices.shape, 0.5, dtype=np.float32),
        token_ids=np.arange(number, dtype=np.int32) % 7,
        domains=domains.astype(np.int16),
        documents=(np.arange(number) // STRETCH).astype(np.int32),
        positions=(np.arange(number) % STRETCH).astype(np.int32),
        domain_names=NAMES,
        layers=(0,),
        num_experts=4,
        model_id="made up",
    )


def numbers(axes):
    """The texts of a heatmap, by (row, column), and which are bold."""
    texts = {(round(t.get_position()[1]), round(t.get_position()[0])): t for t in axes.texts}
    return {place: t.get_text() for place, t in texts.items()}, {
        p for p, t in texts.items() if t.get_weight() == "bold"
    }


def test_expert_use_has_a_row_a_label_and_a_column_an_expert():
    drawn, data = figures.expert_use(trace_following("language"), "language", layer=0)
    wanted = [[1, 0, 0.5, 0.5], [0, 1, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]
    np.testing.assert_allclose(np.reshape(data["share"], (3, 4)), wanted)
    assert data["label"] == ["english"] * 4 + ["french"] * 4 + ["all"] * 4
    assert data["chance"][:4] == pytest.approx([0.5] * 4) and data["chance"][8:] == [""] * 4
    (axes,) = drawn.axes
    texts, bold = numbers(axes)
    assert texts == {(row, column): f"{100 * wanted[row][column]:.0f}" for row in range(3) for column in range(4)}
    assert bold == {(0, 0), (1, 1)}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["english", "french", "all"]
    assert axes.get_xlabel().startswith("expert")
    assert "2 are more than chance" in drawn.get_label()


def test_expert_use_of_topics_keeps_the_language():
    """A router that follows the language alone gives no topic more than chance; one that follows topics does."""
    for follows, more in (("language", 0), ("topic", 2)):
        drawn, data = figures.expert_use(trace_following(follows), "topic", layer=0)
        assert data["label"][::4] == ["sea", "food", "all"]
        assert f"{more} are more than chance" in drawn.get_label()
    above = 0
    for layer in range(4):
        data = figures.expert_use(held_out_trace(), "topic", layer)[1]
        above += sum(low > chance for low, chance in zip(data["low"][:32], data["chance"][:32], strict=True))
    assert above > 0.025 * 128  # none, where the chance lets go of the language


def test_expert_use_that_cannot_be_drawn_is_refused():
    for label, layer, message in (("domain", 1, "layer=1: wanted 0 to 0"), ("weather", 0, "label 'weather': wanted")):
        with pytest.raises(ValueError, match=message):
            figures.expert_use(trace_following("topic"), label, layer)


def followed(metrics, steps=(800,), layers=2, seeds=3):
    """A table "specialization": value step / 1000 + layer / 10 + seed / 100 + number of the metric, null a tenth."""
    rows = [
        (seed, step, metric, layer, value := step / 1000 + layer / 10 + seed / 100 + number, value / 10)
        for seed in range(seeds)
        for step in steps
        for number, metric in enumerate(metrics)
        for layer in range(layers)
    ]
    order = np.random.default_rng(0).permutation(len(rows))  # figures go by the columns, not by the order
    columns = zip(*(rows[place] for place in order), strict=True)
    return dict(zip(("seed", "step", "metric", "layer", "value", "null"), map(np.array, columns), strict=True))


def test_followed_labels_draws_the_last_step_by_layer():
    table = followed(FOLLOWED, steps=(400, 800))
    drawn, data = figures.followed_labels(table)
    assert len(data["metric"]) == 5 * 2 * 3 and "position" not in data["metric"]
    for metric, layer, seed, value, chance in zip(*data.values(), strict=True):
        assert value == pytest.approx(0.8 + layer / 10 + seed / 100 + FOLLOWED.index(metric))
        assert chance == pytest.approx(value / 10)
    alone, given = drawn.axes
    means = {line.get_label(): line for line in alone.lines if not line.get_label().startswith("_")}
    assert list(means) == ["token", "language", "topic"]
    assert [text.get_text() for text in alone.texts] == list(means)
    np.testing.assert_allclose(means["topic"].get_ydata(), [0.81 + 2, 0.91 + 2])
    assert means["topic"].get_xdata().tolist() == [0, 1] and alone.get_xlabel() == "layer"
    same_look = {line.get_label(): line.get_color() for line in given.lines}
    assert same_look["topic"] == means["topic"].get_color()


def test_routing_over_training_draws_means_over_seeds_by_step():
    table = {
        name: np.concatenate([column, other])
        for (name, column), other in zip(
            followed(("saturation",), steps=(0, 100)).items(),
            followed(("token", "language", "topic"), steps=(0, 100, 800)).values(),
            strict=True,
        )
    }
    drawn, data = figures.routing_over_training(table)
    rows = {(metric, step, layer): value for metric, step, layer, value, _ in zip(*data.values(), strict=True)}
    assert len(rows) == 2 * 2 + 3 * 3 * 2
    assert rows["saturation", 100, 1] == pytest.approx(0.1 + 0.1 + 0.01)
    assert rows["language", 800, 0] == pytest.approx(0.8 + 0.01 + 1)
    left, right = drawn.axes
    saturation = {line.get_label(): line.get_ydata() for line in left.lines}
    np.testing.assert_allclose(saturation["layer 1"], [0.11, 0.21])
    language = {line.get_label(): line.get_ydata() for line in right.lines}["language"]
    np.testing.assert_allclose(language, [1.06, 1.16, 1.86])  # the mean over the layers
    assert [label.get_text() for label in right.get_xticklabels()] == ["0", "100", "800"]
    assert "at step 100 it is 0.11, 0.21" in drawn.get_label()


def test_batch_or_sequence_draws_what_language_tells_and_what_it_costs():
    final = {"seed": np.array([0, 0, 1, 1]), "domain": np.array(["a", "b"] * 2), "nats": np.array([1.0, 3, 2, 5])}
    runs = {
        name: (followed(("language",), steps=(0, last), seeds=2), final) for name, last in (("one", 10), ("two", 90))
    }
    drawn, data = figures.batch_or_sequence(runs)
    rows = list(zip(*data.values(), strict=True))
    assert len(rows) == 2 * 2 * (2 + 1)
    assert ("one", "loss", "", 1, 3.5) in rows
    value = {row[:4]: row[4] for row in rows}
    assert value["two", "language", 1, 0] == pytest.approx(0.09 + 0.1)
    left, right = drawn.axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), [0.015, 0.115])
    assert [line.get_ydata().tolist() for line in right.lines[:2]] == [[2, 3.5]] * 2
    assert [label.get_text() for label in right.get_xticklabels()] == ["one", "two"]


def ablation(seeds=2, layers=2, experts=3, groups=("x", "y")):
    """A table "ablation" in which a number tells its place: seed, layer, expert and group are its digits."""
    seed, layer, expert, group = np.indices((seeds, layers, experts, len(groups))).reshape(4, -1)
    nats = seed + layer / 10 + expert / 100 + group / 1000
    table = {"seed": seed, "layer": layer, "expert": expert, "group": np.array(groups)[group], "nats": nats}
    table["share"] = 1 - nats / 10
    return table


def test_ablation_map_has_a_table_a_layer_with_rows_of_groups():
    drawn, data = figures.ablation_map(ablation(), seed=1)
    for layer, group, expert, nats in zip(*data.values(), strict=True):
        assert nats == pytest.approx(1 + layer / 10 + expert / 100 + "xy".index(group) / 1000)
    assert len(data["nats"]) == 2 * 2 * 3
    np.testing.assert_allclose(drawn.axes[1].images[0].get_array() / 100, [[1.1, 1.11, 1.12], [1.101, 1.111, 1.121]])
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == ["x", "y"]
    assert "layer 1 up to 1.12 (y, expert 2)" in drawn.get_label()
    with pytest.raises(ValueError, match="seed=7: wanted one of 0, 1"):
        figures.ablation_map(ablation(), seed=7)


def test_load_and_worth_draws_means_over_groups_and_every_group():
    table = ablation()
    share, nats = use_and_worth(table)
    assert share.shape == nats.shape == (2, 2, 3, 2)
    assert nats[1, 0, 2, 1] == pytest.approx(1.021) and share[1, 0, 2, 1] == pytest.approx(1 - 0.1021)
    drawn, data = figures.load_and_worth(table)
    assert len(data["view"]) == 2 * 2 * 3 + 2 * 2 * 3 * 2 and data["view"][0] == "expert"
    by_group, whole = drawn.axes[1].lines  # of layer 1
    np.testing.assert_allclose(whole.get_ydata(), nats[:, 1].mean(-1).ravel())
    np.testing.assert_allclose(by_group.get_xdata(), share[:, 1].ravel())
    assert drawn.get_supxlabel().startswith("share") and drawn.get_supylabel().startswith("nats")
    assert "over all text -1.00, within one group of domains -1.00" in drawn.get_label()


def test_use_and_worth_of_the_shipped_table_go_by_its_columns():
    table = read_run("planted-batch", "ablation")
    order = np.random.default_rng(0).permutation(len(table["seed"]))
    share, nats = use_and_worth(table)
    row = 555
    place = tuple(int(table[column][row]) for column in ("seed", "layer", "expert"))
    groups = list(dict.fromkeys(table["group"].tolist()))
    assert nats[place][groups.index(table["group"][row])] == table["nats"][row]
    np.testing.assert_allclose(share.sum(2), 2, atol=1e-4)  # every token meets two experts
    again = use_and_worth({column: cells[order] for column, cells in table.items()})[1]
    np.testing.assert_array_equal(np.sort(again, axis=3), np.sort(nats, axis=3))  # groups in order of appearance


def test_rank_correlation_is_that_of_the_ranks():
    rng = np.random.default_rng(0)
    share, nats = rng.random((2, 3, 10)), rng.random((2, 3, 10)) ** 3
    ranks = [values.argsort(-1).argsort(-1) for values in (share, nats)]
    wanted = [np.corrcoef(ranks[0][place], ranks[1][place])[0, 1] for place in np.ndindex(2, 3)]
    np.testing.assert_allclose(rank_correlations(share, nats).flatten(), wanted)
    np.testing.assert_allclose(rank_correlations(share, np.exp(share)), 1)


def test_a_trace_that_was_changed_is_measured_anew():
    trace = trace_following("language")
    before = figures.expert_use(trace, layer=0)[1]["share"]
    trace.indices[0] = trace.indices[0][::-1]
    assert figures.expert_use(trace, layer=0)[1]["share"] != before
