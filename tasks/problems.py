"""
Problems: of files, of the benchmarks, and of any data set of the Hub.

    load_problems("problems.jsonl")     # one JSON object a line
    load_problems("math500")            # a name of HUB; a further benchmark is a further row
    load_problems("someone/something")  # its split "train", with its fields as they are

A problem is a dict with "id", "prompt" and what its responses are graded against: an "answer"
(a string), or "tests". These are Python source that raises where a program is wrong, or a
list of {"input": stdin, "output": stdout}. "setup" is Python source to run before the program,
and "limits" are [seconds, bytes of memory] for a run. A step of a "main" problem comes "after"
others, a list of ids: see tasks/steps.py.
"""
import base64
import functools
import json
import os
import pickletools
import re
import sys
import urllib.error
import urllib.request
import zlib
from functools import partial
from pathlib import Path

import huggingface_hub

from tasks.answers import NOT_ALLOWED, last_box
from tasks.errors import UserError
from tasks.sandbox import has_namespaces, passes
from tasks.steps import PROGRAM

PROMPT_FIELDS = "prompt", "problem", "question"  # the first one that a row has
KINDS = {  # field: what it may be
    "id": ((str, int), "a string or a whole number"),
    "answer": (
        (str, int, float, list),
        "a string (with commas between several answers), a number, or a list of right answers",
    ),
    "solution": (str, "a string"),
    "setup": (str, "Python source"),
    "after": (list, "a list of ids"),
    "main": (str, "the id of a problem that has steps"),
    "limits": (list, "[seconds, bytes of memory]"),
}
STEM = """
abstract_algebra astronomy college_biology college_chemistry college_computer_science
college_mathematics college_physics computer_security conceptual_physics
electrical_engineering elementary_mathematics high_school_biology high_school_chemistry
high_school_computer_science high_school_mathematics high_school_physics
high_school_statistics machine_learning
""".split()
MODULES = "math bisect collections functools heapq itertools typing builtins"
SETUP = "".join(f"from {name} import *\n" for name in MODULES.split())  # the last pow wins
SETUP += "import bisect, collections, functools, heapq, itertools, math, operator\n"
SETUP += "import random, re, string, sys\n"
ANSWER = "Answer with one ```python block, which holds all of your code."

# -------------------------------------------------------- a benchmark's row -> its problems


def block(code):
    return f"```python\n{code.rstrip()}\n```"


def as_it_is(row):
    yield row


def numina(row):
    yield {"prompt": row["problem"], "solution": row["solution"]}


def svamp(row):
    yield {"prompt": " ".join(row["question_concat"].split()), "answer": row["Answer"]}


def asdiv(row):
    if ";" not in row["answer"]:  # of several answers
        answer = row["answer"].split(" (")[0]  # of "9 (apples)"
        yield {"prompt": f"{row['body']} {row['question']}", "answer": answer}


def amc(row):
    yield row | {"answer": str(row["answer"]).removesuffix(".0")}  # of 142.0


def olympiad(row):
    prompt = row["question"]
    if row["context"]:
        prompt = f"{row['context']}\n\n{prompt}"
    answer = ", ".join(row["final_answer"])  # several are compared as a set
    answer = re.sub(r"(?<!\\)\$", "", answer)
    yield {"id": f"olympiad/{row['id']}", "prompt": prompt, "answer": answer}


def ugphysics(row):
    problem = {"prompt": row["problem"], "answer": last_box(row["answers"])}
    yield problem | {"unit": row["unit"], "language": row["language"]}


def mmlu_stem(row):
    if row["subject"] in STEM:
        lines = [f"{letter}) {text}" for letter, text in zip("ABCD", row["choices"])]
        lines = [row["question"], "", *lines, "", "Answer with the letter of the right option."]
        yield {"prompt": "\n".join(lines), "answer": "ABCD"[row["answer"]]}


def humaneval(row):
    yield {
        "id": row["task_id"],
        "prompt": f"Complete this function:\n{block(row['prompt'])}\n{ANSWER}",
        "entry_point": row["entry_point"],
        "setup": row["prompt"],  # some have helpers, which the tests call
        "tests": f"{row['test']}\ncheck({row['entry_point']})\n",
    }


def mbpp(row):
    tests = block("\n".join(row["test_list"]))
    yield {
        "id": f"mbpp/{row['task_id']}",
        "prompt": f"{row['prompt']}\nIt should pass these tests:\n{tests}\n{ANSWER}",
        "tests": "\n".join(row["test_imports"] + row["test_list"]),
    }


def leetcode(row):
    yield {
        "id": f"leetcode/{row['task_id']}",
        "prompt": f"{row['prompt_sft']}\n{ANSWER}",
        "setup": SETUP,
        "tests": row["test"],
    }


def livecodebench(row):
    """All tests, several GB for 511 problems: stdin and stdout, or calls of Solution's method."""
    tests = json.loads(row["public_test_cases"]) + private_tests(row["private_test_cases"])
    if tests[0]["testtype"] == "stdin":
        task = "Write a program that reads the input from stdin and prints the output to stdout."
        tests = [{"input": test["input"], "output": test["output"]} for test in tests]
    else:
        task = f"Complete this code:\n{block(row['starter_code'])}"
        method = json.loads(row["metadata"])["func_name"]
        lines = []
        for test in tests:
            arguments = [repr(json.loads(text)) for text in test["input"].split("\n")]
            call = f"Solution().{method}({', '.join(arguments)})"
            lines.append(f"assert {call} == {json.loads(test['output'])!r}")
        tests = "\n".join(lines)
    yield {
        "id": f"livecodebench/{row['question_id']}",
        "prompt": f"{row['question_content']}\n\n{task}\n{ANSWER}",
        "setup": SETUP,
        "tests": tests,
    }


def private_tests(text):
    """LiveCodeBench's hidden tests: JSON, or base64 of zlib of a pickle of a JSON string.
    Loading a pickle may run anything, so the string is read off its opcodes."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    opcodes = pickletools.genops(zlib.decompress(base64.b64decode(text)))
    strings = [value for opcode, value, _ in opcodes if "UNICODE" in opcode.name]
    if len(strings) != 1:
        raise ValueError(f"hidden tests should be one pickled string, not {len(strings)}")
    return json.loads(strings[0])


def scicode(row, background):
    """A main problem's steps, each asked with the model's own code of the steps before it, as
    in the benchmark, and with or without the scientists' background.

    The tests need the benchmark's package, and its test_data.h5 in Python's own folder
    (sys.prefix, as programs see no other): github.com/scicode-bench/SciCode.

    Departures: the three steps whose code the benchmark gives (13.6, 62.1, 76.3) are asked as
    all others. A program keeps its imports.
    """
    dependencies = row["required_dependencies"]
    shown, ids = [], []  # the steps before, with their code
    for step in row["sub_steps"]:
        number, cases = step["step_number"], step["test_cases"]
        name = f"scicode/{number}"
        task = step["step_description_prompt"]
        if background:
            task += f"\n{step['step_background']}"
        header = f"{step['function_header']}\n\n{step['return_line']}"
        prompt = ["Write the code of the next step towards the solution of a scientific problem."]
        if shown:
            prompt += ["The steps before it, and your code of them:", *shown]
        prompt += [
            f"The next step: {task}",
            f"Complete this function:\n{block(header)}",
            f"Use only these imports, which are there already:\n{block(dependencies)}",
            "Write this step only: the code of the steps before is there, too, and neither "
            "examples nor tests are asked for.",
        ]
        if not background:
            prompt.append("Begin the code with the step's scientific background, as a comment.")
        tests = "import sys\nfrom scicode.parse.parse import process_hdf5_to_tuple\n"
        tests += "data = sys.prefix + '/test_data.h5'\n"
        tests += f"targets = process_hdf5_to_tuple({number!r}, {len(cases)}, data)\n"
        for i, case in enumerate(cases):
            tests += f"target = targets[{i}]\n{case}\n"
        yield {
            "id": name,
            "main": f"scicode/{number.partition('.')[0]}",
            "prompt": "\n\n".join([*prompt, ANSWER]),
            "setup": dependencies,
            "tests": tests,
            "after": list(ids),
            "limits": [1800, 2**33],  # the benchmark's seconds
        }
        ids.append(name)
        shown += [task, block(PROGRAM.format(name)), "------"]


def eurus_code(row):
    """A coding prompt without its system prompt, with its tests where they are stdin and
    stdout, as most are: function calls are written differently from row to row."""
    if row["ability"] == "code":
        turns = [turn["content"] for turn in row["prompt"] if turn["role"] != "system"]
        problem = {"prompt": "\n\n".join(turns)}
        tests = json.loads(row["reward_model"]["ground_truth"])
        if "fn_name" not in tests:
            pairs = zip(tests["inputs"], tests["outputs"])
            problem["tests"] = [{"input": stdin, "output": stdout} for stdin, stdout in pairs]
        yield problem


HUB = {  # name: (id on the Hub, configuration, split, how many problems, row -> its problems)
    "numina": ("AI-MO/NuminaMath-CoT", None, "train", None, numina),  # None: unchecked
    "math500": ("HuggingFaceH4/MATH-500", None, "test", 500, as_it_is),
    "math-train": ("DigitalLearningGmbH/MATH-lighteval", None, "train", 7500, as_it_is),
    "gsm8k": ("openai/gsm8k", "main", "test", 1319, as_it_is),
    "gsm8k-train": ("openai/gsm8k", "main", "train", 7473, as_it_is),
    "svamp": ("ChilleD/SVAMP", None, "train+test", 1000, svamp),  # its authors' 1,000 tests
    "asdiv": ("EleutherAI/asdiv", None, "validation", None, asdiv),
    "amc": ("AI-MO/aimo-validation-amc", None, "train", 83, amc),
    "aime": ("AI-MO/aimo-validation-aime", None, "train", 90, as_it_is),
    "minerva": ("math-ai/minervamath", None, "test", 272, as_it_is),
    # open-ended, text only, English, competitions
    "olympiad": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", 674, olympiad),
    # both languages: the paper's 372; the answers have no units
    "ugphysics": ("UGPhysics/ugphysics", "SemiconductorPhysics", "en+zh", 372, ugphysics),
    "mmlu-stem": ("cais/mmlu", "all", "test", 3018, mmlu_stem),
    "humaneval": ("openai/openai_humaneval", None, "test", 164, humaneval),
    "mbpp": ("google-research-datasets/mbpp", "sanitized", "test", 257, mbpp),
    "mbpp-train": ("google-research-datasets/mbpp", "sanitized", "train", 120, mbpp),
    # DeepSeek-Coder's contests, July 2023 to January 2024
    "leetcode": ("TechxGenus/LeetCode-Contest", None, "train", 180, leetcode),
    # the authors' copy wants to run a script
    "livecodebench":
        ("lighteval/code_generation_lite", "release_v2", "test", 511, livecodebench),
    # steps of 65 main problems; the paper's table is with background
    "scicode": ("SciCode1/SciCode", None, "test", 288, partial(scicode, background=False)),
    "scicode-background":
        ("SciCode1/SciCode", None, "test", 288, partial(scicode, background=True)),
    "eurus-code": ("PRIME-RL/Eurus-2-RL-Data", None, "train", None, eurus_code),
}
TRAINING = {  # a benchmark: the set to train on in its place; for the others it is numina
    "math500": "math-train",
    "gsm8k": "gsm8k-train",
    "mbpp": "mbpp-train",
    "humaneval": "eurus-code",
    "leetcode": "eurus-code",
    "livecodebench": "eurus-code",
}
INDVAL = (
    "indval: individual value judgements come from the World Values Survey, not from the Hub; "
    'follow github.com/liweijiang/indievalue, and write a JSONL file with "prompt" and "answer"'
)
NAMES = ", ".join(HUB)

# ---------------------------------------------------------------------------------- loading


@functools.cache
def reach_hub():
    """Is the Hub there? If not, its libraries are told not to try again for a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers, if only to say no
    except OSError:  # no name, no route, no answer
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        return False
    return True


def hub_says(reached):
    if reached:
        return "the Hub has no such public"
    page = "course/when_something_goes_wrong.md"
    return f"the Hub can't be reached (no network? see {page}) and its cache holds no such"


def read_file(name):
    """("FILE, line N", row) of each line that is not blank."""
    # str.splitlines would also split at a U+2028 inside of a string
    for number, line in enumerate(Path(name).read_bytes().split(b"\n"), 1):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        try:
            # pandas writes NaN for null; half a surrogate pair can't be encoded
            row = json.loads(line.decode("utf-8-sig"), parse_constant=lambda name: None)
            json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)  # JSON's own would count lines anew
            raise UserError(
                f"{where}: not JSON in UTF-8 ({reason}): {shown(line)}; "
                'write {"prompt": "...", "answer": "..."} on a line of its own'
            ) from error
        yield where, row


def read_hub(name):
    """("NAME, row N", row) of a benchmark, or of another data set of the Hub."""
    reached = reach_hub()
    import datasets  # a second's work, which files do not need

    hub_id, configuration, split, *_ = HUB.get(name, (name, None, "train"))
    try:
        rows = datasets.load_dataset(hub_id, configuration, split=split)
    except (OSError, ValueError) as error:  # a bad id, a missing one, or no network
        raise UserError(
            f"{name}: no file here, and {hub_says(reached)} data set; known names: {NAMES}"
        ) from error
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row


def shown(value):
    """The beginning of a value, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def as_problem(row, default_id):
    """A row as a problem. UserError where it can't be asked or graded."""
    if not isinstance(row, dict):
        raise UserError(f'{shown(row)} is not an object with a "prompt"')
    problem = {"id": default_id}
    problem |= {key: value for key, value in row.items() if value is not None}
    prompts = [row[key] for key in PROMPT_FIELDS if isinstance(row.get(key), str)]
    if not prompts:
        raise UserError(f'no "prompt" string in it; it has {sorted(row)}')
    problem["prompt"] = prompts[0]
    if not problem["prompt"].strip():
        raise UserError("its prompt is empty; write one, or take the row out")
    for key, (kinds, wanted) in KINDS.items():
        value = problem.get(key)
        if key in problem and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise UserError(f'"{key}" is {shown(value)}; make it {wanted}, or leave it out')
    if "tests" in problem:
        passes(None, problem["tests"])  # runs nothing, and refuses what can't be run
    limits = problem.get("limits", [1, 1])
    if len(limits) != 2 or not all(isinstance(limit, int | float) for limit in limits):
        raise UserError(f'"limits" is {shown(limits)}; make it [seconds, bytes of memory]')
    answer = problem.pop("answer", None)
    if answer is None:
        answer = last_box(problem.get("solution", ""))
    if isinstance(answer, list):  # any of them is right
        if not answer or not all(isinstance(right, str | int | float) for right in answer):
            raise UserError(f'"answer" is {shown(answer)}; give strings or numbers in the list')
        answer = [str(right).strip() for right in answer]
    elif answer is not None:
        answer = str(answer).split("####")[-1].strip()
    if answer:
        problem["answer"] = answer
    return problem


def load_problems(name_or_path):
    """Problems of a JSONL file, a benchmark or a data set of the Hub: a list of dicts.

    A prompt is the first of PROMPT_FIELDS that is a string. An answer is what stands behind
    GSM8K's "####"; where there is none, it is the solution's last box. Of a list of answers any
    is right. A field that is null counts as absent, and others stay as they are.

    Raises UserError: no such file or data set, no network, or a line that can't be asked or
    graded.
    """
    name = str(name_or_path)
    size, make = None, as_it_is
    if os.path.isfile(name):  # of any length, where Path's would raise
        rows = read_file(name)
    elif name in HUB:
        rows = read_hub(name)
        size, make = HUB[name][3:]
    elif name == "indval":
        raise UserError(INDVAL)
    elif os.path.exists(name) or name.endswith((".jsonl", ".json")) or not name.strip():
        reason = "is no file" if os.path.exists(name) else "no such file"  # a folder, or a pipe
        raise UserError(
            f"{name.strip() or repr(name)}: {reason}; give a JSONL file, one of {NAMES}, or a "
            "data set's id on the Hub"
        )
    else:
        rows = read_hub(name)
    problems, places = [], {}
    for where, row in rows:
        try:
            for fields in make(row):
                problem = as_problem(fields, f"{name}/{len(problems)}")
                other = places.get(problem["id"])
                if other is not None:
                    raise UserError(f"its id {problem['id']!r} is that of {other}, too; give "
                                     "each problem its own, or leave the ids out")
                if missing := [i for i in problem.get("after", []) if i not in places]:
                    raise UserError(f"it comes after {missing[0]!r}, which is no problem above it")
                places[problem["id"]] = where
                problems.append(problem)
        except KeyError as error:
            raise UserError(
                f"{where}: no field {error} in it, as {name} should have; it has {sorted(row)}"
            ) from error
        except (ValueError, UserError) as error:
            raise UserError(f"{where}: {error}") from error
    if not problems:
        raise UserError(f"{name}: no problems in it")
    if size and len(problems) != size:
        print(f"{name}: {len(problems)} problems, not {size} as it should have", file=sys.stderr)
    return problems


def benchmark_of(name):
    """The benchmark whose test questions load_problems(name) gives, or None. `name` may also be
    the Hub's id of a data set that has them as its split "train"."""
    for benchmark, (hub_id, _, split, *_) in HUB.items():
        found = name == benchmark or (name == hub_id and "train" in split)
        if found and benchmark not in ("numina", *TRAINING.values()):
            return benchmark
    return None


def load_gradable(data, limit, allow_code, flag="--data"):
    """The first `limit` problems of a data set. UserError where some can't be graded, and
    UserError where no program can be run here."""
    problems = load_problems(data)[:limit]
    for problem in problems:
        if "answer" not in problem and "tests" not in problem:
            raise UserError(f"{flag} {data}: {problem['id']} has no answer and no tests")
        if "tests" in problem and not allow_code:
            raise UserError(f"{flag} {data}: {NOT_ALLOWED}")
    if any("tests" in problem for problem in problems):
        has_namespaces()  # or an error, before a model has answered
    return problems
