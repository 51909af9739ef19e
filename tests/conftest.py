"""What several test files share."""
import pytest

from ff_research.data import load


@pytest.fixture(scope="session")
def digits():
    "The bundled digits; nobody may change them."
    return load("digits")
