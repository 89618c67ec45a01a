"""The small models of the course: one shape, with or without experts, balanced in one way or another."""

from __future__ import annotations

from minimoe.model import MoEConfig

WIDTH = 128  # of one expert


BALANCES = ("loss", "sequence", "bias", "none")  # over the batch, in each sequence, by a selection bias, not at all


def small_config(
    vocab_size: int = 1024, *, experts: int = 8, experts_per_token: int = 2, balance: str = "loss"
) -> MoEConfig:
    """4 layers of width 96; the layout of Mixtral wherever that can express the model.

    Args:
        vocab_size: of the corpus.
        experts: per layer; 0 is a dense model as wide as `experts_per_token` experts.
        experts_per_token: K. With 1, the weight of an expert is its probability, as in Switch Transformer: were it
            normalised, it would always be 1, and the router could not learn.
        balance: one of `BALANCES`; a dense model has nothing to balance.

    Raises:
        ValueError: `balance` is unknown; else as `MoEConfig`.
    """
    if balance not in BALANCES:
        raise ValueError(f"balance={balance!r}: wanted one of {', '.join(BALANCES)}")
    shape = {"vocab_size": vocab_size, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    if experts == 0:
        return MoEConfig(**shape, num_experts=0, intermediate_size=WIDTH * experts_per_token, model_type="llama")
    with_loss, with_bias = balance in ("loss", "sequence"), balance == "bias"
    return MoEConfig(
        **shape,
        intermediate_size=WIDTH,
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        norm_topk_prob=experts_per_token > 1,
        score_func="sigmoid" if with_bias else "softmax",
        e_score_correction_bias=with_bias,
        router_aux_loss_coef=0.01 if with_loss else 0.0,
        seq_aux=balance == "sequence",
        model_type="mixtral" if balance in ("loss", "none") and experts_per_token > 1 else "minimoe",
    )
