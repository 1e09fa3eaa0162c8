"""Problems that come after others: tasks/steps.py, SciCode's prompts, eval.py and em_inf.py."""
import json
import re
import types
from pathlib import Path

import pytest
import torch

import em_inf
import eval as ev
from engine import run
from engine.files import read_samples
from tasks.errors import UserError
from tasks.problems import load_problems, scicode
from tasks.scores import summary
from tasks.steps import PROGRAM, pieces
from tests.models import NEEDS_POSIX, TINY_BASE


def main_problem(number, noun, factor):
    """A main problem of two steps, as a row of the benchmark."""
    first, second = f"{noun}_of", f"total_{noun}"
    header = "def {}({}):\n    '''Input x. Output: a number.'''"
    return {
        "problem_id": str(number),
        "problem_description_main": "What nobody is shown.",
        "required_dependencies": "import math",
        "sub_steps": [
            {"step_number": f"{number}.1", "step_description_prompt": f"Find one {noun}.",
             "step_background": f"A {noun} is {factor} x.", "return_line": "    return y",
             "function_header": header.format(first, "x"),
             "test_cases": [f"assert {first}(2) == {2 * factor}"]},
            {"step_number": f"{number}.2", "step_description_prompt": f"Add each {noun}.",
             "step_background": "Sums are finite.", "return_line": "    return total",
             "function_header": header.format(second, "xs"),
             "test_cases": [f"assert {second}([1, 2]) == {3 * factor}"]},
        ],
    }


MAIN = [main_problem(1, "mass", 3), main_problem(2, "charge", 5)]
# by the name of a step's function: the k-th answer to it
ANSWERS = {
    "mass_of": ["def mass_of(x): return math.prod([3, x])", "def mass_of(x): return x"],
    "charge_of": ["def charge_of(x): return 0", "def charge_of(x): return 5 * x"],
    "total_mass": ["def total_mass(xs): return sum(map(mass_of, xs))"],
    "total_charge": ["def total_charge(xs): return sum(map(charge_of, xs))"],
}
RIGHT = {  # by step and k
    "scicode/1.1": [True, False], "scicode/1.2": [True, False],
    "scicode/2.1": [False, True], "scicode/2.2": [False, True],
}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A file of the two main problems, and the (prompts, n) of each round that is asked."""
    with open(tmp_path / "steps.jsonl", "w", encoding="utf-8") as file:
        for row in MAIN:
            for step, problem in zip(row["sub_steps"], scicode(row, background=True)):
                # the benchmark's data is not here, so the tests are without it
                problem |= {"tests": step["test_cases"][0], "limits": [20, 2**30]}
                file.write(json.dumps(problem) + "\n")
    tokenizer = ev.load_model(TINY_BASE, "cpu")[1]
    rounds = []

    def generate(model, prompts, stop, max_new_tokens, temperature=1.0, N=1, **_):
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        rounds.append((texts, N))
        responses = []
        for text in texts:
            name = re.findall(r"Complete this function:\n```python\ndef (\w+)", text)[0]
            for k in range(N):
                code = ANSWERS[name][k % len(ANSWERS[name])]
                responses.append(tokenizer(f"```python\n{code}\n```")["input_ids"] + stop[:1])
        zeros = torch.zeros(len(responses), 1)
        return types.SimpleNamespace(responses=responses, entropy=zeros, logprobs=zeros)

    def score_all(model, head, prompts, responses):
        return types.SimpleNamespace(
            entropy=torch.zeros(len(responses), 1), logprobs=torch.zeros(len(responses), 1)
        )

    for script in ev, em_inf:
        monkeypatch.setattr(script, "generate", generate)
        monkeypatch.setattr(script, "score_all", score_all)
    monkeypatch.setattr(ev.report, "reliability_plot", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    return rounds


FLAGS = "--data steps.jsonl --seeds 1 --device cpu --allow-code-execution --out".split()


def verdicts(folder):
    """{(decoder, seed, step): verdicts of its samples in order}."""
    found = {}
    for samples in read_samples(folder).values():
        for sample in samples:
            key = sample["decoder"], sample["seed"], sample["id"]
            found.setdefault(key, []).append(sample["correct"])
    return found


@NEEDS_POSIX
def test_a_step_is_graded_with_its_own_sample_however_jobs_are_cut(asked, capsys):
    """Guards against steps before that were looked for in the same batch only, or in another
    sample: alone in its job a step was wrong, and one sample's wrong step made others wrong."""
    ev.main([*FLAGS, "one", "--n", "2"])
    assert [(len(texts), n) for texts, n in asked] == [(2, 1), (2, 1), (2, 2), (4, 1)]
    found = verdicts("one")
    for (decoder, _, step), right in found.items():
        assert right == (RIGHT[step][:1] if decoder == "greedy" else RIGHT[step])
    table = capsys.readouterr().out
    assert "steps greedy: 50.0% of 2 main problems are right, in all of their steps." in table
    assert "steps sample: 50.0% of 2 main problems" in table

    ev.main([*FLAGS, "jobs", "--n", "2", "--rollout-batch", "1"])
    for part in "2/3", "0/3", "1/3":
        ev.main([*FLAGS, "shards", "--n", "2", "--rollout-batch", "2", "--shard", part])
    assert verdicts("jobs") == verdicts("shards") == found
    assert {len(texts) for texts, _ in asked[4:]} == {1, 2}

    ev.main([*FLAGS, "alone"])  # n = 1
    assert all(right == found[key][:1] for key, right in verdicts("alone").items())


@NEEDS_POSIX
def test_resume_and_regrade_find_the_steps_before(asked, capsys):
    ev.main([*FLAGS, "cut", "--n", "2", "--rollout-batch", "2", "--seeds", "2"])
    found, table = verdicts("cut"), capsys.readouterr().out
    path = Path("cut/samples.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-3]))
    ev.main(["--resume", "cut"])
    assert verdicts("cut") == found
    capsys.readouterr()
    path.write_text(path.read_text().replace('"correct": true', '"correct": false'))
    ev.main(["--regrade", "cut", "--allow-code-execution"])
    rows = [line for line in table.splitlines() if line.startswith(("| steps", "steps "))]
    again = capsys.readouterr().out
    assert len(rows) == 4 and all(row in again for row in rows)


@NEEDS_POSIX
def test_em_inf_asks_steps_in_rounds(asked):
    model, tokenizer = ev.load_model(TINY_BASE, "cpu")
    problems = load_problems("steps.jsonl")
    settings = dict(max_new_tokens=8, allow_code=True)
    samples = em_inf.decode_and_grade(model, tokenizer, None, problems, "em-inf", **settings)
    assert [sample["correct"] for sample in samples] == [True, True, False, False]
    assert summary(samples)["main"] == 0.5 and len(asked) == 2


def test_training_refuses_steps(asked):
    """Guards against training on prompts in which the programs of the steps before are missing."""
    args = types.SimpleNamespace(data="steps.jsonl", max_prompt_tokens=9999, prompts=1)
    tokenizer = ev.load_model(TINY_BASE, "cpu")[1]
    with pytest.raises(UserError, match="steps.jsonl: scicode/1.2 comes after"):
        run.prepare(load_problems("steps.jsonl"), tokenizer, None, args)


@NEEDS_POSIX
def test_a_prompt_is_the_benchmarks(asked):
    """Each step before it with the model's own code, the next step, its header, the imports."""
    ev.main([*FLAGS, "one", "--decode", "greedy"])
    first, second = [texts[0] for texts, _ in asked]
    parts = [
        "The steps before it, and your code of them:", "Find one mass.\nA mass is 3 x.",
        f"```python\n{ANSWERS['mass_of'][0]}\n```", "------",
        "The next step: Add each mass.\nSums are finite.",
        "```python\ndef total_mass(xs):\n    '''Input x.", "number.'''\n\n    return total\n```",
        "```python\nimport math\n```",
    ]
    places = [second.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)
    assert "before it" not in first and "The next step: Find one mass.\nA mass is 3 x." in first
    assert not re.search(r"\[\[|nobody|mass_of\(x\):\n", second)  # no marks, no headers


def test_the_background_is_given_or_asked_for():
    given, own = (list(scicode(MAIN[0], background)) for background in (True, False))
    for step, (with_it, without) in enumerate(zip(given, own)):
        background = MAIN[0]["sub_steps"][step]["step_background"]
        assert background in with_it["prompt"] and background not in without["prompt"]
        assert "scientific background, as a comment" in without["prompt"]
        assert "scientific background, as" not in with_it["prompt"]
    assert PROGRAM.format("scicode/1.1") in own[1]["prompt"] and own[1]["main"] == "scicode/1"


def test_pieces_keep_steps_together():
    after = {"b": ["a"], "e": ["c", "d"], "g": ["f"]}
    problems = [{"id": name, "after": after.get(name, [])} for name in "abcdefgh"]
    for size, expected in (1, "ab cde fg h"), (2, "abcde fgh"), (9, "abcdefgh"):
        names = ["".join(p["id"] for p in some) for some in pieces(problems, size)]
        assert names == expected.split()
    assert pieces([{"id": i} for i in range(5)], 2)[2] == [{"id": 4}]


@pytest.mark.parametrize("after, limits", [("b", None), ("c", None), ("a", [5]), ("a", ["1", 2])])
def test_a_step_after_no_problem_above_it_is_refused(after, limits, tmp_path):
    rows = [dict(id="a", prompt="?"), dict(id="b", prompt="?", after=[after], limits=limits)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = "limits" if limits else f"after '{after}'"
    with pytest.raises(UserError, match=f"line 2: .*{words}"):
        load_problems(tmp_path / "a.jsonl")
