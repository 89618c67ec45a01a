"""From small features the methods say what they say from weights; the files are small, whole, and give away no more."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from scipy import stats

from minimoe.fingerprints.aligned_cka import aligned_cka
from minimoe.fingerprints.fingerprint import (
    KEPT,
    READ,
    VERSION,
    Fingerprint,
    as_fingerprints,
    compare_fingerprints,
    fingerprint,
    number_of_tokens,
)
from minimoe.fingerprints.folded import query_key
from minimoe.fingerprints.independence import csu, shrink_ups
from minimoe.fingerprints.norm_profile import compare_norms, norm_profile, shrink_norms
from minimoe.fingerprints.spectral import compare_spectra, shrink_spectra, spectral
from minimoe.fingerprints.std_profile import std_profile
from minimoe.fingerprints.virtual_response import directions, read_responses, shrink_responses, virtual_response
from minimoe.fingerprints.weights import open_weights
from minimoe.lineage.zoo import Zoo
from minimoe.training.tokenizer import load_tokenizer
from tests.fingerprints.toys import KINDS, disturbed, gauged, random_model, weights

FULL = {
    "std_profile": std_profile,
    "norm_profile": norm_profile,
    "spectral": spectral,
    "virtual_response": virtual_response,
    "virtual_response_whitened": lambda a, b: virtual_response(a, b, whiten=True),
}
TOLERANCE = {"virtual_response": 1e-4, "virtual_response_whitened": 0.005}  # float16
FLOAT32 = 1e-4  # of the others: a flat profile enlarges the rounding of its points a hundred times
WIDE = 8192


def member(name):
    return open_weights(Zoo("nothing is built here").load(name), tokenizer=load_tokenizer())


# --- the same scores


@pytest.mark.parametrize("other", ["birch", "alder-drop-0.5-trained-gauged"])
def test_features_say_what_weights_say(other, tmp_path):
    """Whether both models are at hand, or one, or none."""
    a, b = member("alder"), member(other)
    for name, model in (("a", a), ("b", b)):
        fingerprint(model).save(tmp_path / name)
    kept = [Fingerprint.load(tmp_path / name) for name in "ab"]
    for pair in (kept, as_fingerprints(kept[0], b), as_fingerprints(a, kept[1]), as_fingerprints(a, b)):
        for name, method in FULL.items():
            found, wanted = compare_fingerprints(name, *pair), method(a, b)
            assert found.score == pytest.approx(wanted.score, abs=TOLERANCE.get(name, FLOAT32)), name
            assert (found.refused is None) == (wanted.refused is None)
    related = csu(a, b).p_value < 1e-6
    assert (compare_fingerprints("csu", *kept).p_value < 1e-6) == related


def test_gauges():
    for kind in KINDS:
        model = random_model(**KINDS[kind])
        original = fingerprint(weights(model))
        for name, copy in gauged(model).items():
            copy = fingerprint(weights(copy))
            for method in ("spectral", "virtual_response", "virtual_response_whitened"):
                assert compare_fingerprints(method, original, copy).score > 0.99, (name, method)
        stranger = fingerprint(weights(random_model(1, **KINDS[kind])))
        assert abs(compare_fingerprints("virtual_response_whitened", original, stranger).score) < 0.1


def test_a_wide_spectrum_is_interpolated():
    """Falling as those of trained models do, steeply at first and at the end, with a kink between."""
    places = np.arange(1, 1501)
    curves = [places**-0.3 * (1 - places / 1600) ** power for power in (0.5, 1.0, 2.0)]
    curves[2][400:] *= 0.5
    spectra = [
        {"hidden_size": np.array(1500), "query_key": curve[None], "value_output": curve[None] ** 2} for curve in curves
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        whole = compare_spectra(spectra[a], spectra[b]).score
        assert compare_spectra(*map(shrink_spectra, (spectra[a], spectra[b]))).score == pytest.approx(whole, abs=1e-3)
        assert whole < 0.996  # they do differ, by more than the tolerance
    assert shrink_spectra(spectra[0])["query_key"].shape[1] <= 256


def test_wide_norms_are_a_sample():
    generator = np.random.default_rng(0)
    shared = 1 + 0.1 * generator.standard_normal((6, 2, 3000))
    norms = [
        {"hidden_size": np.array(3000), "layers": layers, "final": layers[0, 0]}
        for layers in (shared, shared + 0.05 * generator.standard_normal(shared.shape))
    ]
    small = [shrink_norms(each) for each in norms]
    assert small[0]["layers"].shape == (6, 2, 256)
    assert compare_norms(*small).score == pytest.approx(compare_norms(*norms).score, abs=0.02)


# --- csu from a sketch


@pytest.mark.parametrize(("settings", "of_the_other"), [({}, {}), ({"num_experts": 3}, {}), ({}, {"depth": 3})])
def test_p_values_of_sketches_are_uniform_among_strangers(settings, of_the_other):
    tiny = {"hidden_size": 12, "head_dim": 4, "num_hidden_layers": 2, "intermediate_size": 24} | settings
    other = tiny | {"num_hidden_layers": of_the_other.get("depth", 2)}
    p_values = [
        compare_fingerprints(
            "csu",
            *(fingerprint(weights(random_model(2 * seed + i, **shape))) for i, shape in enumerate((tiny, other))),
        ).p_value
        for seed in range(80)
    ]
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_the_order_of_rows_that_a_sketch_leaves_out_is_arbitrary_too():
    """200 rows of which 128 are kept, in random orders: rows that resemble each other, as after training alike."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(200, 64, generator=generator)
    pair = [fingerprint(weights(random_model(seed))) for seed in (0, 1)]
    p_values = []
    for _ in range(150):
        sides = []
        for side in pair:
            rows = common[torch.randperm(200, generator=generator)] + torch.randn(200, 64, generator=generator)
            features = shrink_ups({"shapes": np.array([[200, 64]]), "0": rows.numpy()})
            assert features["0"].shape == (128, 32)
            sides.append(Fingerprint(**vars(side) | {"features": {"ups": features}}))
        p_values.append(compare_fingerprints("csu", *sides).p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_a_sketch_sees_relatives_and_the_order_of_experts():
    model = random_model(num_experts=4)
    for relative in (disturbed(model, 0.3), gauged(model)["permute_experts"]):
        assert compare_fingerprints("csu", fingerprint(weights(model)), fingerprint(weights(relative))).p_value < 1e-6


# --- tokens


def test_fingerprints_are_cut_to_the_tokens_that_both_hold():
    """The second model knows three quarters of the tokens; neither is asked again."""
    model = random_model()
    a, b = weights(model), weights(model)
    b.tokens = {token: index for token, index in a.tokens.items() if index < 120}
    found = compare_fingerprints("virtual_response", fingerprint(a), fingerprint(b))
    assert found.details["tokens"] == 120 and found.score > 0.9999
    b.tokens = {token: index for token, index in a.tokens.items() if index < 60}
    found = compare_fingerprints("virtual_response", *as_fingerprints(a, b))
    assert "60 shared tokens: wanted at least 64" in found.refused


def test_the_weights_of_one_model_help_where_fingerprints_took_other_tokens():
    """Vocabularies of 2,000 and 300 tokens: of 256 of the larger, few are in the smaller."""
    model, small = random_model(vocab_size=2000), random_model(vocab_size=300)
    with torch.no_grad():
        for of_small, of_large in (
            (small.model.embed_tokens, model.model.embed_tokens),
            (small.lm_head, model.lm_head),
        ):
            of_small.weight.copy_(of_large.weight[:300])
        small.model.norm, small.model.layers = model.model.norm, model.model.layers
    a, b = weights(model), weights(small)
    found = compare_fingerprints("virtual_response", fingerprint(a), fingerprint(b))
    assert "are the same: wanted at least 64" in found.refused
    found = compare_fingerprints("virtual_response", *as_fingerprints(a, fingerprint(b)))
    assert found.details["tokens"] == 256 and found.score > 0.9999


# --- the file


def as_wide_and_deep(layers: int) -> Fingerprint:
    """Features of random numbers, which no compression makes smaller, for the largest shapes."""
    generator, count = np.random.default_rng(0), number_of_tokens(layers)

    def draw(*shape):
        return generator.standard_normal(shape, np.float32)

    tables = {name: draw(layers, count, count) for name in ("A", "OV", "M")}
    tokens = json.dumps([f"a token of usual length {number}" for number in range(count)]).encode()
    sketch = shrink_ups({"shapes": np.array([[28672, WIDE]]), "0": draw(128, WIDE)})["0"]
    spectra = {name: -np.sort(-draw(layers, WIDE)) for name in ("query_key", "value_output")}
    features = {
        "std_profile": {role: draw(layers) for role in "qkvo"},
        "norms": shrink_norms({"hidden_size": np.array(WIDE), "layers": draw(layers, 2, WIDE), "final": draw(WIDE)}),
        "spectra": shrink_spectra({"hidden_size": np.array(WIDE), **spectra}),
        "responses": shrink_responses({"tokens": np.frombuffer(tokens, np.uint8), **tables}),
        "ups": {"shapes": np.full((layers, 2), WIDE), **{str(layer): sketch for layer in range(layers)}},
    }
    shape = {"num_layers": layers, "hidden_size": WIDE, "num_heads": 64, "num_experts": 0}
    return Fingerprint(name="wide", family="llama", sha256="0" * 64, refused={}, features=features, **shape)


@pytest.mark.parametrize("layers", [8, 100])
def test_the_largest_models_take_less_than_5_megabytes(layers, tmp_path):
    as_wide_and_deep(layers).save(tmp_path / "wide.npz")
    assert 3e6 < (tmp_path / "wide.npz").stat().st_size < 5e6


def test_what_would_be_larger_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"wide\.npz: \d+ bytes of 200 layers, wanted at most 5000000"):
        as_wide_and_deep(200).save(tmp_path / "wide.npz")
    assert not list(tmp_path.iterdir())


def test_what_is_loaded_is_what_was_saved(tmp_path):
    saved = fingerprint(random_model(num_experts=4), tokenizer=load_tokenizer())
    saved.save(tmp_path / "a.npz")
    loaded = Fingerprint.load(tmp_path / "a.npz")
    for key in vars(saved).keys() - {"features"}:
        assert getattr(loaded, key) == getattr(saved, key)
    assert loaded.features.keys() == READ.keys()
    for group, features in saved.features.items():
        assert features.keys() == loaded.features[group].keys()
        for name, array in features.items():
            np.testing.assert_array_equal(array, loaded.features[group][name], strict=True)
    assert (loaded.family, loaded.num_layers, loaded.num_experts, len(loaded.tokens)) == ("minimoe", 3, 4, 160)


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    fingerprint(weights(random_model())).save(tmp_path / "a.npz")
    before = (tmp_path / "a.npz").read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("minimoe.atomic.os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        fingerprint(weights(random_model(1))).save(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def changed(data: bytes, **facts) -> bytes:
    """A file whose words say something else."""
    with np.load(io.BytesIO(data)) as file:
        arrays = {name: file[name] for name in file.files}
    about = json.loads(arrays.pop("about").tobytes()) | facts
    buffer = io.BytesIO()
    np.savez(buffer, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
    return buffer.getvalue()


def bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("about.npy", bytes(30_000_000))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:5000], "found 5000 bytes, wanted a whole fingerprint"),
        (lambda data: b"", "found 0 bytes, wanted a whole fingerprint"),
        (lambda data: data[:9000] + bytes([data[9000] ^ 1]) + data[9001:], "wanted a whole fingerprint"),
        (lambda data: b"{}", "found 2 bytes, wanted a whole fingerprint"),
        (lambda data: bomb(), r"unpacks to 30000000 bytes"),
        (lambda data: changed(data, version=VERSION + 1), r"found format and version .* 2\), wanted .* 1\)"),
        (lambda data: changed(data, refused={"norms": "twice"}), "found features norms, norms"),
        (lambda data: changed(data, weather="fine"), "found fields family, .*weather, wanted family, hidden_size, "),
    ],
)
def test_damaged_files_and_other_versions_are_named(damage, message, tmp_path):
    fingerprint(weights(random_model())).save(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(damage((tmp_path / "a.npz").read_bytes()))
    with pytest.raises(ValueError, match=rf"b\.npz: .*{message}"):
        Fingerprint.load(tmp_path / "b.npz")


def test_a_path_is_not_told(tmp_path):
    random_model().save_pretrained(tmp_path / "secret" / "model")
    assert fingerprint(tmp_path / "secret" / "model").name == "model"


# --- what it gives away


def test_of_a_narrow_model_the_tables_and_the_embedding_give_away_products():
    """24 dimensions and 160 tokens: least squares finds W_q^T W_k but for the biases, which were left out."""
    model = random_model(attention_bias=False)
    opened = weights(model)
    kept = fingerprint(opened).features["responses"]
    rows = opened.rows("embedding", [opened.tokens[token] for token in fingerprint(opened).tokens])
    inputs = (rows / rows.square().mean(1, keepdim=True).sqrt()).double().numpy()
    table = kept["A"][1].astype(float) * kept["A_scale"][1] + kept["A_rows"][1][:, None] + kept["A_columns"][1]
    found = np.linalg.pinv(inputs) @ table @ np.linalg.pinv(inputs).T
    queries, keys = query_key(opened, 1)
    assert np.corrcoef(found.flatten(), (queries.mT @ keys).numpy().flatten())[0, 1] > 0.999


def test_of_a_wide_model_what_its_tokens_do_not_reach_leaves_no_trace_in_the_tables():
    """192 dimensions and 160 tokens: queries for the other 32 are changed, and no number is."""
    model = random_model(hidden_size=192, head_dim=6, attention_bias=False)
    tokens = [f"t{number}" for number in range(160)]
    before = read_responses(weights(model), tokens)["A"]
    with torch.no_grad():
        block = model.model.layers[0]
        embedding = model.model.embed_tokens.weight
        norm = block.input_layernorm.weight
        out_of_reach = torch.linalg.svd(embedding, full_matrices=True).Vh[160:]
        block.self_attn.q_proj.weight += 5 * torch.randn(24, 32, dtype=torch.float64) @ out_of_reach / norm
    after = read_responses(weights(model), tokens)["A"]
    np.testing.assert_allclose(after, before, atol=1e-3 * abs(before).max())
    assert compare_fingerprints(
        "spectral", *map(fingerprint, map(weights, (model, random_model(**{"hidden_size": 192}))))
    ).score


# --- refusals


def test_all_other_methods_need_the_weights():
    pair = as_fingerprints(weights(random_model()), weights(random_model(1)))
    assert "needs the weights of both models" in compare_fingerprints("match", *pair).refused
    assert aligned_cka(weights(random_model()), weights(random_model(1))).score is not None
    for name in KEPT:
        assert "needs the weights" not in (compare_fingerprints(name, *pair).refused or ""), name


def test_what_a_model_refuses_is_kept_with_its_reason(tmp_path):
    model = random_model()
    model.model.norm.weight.data.fill_(1)
    model.model.layers[1].mlp.gate_proj.weight.data[0, 0] = torch.nan
    fingerprint(weights(model)).save(tmp_path / "a.npz")
    kept, fine = Fingerprint.load(tmp_path / "a.npz"), fingerprint(weights(random_model(1)))
    for pair in ((kept, fine), (fine, kept)):
        assert "norm_final is 1 throughout" in compare_fingerprints("norm_profile", *pair).refused
        assert "layers.1.mlp.gate_proj.weight: nan at [0, 0]" in compare_fingerprints("virtual_response", *pair).refused
        assert compare_fingerprints("csu", *pair).score is not None
    other = fingerprint(weights(random_model(1, hidden_size=32, intermediate_size=40)))
    assert compare_fingerprints("norm_profile", fine, other).refused == "hidden sizes 24 and 32: wanted the same"
    assert "32 neurons of 24 weights and 40 neurons of 32 weights" in compare_fingerprints("csu", fine, other).refused
    assert "64" in fingerprint(random_model()).refused["responses"]  # without a tokenizer


def test_tables_of_shared_tokens_do_not_depend_on_the_others():
    """Cut, then centred and whitened: as if the other tokens had never been looked at."""
    opened, tokens = weights(random_model()), [f"t{number}" for number in range(100)]
    cut = directions(read_responses(opened, tokens), list(range(0, 100, 2)), whiten=True)
    alone = directions(read_responses(opened, tokens[::2]), list(range(50)), whiten=True)
    for name, table in cut.items():
        torch.testing.assert_close(table, alone[name], rtol=1e-3, atol=1e-4)
