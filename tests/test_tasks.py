"""Problems, and the statistics of graded samples."""
import base64
import itertools
import json
import math
import pickle
import sys
import types
import zlib
from contextlib import nullcontext

import numpy as np
import pytest

import tests.models  # noqa: F401, first: no network
from tasks import problems, scores
from tasks.answers import is_correct
from tasks.errors import UserError
from tasks.problems import load_problems

# -------------------------------------------------------------------------------- problems


def write(path, *lines):
    path.write_bytes("\n".join(lines).encode())
    return path


def test_problems_of_a_file_keep_their_fields_and_a_solution_gives_its_last_box(tmp_path):
    loaded = load_problems(write(
        tmp_path / "p.jsonl",
        '\ufeff{"prompt": "a", "answer": 7, "level": 3}\r', "  ",
        r'{"problem": "b", "id": 5, "solution": "so \\boxed{2}, no \\boxed{3}"}',
        r'{"question": "c", "answer": "x\n#### 18"}', '{"prompt": "d", "answer": " "}',
        '{"prompt": "e", "id": null, "answer": NaN, "tests": null, "solution": null}',
        '{"prompt": "f", "answer": 0, "tests": "f == \\"\\\\d\\""}', "",
    ))
    assert [p["prompt"] for p in loaded] == list("abcdef")
    assert [p.get("answer") for p in loaded] == ["7", "3", "18", None, None, "0"]
    assert loaded[0]["level"] == 3 and is_correct(r"\boxed{7}", loaded[0])
    assert len({p["id"] for p in loaded}) == 6 and loaded[1]["id"] == 5
    assert not any({"answer", "tests", "solution"} & set(p) for p in loaded[3:5])


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_a_line_of_a_file_ends_at_a_newline_and_nowhere_else(tmp_path, character):
    """str.splitlines would cut this string, and find no JSON."""
    line = f'{{"prompt": "a{character}b"}}'
    loaded = load_problems(write(tmp_path / "p.jsonl", line, line))
    assert [problem["prompt"] for problem in loaded] == [f"a{character}b"] * 2


BAD = [  # (the second line of a file, words that the error must hold)
    ('{"prompt": "b", "id": "a"}', "'a'", "line 1", "its own"),  # 2 problems counted as one
    ('{"prompt": "b", "id": ["a"]}', '"id"', "['a']", "leave it out"),
    ('{"prompt": "b", "id": {"a": 1}}', '"id"', "{'a': 1}", "string"),
    ('{"prompt": "b", "id": true}', '"id"', "True", "string"),
    ('{"prompt": "b", "answer": ["1", ["2"]]}', '"answer"', "['1', ['2']]", "list"),
    ('{"prompt": "b", "answer": []}', '"answer"', "[]", "list"),
    ('{"prompt": "b", "answer": {"x": 1}}', '"answer"', "{'x': 1}", "number"),
    ('{"prompt": "b", "answer": false}', '"answer"', "False", "number"),
    ('{"prompt": "b", "solution": 5}', '"solution"', "5", "string"),
    ('{"prompt": "b", "solution": ["So."]}', '"solution"', "['So.']", "string"),
    ('{"prompt": "b", "setup": 1}', '"setup"', "1", "Python"),
    ('{"prompt": "b", "after": "a"}', '"after"', "'a'", "list"),
    ('{"prompt": "b", "tests": []}', "tests", "[]", "input"),
    ('{"prompt": "b", "tests": " "}', "tests", "' '", "can fail"),
    ('{"prompt": "b", "tests": "# none"}', "tests", "# none", "can fail"),
    ('{"prompt": "b", "tests": "assert f( == 1"}', "tests", "assert f( == 1", "Python"),
    ('{"prompt": "b", "tests": {"input": "", "output": ""}}', "tests", "input", "list"),
    ('{"prompt": "b", "tests": ["f() == 1"]}', "tests", "f() == 1", "input"),
    ('{"prompt": "b", "tests": [{"input": 1, "output": "1"}]}', "tests", "1", "input"),
    ('{"prompt": "b", "tests": [{"input": "1"}]}', "tests", "1", "output"),
    ('{"prompt": " \\n"}', "prompt is empty", "write one"),
    ('{"prompt": null, "id": 3}', 'no "prompt" string', "['id', 'prompt']"),
    ("null", "None", '"prompt"'),
    ('{"prompt": "b\\ud800"}', "surrogate", r"b\\ud800"),
    ('{"prompt": "b", "x": ' + "[" * 10**5, "recursion", '"prompt": "b"'),
    ('{"prompt": "b"', "delimiter", '{"prompt": "b"', "a line of its own"),
    ("prompt: b", "Expecting value", "prompt: b", "a line of its own"),
    (b'{"prompt": "\xfcber"}', "utf-8", "0xfc", r"\xfcber"),
    ('{"prompt": "b"}'.encode("utf-16"), "utf-8", "0xff"),
]


@pytest.mark.parametrize("line, words", [(line, words) for line, *words in BAD])
def test_bad_data_is_named_in_one_line_when_it_is_loaded(tmp_path, line, words):
    path = tmp_path / "p.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"prompt": "a", "id": "a"}\n' + line)
    with pytest.raises(UserError) as error:
        load_problems(path)
    said = str(error.value)
    assert said.startswith(f"{path}, line 2: ") and "\n" not in said and len(said) < 400, said
    assert all(word in said for word in words), said


def test_what_is_no_file_of_problems_is_said(tmp_path):
    with pytest.raises(UserError, match="is no file; give a JSONL file"):
        load_problems(tmp_path)
    with pytest.raises(UserError, match="no such file.*math500"):
        load_problems(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="p.jsonl: no problems"):
        load_problems(write(tmp_path / "p.jsonl", "", " "))


def packed(tests, pack=json.dumps):
    return base64.b64encode(zlib.compress(pickle.dumps(pack(tests)))).decode()


def lcb(kind, *pairs):
    return [{"input": given, "output": wanted, "testtype": kind} for given, wanted in pairs]


def eurus(text, tests):
    turns = [dict(role="system", content="You are."), dict(role="user", content=text)]
    return dict(ability="code", prompt=turns, reward_model=dict(ground_truth=json.dumps(tests)))


STDIN = lcb("stdin", ("1 2\n", "3\n"), ("5 5\n", "10\n"))
CALLS = lcb("functional", ("[1, 2]\nnull", "3"), ("[]\ntrue", "0"))
LCB = dict(question_content="Sum them.", metadata='{"func_name": "total"}')
STEP = dict(step_background="Background: adding.", return_line="    return total")
ROWS = {  # name: (rows as the data set has them, contents invented; problems they become)
    "numina": (
        [dict(source="orca_math", problem="1+1?", solution="It is \\boxed{2}.", messages=[])],
        [dict(id="numina/0", prompt="1+1?", solution="It is \\boxed{2}.", answer="2")]),
    "math500": (
        [dict(problem="1+1?", solution="It is \\boxed{2}.", answer="2", level=1)],
        [dict(id="math500/0", prompt="1+1?", answer="2", level=1)]),
    "math-train": (
        [dict(problem="1+1?", level="Level 1", type="Algebra", solution="It is \\boxed{2}.")],
        [dict(id="math-train/0", prompt="1+1?", solution="It is \\boxed{2}.", answer="2")]),
    "gsm8k": (
        [dict(question="One and 1,233?", answer="It is <<1+1233=1234>>1,234\n#### 1,234")],
        [dict(id="gsm8k/0", prompt="One and 1,233?", answer="1,234")]),
    "gsm8k-train": (
        [dict(question="One and two?", answer="It is <<1+2=3>>3\n#### 3")],
        [dict(id="gsm8k-train/0", prompt="One and two?", answer="3")]),
    "svamp": (
        [dict(ID="chal-1", Body="Ann has 2.", Question="And now?", Answer="2.0",
              question_concat="Ann has 2.  And now?")],
        [dict(id="svamp/0", prompt="Ann has 2. And now?", answer="2.0")]),
    "asdiv": (
        [dict(body="Ann has 2 apples.", question="How many?", answer="2 (apples)"),
         dict(body="Ann has 2 apples, Bob 3.", question="Who has which?", answer="2; 3")],
        [dict(id="asdiv/0", prompt="Ann has 2 apples. How many?", answer="2")]),
    "amc": (
        [dict(id=0, problem="1+1?", answer=142.0), dict(id=1, problem="2?", answer=2.5)],
        [dict(id=0, prompt="1+1?", answer="142"), dict(prompt="2?", answer="2.5")]),
    "aime": (
        [dict(id=3, problem="1+1?", solution="\\boxed{002}", answer="2")],
        [dict(id=3, prompt="1+1?", answer="2")]),
    "minerva": (
        [dict(question="How bright is it?", answer="4.5e33")],
        [dict(id="minerva/0", prompt="How bright is it?", answer="4.5e33")]),
    "olympiad": (
        [dict(id=1606, question="How many?", solution=["Two."], final_answer=["2"], context=None),
         dict(id=1607, question="Which?", context="Let $x$ be.", solution=["These."],
              final_answer=["$(1,2)$, $(3, 4)$", "$\\frac{1}{2}$"])],
        [dict(id="olympiad/1606", prompt="How many?", answer="2"),
         dict(id="olympiad/1607", prompt="Let $x$ be.\n\nWhich?",
              answer="(1,2), (3, 4), \\frac{1}{2}")]),
    "ugphysics": (
        [dict(index=1, problem="How hot?", solution="So.", unit="\\text{K}", language="EN",
              answers="\\[\n\\boxed{4.88 \\times 10^{23}}\n\\]")],
        [dict(id="ugphysics/0", prompt="How hot?", answer="4.88 \\times 10^{23}",
              unit="\\text{K}", language="EN")]),
    "mmlu-stem": (
        [dict(question="Who?", subject="world_religions", choices=list("abcd"), answer=0),
         dict(question="What?", subject="college_physics", choices=list("rgbn"), answer=2)],
        [dict(answer="C", prompt="What?\n\nA) r\nB) g\nC) b\nD) n\n\n"
              "Answer with the letter of the right option.")]),
    "humaneval": (
        [dict(task_id="HumanEval/900", entry_point="add",
              prompt="def helper(x):\n    return x\n\n\ndef add(xs):\n    '''Sum.'''\n",
              test="def check(candidate):\n    assert candidate([1, 2]) == helper(3)\n")],
        [dict(id="HumanEval/900", entry_point="add", right="def add(xs):\n    return sum(xs)",
              wrong="def add(xs):\n    return 0", asks="this function:\n```python\ndef helper")]),
    "mbpp": (
        [dict(task_id=7, prompt="Write a function to double.", test_imports=["import math"],
              test_list=["assert twice(2) == 4", "assert twice(math.pi) > 6"])],
        [dict(id="mbpp/7", right="def twice(x): return 2 * x", wrong="def twice(x): return x",
              asks="assert twice(2) == 4\nassert")]),
    "mbpp-train": (
        [dict(task_id=602, prompt="Write a function to halve.", test_imports=[],
              test_list=["assert half(2) == 1"])],
        [dict(id="mbpp/602", right="def half(x): return x / 2", wrong="def half(x): return x",
              asks="to halve.")]),
    "leetcode": (
        [dict(task_id="weekly-1", prompt="class Solution:\n", prompt_sft="Sum. Please complete:",
              test="\nmy_solution = Solution()\ntest_input = { \"xs\": [1, 2] }\n"
              "assert my_solution.total(**test_input) == 3\n")],
        [dict(id="leetcode/weekly-1", asks="Please complete",
              wrong="class Solution:\n    def total(self, xs): return 2",
              right="class Solution:\n    def total(self, xs: List[int]):\n"
              "        return pow(sum(Counter(xs)), 1, 7)")]),  # not math's pow
    "livecodebench": (
        [LCB | dict(question_id="abc1", starter_code="", private_test_cases=packed(STDIN[1:]),
                    public_test_cases=json.dumps(STDIN[:1])),
         LCB | dict(question_id="lc2", private_test_cases=json.dumps(CALLS[1:]),
                    starter_code="class Solution:\n    def total(self, xs: List[int], y):\n    ",
                    public_test_cases=json.dumps(CALLS[:1]))],
        [dict(id="livecodebench/abc1", asks="stdin", tests=[
            {"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10\n"}]),
         dict(id="livecodebench/lc2",
              asks="```python\nclass Solution:\n    def total(self, xs: List[int], y):\n```",
              right="class Solution:\n    def total(self, xs: List[int], y): return sum(xs)",
              wrong="class Solution:\n    def total(self, xs, y): return 3")]),
    "scicode": (
        [dict(problem_description_main="Sum all.", required_dependencies="import math", sub_steps=[
            STEP | dict(step_number="90.1", step_description_prompt="Add two.",
                        function_header="def add(a, b):\n    # Adds",
                        test_cases=["assert add(1, 2) == target"]),
            STEP | dict(step_number="90.2", step_description_prompt="Add many.",
                        function_header="def total(xs):\n    # Adds all",
                        test_cases=["assert total([1]) == target",
                                    "x = [1, 2]\nassert total(x) == target"])])],
        [dict(id="scicode/90.1", after=[], setup="import math", targets=[3], main="scicode/90",
              right="def add(a, b): return a + b", wrong="def add(a, b): return a",
              asks="Complete this function:\n"
              "```python\ndef add(a, b):\n    # Adds\n\n    return total\n```"),
         dict(id="scicode/90.2", after=["scicode/90.1"], targets=[1, 3], right="total = sum",
              wrong="total = len", asks="The next step: Add many.")]),
    "eurus-code": (
        [dict(ability="math", prompt=[dict(role="user", content="1+1?")], reward_model={}),
         eurus("Echo.", dict(inputs=["1\n"], outputs=["1\n"])),
         eurus("Call.", dict(fn_name="f", inputs=[[1]], outputs=[[1]]))],
        [dict(id="eurus-code/0", prompt="Echo.", tests=[{"input": "1\n", "output": "1\n"}]),
         dict(id="eurus-code/1", prompt="Call.", tests=None, answer=None)]),
}


ROWS["scicode-background"] = ROWS["scicode"]


@pytest.mark.parametrize("name", problems.HUB)
def test_rows_of_each_benchmark_become_problems(name, monkeypatch):
    rows, expected = ROWS[name]
    asked, targets = [], []

    def load_dataset(*source, split):
        asked.append((*source, split))
        return rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    scicode = types.SimpleNamespace(process_hdf5_to_tuple=lambda step, count, data: targets[:count])
    monkeypatch.setitem(sys.modules, "scicode.parse.parse", scicode)
    loaded = load_problems(name)
    assert asked == [problems.HUB[name][:3]] and len(loaded) == len(expected)
    for problem, fields in zip(loaded, expected):
        known = dict(fields)
        targets[:] = known.pop("targets", [])
        right, wrong = known.pop("right", None), known.pop("wrong", None)
        assert known.pop("asks", "") in problem["prompt"]
        assert {key: problem.get(key) for key in known} == known
        assert ("answer" in problem) + ("tests" in problem) == (known.get("tests", 1) is not None)
        for code in filter(None, (right, wrong)):
            source = "\n".join((problem.get("setup", ""), code, problem["tests"]))
            with nullcontext() if code == right else pytest.raises(AssertionError):
                exec(source, {"__name__": "sandbox"})


def test_what_benchmarks_lack_is_said(monkeypatch, capsys):
    rows = [{"question": "1+1?", "final_answer": ["2"], "answer": None}]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    with pytest.raises(UserError, match="indval.*World Values Survey.*prompt"):
        load_problems("indval")
    with pytest.raises(UserError, match="olympiad, row 0.*'context'.*final_answer"):
        load_problems("olympiad")
    load_problems("minerva")
    assert "1 problems, not 272" in capsys.readouterr().err
    loaded = load_problems("someone/something")
    assert loaded[0]["prompt"] == "1+1?" and not capsys.readouterr().err


class Evil:
    def __init__(self, tests):
        pass

    def __reduce__(self):
        return print, ("the pickle has run",)


def test_a_pickle_is_read_and_never_run(capsys):
    old = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(STDIN), protocol=0))).decode()
    for text in packed(STDIN), old, json.dumps(STDIN):
        assert problems.private_tests(text) == STDIN
    with pytest.raises(ValueError, match="one pickled string"):
        problems.private_tests(packed(STDIN, Evil))
    assert not capsys.readouterr().out


# ---------------------------------------------------------------------------------- scores


def test_wilson_interval_and_auroc_against_brute_force():
    low, high = scores.accuracy_interval(0.4, 100)
    for edge in low, high:  # the share is 1.96 of its standard errors away
        sd = math.sqrt(edge * (1 - edge) / 100)
        assert abs(0.4 - edge) == pytest.approx(1.96 * sd, rel=1e-6)
    assert scores.accuracy_interval(0.0, 9)[0] == pytest.approx(0.0, abs=1e-9)
    wrong, right = [0.1, 0.4, 0.3], [0.4, 0.8, 0.4]
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(right, wrong)]
    assert scores.auroc(wrong + right, [0, 0, 0, 1, 1, 1]) == pytest.approx(np.mean(pairs))
    assert math.isnan(scores.auroc([1.0], [1]))


def test_pass_at_k_is_the_share_of_subsets_with_a_right_response():
    for n, c in [(5, 0), (5, 1), (5, 3), (5, 5), (7, 2)]:
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            share = sum(map(any, subsets)) / len(subsets)
            assert scores.pass_at_k(n, c, k) == pytest.approx(share)


def test_the_surest_of_k_is_that_of_all_subsets():
    rng = np.random.default_rng(0)
    sure, right = rng.random(7), rng.random(7) < 0.5
    for k in range(1, 8):
        subsets = itertools.combinations(range(7), k)
        surest = [max(subset, key=lambda i: sure[i]) for subset in subsets]
        assert scores.surest_of_k(sure, right, k) == pytest.approx(np.mean(right[surest]))


def test_calibration_error_of_a_case_worked_by_hand():
    """Bin (0.9, 1]: 0.95 sure, 2 of 3 right; bin (0.5, 0.6]: 0.55 sure, 1 of 1 right. An edge
    belongs to the bin below it."""
    ece, rows = scores.calibration([0.92, 0.95, 0.98, 0.55], [1, 0, 1, 1])
    assert ece == pytest.approx(0.75 * (0.95 - 2 / 3) + 0.25 * 0.45)
    assert [count for *_, count in rows] == [1, 3]
    _, rows = scores.calibration([1.0, 0.9, 0.1, 1e-9], [1, 1, 0, 0])
    assert [count for *_, count in rows] == [2, 1, 1]


def test_paired_interval_covers_the_true_difference_at_its_rate():
    """Two models, right on the same easy problems, the second a little better: an interval
    that ignored the pairs would cover 99 %."""
    rng = np.random.default_rng(0)
    assert scores.paired_interval([0], [1]) == (1, -math.inf, math.inf)
    covered, width = 0, 0.0
    for _ in range(1000):
        p = rng.beta(0.3, 0.3, size=300)
        q = np.clip(p + 0.05, 0, 1)
        _, low, high = scores.paired_interval(rng.random(300) < p, rng.random(300) < q)
        covered += low <= q.mean() - p.mean() <= high
        width += (high - low) / 1000
    assert 0.93 < covered / 1000 < 0.97
    assert width < 0.75 * 2 * 1.96 * math.sqrt(2 * 0.25 / 300)


def test_drift_is_what_a_small_tilt_towards_confidence_does_to_accuracy():
    """Against exact distributions over 6 answers to each of 50 problems, tilted until the KL
    is 1e-4 nats on average."""
    rng = np.random.default_rng(0)
    p, sure = rng.dirichlet(np.ones(6), size=50), rng.normal(size=(50, 6))
    right = rng.random((50, 6)) < 0.4
    low, high = 0.0, 1.0
    for _ in range(60):
        eta = (low + high) / 2
        q = p * np.exp(eta * sure)
        q /= q.sum(1, keepdims=True)
        if (q * np.log(q / p)).sum(1).mean() < 1e-4:
            low = eta
        else:
            high = eta
    exact = ((q - p) * right).sum(1).mean()
    drawn = np.array([rng.choice(6, size=20_000, p=row) for row in p])
    confidences, correct = (np.take_along_axis(x, drawn, 1) for x in (sure, right))
    change, below, above = scores.drift(confidences, correct, kl=1e-4)
    assert change == pytest.approx(exact, rel=0.05, abs=1e-5) and below < change < above
    # by hand: covariances 1/2 and 0, variances 1/2 and 0, so eta = 2; dividing by n would bias
    # what few responses say
    by_hand = scores.drift([[0, 1], [2, 2]], [[False, True], [False, True]], kl=0.5)
    assert by_hand[0] == pytest.approx(0.5)


def samples(entropies, right, n=4, problems=60, **more):
    """n responses to each problem: entropies(problem, i) nats; right(problem, i)."""
    rows = []
    for p, i in itertools.product(range(problems), range(n)):
        nats = entropies(p, i)
        row = dict(id=f"p/{p}", decoder="sample", seed=1, response=rf"\boxed{{{i}}}", length=4)
        row |= dict(correct=bool(right(p, i)), answered=True, truncated=False, entropy=nats)
        rows.append(row | dict(logprob=-nats, flops=1.0, seconds=0.1, answer="0") | more)
    return rows


GREEDY = samples(lambda p, i: 0.2, lambda p, i: True, n=1)


def rising(p, i):
    return 0.1 + 0.2 * i + 1e-4 * p


@pytest.mark.parametrize("right, verdict, words", [
    (lambda p, i: i < 2, "likely helps", "likely helps: surer answers are better"),
    (lambda p, i: i > 1, "harms", "harms: surer answers are worse"),
    (lambda p, i: i == p % 4, "too close to call", "too close to call with 60 problems"),
    (lambda p, i: i < 2 and p < 2, "too close to call", "too close"),  # two do not tell
    (lambda p, i: True, "too close to call", "| +0.0 | +0.0 to +0.0 | 100.0%, 100.0%, 100.0% |"),
])
def test_diagnosis_follows_the_confidence_within_a_problem(right, verdict, words):
    sampled = samples(rising, right)
    found = scores.diagnosis(GREEDY, sampled)
    assert found["rewards"]["token"]["verdict"] == verdict
    text = scores.diagnose(GREEDY, sampled)
    assert text.count(words) == 2 and "Not for long" not in text
    if verdict == "likely helps":
        surest = {1: 0.5, 2: pytest.approx(5 / 6), 4: 1.0}
        assert found["rewards"]["sequence"]["surest"] == surest
        assert (found["greedy"], found["sampled"], found["passed"]) == (1, 0.5, 1)
        assert (found["distinct"], found["majority"], found["n"]) == (4, 1, 4)


def test_diagnosis_sees_that_a_gain_will_not_last():
    """The second is right and a little surer than the last two, but the first is the surest by
    far: the surest of 2 is right more often than one response, the surest of 4 never is."""
    sampled = samples(lambda p, i: [0.1, 0.12, 0.9, 0.9][i], lambda p, i: i == 1)
    text = scores.diagnose(GREEDY, sampled)
    assert text.count("Not for long: the surest of 4 is right less often than that of 2") == 2


def test_a_summary_counts_problems_seeds_and_responses():
    """Guards: n of one problem taken for all, means over the wrong rows, sd of responses."""
    first = samples(lambda p, i: 1.0, lambda p, i: i < p, n=3, problems=4)
    second = samples(lambda p, i: 2.0, lambda p, i: False, n=3, problems=4, seed=2, length=12)
    found = scores.summary(first + second[:-1])  # a killed evaluation lacks the last response
    assert [found[key] for key in ("problems", "seeds", "n")] == [4, 2, 2]
    assert found["accuracy"] == pytest.approx(6 / 23)
    assert found["sd"] == pytest.approx(0.5 / math.sqrt(2))
    assert found["pass"] == {2: pytest.approx((0 + 2 / 3 + 1 + 1) / 8)}
    assert found["entropy"] == pytest.approx((12 * 4 + 11 * 12 * 2) / (12 * 4 + 11 * 12))
    assert found["auroc"] == pytest.approx((11 + 6 / 2) / 17)  # 6 right, 6 + 11 wrong
    assert found["tokens"] == (12 * 4 + 11 * 12) / 2 and found["flops"] == 11.5
    assert scores.summary(first)["sd"] is None
    assert json.loads(json.dumps(found))["low"] < 6 / 23  # results.json
    row = scores.table({"a": first}).split("\n")[2]
    assert row.startswith("| a | 50.0% | 15.0% to 85.0% | 2: 66.7%, 3: 75.0% | 100.0% | 0.0% | 1.0")


def test_evaluations_are_compared_over_the_problems_of_both():
    a, b = GREEDY, samples(lambda p, i: 0.2, lambda p, i: p % 2, problems=50)
    table = scores.compare({"x": a, "y": a}, {"x": b, "z": b})
    assert "| x | 50 | 100.0% | 50.0% | -50.0% | -64.0% to -36.0% |" in table
    assert "y" not in table
    others = [sample | {"id": "other"} for sample in b]
    for second in {"z": b}, {"x": others}:
        with pytest.raises(UserError, match="--compare.*A has x.*B has"):
            scores.compare({"x": a}, second)
