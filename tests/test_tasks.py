"""Problems and grading, and the statistics of graded samples."""
import base64
import itertools
import json
import math
import pickle
import re
import sys
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest

import tests.models  # noqa: F401, first: no network
from tasks import answers, problems, scores
from tasks.answers import is_correct, last_box, same_answer, votes
from tasks.errors import UserError
from tasks.problems import load_problems

# --------------------------------------------------------------------------------- answers

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


ANSWERS = r"""
# fractions
\dfrac{1}{2} == \frac{1}{2} ; \tfrac12 == 0.5 ; 1/2 == \frac{1}{2} ; -\frac{3}{4} == \frac{-3}{4}
\frac{3}{-4} == -\frac34 ; \frac{6}{8} == \frac34 ; \frac{\pi}{4} == \pi/4
\frac{1}{2}x == \frac{x}{2} ; \cfrac{3}{5} == 0.6 ; 12/4 == 3 ; \frac12 != 1/3 ; 3/4 != -3/4
# mixed numbers
1\frac{1}{2} == \frac32 ; 2 \frac{3}{4} == 2.75 ; 1 1/2 == 3/2 ; -1\frac{1}{2} == -1.5
1\frac12 != 0.5 ; 1\frac{1}{2} != 11/2
# percent
50\% == 50 ; 50\% == 0.5 ; 12.5% == 12.5\% ; 50 \text{ percent} == 50\% ; 150\% == 1.5 ; 5\% != 50
# units
5\text{ cm} == 5 ; 5\,\mathrm{cm} == 5 ; 12 \text{ square units} == 12 ; 5 \text{ cm}^2 == 5
5 cm == 5 ; 5 m == 5 ; 10 hours == 10 ; 3\text{ m/s} == 3 ; 12\mbox{ inches}^2 == 12
9.8\,\text{m}\,\text{s}^{-2} == 9.8 ; 3 \mathrm{~cm} == 3 ; 2\sqrt{3}\text{ cm} == 2\sqrt3
5 cm != 6 cm ; 20\text{ minutes} != 25\text{ minutes}
# currency
\$10 == 10 ; \$1{,}234.50 == 1234.5 ; $5 == 5 ; 10\text{ dollars} == \$10 ; €7 == 7
\$18.90 == 18.9 ; \$0.75 != \$7.50
# thousands
10,000 == 10000 ; 10{,}000 == 10000 ; 10\,000 == 10000 ; 10,\!000 == 10000 ; 10 000 == 10000
1{,}000{,}000 == 1000000 ; 1,234.5 == 1234.5 ; -1,000 == -1000 ; 1,000,000 == 10^6 ; 10,000 != 10
1,2 != 12 ; 3,4,5 != 345 ; 12,5 != 125 ; 1.000 != 1000
# intervals
[1,2] == \left[1,2\right] ; (-\infty, 1) \cup (2, \infty) == (2,\infty)\cup(-\infty,1)
x \in [-2,7] == [-2,7] ; -2 \le x \le 7 == [-2,7] ; x > 3 == (3,\infty) ; 3 < x == x > 3
\left( -\infty, \frac{1}{2} \right] == (-\infty, 0.5] ; \mathbb{R} == (-\infty,\infty)
x \neq 2 == (-\infty,2)\cup(2,\infty) ; \infty == +\infty ; (1,2) != (1,2] ; [-2,7) != [-2,7]
x \ge 3 != x > 3 ; [0,1] \cup [2,3] != [0,3] ; -\infty != \infty ; \infty != 1000
# sets
\{1,2,3\} == \{3,1,2\} ; 1,2,3 == 3,2,1 ; 1, 2 == \{1, 2\} ; 1 \text{ and } 2 == 1,2
x=1, x=2 == 1,2 ; x = 1 \text{ or } x = 2 == 1,2 ; \{\frac12, 3\} == \{3, 0.5\}
-1,\sqrt{2} == \sqrt2,-1 ; 1, 2, 3 == 1,2,\text{ and }3 ; a=1,b=2 == b=2,a=1 ; x\in\{1,2\} == 1,2
(1,2),(3,4) == (3,4),(1,2) ; \{1,2\} != \{1,2,3\} ; 1,2 != 1,3 ; 1 != 1,2 ; a=1,b=2 != a=2,b=1
# tuples
(1,2) == \left(1, 2\right) ; (\frac12, 2) == (0.5, 2) ; (x,y)=(1,2) == (1,2)
\langle 1,2 \rangle == (1,2) ; x=2,y=3 == (2,3) ; (1,2) != (2,1) ; (1,2,3) != (1,3,2)
(1,-2) != (1,2) ; (2,1,2) != (1,2,2) ; (1,2,3) != (1,2) ; (1,2),(3,4) != (2,1),(4,3)
# matrices
\begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{bmatrix}1&2\\3&4\end{bmatrix}
\begin{pmatrix}\frac12\\0\end{pmatrix} == \begin{pmatrix}0.5\\0\end{pmatrix}
\left(\begin{array}{cc}1&2\\3&4\end{array}\right) == \begin{pmatrix}1&2\\3&4\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} != \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1&2\\3&4\end{pmatrix} != \begin{pmatrix}1&3\\2&4\end{pmatrix}
# integers
016 == 16 ; 16.0 == 16 ; +5 == 5 ; -0 == 0 ; 104. == 104 ; \textbf{033} == 33
\textbf{(023) } == 23 ; 5! == 120 ; {5} == 5 ; 0160 != 16 ; 16 != 61 ; 6 != 16 ; -13.6 != 13.6
# scientific notation
1.5 \times 10^{3} == 1500 ; 1.5\cdot 10^3 == 1500 ; 1.5e3 == 1500 ; 4.5e33 == 4.5\times 10^{33}
2.5 \times 10^{-3} == 0.0025 ; 1e-3 == 10^{-3} ; 6.02E23 == 6.02\times 10^{23}
5.7 * 10^{25} == 5.7e25 ; 1.6\times10^{-19} == 1.60e-19 ; 3 x 10^8 == 300000000
5.6 \times 10^{-4} \text{ m} == 0.00056 ; 0.00034 == 3.4e-4 ; -7.5e5 == -750000 ; 2e == e+e
10^{20} == 100000000000000000000 ; 4.5e33 != 4.5 \times 10^{32} ; 6.02E23 != 6.03e23
1.6\times10^{-19} != 9.1\times10^{-31} ; 1.6\times10^{-19} != 0 ; 4.0e-7 != 5.0e-7
0.0000001 != 0.0000002 ; 3.3e-5 != 3.4e-5 ; 5e3 != 5e
# texts
\text{Evelyn} == Evelyn ; \text{evelyn} == Evelyn ; \text{Yes} == yes ; \text{ Monday } == Monday
\text{the second player} == \text{The second player} ; \text{even} != \text{odd} ; Yes != No
\text{June 20} != \text{May 20} ; \text{Carla} != \text{Evelyn}
# choices
(B) == B ; \text{B} == B ; B) 12 == B ; \text{(B)} == B ; B. == B ; \textbf{(B)} == B ; B: 12 == B
\textbf{(B) }12 == B ; B. Mitochondria == B ; (\text{B}) == B ; \text{(C)}\ 12 == C
\textbf{(A)}\ 13 == 13 ; (A) 3 == (A) ; B != C ; (B) != (C) ; \mathrm{B} != C ; A) 12 != B
A) 12 != B) 12 ; (A) and (B) != A ; Brazil != B ; B+1 != B ; AB != A ; C_1 != C ; D(2) != D
B or C != B ; \text{A, C} != A
# equations
x = 5 == 5 ; y = 2x+1 == 2x+1 ; y=2x+1 == y = 1 + 2x ; 2x + 1 = y == y = 2x+1 ; f(x) = x^2 == x^2
\angle A = 60^\circ == 60 ; n = 3k+1 == 3k+1 ; x^2+y^2=1 == y^2+x^2-1=0
\nu = \frac{2eV}{h} == \frac{2eV}{h} ; y = -2x + 3 == 2x + y = 3 ; x=5 != y=5 ; x=5 != 6
# plus or minus
\pm 2 == 2, -2 ; 1 \pm \sqrt{2} == 1+\sqrt2, 1-\sqrt2 ; x = \pm 2 == \pm2 ; ±2 == \pm 2
\pm 2 == \{-2,2\} ; \pm 2 != 2 ; \pm 2 != \pm 3
# degrees
90^\circ == 90 ; 90^{\circ} == 90^\circ ; 90° == 90 ; 90 degrees == 90 ; 90^\circ != 45^\circ
# decimals
0.333333 == \frac13 ; 1.414214 == \sqrt{2} ; .5 == 0.5 ; 1.50 == 1.5 ; 0.3333333333 == 1/3
3.141593 == \pi ; 113.097336 == 36\pi ; 0.33 != 1/3 ; 0.1667 != 1/6 ; 3.14 != \pi ; 1.41 != \sqrt{2}
0.999 != 1 ; 113.1 != 36\pi
# roots
\sqrt{8} == 2\sqrt{2} ; \frac{1}{\sqrt2} == \frac{\sqrt{2}}{2}
\sqrt{2}+\sqrt{3} == \sqrt{5+2\sqrt{6}} ; \sqrt[3]{8} == 2 ; √12 == 2\sqrt{3} ; \sqrt{3} != \sqrt{2}
2\sqrt3 != 3\sqrt2
# expressions
(x+1)^2 == x^2+2x+1 ; (2x+3)(x-1) == 2x^2+x-3 ; p - q == -(q-p) ; \ln 4 == 2\ln 2 ; \log_2 8 == 3
\binom{5}{2} == 10 ; 3+4i == 4i+3 ; 2^{10} == 1024 ; 1010_2 == 1010_{2} ; 2π == 2\pi ; x·y == xy
x² == x^2 ; \tan^{-1} 2 == \arctan 2 ; v_0 t + \frac{1}{2} a t^2 == \frac{at^2}{2}+v_0t
\frac{1}{2 n+2} == \frac{1}{2(n+1)} ; \arcsin(1.3 \sin \theta) == \arcsin{1.3 \sin{\theta}}
x^2+1 != x^2-1 ; a^2+b^2 != (a+b)^2 ; -x^2 != (-x)^2 ; |x| != x ; i != -i ; 1+2i != 1-2i
1010_2 != 1011_2 ; 3:4 != 4:3 ; 36\pi != 36 ; \frac{a}{b} != \frac{b}{a} ; 2n != n ; 5t != 5
\frac{g}{2} t != \frac{g}{2}
# typeset, empty, long
−5 == -5 ; –5 == -5 ; 2−3i == 2-3i ; −5 != 5 ; \text{} != 0 ; \, != 0 ; }{ != 1 ; \ != 1
\frac{1}{0} != 0 ; \frac{1}{0} != \frac{2}{0} ; 12345678901234567890 != 12345678901234567891
"""
MISJUDGED = r"""
# units are dropped, right and wrong ones
5\text{ cm} != 5\text{ m} ; 1\text{ pm} != 1\text{ am}
# the right side counts, since responses write 2 + 3 = 5
2x+1=5 != 5 ; x+y=3 != 3
# i alone is read as a real variable
e^{i\pi} == -1 ; \sqrt{-4} == 2i
# inequalities are not united
x \le -1 \text{ or } x \ge 2 == (-\infty,-1]\cup[2,\infty)
# rare beside LaTeX
½ == 0.5
# no English
\text{all real numbers} == \mathbb{R} ; 5, \text{ where } x>0 == 5
# K is a variable, and a unit in \text or \mathrm only
281 K == 281
# a comma is never the point
0,5 == 0.5
# math-verify's symbols have no case
c != C
# h may be negative
\sqrt{\frac{E}{h^2}} == \frac{\sqrt{E}}{h}
# periods are not read, nor is E_0
0.\overline{3} == 1/3 ; E_0 e^{-t} == E_0 \exp(-t)
"""


def read(table):
    """{heading: its cases, each [answer, == or !=, answer]}"""
    groups = {}
    for line in table.strip().split("\n"):
        if line.startswith("# "):
            cases = groups.setdefault(line[2:], [])
        else:
            cases += [re.split(" (==|!=) ", case) for case in line.split(" ; ")]
    return groups


CASES = read(ANSWERS)
CASES["typeset, empty, long"] += [
    ("1" * 3000, "==", "1" * 3000), ("+".join("x" * 50), "==", "50x"), ("", "!=", ""),
    ("", "!=", "0"), (" ", "!=", "0"), ("\0", "!=", "1"), ("1" * 3000, "!=", "1" * 2999 + "2"),
    (str(10**60), "!=", str(10**60 + 1)), ("{" * 1000, "!=", "1"), ("x" * 20_000, "!=", "1"),
]
PARAMETERS = []
for groups in CASES, read(MISJUDGED):
    for heading, cases in groups.items():
        marks = () if groups is CASES else pytest.mark.xfail(reason=heading, strict=True)
        for box, sign, answer in cases:
            name = f"{heading}: {box:.30} {sign} {answer:.30}"
            PARAMETERS.append(pytest.param(box, sign, answer, marks=marks, id=name))


@pytest.mark.parametrize("box, sign, answer", PARAMETERS)
def test_answers_that_mean_the_same_are_the_same(box, sign, answer):
    assert same_answer(box, answer) is (sign == "==")


def test_the_order_of_two_answers_does_not_matter():
    for kind in "intervals", "sets", "equations":
        for box, sign, answer in CASES[kind] + [("2x+1=5", "==", "5")]:
            assert same_answer(answer, box) is (sign == "=="), (answer, box)


@pytest.mark.parametrize("response, answer, right", [
    (r"\boxed{016}", "16", True), (r"\boxed{16}", 16, True), ("4", "4", False),
    (r"\boxed{4} and then \boxed{5", "4", False), (r"\boxed{5} and \boxed{4}", "4", True),
    (r"\boxed{4} and \boxed{5}", "4", False), (r"\boxed{}", "", False),
    (r"\boxed{5}", ["4", "5"], True), (r"\boxed{6}", ["4", "5"], False), ("5", ["5"], False),
])
def test_only_the_last_box_is_correct_or_not(response, answer, right):
    assert is_correct(response, {"answer": answer}) is right


def test_answers_that_sympy_would_never_be_done_with_are_given_up(monkeypatch):
    monkeypatch.setattr(answers, "parse", partial(answers.parse, parsing_timeout=1))
    assert not same_answer("9^{9^{9^9}}", "1")
    assert not same_answer(r"\frac{" * 80 + "1" + "}{2}" * 80, "1")  # too deep for the parser
    monkeypatch.delattr(answers, "parse")  # too long to be parsed
    assert not same_answer("y" * 20_000, "1") and same_answer("7" * 2000, "7" * 2000)


def test_in_a_thread_grading_fails_instead_of_finding_all_answers_wrong():
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="thread"):
        pool.submit(same_answer, "0.123", r"\frac{123}{1000}").result()


def test_votes_and_the_response_that_self_consistency_keeps():
    texts = [r"\boxed{1}", "none", r"\boxed{0.5}", r"\boxed{\frac12}", r"\boxed{1/2} or \boxed{1"]
    assert votes(texts) == [1, 0, 2, 2, 0]
    assert answers.most_agreed(texts) == 2
    assert answers.most_agreed(["a", "ab", "abc"]) == 1  # without answers by distance


def fenced(code):
    return f"Sure:\n```python\n{code}\n```"


def test_programs_are_graded_with_their_setup_and_the_programs_that_they_come_after():
    asked = [
        {"id": "f", "tests": "assert f(2) == 4"},
        {"id": "m", "answer": "2"},
        {"id": "io", "tests": [{"input": "2", "output": "4"}], "setup": "import sys"},
        {"id": "s1", "tests": "assert a() == 1"},
        {"id": "s2", "tests": "assert b() == 2", "after": ["s1"]},
    ]
    responses = [
        fenced("def f(x): return 2 * x"), r"\boxed{2}",
        fenced("print(2 * int(sys.stdin.read()))"),
        fenced("def a(): return 1"), fenced("def b(): return 1 + a()"),
    ]
    assert answers.grade(asked, responses, allow_code=True) == [True] * 5
    assert answers.grade(asked, responses[1:] + responses[:1], allow_code=True) == [False] * 5
    with pytest.raises(UserError, match="--allow-code-execution"):
        answers.grade(asked, responses)


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
    with pytest.raises(UserError, match="is a directory; give a JSONL file"):
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
        [dict(id="scicode/90.1", after=[], setup="import math", targets=[3],
              right="def add(a, b): return a + b", wrong="def add(a, b): return a",
              asks="Background: adding.\n\nComplete this function:\n"
              "```python\ndef add(a, b):\n    # Adds\n    return total\n```"),
         dict(id="scicode/90.2", after=["scicode/90.1"], targets=[1, 3], right="total = sum",
              wrong="total = len", asks="already:\n```python\ndef add(a, b):\n    # Adds\n```\n\n"
              "The next step: Add many.")]),
    "eurus-code": (
        [dict(ability="math", prompt=[dict(role="user", content="1+1?")], reward_model={}),
         eurus("Echo.", dict(inputs=["1\n"], outputs=["1\n"])),
         eurus("Call.", dict(fn_name="f", inputs=[[1]], outputs=[[1]]))],
        [dict(id="eurus-code/0", prompt="Echo.", tests=[{"input": "1\n", "output": "1\n"}]),
         dict(id="eurus-code/1", prompt="Call.", tests=None, answer=None)]),
}


@pytest.mark.parametrize("name", problems.HUB)
def test_rows_of_each_benchmark_become_problems(name, monkeypatch):
    rows, expected = ROWS[name]
    asked, targets = [], []

    def load_dataset(*source, split):
        asked.append((*source, split))
        return rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    scicode = types.SimpleNamespace(process_hdf5_to_tuple=lambda step, count: targets[:count])
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
