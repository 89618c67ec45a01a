"""Held-out text of a corpus in stretches, and how a model routes it: the text of notebooks 06 and 07."""

import numpy as np
import torch
from torch import Tensor

from minimoe.inspection import RoutingTrace, record_routing
from minimoe.model import MoEForCausalLM
from minimoe.training.corpus import Corpus

LENGTH, STRETCHES = 128, 16  # tokens in a stretch of text, as in training; and stretches of each domain, or group


def stretches(corpus: Corpus, domain: str, count: int) -> Tensor:
    """The beginning of a domain's held-out text, in pieces that do not overlap, [count, LENGTH]. Raises ValueError
    where the domain is unknown or has less text."""
    needed = count * LENGTH
    ids = corpus.tokens(domain, "held_out")[:needed]
    if len(ids) < needed:
        raise ValueError(f"{domain} has {len(ids)} held-out tokens; {count} stretches of {LENGTH} take {needed}")
    return torch.from_numpy(ids.astype(np.int64)).view(count, LENGTH)


@torch.no_grad()
def record(model: MoEForCausalLM, corpus: Corpus) -> RoutingTrace:
    """How `model` routes `STRETCHES` stretches of each domain, every stretch a document of its own."""
    with record_routing(model) as trace:
        for domain in corpus.domains:
            trace.label(domain)
            model(stretches(corpus, domain, STRETCHES))
    return trace
