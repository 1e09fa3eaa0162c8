"""course/: its exercises fit the code of today, and its word problems are what it says."""
import ast
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from em_rl import REWARDS
from tasks.answers import last_box
from tests.models import ROOT

sys.path.insert(0, str(ROOT / "course"))
import word_problems


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Make problems with flags: -> {"train", "test", "hard": rows}."""

    def make(flags=""):
        command = f"word_problems.py --size 300 --test-size 60 --out {tmp_path} {flags}"
        monkeypatch.setattr(sys, "argv", command.split())
        word_problems.main()
        rows = {}
        for name in ("train", "test", "hard"):
            lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
            rows[name] = [json.loads(line) for line in lines]
        return rows

    return make


def numbers_of(problem):
    return [int(number) for number in re.findall(r"\d+", problem["prompt"])]


def sentences_of(problem):
    words = "|".join(word_problems.NAMES + word_problems.THINGS)
    text = re.sub(rf"\d+|{words}", "_", problem["prompt"])
    return set(re.split(r"(?<=[.?]) ", text)) - {word_problems.ASK}


def steps_in(problem):
    """The steps of a worked solution, as in {"12 + 7 =", "19 - 4 ="}."""
    return set(re.findall(r"-?\d+ [-+*] \d+ =", problem["solution"]))


def test_sentences_and_steps_of_the_tests_are_not_trained_on(made):
    flags = "--direct 0 --rambling 0 --noise "
    tests, trained = made(flags + "0"), made(flags + "0.3")["train"]
    steps = set().union(*map(steps_in, trained))
    sentences = set().union(*map(sentences_of, trained))
    for name in "test", "hard":
        for problem in tests[name]:
            assert len(steps_in(problem)) >= 2 and not steps_in(problem) & steps
            assert not sentences_of(problem) & sentences
            assert word_problems.ASK in problem["prompt"]
    assert {problem["steps"] for problem in tests["train"]} == {2, 3, 4}
    assert {problem["steps"] for problem in tests["hard"]} == {5, 6}


def test_worked_answers_without_noise_are_right(made):
    for problem in made("--direct 0 --rambling 0 --noise 0")["hard"]:
        number = numbers_of(problem)[0]
        for line in re.findall(r"\d+ [-+*] \d+ = \d+", problem["solution"]):
            step, result = line.split(" = ")
            assert step.startswith(f"{number} ") and eval(step) == int(result)  # independent
            number = int(result)
        assert str(number) == problem["answer"] == last_box(problem["solution"])


def test_styles_have_the_shares_that_were_asked_for(made):
    rows = made("--size 3000 --direct 0.2 --rambling 0.1 --noise 0.1")["train"]
    for steps, share in (2, 0.2), (3, 0.4), (4, 0.6):
        some = [row["solution"] for row in rows if row["steps"] == steps]
        direct = sum(solution.startswith("\\boxed") for solution in some) / len(some)
        rambling = sum(solution.startswith("Maybe") for solution in some) / len(some)
        assert direct == pytest.approx(share, abs=0.07)
        assert rambling == pytest.approx(0.1, abs=0.05)


def test_shares_that_leave_no_worked_answers_are_refused(made):
    with pytest.raises(SystemExit):
        made("--direct 1.2")


def test_a_file_that_the_user_has_is_not_replaced(made, tmp_path):
    made("--size 5 --test-size 5")
    made("--size 6 --test-size 5")  # its own files may be
    (tmp_path / "hard.jsonl").write_text('{"id": 0, "prompt": "mine"}\n')
    with pytest.raises(SystemExit, match="hard.jsonl is there already"):
        made("--size 7 --test-size 5")
    assert "mine" in (tmp_path / "hard.jsonl").read_text()
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 6


def exercises():
    """The diffs of README.md, each as its hunks: [(file, name, lines)]."""
    text = (ROOT / "course/README.md").read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"^```diff\n(.*?)^```$", text, re.M | re.S):
        hunks = []
        for line in block.splitlines():
            if place := re.fullmatch(r"@@ (\S+): (\w+) @@", line):
                hunks.append((*place.groups(), []))
            else:
                hunks[-1][2].append(line)
        found.append(hunks)
    return found


def place_of(name, text):
    """The first and the last line of a top-level function or variable, counted from 0."""
    for node in ast.parse(text).body:
        names = [ast.unparse(target) for target in getattr(node, "targets", [])]
        if getattr(node, "name", None) == name or names == [name]:
            return node.lineno - 1, node.end_lineno - 1
    raise AssertionError(f"there is no {name}")


def changed_by(hunks):
    """{file: its text with the change}. Each hunk's old lines must be in the named place once."""
    texts = {}
    for file, name, lines in hunks:
        text = texts.get(file) or (ROOT / file).read_text(encoding="utf-8")
        code = text.split("\n")
        old = [line[1:] for line in lines if line[0] in " -"]
        new = [line[1:] for line in lines if line[0] in " +"]
        first, last = place_of(name, text)
        starts = [i for i in range(first, last + 1) if code[i : i + len(old)] == old]
        assert len(starts) == 1, f"{file}: {name} has these lines {len(starts)} times: {old}"
        code[starts[0] : starts[0] + len(old)] = new
        texts[file] = "\n".join(code)
    return texts


@pytest.mark.parametrize("hunks", exercises(), ids=lambda hunks: hunks[0][1])
def test_the_exercises_change_the_code_of_today(hunks):
    """Guards against exercises that show lines which em_rl.py no longer has."""
    for file, text in changed_by(hunks).items():
        compile(text, file, "exec")
        assert text != (ROOT / file).read_text(encoding="utf-8")
        assert max(map(len, text.splitlines())) <= 100


def test_the_rewards_of_the_exercises_are_what_their_texts_say():
    """Guards against a change of Rollout, or of what a reward returns, that breaks them."""
    entropy = torch.tensor([[0.5, 0.25, 0.0, 0.125], [2.0, 1.0, 0.5, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()  # digit, "}" and end come last
    texts = "\\boxed{1}", "so \\boxed{1}"
    rollout = SimpleNamespace(entropy=entropy, mask=mask, texts=texts, N=2, V=9)
    expected = {"worst": [-0.5, -2.0], "answer": [-0.25, -2.0], "semantic": [[0.0, 0.0]]}
    found = {}
    for hunks in exercises():
        if hunks[0][1] == "REWARDS":
            module = {"__file__": str(ROOT / "em_rl.py"), "__name__": "changed"}
            exec(changed_by(hunks)["em_rl.py"], module)
            for name in module["REWARDS"].keys() - REWARDS.keys():
                found[name] = module["REWARDS"][name](rollout).tolist()
    assert found == expected
