"""The check of the case: seven models in `data/cases`, and the question which of them came from which."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from minimoe.atomic import write_atomically
from minimoe.course.checks.answers import WrongAnswer
from minimoe.data_files import cache_folder, data_path

CANNOT_TELL = "cannot tell"
Beliefs = Mapping[str, Mapping[str | None, float]]


def seal(child: str, parent: str | None) -> str:
    """What stands in `sealed.json` for an answer, so that nobody reads it there by accident."""
    return hashlib.sha256(f"{child}<{parent}".encode()).hexdigest()


def check_case(beliefs: Beliefs, folder: str | Path | None = None) -> str:
    """Score beliefs about a family tree, once.

    For each model probabilities of what it was made from, as `{"a": {"b": 0.7, None: 0.3}, ...}`: another letter; None,
    if it has no weights of any other; or "cannot tell". They sum to 1; what is left out has 0. The score of a model is
    1 - (sum of squared errors) / 2 (Brier): 1 for what is right with certainty, 0 for what is wrong with certainty. In
    the mean it is highest for who writes what they believe.

    The first beliefs that are scored are kept, in the folder of the cache: others are not scored after them.

    folder: of the case, with its `sealed.json`; None: `data/cases`. Raises WrongAnswer with what is no belief.
    """
    folder = data_path("cases") if folder is None else Path(folder)
    sealed = json.loads((folder / "sealed.json").read_text(encoding="utf-8"))
    _require_beliefs(beliefs, list(sealed))
    _hand_in(beliefs, hashlib.sha256("".join(sealed.values()).encode()).hexdigest()[:16])
    scores, likeliest = {}, 0
    for child, of_parents in beliefs.items():
        errors = [(share - (seal(child, parent) == sealed[child])) ** 2 for parent, share in of_parents.items()]
        named = any(seal(child, parent) == sealed[child] for parent in of_parents)
        scores[child] = 1 - (sum(errors) + (not named)) / 2
        likeliest += seal(child, max(of_parents, key=of_parents.get)) == sealed[child]
    mean = sum(scores.values()) / len(scores)
    return (
        f"Handed in. Score {mean:.2f} of 1; of {len(scores)} likeliest answers {likeliest} are right. "
        "The same probability for all eight answers would give 0.56."
    )


def _require_beliefs(beliefs: Beliefs, letters: list[str]) -> None:
    if not isinstance(beliefs, Mapping) or sorted(beliefs) != letters:
        raise WrongAnswer(f"{beliefs!r}: wanted a dictionary with an entry for each of {letters[0]} to {letters[-1]}.")
    for child, of_parents in beliefs.items():
        if not isinstance(of_parents, Mapping) or not of_parents:
            raise WrongAnswer(f"{child}: {of_parents!r}; wanted probabilities, as {{'b': 0.7, None: 0.3}}.")
        for parent, share in of_parents.items():
            if parent not in {*letters, None, CANNOT_TELL} - {child}:
                raise WrongAnswer(f"{child}: {parent!r} is no parent; wanted another letter, None or {CANNOT_TELL!r}.")
            if not 0 <= share <= 1:
                raise WrongAnswer(f"{child}: {share} is no probability.")
        if abs(sum(of_parents.values()) - 1) > 1e-6:
            raise WrongAnswer(f"{child}: the probabilities sum to {sum(of_parents.values()):.2f}; wanted 1.")


def _hand_in(beliefs: Beliefs, case: str) -> None:
    """Keep the first beliefs about a case; raise WrongAnswer where others were kept."""
    path, text = (
        cache_folder() / f"case-{case}.json",
        json.dumps({c: sorted(map(str, b.items())) for c, b in beliefs.items()}),
    )
    if not path.exists():
        write_atomically(path, text.encode())
    elif path.read_text(encoding="utf-8") != text:
        raise WrongAnswer(f"Other beliefs were handed in before, and one shot is all there is ({path}).")
