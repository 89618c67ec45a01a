"""The cosines of every layer of one model with every layer of another."""

import numpy as np
import pytest

from minimoe.fingerprints.layer_cosines import layer_cosines
from tests.fingerprints.toys import random_model, weights


def test_cosines_of_layers_are_those_of_their_matrices():
    a, b = (weights(random_model(seed)) for seed in (0, 1))
    found = layer_cosines(a, b)
    assert found.shape == (3, 3, 7)
    x, y = a.get("up", 2).double().numpy().ravel(), b.get("up", 0).double().numpy().ravel()
    assert found[2, 0, 5] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert layer_cosines(a, a).diagonal() == pytest.approx(1.0)
