# ruff: noqa: F401, F403 (these imports are what the notebooks import from here)
"""The checks of the exercises, and of the set-up.

A `check_*(answer)` tries the reader's function on several inputs. It accepts every right answer, whatever its type or
order, and returns a line of praise; for a known mistake it raises `WrongAnswer` with a hint, not the solution.
"""

from minimoe.course.checks.answers import WrongAnswer
from minimoe.course.checks.case import *
from minimoe.course.checks.evidence import *
from minimoe.course.checks.gaps import *
from minimoe.course.checks.layer_gaps import *
from minimoe.course.checks.mixture import *
from minimoe.course.checks.museum import *
from minimoe.course.checks.rewrites import *
from minimoe.course.checks.scale_up import *
from minimoe.course.checks.setup import *
from minimoe.course.checks.trained_mixture import *
from minimoe.course.checks.training_gaps import *
