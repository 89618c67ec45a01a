"""The duel: what the attacker sees is what he makes, and what he makes computes what the stranger did."""

import csv

import pytest
import torch
from torch.testing import assert_close

from minimoe.data_files import data_path
from minimoe.fingerprints.aligned_cka import aligned_cka
from minimoe.fingerprints.compare import DECIDING
from minimoe.fingerprints.weights import open_weights
from minimoe.model import MoEForCausalLM
from minimoe.training.tokenizer import load_tokenizer
from workshop.duel import LIKENESSES, Gauges, Parts, View, _attack, likeness_of_cka, likeness_of_neurons, view_of

IDS = torch.randint(1024, (2, 16), generator=torch.Generator().manual_seed(0))


def shipped(name: str) -> MoEForCausalLM:
    return MoEForCausalLM.from_pretrained(data_path("zoo") / name, dtype=torch.float64)


@torch.no_grad()
def logits(model: MoEForCausalLM) -> torch.Tensor:
    return model(IDS).logits


def tables(view: View) -> dict[str, torch.Tensor]:
    """What no gauge changes: what tokens ask of each other, and what neurons do for them."""
    asked = (view.inputs @ view.queries.mT) @ (view.inputs @ view.keys.mT).mT
    gate, up, down = (view.neurons[:, :, face] @ view.inputs.mT for face in range(3))
    down = view.neurons[:, :, 2] @ view.outputs.mT
    return {"asked": asked, "gate": gate, "written": up[..., None] * down[..., None, :8]}


@pytest.mark.parametrize("looks_at_heads", [True, False])
def test_gauges_change_no_output_and_no_likeness(looks_at_heads):
    stranger, target = shipped("stranger-13"), view_of(shipped("alder"))
    held, generator = Gauges(stranger, looks_at_heads), torch.Generator().manual_seed(1)
    for tensor in held.free:
        tensor.normal_(0, 0.1, generator=generator)
    changed = held.model_now()
    assert_close(logits(changed), logits(stranger), rtol=0, atol=1e-9)
    moved = changed.model.layers[0].mlp.up_proj.weight - stranger.model.layers[0].mlp.up_proj.weight
    assert float(moved.detach().norm()) > 1
    for name, table in tables(held.seen()).items():
        assert_close(table, tables(view_of(changed))[name], rtol=0, atol=1e-8 * float(table.abs().max()))
        assert_close(table, tables(view_of(stranger))[name], rtol=0, atol=1e-8 * float(table.abs().max()))
    for likeness in (*LIKENESSES.values(), likeness_of_neurons):
        assert float(likeness(held.seen(), target)) == pytest.approx(
            float(likeness(view_of(stranger), target)), abs=1e-6
        )


@pytest.mark.parametrize("looks_at_heads", [True, False])
def test_parts_are_as_seen_and_change_no_output(looks_at_heads):
    stranger = shipped("stranger-13")
    held = Parts(stranger, looks_at_heads)
    changed = held.model_now()
    assert_close(logits(changed), logits(stranger), rtol=0, atol=1e-4)
    seen, made = held.seen(), view_of(changed)
    if looks_at_heads:
        wanted, found = seen.queries.mT @ seen.keys, made.queries.mT @ made.keys
    else:  # what undoes them stands last
        wanted, found = seen.neurons[:, :, 0], made.neurons[:, : seen.neurons.shape[1], 0]
    assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_steps_raise_the_likeness():
    stranger, target = shipped("stranger-13"), shipped("alder")
    start, (few, model) = Parts(stranger, True).seen(), next(_attack("aligned_cka", "parts", stranger, target, 8))
    before, after = (float(likeness_of_cka(view, view_of(target))) for view in (start, view_of(model)))
    assert few == 8 and after > before + 0.1
    with torch.no_grad():
        assert_close(logits(model), logits(stranger), rtol=0, atol=1e-4)


def test_the_likeness_of_cka_is_aligned_cka():
    """But for the tokens that residual streams are aligned with, of which the attacker looks at half."""
    a, b = shipped("alder"), shipped("stranger-13")
    true = aligned_cka(*(open_weights(model, tokenizer=load_tokenizer()) for model in (a, b))).score
    assert float(likeness_of_cka(view_of(b), view_of(a))) == pytest.approx(true, abs=0.05)
    assert float(likeness_of_cka(view_of(a), view_of(a))) == pytest.approx(1)
    assert float(likeness_of_neurons(view_of(a), view_of(a))) == pytest.approx(1, abs=0.02)


def test_in_the_shipped_table_every_method_is_attacked_and_no_verdict_falls():
    with open(data_path("zoo/benchmark/duel.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == set(DECIDING)
    for row in rows:
        assert row["verdict"] not in ("same weights", "shared lineage")
        assert (float(row["after"]) > float(row["level"])) == (row["method"] == "csu")
