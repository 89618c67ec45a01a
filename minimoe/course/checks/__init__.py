# ruff: noqa: F401 (these imports are what the notebooks import from here)
"""The checks of the exercises, and of the set-up.

A `check_*(answer)` tries the reader's function on several inputs. It accepts every right answer, whatever its type or
order, and returns a line of praise; for a known mistake it raises `WrongAnswer` with a hint, not the solution.
"""

from minimoe.course.checks.answers import WrongAnswer
from minimoe.course.checks.case import check_case
from minimoe.course.checks.evidence import (
    check_cosine_table,
    check_layer_map,
    check_likelihood_ratio,
    check_permutation_p,
    check_posterior,
    check_profile_correlation,
    check_share_above,
    check_upper_bound,
)
from minimoe.course.checks.mixture import (
    check_balance_per_layer,
    check_bias_update,
    check_biased_weights,
    check_first_choice_shares,
    check_grouped_choice,
    check_looks_ahead,
    check_topk_weights,
)
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
from minimoe.course.checks.rewrites import check_drop, check_gauge, check_slices, check_value_remix
from minimoe.course.checks.setup import check_setup
from minimoe.course.checks.trained_mixture import (
    check_chance_by_load,
    check_equal_compute_steps,
    check_information_by_chance,
    check_mutual_information,
    check_repetition,
    check_training_flop,
)
