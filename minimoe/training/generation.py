"""Text in, text out: `generate(model, prompts, max_new_tokens)`."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

from minimoe.model import MoEForCausalLM
from minimoe.training.tokenizer import read_tokenizer


def generate(
    model: MoEForCausalLM,
    prompts: str | Sequence[str],
    max_new_tokens: int,
    *,
    tokenizer: Tokenizer | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str | list[str]:
    """Continue texts.

    Args:
        model: with a tokenizer, as `from_pretrained` and `train` leave it.
        prompts: one text, or several.
        tokenizer: a `tokenizers.Tokenizer`; None: the one in `model.tokenizer_json`.
        max_new_tokens, temperature, top_k, top_p, seed: as for `MoEForCausalLM.generate`; greedy by default.

    Returns:
        Each prompt with its continuation, special tokens included: a text for a text, a list for several. Greedily,
        each goes on as it would alone; when sampling, all draw from one generator.

    Raises ValueError: a prompt is empty, there is no tokenizer, or a setting of `MoEForCausalLM.generate` is
    impossible.
    """
    if tokenizer is None and model.tokenizer_json is None:
        raise ValueError("tokenizer=None, and the model has no tokenizer.json: wanted one of the two")
    if tokenizer is None:
        tokenizer = read_tokenizer(model.tokenizer_json)
        tokenizer.no_truncation()  # which a tokenizer.json may ask for, to train with; a prompt must stay whole
        tokenizer.no_padding()
    encoded = [_encode(tokenizer, text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    continued = _continue(model, encoded, max_new_tokens, **sampling) if encoded else []
    found = [tokenizer.decode(ids, skip_special_tokens=False) for ids in continued]
    return found[0] if isinstance(prompts, str) else found


def _continue(model: MoEForCausalLM, prompts: list[list[int]], max_new_tokens: int, **sampling: Any) -> list[list[int]]:
    """Token ids in, token ids out: one batch, padded on the left."""
    device, length = next(model.parameters()).device, max(map(len, prompts))
    padding = [length - len(ids) for ids in prompts]
    rows = [[0] * pad + ids for pad, ids in zip(padding, prompts, strict=True)]
    mask = torch.arange(length, device=device) >= torch.tensor(padding, device=device)[:, None]
    batch = torch.tensor(rows, device=device)
    continued = model.generate(batch, max_new_tokens, attention_mask=mask if any(padding) else None, **sampling)
    return [row[pad:] for row, pad in zip(continued.tolist(), padding, strict=True)]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    if not isinstance(text, str):
        raise ValueError(f"prompts: found {text!r:.80}, wanted a text or a list of texts")
    ids = tokenizer.encode(text).ids
    if not ids:
        raise ValueError(f"prompts: {text!r} gives no token, wanted a text of at least one")
    return ids
