"""Correlation and cosine side by side: what norms say of a descendant, and what they say of anyone."""

import numpy
import pytest
import torch
from safetensors.torch import load_file

from minimoe.fingerprints.norm_profile import norm_profile
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.derive import prune_layers
from minimoe.lineage.frame import frame_norms
from minimoe.lineage.gauge import fold_norms
from tests.fingerprints.toys import KINDS, gauged, random_model, weights

RESIDUAL = {"fold_norms", "rotate_residual", "permute_residual", "all"}  # the gauges that touch these norms


def test_known_values_from_the_files(tmp_path):
    for seed, name, dtype in ((0, "a", torch.bfloat16), (1, "b", torch.float16)):
        random_model(seed).to(dtype).save_pretrained(tmp_path / name)
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    cosines, correlations = [], []
    for name in tensors[0]:
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            a, b = (of_model[name].double().numpy() for of_model in tensors)
            cosines.append(a @ b / numpy.linalg.norm(a) / numpy.linalg.norm(b))
            correlations.append(numpy.corrcoef(a, b)[0, 1])
    assert len(cosines) == 7
    result = norm_profile(open_weights(tmp_path / "a"), open_weights(tmp_path / "b"))
    assert result.score == result.details["pearson"] == pytest.approx(numpy.mean(correlations))
    assert result.details["cosine"] == pytest.approx(numpy.mean(cosines))
    assert (result.p_value, result.refused) == (None, None)


def test_gauges():
    for kind in KINDS:
        model = random_model(**KINDS[kind])
        for name, copy in gauged(model).items():
            result = norm_profile(weights(model), weights(copy))
            if name not in RESIDUAL:
                assert result.score == pytest.approx(1) and result.details["cosine"] == pytest.approx(1), name
            elif name == "permute_residual":  # a stranger, to this method
                assert abs(result.score) < 0.5 and result.details["cosine"] > 0.8
            else:
                assert result.score is None and "norm1 of layer 0 is 1 throughout: folded" in result.refused, name


def test_the_cosine_of_strangers_is_high_and_their_correlation_is_not():
    strangers = [norm_profile(weights(random_model(0)), weights(random_model(seed))) for seed in range(1, 9)]
    assert min(result.details["cosine"] for result in strangers) > 0.85
    assert max(abs(result.score) for result in strangers) < 0.4


def test_fooled_by_a_frame():
    target, stranger = random_model(0), random_model(1)
    framed = norm_profile(weights(target), weights(frame_norms(stranger, target)))
    assert framed.score == pytest.approx(1) and framed.details["cosine"] == pytest.approx(1)


def test_fine_tuning_moves_norms_little():
    model, tuned = random_model().float(), random_model().float()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-3)
    ids = torch.randint(160, (8, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        optimizer.zero_grad()
        tuned(ids, labels=ids).loss.backward()
        optimizer.step()
    result = norm_profile(weights(model), weights(tuned))
    assert 0.99 < result.score < 1


def test_depths_are_aligned():
    model = random_model(num_hidden_layers=5)
    pruned = prune_layers(model, [1, 2])
    for pair in ((model, pruned), (pruned, model)):
        assert norm_profile(*map(weights, pair)).score == pytest.approx(1)
    assert norm_profile(weights(random_model(1, num_hidden_layers=5)), weights(pruned)).score < 0.5


def test_hidden_sizes_that_differ_are_refused():
    result = norm_profile(weights(random_model(0)), weights(random_model(1, hidden_size=32)))
    assert result.score is None and result.refused == "hidden sizes 24 and 32: wanted the same"


def test_norms_that_say_nothing_are_refused():
    model, wrong = random_model(0), random_model(1)
    wrong.model.layers[1].post_attention_layernorm.weight.data[5] = float("nan")
    found = [norm_profile(*map(weights, pair)).refused for pair in ((model, wrong), (wrong, model))]
    where = "model.layers.1.post_attention_layernorm.weight: nan at [5]"
    assert found == [f"model in memory: {where}, wanted finite numbers (1 are not)"] * 2
    wrong = random_model(1)
    wrong.model.norm.weight.data.zero_()
    assert norm_profile(weights(model), weights(wrong)).refused.startswith(
        "model in memory: norm_final is 0 throughout"
    )
    folded = fold_norms(model)
    assert norm_profile(weights(folded), weights(folded)).score is None
