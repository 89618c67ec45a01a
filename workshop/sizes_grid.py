"""Models of other sizes than the zoo's: a grid of them, trained.

`GRID` names them. The recipe is the zoo's, but for the steps, fewer in large models, and the learning rate of those
wider than 128, which falls with the root of the width. A model is left as a complete Hugging Face folder in float16,
with lineage.json beside it; models are not shipped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from shutil import rmtree
from statistics import fmean
from zlib import crc32

import numpy as np
import torch

from minimoe.atomic import write_atomically
from minimoe.lineage.zoo import LINEAGE
from minimoe.model import MoEConfig, MoEForCausalLM
from minimoe.training import Corpus, Settings, evaluate, train
from minimoe.training.documents import SPLITS, TRAIN
from minimoe.training.tokenizer import END_OF_TEXT_ID, VOCAB_SIZE
from workshop.family_tree import CONTINUING, FINE_TUNING
from workshop.rebuild import EXCERPT, train_tokenizer
from workshop.training_recipes import open_corpus

HOME = Path("runs/sizes")
# Attention heads, key-value heads, head size, and the width of an MLP, about 2.7 times the hidden size.
SHAPES = {
    48: (2, 1, 24, 128),
    64: (2, 1, 32, 176),
    128: (4, 2, 32, 344),
    160: (6, 3, 28, 432),
    192: (6, 3, 32, 512),
    256: (8, 2, 32, 688),
    384: (12, 3, 32, 1024),
}
FULL_RATE_UP_TO = 128  # wide; the learning rate of wider models is smaller
TOKENIZER_TEXT = 200  # excerpts of each domain, for tokenizers of other sizes


@dataclass(frozen=True, kw_only=True)
class Grown:
    """A model that is trained: a root from random weights, or a descendant from its parent's."""

    name: str
    width: int
    depth: int
    steps: int
    experts: int = 0
    vocabulary: int = VOCAB_SIZE
    parent: str | None = None
    kind: str = ""  # what was done to the parent; "" for a root

    @property
    def seed(self) -> int:
        """Of the random weights and of the batches; it does not move when the grid grows."""
        return crc32(self.name.encode())

    @property
    def config(self) -> MoEConfig:
        """The dense shape of the zoo; a mixture has experts as wide as the MLP, half so wide if there are 8."""
        heads, key_values, head, mlp = SHAPES[self.width]
        mixture = {"router_aux_loss_coef": 0.01, "moe_intermediate_size": mlp * 4 // max(self.experts, 4)}
        return MoEConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=heads,
            num_key_value_heads=key_values,
            head_dim=head,
            intermediate_size=mlp,
            num_experts=self.experts,
            model_type="mixtral" if self.experts else "llama",
            **(mixture if self.experts else {}),
        )

    @property
    def settings(self) -> dict[str, float]:
        """Of its training, the steps and the seed included."""
        usual = {"": {}, "finetuned": FINE_TUNING, "continued": CONTINUING}[self.kind]
        rate = usual.get("learning_rate", Settings.learning_rate) * min(1.0, FULL_RATE_UP_TO / self.width) ** 0.5
        kept = {key: value for key, value in usual.items() if key != "corpus"}
        return {**kept, "learning_rate": rate, "steps": self.steps, "seed": self.seed}

    @property
    def corpus(self) -> Corpus:
        """What it is trained on."""
        return corpus_of(self.vocabulary) if self.kind != "finetuned" else open_corpus("planted")


def _roots(seen: Counter[str], count: int, width: int, depth: int, steps: int, **more: int) -> Iterator[Grown]:
    letters = "".join(f"-{key[0]}{value}" for key, value in more.items())
    for _ in range(count):
        cell = f"{width}x{depth}{letters}"
        seen[cell] += 1
        yield Grown(name=f"{cell}-{seen[cell]}", width=width, depth=depth, steps=steps, **more)


def _descendants(root: Grown, steps: int) -> Iterator[Grown]:
    for kind in ("finetuned", "continued"):
        facts = {**asdict(root), "name": f"{root.name}-{kind}", "steps": steps, "parent": root.name, "kind": kind}
        yield Grown(**facts)


def grow(rows: Iterable[tuple]) -> dict[str, Grown]:
    """The models of a grid: of a row (count, width, depth, steps, others) roots, of (root, steps) two descendants."""
    seen: Counter[str] = Counter()
    found: dict[str, Grown] = {}
    for row in rows:
        if isinstance(row[0], str):
            models = _descendants(found[row[0]], row[1])
        else:
            models = _roots(seen, *row[:4], **(row[4] if len(row) > 4 else {}))
        found |= {model.name: model for model in models}
    return found


# Cheap ones first, and two of every width before there are four of any: whatever is trained is a grid.
GRID = grow(
    [
        (2, 48, 2, 800),
        (2, 64, 4, 800),
        (2, 128, 2, 400),
        (2, 48, 8, 800),
        (2, 192, 2, 400),
        ("64x4-1", 250),
        ("48x2-1", 250),
        (2, 384, 2, 200),
        (2, 256, 4, 200),
        (2, 160, 8, 200),
        (1, 64, 4, 800, {"experts": 4}),
        (1, 64, 4, 800, {"vocabulary": 512}),
        (1, 64, 4, 800, {"vocabulary": 2048}),
        ("128x2-1", 250),
        (2, 128, 4, 800),
        (1, 128, 4, 400, {"experts": 8}),
        ("192x2-1", 150),
        ("48x8-1", 150),
        (2, 192, 4, 400),
        (2, 48, 16, 800),
        (1, 64, 4, 400, {"experts": 4}),
        ("384x2-1", 100),
        ("256x4-1", 100),
        ("160x8-1", 100),
        (2, 384, 4, 200),
        (1, 192, 4, 200, {"experts": 4}),
        (1, 48, 2, 400),
        (1, 64, 4, 1600),
        (1, 64, 4, 400),
        (1, 48, 8, 400),
        (1, 128, 4, 400),
        (1, 128, 4, 1600),
        (1, 256, 4, 400),
        (1, 192, 4, 200),
        (1, 192, 4, 800),
        (1, 256, 16, 200),
        (1, 384, 16, 200),
    ]
)


# --- text for other vocabularies --------------------------------------------------------------------------


@cache
def corpus_of(vocabulary: int) -> Corpus:
    """The real corpus in tokens of a vocabulary of this size."""
    corpus = open_corpus("real")
    return corpus if vocabulary == VOCAB_SIZE else retokenise(corpus, vocabulary)


def retokenise(corpus: Corpus, vocabulary: int) -> Corpus:
    """The same text and splits in tokens of a vocabulary of this size, whose tokenizer is trained on some of it."""
    documents = {domain: {split: corpus.documents(domain, split) for split in SPLITS} for domain in corpus.domains}
    excerpts = (excerpt for splits in documents.values() for excerpt in _excerpts(splits[TRAIN]))
    tokenizer = train_tokenizer(excerpts, vocab_size=vocabulary)
    tokenizer.encode_special_tokens = True
    streams = {}
    for domain, splits in documents.items():
        encoded = {split: tokenizer.encode_batch(texts) for split, texts in splits.items()}
        streams[domain] = {split: _stream([one.ids for one in found]) for split, found in encoded.items()}
    return Corpus(streams, corpus.digests, tokenizer)


def _excerpts(documents: Sequence[str]) -> list[str]:
    text = "\n".join(documents)
    starts = range(0, len(text), max(EXCERPT, len(text) // TOKENIZER_TEXT))
    return [text[start : start + EXCERPT] for start in starts]


def _stream(documents: Iterable[Sequence[int]]) -> np.ndarray:
    ids = [END_OF_TEXT_ID]
    for document in documents:
        ids += [*document, END_OF_TEXT_ID]
    return np.array(ids, dtype=np.uint16)


# --- training ---------------------------------------------------------------------------------------------


def load(home: Path, name: str) -> MoEForCausalLM:
    """A trained model in float32, in evaluation mode."""
    return MoEForCausalLM.from_pretrained(home / name, dtype=torch.float32)


def is_there(home: Path, name: str) -> bool:
    """Whether a model was trained to the end."""
    return (home / name / "config.json").exists()


def train_one(home: Path, model: Grown) -> float:
    """Train a model whose parent is there, and leave it as a folder in `home`, in float16, with lineage.json.

    Training keeps its state in `home`/.training and goes on from there.

    Returns:
        The held-out loss, in nats per token, mean over domains.
    """
    state, corpus = home / ".training" / model.name, model.corpus
    grown = load(home, model.parent) if model.parent else MoEForCausalLM(model.config, seed=model.seed)
    log = train(grown, corpus, out=state, **model.settings)
    grown = grown.eval().half().float()  # the rounded weights are the model
    loss = fmean(evaluate(grown, corpus_of(model.vocabulary)).values())
    facts = {
        **asdict(model),
        "settings": model.settings,
        "tokens": model.steps * Settings.batch_size * Settings.seq_len,
        "corpus_sha256": corpus.sha256,
        "held_out_loss": loss,
        "seconds": log[-1]["seconds"],
    }
    write_atomically(home / model.name / LINEAGE, (json.dumps(facts, indent=2) + "\n").encode())
    grown.half().save_pretrained(home / model.name)  # config.json last: with it, the folder is whole
    rmtree(state, ignore_errors=True)
    return loss


def train_all(home: Path, grid: dict[str, Grown] = GRID) -> list[str]:
    """Train those that are not there, in order, and return their names."""
    made = [model for model in grid.values() if not is_there(home, model.name)]
    for model in made:
        print(f"{model.name}: held-out loss {train_one(home, model):.3f}", flush=True)
    return [model.name for model in made]
