"""What figures and notebooks draw of the models that come with the kit: the models, and how they route known text."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from minimoe.data_files import data_path
from minimoe.inspection import RoutingTrace, record_routing
from minimoe.model import MoEForCausalLM
from minimoe.training.corpus import Corpus
from minimoe.training.planted import DOMAINS, document

PLANTED_DOCUMENTS = 20  # of each planted domain
PLANTED_SEED = 3  # of the documents: with it no first choice is nearly a tie, so that another processor counts the same
NAMES = (
    "planted-batch",
    "planted-sequence",
)  # experiments with the planted corpus, by what their balance loss looks at
LENGTH, STRETCHES = 128, 16  # tokens in a stretch of text, as in training; and stretches of each domain


@cache
def shipped_model() -> tuple[MoEForCausalLM, Tokenizer]:
    """The mixture that was trained on text people wrote, and its tokenizer."""
    model = MoEForCausalLM.from_pretrained(data_path("zoo/moe-real"))
    return model, tokenizer_of(model)


def tokenizer_of(model: MoEForCausalLM) -> Tokenizer:
    """The tokenizer that belongs to a model; it takes whatever a person types as text.

    Raises:
        ValueError: the model has none.
    """
    if model.tokenizer_json is None:
        raise ValueError("model.tokenizer_json is None: wanted a model with a tokenizer, to cut text into tokens")
    tokenizer = Tokenizer.from_str(model.tokenizer_json)
    tokenizer.encode_special_tokens = True
    return tokenizer


@cache
def planted_trace() -> RoutingTrace:
    """Planted documents through `shipped_model()`, which was trained on none of them.

    Documents 0 to 19 of every domain, in the order of `DOMAINS`; labelled with the kind of text: the language, code or
    arithmetic.
    """
    model, tokenizer = shipped_model()
    with torch.no_grad(), record_routing(model) as trace:
        for domain in DOMAINS:
            trace.label(domain.split("/")[0])
            for index in range(PLANTED_DOCUMENTS):
                model(torch.tensor([tokenizer.encode(document(domain, index, seed=PLANTED_SEED)).ids]))
    return trace


@cache
def held_out_trace() -> RoutingTrace:
    """How the mixture that was trained on the planted corpus routes held-out text of every domain."""
    model = MoEForCausalLM.from_pretrained(data_path("zoo/moe-planted"), dtype=torch.float32)
    return record(model, Corpus.planted())


@torch.no_grad()
def record(model: MoEForCausalLM, corpus: Corpus) -> RoutingTrace:
    """How `model` routes `STRETCHES` stretches of each domain, every stretch a document of its own."""
    with record_routing(model) as trace:
        for domain in corpus.domains:
            trace.label(domain)
            model(stretches(corpus, domain, STRETCHES))
    return trace


def stretches(corpus: Corpus, domain: str, count: int) -> Tensor:
    """The beginning of a domain's held-out text, in pieces that do not overlap, [count, LENGTH].

    Raises:
        ValueError: the domain is unknown, or has less text.
    """
    ids = corpus.tokens(domain, "held_out")[: count * LENGTH]
    if len(ids) < count * LENGTH:
        raise ValueError(f"{domain}: found {len(ids)} held-out tokens, wanted {count} times {LENGTH}")
    return torch.from_numpy(ids.astype(np.int64)).view(count, LENGTH)
