"""A decoder-only transformer whose MLPs may be mixtures of experts.

Shapes: B batch, S sequence, T = B * S tokens, H hidden size, D head size, V vocabulary, E experts, K per token.

Parameters carry the names of Hugging Face's Llama and Qwen-MoE, except that the experts of a layer are three fused
tensors. Pre-norm RMSNorm, rotary positions, grouped-query attention, gated SiLU MLPs: what Llama, Qwen,
Mixtral, OLMoE and Pangu Pro MoE have in common.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.model import routing
from minimoe.model.balance import apply_capacity, expert_capacity, load_balancing_loss, router_z_loss
from minimoe.model.checkpoint import load_weights, save_model
from minimoe.model.config import MoEConfig
from minimoe.model.experts import Experts, add_shared_expert, initialise
from minimoe.model.opening import open_checkpoint
from minimoe.model.rope import rope_frequencies
from minimoe.model.routing import RouterOutput

Cache = list[tuple[Tensor, Tensor]]  # per layer: keys and values, [B, kv heads, positions so far, D]


class CausalLMOutput(NamedTuple):
    """What a forward pass returns; `loss` and the router fields are None unless asked for."""

    logits: Tensor  # [B, S, V]
    loss: Tensor | None  # cross-entropy, plus the router losses times their coefficients
    cross_entropy: Tensor | None  # nats per token
    aux_loss: Tensor | None  # load-balancing loss, before its coefficient
    router_outputs: tuple[RouterOutput, ...] | None  # one per sparse layer: the choice, before any capacity
    cache: Cache | None


class Linear(nn.Linear):
    """nn.Linear that leaves its memory to `initialise`, so that building a model leaves torch's global RNG alone."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding that leaves its memory to `initialise`, for the same reason."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 at least (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = _at_least_float32(x)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of [B, heads, S, D] by the angles of each position, cos and sin [S, D/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(hidden, query, bias=config.attention_bias)
        self.k_proj = Linear(hidden, key, bias=config.attention_bias)
        self.v_proj = Linear(hidden, key, bias=config.attention_bias)
        self.o_proj = Linear(query, hidden, bias=config.attention_output_bias)
        self.qk_norm, self.clip_qkv = config.qk_norm, config.clip_qkv
        if config.qk_norm:
            whole = config.qk_norm == "full"
            self.q_norm = RMSNorm(query if whole else config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(key if whole else config.head_dim, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map [B, S, H] to [B, S, H]; also return the keys and values of all positions so far."""
        q, k, v = self._project(x)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v, **_causal(q, k), enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), (k, v)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as [B, heads, S, D]."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip_qkv is not None:
            q, k, v = (tensor.clamp(-self.clip_qkv, self.clip_qkv) for tensor in (q, k, v))
        q, k, v = (tensor.unflatten(-1, (-1, self.head_dim)) for tensor in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _causal(q: Tensor, k: Tensor) -> dict:
    """Arguments that let position i of the queries, which come last, see all keys up to its own."""
    new, seen = q.shape[2], k.shape[2]
    if new == seen:
        return {"is_causal": True}
    if new == 1:
        return {}
    visible = torch.ones(new, seen, dtype=torch.bool, device=q.device)
    return {"attn_mask": visible.tril(seen - new)}


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """The learned part of a router, and the choice of the function that uses it.

    `weight` [E, H] gives the logits. By configuration also: `noise_weight` [E, H], `router_scale` [E], and the buffer
    `e_score_correction_bias` [E], which no gradient reaches (`balance.update_bias` moves it).
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.num_experts, config.hidden_size)
        if config.router != "hash":
            self.weight = nn.Parameter(torch.empty(shape))
        if config.router == "noisy_topk":
            self.noise_weight = nn.Parameter(torch.empty(shape))
        self.router_scale = nn.Parameter(torch.ones(config.num_experts)) if config.router_scale else None
        correction = torch.zeros(config.num_experts) if config.e_score_correction_bias else None
        self.register_buffer("e_score_correction_bias", correction)

    def forward(self, x: Tensor, input_ids: Tensor | None) -> RouterOutput:
        """Route x [T, H] of the tokens input_ids [T], which only the hash router looks at."""
        config, k = self.config, self.config.num_experts_per_tok
        if config.router == "hash":
            if input_ids is None:
                raise ValueError("input_ids=None: wanted the token ids, which router='hash' needs")
            return routing.route_hash(input_ids, config.num_experts, k)
        x = _at_least_float32(x)
        logits = F.linear(x, self.weight.to(x.dtype))
        if config.router == "topk":
            return routing.route_topk(
                logits,
                k,
                score_func=config.score_func,
                norm_topk_prob=config.norm_topk_prob,
                bias=self.e_score_correction_bias,
                n_group=config.n_group,
                topk_group=config.topk_group,
                routed_scaling_factor=config.routed_scaling_factor,
            )
        if config.router == "topk_softmax":
            return routing.route_topk_softmax(logits, k)
        if config.router == "noisy_topk":
            noise_logits = F.linear(x, self.noise_weight.to(x.dtype))
            return routing.route_noisy_topk(logits, noise_logits, k, training=self.training)
        if config.router == "switch":
            return routing.route_switch(logits)
        if config.router == "expert_choice":
            return routing.route_expert_choice(logits, _capacity(config, len(x)))
        if config.router == "grouped":
            return routing.route_grouped(logits, k, config.n_group, router_scale=self.router_scale)
        raise NotImplementedError(f"router={config.router!r} is in config.ROUTERS and has no branch here")


def _capacity(config: MoEConfig, num_tokens: int) -> int:
    return expert_capacity(num_tokens, config.num_experts, config.num_experts_per_tok, config.capacity_factor)


class MoELayer(nn.Module):
    """Router, dispatch, experts, combine; plus the shared expert that every token meets.

    Args:
        config: of the model it belongs to.
        seed: of the initial weights; None leaves them to the caller.
    """

    def __init__(self, config: MoEConfig, *, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = Experts(config, seed=None)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = MLP(config.hidden_size, shared) if shared else None
        self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None
        if seed is not None:
            initialise(self, config.initializer_range, seed)

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor, RouterOutput]:
        """Map [B, S, H] to [B, S, H]; also return what the router chose for the T = B * S tokens.

        Args:
            hidden_states: [B, S, H].
            input_ids: [B, S], which only the hash router looks at.
        """
        x = hidden_states.flatten(0, 1)
        chosen = self.gate(x, None if input_ids is None else input_ids.flatten())
        dispatched = self._dispatch(chosen)
        output = self.experts(x, dispatched.indices, dispatched.weights)
        if self.shared_expert is not None:
            gate_logits = None if self.shared_expert_gate is None else self.shared_expert_gate(x)
            output = add_shared_expert(output, self.shared_expert(x), gate_logits)
        return output.view_as(hidden_states), chosen

    def _dispatch(self, chosen: RouterOutput) -> RouterOutput:
        """Drop what exceeds the experts' capacity; expert choice never exceeds it."""
        if self.config.capacity_factor is None or self.config.router == "expert_choice":
            return chosen
        return apply_capacity(chosen, _capacity(self.config, len(chosen.indices)))


class Block(nn.Module):
    """Attention, then an MLP or a mixture of experts, each on the normed input and added to it."""

    def __init__(self, config: MoEConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_sparse = config.is_sparse(layer)
        self.mlp = MoELayer(config, seed=None) if self.is_sparse else MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, input_ids: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, RouterOutput | None, tuple[Tensor, Tensor]]:
        attended, present = self.self_attn(self.input_layernorm(x), cos, sin, past)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        mixed, chosen = self.mlp(normed, input_ids) if self.is_sparse else (self.mlp(normed), None)
        return x + mixed, chosen, present


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, cache: Cache | None) -> tuple[Tensor, tuple[RouterOutput, ...], Cache]:
        x = self.embed_tokens(input_ids)
        cos, sin = self._angles(input_ids.shape[1], cache, x)
        chosen, present = [], []
        for layer, block in enumerate(self.layers):
            x, choice, keys_values = block(x, input_ids, cos, sin, cache[layer] if cache else None)
            present.append(keys_values)
            if choice is not None:
                chosen.append(choice)
        return self.norm(x), tuple(chosen), present

    def _angles(self, length: int, cache: Cache | None, like: Tensor) -> tuple[Tensor, Tensor]:
        start = cache[0][0].shape[2] if cache else 0
        positions = torch.arange(start, start + length, device=like.device)
        angles = positions[:, None].float() * rope_frequencies(self.config, like.device)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class MoEForCausalLM(nn.Module):
    """A language model: `MoEForCausalLM(config)(input_ids, labels)`.

    `tokenizer_json`, the text of a tokenizer.json or None, says what its token ids stand for.

    Args:
        config: `num_experts = 0` makes it dense.
        seed: of the initial weights.
    """

    def __init__(self, config: MoEConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.tokenizer_json: str | None = None  # text, which asks for no package
        self.model = Decoder(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False)
        initialise(self, config.initializer_range, seed)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        output_router_logits: bool = False,
        cache: Cache | None = None,
    ) -> CausalLMOutput:
        """Predict the next token at every position.

        Args:
            input_ids: [B, S] int64.
            labels: [B, S] int64, usually `input_ids` itself: position i is scored on label i + 1. -100 is ignored.
            output_router_logits: return the router outputs and the balance loss, and add the router losses, each
                times its coefficient, to `loss`.
            cache: of the tokens before these, as returned by an earlier call.

        Raises:
            ValueError: a token id is outside the vocabulary, or the shape is not [B, S].
        """
        self._check_ids(input_ids)
        hidden, chosen, present = self.model(input_ids, cache)
        head = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits = F.linear(hidden, head)
        cross_entropy = None if labels is None else _next_token_loss(logits, labels)
        loss, aux_loss = cross_entropy, None
        if output_router_logits and chosen:
            aux_loss = load_balancing_loss(chosen, sequences=len(input_ids) if self.config.seq_aux else 1)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
                loss = loss + self.config.router_z_loss_coef * router_z_loss(chosen)
        return CausalLMOutput(logits, loss, cross_entropy, aux_loss, chosen if output_router_logits else None, present)

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids has dtype {input_ids.dtype}: wanted torch.int64")
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: wanted [batch >= 1, sequence >= 1]")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"input_ids holds token id {wrong}: wanted 0 to {self.config.vocab_size - 1} (vocab_size - 1)"
            )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
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
            temperature: 0 takes the likeliest token (greedy); above 0 it samples.
            top_k: sample among the k likeliest tokens only.
            top_p: sample among the fewest tokens whose probability reaches p (Holtzman et al. 2019, arXiv 1904.09751).
            eos_token_id: a finished sequence is filled up with it.
            seed: of the sampling.
            use_cache: keep keys and values instead of computing the past again at every step. The tokens are the
                same, except with a capacity or expert choice, where routing depends on which tokens come together.

        Raises:
            ValueError: naming the argument, what was found and what was wanted.
        """
        _check_sampling(max_new_tokens, temperature, top_k, top_p, self.config.vocab_size)
        self._check_ids(input_ids)
        generator = torch.Generator(input_ids.device).manual_seed(seed)
        finished = torch.zeros(len(input_ids), 1, dtype=torch.bool, device=input_ids.device)
        ids, cache = input_ids, None
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                output = self(ids if cache is None else ids[:, -1:], cache=cache)
                cache = output.cache if use_cache else None
                token = _pick(output.logits[:, -1], temperature, top_k, top_p, generator)
                if eos_token_id is not None:
                    token = token.where(~finished, eos_token_id)
                    finished = finished | (token == eos_token_id)
                ids = torch.cat([ids, token], dim=1)
                if finished.all():
                    break
        finally:
            self.train(was_training)
        return ids

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        check_finite: bool = True,
    ) -> MoEForCausalLM:
        """Read a model, in evaluation mode, with the tokenizer.json that lies beside it.

        Args:
            source: a folder in the Hugging Face layout, a safetensors or GGUF file, "owner/name" or
                "owner/name@revision" of the Hugging Face hub, or an https address: what `open_checkpoint` takes.
            dtype: of the parameters; None: as stored; what is stored in integers is read in float32.
            device: of the parameters, which go there one tensor at a time; None: the CPU.
            check_finite: look for NaN and infinity in every weight; False saves the time.

        Raises:
            CheckpointError: naming the file or tensor, what was found and what was wanted.
        """
        checkpoint = open_checkpoint(source)
        with torch.device("meta"):
            model = cls(checkpoint.model_config)
        load_weights(model, checkpoint, dtype, device, check_finite)
        model.tokenizer_json = checkpoint.tokenizer_json
        return model.eval()

    def save_pretrained(self, path: str | Path, model_type: str | None = None) -> None:
        """Write a checkpoint folder in the Hugging Face layout, replacing the model that was there.

        With `tokenizer_json` as its tokenizer.json; if that is None, the tokenizer of the model that was there goes.

        Args:
            path: a folder, made if missing.
            model_type: the family to write as ("mixtral", ...); None: that of the configuration.

        Raises:
            ValueError: the family cannot express this model.
        """
        save_model(self, path, model_type=model_type)


def _next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels has shape {tuple(labels.shape)}: wanted {tuple(logits.shape[:2])}, that of input_ids")
    if labels.shape[1] < 2:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}: wanted at least 2 positions, to score one on the next"
        )
    targets = labels[:, 1:].long().flatten()
    scored = targets[targets != -100]
    if not len(scored):
        raise ValueError("labels are -100 everywhere after the first position: wanted at least one to score")
    if scored.min() < 0 or scored.max() >= logits.shape[-1]:
        wrong = int(scored.min() if scored.min() < 0 else scored.max())
        raise ValueError(f"labels holds {wrong}: wanted -100 or 0 to {logits.shape[-1] - 1} (vocab_size - 1)")
    return F.cross_entropy(_at_least_float32(logits[:, :-1]).flatten(0, 1), targets)


def _pick(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """The next token of each sequence, [B, 1], from its logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    values, tokens = _at_least_float32(logits).sort(dim=-1, descending=True, stable=True)
    values = (values - values[:, :1]) / temperature  # the best at 0, so that no temperature makes it infinite
    if top_k is not None:
        values[:, top_k:] = -torch.inf
    probabilities = values.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    place = torch.multinomial(probabilities, 1, generator=generator)
    return tokens.gather(-1, place)


def _check_sampling(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, vocab: int
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: wanted at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature}: wanted 0 (greedy) or more")
    if top_k is not None and not 1 <= top_k <= vocab:
        raise ValueError(f"top_k={top_k}: wanted None or 1 to vocab_size={vocab}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: wanted None or a number above 0 and at most 1")


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
