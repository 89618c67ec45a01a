"""A decoder-only transformer whose MLPs may be mixtures of experts.

Shapes: B batch, S sequence, P positions that a cache holds, T = B * S tokens, H hidden size, D head size, V vocabulary.

Parameters carry the names of Hugging Face's Llama and Qwen-MoE, except that the experts of a layer are three fused
tensors. Pre-norm RMSNorm, rotary positions, causal attention, gated MLPs: what the families of families.py have in
common. Attention is in attention.py, the mixture itself in moe.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimoe.model.attention import Attention, KeysValues, LatentAttention, rotary_angles, visible_keys
from minimoe.model.balance import load_balancing_loss, router_z_loss
from minimoe.model.checkpoint import load_weights
from minimoe.model.config import MoEConfig, require
from minimoe.model.layers import MLP, Embedding, Linear, RMSNorm, at_least_float32, has_values, initialise
from minimoe.model.moe import MoELayer
from minimoe.model.opening import open_checkpoint
from minimoe.model.routing import RouterOutput
from minimoe.model.saving import save_model

Cache = list[KeysValues]  # of each layer


class CausalLMOutput(NamedTuple):
    """What a forward pass returns; what was not asked for is None."""

    logits: Tensor  # [B, S, V]
    loss: Tensor | None  # cross-entropy; in training mode plus the router losses times their coefficients
    cross_entropy: Tensor | None  # nats per token
    aux_loss: Tensor | None  # load-balancing loss, before its coefficient
    router_outputs: tuple[RouterOutput, ...] | None  # one per sparse layer: the choice, before any capacity
    cache: Cache | None


class Block(nn.Module):
    """Attention, then an MLP or a mixture of experts, each on the normed input and added to it."""

    def __init__(self, config: MoEConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config) if config.kv_lora_rank is None else LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_sparse = config.is_sparse(layer)
        self.mlp = MoELayer(config, seed=None) if self.is_sparse else MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        input_ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        real: Tensor | None = None,
        visible: Tensor | None = None,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, RouterOutput | None, KeysValues]:
        """Map [B, S, H] to [B, S, H]; also return what the router chose, and all keys and values so far.

        The arguments are those of `Attention.forward` and `MoELayer.forward`; `real` [B, S] is False for padding.
        """
        attended, present = self.self_attn(self.input_layernorm(x), cos, sin, visible, past)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        mixed, chosen = self.mlp(normed, input_ids, real) if self.is_sparse else (self.mlp(normed), None)
        return x + mixed, chosen, present


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face calls `model`.

    Where `gradient_checkpointing` is true, training keeps only what enters each block, and computes the inside anew in
    the backward pass (Chen et al. 2016, arXiv 1604.06174).
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, tuple[RouterOutput, ...], Cache]:
        """Final hidden states [B, S, H], what each router chose, and the cache of all positions so far.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, P + S], 0 for padding.
            cache: of the P positions before these.
        """
        x, config = self.embed_tokens(input_ids), self.config
        length, past = input_ids.shape[1], cache[0][0].shape[2] if cache else 0
        seen = None if attention_mask is None else attention_mask.bool()
        real = None if seen is None else seen[:, past:]
        windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
        visible = {window: visible_keys(length, past, seen, x.device, window) for window in set(windows)}
        if seen is None:
            positions = torch.arange(past, past + length, device=x.device)
        else:  # in the text of its own: padding does not count
            positions = (seen.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        cos, sin = rotary_angles(config, positions, x)
        chosen, present = [], []
        for layer, block in enumerate(self.layers):
            arguments = x, input_ids, cos, sin, real, visible[windows[layer]], cache[layer] if cache else None
            if self.gradient_checkpointing and self.training:
                x, choice, keys_values = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, choice, keys_values = block(*arguments)
            present.append(keys_values)
            if choice is not None:
                chosen.append(choice)
        return self.norm(x), tuple(chosen), present


class TiedHead(Linear):
    """The output head of a model that predicts with its embedding: a module like any other head, with no weight of its
    own. So hooks and adapters find it, no file holds the matrix twice, and the two cannot come apart."""

    def __init__(self, decoder: Decoder) -> None:
        nn.Module.__init__(self)
        embedding = decoder.embed_tokens
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.register_parameter("bias", None)
        self._decoder = (decoder,)  # in a tuple, where torch does not look for submodules

    @property
    def weight(self) -> Tensor:
        """[V, H], that of the embedding that the decoder has now."""
        return self._decoder[0].embed_tokens.weight


class MoEForCausalLM(nn.Module):
    """A language model: `MoEForCausalLM(config)(input_ids, attention_mask, labels=labels)`.

    `config.num_experts = 0` makes it dense; `seed` is that of the initial weights. `tokenizer_json`, the text of a
    tokenizer.json or None, says what its token ids stand for.
    """

    def __init__(self, config: MoEConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.tokenizer_json: str | None = None  # text, which asks for no package
        self.model = Decoder(config)
        tied = config.tie_word_embeddings
        self.lm_head = TiedHead(self.model) if tied else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights(seed)

    def init_weights(self, seed: int = 0) -> None:
        """Draw all weights anew, in place: the same for a seed on every device.

        For a model that was built on the meta device, after `model.to_empty(device=...)` gave it memory.
        """
        initialise(self, self.config.initializer_range, seed)

    def gradient_checkpointing_enable(self) -> None:
        """Train in less memory and more time: keep the input of each block, compute the rest anew when needed."""
        self.model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep everything that the backward pass needs: the usual way."""
        self.model.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool = False,
        output_router_logits: bool = False,
    ) -> CausalLMOutput:
        """Predict the next token at every position.

        In training mode, router losses whose coefficient is above 0 are part of `loss`; in evaluation mode it is the
        cross-entropy alone.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, P + S], 1 for tokens and 0 for padding, on either side. Padding is neither attended to
                nor routed, and no loss counts it; its logits mean nothing. None: there is none.
            labels: [B, S] int64, usually `input_ids` itself: position i is scored on label i + 1. -100 is ignored, and
                so is what stands at padding.
            cache: of the P tokens before these, as returned by an earlier call.
            use_cache: return the cache of all P + S tokens.
            output_router_logits: return what the routers chose, and the balance loss.

        Raises ValueError: a token id is outside the vocabulary, a shape does not fit, or the mask holds something else
        than 0 and 1.
        """
        past = cache[0][0].shape[2] if cache else 0
        self._check_ids(input_ids)
        _check_mask(attention_mask, input_ids, past)
        hidden, chosen, present = self.model(input_ids, attention_mask, cache)
        logits, config = self.lm_head(hidden), self.config
        real = None if attention_mask is None else attention_mask[:, past:]
        loss = cross_entropy = None if labels is None else next_token_loss(logits, labels, real)
        aux_loss = None
        trained = labels is not None and self.training and len(chosen) > 0
        if chosen and (output_router_logits or (trained and config.router_aux_loss_coef)):
            sequences = input_ids.shape[0] if config.seq_aux else 1
            aux_loss = load_balancing_loss(chosen, sequences=sequences, attention_mask=real)
        if trained and config.router_aux_loss_coef:
            loss = loss + config.router_aux_loss_coef * aux_loss
        if trained and config.router_z_loss_coef:
            loss = loss + config.router_z_loss_coef * router_z_loss(chosen, attention_mask=real)
        router_outputs, cache = chosen if output_router_logits else None, present if use_cache else None
        return CausalLMOutput(logits, loss, cross_entropy, aux_loss, router_outputs, cache)

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids has dtype {input_ids.dtype}: wanted torch.int64")
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: wanted [batch >= 1, sequence >= 1]")
        if not has_values(input_ids):
            return
        low, high = map(int, input_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            wrong, last = low if low < 0 else high, self.config.vocab_size - 1
            raise ValueError(f"input_ids holds token id {wrong}: wanted 0 to {last} (vocab_size - 1)")

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        seed: int = 0,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue input_ids [B, S]; returns [B, S + new tokens].

        Args:
            input_ids: [B, S] int64.
            max_new_tokens: at least 1; stops earlier once every sequence has produced `eos_token_id`.
            attention_mask: [B, S], 0 for the padding of prompts of unequal length, on either side. Each then goes on
                as it would alone (greedily: when sampling, all sequences draw from one generator).
            temperature: 0 takes the likeliest token (greedy); above 0 it samples.
            top_k: sample among the k likeliest tokens only.
            top_p: sample among the fewest tokens whose probability reaches p (Holtzman et al. 2019, arXiv 1904.09751).
            eos_token_id: a finished sequence is filled up with it.
            seed: of the sampling.
            use_cache: keep keys and values instead of computing the past again at every step. The tokens are the
                same, except with a capacity or expert choice, where routing depends on which tokens come together.

        Raises ValueError: naming the argument, what was found and what was wanted.
        """
        vocab = self.config.vocab_size
        require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
        require(temperature >= 0, "temperature", temperature, "0 (greedy) or more")
        require(top_k is None or 1 <= top_k <= vocab, "top_k", top_k, f"None or 1 to vocab_size={vocab}")
        require(top_p is None or 0 < top_p <= 1, "top_p", top_p, "None or a number above 0 and at most 1")
        self._check_ids(input_ids)
        _check_prompts(attention_mask, input_ids)
        generator = torch.Generator(input_ids.device).manual_seed(seed)
        finished = torch.zeros(len(input_ids), 1, dtype=torch.bool, device=input_ids.device)
        ids, mask, cache = input_ids, attention_mask, None
        if mask is None and eos_token_id is not None and len(ids) > 1:
            mask = torch.ones_like(ids)  # some texts may end before others: the tokens after the end are padding
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode():  # a fifth less time than no_grad, where operations are as small as these
                for _ in range(max_new_tokens):
                    output = self(ids if cache is None else ids[:, -1:], mask, cache=cache, use_cache=use_cache)
                    cache = output.cache
                    token = _pick(_last(output.logits, mask), temperature, top_k, top_p, generator)
                    if eos_token_id is not None:
                        token = token.where(~finished, eos_token_id)
                        finished = finished | (token == eos_token_id)
                    if mask is not None:  # the token that ends a text, and the padding after it, are masked
                        mask = torch.cat([mask, (~finished).to(mask.dtype)], dim=1)
                    ids = torch.cat([ids, token], dim=1)
                    if eos_token_id is not None and finished.all():
                        break
        finally:
            self.train(was_training)
        return ids.clone()  # a tensor like any other: one made in inference mode cannot be trained on

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        check_finite: bool = True,
        experts_implementation: str | None = None,
    ) -> "MoEForCausalLM":
        """Read a model, in evaluation mode, with the tokenizer.json that lies beside it.

        Args:
            source: a folder in the Hugging Face layout, a safetensors or GGUF file, "owner/name" or
                "owner/name@revision" of the Hugging Face hub, or an https address: what `open_checkpoint` takes.
            dtype: of the parameters; None: as stored; what is stored in few bits is read in float32.
            device: of the parameters, which go there one tensor at a time; None: the CPU.
            check_finite: look for NaN and infinity in every weight; False saves the time.
            experts_implementation: how the experts are run, "grouped" for one; None: as the configuration says.

        Raises:
            CheckpointError: naming the file or tensor, what was found and what was wanted.
            ValueError: there is no such implementation.
        """
        checkpoint = open_checkpoint(source)
        config = checkpoint.model_config
        if experts_implementation is not None:
            config = replace(config, experts_implementation=experts_implementation)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, checkpoint, dtype, device, check_finite)
        model.tokenizer_json = checkpoint.tokenizer_json
        return model.eval()

    def save_pretrained(self, path: str | Path, model_type: str | None = None) -> None:
        """Write a checkpoint folder in the Hugging Face layout, replacing the model that was there.

        With `tokenizer_json` as its tokenizer.json; if that is None, the tokenizer of the model that was there goes.

        Args:
            path: a folder, made if missing.
            model_type: the family to write as ("mixtral", ...); None: that of the configuration.

        Raises ValueError: the family cannot express this model.
        """
        save_model(self, path, model_type=model_type)


def next_token_loss(
    logits: Tensor, labels: Tensor, attention_mask: Tensor | None = None, *, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of each token given those before it, in nats.

    Args:
        logits: [B, S, V].
        labels: [B, S] int64: position i is scored on label i + 1. -100 is ignored.
        attention_mask: [B, S], 0 for padding: neither is it predicted, nor does it predict. None: there is none.
        reduction: "mean" over the tokens that are scored, or their "sum".

    Raises ValueError: the shapes differ, no token is left to take a mean of, or a label is outside the vocabulary.
    """
    shape = tuple(labels.shape)
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels has shape {shape}: wanted {tuple(logits.shape[:2])}, that of input_ids")
    if shape[1] < 2:
        raise ValueError(f"labels has shape {shape}: wanted at least 2 positions, to score one on the next")
    targets = next_token_targets(labels, attention_mask).flatten()
    if has_values(targets):
        scored, last = targets[targets != -100], logits.shape[-1] - 1
        if reduction == "mean" and not len(scored):
            raise ValueError("labels are all -100 or padding after the first position: wanted at least one to score")
        wrong = scored[(scored < 0) | (scored > last)]
        if len(wrong):
            raise ValueError(f"labels holds {int(wrong[0])}: wanted -100 or 0 to {last} (vocab_size - 1)")
    return F.cross_entropy(at_least_float32(logits[:, :-1]).flatten(0, 1), targets, reduction=reduction)


def next_token_targets(labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """What each position but the last is scored on, [B, S - 1] int64: the label after it, or -100 for nothing."""
    targets = labels[:, 1:].long()
    if attention_mask is None:
        return targets
    real = attention_mask.bool()
    return targets.masked_fill(~(real[:, :-1] & real[:, 1:]), -100)


def _check_mask(mask: Tensor | None, input_ids: Tensor, past: int) -> None:
    if mask is None:
        return
    wanted = (input_ids.shape[0], past + input_ids.shape[1])
    if tuple(mask.shape) != wanted:
        after = f", {past} of them for what the cache holds" if past else ""
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}: wanted {wanted}, a number per token{after}")
    if has_values(mask) and not ((mask == 0) | (mask == 1)).all():
        wrong = mask[(mask != 0) & (mask != 1)][0].item()
        raise ValueError(f"attention_mask holds {wrong}: wanted 1 for tokens and 0 for padding")


def _check_prompts(mask: Tensor | None, input_ids: Tensor) -> None:
    _check_mask(mask, input_ids, past=0)
    if mask is not None and not (mask != 0).any(1).all():
        row = int((mask == 0).all(1).nonzero()[0])
        raise ValueError(f"attention_mask: row {row} is padding throughout, wanted at least one token to continue")


def _last(logits: Tensor, mask: Tensor | None) -> Tensor:
    """The logits [B, V] at the last token of each row, from those of the last S positions, [B, S, V]."""
    if mask is None or logits.shape[1] == 1:
        return logits[:, -1]
    recent = mask[:, -logits.shape[1] :] != 0
    last = (recent * torch.arange(1, 1 + recent.shape[1], device=mask.device)).argmax(1)
    return logits[torch.arange(len(logits), device=mask.device), last]


def _pick(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """The next token of each sequence, [B, 1], from its logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    values, tokens = at_least_float32(logits).sort(dim=-1, descending=True, stable=True)
    temperature = max(temperature, torch.finfo(values.dtype).tiny)
    values = (values - values[:, :1]) / temperature  # the best at 0, so that no temperature makes it infinite
    if top_k is not None:
        values[:, top_k:] = -torch.inf
    probabilities = values.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    place = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, place)
