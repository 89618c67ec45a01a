"""Real processes are given the rows that the simulator of notebook 03 predicts, and send what that takes."""

import pytest
import torch

from minimoe.course.cost import place_experts
from minimoe.course.exchange import RULES, exchange, exchange_both
from minimoe.training.processes import run_processes


def test_processes_compute_what_the_simulator_says():
    experts, k, tokens = 8, 4, 300
    simulated = place_experts(experts, k, 2, 1.0, tokens)
    found = run_processes(2, exchange_both, experts, k, 1.0, tokens)
    for rule in RULES:
        of_rank = [one[rule] for one in found]
        rows = [one.computed for one in of_rank]
        torch.testing.assert_close(torch.tensor(rows).double() / (tokens * k / 2), simulated[rule].work.sum(1))
        assert [sum(one.given[rank] for one in of_rank) for rank in (0, 1)] == rows
        for rank, one in enumerate(of_rank):
            assert sum(one.given) == tokens // 2 * k
            assert one.sent["dispatch"].bytes == one.given[1 - rank] * 32 * 4
            assert one.sent["combine"].bytes == of_rank[1 - rank].given[rank] * 32 * 4
            assert one.sent["combine, backward"].bytes == one.sent["dispatch"].bytes
            assert one.sent["dispatch, backward"].bytes == one.sent["combine"].bytes
    assert found[0]["MoGE"].given == [tokens * k // 4] * 2


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule='luck': wanted one of top-k, MoGE"):
        exchange(None, "luck", 8, 4, 1.0, 8)
