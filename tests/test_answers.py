"""Answers: found behind the thoughts of a response, compared, voted on, graded."""
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

import tests.models  # noqa: F401, first: no network
from tasks import answers, clock
from tasks.answers import after_thoughts, find_answer, is_correct, last_box, same_answer, votes
from tasks.errors import UserError

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
    monkeypatch.setattr(answers, "LONGEST", 1)
    assert not same_answer("9^{9^{9^9}}", "1")
    assert not same_answer(r"\frac{" * 80 + "1" + "}{2}" * 80, "1")  # too deep for the parser
    monkeypatch.delattr(answers, "parse")  # too long to be parsed
    assert not same_answer("y" * 20_000, "1") and same_answer("7" * 2000, "7" * 2000)


def test_without_alarms_answers_are_compared_all_the_same(monkeypatch):
    """Windows has no SIGALRM, and a thread can't use it: math-verify then finds all wrong."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(same_answer, "0.123", r"\frac{123}{1000}").result()
    monkeypatch.delattr(signal, "SIGALRM")
    monkeypatch.setattr(answers, "LONGEST", 1)
    assert same_answer("0.124", r"\frac{124}{1000}") and not same_answer("0.124", "1/3")
    assert not same_answer("8^{8^{8^8}}", "1")  # in a process that is killed
    assert same_answer("0.125", "1/8")  # in the next one
    with pytest.raises(RuntimeError, match="TypeError"):
        clock.within(1, answers.equal)


def test_votes_and_the_response_that_self_consistency_keeps():
    texts = [r"\boxed{1}", "none", r"\boxed{0.5}", r"\boxed{\frac12}", r"\boxed{1/2} or \boxed{1"]
    assert votes(texts) == [1, 0, 2, 2, 0]
    assert answers.most_agreed(texts) == 2
    assert answers.most_agreed(["a", "ab", "abc"]) == 1  # without answers by distance


def fenced(code):
    return f"Sure:\n```python\n{code}\n```"


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
