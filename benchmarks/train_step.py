"""One whole training step: our MoEForCausalLM against transformers' MixtralForCausalLM, same shape, same weights.

    python -m benchmarks.train_step [--rounds N] [--threads 1 2] [--json FILE]

A step is the forward pass with labels and balance loss, the backward pass, gradient clipping and AdamW. Before
anything is timed it is asserted that both models compute the same cross-entropy and, pooled over the layers as
transformers does it, the same balance loss. (In training ours takes the balance loss layer by layer.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.timing import Target, finish, measure, parse_arguments, report, torch_threads
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.model.balance import load_balancing_loss

OURS = "minimoe"
BATCH, LENGTH = 8, 256
CONFIG = MoEConfig(
    vocab_size=1024,
    hidden_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    router_aux_loss_coef=0.01,
)


def their_model(ours: MoEForCausalLM, implementation: str) -> MixtralForCausalLM:
    """Mixtral with the weights of `ours`. Left to itself, it would choose "grouped_mm"."""
    config = ours.config
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_word_embeddings,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            router_aux_loss_coef=config.router_aux_loss_coef,
            use_cache=False,  # of no use in training
            experts_implementation=implementation,
        )
    )
    weights = ours.state_dict()
    for name in [name for name in weights if name.endswith("gate_proj")]:
        gate_up = [weights.pop(name), weights.pop(name.replace("gate_proj", "up_proj"))]
        weights[name.replace("gate_proj", "gate_up_proj")] = torch.cat(gate_up, dim=1)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model


def assert_same_losses(ours: MoEForCausalLM, theirs: MixtralForCausalLM, ids: Tensor) -> None:
    """Both models must agree on the cross-entropy and on the pooled balance loss.

    Raises:
        AssertionError: naming the loss.
    """
    with torch.no_grad():
        own = ours(ids, labels=ids, output_router_logits=True)
        other = theirs(ids, labels=ids, output_router_logits=True)
    pooled = load_balancing_loss(own.router_outputs, across_layers="pooled")
    cross_entropy = other.loss - theirs.router_aux_loss_coef * other.aux_loss
    for name, found, wanted in (
        ("cross-entropy", own.cross_entropy, cross_entropy),
        ("balance loss", pooled, other.aux_loss),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0, msg=lambda text, name=name: f"{name}: {text}")


class Trainer:
    """A model and its optimizer. Calling it takes one training step on the same batch."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model = model.train()
        self.ids = ids
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        output = self.model(input_ids=self.ids, labels=self.ids, output_router_logits=True)
        output.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def make_trainers() -> dict[str, Trainer]:
    """Ours, and transformers with both of its experts implementations, all from the same weights."""
    ids = torch.randint(CONFIG.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ours = MoEForCausalLM(CONFIG)
    trainers = {OURS: Trainer(ours, ids)}
    for implementation in ("eager", "grouped_mm"):
        theirs = their_model(ours, implementation)
        assert_same_losses(ours, theirs, ids)
        trainers[f"transformers {implementation}"] = Trainer(theirs, ids)
    return trainers


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with the given command line; None: that of the process."""
    arguments = parse_arguments("Time a whole training step.", argv, rounds=20)
    results: list[dict[str, Any]] = []
    for threads in arguments.threads:
        trainers = make_trainers()
        with torch_threads(threads):
            seconds = measure(trainers, arguments.rounds)
        targets = [Target(name, 1.0) for name in trainers if name != OURS]
        result = report(f"training step, threads {threads}", seconds, OURS, targets)
        results.append({"threads": threads} | result)
    finish("train_step", results, arguments.json)


if __name__ == "__main__":
    main()
