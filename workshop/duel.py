"""A duel: an attacker who raises the scores of a stranger by gradient steps, its function unchanged.

    python -m workshop.duel [METHOD ...] [--steps 600] [--home runs/zoo] [--out data/zoo/benchmark]

Against each method that enters the verdict he has two kinds of weapons, and a differentiable likeness of its score:

    gauges   what rewrites leave free: a factor for each rotary pair, one for each neuron's up row, a rotation of the
             residual stream. (Norms are folded into what reads them by every method, before anything else.)
    parts    a head or neuron for each of the target's, with free reading directions, from random weights: heads that
             write next to nothing, however loud they ask, and neurons that others undo (minimoe/lineage/plant.py).

csu is about an order, and takes no gradient: the order is found by one assignment, as `frame_neuron_order` does.

The likenesses stand below: aligned_cka as it is, of a head's queries and keys; of the whitened response the table A,
whitened by an iteration; of what looks at neurons, how near each of the target's has a neighbour. They are what the
attacker climbs, not what is reported: scores, levels and verdicts are those of `compare`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.atomic import write_atomically
from minimoe.fingerprints.anchors import choose_tokens
from minimoe.fingerprints.compare import DECIDING, compare
from minimoe.fingerprints.report import Report
from minimoe.fingerprints.verdict import EVIDENCE
from minimoe.lineage.derive import build_from, neurons, parts, set_neurons, wide
from minimoe.lineage.frame import frame_neuron_order
from minimoe.lineage.gauge import change_basis, fold_norms, scale_pairs
from minimoe.lineage.plant import plant_cancelling_neurons, plant_dead_heads
from minimoe.lineage.zoo import Zoo
from minimoe.model import MoEForCausalLM
from minimoe.model.attention import Attention
from minimoe.model.layers import MLP
from minimoe.training.tokenizer import load_tokenizer
from workshop.benchmark import to_csv
from workshop.benchmark_tables import to_markdown

EVERY = 50  # steps between looks at the true score
RATE = 0.03  # of Adam, in the units of the weights' spread
LOUD = 3e4  # what queries and keys of planted heads are multiplied by
TOKENS = 192  # that the attacker looks at: the first of those that the methods take


@dataclass(frozen=True, kw_only=True)
class View:
    """What the likenesses see of a dense model, norms folded; n heads times D, or neurons; N tokens, L layers."""

    inputs: Tensor  # [N, H], of root mean square 1
    outputs: Tensor  # [N, H]
    queries: Tensor  # [L, n, H], summed over those that share a key
    keys: Tensor  # [L, n, H]
    neurons: Tensor  # [L, n, 3, H]


def view_of(model: MoEForCausalLM) -> View:
    """What is seen of a model, in float64."""
    tokens = load_tokenizer().get_vocab()
    ids = [tokens[token] for token in choose_tokens(tokens, TOKENS, TOKENS)]
    rows, groups = wide(model.model.embed_tokens.weight)[ids], model.config.num_key_value_heads
    layers = []
    for block in model.model.layers:
        before, after = (wide(norm.weight) for norm in (block.input_layernorm, block.post_attention_layernorm))
        q = wide(block.self_attn.q_proj.weight).unflatten(0, (groups, -1, model.config.head_dim)).sum(1).flatten(0, 1)
        of_mlp = wide(neurons(block.mlp)) * torch.stack([after, after, torch.ones_like(after)])
        layers.append((q * before, wide(block.self_attn.k_proj.weight) * before, of_mlp))
    queries, keys, of_mlps = map(torch.stack, zip(*layers, strict=True))
    outputs = wide(model.lm_head.weight)[ids] * wide(model.model.norm.weight)
    inputs = rows / rows.square().mean(1, keepdim=True).sqrt()
    return View(inputs=inputs, outputs=outputs, queries=queries, keys=keys, neurons=of_mlps)


# --- likenesses of scores ---------------------------------------------------------------------------------


def likeness_of_cka(suspect: View, target: View) -> Tensor:
    """`aligned_cka`."""
    left, _, right = torch.linalg.svd(suspect.inputs.mT @ target.inputs)
    turn, score = left @ right, 0
    for layer in range(len(target.keys)):
        grams = []
        for q, k in (
            (suspect.queries[layer] @ turn, suspect.keys[layer] @ turn),
            (target.queries[layer], target.keys[layer]),
        ):
            grams += [_centred(q.mT @ k), _centred(k.mT @ q)]
        score = score + (grams[0] * grams[2]).sum() / 2 + (grams[1] * grams[3]).sum() / 2
    return score / len(target.keys)


def _centred(product: Tensor) -> Tensor:
    gram = product @ product.mT
    gram = gram - gram.diagonal().diag_embed()
    n, rows = len(gram), gram.sum(0) / (len(gram) - 2)
    centred = gram - rows - rows[:, None] + gram.sum() / ((n - 1) * (n - 2))
    centred = centred - centred.diagonal().diag_embed()
    return centred / centred.norm()


def likeness_of_response(suspect: View, target: View) -> Tensor:
    """The table A of `virtual_response` with `whiten`."""
    return (_whitened(suspect) * _whitened(target)).sum((1, 2)).mean()


def _whitened(view: View, steps: int = 10) -> Tensor:
    """Tables with all large singular values near 1, by Newton and Schulz's iteration, and of norm 1."""
    table = (view.inputs @ view.queries.mT) @ (view.inputs @ view.keys.mT).mT
    table = table - table.mean(1, keepdim=True) - table.mean(2, keepdim=True) + table.mean((1, 2), keepdim=True)
    table = table / torch.linalg.matrix_norm(table)[:, None, None]
    for _ in range(steps):
        table = 1.5 * table - 0.5 * table @ table.mT @ table
    return table / torch.linalg.matrix_norm(table)[:, None, None]


def likeness_of_neurons(suspect: View, target: View) -> Tensor:
    """How near each neuron of the target has a neighbour by gate, up and down over tokens; 1: all are there."""
    ours, theirs = (_features(view) for view in (suspect, target))
    table = theirs @ ours.mT  # [3, L, I', I]
    near = table[0] + table[1].abs() + table[2].abs()
    return (near.mul(20).logsumexp(-1) / 20).mean() / 3


def _features(view: View) -> Tensor:
    sides = view.inputs, view.inputs, view.outputs
    over_tokens = torch.stack([view.neurons[:, :, face] @ side.mT for face, side in enumerate(sides)])
    return F.normalize(over_tokens - over_tokens.mean(-1, keepdim=True), dim=-1)


# --- weapons ----------------------------------------------------------------------------------------------


class Gauges:
    """Factors of rotary pairs and of up rows, and a rotation of the residual stream."""

    def __init__(self, stranger: MoEForCausalLM, looks_at_heads: bool) -> None:
        self.model, self.start = fold_norms(stranger), view_of(stranger)
        config, layers = stranger.config, stranger.config.num_hidden_layers
        self.pairs = torch.zeros(layers, config.num_key_value_heads, config.head_dim // 2, dtype=torch.float64)
        self.ups = torch.zeros(layers, config.intermediate_size, dtype=torch.float64)
        self.turn = torch.zeros(config.hidden_size, config.hidden_size, dtype=torch.float64)
        self.free = [self.pairs, self.ups, self.turn]

    def seen(self) -> View:
        """The stranger after the rewrite."""
        rotation, by = self._rotation(), torch.cat([self.pairs, self.pairs], dim=-1).flatten(1)[..., None].exp()
        faces = torch.stack([torch.ones_like(self.ups), self.ups.exp(), (-self.ups).exp()], dim=-1)[..., None]
        return View(
            inputs=self.start.inputs @ rotation,
            outputs=self.start.outputs @ rotation,
            queries=self.start.queries * by @ rotation,
            keys=self.start.keys / by @ rotation,
            neurons=self.start.neurons * faces @ rotation,
        )

    def _rotation(self) -> Tensor:
        return (self.turn - self.turn.mT).matrix_exp()

    @torch.no_grad()
    def model_now(self) -> MoEForCausalLM:
        """The rewritten model."""
        changed = build_from(self.model, self.model.state_dict())
        for factors, attention in zip(self.pairs, parts(changed, Attention), strict=True):
            scale_pairs(attention, factors.exp())
        for factors, mlp in zip(self.ups, parts(changed, MLP), strict=True):
            rows = neurons(mlp)
            by = torch.stack([torch.ones_like(factors), factors.exp(), (-factors).exp()], dim=-1)
            set_neurons(mlp, (wide(rows) * by[..., None]).to(rows))
        rotation = self._rotation()
        change_basis(changed, lambda vectors: vectors @ rotation)
        return changed


class Parts:
    """Heads or neurons with free reading directions, those of a puppet: random layers under the stranger's tokens."""

    def __init__(self, stranger: MoEForCausalLM, looks_at_heads: bool) -> None:
        self.stranger, self.looks_at_heads, self.start = stranger, looks_at_heads, view_of(stranger)
        drawn = view_of(MoEForCausalLM(replace(stranger.config, initializer_range=0.1), seed=7))
        self.free = [drawn.queries, drawn.keys] if looks_at_heads else [drawn.neurons]

    def seen(self) -> View:
        """The stranger with the parts, as whoever does not ask what they write would see it."""
        if not self.looks_at_heads:
            return replace(self.start, neurons=torch.cat([self.start.neurons, self.free[0]], dim=1))
        q, k = self.free
        queries, keys = torch.cat([self.start.queries, LOUD * q], dim=1), torch.cat([self.start.keys, LOUD * k], dim=1)
        return replace(self.start, queries=queries, keys=keys)

    @torch.no_grad()
    def model_now(self) -> MoEForCausalLM:
        """The stranger with the parts in it."""
        puppet = fold_norms(self.stranger)
        each = puppet.config.num_attention_heads // puppet.config.num_key_value_heads
        for layer, block in enumerate(puppet.model.layers):
            if self.looks_at_heads:
                q, k = (rows[layer] for rows in self.free)
                shared = (
                    q.unflatten(0, (-1, 1, puppet.config.head_dim)) / each
                )  # queries of a group alike: their sum is q
                block.self_attn.q_proj.weight.copy_(shared.expand(-1, each, -1, -1).flatten(0, 2))
                block.self_attn.k_proj.weight.copy_(k)
            else:
                set_neurons(block.mlp, self.free[0][layer].to(neurons(block.mlp)))
        if self.looks_at_heads:
            return plant_dead_heads(self.stranger, puppet, gain=LOUD)
        return plant_cancelling_neurons(self.stranger, puppet, way="squares")


WEAPONS = {"gauges": Gauges, "parts": Parts}
Likeness = Callable[[View, View], Tensor]
LIKENESSES: dict[str, Likeness] = {
    "aligned_cka": likeness_of_cka,
    "virtual_response_whitened": likeness_of_response,
}  # of all other methods but csu: likeness_of_neurons


# --- the duel ---------------------------------------------------------------------------------------------


def duel(method: str, weapon: str, stranger: MoEForCausalLM, target: MoEForCausalLM, steps: int) -> dict[str, Any]:
    """One method against one weapon.

    Returns:
        "before" and "after", the true scores, of csu where its p-value lies on its scale; the "level" where evidence
        begins; the "verdict" at the end, to which other methods may have led; "steps" and "seconds" until the score
        was above its level, or all that were spent.
    """
    found, started = _asked(stranger, target), time.perf_counter()
    row = {"method": method, "weapon": weapon, "before": _score(found, method), "level": found.methods[method].level}
    for taken, model in _attack(method, weapon, stranger, target, steps):
        found, row["steps"] = _asked(model, target), taken
        if (found.methods[method].standing or 0) > EVIDENCE:
            break
    seconds = round(time.perf_counter() - started, 1)
    return {**row, "after": _score(found, method), "verdict": found.verdict, "seconds": seconds}


def _attack(
    method: str, weapon: str, stranger: MoEForCausalLM, target: MoEForCausalLM, steps: int
) -> Iterator[tuple[int, MoEForCausalLM]]:
    """The model after every so many steps."""
    if method == "csu":
        yield 1, frame_neuron_order(stranger, target)
        return
    likeness, seen = LIKENESSES.get(method, likeness_of_neurons), view_of(target)
    held = WEAPONS[weapon](stranger, method in LIKENESSES)
    for tensor in held.free:
        tensor.requires_grad_(True)
    optimiser = torch.optim.Adam(held.free, lr=RATE)
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        (-likeness(held.seen(), seen)).backward()
        optimiser.step()
        if step % EVERY == 0 or step == steps:
            yield step, held.model_now()


def _asked(model: MoEForCausalLM, target: MoEForCausalLM) -> Report:
    return compare(target, model, tokenizer=load_tokenizer())


def _score(found: Report, method: str) -> float | None:
    evidence = found.methods[method]
    return None if evidence.result.score is None else evidence.scale.position(evidence.result)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m workshop.duel", description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="all that enter the verdict when left out")
    parser.add_argument("--steps", type=int, default=600, help="that the attacker takes at most")
    parser.add_argument("--home", type=Path, default=Path("runs/zoo"), help="of members that are not shipped")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="for duel.csv")
    given = parser.parse_args(arguments)
    if unknown := sorted(set(given.methods) - set(DECIDING)):
        parser.error(f"METHOD {', '.join(unknown)}: wanted some of {', '.join(DECIDING)}")
    stranger, target = map(Zoo(given.home).load, ("stranger-13", "alder"))
    torch.set_num_threads(1)
    rows = []
    for method in given.methods or DECIDING:
        for weapon in ("order",) if method == "csu" else WEAPONS:
            rows.append(duel(method, weapon, stranger, target, given.steps))
            print(rows[-1], flush=True)
    write_atomically(given.out / "duel.csv", to_csv(rows).encode())
    print(to_markdown(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
