"""Answers: found behind the thoughts of a response, compared, voted on, graded."""
import time

import pytest

from tasks import answers
from tasks.answers import after_thoughts, find_answer, is_correct, last_box, votes
from tasks.errors import UserError
from tests.models import NEEDS_POSIX

BOXES = [(r"so \boxed{4}.", "4"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), ("4", None), ("", None),
    (r"\boxed{1} no, \boxed{2}", "2"), (r"\boxed{3} or \boxed{4", None), (r"\boxed{}", ""),
    (r"\boxed{\text{a {b} c}} d", r"\text{a {b} c}"), (r"\boxed 4", None), (r"\boxed {4}", "4"),
    (r"\fbox{4}", "4"), (r"\boxed{3}, \fbox{4", None), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\left\{1\right.} }", r"\left\{1\right."), (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{5}}}", "5"), ("\\boxed{\n5\n}", "\n5\n"), (r"\boxed{5\\}", r"5\\"), (r"\boxed", None),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("\\boxed{" * 10_000, None)]


@pytest.mark.parametrize("text, box", BOXES)
def test_last_box(text, box):
    assert last_box(text) == box


@pytest.mark.parametrize("text, answer", [
    ("4", "4"), ("<think>5</think>4", "4"), ("5</think>4", "4"),  # opened in the prompt
    ("<think>5", ""), ("<think>5</think>4<think>6", ""), ("<think>a <think> b</think>4", "4"),
    ("<think>5</think>6<think>7</think>4", "4"), ("<thinking>5</thinking>4", "4"),
    ("<seed:think>5</seed:think>4", "4"), ("<thought>5</thought>4", "4"), ("[THINK]5", ""),
    ("[THINK]5[/THINK]4", "4"), ("◁think▷5◁/think▷4", "4"), ("<|begin_of_thought|>5", ""),
    ("<|begin_of_thought|>5<|end_of_thought|>4", "4"), ("<|channel>thought\n5<channel|>4", "4"),
    ("<|channel|>analysis<|message|>5<|end|><|channel|>final<|message|>4", "4"),
    ("analysisWe try 5.assistantfinal4", "4"), ("analysisWe", ""), ("analysis: 4",) * 2,
    ("I think 4 < 5",) * 2, ("", ""),
])
def test_an_answer_stands_behind_the_last_closed_thought(text, answer):
    assert after_thoughts(text) == answer


def test_a_draft_in_the_thoughts_is_no_answer():
    """A box or a program in a thought that was cut counted as the answer, and so did one in the
    thoughts where the text behind them has none."""
    draft = r"<think>maybe \boxed{4}, "
    for cut in draft, draft + "so</think>It is four.":
        assert last_box(cut) is None and not is_correct(cut, {"answer": "4"})
        assert votes([cut, r"\boxed{4}"]) == [0, 1]
    assert votes([draft + r"</think>\boxed{5}", r"\boxed{5}"]) == [2, 2]
    program, problem = fenced("f = abs"), {"id": "f", "tests": "assert f(-2) == 2"}
    assert find_answer(f"<think>{program}", problem) is None
    assert find_answer(f"<think>{fenced('f = 1')}</think>{program}", problem) == "f = abs"
    assert answers.most_agreed(["<think>a", "<think>b", "</think>c", "</think>cd"]) == 2


@pytest.mark.parametrize("response, answer, right", [
    (r"\boxed{016}", "16", True), (r"\boxed{16}", 16, True), ("4", "4", False),
    (r"\boxed{4} and then \boxed{5", "4", False), (r"\boxed{5} and \boxed{4}", "4", True),
    (r"\boxed{4} and \boxed{5}", "4", False), (r"\boxed{}", "", False),
    (r"\boxed{5}", ["4", "5"], True), (r"\boxed{6}", ["4", "5"], False), ("5", ["5"], False),
])
def test_only_the_last_box_is_correct_or_not(response, answer, right):
    assert is_correct(response, {"answer": answer}) is right


def test_votes_and_the_response_that_self_consistency_keeps():
    texts = [r"\boxed{1}", "none", r"\boxed{0.5}", r"\boxed{\frac12}", r"\boxed{1/2} or \boxed{1"]
    assert votes(texts) == [1, 0, 2, 2, 0]
    assert answers.most_agreed(texts) == 2
    assert answers.most_agreed(["a", "ab", "abc"]) == 1  # without answers by distance


def test_different_symbolic_answers_vote_at_once():
    """Each pair was simplified: 16 answers took a minute, 64 five."""
    started = time.time()
    for form in (
        r"\frac{x^3+%(k)dx+1}{x^2-%(k)d}", r"(x+%(k)d)^3\sin %(k)dx", "y^2+%(k)dx=x^3", "x>%(k)d",
        r"\binom{n+%(k)d}{%(k)d}", r"x=%(k)d, y=%(k)d", r"n \text{ of kind } %(k)d",
    ):
        boxes = [r"\boxed{%s}" % (form % {"k": k}) for k in range(1, 17)]
        assert votes(boxes + boxes[:2]) == [2, 2] + [1] * 14 + [2, 2], form
    assert time.time() - started < 10  # in fact 0.5 s


def fenced(code):
    return f"Sure:\n```python\n{code}\n```"


@NEEDS_POSIX
def test_programs_are_graded_with_their_setup():
    asked = [
        {"id": "f", "tests": "assert f(2) == 4"},
        {"id": "m", "answer": "2"},
        {"id": "io", "tests": [{"input": "2", "output": "4"}], "setup": "import sys"},
        {"id": "b", "tests": "assert b() == 2", "setup": "def a(): return 1"},
    ]
    responses = [
        fenced("def f(x): return 2 * x"), r"\boxed{2}",
        fenced("print(2 * int(sys.stdin.read()))"), fenced("def b(): return 1 + a()"),
    ]
    assert answers.grade(asked, responses, allow_code=True) == [True] * 4
    assert answers.grade(asked, responses[1:] + responses[:1], allow_code=True) == [False] * 4
    with pytest.raises(UserError, match="--allow-code-execution"):
        answers.grade(asked, responses)
