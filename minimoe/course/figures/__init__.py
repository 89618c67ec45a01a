"""The figures of the course, one module a subject. Every figure is a name of this package and an entry of `FIGURES`."""

from importlib import import_module

from minimoe.course.figures.register import FIGURES, make, to_csv

for _subject in (
    *("tokens", "routers", "load", "twins", "watching", "specialists", "relatives"),
    *("profile", "hiding", "ideas", "promises", "dispute", "provenance", "benchmark_results", "fleet", "scale"),
):
    import_module(f"{__name__}.{_subject}")  # puts its figures into the register

__all__ = ["FIGURES", "make", "to_csv", *FIGURES]

globals().update(FIGURES)
