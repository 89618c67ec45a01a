"""The checks of notebooks 07 and 09 accept every right rewrite of weights and say what is wrong with the others."""

import copy

import pytest
import torch
from scipy.stats import ortho_group

from minimoe.course.checks import WrongAnswer, check_drop, check_gauge, check_slices, check_value_remix
from minimoe.lineage.gauge import GAUGES, all_gauges, fold_norms

# --- slices (notebook 07) ----------------------------------------------------------------------------------


def by_chunks(gate, up, down, slices):
    return gate.chunk(slices), up.chunk(slices), [part * slices for part in down.chunk(slices, dim=1)]


def by_reshaping(gate, up, down, slices):
    hidden = gate.shape[1]
    return (
        gate.reshape(slices, -1, hidden),
        up.reshape(slices, -1, hidden),
        slices * down.reshape(hidden, slices, -1).transpose(0, 1),
    )


def scaled_up_instead(gate, up, down, slices):
    gate, up, down = by_reshaping(gate, up, down, slices)
    return gate, up * slices, down / slices


def every_other_neuron(gate, up, down, slices):
    """Right as well: which neurons a slice holds is free."""
    starts = range(slices)
    return (
        torch.stack([gate[start::slices] for start in starts]),
        torch.stack([up[start::slices] for start in starts]),
        torch.stack([down[:, start::slices] for start in starts]) * slices,
    )


def shuffled_arrays(gate, up, down, slices):
    order = torch.randperm(len(gate), generator=torch.Generator().manual_seed(0))
    return [tensor.numpy() for tensor in by_reshaping(gate[order], up[order], down[:, order], slices)]


def with_factors(of_gate, of_up, of_down):
    """A right cut whose parts are scaled by powers of the number of slices; right ones are 0, 0, 1."""

    def answer(gate, up, down, slices):
        gate, up, down = by_reshaping(gate, up, down, slices)
        return gate * slices**of_gate, up * slices**of_up, down * float(slices) ** (of_down - 1)

    return answer


def torn(gate, up, down, slices):
    return *by_reshaping(gate, up, down, slices)[:2], slices * down.reshape(slices, len(down), -1)


# --- dropped neurons (notebook 07) -------------------------------------------------------------------------


def dropping(choose, draw, where=(0, 1, 2)):
    """`drop` in which `choose(width, share, generator)` gives the neurons and `draw(old, like, generator)` the new
    numbers; `where`: the matrices that are changed."""

    def answer(gate, up, down, share, generator):
        neurons = choose(len(gate), share, generator)
        rows = [gate.clone(), up.clone(), down.T.clone()]
        for place in where:
            rows[place][neurons] = draw(rows[place], rows[place][neurons], generator)
        return rows[0], rows[1], rows[2].T

    return answer


def exactly(width, share, generator):
    return torch.randperm(width, generator=generator)[: round(share * width)]


def like_the_whole(old, replaced, generator):
    return old.mean() + old.std() * torch.randn(replaced.shape, generator=generator)


def by_mask(gate, up, down, share, generator):
    """Right: a mask, and new tensors."""
    order = torch.rand(len(gate), generator=generator).argsort()
    new = order < round(share * len(gate))
    fresh = [like_the_whole(tensor, tensor, generator) for tensor in (gate, up, down)]
    return [
        torch.where(new[:, None], fresh[0], gate),
        torch.where(new[:, None], fresh[1], up),
        torch.where(new, fresh[2], down),
    ]


def with_another_generator(seed):
    def answer(gate, up, down, share, generator):
        own = torch.Generator().manual_seed(generator.initial_seed() + 1000 * seed)
        return dropping(exactly, like_the_whole)(gate, up, down, share, own)

    return answer


def three_draws(gate, up, down, share, generator):
    """Other neurons in each of the three."""
    parts = [dropping(exactly, like_the_whole, where=[place])(gate, up, down, share, generator) for place in range(3)]
    return tuple(part[place] for place, part in enumerate(parts))


def dropped_in_place(gate, up, down, share, generator):
    neurons = exactly(len(gate), share, generator)
    gate[neurons] = like_the_whole(gate, gate[neurons], generator)
    return gate, up, down


def by_coin(width, share, generator):
    return torch.rand(width, generator=generator) < share


def the_first(width, share, generator):
    return torch.arange(round(share * width))


def global_choice(width, share, generator):
    return torch.randperm(width)[: round(share * width)]


def draw_zero(old, replaced, generator):
    return torch.zeros_like(replaced)


def draw_one_for_a_neuron(old, replaced, generator):
    return like_the_whole(old, replaced[:, :1], generator).expand(replaced.shape)


def draw_without_mean(old, replaced, generator):
    return old.std() * torch.randn(replaced.shape, generator=generator)


def spread_of_gate(gate, up, down, share, generator):
    spread = gate.std()

    def draw(old, replaced, generator):
        return old.mean() + spread * torch.randn(replaced.shape, generator=generator)

    return dropping(exactly, draw)(gate, up, down, share, generator)


# --- a model disguised (notebook 09) ------------------------------------------------------------------------


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


def one_map_for_all(model, seed):
    """A right rewrite, but with one map for all key-value heads."""
    changed, size = copy.deepcopy(model), model.config.head_dim
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator(seed), dtype=torch.float64)).Q
    for block in changed.model.layers:
        values, output = block.self_attn.v_proj, block.self_attn.o_proj
        values.weight.copy_((turn @ values.weight.unflatten(0, (-1, size))).flatten(0, 1))
        if values.bias is not None:
            values.bias.copy_((values.bias.unflatten(0, (-1, size)) @ turn.mT).flatten())
        output.weight.copy_((output.weight.unflatten(1, (-1, size)) @ turn.mT).flatten(1))
    return changed


def in_single_precision(model, seed):
    """What the hint of the exercise leads to, without the type of the weight."""
    size = model.config.head_dim * model.config.num_key_value_heads
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator(seed))).Q
    return turn @ model.model.layers[0].self_attn.v_proj.weight


@torch.no_grad()
def test_one_map_for_all_heads_and_the_wrong_type_are_named():
    with pytest.raises(WrongAnswer, match="one and the same map"):
        check_value_remix(one_map_for_all)
    with pytest.raises(WrongAnswer, match=r"is in torch.float64.*\.to\(weight\)"):
        check_value_remix(in_single_precision)


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


def turned_embedding(model, seed):
    changed = copy.deepcopy(model)
    changed.model.embed_tokens.weight.copy_(changed.model.embed_tokens.weight.flip(1))
    return changed


def permuted_by_global_stream(model, seed):
    return neurons()(model, int(torch.randint(10**6, ())))


def rewritten_in_place(model, seed):
    turned = neurons()(model, seed)
    model.load_state_dict(turned.state_dict())
    return model


def several(model, seed):
    return turn_values(neurons()(scaled_queries()(fold_norms(model), seed), seed), seed)


def rows_of_other_heads(model, seed):
    """Heads in another order in queries and outputs, and not in keys and values."""
    changed = copy.deepcopy(model)
    for block in changed.model.layers:
        for rows in block.self_attn.q_proj.parameters():
            rows.copy_(rows.flip(0))
        block.self_attn.o_proj.weight.copy_(block.self_attn.o_proj.weight.flip(1))
    return changed


def first_layer_only(model, seed):
    whole, changed = remix()(model, seed), copy.deepcopy(model)
    changed.model.layers[0].load_state_dict(whole.model.layers[0].state_dict())
    return changed


RIGHT = [
    (check_slices, by_chunks),
    (check_slices, scaled_up_instead),
    (check_slices, every_other_neuron),
    (check_slices, shuffled_arrays),
    (check_drop, dropping(exactly, like_the_whole)),
    (check_drop, by_mask),
    *[(check_drop, with_another_generator(seed)) for seed in range(3)],
    (check_value_remix, remix()),
    (check_value_remix, turn_values),
    (check_gauge, neurons()),
    (check_gauge, several),
    (check_gauge, all_gauges),
    (check_gauge, gauge("permute_residual")),
]


@pytest.mark.parametrize(("check", "answer"), RIGHT)
def test_right_rewrites_are_accepted(check, answer):
    assert check(answer).startswith("Right")


WRONG = [
    (check_slices, with_factors(0, 0, 0), "put back"),
    (check_slices, with_factors(1, 0, 1), "SiLU"),
    (check_slices, with_factors(0, 1, 1), "both scaled"),
    (check_slices, torn, "do not reshape"),
    (check_slices, with_factors(0, 0, -1), "Not yet: entry 0 of what tokens get"),
    (check_slices, lambda g, u, d, s: (g, u, d), "gate has shape"),
    (check_slices, lambda g, u, d, s: ("a", "b", "c"), "wanted a tensor of numbers"),
    (check_drop, dropped_in_place, "gate you were given changed"),
    (check_drop, three_draws, "not the same ones"),
    (check_drop, dropping(exactly, like_the_whole, where=(0, 1)), "0 in down"),
    (check_drop, dropping(by_coin, like_the_whole), "wanted round"),
    (check_drop, dropping(the_first, like_the_whole), "Another generator"),
    (check_drop, dropping(global_choice, like_the_whole), "same generator"),
    (check_drop, dropping(exactly, draw_zero), "0.00 times the standard deviation"),
    (check_drop, dropping(exactly, lambda old, new, generator: new * torch.nan), "nan times the standard deviation"),
    (check_drop, dropping(exactly, draw_one_for_a_neuron), "Draw one for every weight"),
    (check_drop, spread_of_gate, "spread of its own"),
    (check_drop, dropping(exactly, draw_without_mean), "mean"),
    (check_value_remix, remix(lambda map: torch.eye(len(map)).double()), "take its inverse"),
    (check_value_remix, remix(lambda map: torch.linalg.inv(map).mT), "take its inverse"),
    (check_value_remix, remix(owner=lambda head, groups: head % groups), "of the group: neighbours"),
    (check_value_remix, remix(biased=False), "over its bias"),
    (check_value_remix, several, "Only values and output"),
    (check_value_remix, first_layer_only, "Every layer"),
    (check_gauge, neurons(("gate", "up")), "three go together"),
    (check_gauge, neurons(factor="gate"), r"silu\(c x\)"),
    (check_gauge, scaled_queries(biases=False), "biases included"),
    (check_gauge, scaled_queries(undone=False), "divides the other"),
    (check_gauge, rows_of_other_heads, "Heads"),
    (check_gauge, turned_embedding, "residual stream"),
    (check_gauge, scaled_queries(), "weight cosine is still"),
    (check_gauge, lambda model, seed: neurons()(model, 0), "Two seeds"),
    (check_gauge, permuted_by_global_stream, "same seed gave two"),
    (check_gauge, lambda model, seed: copy.deepcopy(model), "nothing was rewritten"),
    (check_gauge, rewritten_in_place, "Work on a copy"),
    (check_gauge, remix(lambda map: map * torch.nan), "moves by nan"),
]


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_wrong_rewrites_are_rejected_with_a_hint(check, answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check(answer)
