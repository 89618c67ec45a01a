"""Dense models made into mixtures of experts, without training.

An MLP is a sum over its I neurons, so that the dense MLP can be shared out without changing the sum: the shared expert,
where the family has one, gets the first neurons, the routed experts get the others, and each neuron counts once. What a
part is then multiplied by is undone in its down projection. A sigmoid gate on the shared expert starts at 0 and halves
it: its down projection is doubled. The weights that a token's K experts get have a sum: it is divided out, in
`router_scale` where the router has one and in the down projections where not. With that, "copy" and "virtual_groups"
keep the function

    exactly, whatever the router chooses, where it makes the weights sum to 1, or to `routed_scaling_factor`: mixtral;
        qwen2_moe, glm4_moe and deepseek_v3 with `norm_topk_prob`, which is the default here;
    exactly only with `router_std=0`, where the sum depends on the token: pangu_pro_moe, and all others without
        `norm_topk_prob`. Divided out is then the sum of a router without preference, K / E for a softmax (the weight
        scaling of He et al. 2024, arXiv 2410.07524). Random rows favour those they choose: the sum is larger.

Everything outside the MLPs is copied; attention biases that only the mixture has start at 0. Each function returns a
new model in evaluation mode, in the dtype of the first one given, which stays as it is.

Shapes: H hidden size, I width of the dense MLP, E experts, K experts per token, G slices of an MLP.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minimoe.lineage.derive import average, neurons, set_neurons
from minimoe.model.config import MoEConfig, require
from minimoe.model.families import find_family, write_config
from minimoe.model.layers import MLP
from minimoe.model.moe import Experts, MoELayer
from minimoe.model.transformer import MoEForCausalLM

METHODS = ("copy", "split", "virtual_groups", "drop")


def upcycle(
    dense: MoEForCausalLM,
    *,
    num_experts: int,
    num_experts_per_tok: int,
    method: str = "copy",
    model_type: str = "mixtral",
    granularity: int | None = None,
    drop_ratio: float | None = None,
    noise: float = 0.0,
    router_std: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> MoEForCausalLM:
    """Make a dense model into a mixture of experts.

    "copy": every expert is the whole MLP (Komatsuzaki et al. 2022, arXiv 2212.05055, section 3). The function is
        unchanged, exactly where the module's head says so.
    "split": every expert is a slice, 1 / G of the neurons. Each copy of the MLP is shuffled and cut into G, as for
        Qwen1.5-MoE (Qwen2 report, arXiv 2407.10671, section 2.2). A token meets some slices twice and others never.
    "virtual_groups": slices again, cut in order, and the G slices of a copy share one router row, so that they are
        chosen together: every token meets every slice equally often (He et al. 2024, arXiv 2410.07524).
        Exact as "copy" is. Expert e holds slice e // (E / G): with a router of G groups (Pangu Pro MoE), group m holds
        all copies of slice m, and every token meets every slice whatever the rows are.
    "drop": every expert is the whole MLP, a share of whose neurons is drawn anew, others in each expert, from a normal
        distribution with the mean and standard deviation of what it replaces, in gate, up and down each
        (Drop-Upcycling: Nakamura et al. 2025, arXiv 2502.19261, section 3). The function changes.

    Args:
        dense: with no mixture in it.
        num_experts, num_experts_per_tok: E and K.
        method: one of the above.
        model_type: the family of the result; "mixtral", "qwen2_moe", "pangu_pro_moe", "glm4_moe", "deepseek_v3" from a
            dense model with latent attention (`kv_lora_rank`), or another that can express it.
        granularity: G, for the two that cut; K if None, so that as many neurons are active as in the dense model.
        drop_ratio: r, for "drop"; 0.5, the best in the paper, if None.
        noise: added to the routed experts at the end, normal, in standard deviations of the gates', ups' and downs'
            weights. The function changes.
        router_std: of the rows of the router; `initializer_range` if None. At 0 all experts tie, and the
            choices are arbitrary until training makes the rows differ.
        seed: of the router, the shuffles, the dropped neurons and the noise.
        **settings: other fields of the result's `MoEConfig`. `shared_expert_intermediate_size` is I / 2 if not given,
            where the family has a shared expert, and the width of a routed one where the family counts shared experts
            (glm4_moe, deepseek_v3); `mlp_only_layers` stay dense.

    Raises ValueError: naming the argument or field, what was found and what was wanted; the family cannot express the
    model.
    """
    _require_dense("dense", dense)
    granularity = _check_method(method, num_experts, num_experts_per_tok, granularity, drop_ratio)
    config = _mixture_config(dense.config, model_type, num_experts, num_experts_per_tok, granularity, settings)
    std = config.initializer_range if router_std is None else router_std
    for name, value in (("noise", noise), ("router_std", std)):
        require(value >= 0, name, value, "0 or more")
    copies_of_a_row = granularity if method == "virtual_groups" else 1
    if method == "virtual_groups":
        _check_groups(config, granularity, std)
    generator = torch.Generator("cpu").manual_seed(seed)
    model = _with_trunk(config, dense)
    for layer, source in _mixtures(model, dense):
        rows = std * _normal(layer.gate.weight[: num_experts // copies_of_a_row], generator)
        shared, routed = neurons(source).tensor_split([config.shared_expert_intermediate_size])
        if method == "copy":
            experts = routed.repeat(num_experts, 1, 1, 1)
        elif method == "drop":
            experts = _drop(routed, num_experts, 0.5 if drop_ratio is None else drop_ratio, generator)
        else:
            experts = _slices(routed, num_experts, granularity, generator if method == "split" else None)
        if noise:
            experts = experts + noise * _spread(experts) * _normal(experts, generator)
        _fill(layer, rows.repeat(copies_of_a_row, 1), shared, experts, granularity)
    return model


def branch_train_mix(
    parents: Sequence[MoEForCausalLM],
    *,
    num_experts_per_tok: int,
    model_type: str = "mixtral",
    router_std: float | None = None,
    seed: int = 0,
    **settings: Any,
) -> MoEForCausalLM:
    """Mix fine-tuned descendants of one dense model (BTX: Sukhbaatar et al. 2024, arXiv 2403.07816, section 3.2).

    Expert e of every layer is the MLP of parent e; all else is the mean of the parents, the shared expert included. The
    function is that of no parent, unless they are all one: then it is "copy".

    Args:
        parents: dense, of one shape; as many experts as parents.
        seed: of the router. The others are as for `upcycle`.

    Raises ValueError: as for `upcycle`; the parents' configurations differ.
    """
    for number, parent in enumerate(parents):
        _require_dense(f"parents[{number}]", parent)
    mean = average(parents)
    config = _mixture_config(mean.config, model_type, len(parents), num_experts_per_tok, 1, settings)
    std = config.initializer_range if router_std is None else router_std
    generator = torch.Generator("cpu").manual_seed(seed)
    model = _with_trunk(config, mean)
    width = config.shared_expert_intermediate_size
    for layer, source, *own in _mixtures(model, mean, *parents):
        experts = torch.stack([neurons(mlp)[width:] for mlp in own])
        _fill(layer, std * _normal(layer.gate.weight, generator), neurons(source)[:width], experts, 1)
    return model


def transplant_expert(
    model: MoEForCausalLM,
    donor: MoEForCausalLM,
    *,
    layer: int,
    expert: int,
    donor_layer: int | None = None,
    donor_expert: int | None = None,
) -> MoEForCausalLM:
    """Put an expert of another mixture, or the MLP of a dense model, in the place of one expert.

    The router stays: the newcomer is sent the tokens of the one it replaces.

    Args:
        model: a mixture.
        donor: of the same hidden size, its MLP or expert as wide as the experts of `model`.
        layer: of the expert that is replaced.
        expert: which of that layer's.
        donor_layer: where it comes from; None: from `layer`.
        donor_expert: which expert of that layer; None for a dense MLP.

    Raises ValueError: a layer or expert is not there, or the shapes differ.
    """
    changed = deepcopy(model).eval()
    experts = _find_part(changed, "", layer, expert)
    donor_layer = layer if donor_layer is None else donor_layer
    new = neurons(_find_part(donor, "donor_", donor_layer, donor_expert))
    new = new if donor_expert is None else new[donor_expert]
    rows = neurons(experts)
    found, wanted = (each.shape[::2] for each in (new, rows[expert]))
    require(found == wanted, f"width and hidden_size in layer {donor_layer} of the donor", [*found], f"{[*wanted]}")
    rows[expert] = new
    set_neurons(experts, rows)
    return changed


# --- what the mixture is made of; an MLP is [I, 3, H], as `neurons` reads it --------------------------------


def _slices(mlp: Tensor, num_experts: int, granularity: int, shuffle: torch.Generator | None) -> Tensor:
    """E / G copies of `mlp` [R, 3, H], each cut into G: [E, R / G, 3, H], all copies of the first slice first."""
    copies = torch.stack([mlp] * (num_experts // granularity))
    if shuffle is not None:
        copies = torch.stack([copy[torch.randperm(len(copy), generator=shuffle, device="cpu")] for copy in copies])
    return copies.unflatten(1, (granularity, -1)).transpose(0, 1).flatten(0, 1)


def _drop(mlp: Tensor, num_experts: int, ratio: float, generator: torch.Generator) -> Tensor:
    """E copies of `mlp` [R, 3, H], in each of which round(ratio R) neurons are new: [E, R, 3, H]."""
    experts = mlp.repeat(num_experts, 1, 1, 1)
    for expert in experts:
        dropped = torch.randperm(len(mlp), generator=generator, device="cpu")[: round(ratio * len(mlp))]
        old = mlp[dropped]
        if len(dropped):
            expert[dropped] = old.mean((0, 2), keepdim=True) + _spread(old) * _normal(old, generator)
    return experts


def _spread(rows: Tensor) -> Tensor:
    """The standard deviation of all gate, all up and all down weights in [..., 3, H], to multiply these with."""
    return rows.movedim(-2, 0).flatten(1).std(1, correction=0)[:, None]


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, the same in every dtype."""
    return torch.randn(like.shape, generator=generator, device="cpu").to(like)


def _with_trunk(config: MoEConfig, dense: MoEForCausalLM) -> MoEForCausalLM:
    """A model with all of `dense` that it has a place for; biases that `dense` does not have are 0."""
    like = dense.model.embed_tokens.weight
    with torch.device("cpu"):
        model = MoEForCausalLM(config).to(like.dtype)
    model.load_state_dict(dense.state_dict(), strict=False)
    model.tokenizer_json = dense.tokenizer_json
    return model.to(like.device).eval()


def _mixtures(model: MoEForCausalLM, *dense: MoEForCausalLM) -> list[tuple[MoELayer | MLP, ...]]:
    """Each mixture of `model`, with the dense MLPs whose place it takes."""
    blocks = zip(*(each.model.layers for each in (model, *dense)), strict=True)
    return [tuple(block.mlp for block in same) for same in blocks if same[0].is_sparse]


@torch.no_grad()
def _fill(layer: MoELayer, router: Tensor, shared: Tensor, experts: Tensor, granularity: int) -> None:
    """Write router rows and neurons into `layer`, scaled so that every neuron counts once, as in the dense MLP."""
    layer.gate.weight.zero_()
    undecided = layer.gate(layer.gate.weight[:1], None).weights.sum()  # of a token without preference
    layer.gate.weight.copy_(router)
    scale = granularity / undecided.to(experts.dtype)
    set_neurons(layer.experts, experts)
    if layer.gate.router_scale is not None:
        layer.gate.router_scale.fill_(scale)
    else:
        layer.experts.down_proj.mul_(scale)
    if layer.shared_expert is not None:
        set_neurons(layer.shared_expert, shared)
    if layer.shared_expert_gate is not None:
        layer.shared_expert_gate.weight.zero_()
        layer.shared_expert.down_proj.weight.mul_(2)


def _mixture_config(
    dense: MoEConfig, model_type: str, num_experts: int, k: int, granularity: int, settings: dict[str, Any]
) -> MoEConfig:
    width, family = dense.intermediate_size, find_family(model_type).model_type
    as_one_more = {"shared_expert_intermediate_size": width // (granularity + 1)}
    sigmoid = as_one_more | {"score_func": "sigmoid", "e_score_correction_bias": True}
    half = {"shared_expert_intermediate_size": width // 2}
    grouped = {"router": "grouped", "n_group": k, "router_scale": True, "norm_topk_prob": False}
    biases = {"attention_bias": True, "attention_output_bias": True}
    of_family = {"qwen2_moe": half | {"shared_expert_gate": True}, "pangu_pro_moe": half | grouped | biases}
    of_family |= {"glm4_moe": sigmoid, "deepseek_v3": sigmoid}
    chosen = {"norm_topk_prob": True} | of_family.get(family, {}) | settings
    shared, router = chosen.get("shared_expert_intermediate_size", 0), chosen.get("router")
    fits = 0 <= shared < width
    require(fits, "shared_expert_intermediate_size", shared, f"0 to {width - 1}, less than the dense MLP")
    fits = (width - shared) % granularity == 0
    require(fits, "granularity", granularity, f"a divisor of {width - shared}, the neurons to share out")
    limit = chosen.get("swiglu_limit")
    require(limit is None, "swiglu_limit", limit, "None: the dense MLP has no limit")
    fits = router not in ("hash", "expert_choice")
    require(fits, "router", router, "one that learns to choose K experts for each token")
    sizes = {"num_experts": num_experts, "moe_intermediate_size": (width - shared) // granularity}
    config = replace(dense, **sizes, num_experts_per_tok=k, model_type=family, **chosen)
    write_config(config, None, "float32")  # raises where the family cannot express the model
    return config


def _check_method(method: str, num_experts: int, k: int, granularity: int | None, drop_ratio: float | None) -> int:
    """The granularity that `method` works with."""
    require(method in METHODS, "method", method, f"one of {', '.join(METHODS)}")
    fits = drop_ratio is None or (method == "drop" and 0 <= drop_ratio <= 1)
    require(fits, "drop_ratio", drop_ratio, "None, or 0 to 1 with method='drop'")
    if method in ("copy", "drop"):
        require(granularity is None, "granularity", granularity, f"None for method={method!r}, which cuts nothing")
        return 1
    granularity = k if granularity is None else granularity
    fits = granularity >= 1 and num_experts % granularity == 0
    require(fits, "granularity", granularity, f"a divisor of num_experts={num_experts}")
    fits = method == "split" or k % granularity == 0
    require(fits, "granularity", granularity, f"a divisor of num_experts_per_tok={k}, for whole groups")
    return granularity


def _check_groups(config: MoEConfig, granularity: int, router_std: float) -> None:
    """Whether tied rows make every token meet every slice."""
    groups = config.n_group
    by_rows = config.router in ("topk", "topk_softmax") and groups == 1
    by_groups = config.router == "grouped" and groups % granularity == 0
    fits = by_rows or by_groups or (config.router == "grouped" and granularity % groups == 0)
    wanted = f"'topk' without groups, or 'grouped' with a divisor or multiple of granularity={granularity}"
    require(fits, f"router={config.router!r}, n_group", groups, f"{wanted}, for method='virtual_groups'")
    fits = router_std > 0 or granularity == 1 or by_groups
    require(fits, "router_std", 0, "above 0, as the rows must tell one virtual group from another")


def _require_dense(name: str, model: MoEForCausalLM) -> None:
    found = model.config.num_experts
    require(found == 0, f"num_experts of {name}", found, "0, a dense model")


def _find_part(model: MoEForCausalLM, prefix: str, layer: int, expert: int | None) -> Experts | MLP:
    """The experts of a sparse layer, or the MLP of a dense one; `prefix` begins the names of the arguments."""
    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    require(layer in range(layers), f"{prefix}layer", layer, f"0 to {layers - 1}")
    mlp = model.model.layers[layer].mlp
    if isinstance(mlp, MLP):
        require(expert is None, f"{prefix}expert", expert, "None, as that layer is dense")
        return mlp
    require(expert in range(experts), f"{prefix}expert", expert, f"0 to {experts - 1}, as that is a mixture")
    return mlp.experts
