"""A compact Mixture-of-Experts language model, and what it takes to teach with it.

These names are the package without the course; docs/using.md shows them at work. Each is imported when it is first
asked for, so that `import minimoe` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimoe.fingerprints.compare import compare
    from minimoe.fingerprints.fingerprint import fingerprint
    from minimoe.fingerprints.report import Report
    from minimoe.fingerprints.weights import open_weights
    from minimoe.inspection.trace import record_routing
    from minimoe.lineage.upcycling import upcycle
    from minimoe.model.config import MoEConfig
    from minimoe.model.transformer import MoEForCausalLM
    from minimoe.training.corpus import Corpus
    from minimoe.training.generation import generate
    from minimoe.training.loop import evaluate, train

__version__ = "0.1.0"
__all__ = [
    "Corpus",
    "MoEConfig",
    "MoEForCausalLM",
    "Report",
    "compare",
    "evaluate",
    "fingerprint",
    "generate",
    "open_weights",
    "record_routing",
    "train",
    "upcycle",
]

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


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_FROM[name]}"), name)
    globals()[name] = value  # the next time it is found without this function
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _FROM.keys())
