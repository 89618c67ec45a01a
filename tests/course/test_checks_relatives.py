"""The checks of exercise 07 accept every right answer and name each known mistake."""

import pytest
import torch
import torch.nn.functional as F

from minimoe.course.checks import WrongAnswer, check_drop, check_slices
from tests.rounding import assert_near

# --- slices -----------------------------------------------------------------------------------------------


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


def scaled_in_place(gate, up, down, slices):
    down *= slices
    return by_reshaping(gate, up, down / slices, slices)


def dealt(gate, up, down, slices):
    return *by_reshaping(gate, up, down, slices)[:2], every_other_neuron(gate, up, down, slices)[2]


def rows_of_down(gate, up, down, slices):
    return *by_reshaping(gate, up, down, slices)[:2], [part * slices for part in down.tensor_split(slices)]


def up_in_another_order(gate, up, down, slices):
    gate, up, down = by_reshaping(gate, up, down, slices)
    return gate, up.flip(0), down


@pytest.mark.parametrize(
    "answer",
    [by_chunks, by_reshaping, scaled_up_instead, every_other_neuron, shuffled_arrays],
    ids=lambda answer: answer.__name__,
)
def test_right_slices_are_accepted(answer):
    assert check_slices(answer).startswith("Right")


# --- dropped neurons --------------------------------------------------------------------------------------


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


def like_the_replaced(old, replaced, generator):
    if not len(replaced):
        return replaced
    return torch.normal(float(replaced.mean()), float(replaced.std()), replaced.shape, generator=generator)


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


@pytest.mark.parametrize("answer", [dropping(exactly, like_the_whole), dropping(exactly, like_the_replaced), by_mask])
def test_right_drops_are_accepted(answer):
    assert check_drop(answer).startswith("Right")


@pytest.mark.parametrize("seed", range(20))
def test_another_draw_of_a_right_answer_is_right(seed):
    def answer(gate, up, down, share, generator):
        own = torch.Generator().manual_seed(generator.initial_seed() + 1000 * seed)
        return dropping(exactly, like_the_whole)(gate, up, down, share, own)

    assert check_drop(answer)


def three_draws(gate, up, down, share, generator):
    """Other neurons in each of the three."""
    parts = [dropping(exactly, like_the_whole, where=[place])(gate, up, down, share, generator) for place in range(3)]
    return tuple(part[place] for place, part in enumerate(parts))


def rows_replaced_in_down(gate, up, down, share, generator):
    gate, up, _ = dropping(exactly, like_the_whole, where=(0, 1))(gate, up, down, share, generator)
    rows, down = exactly(len(down), share, generator), down.clone()
    down[rows] = like_the_whole(down, down[rows], generator)
    return gate, up, down


def in_place(gate, up, down, share, generator):
    neurons = exactly(len(gate), share, generator)
    gate[neurons] = like_the_whole(gate, gate[neurons], generator)
    return gate, up, down


def by_coin(width, share, generator):
    return torch.rand(width, generator=generator) < share


def the_kept(width, share, generator):
    return torch.randperm(width, generator=generator)[round(share * width) :]


def the_first(width, share, generator):
    return torch.arange(round(share * width))


def global_choice(width, share, generator):
    return torch.randperm(width)[: round(share * width)]


def draw_zero(old, replaced, generator):
    return torch.zeros_like(replaced)


def draw_one_for_a_neuron(old, replaced, generator):
    return like_the_whole(old, replaced[:, :1], generator).expand(replaced.shape)


def draw_standard(old, replaced, generator):
    return torch.randn(replaced.shape, generator=generator)


def draw_without_mean(old, replaced, generator):
    return old.std() * torch.randn(replaced.shape, generator=generator)


def spread_of_gate(gate, up, down, share, generator):
    spread = gate.std()

    def draw(old, replaced, generator):
        return old.mean() + spread * torch.randn(replaced.shape, generator=generator)

    return dropping(exactly, draw)(gate, up, down, share, generator)


WRONG = [
    (check_slices, with_factors(0, 0, 0), "put back"),
    (check_slices, with_factors(0, 0, -1), "Multiply"),
    (check_slices, with_factors(1, 0, 1), "SiLU"),
    (check_slices, with_factors(1, 1, 1), "all three"),
    (check_slices, with_factors(0, 1, 1), "both scaled"),
    (check_slices, torn, "do not reshape"),
    (check_slices, dealt, "do not reshape"),
    (check_slices, rows_of_down, "down has shape|one shape"),
    (check_slices, up_in_another_order, "same slice"),
    (check_slices, scaled_in_place, "down you were given changed"),
    (check_slices, lambda g, u, d, s: (g, u, d), "gate has shape"),
    (check_slices, lambda g, u, d, s: g, "three things"),
    (check_slices, lambda g, u, d, s: None, "return"),
    (check_slices, lambda g, u, d, s: ("a", "b", "c"), "a tensor each"),
    (check_drop, in_place, "gate you were given changed"),
    (check_drop, three_draws, "different neurons"),
    (check_drop, rows_replaced_in_down, "replaced rows"),
    (check_drop, dropping(by_coin, like_the_whole), "coin"),
    (check_drop, dropping(the_kept, like_the_whole), "share to keep"),
    (check_drop, dropping(the_first, like_the_whole), "Another generator"),
    (check_drop, dropping(global_choice, like_the_whole), "same generator"),
    (check_drop, dropping(exactly, draw_zero), "pruning"),
    (check_drop, dropping(exactly, draw_one_for_a_neuron), "equal"),
    (check_drop, dropping(exactly, draw_standard), "spread of its own"),
    (check_drop, spread_of_gate, "spread of its own"),
    (check_drop, dropping(exactly, draw_without_mean), "mean"),
    (check_drop, dropping(exactly, like_the_whole, where=(0, 1)), "down is as it was"),
    (check_drop, dropping(exactly, like_the_whole, where=(1, 2)), "gate is as it was"),
    (check_drop, lambda g, u, d, share, rng: (g, u, d), "Nothing is new"),
    (check_drop, lambda g, u, d, share, rng: (g, u, d.T), "down has shape"),
    (check_drop, lambda g, u, d, share, rng: None, "return"),
]


@pytest.mark.parametrize(("check", "answer", "hint"), WRONG)
def test_wrong_answers_are_rejected_with_a_hint(check, answer, hint):
    with pytest.raises(WrongAnswer, match=hint):
        check(answer)


def test_the_cut_of_the_tests_is_right_by_itself():
    """Independent of the check: the slices of a token add up to what torch's own layers give."""
    torch.manual_seed(0)
    gate, up, down = torch.randn(8, 3), torch.randn(8, 3), torch.randn(3, 8)
    x = torch.randn(5, 3)
    wanted = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    parts = zip(*every_other_neuron(gate, up, down, 4), strict=True)
    found = sum(0.25 * (F.silu(x @ g.T) * (x @ u.T)) @ d.T for g, u, d in parts)
    assert_near(found, wanted)
