"""Small models in folders, whose tokenizer is that of the zoo."""

from pathlib import Path

from minimoe.data_files import data_path
from minimoe.model import MoEForCausalLM
from tests.fingerprints.toys import random_model


def toy(seed: int, **settings) -> MoEForCausalLM:
    model = random_model(seed, vocab_size=1024, num_hidden_layers=2, **settings)
    model.tokenizer_json = data_path("tokenizer.json").read_text(encoding="utf-8")
    return model


def folders(root: Path, count: int) -> list[str]:
    """Strangers, each in a folder of its own."""
    for seed in range(count):
        toy(seed).float().save_pretrained(root / f"model-{seed}")
    return [str(root / f"model-{seed}") for seed in range(count)]
