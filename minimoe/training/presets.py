"""The small models of the course: one shape, with or without experts, balanced in one way or another; and the runs in
which they were trained for its figures (`python -m workshop.experiments` repeats them).
"""

from dataclasses import dataclass, replace

from minimoe.model.config import MoEConfig, require

WIDTH = 128  # of one expert
BALANCES = ("loss", "sequence", "bias", "none")  # over the batch, in each sequence, by a selection bias, not at all


def small_config(
    vocab_size: int = 1024,
    *,
    experts: int = 8,
    experts_per_token: int = 2,
    balance: str = "loss",
    score_func: str | None = None,
) -> MoEConfig:
    """4 layers of width 96; the layout of Mixtral wherever that can express the model.

    Args:
        vocab_size: of the corpus.
        experts: per layer; 0 is a dense model as wide as `experts_per_token` experts.
        experts_per_token: K. With 1, the weight of an expert is its probability, as in Switch Transformer: were it
            normalised, it would always be 1, and the router could not learn.
        balance: one of `BALANCES`; a dense model has nothing to balance.
        score_func: None: "sigmoid" with a selection bias, as DeepSeek-V3, and "softmax" without.

    Raises ValueError: `balance` is unknown; else as `MoEConfig`.
    """
    require(balance in BALANCES, "balance", balance, f"one of {', '.join(BALANCES)}")
    shape = {"vocab_size": vocab_size, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    if experts == 0:
        return MoEConfig(**shape, num_experts=0, intermediate_size=WIDTH * experts_per_token, model_type="llama")
    with_loss, with_bias = balance in ("loss", "sequence"), balance == "bias"
    score_func = score_func or ("sigmoid" if with_bias else "softmax")
    is_mixtral = balance in ("loss", "none") and score_func == "softmax" and experts_per_token > 1
    return MoEConfig(
        **shape,
        intermediate_size=WIDTH,
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        norm_topk_prob=experts_per_token > 1,
        score_func=score_func,
        e_score_correction_bias=with_bias,
        router_aux_loss_coef=0.01 if with_loss else 0.0,
        seq_aux=balance == "sequence",
        model_type="mixtral" if is_mixtral else "minimoe",
    )


# Into how many pieces each of 8 experts is cut, and how many of all pieces every token meets, whatever the router says.
GRAINS = {
    "8 experts": (1, 0),
    "16 halves": (2, 0),
    "32 quarters": (4, 0),
    "8 experts, 1 shared": (1, 1),
    "32 quarters, 2 shared": (4, 2),
}


def grain_config(pieces: int = 1, shared: int = 0, vocab_size: int = 1024) -> MoEConfig:
    """`small_config`, whose experts are cut into `pieces`, of which `shared` are met by every token.

    So DeepSeekMoE compares them (Dai et al. 2024, arXiv 2401.06066, section 3): a token meets as many neurons, and as
    many are stored, as without; only the router has a row for each routed piece. Raises ValueError as `MoEConfig`.
    """
    whole, width = small_config(vocab_size), WIDTH // pieces
    routed = whole.num_experts_per_tok * pieces - shared
    return replace(
        whole,
        num_experts=whole.num_experts * pieces - shared,
        num_experts_per_tok=routed,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=shared * width,
        norm_topk_prob=routed > 1,
        model_type="minimoe",
    )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One recipe, run with several seeds. The defaults are those of `minimoe train`."""

    corpus: str = "real"
    experts: int = 8
    experts_per_token: int = 2
    balance: str = "loss"
    score_func: str | None = None
    steps: int = 1600
    snapshots: tuple[int, ...] = ()


# Steps of equal compute follow from the active parameters (544,608 of the mixture, 1,426,272 of the large dense twin).
# That leaves out what attention spends on comparing tokens, as much for one as for the other, and so gives the twin
# fewer steps than a count of all operations would: notebook 04 prints both. Those of equal time follow from what a step
# costs on one thread (`python -m benchmarks.dense_twins`).
EXPERIMENTS = {
    "moe": Experiment(),
    # Dense, with as many parameters as a token meets in the mixture; for as many steps, and for as long.
    "dense-active": Experiment(experts=0),
    "dense-active-clock": Experiment(experts=0, steps=2000),
    # Dense, with as many parameters as the mixture stores; for as many steps, for as much compute, and for as long.
    "dense-total": Experiment(experts=0, experts_per_token=8),
    "dense-total-compute": Experiment(experts=0, experts_per_token=8, steps=611),
    "dense-total-clock": Experiment(experts=0, experts_per_token=8, steps=960),
    "balance-none": Experiment(balance="none"),
    "balance-bias": Experiment(balance="bias"),
    "balance-loss-sigmoid": Experiment(score_func="sigmoid"),  # the loss, with the scores of the bias runs
    "planted-batch": Experiment(corpus="planted", steps=800, snapshots=(0, 25, 50, 100, 200, 400, 600)),
    "planted-sequence": Experiment(corpus="planted", balance="sequence", steps=800),
}
