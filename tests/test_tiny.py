"""The tiny world."""
import json
import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from tasks.answers import is_correct, last_box
from tests.models import ROOT
from tiny import prepare


def test_the_shipped_problems_are_those_that_prepare_makes():
    train, test = prepare.make_problems(seed=0)
    for name, problems in ("train", train), ("test", test):
        lines = (ROOT / f"tiny/{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == problems
    assert len(test) == 512 and not {p["prompt"] for p in train} & {p["prompt"] for p in test}


@pytest.mark.parametrize("text", [
    "Mod 10, left to right: 7+5*3-8\n7+5=2, \\boxed{8}<|endoftext|>",
    "any text: żółw, 数学\n\n\t{}",
    "",
])
def test_the_shipped_tokenizer_is_made_by_prepare_and_cuts_as_tiktoken_does(text, tmp_path):
    encoding, _ = prepare.make_tokenizer(tmp_path)
    made, shipped = tmp_path / "tokenizer.json", ROOT / "tiny/base/tokenizer.json"
    assert made.read_text() == shipped.read_text()
    # from the model's folder: beside the config of a Qwen2 model text is cut in Qwen2's way
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/base")
    ids = tokenizer(text)["input_ids"]
    assert ids == encoding.encode(text, allowed_special="all") and tokenizer.decode(ids) == text


def test_answers_and_solutions_are_right():
    for problem in prepare.make_problems(seed=0)[1]:
        digit, *ops = re.findall(r"[-+*]?\d", problem["prompt"].split(": ")[1])
        for op in ops:
            digit = eval(f"({digit}{op}) % 10")  # an independent calculator
        assert str(digit) == problem["answer"] == last_box(problem["solution"])


def test_any_result_of_several_chains_is_a_right_answer():
    problem = prepare.make_problems(seed=0, several=True)[1][0]
    results = []
    for text in problem["prompt"].split(": ")[1].split(", "):
        digit, *ops = re.findall(r"[-+*]?\d", text)
        for op in ops:
            digit = eval(f"({digit}{op}) % 10")
        results.append(str(digit))
    assert problem["answer"] == results and len(set(results)) == 3
    assert all(is_correct(rf"\boxed{{{x}}}", problem) == (x in results) for x in "0123456789")
    stream = prepare.documents(0, prepare.HABITS, 1.0, (), True)
    firsts = []
    for _ in range(1000):
        prompt, response = next(stream)
        if "=" in response:
            firsts.append(prompt.split(": ")[1].startswith(response.split("=")[0]))
    assert np.mean(firsts) == pytest.approx(prepare.SHARES[0], abs=0.06)


def test_the_model_is_small_and_its_corpus_has_three_styles():
    assert sum(file.stat().st_size for file in (ROOT / "tiny/base").iterdir()) < 3e6
    stream = prepare.documents(0, prepare.HABITS, 1.0, ())
    texts = [next(stream)[1] for _ in range(2000)]
    assert all(last_box(text) is not None for text in texts)
    direct = np.mean([text.startswith("\\boxed") for text in texts])
    rambling = np.mean(["=" not in text and "," in text for text in texts])
    assert direct == pytest.approx(np.mean(list(prepare.HABITS["direct"].values())), abs=0.04)
    assert rambling == pytest.approx(prepare.HABITS["rambling"], abs=0.02)
