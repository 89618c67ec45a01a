"""The scripts of the live pages: the modules in pages/live/ as classic scripts, and beside them the models they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from minimoe.data_files import data_path
from minimoe.model import MoEForCausalLM
from workshop.bundle import bundle
from workshop.packing import pack, pack_tokenizer

LIVE = Path(__file__).with_name("pages") / "live"
BALANCED, UNBALANCED = "moe-real", "moe-real-unbalanced"  # mixtures trained with a balance loss, and without


def open_shipped(name: str) -> MoEForCausalLM:
    """A model of data/zoo in float32."""
    return MoEForCausalLM.from_pretrained(data_path(f"zoo/{name}"), dtype=torch.float32)


def mixture_scripts() -> dict[str, str]:
    """The scripts of the front page by name: its models, and what runs and shows them."""
    balanced, unbalanced = open_shipped(BALANCED), open_shipped(UNBALANCED)
    data = {
        "balanced": pack(balanced),
        "unbalanced": pack(unbalanced, bits=8),
        "tokenizer": pack_tokenizer(balanced.tokenizer_json),
    }
    return {"mixture.js": _constant("MIXTURE", data), "explore.js": bundle(LIVE / "explore.js")}


def _constant(name: str, data: dict[str, Any]) -> str:
    return f"const {name} = {json.dumps(data, ensure_ascii=True, separators=(',', ':'))};\n"
