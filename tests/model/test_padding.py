"""Padding: a text in a padded batch is computed, counted and continued as it is alone."""

import pytest
import torch
from torch import Tensor

from minimoe.inspection import record_routing
from minimoe.model import MoEConfig, MoEForCausalLM, RouterOutput
from minimoe.model.balance import expert_load, load_balancing_loss, router_z_loss

TEXTS = [torch.tensor(ids) for ids in ([3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7], [2, 7, 1, 8, 2, 8])]
# The routers that differ in what they hold and in what they do; the others are variants of these.
FOUR_ROUTERS = pytest.mark.parametrize(
    "router_settings", ["sigmoid and bias in groups", "noisy", "expert choice", "grouped"], indirect=True
)
LENGTH = 16  # longer than the longest: a column may be padding in every row


def build(**settings) -> MoEForCausalLM:
    """In float64 and with weights far from 0, so that whatever leaks in is far above rounding."""
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MoEConfig(**sizes | {"num_experts": 6, "intermediate_size": 10, "initializer_range": 0.6} | settings)
    return MoEForCausalLM(config, seed=3).double().eval()


def pad(texts: list[Tensor], filler: int = 0) -> tuple[Tensor, Tensor]:
    """The texts as one batch [B, LENGTH], padded on the right where their length is odd, else on the left; its mask."""
    ids, mask = torch.full((len(texts), LENGTH), filler), torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if len(text) % 2 else slice(LENGTH - len(text), LENGTH)
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


def competes(settings: dict) -> bool:
    """Whether the tokens of a batch compete for experts: then a text can only be compared with itself alone."""
    return settings.get("capacity_factor") is not None


def test_logits_of_tokens_are_those_without_padding(router_settings):
    model = build(**router_settings)
    batches = [[text] for text in TEXTS] if competes(router_settings) else [TEXTS]
    for texts in batches:
        ids, mask = pad(texts)
        logits = model(ids, mask).logits
        for row, text in enumerate(texts):
            torch.testing.assert_close(logits[row][mask[row] == 1], model(text[None]).logits[0])


@FOUR_ROUTERS
def test_what_stands_at_padding_does_not_matter(router_settings):
    model = build(**router_settings, router_z_loss_coef=0.1)
    for_zeros, for_nines = (
        model(*pad(TEXTS, filler), labels=pad(TEXTS, filler)[0], output_router_logits=True) for filler in (0, 9)
    )
    mask = pad(TEXTS)[1] == 1
    for found, wanted in (
        (for_zeros.logits[mask], for_nines.logits[mask]),
        (for_zeros.loss, for_nines.loss),
        (for_zeros.aux_loss, for_nines.aux_loss),
    ):
        torch.testing.assert_close(found, wanted)


@FOUR_ROUTERS
def test_a_padding_token_fills_no_slot(router_settings):
    model = build(**router_settings)
    ids, mask = pad(TEXTS)
    for chosen in model(ids, mask, output_router_logits=True).router_outputs:
        at_padding = mask.flatten() == 0
        assert (chosen.indices[at_padding] == 6).all() and (chosen.weights[at_padding] == 0).all()
        k = model.config.num_experts_per_tok
        slots = k * (~at_padding).sum()
        if model.config.router == "expert_choice":
            slots = 6 * (int((~at_padding).sum()) * k // 6)  # each expert takes its share of the tokens
        assert expert_load(chosen.indices, 6).sum() == slots


def test_a_capacity_is_a_share_of_the_tokens_not_of_the_padding():
    """With padding counted, capacities would be twice as large, and nothing would be dropped."""
    model = build(capacity_factor=0.6)
    ids, mask = pad(TEXTS[:1])
    with record_routing(model) as alone:
        model(TEXTS[0][None])
    with record_routing(model) as padded:
        model(ids, mask)
    assert (alone.indices == 6).any()
    assert (padded.indices == alone.indices).all()


@pytest.mark.parametrize(("router", "seq_aux"), [("topk", False), ("noisy_topk", True), ("grouped", True)])
def test_losses_are_those_of_the_tokens(router, seq_aux):
    settings = {"n_group": 2} if router == "grouped" else {}
    model = build(router=router, router_aux_loss_coef=0.5, router_z_loss_coef=0.25, seq_aux=seq_aux, **settings)
    ids, mask = pad(TEXTS)
    output = model(ids, mask, labels=ids, output_router_logits=True)
    alone = [model(text[None], labels=text[None], output_router_logits=True) for text in TEXTS]
    predicted = [len(text) - 1 for text in TEXTS]
    cross_entropy = sum(n * one.cross_entropy for n, one in zip(predicted, alone, strict=True)) / sum(predicted)
    torch.testing.assert_close(output.cross_entropy, cross_entropy)

    by_layer = zip(*(one.router_outputs for one in alone), strict=True)
    together = [RouterOutput(*map(torch.cat, zip(*of_texts, strict=True))) for of_texts in by_layer]
    of_texts = torch.stack([one.aux_loss for one in alone])
    balance = of_texts.mean() if seq_aux else load_balancing_loss(together)
    torch.testing.assert_close(output.aux_loss, balance)
    torch.testing.assert_close(router_z_loss(output.router_outputs, attention_mask=mask), router_z_loss(together))
    if router != "noisy_topk":  # in training it draws noise for padding too
        loss = model.train()(ids, mask, labels=ids).loss
        torch.testing.assert_close(loss, cross_entropy + 0.5 * balance + 0.25 * router_z_loss(together))


def test_gradients_are_those_of_the_tokens():
    """Nothing flows back from padding, and nothing is NaN: a row of padding alone, in front of the others, included."""
    settings = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25, "seq_aux": True}
    padded, ragged = build(**settings).train(), build(**settings).train()
    ids, mask = pad([TEXTS[0][:0], *TEXTS])
    padded(ids, mask, labels=ids).loss.backward()
    predicted = [len(text) - 1 for text in TEXTS]
    for text, share in zip(TEXTS, predicted, strict=True):
        output = ragged(text[None], labels=text[None], output_router_logits=True)
        tokens = len(text) / sum(map(len, TEXTS))
        loss = output.cross_entropy * share / sum(predicted) + 0.5 * output.aux_loss / len(TEXTS)
        (loss + 0.25 * tokens * router_z_loss(output.router_outputs)).backward()
    for (name, found), wanted in zip(padded.named_parameters(), ragged.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("implementation", ["eager", "sorted", "grouped"])
def test_gradients_of_padding_are_zero_with_every_implementation(implementation):
    model = build(experts_implementation=implementation).float().train()
    ids, mask = pad(TEXTS, filler=19)  # a token that stands nowhere else
    model(ids, mask, labels=ids).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    untied = build(tie_word_embeddings=False, experts_implementation=implementation).float().train()
    untied(ids, mask, labels=ids).loss.backward()
    assert gradient.isfinite().all() and (untied.model.embed_tokens.weight.grad[19] == 0).all()


def test_in_pieces_with_a_cache():
    model = build()
    ids, mask = pad(TEXTS)
    whole, cache, parts = model(ids, mask).logits, None, []
    for start, end in ((0, 6), (6, 10), (10, LENGTH)):
        output = model(ids[:, start:end], mask[:, :end], cache=cache, use_cache=True)
        cache = output.cache
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask == 1], whole[mask == 1])


def test_prompts_of_unequal_length_go_on_as_each_does_alone(router_settings):
    model = build(**router_settings)
    batches = [[text] for text in TEXTS] if competes(router_settings) else [TEXTS]
    for texts in batches:
        ids, mask = pad(texts)
        for use_cache in (True, False):
            continued = model.generate(ids, 6, attention_mask=mask, use_cache=use_cache)
            assert torch.equal(continued[:, :LENGTH], ids)
            for row, text in enumerate(texts):
                alone = model.generate(text[None], 6, use_cache=use_cache)
                assert torch.equal(continued[row, LENGTH:], alone[0, len(text) :])


def test_texts_that_end_are_filled_up_and_disturb_nobody():
    model = build()
    ids, mask = pad(TEXTS)
    free = model.generate(ids, 8, attention_mask=mask)[:, LENGTH:]
    end = int(free[0, 1])
    ended = model.generate(ids, 8, attention_mask=mask, eos_token_id=end)[:, LENGTH:]
    for found, wanted in zip(ended.tolist(), free.tolist(), strict=True):
        stop = wanted.index(end) if end in wanted else len(wanted)
        assert found == (wanted[:stop] + [end] * 8)[: len(found)]
    assert end not in free[1:, :2]  # or this would test little


@FOUR_ROUTERS
def test_a_trace_holds_tokens_alone(router_settings):
    """What fills up a text that has ended is padding too."""
    model = build(**router_settings)
    batches = [[text] for text in TEXTS] if competes(router_settings) else [TEXTS]
    for texts in batches:
        ids, mask = pad(texts)
        with record_routing(model) as padded:
            model(ids, mask)
        with record_routing(model) as alone:
            for text in texts:
                model(text[None])
        for name in ("token_ids", "documents", "positions", "indices"):
            assert (getattr(padded, name) == getattr(alone, name)).all(), name


def test_a_trace_of_generated_text_stops_where_it_ends():
    """A token that ends a text is not read, in a batch as alone."""
    model = build()
    ids, mask = pad(TEXTS)
    end = int(model.generate(TEXTS[0][None], 2)[0, -1])
    with record_routing(model) as together:
        model.generate(ids, 8, attention_mask=mask, eos_token_id=end)
    with record_routing(model) as alone:
        for text in TEXTS:
            model.generate(text[None], 8, eos_token_id=end)
    for document in range(len(TEXTS)):
        found, wanted = (trace.token_ids[trace.documents == document].tolist() for trace in (together, alone))
        assert found == wanted


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 4), r"attention_mask has shape \(1, 4\): wanted \(1, 5\), a number per token"),
        (torch.ones(5), r"attention_mask has shape \(5,\): wanted \(1, 5\)"),
        (torch.tensor([[0, 1, 2, 1, 1]]), "attention_mask holds 2: wanted 1 for tokens and 0 for padding"),
        (torch.tensor([[0.0, -1e9, 0, 0, 0]]), r"attention_mask holds -1000000000.0: wanted 1 for tokens and 0 for"),
        (torch.full((1, 5), torch.nan), "attention_mask holds nan: wanted 1"),
    ],
)
def test_impossible_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        build()(TEXTS[0][None], mask)


def test_a_mask_must_cover_what_the_cache_holds():
    model, ids = build(), TEXTS[0][None]
    cache = model(ids, use_cache=True).cache
    with pytest.raises(
        ValueError, match=r"shape \(1, 1\): wanted \(1, 6\), a number per token, 5 of them for what the"
    ):
        model(ids[:, :1], torch.ones(1, 1), cache=cache)


def test_nothing_to_continue_and_nothing_to_score():
    model = build()
    with pytest.raises(ValueError, match="attention_mask: row 1 is padding throughout, wanted at least one token"):
        model.generate(torch.zeros(2, 3, dtype=torch.int64), 1, attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    ids, mask = torch.tensor([[4, 5, 6]]), torch.tensor([[0, 0, 1]])
    with pytest.raises(ValueError, match="labels are all -100 or padding after the first position"):
        model(ids, mask, labels=ids)


def test_masks_of_any_type():
    model = build()
    ids, mask = pad(TEXTS)
    wanted = model(ids, mask).logits
    for dtype in (torch.bool, torch.int32, torch.float32, torch.bfloat16):
        torch.testing.assert_close(model(ids, mask.to(dtype)).logits, wanted)
        assert torch.equal(
            model.generate(ids, 3, attention_mask=mask.to(dtype)), model.generate(ids, 3, attention_mask=mask)
        )
