"""The house: who may import whom, every name from the file that defines it, the reader's map."""
import ast
import graphlib
import re

import pytest

from tests.models import ROOT

BELOW = {  # what a room may import from
    "entropy": "",
    "tasks": "tasks",
    "engine": "entropy tasks engine",
    "eval": "entropy tasks engine",
    "em_inf": "entropy tasks engine eval",
    "em_ft": "entropy tasks engine eval",
    "em_rl": "entropy tasks engine eval",
}
OUTSIDE = "scale findings course bench tiny".split()  # they may import from all, and none from them
FILES = [ROOT / f"{room}.py" for room in BELOW if (ROOT / f"{room}.py").exists()]
for folder in ["tasks", "engine", *OUTSIDE, "course/assignment"]:
    FILES += sorted((ROOT / folder).glob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def imports(path):
    """(module, name or None, is it at the top of the file?) of each import of ours."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node in tree.body
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.module, alias.name, node in tree.body


def file_of(module, beside):
    """The file of a module of ours, which a script may also import from its own folder."""
    for folder in beside, ROOT:
        path = folder.joinpath(*module.split(".")).with_suffix(".py")
        if path.exists():
            return path
    return None


def defined_in(path):
    """The names that a file defines at its top level."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        for target in [n for n in ast.walk(node) if isinstance(n, ast.Name)]:
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target.ctx, ast.Store):
                names.add(target.id)
    return names


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_name_comes_from_the_file_that_defines_it(path):
    """Guards against files that hand names on: a reader would have to look twice for each."""
    for module, name, _ in imports(path):
        source = file_of(module, ROOT if path.parent.name == "bench" else path.parent)
        if source and name:
            assert name in defined_in(source), f"{module} does not define {name}"


def test_imports_go_one_way_and_one_process_is_known():
    graph = {}
    for path in FILES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        room = module.partition(".")[0]
        if room in OUTSIDE:
            continue
        assert not re.search("RANK|WORLD|torchrun", path.read_text(encoding="utf-8"))
        graph[module] = set()
        for source, name, at_top in imports(path):
            own = source.partition(".")[0]
            assert own not in OUTSIDE, f"{module} imports {source}"
            if own in BELOW:
                assert at_top and own in BELOW[room].split(), f"{module} imports {source}"
                graph[module] |= {source, f"{source}.{name}"}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError where two need each other


def test_six_files_stand_at_the_top():
    top = {path.name for path in ROOT.glob("*.py")}
    assert top == {f"{name}.py" for name in "em_ft em_rl em_inf entropy eval test_entropy".split()}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_function_but_a_main_is_longer_than_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_settings_of_a_run_stand_in_a_file_of_their_own():
    """Guards against flags in engine/run.py, which is a run's folder and nothing else."""
    modules = {module for module, _, _ in imports(ROOT / "engine/run.py")}
    assert not modules & {"argparse", "engine.arguments"}
    assert {"add_arguments", "parse_args"} <= defined_in(ROOT / "engine/settings.py")


@pytest.mark.parametrize("name, most", [
    ("em_ft.py", 215), ("eval.py", 330), ("engine/sampler.py", 200), ("scale/em_rl_fsdp.py", 260),
])
def test_a_file_that_is_read_from_top_to_bottom_stays_short(name, most):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most
