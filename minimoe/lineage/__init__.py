"""How one model becomes another: derivations and upcycling, rewrites that hide them, frames that feign them."""

from minimoe.lineage.derive import Derivation
from minimoe.lineage.frame import frame_neuron_order, frame_norms, frame_std_profile
from minimoe.lineage.gauge import GAUGES, all_gauges
from minimoe.lineage.upcycling import branch_train_mix, transplant_expert, upcycle

__all__ = [
    "GAUGES",
    "Derivation",
    "all_gauges",
    "branch_train_mix",
    "frame_neuron_order",
    "frame_norms",
    "frame_std_profile",
    "transplant_expert",
    "upcycle",
]
