"""The checks of the exercises, and of the set-up.

A `check_*(answer)` tries the reader's function on several inputs. It accepts every right answer, whatever its type or
order, and returns a line of praise; for a known mistake it raises `WrongAnswer` with a hint, not the solution.
"""

from minimoe.course.checks.answers import WrongAnswer
from minimoe.course.checks.layer import check_first_choice_shares, check_grouped_choice, check_topk_weights
from minimoe.course.checks.setup import check_setup

__all__ = ["WrongAnswer", "check_first_choice_shares", "check_grouped_choice", "check_setup", "check_topk_weights"]
