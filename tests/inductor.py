"""Where torch's default compiler can build what it writes."""

import shutil

import pytest
import torch

needs_inductor = pytest.mark.skipif(
    shutil.which("g++") is None or " " in torch.__file__,
    reason="inductor wants g++, and torch in a path without a space, as it does not quote it",
)
