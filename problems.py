"""
The benchmarks: which data set of the Hub each one is, and how its rows become problems.

    from problems import load_problems
    load_problems("math500")            # a name of HUB below
    load_problems("problems.jsonl")     # a file of one's own
    load_problems("someone/something")  # any other data set of the Hub: its split "train", its fields as they are

A problem is a dict with "id", "prompt" and what its responses are graded against: an "answer" (a string), or "tests". These are
Python source that raises where the code is wrong, or a list of {"input": stdin, "output": stdout}. Where there is a "setup",
Python source too, it runs before the code; an "entry_point" is the function's name. All of that is other people's code: it belongs
in a sandbox. A benchmark more is a row more in HUB.
"""
import functools
import json
import pickletools
import re
import sys
import urllib.error
import urllib.request
import zlib
from base64 import b64decode
from pathlib import Path

import huggingface_hub

PROMPT_FIELDS = "prompt", "problem", "question"  # the first one that a row has
STEM = """abstract_algebra astronomy college_biology college_chemistry college_computer_science college_mathematics college_physics
    computer_security conceptual_physics electrical_engineering elementary_mathematics high_school_biology high_school_chemistry
    high_school_computer_science high_school_mathematics high_school_physics high_school_statistics machine_learning""".split()
SETUP = "".join(f"from {m} import *\n" for m in "math bisect collections functools heapq itertools typing builtins".split())  # last: pow
SETUP += "import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys\n"  # as LeetCode does
ANSWER = "Answer with one ```python block, which holds all of your code."


def block(code):
    return f"```python\n{code.rstrip()}\n```"


def last_box(text):
    """What the last \\boxed{...} (or \\fbox{...}) of a text holds; None if there is none, or if the last one never closes."""
    start = max((m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s*(?={)", text)), default=len(text))
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):  # \{ and \} are characters, not groups
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return text[start + 1 : start + brace.start()]
    return None


def multiple_choice(row):
    if row["subject"] not in STEM:
        return []
    options = "\n".join(f"{letter}) {option}" for letter, option in zip("ABCD", row["choices"]))
    return [{"prompt": f"{row['question']}\n\n{options}\n\nAnswer with the letter of the right option.", "answer": "ABCD"[row["answer"]]}]


def private_tests(text):
    """LiveCodeBench's hidden tests: JSON, or base64 of zlib of a pickle of a JSON string. Loading a pickle may run anything, so the
    string is read off its opcodes. ValueError where there is more in it than one string."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    strings = [value for opcode, value, _ in pickletools.genops(zlib.decompress(b64decode(text))) if "UNICODE" in opcode.name]
    if len(strings) != 1:
        raise ValueError(f"LiveCodeBench's hidden tests should be one pickled string, not {len(strings)}")
    return json.loads(strings[0])


def livecodebench(row):
    """One problem with all its tests (some GB for the 511 of them): stdin and stdout, or calls of a method of Solution."""
    tests = json.loads(row["public_test_cases"]) + private_tests(row["private_test_cases"])
    if tests[0]["testtype"] == "stdin":
        task = "Write a program that reads the input from stdin and prints the output to stdout."
        tests = [{"input": test["input"], "output": test["output"]} for test in tests]
    else:
        task, method = f"Complete this code:\n{block(row['starter_code'])}", json.loads(row["metadata"])["func_name"]
        calls = [(", ".join(repr(json.loads(line)) for line in test["input"].split("\n")), json.loads(test["output"])) for test in tests]
        tests = "\n".join(f"assert Solution().{method}({arguments}) == {output!r}" for arguments, output in calls)
    return [{"id": f"livecodebench/{row['question_id']}", "prompt": f"{row['question_content']}\n\n{task}\n{ANSWER}", "setup": SETUP,
             "tests": tests}]


def scicode(row):
    """A main problem's steps, in order, with the scientists' background. The benchmark shows a model its own code of the steps before;
    here the prompt has their headers, and "after" has their ids: their code goes between "setup" and this step's. The tests need the
    benchmark's package and its test_data.h5 (github.com/scicode-bench/SciCode)."""
    steps, headers = [], []
    for step in row["sub_steps"]:
        number, cases = step["step_number"], step["test_cases"]
        prompt = [row["problem_description_main"], "The next step: " + step["step_description_prompt"], step["step_background"],
                  "Complete this function:\n" + block(step["function_header"] + "\n" + step["return_line"]),
                  f"These imports are there already:\n{block(row['required_dependencies'])}\n{ANSWER}"]
        if headers:
            prompt.insert(1, "These functions are there already:\n" + block("\n\n".join(headers)))
        targets = f"from scicode.parse.parse import process_hdf5_to_tuple\ntargets = process_hdf5_to_tuple({number!r}, {len(cases)})\n"
        steps.append({"id": f"scicode/{number}", "prompt": "\n\n".join(prompt), "setup": row["required_dependencies"],
                      "after": [earlier["id"] for earlier in steps],
                      "tests": targets + "\n".join(f"target = targets[{i}]\n{case}" for i, case in enumerate(cases))})
        headers.append(step["function_header"])
    return steps


def eurus_code(row):
    """A coding prompt without its system prompt, and with its tests where they are stdin and stdout, as most are: function calls are
    written down differently from row to row."""
    if row["ability"] != "code":
        return []
    problem = {"prompt": "\n\n".join(turn["content"] for turn in row["prompt"] if turn["role"] != "system")}
    tests = json.loads(row["reward_model"]["ground_truth"])
    if "fn_name" not in tests:
        problem["tests"] = [{"input": i, "output": o} for i, o in zip(tests["inputs"], tests["outputs"])]
    return [problem]


HUB = {  # name: (Hub id, configuration, split, how many problems (None: unchecked), row -> its problems: none where it is left out)
    "numina": ("AI-MO/NuminaMath-CoT", None, "train", None, lambda r: [{"prompt": r["problem"], "solution": r["solution"]}]),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", 500, lambda r: [r]),
    "gsm8k": ("openai/gsm8k", "main", "test", 1319, lambda r: [r]),
    "amc": ("AI-MO/aimo-validation-amc", None, "train", 83, lambda r: [r | {"answer": str(r["answer"]).removesuffix(".0")}]),  # 142.0
    "aime": ("AI-MO/aimo-validation-aime", None, "train", 90, lambda r: [r]),
    "minerva": ("math-ai/minervamath", None, "test", 272, lambda r: [r]),
    "olympiad": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", 674, lambda r: [{  # open-ended, text only, English, competitions
        "id": f"olympiad/{r['id']}", "prompt": "\n\n".join(filter(None, [r["context"], r["question"]])),
        "answer": re.sub(r"(?<!\\)\$", "", ", ".join(r["final_answer"]))}]),  # a comma between several answers: they are compared as a set
    "ugphysics": ("UGPhysics/ugphysics", "SemiconductorPhysics", "en+zh", 372, lambda r: [{  # both languages: the paper's 372
        "prompt": r["problem"], "answer": last_box(r["answers"]), "unit": r["unit"], "language": r["language"]}]),  # answers have no unit
    "mmlu-stem": ("cais/mmlu", "all", "test", 3018, multiple_choice),
    "humaneval": ("openai/openai_humaneval", None, "test", 164, lambda r: [{
        "id": r["task_id"], "prompt": f"Complete this function:\n{block(r['prompt'])}\n{ANSWER}", "entry_point": r["entry_point"],
        "setup": r["prompt"], "tests": f"{r['test']}\ncheck({r['entry_point']})\n"}]),  # setup: some prompts have helpers, which tests call
    "mbpp": ("google-research-datasets/mbpp", "sanitized", "test", 257, lambda r: [{
        "id": f"mbpp/{r['task_id']}", "tests": "\n".join(r["test_imports"] + r["test_list"]),
        "prompt": r["prompt"] + "\nIt should pass these tests:\n" + block("\n".join(r["test_list"])) + "\n" + ANSWER}]),
    "leetcode": ("TechxGenus/LeetCode-Contest", None, "train", 180, lambda r: [{  # DeepSeek-Coder's contests, July 2023 to January 2024
        "id": f"leetcode/{r['task_id']}", "prompt": f"{r['prompt_sft']}\n{ANSWER}", "setup": SETUP, "tests": r["test"]}]),
    "livecodebench": ("lighteval/code_generation_lite", "release_v2", "test", 511, livecodebench),  # the authors' copy wants a script run
    "scicode": ("SciCode1/SciCode", None, "test", 288, scicode),  # steps of 65 main problems
    "eurus-code": ("PRIME-RL/Eurus-2-RL-Data", None, "train", None, eurus_code),
}
ELSEWHERE = {  # name: how to get what no public data set of the Hub has
    "indval": "individual value judgements are made from answers to the World Values Survey: follow github.com/liweijiang/indievalue, "
              "write them as JSON lines with \"prompt\" and \"answer\", and give that file",
}
NAMES = ", ".join(HUB)


@functools.cache
def reach_hub():
    """Is the Hub there? If not, its libraries are told to look in their cache only, instead of retrying for a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers, if only to say no
    except OSError:  # no name, no route, no answer
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        return False
    return True


def hub_says(reached):
    return "the Hub has no such public" if reached else "the Hub can't be reached (no network?) and its cache holds no such"


def load_problems(name_or_path):
    """Problems of a JSONL file, a benchmark or a Hub data set: a list of {"id", "prompt", "answer" or "tests", ...}.

    A file has one JSON object a line, with a string "prompt"; "answer" and "solution" where there are any. A benchmark's rows become
    problems as HUB says; of any other data set the prompt is the first of PROMPT_FIELDS. Where rows have a solution and no answer,
    the answer is the solution's last box, or what follows GSM8K's "####"; a row without either has no "answer" key.

    Raises FileNotFoundError (no such file or data set, no network) or ValueError (a malformed row, with its line number).
    """
    name, make, size = str(name_or_path), lambda row: [row], None
    if Path(name).is_file():
        rows = []
        for number, line in enumerate(Path(name).read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                rows.append((f"{name}, line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}, line {number}: not a JSON object ({error.msg}): {line[:60]!r}") from error
    elif name in ELSEWHERE:
        raise FileNotFoundError(f"{name}: {ELSEWHERE[name]}")
    elif name.endswith((".jsonl", ".json")) or Path(name).exists():
        raise FileNotFoundError(f"{name}: no such file; give a JSONL file, one of {NAMES}, or a data set's id on the Hub")
    else:
        reached = reach_hub()
        import datasets  # here, so that files need no datasets

        path, configuration, split, size, make = HUB.get(name, (name, None, "train", None, make))
        try:
            dataset = datasets.load_dataset(path, configuration, split=split)
        except (OSError, ValueError) as error:  # also what huggingface_hub raises for a bad id, a missing one and no network
            raise FileNotFoundError(f"{name}: no file here, and {hub_says(reached)} data set; known names: {NAMES}") from error
        rows = ((f"{name}, row {i}", row) for i, row in enumerate(dataset))
    problems = []
    for where, row in rows:
        try:
            made = make(row)
        except KeyError as error:
            raise ValueError(f"{where}: no field {error} in it, as {name} should have; it has {sorted(row)}") from error
        for fields in made:
            field = next((f for f in PROMPT_FIELDS if isinstance(fields, dict) and isinstance(fields.get(f), str)), None)
            if field is None:
                raise ValueError(f"{where}: no \"prompt\" string in it; it has {sorted(fields) if isinstance(fields, dict) else fields!r}")
            problem = {"id": f"{name}/{len(problems)}", **fields, "prompt": fields[field]}
            if "answer" not in fields and isinstance(fields.get("solution"), str):
                problem["answer"] = last_box(fields["solution"])
            if isinstance(problem.get("answer"), str) and "####" in problem["answer"]:
                problem["answer"] = problem["answer"].split("####")[-1].strip()
            if problem.get("answer") is None:
                problem.pop("answer", None)
            problems.append(problem)
    if not problems:
        raise ValueError(f"{name}: no problems in it")
    if size and len(problems) != size:
        print(f"{name}: {len(problems)} problems, not {size} as it should have", file=sys.stderr)
    return problems
