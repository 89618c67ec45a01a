"""What figures and notebooks draw of the models that come with the kit: the models, and how they route known text."""

from functools import cache

import torch
from tokenizers import Tokenizer

from minimoe.course.held_out import record
from minimoe.data_files import data_path
from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.inspection import RoutingTrace, record_routing
from minimoe.lineage.zoo import Zoo
from minimoe.model import MoEForCausalLM, RouterOutput
from minimoe.model.config import require
from minimoe.training.corpus import Corpus
from minimoe.training.planted import DOMAINS, document

PLANTED_DOCUMENTS = 20  # of each planted domain
PLANTED_SEED = 3  # of the documents: with it no first choice is nearly a tie, so that another processor counts the same
MAX_TOKENS = 256  # of a text that somebody types


@cache
def shipped_model() -> tuple[MoEForCausalLM, Tokenizer]:
    """The mixture that was trained on text people wrote, and its tokenizer."""
    model = MoEForCausalLM.from_pretrained(data_path("zoo/moe-real"))
    return model, tokenizer_of(model)


def real_text_model() -> MoEForCausalLM:
    """The same mixture alone: it knows the text of its tokenizer."""
    return shipped_model()[0]


def tokenizer_of(model: MoEForCausalLM) -> Tokenizer:
    """The tokenizer of a model; it takes whatever a person types as text. Raises ValueError where there is none."""
    require(model.tokenizer_json is not None, "model.tokenizer_json", None, "a tokenizer, to cut text into tokens")
    tokenizer = Tokenizer.from_str(model.tokenizer_json)
    tokenizer.encode_special_tokens = True
    return tokenizer


@cache
def zoo_model(name: str) -> MoEForCausalLM:
    """A member of the zoo, which is not to be changed."""
    return Zoo().load(name)


@cache
def zoo_weights(name: str) -> Weights:
    """Its weights."""
    return open_weights(zoo_model(name))


def route_text(text: str, model: MoEForCausalLM) -> tuple[list[str], list[RouterOutput]]:
    """Run `model` on `text`: its S tokens as pieces of text, and what the router of each layer decided.

    A token that is a part of a character has a replacement character as its piece. Raises ValueError where the text is
    empty or longer than `MAX_TOKENS` tokens, or the model has no tokenizer.
    """
    tokenizer = tokenizer_of(model)
    ids = tokenizer.encode(text).ids
    if not 1 <= len(ids) <= MAX_TOKENS:
        raise ValueError(f"the text has {len(ids)} tokens: wanted 1 to {MAX_TOKENS}")
    with torch.no_grad():
        routers = model(torch.tensor([ids]), output_router_logits=True).router_outputs
    return [tokenizer.decode([i]) for i in ids], list(routers)


@cache
def planted_trace() -> RoutingTrace:
    """Planted documents through `shipped_model()`, which was trained on none of them, as `record_planted` runs them."""
    return record_planted(real_text_model())


@torch.no_grad()
def record_planted(model: MoEForCausalLM) -> RoutingTrace:
    """How `model` routes planted documents that no corpus holds: 0 to 19 of every domain, in the order of `DOMAINS`,
    labelled with the kind of text, which is the language, code or arithmetic."""
    tokenizer = tokenizer_of(model)
    with record_routing(model) as trace:
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
