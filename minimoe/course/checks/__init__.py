"""The checks of the exercises, and of the set-up.

A `check_*(answer)` tries the reader's function on several inputs. It accepts every right answer, whatever its type or
order, and returns a line of praise; for a known mistake it raises `WrongAnswer` with a hint, not the solution.
"""

from minimoe.course.checks.answers import WrongAnswer
from minimoe.course.checks.balance import check_balance_per_layer, check_bias_update
from minimoe.course.checks.case import check_case
from minimoe.course.checks.dispute import check_likelihood_ratio, check_posterior
from minimoe.course.checks.hiding import check_gauge, check_value_remix
from minimoe.course.checks.layer import check_first_choice_shares, check_grouped_choice, check_topk_weights
from minimoe.course.checks.learning import check_equal_compute_steps, check_training_flop
from minimoe.course.checks.museum import (
    check_balance_loss,
    check_capacity,
    check_coactivation,
    check_expert_choice,
    check_fresh_layer,
    check_moge_choice,
    check_noisy_choice,
    check_router_weights,
    check_training_loss,
)
from minimoe.course.checks.profile import check_profile_correlation, check_share_above
from minimoe.course.checks.promises import check_permutation_p, check_upper_bound
from minimoe.course.checks.provenance import check_cosine_table, check_layer_map
from minimoe.course.checks.relatives import check_drop, check_slices
from minimoe.course.checks.routers import check_biased_weights, check_looks_ahead
from minimoe.course.checks.setup import check_setup
from minimoe.course.checks.specialization import check_information_by_chance, check_mutual_information
from minimoe.course.checks.watching import check_chance_by_load, check_repetition

__all__ = [
    "WrongAnswer",
    "check_balance_loss",
    "check_balance_per_layer",
    "check_bias_update",
    "check_biased_weights",
    "check_capacity",
    "check_case",
    "check_chance_by_load",
    "check_coactivation",
    "check_cosine_table",
    "check_drop",
    "check_equal_compute_steps",
    "check_expert_choice",
    "check_first_choice_shares",
    "check_fresh_layer",
    "check_gauge",
    "check_grouped_choice",
    "check_information_by_chance",
    "check_layer_map",
    "check_likelihood_ratio",
    "check_looks_ahead",
    "check_moge_choice",
    "check_mutual_information",
    "check_noisy_choice",
    "check_permutation_p",
    "check_posterior",
    "check_profile_correlation",
    "check_repetition",
    "check_router_weights",
    "check_setup",
    "check_share_above",
    "check_slices",
    "check_topk_weights",
    "check_training_flop",
    "check_training_loss",
    "check_upper_bound",
    "check_value_remix",
]
