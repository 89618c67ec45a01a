"""Fine-grained and shared experts, as much of both stored and met: the table behind the sweep of notebook 13.

    python -m workshop.grain [--seeds 0 1 2] [--steps 400]

trains each of `presets.GRAINS` on the planted corpus (a minute a seed on one thread) and writes data/runs/grain.csv:
the held-out nats per token after the last step, mean over domains.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from minimoe.atomic import write_atomically
from minimoe.data_files import data_path
from minimoe.model import MoEForCausalLM
from minimoe.training.corpus import Corpus
from minimoe.training.loop import evaluate, train
from minimoe.training.presets import GRAINS, grain_config
from workshop.experiments import to_csv


def sweep(corpus: Corpus, seeds: Sequence[int], **settings: Any) -> list[dict[str, Any]]:
    """A row for each model and seed; the settings are those of `train`."""
    rows = []
    for name, (pieces, shared) in GRAINS.items():
        for seed in seeds:
            model = MoEForCausalLM(grain_config(pieces, shared, corpus.vocab_size), seed=seed)
            log = train(model, corpus, seed=seed, **settings)
            held_out = evaluate(model, corpus, batches=16)
            nats = sum(held_out.values()) / len(held_out)
            rows.append({"model": name, "seed": seed, "steps": len(log), "nats": nats})
    return rows


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = sweep(Corpus.planted(), arguments.seeds, steps=arguments.steps)
    write_atomically(data_path("runs") / "grain.csv", to_csv(rows).encode())


if __name__ == "__main__":
    main()
