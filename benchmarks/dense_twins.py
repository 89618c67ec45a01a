"""One training step of the course's mixture against its dense twins, which have equal active or equal total parameters.

    python -m benchmarks.dense_twins [--rounds N] [--threads 1 2] [--json FILE]

This is what decides how many steps each may take in equal time (`minimoe/training/presets.py`). There is no target
to reach: the time of a twin as a share of the mixture's is the result, and notebook 04 reads it from
data/runs/step_time.json.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.timing import finish, measure, parse_arguments, report, torch_threads
from benchmarks.train_step import Trainer
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.training.loop import Settings
from minimoe.training.presets import small_config

MIXTURE = "mixture"
EQUAL_WITHIN = 0.01


def twins(vocab_size: int = 1024, experts: int = 8, experts_per_token: int = 2) -> dict[str, MoEConfig]:
    """The mixture and its dense twins.

    Raises:
        AssertionError: a twin has not the parameters it should have, to 1 %.
    """
    configs = {
        MIXTURE: small_config(vocab_size, experts=experts, experts_per_token=experts_per_token),
        "dense, equal active": small_config(vocab_size, experts=0, experts_per_token=experts_per_token),
        "dense, equal total": small_config(vocab_size, experts=0, experts_per_token=experts),
    }
    mixture, equal_active, equal_total = configs.values()
    _assert_close(equal_active.num_parameters(), mixture.num_parameters(active=True))
    _assert_close(equal_total.num_parameters(), mixture.num_parameters())
    return configs


def _assert_close(found: int, wanted: int) -> None:
    assert abs(found / wanted - 1) < EQUAL_WITHIN, f"{found} parameters: wanted {wanted}, to {EQUAL_WITHIN:.0%}"


def make_trainers(configs: dict[str, MoEConfig], batch_size: int, seq_len: int) -> dict[str, Trainer]:
    """Each model with its optimizer, all on the same batch of random tokens."""
    mixture = configs[MIXTURE]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(mixture.vocab_size, (batch_size, seq_len), generator=generator)
    return {name: Trainer(MoEForCausalLM(config), ids) for name, config in configs.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with the given command line; None: that of the process."""
    arguments = parse_arguments("Time a training step of a mixture and its dense twins.", argv, rounds=40)
    settings, configs, results = Settings(), twins(), []
    for threads in arguments.threads:
        trainers = make_trainers(configs, settings.batch_size, settings.seq_len)
        with torch_threads(threads):
            seconds = measure(trainers, arguments.rounds)
        results.append({"threads": threads} | report(f"training step, threads {threads}", seconds, MIXTURE, []))
    finish("dense_twins", results, arguments.json)


if __name__ == "__main__":
    main()
