"""Small models of random weights for the tests of the fingerprints."""

import torch

from minimoe.fingerprints.weights import Weights, open_weights
from minimoe.lineage.gauge import GAUGES, all_gauges, fold_norms, obstacle
from minimoe.model import MoEConfig, MoEForCausalLM

SIZES = {
    "vocab_size": 160,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "attention_bias": True,
    "attention_output_bias": True,
    "tie_word_embeddings": False,
    "num_experts": 0,
}
KINDS = {
    "dense": {},
    "dense, norm of each head": {"qk_norm": "head"},
    "mixture, shared expert": {"num_experts": 4, "shared_expert_intermediate_size": 16, "shared_expert_gate": True},
    "mixture, every second layer": {"num_experts": 4, "decoder_sparse_step": 2, "qk_norm": "full"},
    "mixture in groups": {"num_experts": 4, "router": "grouped", "n_group": 2, "router_scale": True},
}


class Vocabulary:
    """Tokens "t0", "t1", ...; or with another prefix."""

    def __init__(self, size: int = SIZES["vocab_size"], prefix: str = "t") -> None:
        self._tokens = {f"{prefix}{number}": number for number in range(size)}

    def get_vocab(self) -> dict[str, int]:
        return self._tokens


def random_model(seed: int = 0, **settings) -> MoEForCausalLM:
    return random_weights(MoEConfig(**SIZES | settings), seed)


@torch.no_grad()
def random_weights(config: MoEConfig, seed: int) -> MoEForCausalLM:
    """Float64, every weight away from what an initialisation would give."""
    model = MoEForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        tensor.normal_(1.0 if "norm" in name or "scale" in name else 0.0, 0.3, generator=generator)
    return model


@torch.no_grad()
def disturbed(model: MoEForCausalLM, amount: float, seed: int = 9) -> MoEForCausalLM:
    """A copy whose matrices got noise of `amount` of their own standard deviation: a stand-in for training."""
    copy = MoEForCausalLM(model.config).to(model.model.embed_tokens.weight.dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator).to(tensor)
        copy.state_dict()[name].copy_(tensor + (amount * tensor.std() * noise if tensor.dim() > 1 else 0))
    return copy


def weights(model: MoEForCausalLM, **vocabulary) -> Weights:
    """As fingerprints read it; in float32, whatever the model is in."""
    return open_weights(model, tokenizer=Vocabulary(model.config.vocab_size, **vocabulary))


def gauged(model: MoEForCausalLM) -> dict[str, MoEForCausalLM]:
    """The model after each gauge that applies, and after "all" of them."""
    copies = {}
    for name, gauge in GAUGES.items():
        if obstacle(name, model.config) is None:
            copies[name] = gauge(fold_norms(model) if name == "rotate_residual" else model, seed=3)
    return copies | {"all": all_gauges(model, 5)}
