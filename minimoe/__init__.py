"""A compact Mixture-of-Experts language model, and what it takes to teach with it.

These names are the package without the course; docs/using.md shows them at work. Each is imported when it is first
asked for, so that `import minimoe` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # "as" makes each a name of this package to type checkers
    from minimoe.fingerprints.compare import compare as compare
    from minimoe.fingerprints.fingerprint import fingerprint as fingerprint
    from minimoe.fingerprints.report import Report as Report
    from minimoe.fingerprints.weights import open_weights as open_weights
    from minimoe.inspection.trace import record_routing as record_routing
    from minimoe.lineage.upcycling import upcycle as upcycle
    from minimoe.model.config import MoEConfig as MoEConfig
    from minimoe.model.transformer import MoEForCausalLM as MoEForCausalLM
    from minimoe.training.corpus import Corpus as Corpus
    from minimoe.training.generation import generate as generate
    from minimoe.training.loop import evaluate as evaluate
    from minimoe.training.loop import train as train

__version__ = "0.1.0"
_FROM = {
    "Corpus": "training.corpus",
    "MoEConfig": "model.config",
    "MoEForCausalLM": "model.transformer",
    "Report": "fingerprints.report",
    "compare": "fingerprints.compare",
    "evaluate": "training.loop",
    "fingerprint": "fingerprints.fingerprint",
    "generate": "training.generation",
    "open_weights": "fingerprints.weights",
    "record_routing": "inspection.trace",
    "train": "training.loop",
    "upcycle": "lineage.upcycling",
}
__all__ = [*_FROM]


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_FROM[name]}"), name)
    globals()[name] = value  # the next time it is found without this function
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _FROM.keys())
