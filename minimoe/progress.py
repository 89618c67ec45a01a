"""One progress bar for all long work: shown to a person, silent in tests, in validation and in logs."""

import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager

_shown: list = []  # the bars of `at_work`, the innermost last


def progress_bar(iterable=None, **options):
    """`tqdm.auto.tqdm(iterable, **options)`, disabled where nobody is watching.

    Shown in a terminal and in a notebook. Silent under pytest (nbval's kernels included), where `CI` is set, and
    where standard error goes to a file. `MINIMOE_PROGRESS=0` silences it everywhere, any other value shows it.
    """
    from tqdm.auto import tqdm

    return tqdm(iterable, disable=not _watched(), **options)


@contextmanager
def at_work(names: Collection[str]) -> Iterator[Iterator[str]]:
    """Give the names in turn, with a bar that shows the one at work and what `note` says of it, and then vanishes."""
    with progress_bar(names, unit="method", leave=False, miniters=0) as bar:
        _shown.append(bar)
        try:
            yield _described(bar)
        finally:
            _shown.pop()


def _described(bar) -> Iterator[str]:
    for name in bar:
        bar.set_postfix_str("", refresh=False)
        bar.set_description(name)
        yield name


def note(text: str) -> None:
    """Show a few words beside the bar of what is at work, if there is one, a few times a second at most."""
    if _shown:
        _shown[-1].set_postfix_str(text, refresh=False)
        _shown[-1].update(0)


def _watched() -> bool:
    wish = os.environ.get("MINIMOE_PROGRESS")
    if wish:
        return wish != "0"
    if "CI" in os.environ or "PYTEST_VERSION" in os.environ:
        return False
    ipython = sys.modules.get("IPython")
    in_a_notebook = ipython is not None and hasattr(ipython.get_ipython(), "kernel")
    return in_a_notebook or sys.stderr.isatty()
