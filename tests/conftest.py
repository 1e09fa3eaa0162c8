"""Puts the repository on Python's path, so that tests import the scripts as users do."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest

from tests.models import TINY_BASE


def pytest_configure(config):
    """peft 0.21 asks a model by a name that transformers 5.24 has given up, and is told so."""
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="session")
def tiny():
    """The tiny model and its tokenizer; not to be changed."""
    from eval import load_model

    return load_model(TINY_BASE, "cpu")


@pytest.fixture(scope="session", autouse=True)
def lecture(request, tmp_path_factory):
    """What test_notebook.begin gives, begun before the first test: the notebook's cells take half
    a minute, in processes of their own. None where the test of them was not asked for."""
    names = {item.name for item in request.session.items}
    if "test_every_cell_runs_with_few_steps" not in names:
        yield
        return
    from tests.test_notebook import begin

    process, notebook = begin(tmp_path_factory.mktemp("lecture"))
    with process:
        yield process, notebook
        process.kill()
