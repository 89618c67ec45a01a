"""A quick look: that it reads little, and says what the whole comparison says, or less."""

import json
import math
from functools import cache
from pathlib import Path

import huggingface_hub.constants
import numpy
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner

from minimoe.cli import app
from minimoe.data_files import data_path
from minimoe.fingerprints.compare import QUICK, compare
from minimoe.fingerprints.fingerprint import fingerprint
from minimoe.fingerprints.independence import csu
from minimoe.fingerprints.quick import last_attention, last_csu, neighbours, read_attention, scores_of_strangers
from minimoe.fingerprints.verdict import CANNOT_TELL, SAME, SHARED
from minimoe.fingerprints.virtual_response import directions, read_responses
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.lineage.zoo import Zoo
from minimoe.training.tokenizer import load_tokenizer
from tests.fingerprints.toys import disturbed, gauged, random_model, weights
from tests.model.test_remote import Server


@cache
def member(name: str) -> Weights:
    return open_weights(Zoo("nothing is built here").load(name), tokenizer=load_tokenizer())


# -- what it says


@pytest.mark.parametrize(
    ("a", "b", "quick"),
    [
        ("alder", "alder-gauged", SHARED),  # as a whole: the same weights
        ("alder", "alder-finetuned-gauged", SHARED),
        ("alder", "alder-drop-0.5-trained", SHARED),
        ("alder", "alder-fewer-layers", SHARED),
        ("alder", "alder-deepened-gauged", SHARED),
        ("alder", "alder-fewer-heads", SHARED),
        ("alder-btx", "alder-continued-1", SHARED),
        ("alder", "birch", CANNOT_TELL),
        ("birch", "alder-drop-0.5-trained", CANNOT_TELL),
        ("alder", "stranger-13-framed-both", CANNOT_TELL),
        ("alder", "stranger-13-framed-order", CANNOT_TELL),
        ("alder", "alder-twin", CANNOT_TELL),
        ("alder", "alder-distilled", CANNOT_TELL),
        ("birch", "alder-transplant", CANNOT_TELL),  # a relative by one expert, in another place
        ("birch", "birch-continued-4", CANNOT_TELL),  # the whole comparison finds what is left
    ],
)
def test_relatives_of_the_zoo_are_found_and_of_all_others_it_cannot_tell(a, b, quick):
    report = compare(member(a), member(b), methods="quick")
    assert report.verdict == quick and list(report.methods) == list(QUICK)
    assert compare(member(b), member(a), methods="quick").score == pytest.approx(report.score, abs=1e-3)


def test_what_finds_nothing_says_that_it_was_a_quick_look():
    report = compare(member("alder"), member("birch"), methods="quick")
    assert "a quick look may miss what the whole comparison finds" in report.reason and report.is_quick
    assert "A quick look, at a small part of both models." in str(report)
    itself = compare(member("alder"), member("alder"), methods="quick")
    assert itself.verdict == SHARED != SAME and itself.score == pytest.approx(1, abs=1e-3)


def test_strangers_of_your_own_take_the_place_of_those_of_the_zoo():
    own = [member(name) for name in ("stranger-01", "depth-init-1", "depth-init-2")]
    report = compare(member("alder"), member("alder-finetuned"), methods="quick", background=own)
    assert report.verdict == SHARED and len(report.methods["last_attention"].strangers) == 6
    scores = [row["last_attention"] for row in scores_of_strangers()]
    assert len(scores) == 15 and max(map(abs, scores)) < 0.06


# -- what it reads


@pytest.mark.parametrize("settings", [{}, {"num_experts": 4, "shared_expert_intermediate_size": 16}])
def test_the_table_is_that_of_the_virtual_response(settings):
    model = weights(random_model(1, **settings))
    tokens = neighbours(model, model)
    whole = directions(read_responses(model, tokens), list(range(len(tokens))), whiten=True)
    others = whole["A"][-1][~torch.eye(len(tokens), dtype=torch.bool).flatten()]
    assert numpy.corrcoef(read_attention(model, tokens), others)[0, 1] > 0.9999


def test_strangers_whose_queries_are_like_their_keys_are_no_relatives():
    """Their tokens attend to themselves above all, and so do those of any other such model."""
    shape = {"hidden_size": 160, "num_key_value_heads": 4, "attention_bias": False}
    models = [random_model(seed, **shape) for seed in (1, 2)]
    for model in models:
        attention = model.model.layers[-1].self_attn
        attention.k_proj.weight.data.copy_(attention.q_proj.weight + 0.1 * attention.k_proj.weight)
    pair = [weights(model) for model in models]
    tokens = neighbours(*pair)
    tables = [directions(read_responses(side, tokens), list(range(len(tokens))), whiten=True)["A"] for side in pair]
    assert tables[0][-1] @ tables[1][-1] > 0.8 and abs(last_attention(*pair).score) < 0.1
    attention = models[0].model.layers[-1].self_attn
    torch.nn.init.orthogonal_(attention.q_proj.weight)
    attention.k_proj.load_state_dict(attention.q_proj.state_dict())
    assert "attend to themselves" in last_attention(weights(models[0]), pair[1]).refused


@pytest.mark.parametrize("kind", ["dense", "head", "full"])
def test_no_gauge_changes_whom_tokens_attend_to(kind):
    model = random_model(1, qk_norm=None if kind == "dense" else kind)
    found = weights(model)
    stranger = last_attention(found, weights(random_model(2))).score
    for name, copy in gauged(model).items():
        assert last_attention(found, weights(copy)).score > 0.99, name
    assert abs(stranger) < 0.3 < 0.6 < last_attention(found, weights(disturbed(model, 0.1))).score


def test_of_a_model_of_one_layer_csu_says_the_same():
    """And of one with more layers, it looks at the last."""
    models = [random_model(seed, num_hidden_layers=1) for seed in (1, 2)]
    pairs = [(models[0], models[1]), (models[0], disturbed(models[0], 0.5))]
    for pair in (tuple(map(weights, pair)) for pair in pairs):
        assert last_csu(*pair).p_value == pytest.approx(csu(*pair).p_value)
    model, other = random_model(1), random_model(2)
    other.model.layers[-1].mlp.load_state_dict(model.model.layers[-1].mlp.state_dict())
    other.model.layers[-1].post_attention_layernorm.load_state_dict(
        model.model.layers[-1].post_attention_layernorm.state_dict()
    )
    assert last_csu(weights(model), weights(other)).p_value < 1e-9


def test_without_shared_tokens_csu_is_left():
    pair = weights(random_model(1)), weights(disturbed(random_model(1), 0.01), prefix="other")
    report = compare(*pair, methods="quick")
    assert "0 shared tokens" in report.methods["last_attention"].result.refused
    assert report.verdict == CANNOT_TELL and "stands alone" in report.reason


def test_a_saved_fingerprint_is_no_place_to_look_at(tmp_path):
    fingerprint(data_path("zoo") / "alder").save(tmp_path / "alder.npz")
    with pytest.raises(ValueError, match='methods="quick": found a saved fingerprint, wanted the weights'):
        compare(tmp_path / "alder.npz", data_path("zoo") / "birch", methods="quick")
    alder, birch = (data_path("zoo") / name for name in ("alder", "birch"))
    done = CliRunner().invoke(app, ["compare", str(alder), str(birch), "--quick", "--methods", "csu"])
    assert done.exit_code == 2 and "methods=csu: wanted none beside --quick" in done.stderr


# -- two models of 7 billion parameters


class Endless:
    """A file in float16 that takes no place: a header, then the same random numbers again and again."""

    def __init__(self, header: bytes, size: int, numbers: numpy.ndarray) -> None:
        self.header, self.size, self.numbers = header, size, numbers.astype("<f2").tobytes()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.size)
        begun, at = self.header[start:stop], max(start - len(self.header), 0) % len(self.numbers)
        wanted = stop - start - len(begun)
        return begun + (self.numbers * (2 + wanted // len(self.numbers)))[at : at + wanted]


LAYERS, HIDDEN, WIDTH, TOKENS = 32, 4096, 11008, 32000


def llama(numbers: numpy.ndarray) -> dict[str, bytes | Endless]:
    """The files of a model in the shape of Llama 2 with 7 billion parameters (Touvron et al. 2023)."""
    shapes = {name: [TOKENS, HIDDEN] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    shapes |= {"model.norm.weight": [HIDDEN]}
    for layer in (f"model.layers.{number}." for number in range(LAYERS)):
        shapes |= {f"{layer}self_attn.{role}_proj.weight": [HIDDEN, HIDDEN] for role in "qkvo"}
        shapes |= {f"{layer}mlp.{role}_proj.weight": [WIDTH, HIDDEN] for role in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": [HIDDEN, WIDTH]}
        shapes |= {f"{layer}{norm}_layernorm.weight": [HIDDEN] for norm in ("input", "post_attention")}
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    config = {"model_type": "llama", "vocab_size": TOKENS, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
    config |= {"num_attention_heads": 32, "intermediate_size": WIDTH, "rms_norm_eps": 1e-5}
    config |= {"tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 4096}
    tokenizer = Tokenizer(WordLevel({f"t{number}": number for number in range(TOKENS)}, unk_token="t0"))
    return {
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": tokenizer.to_str().encode(),
        "model.safetensors": Endless(header, len(header) + end, numbers),
    }


@pytest.fixture
def server(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # which other tests set
    server = Server()
    draw = numpy.random.default_rng(0)
    parent, stranger, noise = (0.02 * draw.standard_normal(1_000_003, dtype="float32") for _ in range(3))
    for name, numbers in {"parent": parent, "child": parent + noise / 10, "stranger": stranger}.items():
        server.files |= {f"/{name}/{file}": content for file, content in llama(numbers).items()}
    yield server
    server.close()


@pytest.mark.exact("moves and multiplies hundreds of megabytes")
def test_two_models_of_7_billion_parameters_are_judged_by_less_than_2_percent_of_their_bytes(server):
    size = len(server.files["/parent/model.safetensors"])
    assert size > 13e9
    for other, verdict in (("child", SHARED), ("stranger", CANNOT_TELL)):
        before = server.sent
        arguments = ["compare", f"{server.address}/parent/", f"{server.address}/{other}/", "--quick", "--json"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout)
        assert report["verdict"] == verdict and report["is_quick"]
        assert report["methods"]["last_csu"]["p_value"] < 1e-30 or other == "stranger"
        assert server.sent - before < 0.02 * 2 * size
        moved = sum(files["moved"] for files in report["files"].values())
        assert moved == pytest.approx(server.sent - before, abs=1000)
        assert all(files["size"] == size and files["read"] < 0.01 * size for files in report["files"].values())
