"""The check of the case: six models in `data/cases`, and the question which of them came from which."""

import hashlib
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

from minimoe.course.checks.answers import WrongAnswer

# sha256 of "child<parent", so that nobody reads the answer here by accident. It stands in docs/instructor.md.
_ANSWERS = {
    "a": "de02c07374630ae170e112e717ae5e3d616bcb6fdcd1db9abcf84efe507a18f8",
    "b": "18318eee4dbe6c0d1e6cb585d94a3e7e1f83c4aa034218d521de8316f06e7eca",
    "c": "b9dc5606963cc6890d3cdf1c0854f5b42ec517a3fa9107ac7d044e24c49e389c",
    "d": "d2ad667e196ceb1fc4fc902fef4e1b6eb9953efffe3a62446b1cdc1f26d41353",
    "e": "53da1920a874cad4af6ad6cd07e875228da426f4af349c14de6444f2ac249adc",
    "f": "02cc62801450f3751ed9de56a96370b5097fd0851dc522231d6129a9e13dfd97",
}


def check_case(parents: Mapping[str, str | None]) -> str:
    """Check a family tree of the six: for each model the one that its weights were made from, or None.

    A parent is the model that the last change began from; of an ancestor further up nothing is said. Say None for a
    model that has no weights of any other. Raises WrongAnswer with what is no tree, or with how many of
    the six are right, not which.
    """
    if not isinstance(parents, Mapping) or sorted(parents) != list(_ANSWERS):
        raise WrongAnswer(f"parents is {parents!r}; wanted a dictionary with an entry for each of a to f.")
    for child, parent in parents.items():
        if parent is not None and parent not in _ANSWERS:
            raise WrongAnswer(f"The parent of {child} is {parent!r}; wanted one of a to f, or None.")
    try:
        TopologicalSorter({child: [parent] for child, parent in parents.items() if parent}).prepare()
    except CycleError as error:
        raise WrongAnswer(f"{' from '.join(reversed(error.args[1]))}: a model cannot descend from itself.") from None
    digests = {child: hashlib.sha256(f"{child}<{parent}".encode()).hexdigest() for child, parent in parents.items()}
    right = sum(digests[child] == wanted for child, wanted in _ANSWERS.items())
    if right < len(_ANSWERS):
        raise WrongAnswer(f"{right} of 6 are right. Say of each pair what speaks for it before you change it.")
    return f"All {right} are right. Now say how sure you are of each, and what would have fooled you."
