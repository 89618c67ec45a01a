"""A finished model in half the space.

    python -m workshop.halve SOURCE TARGET

reads the folder that training left and writes its model, in float16, with tokenizer and recipe to another folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from minimoe.atomic import write_atomically
from minimoe.model import MoEForCausalLM
from minimoe.training.loop import RECIPE_FILE


def halve(source: str | Path, target: str | Path) -> None:
    """Write the model in `source` to `target` as float16, and beside it tokenizer.json and training.json unchanged.

    To compute with it, read it with `from_pretrained(target, dtype=torch.float32)`: the rounded weights, the usual
    arithmetic.

    Raises:
        FileNotFoundError: `source` lacks its tokenizer or its recipe; nothing is written.
        CheckpointError: it holds no whole model.
        OverflowError: a weight is too large for float16, 65,504 being the largest it has.
    """
    beside = {name: (Path(source) / name).read_bytes() for name in ("tokenizer.json", RECIPE_FILE)}
    model = MoEForCausalLM.from_pretrained(source)
    for name, weight in model.state_dict().items():
        if weight.abs().max() > torch.finfo(torch.float16).max:
            raise OverflowError(f"{source}: {name} holds {weight.abs().max():.3g}, wanted at most 65504 for float16")
    model.half().save_pretrained(target)
    for name, content in beside.items():
        write_atomically(Path(target) / name, content)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder with a finished model")
    parser.add_argument("target", type=Path, help="a folder, made if missing")
    arguments = parser.parse_args()
    halve(arguments.source, arguments.target)


if __name__ == "__main__":
    main()
