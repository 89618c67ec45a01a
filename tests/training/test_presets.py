"""The small models of the course: equal where they are compared as equals."""

from dataclasses import replace

import pytest
import torch

from minimoe.model import Router, route_switch
from minimoe.training.presets import BALANCES, GRAINS, grain_config, small_config


def test_dense_twins_match_what_a_token_meets_and_what_is_stored():
    mixture, router = small_config(), 4 * 8 * 96
    assert small_config(experts=0).num_parameters() == mixture.num_parameters(active=True) - router
    assert small_config(experts=0, experts_per_token=8).num_parameters() == mixture.num_parameters() - router


def test_balances_differ_in_nothing_else():
    configs = [small_config(balance=balance) for balance in BALANCES]
    assert len({(config.hidden_size, config.num_experts, config.num_parameters()) for config in configs}) == 1
    ways = {(config.router_aux_loss_coef, config.seq_aux, config.e_score_correction_bias) for config in configs}
    assert ways == {(0.01, False, False), (0.01, True, False), (0.0, False, True), (0.0, False, False)}


def test_a_missing_arm_differs_from_both_neighbours_in_one_thing():
    """The loss with scores by sigmoid: its scores are those of the bias, the rest that of the loss."""
    loss, arm, bias = small_config(), small_config(score_func="sigmoid"), small_config(balance="bias")
    assert replace(arm, score_func="softmax", model_type="mixtral") == loss
    assert replace(arm, e_score_correction_bias=True, router_aux_loss_coef=0.0) == bias


def test_one_expert_per_token_is_weighted_as_in_switch_transformer():
    """By its probability: the router learns, whatever balances it."""
    for balance in BALANCES:
        config = small_config(experts_per_token=1, balance=balance)
        assert config.router_learns and not config.norm_topk_prob
        router, x = Router(config), torch.randn(5, config.hidden_size)
        torch.nn.init.normal_(router.weight)
        chosen = router(x)
        if balance != "bias":
            wanted = route_switch(torch.nn.functional.linear(x, router.weight))
            assert torch.equal(chosen.indices, wanted.indices)
            torch.testing.assert_close(chosen.weights, wanted.weights)


def test_an_unknown_balance_is_refused():
    with pytest.raises(ValueError, match="balance='luck': wanted one of loss, sequence, bias, none"):
        small_config(balance="luck")


def test_grains_store_and_meet_as_much_as_whole_experts():
    """But for the router, which has a row for each routed piece."""
    whole = small_config()
    for pieces, shared in GRAINS.values():
        config = grain_config(pieces, shared)
        routers = 4 * 96 * (8 * pieces - shared - 8)
        assert config.num_parameters() - routers == whole.num_parameters()
        assert config.num_parameters(active=True) - routers == whole.num_parameters(active=True)
        assert config.router_learns
