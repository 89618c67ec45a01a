"""The figures of the course, one module a subject. Importing this package fills the register `FIGURES`."""

from minimoe.course.figures.register import FIGURES, make, to_csv
from minimoe.course.figures.tokens import (
    LAYER,
    MAX_TOKENS,
    SHOWCASE,
    draw_tokens,
    parameters_total_active,
    route_text,
    shipped_model,
    token_journey,
    token_map,
)

__all__ = [
    "FIGURES",
    "LAYER",
    "MAX_TOKENS",
    "SHOWCASE",
    "draw_tokens",
    "make",
    "parameters_total_active",
    "route_text",
    "shipped_model",
    "to_csv",
    "token_journey",
    "token_map",
]
