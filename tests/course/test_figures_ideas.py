"""The pictures of ideas: what they show is computed, and what is said to stay the same does."""

import numpy as np
import pytest

from minimoe.course import figures
from minimoe.course.figures.hiding import load_double
from minimoe.course.figures.ideas import responses
from minimoe.fingerprints.compare import compare


def rows(data):
    return [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]


def test_neurons_write_the_same_in_every_version_and_their_numbers_differ():
    data = rows(figures.gauge_of_neurons()[1])
    versions = list(dict.fromkeys(row["version"] for row in data))
    written = [[r["number"] for r in data if (r["version"], r["part"]) == (v, "written")] for v in versions]
    numbers = [[r["number"] for r in data if r["version"] == v and r["part"] != "written"] for v in versions]
    for one in (1, 2):
        np.testing.assert_allclose(written[one], written[0])
        assert numbers[one] != numbers[0]
    assert sorted(numbers[1]) == sorted(numbers[0])


def test_a_rotation_moves_coordinates_and_no_response():
    data = rows(figures.from_token_to_token()[1])
    for what, moves in (("coordinate", True), ("response", False)):
        before, after = (
            np.array([r["number"] for r in data if (r["what"], r["version"]) == (what, version)])
            for version in ("as it was", "turned")
        )
        assert (abs(before - after).max() > 0.1) == moves
        assert moves or abs(before - after).max() < 1e-6


def test_a_response_is_the_way_through_the_matrices():
    model = load_double("alder")
    block, norm = model.model.layers[1], model.model.norm.weight
    row = model.model.embed_tokens.weight[300]
    x = row / row.square().mean().add(1.2e-7).sqrt() * block.post_attention_layernorm.weight
    logits = model.model.embed_tokens.weight @ (norm * (block.mlp.down_proj.weight @ (block.mlp.up_proj.weight @ x)))
    assert responses(model, [300, 400])[1][0, 1] == pytest.approx(logits[400].item(), rel=1e-3)


def test_the_scale_is_that_of_the_verdict():
    data = {row["what"]: row for row in rows(figures.verdict_scale()[1])}
    report = compare("data/zoo/alder", "data/zoo/alder-continued-4", methods=["aligned_neurons"])
    assert data["this pair"]["standing"] == pytest.approx(report.score, abs=0.02)
    standings = [data[what]["standing"] for what in ("median stranger", "evidence begins", "nothing differs")]
    assert standings == pytest.approx([0, 0.5, 1])
