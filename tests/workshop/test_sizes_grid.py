"""Models of other sizes are trained once and go on; pairs are what their names say; laws find what was put in."""

import json

import numpy as np
import pytest
import torch

from minimoe.lineage.zoo import LINEAGE, Zoo
from minimoe.model import MoEForCausalLM
from minimoe.training import Corpus
from minimoe.training.tokenizer import load_tokenizer
from workshop import sizes, sizes_grid, sizes_pairs, sizes_tables
from workshop.sizes_grid import GRID, grow, is_there, load, train_all
from workshop.sizes_pairs import Models, Pair, donor_of, pairs, split_name

TINY = [(2, 48, 2, 2), ("48x2-1", 1)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two roots and two descendants, after a step or two."""
    home = tmp_path_factory.mktemp("sizes")
    train_all(home, grow(TINY))
    return home


@pytest.fixture(scope="module")
def models(home):
    return Models(home, Zoo(home / "zoo"))


def tensors(model):
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


@pytest.mark.exact("two makings of one model are compared to the bit")
def test_training_that_was_interrupted_goes_on_to_the_same_model(home, tmp_path, monkeypatch):
    grid = {"48x2-2": grow(TINY)["48x2-2"]}

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sizes_grid, "evaluate", fail)
        with pytest.raises(KeyboardInterrupt):
            train_all(tmp_path, grid)
    assert not is_there(tmp_path, "48x2-2")
    assert train_all(tmp_path, grid) == ["48x2-2"]
    assert torch.equal(tensors(load(tmp_path, "48x2-2")), tensors(load(home, "48x2-2")))
    assert train_all(tmp_path, grid) == []
    assert not any((tmp_path / ".training").iterdir())


def test_a_folder_is_a_whole_model_in_float16_that_says_how_it_came_about(home):
    facts = json.loads((home / "48x2-1-finetuned" / LINEAGE).read_text(encoding="utf-8"))
    assert facts["parent"] == "48x2-1" and facts["tokens"] == 1024
    model = MoEForCausalLM.from_pretrained(home / "48x2-1")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16}
    assert model.tokenizer_json is not None


def test_every_width_has_two_roots_before_any_has_four():
    roots = [model for model in GRID.values() if not model.kind]
    seen: dict[int, int] = {}
    for model in roots:
        seen[model.width] = seen.get(model.width, 0) + 1
        few = [width for width in (48, 64, 128, 192) if seen.get(width, 0) < 2]
        assert seen[model.width] <= 4 or not few, f"{model.name} comes before {few} have two"
    assert len({model.seed for model in GRID.values()}) == len(GRID)


def test_sizes_of_the_grid_are_what_names_say():
    for name, model in GRID.items():
        config = model.config
        width, depth = name.split("-")[0].split("x")
        assert (config.hidden_size, config.num_hidden_layers) == (int(width), int(depth))
        assert config.num_attention_heads // config.num_key_value_heads in (2, 4)
        assert 24 <= config.head_dim <= 32 and 2.6 < config.intermediate_size / config.hidden_size < 2.8


def test_names_tell_the_root_and_what_was_done():
    assert split_name("64x4-1-finetuned-copy-gauged") == ("64x4-1", ("finetuned", "copy", "gauged"))
    assert split_name("64x4-e4-1") == ("64x4-e4-1", ())
    assert split_name("alder") == ("alder", ())
    with pytest.raises(ValueError, match=r"^'64x4-1-melted': wanted a root"):
        split_name("64x4-1-melted")


def test_strangers_have_no_root_in_common_and_relatives_have_one():
    for pair in pairs():
        given = {donor_of(split_name(pair.b)[0])} if "transplant" in pair.b else set()
        shared = {split_name(pair.a)[0]} & {split_name(pair.b)[0], *given}
        assert bool(shared) == (pair.use == "relative"), pair
    found = [pair.use for pair in pairs()]
    assert found.count("stranger") >= 400 and found.count("relative") >= 100 and found.count("planted") >= 140
    assert len({(pair.a, pair.b) for pair in pairs()}) == len(found)


def test_models_that_were_made_compute_what_they_should(models):
    ids = torch.arange(40)[None]
    root, gauged, other = (models.load(name)(ids).logits for name in ("48x2-1", "48x2-1-copy-gauged", "48x2-2"))
    assert (gauged - root).abs().max() < 1e-5 < 1e-3 < (other - root).abs().max()
    assert models.has("48x2-1-lerp-gauged") and not models.has("48x2-2-lerp") and not models.has("64x4-1-copy")
    mixture, donor = models.load("48x2-2-copy-transplant"), models.load("48x2-1")
    experts = mixture.model.layers[1].mlp.experts.gate_proj
    assert torch.equal(experts[1], donor.model.layers[1].mlp.gate_proj.weight)
    assert not torch.equal(experts[1], experts[0])
    planted = models.load("48x2-2-planted-products-gauged")
    assert planted.config.intermediate_size > donor.config.intermediate_size
    assert (planted(ids).logits - other).abs().max() < 1e-4
    mean = (tensors(models.load("48x2-1-finetuned")) + tensors(models.load("48x2-1-continued"))) / 2
    torch.testing.assert_close(tensors(models.load("48x2-1-lerp")), mean)


def test_scores_are_kept_and_only_what_is_missing_is_made(models, tmp_path, monkeypatch):
    wanted = [Pair("48x2-1", "48x2-1-gauged", "relative", "gauged"), Pair("48x2-1", "48x2-2", "stranger", "roots")]
    wanted += [Pair("64x4-1", "48x2-1", "stranger", "roots")]  # whose first model is not there
    first = sizes.score_all(models, wanted, tmp_path)
    assert [row["b"] for row in first] == ["48x2-1-gauged", "48x2-2"]
    assert tuple(first[0]) == sizes.COLUMNS
    assert first[0]["virtual_response_whitened"] > 0.999 > first[1]["virtual_response_whitened"]
    found = {column: first[1][column] for column in ("width_a", "depth_b", "tokens_a", "shared_tokens")}
    assert found == {"width_a": 48, "depth_b": 2, "tokens_a": 800 * 8 * 128, "shared_tokens": 1024}
    monkeypatch.setattr(sizes, "score", None)  # not to be called again
    assert sizes.score_all(models, wanted, tmp_path) == first


def test_a_vocabulary_of_another_size_spells_the_same_text():
    usual = Corpus.planted(documents_per_domain=20)
    corpus = sizes_grid.retokenise(usual, 512)
    assert corpus.vocab_size == 512 and corpus.sha256 == usual.sha256
    assert all(corpus.documents(domain, "train") == usual.documents(domain, "train") for domain in usual.domains)
    assert 256 < len(corpus.tokenizer.get_vocab().keys() & load_tokenizer().get_vocab().keys()) < 512


METHOD = "aligned_neurons"


def _rows(widths, law, noise, relatives=0.9):
    generator, rows = np.random.default_rng(0), []
    for place, width in enumerate(widths):
        for use in ("stranger", "stranger", "relative"):
            depth, tokens = (2, 4, 8)[place % 3], (4e5, 8e5)[place // 3 % 2]
            score = law(width, depth) + noise * generator.uniform(-1, 1) if use == "stranger" else relatives
            sizes_of = {f"{fact}_{x}": v for x in "ab" for fact, v in (("width", width), ("depth", depth))}
            known = {"use": use, "shapes": "dense, dense, equal depths", METHOD: float(score)}
            rows.append({**known, **sizes_of, "tokens_a": tokens, "tokens_b": tokens})
    return rows


def test_a_law_finds_what_was_put_in():
    def law(width, depth):
        return np.tanh(0.1 + 0.02 * 96 / width + 0.05 * 4 / depth + 0.03 * 96 * 4 / width / depth)

    (found,) = sizes_tables.laws(_rows([48, 64, 96, 128, 192, 256, 384] * 6, law, 0.0), [METHOD])
    wanted = dict(zip(sizes_tables.TERMS, (0.1, 0.02, 0.05, 0.03, 0.0), strict=True))
    assert {term: found[term] for term in wanted} == pytest.approx(wanted, abs=1e-6)
    assert found["r_squared"] > 0.999


def test_widths_that_are_like_the_others_are_judged_right_by_them():
    rows = _rows([48, 64, 96, 128] * 6, lambda width, depth: 0.1, 0.005)
    table = [row for row in sizes_tables.left_out(rows, [METHOD]) if row["by"] == "verdict"]
    assert [row["width"] for row in table] == [48, 64, 96, 128, "all"]
    assert all(row["accused"] == row["cannot_tell"] == 0 and row["found"] == row["relatives"] for row in table)
    assert (table[-1]["strangers"], table[-1]["relatives"]) == (48, 24)


def test_a_width_that_is_unlike_all_others_is_seen_to_fail():
    rows = _rows([48, 64, 96, 128, 192] * 6, lambda width, depth: 0.1, 0.005)
    rows += _rows([384] * 6, lambda width, depth: 0.8, 0.005)
    table = {(row["width"], row["by"]): row for row in sizes_tables.left_out(rows, [METHOD])}
    for by in ("verdict", METHOD):
        assert (table[384, by]["strangers"], table[384, by]["accused"]) == (12, 12)
        assert table["all", by]["accused"] == 12


def test_quantiles_count_what_a_method_refuses():
    rows = _rows([48, 64], lambda width, depth: 0.1, 0.0)
    rows[0][METHOD] = None
    first = sizes_tables.quantiles(rows, [METHOD])[0]
    assert (first["smaller"], first["pairs"], first["refused"], first["highest"]) == (48, 2, 1, pytest.approx(0.1))


def test_the_zoo_is_the_width_that_the_grid_leaves_out():
    assert all(split_name(name)[0] == name for name in sizes_pairs.ZOO_ROOTS)
    assert sizes.steps_of("alder") == 800 and sizes.steps_of("64x4-1-finetuned-gauged") == 1050
