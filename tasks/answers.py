r"""
Answers: find the one in a response, compare it with the problem's own, and grade it.

    last_box(r"so it is \boxed{\frac12}")  # \frac12
    same_answer(r"\frac12", "0.5")         # True, by math-verify
"""
import functools
import logging
import re

from math_verify import parse, verify
from rapidfuzz.distance import Levenshtein

from tasks import sandbox
from tasks.clock import within
from tasks.errors import UserError

logging.getLogger("math_verify").setLevel("ERROR")  # it warns that its own clock is off
NOT_ALLOWED = (
    "its answers are programs, and grading runs them: --allow-code-execution "
    "(see tasks/sandbox.py for what that means)"
)
REPAIRS = [  # what math-verify would misread: (pattern, replacement)
    (r"[\u2212\u2013]", "-"),
    ("°", r"^\\circ"),
    ("·", r"\\cdot "),
    ("²", "^2"),
    ("³", "^3"),
    (r"√(\d+)", r"\\sqrt{\1}"),
    ("[€£¥]", ""),
    (r"\\langle", "("),
    (r"\\rangle", ")"),
    (r"\\(?:text|math)bf\{([^{}]*)\}", r"\1"),
    (r"(?<=\d)[eE]([+-]?\d+)", r"\\times 10^{\1}"),  # 4.5e33: its e is not Euler's number
    (r"(?<=\d) ?[x×] ?(?=10\^)", r"\\times "),
    (r"^\s*(-?\d+) +(\d+)/(\d+)\s*$", r"\1\\frac{\2}{\3}"),  # 1 1/2
    (r"(?<=\d)(?:\\[,! ]|[ ~])+(?=\d{3}(?!\d))", ""),  # 10\,000
    (r"\.\s*$", ""),
    # a last letter is a variable, as in 5t, and a unit in 5 m only
    (r"^(?!\s*-?[\d.,]+ )(.*[\d}\s])([cdghlmost])\s*$", r"\1{\2}"),
]
LETTER = r"(?:\\text|\\mathrm)?[{(\s]*([A-J])[})\s]*"  # B, (B) or \text{B}
CHOICE = LETTER + r"(?:[).:}](?!.*\([A-J]\))(.*\S.*))?"  # and perhaps more: B) 12
THOUGHTS = [  # (opening, closing): the marks of a model's thoughts
    (r"<(?:\w+:)?think(?:ing)?>", r"</(?:\w+:)?think(?:ing)?>"),  # most models
    ("<thought>", "</thought>"),  # EXAONE
    (r"\[THINK\]", r"\[/THINK\]"),  # Mistral
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Cohere
    ("◁think▷", "◁/think▷"),  # Kimi
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # OpenThinker
    (r"<\|channel>thought", r"<channel\|>"),  # Gemma
    (r"<\|channel\|>analysis", r"<\|channel\|>final<\|message\|>"),  # gpt-oss
    (r"\Aanalysis(?=\w)", "assistantfinal"),  # gpt-oss decoded without special tokens
]
OPENING, CLOSING = ("|".join(marks) for marks in zip(*THOUGHTS))
LONGEST = 10  # seconds for a comparison
TINY = r"10\^\{?-(\d+)|(?<![\d.])0?\.(0+)"  # 10^{-19}, or 0.00016 and its zeros


def after_thoughts(text):
    """A response without its thoughts: what stands behind the last one that is closed.

    Where a thought is still open at the end, as in a response that was cut, it is "". Many
    templates open the thought in the prompt. A response that never closes it is known by its
    opening mark alone, so the caller writes the prompt's mark in front of the response.
    """
    answer = re.split(CLOSING, text)[-1]
    return "" if re.search(OPENING, answer) else answer


def last_box(text):
    r"""What the last \boxed{...} or \fbox{...} of a text holds, thoughts left aside.

    None where there is none, or where the last one never closes: an earlier one does not
    count."""
    text = after_thoughts(text)
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*(?={)", text)]
    if not starts:
        return None
    text = text[starts[-1] :]
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # \{ and \} are no groups
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return text[1 : brace.start()]
    return None


def find_answer(response, problem):
    """A response's program where the problem has tests, else what its last box holds. None
    where there is none."""
    if "tests" in problem:
        return sandbox.extract_program(after_thoughts(response))
    return last_box(response)


def repair(answer):
    for pattern, replacement in REPAIRS:
        answer = re.sub(pattern, replacement, answer)
    return answer.strip()


@functools.lru_cache(maxsize=100_000)  # half the time of a comparison
def parsed(answer):
    """What math-verify reads in an answer: [] if it is nothing."""
    return parse(f"\\boxed{{{answer}}}", parsing_timeout=None)


def letter_and_text(answer):
    """Of a multiple choice: "(B) 12" -> ("B", "12"), and "(B)" -> ("B", None)."""
    match = re.fullmatch(CHOICE, answer, re.DOTALL)
    return match.groups() if match else (None, None)


def decimals(text):
    """How many decimals show 4 digits of the tiniest number in a text."""
    zeros = [0]
    for power, written in re.findall(TINY, text):
        zeros.append(int(power or len(written) + 1))
    return min(300, 3 + max(zeros))


@functools.lru_cache(maxsize=100_000)
def same_answer(answer, other):
    """Do two answers (strings) mean the same, as "0.5" and "1/2" do?

    Numbers are compared to 6 decimals, tiny ones to 4 digits. New answers take some ms, and
    at most LONGEST seconds (9^{9^{9^9}}: no).
    """
    a, b = repair(answer), repair(other)
    if a == b:
        return a != ""
    if len(a) + len(b) > 1000:  # a response gone astray: no benchmark has such an answer
        return False
    (letter, text), (other_letter, other_text) = letter_and_text(a), letter_and_text(b)
    if letter and other_letter:
        if letter != other_letter or not text or not other_text:
            return letter == other_letter
    a, b = text or a, other_text or b  # (B) 12 is 12, too
    try:
        return within(LONGEST, equal, a, b)
    except TimeoutError:
        return False


def equal(a, b):
    """Does math-verify find two repaired answers equal?"""
    digits = decimals(f"{a} {b}")
    for first, second in (a, b), (b, a):  # of equations the verdict depends on the order
        if verify(
            parsed(first), parsed(second), timeout_seconds=None,
            float_rounding=max(6, digits), numeric_precision=max(15, digits),
        ):
            return True
    return False


def is_correct(response, problem):
    """Does a response's last box hold the problem's answer, or one of a list of them?"""
    box = last_box(response)
    if box is None:
        return False
    answers = problem["answer"]
    if not isinstance(answers, list):
        answers = [answers]
    return any(same_answer(str(answer), box) for answer in answers)


def votes(texts):
    """For each of N responses, how many of them have its answer: 0 if it has none."""
    boxes = [last_box(text) for text in texts]
    given = [box for box in boxes if box is not None]
    counts = []
    for box in boxes:
        same = [box is not None and same_answer(box, other) for other in given]
        counts.append(sum(same))
    return counts


def most_agreed(texts):
    """Index of the response that self-consistency keeps: the first with the most common
    answer. Where none has one (programs, say), it is the one with the lowest mean Levenshtein
    distance to the others, in characters behind the thoughts."""
    counts = votes(texts)
    if max(counts) > 0:
        return counts.index(max(counts))
    finals = [after_thoughts(text) for text in texts]
    distances = []
    for final in finals:
        distance = sum(Levenshtein.distance(final, other) for other in finals)
        distances.append((final == "", distance))  # a response that was cut comes last
    return distances.index(min(distances))


def grade(problems, responses, allow_code=False):
    """Is each response (text) right for its problem? -> a list of bools.

    Where there are tests, the response's program is run with them, after the problem's setup.
    A step that comes "after" others is graded as tasks/steps.py makes it: with their programs
    in its setup. Without allow_code, tests raise UserError.
    """
    if not allow_code and any("tests" in problem for problem in problems):
        raise UserError(NOT_ALLOWED)
    right, jobs = {}, {}
    for i, problem in enumerate(problems):
        if "tests" not in problem:
            right[i] = is_correct(responses[i], problem)
            continue
        program = find_answer(responses[i], problem)
        if program:
            program = "\n".join([problem.get("setup", ""), program])
        jobs[i] = program, problem["tests"], *problem.get("limits", ())
    if jobs:
        right.update(zip(jobs, sandbox.grade(jobs.values(), desc="grade")))
    return [right[i] for i in range(len(problems))]
