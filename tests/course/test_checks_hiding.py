"""The checks of exercise 09 accept every gauge and say what was forgotten in a rewrite that is none."""

import copy

import pytest
import torch
from scipy.stats import ortho_group

from minimoe.course.checks import WrongAnswer, check_gauge, check_value_remix
from minimoe.lineage.gauge import GAUGES, all_gauges, fold_norms


def generator(seed):
    return torch.Generator().manual_seed(seed)


def gauge(name):
    return lambda model, seed: GAUGES[name](model, seed=seed)


def remix(left=torch.linalg.inv, *, owner=None, mixed=False, biased=True):
    """A value remix in which each part can be done wrongly: `left` makes what o's columns are multiplied by."""

    def answer(model, seed):
        changed, random = copy.deepcopy(model), generator(seed)
        heads, groups, size = (
            model.config.num_attention_heads,
            model.config.num_key_value_heads,
            model.config.head_dim,
        )
        for block in changed.model.layers:
            attention = block.self_attn
            maps = torch.randn(groups, size, size, generator=random, dtype=torch.float64)
            whole = torch.randn(groups * size, groups * size, generator=random, dtype=torch.float64)
            whole = whole if mixed else torch.block_diag(*maps)
            attention.v_proj.weight.copy_(whole @ attention.v_proj.weight)
            if biased and attention.v_proj.bias is not None:
                attention.v_proj.bias.copy_(whole @ attention.v_proj.bias)
            for head in range(heads):
                group = head // (heads // groups) if owner is None else owner(head, groups)
                columns = attention.o_proj.weight[:, head * size : (head + 1) * size]
                columns.copy_(columns @ left(maps[group]))
        return changed

    return answer


def turn_values(model, seed):
    """The same with rotations from scipy, without a loop over heads."""
    changed = copy.deepcopy(model)
    groups, size = model.config.num_key_value_heads, model.config.head_dim
    shared = model.config.num_attention_heads // groups
    for layer, block in enumerate(changed.model.layers):
        turns = torch.from_numpy(ortho_group.rvs(size, groups, random_state=100 * seed + layer))
        for rows in block.self_attn.v_proj.parameters():
            rows.copy_(torch.einsum("gij,gj...->gi...", turns, rows.unflatten(0, (groups, size))).flatten(0, 1))
        output = block.self_attn.o_proj
        heads = output.weight.unflatten(1, (groups, shared, size))
        output.weight.copy_(torch.einsum("hgsj,gij->hgsi", heads, turns).flatten(1))
    return changed


def neurons(roles=("gate", "up", "down"), *, factor=None):
    """Neurons in another order, in the matrices named; `factor` goes into one of them before."""

    def answer(model, seed):
        changed = copy.deepcopy(model)
        for block in changed.model.layers:
            order = torch.randperm(model.config.intermediate_size, generator=generator(seed))
            for role in roles:
                weight = getattr(block.mlp, f"{role}_proj").weight
                weight.copy_(weight[:, order] if role == "down" else weight[order])
            if factor:
                getattr(block.mlp, f"{factor}_proj").weight.mul_(2)
                block.mlp.down_proj.weight.div_(2)
        return changed

    return answer


def scaled_queries(*, biases=True, undone=True):
    def answer(model, seed):
        changed = copy.deepcopy(model)
        for block in changed.model.layers:
            for role, factor in (("q", 1 + seed), ("k", 1 / (1 + seed) if undone else 1 + seed)):
                projection = getattr(block.self_attn, f"{role}_proj")
                projection.weight.mul_(factor)
                if biases and projection.bias is not None:
                    projection.bias.mul_(factor)
        return changed

    return answer


def queries_of_other_groups(model, seed):
    changed = copy.deepcopy(model)
    for block in changed.model.layers:
        for rows in (block.self_attn.q_proj.weight, block.self_attn.q_proj.bias):
            if rows is not None:
                rows.copy_(rows.flip(0))
        block.self_attn.o_proj.weight.copy_(block.self_attn.o_proj.weight.flip(1))
    return changed


def turned_embedding(model, seed):
    changed = copy.deepcopy(model)
    changed.model.embed_tokens.weight.copy_(changed.model.embed_tokens.weight.flip(1))
    return changed


def permuted_by_global_stream(model, seed):
    return neurons()(model, int(torch.randint(10**6, ())))


def in_place(model, seed):
    turned = neurons()(model, seed)
    model.load_state_dict(turned.state_dict())
    return model


def several(model, seed):
    return turn_values(neurons()(scaled_queries()(fold_norms(model), seed), seed), seed)


@pytest.mark.parametrize(
    "answer",
    [
        neurons(),
        remix(),
        several,
        all_gauges,
        *map(gauge, ("permute_neurons", "scale_neurons", "permute_heads", "mix_vo", "rotate_qk", "permute_residual")),
    ],
)
def test_every_gauge_that_hides_is_accepted(answer):
    assert check_gauge(answer).startswith("Right: no logit moves, and the weight cosine")


@pytest.mark.parametrize("answer", [remix(), turn_values, gauge("mix_vo")])
def test_every_remix_of_values_is_accepted(answer):
    assert check_value_remix(answer).startswith("Right")


WRONG = [
    (check_gauge, neurons(("gate", "up")), "columns of down did not"),
    (check_gauge, neurons(("up",)), "columns of down did not"),
    (check_gauge, neurons(("down",)), "three go together"),
    (check_gauge, neurons(("up", "down")), "three go together"),
    (check_gauge, neurons(factor="gate"), r"silu\(c x\)"),
    (check_gauge, scaled_queries(biases=False), "their biases did not"),
    (check_gauge, scaled_queries(undone=False), "divides the other"),
    (check_gauge, queries_of_other_groups, "Heads"),
    (check_gauge, turned_embedding, "residual stream"),
    (check_gauge, scaled_queries(), "weight cosine is still"),
    (check_gauge, gauge("scale_qk"), "weight cosine is still"),
    (check_gauge, lambda model, seed: fold_norms(model), "Two seeds"),
    (check_gauge, lambda model, seed: neurons()(model, 0), "Two seeds"),
    (check_gauge, permuted_by_global_stream, "same seed gave two"),
    (check_gauge, lambda model, seed: copy.deepcopy(model), "nothing was rewritten"),
    (check_gauge, in_place, "Work on a copy"),
    (check_gauge, lambda model, seed: None, "return"),
    (check_gauge, lambda model, seed: model.state_dict(), "OrderedDict"),
    (check_gauge, remix(lambda map: map * torch.nan), "not finite"),
    (check_value_remix, remix(lambda map: torch.eye(len(map)).double()), "as it was"),
    (check_value_remix, remix(lambda map: map), "once more"),
    (check_value_remix, remix(lambda map: map.mT), "map transposed"),
    (check_value_remix, remix(lambda map: torch.linalg.inv(map).mT), "inverse transposed"),
    (check_value_remix, remix(lambda map: 2 * torch.linalg.inv(map)), "inverse of the map of its group"),
    (check_value_remix, remix(owner=lambda head, groups: head % groups), "repeat_interleave"),
    (check_value_remix, remix(mixed=True), "went into another"),
    (check_value_remix, remix(biased=False), "their bias did not"),
    (check_value_remix, several, "Only values and output"),
    (check_value_remix, neurons(), "Only values and output"),
    (check_value_remix, lambda model, seed: copy.deepcopy(model), "nothing was rewritten"),
]


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_what_is_no_gauge_is_rejected_with_a_hint(check, answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check(answer)


def test_a_remix_of_one_layer_is_not_enough():
    def answer(model, seed):
        whole, changed = remix()(model, seed), copy.deepcopy(model)
        changed.model.layers[0].load_state_dict(whole.model.layers[0].state_dict())
        return changed

    with pytest.raises(WrongAnswer, match="layer 1 are as they were"):
        check_value_remix(answer)
