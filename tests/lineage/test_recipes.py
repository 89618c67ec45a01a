"""The recipe that no other test file covers."""

import numpy as np
import torch
from torch.testing import assert_close

from minimoe.data_files import data_path
from minimoe.lineage.recipes import frame_both
from minimoe.model import MoEForCausalLM

ROLES = ("q", "k", "v", "o")


def test_framed_by_both_a_stranger_has_the_norms_and_the_profile_of_its_target():
    def profile(model, role):
        return [
            float(getattr(block.self_attn, f"{role}_proj").weight.detach().std(correction=0))
            for block in model.model.layers
        ]

    def norms(model):
        return torch.stack([tensor for name, tensor in model.state_dict().items() if "norm" in name])

    stranger = MoEForCausalLM.from_pretrained(data_path("zoo") / "stranger-13", dtype=torch.float64)
    target = MoEForCausalLM.from_pretrained(data_path("zoo") / "alder", dtype=torch.float64)
    framed = frame_both(stranger, target)
    assert torch.equal(norms(framed), norms(target)) and not torch.equal(norms(framed), norms(stranger))
    for role in ROLES:
        assert np.corrcoef(profile(framed, role), profile(target, role))[0, 1] > 0.9999
    ids = torch.randint(1024, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(framed(ids).logits, stranger(ids).logits, rtol=0, atol=1e-9)
