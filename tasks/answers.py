r"""
Answers: find the one in a response, grade it, and let several responses vote.

    last_box(r"so it is \boxed{\frac12}")                  # \frac12
    is_correct(r"so \boxed{\frac12}", {"answer": "0.5"})   # True: see tasks/compare.py
    votes([r"\boxed{0.5}", r"\boxed{2}", r"\boxed{1/2}"])  # [2, 1, 2]
"""
import re
from collections import Counter

from rapidfuzz.distance import Levenshtein

from tasks import sandbox
from tasks.compare import same_answer
from tasks.errors import UserError

NOT_ALLOWED = (
    "its answers are programs, and grading runs them: --allow-code-execution "
    "(see tasks/sandbox.py for what that means)"
)
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
    first = {}  # of each box the first one that means the same
    for box in dict.fromkeys(boxes):
        if box is None or not same_answer(box, box):  # an empty one is no answer
            continue
        first[box] = box
        for other in dict.fromkeys(first.values()):
            if same_answer(other, box) or same_answer(box, other):
                first[box] = other
                break
    counts = Counter(first.get(box) for box in boxes)
    return [counts[first[box]] if box in first else 0 for box in boxes]


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
