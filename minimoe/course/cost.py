"""What it costs to train a model: a formula, and no measurement."""

from __future__ import annotations

from minimoe.model import MoEConfig


def training_flop(config: MoEConfig, tokens: int) -> int:
    """Floating-point operations to train on `tokens` tokens: 6 for each token and each weight that it meets.

    A weight costs a token one multiplication and one addition forwards, and twice that backwards (Kaplan et al. 2020,
    arXiv 2001.08361, section 2.1). An embedding that is no output head at the same time is looked up and costs
    nothing; the head counts here, unlike there, because it is a large part of a small model.

    Left out, as there, is what attention spends on comparing tokens with each other: in texts of S tokens up to
    12 x S x num_attention_heads x head_dim for each token and layer, half of that where the tokens still to come are
    skipped. It is a small part of a wide model, not of a narrow one, and it is the same for a mixture and a dense model
    with the same attention: so the formula makes the dearer of the two look dearer still.
    """
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return 6 * (config.num_parameters(active=True) - looked_up) * tokens
