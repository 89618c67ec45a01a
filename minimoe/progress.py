"""One progress bar for all long work: shown to a person, silent in tests, in validation and in logs."""

import os
import sys


def progress_bar(iterable=None, **options):
    """`tqdm.auto.tqdm(iterable, **options)`, disabled where nobody is watching.

    Shown in a terminal and in a notebook. Silent under pytest (nbval's kernels included), where `CI` is set, and
    where standard error goes to a file. `MINIMOE_PROGRESS=0` silences it everywhere, any other value shows it.
    """
    from tqdm.auto import tqdm

    return tqdm(iterable, disable=not _watched(), **options)


def _watched() -> bool:
    wish = os.environ.get("MINIMOE_PROGRESS")
    if wish:
        return wish != "0"
    if "CI" in os.environ or "PYTEST_VERSION" in os.environ:
        return False
    ipython = sys.modules.get("IPython")
    in_a_notebook = ipython is not None and hasattr(ipython.get_ipython(), "kernel")
    return in_a_notebook or sys.stderr.isatty()
