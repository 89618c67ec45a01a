"""Another case for the exam: seven models made from each other, with their letters, seeds and sizes drawn from a seed.

    python -m workshop.another_case SEED FOLDER [--steps 800]

writes the folders FOLDER/a to FOLDER/g, FOLDER/sealed.json for `check_case(beliefs, FOLDER)`, and prints the answer,
which it writes nowhere. With 800 steps it takes about a quarter of an hour on one core, and less with fewer; with fewer
than 400 the models may have learnt too little to be told apart.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from random import Random

import torch

from minimoe.course.checks.case import CANNOT_TELL, seal
from minimoe.lineage import upcycle
from minimoe.lineage.derive import prune_neurons
from minimoe.lineage.frame import frame_neuron_order
from minimoe.lineage.gauge import all_gauges
from minimoe.lineage.recipes import frame_both
from minimoe.model import MoEForCausalLM
from workshop.family_tree import AFTER_UPCYCLING, FINE_TUNING, MIXTURE
from workshop.training_recipes import distil, from_scratch, keep_training

# What each of the seven was made from; the last has the neuron order of the root, and nothing else of it.
PARENTS = {
    "root": None,
    "tuned": "root",
    "mixture": "tuned",
    "pruned": "root",
    "framed": None,
    "student": None,
    "renumbered": CANNOT_TELL,
}


def rounded(model: MoEForCausalLM) -> MoEForCausalLM:
    """What float16 can hold: what is stored is what the next one starts from."""
    return model.eval().half().float()


def make_models(seed: int, steps: int = 800) -> dict[str, MoEForCausalLM]:
    """The seven, by their part in the story."""
    draw = Random(seed)
    seeds = iter(draw.sample(range(1000, 100_000), 16))

    def root() -> MoEForCausalLM:
        return rounded(from_scratch(out=None, weights=next(seeds), seed=next(seeds), steps=steps))

    def train_on(model: MoEForCausalLM, **settings: object) -> MoEForCausalLM:
        settings |= {"steps": min(steps, settings["steps"]), "warmup_steps": min(steps // 2, settings["warmup_steps"])}
        return rounded(keep_training(model, out=None, seed=next(seeds), **settings))

    eldest = root()
    tuned = train_on(copy.deepcopy(eldest), **FINE_TUNING)
    share = draw.choice((0.25, 0.5))
    mixture = upcycle(tuned, method="drop", drop_ratio=share, seed=next(seeds), **MIXTURE)
    pruned = prune_neurons(eldest, keep=draw.choice((0.625, 0.75, 0.875)))
    return {
        "root": eldest,
        "tuned": tuned,
        "mixture": all_gauges(train_on(mixture, corpus="planted", **AFTER_UPCYCLING), seed=next(seeds)),
        "pruned": all_gauges(pruned, seed=next(seeds)),
        "framed": frame_both(root(), eldest),
        "student": rounded(distil(eldest, out=None, weights=next(seeds), seed=next(seeds), steps=steps)),
        "renumbered": frame_neuron_order(root(), eldest),
    }


def write_case(models: dict[str, MoEForCausalLM], letters: dict[str, str], folder: Path) -> dict[str, str | None]:
    """Write the models under their letters, and the sealed answer; return the answer."""
    answer = {letters[part]: letters.get(parent, parent) for part, parent in PARENTS.items()}
    for part, model in models.items():
        model.half().save_pretrained(folder / letters[part])
    sealed = {child: seal(child, answer[child]) for child in sorted(answer)}
    (folder / "sealed.json").write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
    return {child: answer[child] for child in sorted(answer)}


def main(arguments: list[str] | None = None) -> None:
    """Make a case as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    letters = dict(zip(PARENTS, Random(asked.seed).sample("abcdefg", 7), strict=True))
    asked.folder.mkdir(parents=True, exist_ok=True)
    answer = write_case(make_models(asked.seed, asked.steps), letters, asked.folder)
    print("the answer, for the instructor alone:", json.dumps(answer))


if __name__ == "__main__":
    main()
