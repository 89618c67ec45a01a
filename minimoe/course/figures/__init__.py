"""The figures of the course, one module a subject. Every figure is a name of this package and an entry of `FIGURES`."""

from minimoe.course.figures import (  # noqa: F401 (each puts its figures into the register)
    benchmark_results,
    dispute,
    hiding,
    load,
    profile,
    promises,
    provenance,
    relatives,
    routers,
    specialists,
    tokens,
    twins,
    watching,
)
from minimoe.course.figures.register import FIGURES, make, to_csv

__all__ = ["FIGURES", "make", "to_csv", *FIGURES]

globals().update(FIGURES)
