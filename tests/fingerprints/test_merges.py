"""The shares of the parents of a merged model, against those it was merged with."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from minimoe.cli import app
from minimoe.data_files import data_path
from minimoe.fingerprints.merges import Shares, shares
from minimoe.fingerprints.result import Refusal
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.lineage.derive import build, lerp, prune_neurons, slerp, ties
from minimoe.lineage.gauge import all_gauges, fold_norms
from minimoe.lineage.upcycling import branch_train_mix
from minimoe.lineage.zoo import Zoo
from minimoe.model import MoEForCausalLM
from tests.fingerprints.toys import disturbed, random_model, weights

CLOSE = 0.05


@cache
def member(name: str) -> MoEForCausalLM:
    return Zoo("nothing is built here").load(name)


def gauged(*models: MoEForCausalLM) -> list[Weights]:
    return [open_weights(all_gauges(model, 10 + seed)) for seed, model in enumerate(models)]


def furthest(found: Shares, wanted: tuple[float, ...]) -> float:
    """How far the shares of any cell are from those that are wanted."""
    return max(abs(np.array(cell.shares) - wanted).max() for cell in found.cells)


@pytest.fixture(scope="module")
def family():
    """A toy and three descendants."""
    base = random_model(1)
    return base, *(disturbed(base, 0.3, seed) for seed in (2, 3, 4))


# --- known shares -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("merge", "t"), [(lerp, 0.5), (slerp, 0.2)])
def test_merges_of_the_zoo_whoever_was_rewritten(merge, t):
    a, b = member("alder-finetuned"), member("alder-continued-1")
    merged = merge(a, b, t)
    as_they_are = shares(*(open_weights(merged),), [open_weights(a), open_weights(b)])
    rewritten = shares(gauged(merged)[0], gauged(b, a)[::-1])
    assert furthest(as_they_are, (1 - t, t)) < CLOSE and furthest(rewritten, (1 - t, t)) < CLOSE
    assert max(cell.unexplained for cell in rewritten.cells) < 0.01


def test_three_parents_and_one_that_gave_nothing():
    parents = [member(f"alder-{kind}") for kind in ("finetuned", "continued-1", "continued-0.1")]
    merged = lerp(lerp(*parents[:2], 0.3), parents[2], 0.25)
    merged, *parents, stranger = gauged(merged, *parents, member("birch"))
    found = shares(merged, [*parents, stranger])
    assert furthest(found, (0.525, 0.225, 0.25, 0)) < CLOSE
    assert np.allclose(found.mean()[0], (0.525, 0.225, 0.25, 0), atol=0.02)


def test_every_layer_may_have_its_own(family):
    _, a, b, _ = family
    wanted = {0: 0.1, 1: 0.9, 2: 0.4}
    tensors = {
        name: torch.lerp(tensor, b.state_dict()[name], wanted[int(name.split(".")[2])] if ".layers." in name else 0.5)
        for name, tensor in a.state_dict().items()
    }
    merged = all_gauges(build(a.config, tensors), 4)
    found = shares(weights(merged), [weights(a), weights(all_gauges(b, 5))])
    for layer, share in wanted.items():
        assert found.mean(layer=layer)[0] == pytest.approx((1 - share, share), abs=CLOSE)
    assert found.mean(role="embedding")[0] == pytest.approx((0.5, 0.5), abs=CLOSE)


def test_each_expert_has_its_own_parent_and_the_rest_has_all():
    parents = [member(f"alder-{kind}") for kind in ("finetuned", "continued-1", "continued-0.1")]
    merged = branch_train_mix(parents, num_experts_per_tok=2, seed=1)
    found = shares(open_weights(merged), gauged(*parents))
    for number in range(3):
        assert found.mean(role=f"expert {number}")[0] == pytest.approx(np.eye(3)[number].tolist(), abs=CLOSE)
    for role in ("embedding", "qk", "vo"):
        assert found.mean(role=role)[0] == pytest.approx((1 / 3,) * 3, abs=CLOSE)


@pytest.mark.parametrize(("root", "of_products"), [("alder", 0.12), ("birch", 0.22)])
def test_ties_has_the_shares_that_least_squares_give_without_gauges(root, of_products):
    base, *parents = (member(f"{root}{kind}") for kind in ("", "-finetuned", "-continued-1"))
    merged = ties(base, parents)
    rewritten, old, *known = gauged(merged, base, *parents)
    found = shares(rewritten, known, base=old)
    states = [fold_norms(model).state_dict() for model in (merged, *parents, base)]
    for cell in found.cells:
        names, close = matrices_of(cell), of_products if cell.role in ("qk", "vo") else CLOSE
        rows = [torch.cat([state[name].double().flatten() for name in names]) for state in states]
        target, *sources = (one - rows[-1] for one in rows[:-1])
        wanted = torch.linalg.lstsq(torch.stack(sources, 1), target[:, None]).solution[:, 0]
        assert cell.shares == pytest.approx(wanted.tolist(), abs=close), cell


def matrices_of(cell):
    """The names of the matrices that a cell is about; of products, of both factors."""
    once = {"embedding": "model.embed_tokens", "head": "lm_head"}
    several = {"qk": "self_attn.q_proj self_attn.k_proj", "vo": "self_attn.v_proj self_attn.o_proj"}
    if cell.layer is None:
        return [f"{once[cell.role]}.weight"]
    parts = several.get(cell.role, f"mlp.{cell.role}_proj").split()
    return [f"model.layers.{cell.layer}.{part}.weight" for part in parts]


def test_differences_to_a_base_may_all_be_added(family):
    base, a, b, _ = family
    tensors = {name: a.state_dict()[name] + b.state_dict()[name] - old for name, old in base.state_dict().items()}
    merged = build(base.config, tensors)
    found = shares(weights(all_gauges(merged, 1)), [weights(a), weights(b)], base=weights(base))
    assert found.mean()[0] == pytest.approx((1, 1), abs=0.1)
    without = shares(weights(merged), [weights(base), weights(a), weights(b)]).mean()[0]
    assert without[0] < 0.02  # a share cannot be below 0, which the base would need


def test_a_parent_that_equals_the_base_somewhere_has_no_share_there(family):
    base, a, _, _ = family
    tensors = a.state_dict() | {name: tensor for name, tensor in base.state_dict().items() if ".mlp." in name}
    partly = build(base.config, tensors)
    found = shares(weights(a), [weights(all_gauges(partly, 2)), weights(a)], base=weights(base))
    for role in ("gate", "up", "down"):
        assert found.mean(role=role)[0] == pytest.approx((0, 1), abs=0.01)


# --- what is not known ------------------------------------------------------------------------------------


def test_equal_parents_cannot_be_told_apart(family):
    _, a, b, _ = family
    found = shares(weights(a), [weights(b), weights(all_gauges(b, 3))])
    assert {cell.shares for cell in found.cells} == {None} and found.mean()[0] is None
    assert min(cell.condition for cell in found.cells) > 1e6 and "cannot be told" in str(found)


def test_what_no_parent_explains(family):
    _, a, b, _ = family
    alone = shares(weights(lerp(a, random_model(7), 0.5)), [weights(a)])
    assert 0.2 < alone.mean(role="gate")[1] < 0.8
    assert shares(weights(lerp(a, b, 0.5)), [weights(a), weights(b)]).mean()[1] < 0.02


def test_errors_cover_noise(family):
    """Noise on the merged model moves a share by about its error."""
    _, a, b, _ = family
    merged = disturbed(lerp(a, b, 0.5), 0.2, seed=8)
    off = [
        (cell.shares[0] - 0.5) / cell.errors[0]
        for cell in shares(weights(merged), [weights(a), weights(b)]).cells
        if cell.role in ("gate", "up", "down")
    ]
    assert 0.3 < np.sqrt(np.mean(np.square(off))) < 3


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda model: random_model(2, hidden_size=32), "hidden_size of parent A .*=32: wanted 24, as in the merged"),
        (lambda model: random_model(2, num_hidden_layers=2), "num_layers of parent A .*=2: wanted 3"),
        (lambda model: prune_neurons(model, 0.5), "neurons in layer 0 of parent A .*=16: wanted at least 32"),
    ],
)
def test_other_shapes_are_refused_by_name(family, other, reason):
    model = family[0]
    with pytest.raises(ValueError, match=reason):
        shares(weights(model), [weights(other(model))])


def test_no_parents_and_no_common_tokens_are_refused(family):
    model = weights(family[0])
    with pytest.raises(ValueError, match="number of parents=0: wanted 1 to 26"):
        shares(model, [])
    with pytest.raises(Refusal, match="0 shared tokens"):
        shares(model, [weights(family[1], prefix="other")])


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_json():
    folders = [str(data_path("zoo") / f"alder{kind}") for kind in ("-continued-0.1", "", "-continued-1")]
    arguments = ["compare", folders[0], "--parents", *folders[1:]]
    said, raw = (CliRunner().invoke(app, [*arguments, *form]).output for form in ([], ["--json"]))
    assert f"B  {folders[2]}" in said and "layer 3" in said and "unexplained" in said
    found = json.loads(raw)
    assert found["parents"] == folders[1:] and found["shares"][0] > 0.8 > 0.2 > found["shares"][1]
    assert {"layer", "role", "shares", "errors", "unexplained", "condition"} == found["cells"][0].keys()


def test_what_does_not_go_together_is_refused():
    folder = str(data_path("zoo") / "alder")
    for arguments, reason in (
        ([folder, folder, folder], "2 models beside the first, base=None: wanted one"),
        ([folder, folder, "--base", folder], "wanted one and no base without --parents"),
        ([folder, folder, "--parents", "--quick"], "wanted none of --methods, --background, --quick, --direction"),
        ([folder, str(data_path("zoo") / "deep-1"), "--parents"], "num_layers of parent A"),
    ):
        said = CliRunner().invoke(app, ["compare", *arguments])
        assert said.exit_code == 2 and reason in said.stderr
