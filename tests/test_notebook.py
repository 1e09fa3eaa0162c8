"""The lecture: its cells run, and the committed file holds what they print, and nothing else."""
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.models import ROOT

NOTEBOOK = ROOT / "course/entropy_minimisation.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
RUNS_CELLS = "nbclient", "ipykernel"
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def text_of(lines):
    return "".join(lines)


def printed(cells):
    """What the cells print to their standard output, as one text."""
    text = ""
    for cell in cells:
        for output in cell["outputs"]:
            text += text_of(output["text"]) if output.get("name") == "stdout" else ""
    return text


def test_every_committed_cell_was_run_in_order_and_without_error():
    """Guards against outputs of an older version of a cell, and of a run with an error in it."""
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        for output in cell["outputs"]:
            assert output["output_type"] != "error", output["ename"]
            assert output.get("name") != "stderr", output["text"]
    assert "image/png" in json.dumps(CODE)
    assert "<iframe srcdoc=" in json.dumps(CODE), "the token page is not in the notebook"


def test_the_committed_file_is_small_and_knows_no_machine():
    """Guards against pictures that swell the repository, and folders of whoever ran it."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < 1_000_000
    places = r"/(home|root|tmp|usr|work|mnt|opt|Users|content|private|var)/|[A-Z]:\\\\Users"
    found = re.search(rf'(?<![\w.<]){places}', text)
    assert not found, text[found.start() - 60 : found.end() + 60]
    assert str(ROOT) not in text


def test_cells_are_short_enough_to_be_read_on_a_screen():
    for cell in CODE:
        lines = text_of(cell["source"]).split("\n")
        assert len(lines) <= 17, lines[0]
        assert max(map(len, lines)) <= 100, max(lines, key=len)


def test_each_section_begins_a_slide():
    """Guards against a section in the middle of a cell, and a cell that is on no slide."""
    for cell in CELLS:
        kind = cell["metadata"]["slideshow"]["slide_type"]
        headings = re.findall("^#+ ", text_of(cell["source"]), re.M)
        if cell["cell_type"] == "markdown":
            begins = text_of(cell["source"]).startswith("#")
            assert len(headings) == begins and kind == ("slide" if begins else "subslide")
        else:
            assert kind in ("subslide", "skip")


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_first_cell_clones_outside_the_repository_and_only_once(tmp_path):
    """Guards against a second clone when a notebook is started again, as after a lost Colab."""
    source, place = tmp_path / "lecture", tmp_path / "elsewhere"
    source.mkdir()
    place.mkdir()
    (source / "em_rl.py").write_text("")
    person = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
    commands = ["init"], ["add", "em_rl.py"], [*person, "commit", "-m", "one file"]
    for command in commands:
        subprocess.run(["git", "-C", source, *command], check=True, capture_output=True)
    cell = text_of(CODE[0]["source"])
    cell = re.sub(r'^REPOSITORY = ".*"$', f"REPOSITORY = {str(source)!r}", cell, flags=re.M)
    script = cell + "\nprint(Path.cwd().relative_to(clone.parent), sys.path[0] == str(clone))\n"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script], cwd=place, capture_output=True,
                              text=True)
        assert done.stdout == "lecture True\n", done.stderr


COPY = f"copy/course/{NOTEBOOK.name}"
EXECUTE = """
import sys
from pathlib import Path
import nbclient, nbformat
path = Path(sys.argv[1])
notebook = nbformat.read(path, as_version=4)
place = {"metadata": {"path": str(path.parent)}}
nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
nbformat.write(notebook, path)
"""


def run_cells(folder):
    """They run in a copy, from the notebook's own folder, as Jupyter does it."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "runs", "assets", "bench", "tests")
    shutil.copytree(ROOT, folder / "copy", ignore=left_out)
    return ["-c", EXECUTE, folder / COPY]


@pytest.mark.skipif(not all(map(find_spec, RUNS_CELLS)), reason="needs nbclient and ipykernel")
@pytest.mark.beside(command=run_cells, env={"LECTURE_STEPS": "2"})
def test_every_cell_runs_with_few_steps(done):
    """Guards against a lecture that a change of the scripts has broken."""
    assert done.returncode == 0, done.stderr[-3000:]
    cells = json.loads((done.folder / COPY).read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    text = printed(code)
    assert len(re.findall(r"^step 2 \| held-out", text, re.M)) == 2, "EM-FT and EM-RL"
    assert "step 3 | held-out" in text, "the run that is too fast"
    gap = re.search(r"token \+ EM-FT - sequence, .* at most (\S+)", text)
    assert float(gap[1]) < 1e-6, "the identity"
    assert "<iframe srcdoc=" in json.dumps(code)
