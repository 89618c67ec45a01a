"""What others published: shapes of real models as configurations of the kit, and numbers with their sources."""

import csv
import json
from typing import NamedTuple

from minimoe.data_files import data_path
from minimoe.model import MoEConfig
from minimoe.model.config import require


def read_published(name: str) -> list[dict[str, str]]:
    """The rows of `data/published/<name>.csv`; each has a `source`. Raises ValueError where there is no such table."""
    path = data_path("published") / f"{name}.csv"
    tables = sorted(table.stem for table in path.parent.glob("*.csv"))
    require(name in tables, "name", name, f"one of {', '.join(tables)}")
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class RealModel(NamedTuple):
    """A published model, and where its shape was published."""

    config: MoEConfig
    source: str


CLAIMED = 0.927  # the correlation that the claim of July 2025 rests on (arXiv 2507.03014)


def _read_models(name: str) -> dict[str, RealModel]:
    models = json.loads(data_path(f"published/{name}.json").read_text(encoding="utf-8"))
    return {name: RealModel(MoEConfig(**model["config"]), model["source"]) for name, model in models.items()}


REAL_MODELS = _read_models("models")
LARGE_MODELS = _read_models("large_models")  # those whose configurations notebook 13 reads, besides two of the others

# How differently a model uses its experts for five domains (code, papers, encyclopedia, web, books): by layer, the
# Jensen-Shannon divergence in bits, of a possible log2(5) = 2.32; and, in layer 7 of OLMoE, the largest share of a
# domain's tokens that go to one expert, where 8 of 64 is even load. Both from the counts in the repository
# allenai/OLMoE, which come with arXiv 2409.02060.
DIVERGENCE = {"OLMoE-1B-7B": {0: 0.17, 7: 0.40, 15: 0.50}, "Mixtral-8x7B": {0: 0.003, 7: 0.004, 15: 0.009}}
OLMOE_LARGEST_SHARE = {"GitHub": 0.77, "arXiv": 0.79, "Wikipedia": 0.85, "C4": 0.33, "books": 0.51}

# Per cent of consecutive tokens with the same first-choice expert, by layer, where an even load gives 12.5.
# arXiv 2401.04088, Table 5.
MIXTRAL_REPETITION = {
    "ArXiv": {0: 14.0, 15: 27.9, 31: 22.7},
    "DM Mathematics": {0: 14.1, 15: 28.4, 31: 19.7},
    "GitHub": {0: 14.9, 15: 28.1, 31: 19.7},
    "Gutenberg": {0: 13.9, 15: 26.1, 31: 26.3},
    "PhilPapers": {0: 13.6, 15: 25.3, 31: 22.1},
    "PubMed": {0: 14.2, 15: 24.6, 31: 22.0},
    "StackExchange": {0: 13.6, 15: 27.2, 31: 23.6},
    "Wikipedia": {0: 14.4, 15: 23.6, 31: 25.3},
}
