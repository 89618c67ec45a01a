"""Where the numbers of each role lie, however a family stores them.

This module takes apart matrices that are stored as one, turns those stored as [in, out], finds experts in one tensor or
in many, adds the 1 that some families leave out of norm weights, and multiplies the narrow matrices of multi-head
latent attention.

Shapes: D head size, E experts, H hidden size, I width of an MLP or of an expert.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor

from minimoe.fingerprints.roles import IN_A_LAYER, ONCE, PROJECTIONS, SIZES, find_layers, find_once, text_config
from minimoe.model.checkpoint import Checkpoint, CheckpointError

# What names and shapes do not tell, by the `model_type` of the text model.
_NORMS_LESS_ONE = {
    *("gemma", "gemma2", "gemma3", "vaultgemma", "nemotron", "qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    *("step3p7", "minimax_m3", "recurrent_gemma"),
}
# In names of matrices that hold each key, its queries and its value together:
_BY_GROUPS = ("query_key_value", ".wqkv", ".in_proj")
_NOT_BY_GROUPS = ("chatglm", "bailing")  # but these hold all queries, all keys, all values, as others do
_BY_HEADS = ("gpt_bigcode", "minimax")  # by groups where each head has its own key
_BY_QUARTERS = ("codegen",)  # the queries, values and keys of every fourth of the heads
_GATE_AND_UP_ALTERNATE = ("gpt_oss",)
_ENCODERS = re.compile(  # "new": GTE, before transformers had it
    r"bert(?!.*decoder)|^(big_bird|data2vec-text|electra|ernie|esm|gte|jina_embeddings_v3|layoutlm|longformer|luke"
    r"|mpnet|mra|new|nystromformer|roformer|xlm|xmod|yoso)$"
)


@dataclass(frozen=True)
class Place:
    """Where a role lies: in one tensor, or in one for each expert.

    Wherever `tensors` is an argument, it is a `Checkpoint` or what reads like one.
    """

    names: tuple[str, ...]
    take: Callable[[Tensor], Tensor] | None = None  # from a matrix, or a vector, to its part in the role; None: all
    by_expert: bool = False  # whether there is one tensor for each

    def shape(self, tensors: Checkpoint) -> tuple[int, ...]:
        """The shape of the role, from headers alone."""
        stored = tensors.shape(self.names[0])
        if self.take is not None:
            stored = *stored[:-2], *self.take(torch.empty(stored[-2:], device="meta")).shape
        return (len(self.names), *stored) if self.by_expert else stored

    def read(self, tensors: Checkpoint) -> Iterator[tuple[str, Tensor]]:
        """The numbers of the role in their order, with the tensor they are from: one tensor or one expert at a time."""
        for name in self.names:
            if self.take is None:
                yield name, tensors[name]
                continue
            shape = tensors.shape(name)[-2:]
            for matrix in tensors.pieces(name, prod(shape)):
                yield name, self.take(matrix.view(shape))


@dataclass(frozen=True)
class Product(Place):
    """A role that is computed from several tensors, by `multiply`."""

    multiply: Callable[..., Tensor] = torch.matmul

    def shape(self, tensors: Checkpoint) -> tuple[int, ...]:
        """The shape of the role, from headers alone."""
        return tuple(self.multiply(*(torch.empty(tensors.shape(name), device="meta") for name in self.names)).shape)

    def read(self, tensors: Checkpoint) -> Iterator[tuple[str, Tensor]]:
        """The product, with the first tensor in it that holds a number that is not finite, if there is one."""
        factors = {name: tensors[name].float() for name in self.names}
        broken = (name for name, factor in factors.items() if not factor.isfinite().all())
        yield next(broken, self.names[0]), self.multiply(*factors.values())


class Places:
    """The places of all roles of a model, and its sizes.

    num_layers, hidden_size, num_experts (0: dense), and num_heads, num_kv_heads and head_dim of the first layer with
    attention; model_type, that of the text model; is_encoder, whether it predicts no next token.

    Args:
        tensors: a `Checkpoint` or what reads like one.
        config: the content of config.json. Sizes that it does not give are taken from the tensors.
        where: the name of the configuration, for errors.

    Raises:
        CheckpointError: no layer with attention is found, or the configuration has other sizes than the tensors.
    """

    def __init__(self, tensors: Checkpoint, config: Mapping[str, Any], where: str) -> None:
        self._tensors, self._config, self._where = tensors, text_config(config), where
        self.model_type = str(self._config.get("model_type", "")).removesuffix("_text").removesuffix("_vl")
        self.is_encoder = bool(_ENCODERS.search(self.model_type))
        stack, self._slots = find_layers(tensors)
        self._is_gguf, self._once = stack == "blk", find_once(tensors, stack)
        before_mlps = {"norm2", "norm_between", "norm1_out", "norm1_after", "norm2_after"}
        self._has_norms_of_mlps = not all(before_mlps.isdisjoint(slots) for slots in self._slots.values())
        self._known: dict[int | None, dict[str, Place]] = {}
        attending = [layer for layer in sorted(self._slots) if self._has_attention(layer)]
        if not attending or "embedding" not in self._once:
            what = "layers with attention" if not attending else "embeddings"
            some = ", ".join(sorted(tensors)[:3])
            self._fail(
                f"model_type={self.model_type!r}: found no {what} among {some} ..., wanted names that gguf knows"
            )
        self._set_sizes(self._once["embedding"])
        self._set_heads(attending[0])

    def find(self, role: str, layer: int | None) -> Place | None:
        """Where a role of a layer lies, or one that a model has once, its layer None; None: there is none."""
        if layer is not None and layer not in range(self.num_layers):
            return None
        if layer not in self._known:
            self._known[layer] = self._find_once() if layer is None else self._find_in_layer(layer)
        return self._known[layer].get(role)

    def heads(self, layer: int) -> tuple[int, int]:
        """How many heads of queries and of keys a layer has."""
        heads = self._said("heads", layer)
        q, k = (self._shape(self.find(role, layer))[0] for role in "qk")
        return heads, k * heads // q

    # -- sizes

    def _set_sizes(self, embedding: str) -> None:
        held = max(self._slots) + 1
        further = sum("further_on" in slots for slots in self._slots.values())
        self.num_layers = self._said("layers") or held - further
        self._require(self.num_layers <= held, "layers", f"at most {held}, the layers that the file holds")
        rows, columns = self._tensors.shape(embedding)
        for size, held, side in ("vocabulary", rows, "rows"), ("hidden", columns, "columns"):
            self._require(self._said(size) in (None, held), size, f"{held}, the {side} of {embedding} in the file")
        self.hidden_size = columns
        sparse = next((layer for layer in range(self.num_layers) if self._is_sparse(layer)), None)
        self.num_experts = 0
        if sparse is not None:
            held = self._count_experts(sparse)
            self.num_experts = self._said("experts") or held
            self._require(self.num_experts <= held, "experts", f"at most {held}, the experts that layer {sparse} holds")

    def _set_heads(self, layer: int) -> None:
        """Of a layer with attention."""
        self.num_heads = self.num_kv_heads = self._count_heads(layer)
        q, k = (self.find(role, layer) for role in "qk")
        self.head_dim = 0
        if q is None or k is None:  # latent attention that is stored in another way
            return
        is_plain = {"q", "k"} <= self._slots[layer].keys() and "kv_a" not in self._slots[layer]
        (q_rows, *_), (k_rows, *_) = self._shape(q), self._shape(k)
        self.head_dim = (self._said("head_dim", layer) if is_plain else None) or q_rows // self.num_heads
        self.num_kv_heads = (self._said("kv_heads", layer) if is_plain else None) or k_rows // max(self.head_dim, 1)
        for size, heads, rows, place in (
            ("heads", self.num_heads, q_rows, q),
            ("kv_heads", self.num_kv_heads, k_rows, k),
        ):
            if heads * self.head_dim != rows:
                said = f"{self._name(size)}={heads} and {self._name('head_dim')}={self.head_dim}"
                self._fail(f"{said}: wanted a product of {rows}, the rows of {place.names[0]} in the file")

    def _count_heads(self, layer: int) -> int:
        heads = self._said("heads", layer)
        if heads is None:
            self._fail(f"{SIZES['heads'][0]}=None: wanted a whole number, in model_type={self.model_type!r} too")
        return heads

    def _count_experts(self, layer: int) -> int:
        down, router = (self._slots[layer].get(slot) for slot in ("expert_down", "router"))
        return max(down) + 1 if None not in down else self._tensors.shape((router or down)[None])[0]

    def _has_attention(self, layer: int) -> bool:
        slots = self._slots.get(layer, {}).keys()
        return not {"q", "q_b", "qkv"}.isdisjoint(slots) and "linear" not in slots

    def _is_sparse(self, layer: int) -> bool:
        return "expert_down" in self._slots.get(layer, {})

    def _shape(self, place: Place) -> tuple[int, ...]:
        return place.shape(self._tensors)

    def _said(self, size: str, layer: int = 0) -> int | None:
        """What the configuration says; None: nothing."""
        value = self._config.get(self._name(size))
        if isinstance(value, list | tuple):  # one for each layer
            value = value[layer] if layer < len(value) else None
        least = 0 if size == "experts" else 1
        fits = value is None or (type(value) is int and value >= least)
        self._require(fits, size, f"a whole number from {least} on")
        return value

    def _name(self, size: str) -> str:
        return next((name for name in SIZES[size] if self._config.get(name) is not None), SIZES[size][0])

    def _require(self, fits: bool, size: str, wanted: str) -> None:
        if not fits:
            self._fail(f"{self._name(size)}={self._config.get(self._name(size))!r}: wanted {wanted}")

    def _fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self._where}: {message}")

    # -- places

    def _find_once(self) -> dict[str, Place]:
        places = {slot: Place((name,)) for slot, name in self._once.items()}
        last = self._slots[self.num_layers - 1]
        if "norm_final" not in places and "norm2_out" in last:
            places["norm_final"] = Place((last["norm2_out"][None],))
        if self.is_encoder:
            places.pop("head", None)
        elif self._config.get("tie_word_embeddings") is not False:
            places.setdefault("head", places["embedding"])
        return {role: self._whole(role, places[role]) for role in ONCE if role in places}

    def _find_in_layer(self, layer: int) -> dict[str, Place]:
        slots = self._slots.get(layer, {})
        places = {slot: Place((names[None],)) for slot, names in slots.items() if None in names}
        if "qkv" in places and "c_attn" in places["qkv"].names[0]:
            rows, columns = self._shape(places["qkv"])
            if rows == self.hidden_size != columns:  # the Conv1D of GPT-2
                for slot in {"qkv", "o", *PROJECTIONS} & places.keys():
                    places[slot] = _then(places[slot], _transposed)
        if self._has_attention(layer):
            self._find_attention(places, layer)
        else:
            for role in "qkvo":
                places.pop(role, None)
        self._find_mlps(places, layer)
        self._find_norms(places, layer)
        for role in ("q_norm", "k_norm", "router_bias", "router_scale"):  # [heads, D], or [1, E]
            if role in places and len(self._shape(places[role])) == 2:
                places[role] = _then(places[role], Tensor.flatten)
        return {role: self._whole(role, places[role]) for role in IN_A_LAYER if role in places}

    def _find_attention(self, places: dict[str, Place], layer: int) -> None:
        heads = self._count_heads(layer)
        if "qkv" in places:
            self._split(places, heads, self._said("head_dim", layer) or self.hidden_size // heads)
        elif "kv_a" in places:
            self._multiply(places, heads)
        elif {"q", "o"} <= places.keys():
            q, o = (self._shape(places[role]) for role in "qo")
            if len(q) == len(o) == 2 and q[0] == 2 * o[1]:  # beside what the output is multiplied by
                places["q"] = _then(places["q"], _first_of_two, heads)
        if "k" in places and self._config.get("attention_k_eq_v"):  # Gemma 4
            places.setdefault("v", places["k"])

    def _split(self, places: dict[str, Place], heads: int, head_dim: int) -> None:
        """Queries, keys and values that lie in one matrix."""
        qkv = places["qkv"]
        name, rows = qkv.names[0], self._shape(qkv)[0]
        kv_heads = (rows // head_dim - heads) // 2
        if kv_heads < 1 or heads % kv_heads or (heads + 2 * kv_heads) * head_dim != rows:
            said = f"{self._name('heads')}={heads} and {self._name('head_dim')}={head_dim}"
            self._fail(f"{said}: wanted what makes {rows} rows of queries, keys and values, as {name} has in the file")
        is_grouped = any(part in name for part in _BY_GROUPS) and not self.model_type.startswith(_NOT_BY_GROUPS)
        if is_grouped or (self.model_type in _BY_HEADS and kv_heads == heads):
            take = partial(_of_groups, kv_heads=kv_heads, head_dim=head_dim)
        elif self.model_type in _BY_QUARTERS:
            take = _of_quarters
        else:
            take = partial(_in_turn, sizes=(heads * head_dim, kv_heads * head_dim, kv_heads * head_dim))
        for part, role in enumerate("qkv"):
            for bias in ("", "_bias"):
                if f"qkv{bias}" in places:
                    places[role + bias] = _then(places[f"qkv{bias}"], take, part)

    def _multiply(self, places: dict[str, Place], heads: int) -> None:
        """Queries, keys and values from their narrow parts, the norms between them folded in (DeepSeek-V2)."""

        def product(multiply: Callable[..., Tensor], *slots: str) -> Place:
            return Product(tuple(places[slot].names[0] for slot in slots), multiply=multiply)

        through = {"q_a", "q_a_norm", "q_b"} <= places.keys()
        if through and self._shape(places["q_b"])[1:] == self._shape(places["q_a_norm"]):
            places["q"] = product(_through_norm, "q_a", "q_a_norm", "q_b")
        if not {"q", "kv_a_norm"} <= places.keys():
            return
        latent, rows = ("kv_a", "kv_a_norm"), self._shape(places["q"])[0]
        if rows % heads:
            self._fail(
                f"{self._name('heads')}={heads}: wanted a divisor of {rows}, the rows that queries have in the file"
            )
        if "kv_b" in places:
            turned = self._shape(places["kv_a"])[0] - self._shape(places["kv_b"])[1]
            own = rows // heads - turned  # rows of a head that know no position
            places["k"] = product(partial(_latent_keys, heads=heads, own=own), *latent, "kv_b")
            places["v"] = product(partial(_latent_values, heads=heads, own=own), *latent, "kv_b")
        elif {"k_b", "v_b"} <= places.keys():  # [heads, of the latent, own] and [heads, D, of the latent]
            places["k"] = product(lambda narrow, norm, wide: _latent_keys(narrow, norm, wide.mT), *latent, "k_b")
            places["v"] = product(_latent_values, *latent, "v_b")

    def _find_mlps(self, places: dict[str, Place], layer: int) -> None:
        for kind in ("", "shared_"):
            gate, up, down = (f"{kind}{role}" for role in PROJECTIONS)
            if {up, down} <= places.keys() and gate not in places:
                rows, width = self._shape(places[up])[0], self._shape(places[down])[-1]
                if rows == 2 * width:
                    is_turned = "up_gate" in places[up].names[0]
                    places[gate], places[up] = (_then(places[up], _half, part ^ is_turned) for part in range(2))
        if self._is_sparse(layer):
            for role in PROJECTIONS:  # an MLP beside the experts is one that every token meets
                if role in places:
                    places.setdefault(f"shared_{role}", places.pop(role))
            places.update(self._find_experts(layer))

    def _find_experts(self, layer: int) -> dict[str, Place]:
        found = {
            slot: self._stack(self._slots[layer][f"expert_{slot}"], layer)
            for slot in ("gate_up", *PROJECTIONS)
            if f"expert_{slot}" in self._slots[layer]
        }
        if len(self._shape(found["down"])) == 2:  # one below the other, down as [I, H] (DBRX)
            found = {slot: _then(place, _stacked, self.num_experts) for slot, place in found.items()}
            found["down"] = _then(found["down"], _transposed)
        else:
            (rows, columns), down = (self._shape(found[slot])[-2:] for slot in (next(iter(found)), "down"))
            if rows == self.hidden_size and not (columns == rows == down[0]):  # stored as [in, out]
                found = {slot: _then(place, _transposed) for slot, place in found.items()}
        if "gate_up" in found:
            split = _one_of_pairs if self.model_type in _GATE_AND_UP_ALTERNATE else _half
            found["gate"], found["up"] = (_then(found["gate_up"], split, part) for part in range(2))
        return found

    def _stack(self, names: Mapping[int | None, str], layer: int) -> Place:
        if None in names:
            return Place((names[None],))
        if missing := sorted(set(range(self.num_experts)) - names.keys()):
            held = f"{len(names)} experts, and {next(iter(names.values()))}"
            self._fail(f"layer {layer} holds {held}, but no such tensor of expert {missing[0]}")
        return Place(tuple(names[expert] for expert in range(self.num_experts)), by_expert=True)

    def _find_norms(self, places: dict[str, Place], layer: int) -> None:
        """The norms before attention and MLP, and after them, whatever they are called."""
        if "norm_between" in places:
            is_after = "norm2" in places or ("norm2_after" in places and {"norm1", "norm1_after"}.isdisjoint(places))
            places["norm1_after" if is_after else "norm2"] = places["norm_between"]
        if "norm1" not in places and {"norm1_out", "norm2_out"} <= places.keys():  # of sums, as in BERT
            places["norm2"] = places["norm1_out"]
            before = self._once.get("norm_embedding")
            if layer > 0:
                before = self._slots.get(layer - 1, {}).get("norm2_out", {}).get(None)
            if before is not None:
                places["norm1"] = Place((before,))
            return
        if layer == 0 and "norm1" not in places and "norm2" in places and "norm_embedding" in self._once:  # ModernBERT
            places["norm1"] = Place((self._once["norm_embedding"],))
        if "norm1_out" in places and "norm1" not in places and "norm2" in places:  # ESM
            places["norm1"] = places.pop("norm1_out")
        if "norm1_out" in places:
            places["norm1_after" if "norm2" in places else "norm2"] = places["norm1_out"]
        if "norm2_out" in places:
            places["norm2_after"] = places["norm2_out"]
        if "norm1_after" in places and {"norm2", "norm2_after"}.isdisjoint(places):  # GPT-OSS in llama.cpp
            places["norm2"] = places.pop("norm1_after")
        if "norm1" in places and not self._has_norms_of_mlps:  # attention and MLP side by side
            places["norm2"] = places["norm1"]
            places["norm1"] = places.get("norm1_apart", places["norm1"])

    def _whole(self, role: str, place: Place) -> Place:
        is_less_one = "norm" in role and self.model_type in _NORMS_LESS_ONE and not self._is_gguf
        return _then(place, _plus_one) if is_less_one else place


# -- parts of matrices


def _then(place: Place, take: Callable[..., Tensor], *arguments: Any) -> Place:
    """The place, with one more step from what is stored to the role."""
    before = place.take
    return replace(place, take=lambda stored: take(stored if before is None else before(stored), *arguments))


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.mT


def _plus_one(norm: Tensor) -> Tensor:
    return norm.float() + 1


def _half(rows: Tensor, part: int) -> Tensor:
    return rows.chunk(2)[part]


def _one_of_pairs(rows: Tensor, part: int) -> Tensor:
    return rows[part::2]


def _first_of_two(rows: Tensor, heads: int) -> Tensor:
    """The first half of the rows of each head."""
    return rows.unflatten(0, (heads, 2, -1))[:, 0].flatten(0, 1)


def _stacked(rows: Tensor, experts: int) -> Tensor:
    return rows.unflatten(0, (experts, -1))


def _in_turn(rows: Tensor, part: int, sizes: tuple[int, ...]) -> Tensor:
    return rows.split(sizes)[part]


def _of_quarters(rows: Tensor, part: int) -> Tensor:
    queries, values, keys = rows.unflatten(0, (4, 3, -1)).unbind(1)
    return (queries, keys, values)[part].flatten(0, 1)


def _of_groups(rows: Tensor, part: int, kv_heads: int, head_dim: int) -> Tensor:
    """Queries, keys or values (0, 1, 2) of rows that hold for each key its queries, itself and its value."""
    groups = rows.unflatten(0, (kv_heads, -1, head_dim))
    return (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])[part].flatten(0, 2)


def _through_norm(narrow: Tensor, norm: Tensor, wide: Tensor) -> Tensor:
    return (wide * norm) @ narrow


def _latent_keys(narrow: Tensor, norm: Tensor, wide: Tensor, heads: int = 0, own: int = 0) -> Tensor:
    """[heads * D, H]: of each head its own rows, which come through `norm`, then those that all heads share.

    wide: [heads, own, of the latent]; or, if `heads` is given, each head's own rows followed by its values.
    """
    wide = wide.unflatten(0, (heads, -1))[:, :own] if heads else wide
    keys = _through_norm(narrow[: len(norm)], norm, wide)
    return torch.cat([keys, narrow[len(norm) :].expand(len(keys), -1, -1)], dim=1).flatten(0, 1)


def _latent_values(narrow: Tensor, norm: Tensor, wide: Tensor, heads: int = 0, own: int = 0) -> Tensor:
    """[heads * D, H], with `wide` as for the keys."""
    wide = wide.unflatten(0, (heads, -1))[:, own:] if heads else wide
    return _through_norm(narrow[: len(norm)], norm, wide).flatten(0, 1)
