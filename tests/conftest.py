"""Puts the repository on Python's path, so that tests import the scripts as users do."""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest

from tests.models import TINY_BASE


def pytest_configure(config):
    config.addinivalue_line("markers", "beside(command, env): begun before the first test")
    # peft 0.21 asks a model by a name that transformers 5.24 has given up, and is told so
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing`:FutureWarning")


def pytest_collection_modifyitems(items):
    """Those that wait for what was begun before the first test come last."""
    items.sort(key=lambda item: item.get_closest_marker("beside") is not None)


@pytest.fixture(scope="session")
def tiny():
    """The tiny model and its tokenizer; not to be changed."""
    from engine.load import load_model

    return load_model(TINY_BASE, "cpu")


@pytest.fixture(autouse=True)
def same_threads():
    """Guards against an OMP_NUM_THREADS that a test leaves behind: the processes of later tests
    would round in another way."""
    before = os.environ.get("OMP_NUM_THREADS")
    yield
    assert os.environ.get("OMP_NUM_THREADS") == before


def run_in(folder, words, env):
    """A CompletedProcess of `python WORDS` in a folder, and with the folder."""
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, encoding="utf-8"
    )
    done.folder = folder
    return done


@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory):
    """Runs the commands of tests marked `beside`, one after another, while the other tests run:
    {test: future of what run_in gives}. With two cores this saves a minute.

    The mark's `command` is a function of an empty folder: the words behind `python`."""
    futures = {}
    with ThreadPoolExecutor(1) as thread:
        for item in request.session.items:
            for mark in item.iter_markers("beside"):
                folder = tmp_path_factory.mktemp("beside")
                words, env = mark.kwargs["command"](folder), mark.kwargs.get("env", {})
                futures[item.nodeid] = thread.submit(run_in, folder, words, os.environ | env)
        yield futures
        thread.shutdown(cancel_futures=True)


@pytest.fixture
def done(beside, request):
    """The CompletedProcess of the test's mark `beside`."""
    return beside[request.node.nodeid].result()
