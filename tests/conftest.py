"""Puts the repository on Python's path, so that tests import the scripts as users do."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest

from tests.models import TINY_BASE


@pytest.fixture(scope="session")
def tiny():
    """The tiny model and its tokenizer; not to be changed."""
    from eval import load_model

    return load_model(TINY_BASE, "cpu")
