"""Corpora in, checkpoints out."""

from minimoe.training.accumulate import accumulate_gradients
from minimoe.training.corpus import Batch, Corpus
from minimoe.training.generation import generate
from minimoe.training.loop import Settings, evaluate, train

__all__ = ["Batch", "Corpus", "Settings", "accumulate_gradients", "evaluate", "generate", "train"]
