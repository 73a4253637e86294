"""What several test files explain."""
import numpy as np
import pytest


@pytest.fixture(scope="session")
def image():
    "Coloured blocks under a little noise, (224, 224, 3) uint8."
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 200, (7, 7, 3)), np.ones((32, 32, 1), int))
    return (blocks + rng.integers(0, 40, (224, 224, 3))).astype(np.uint8)
