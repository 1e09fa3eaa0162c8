"""The findings on a real model: their rows, and that the page says what the rows say."""
import argparse
import json
import re
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from tasks.errors import UserError
from tests.models import ROOT, TINY_BASE

sys.path.insert(0, str(ROOT / "findings"))
import figures
import real
import real_tables

MODEL = "some model"


def test_the_page_says_what_the_csv_says():
    rows = real_tables.read_table(ROOT / "findings/real.csv")
    text = (ROOT / "findings/real.md").read_text(encoding="utf-8")
    assert real_tables.filled(text, rows) == text
    kinds = re.findall(r"<!-- (\w+): ", text)
    assert set(kinds) == set(real_tables.TABLES) and "-dirty" not in text
    for row in rows.values():
        right = np.mean([int(count) for count in row["right"].split()]) / int(row["n"])
        assert float(row["accuracy"]) == pytest.approx(right, abs=1e-4)
        assert len(row["right"].split()) == int(row["problems"])
        assert row["commit"] and "-dirty" not in row["commit"]


def settings(**more):
    chosen = dict(model=TINY_BASE, device="cpu", dtype="float32", tokens=12, rollout_batch=4,
                  allow_code_execution=False)
    return argparse.Namespace(**chosen | more)


@pytest.mark.parametrize("method, n", [("sample@1", 2), ("em-inf@0.5", 1), ("greedy", 1)])
def test_a_job_cut_short_goes_on_as_if_it_had_not_been(method, n, tmp_path):
    problems = real.load_problems(str(ROOT / "tiny/test.jsonl"))[:6]
    key = MODEL, "", "set", method, "1"
    whole = real.samples_of(key, tmp_path, problems, n, settings())
    (path,) = tmp_path.glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) * 2 // 3]))  # 4 of the 6 problems
    resumed = real.samples_of(key, tmp_path, problems, n, settings())
    texts = [sample["response"] for sample in whole]
    assert texts == [sample["response"] for sample in resumed] and len(texts) == 6 * n


def test_self_consistency_does_not_vote_over_the_answers_that_it_is_compared_with(
    tmp_path, monkeypatch,
):
    seeds = []

    def asked(*_, seed, **__):
        seeds.append(seed)
        return []

    monkeypatch.setattr(real, "evaluate", asked)
    monkeypatch.setattr(real, "decode_and_grade", asked)
    problems = real.load_problems(str(ROOT / "tiny/test.jsonl"))[:4]
    for method, n in ("sample@1", 4), ("self-consistency@1", 1):
        for seed in "12":
            real.samples_of((MODEL, "", "set", method, seed), tmp_path, problems, n, settings())
    assert len(set(seeds)) == len(seeds) == 16


def test_a_row_of_the_csv_is_not_measured_again_unless_settings_differ(tmp_path):
    problems = real.load_problems(str(ROOT / "tiny/test.jsonl"))[:4]
    key = MODEL, "", "set", "greedy", "1"
    args = settings(csv=tmp_path / "real.csv", regrade=False)
    rows = {}
    real.measure(rows, key, problems, 1, tmp_path, args)
    there = real_tables.read_table(args.csv)
    assert there == rows and rows[key]["problems"] == "4" and rows[key]["formulas"] == "0"
    args.model = "no such model"
    real.measure(there, key, problems, 1, tmp_path / "nowhere", args)
    with pytest.raises(UserError, match="no such model"):
        real.measure(there, key, problems[:3], 1, tmp_path / "nowhere", args)


def test_a_reward_for_short_answers_is_forecast_beside_those_for_sure_ones():
    """Guards against a forecast of confidence that is one of length."""
    problems = [dict(id=f"set/{i}", prompt="?", answer="1") for i in range(2)]
    samples = []
    for i, (digit, length) in enumerate([(1, 10), (2, 14), (1, 20), (1, 22)]):
        samples.append(dict(
            id=f"set/{i // 2}", data="set", decoder="sample@1", answer="1", length=length, n=2,
            response=f"\\boxed{{{digit}}}", entropy=0.1 + i, logprob=-0.1 - i, truncated=False,
            flops=1.0, seed=1, seconds=1.0, max_new_tokens=64, commit="c",
        ))
    found = real.row_of(samples, problems, False)
    variance, covariance = (8 + 2) / 2, (2 * 0.5 + 2 * 0.5 + 0) / 2  # of -length, and with right
    assert float(found["shorter"]) == pytest.approx((2 * 0.1 / variance) ** 0.5 * covariance, 1e-3)
    assert float(found["shorter_low"]) < 0 < float(found["token"])


@pytest.mark.parametrize("response, right", [
    ("so she has \\boxed{1200} apples", True),
    ("so she has 1,200.", True),  # no box
    ("1200, or in the end 1,300", False),
    ("costs $1200.00", True),
    ("1200 - 1200 = -0", False),
    ("none", False),
])
def test_the_last_number_counts_with_and_without_a_box(response, right):
    assert real.right_by_last_number({"response": response, "answer": "1200"}) == right


@pytest.mark.parametrize("response, wrong", [
    ("30 + 11 = \\boxed{41}", True),
    ("30 + 11 + 2 is 43", True),  # all numbers
    ("30 - 11 = \\boxed{19}", False),  # right
    ("30 - 11 = \\boxed{20}", False),
    ("none", False),
])
def test_a_wrong_answer_may_be_a_sum_of_numbers_of_the_problem(response, wrong):
    prompt = "He picked 11 of 30 pounds in 2 hours. What about the others?"
    assert real.wrong_by_adding({"response": response, "answer": "19"}, prompt) == wrong
    assert real.wrong_by_adding({"response": "0.3", "answer": "1"}, "0.1 and 0.2")
    assert not real.wrong_by_adding({"response": "0.3", "answer": "0.3"}, "0.1 and 0.2")


def test_prompts_of_a_test_are_not_trained_on_in_whatever_form():
    tests = [[{"prompt": "Ann has 2 apples. How many?"}], [{"prompt": "Bob?"}]]
    training = [{"prompt": prompt} for prompt in (
        "Ann has 2 apples.  How many?", "ann has 2 apples, how many", "Ann has 3 apples. How many?",
    )]
    assert real.apart(training, tests) == training[2:]


def test_only_what_is_named_and_missing_is_trained(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(real, "train", lambda run, *_: trained.append(run))
    monkeypatch.setattr(real, "problems_of", lambda *_: [])
    monkeypatch.setattr(real, "measure", lambda *_: None)
    monkeypatch.setattr(real, "ROOT", tmp_path)
    flags = ["training", "--quick", "--runs", "EM-FT,majority", "--train", "gsm8k-train"]
    real.main(flags)
    assert trained == ["EM-FT, gsm8k-train, 1", "majority, gsm8k-train, 1"]
    real.main([*flags, "--flags", "--lr 1e-5"])
    assert trained.pop() == "majority --lr 1e-5, gsm8k-train, 1"
    assert trained.pop() == "EM-FT --lr 1e-5, gsm8k-train, 1"
    some = [row(method, "1", run=run) for run in trained for method in real_tables.PLAIN]
    table = {real_tables.key_of(one): one | dict(model="M") for one in some}
    real.write_table(tmp_path / "done.csv", table)
    flags += ["--name", "M", "--csv", str(tmp_path / "done.csv")]
    real.main([*flags, "--tests", "svamp"])  # all are there
    assert len(trained) == 2
    real.main([*flags, "--tests", "gsm8k"])
    assert len(trained) == 4
    with pytest.raises(SystemExit):
        real.main([*flags, "--train", "gsm8k"])


def test_the_base_model_is_forecast_and_decoded_on_all_sets(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(real, "measure", lambda rows, key, *_: asked.append(key[2]))
    monkeypatch.setattr(real, "problems_of", lambda *_: [])
    monkeypatch.setattr(real, "ROOT", tmp_path)
    for table in "forecast", "decoding":
        asked.clear()
        real.main([table, "--quick"])
        assert set(asked) == {"svamp", "gsm8k", "asdiv"}
        real.main([table, "--quick", "--allow-code-execution"])
        assert set(asked) == set(real_tables.SETS)


def test_what_is_trained_on_has_no_prompt_of_any_test(tmp_path, monkeypatch):
    """Guards against a run that is tested on one set first, and on another one later."""
    def problems_of(name, _):
        prompts = ["Of asdiv?", "Of gsm8k?"] if name == "asdiv" else [f"Of {name}?"]
        return [dict(prompt=prompt) for prompt in prompts]

    metrics = [dict(step=step, seconds=60, entropy=0.5, length=2, truncated=0) for step in (0, 1)]
    monkeypatch.setattr(real, "problems_of", problems_of)
    monkeypatch.setattr(real, "execute", lambda *_: None)
    monkeypatch.setattr(real, "read_rows", lambda _: metrics)
    args = settings(tests=["svamp"], prompts=1, steps=1, flags="")
    more = real.train("run", "EM-FT", "asdiv", 1, tmp_path, args)
    assert (tmp_path / "asdiv.jsonl").read_text() == '{"prompt": "Of asdiv?"}\n'
    assert (more["minutes"], more["entropy_by_step"]) == ("1.0", "0.5")


def test_a_table_of_an_older_version_lacks_columns(tmp_path):
    (tmp_path / "old.csv").write_text("model,run,set,method,seed,n\nM,,svamp,greedy,1,1\n")
    (old,) = real_tables.read_table(tmp_path / "old.csv").values()
    assert list(old) == real_tables.COLUMNS and old["n"] == "1" and old["formulas"] == ""


def row(method, right, n=1, seed=1, run="", **more):
    counts = [int(count) for count in right.split()]
    filled = dict.fromkeys(real_tables.COLUMNS, "") | dict(
        model=MODEL, run=run, set="svamp", method=method, seed=f"{seed}", n=f"{n}", right=right,
        problems=f"{len(counts)}", accuracy=f"{np.mean(counts) / n}", flops="2e9", entropy="0.5",
    )
    return filled | more


def test_claims_are_judged_problem_by_problem():
    half, all_right = " ".join("01" * 10), " ".join("1" * 20)
    some = [row("em-inf@1", all_right), row("sample@1", half), row("greedy", all_right)]
    rows = {real_tables.key_of(one): one for one in some}
    lines = real_tables.list_of_claims(rows, MODEL, "svamp").splitlines()
    assert lines[0].startswith("- holds here") and "+50.0 (+" in lines[0]
    assert lines[1].startswith("- not measured")
    assert lines[2].startswith("- open")  # equal on every problem
    table = real_tables.decoding_table(rows, MODEL, "svamp")
    assert "| greedy | 1 x 1 | 100.0% |" in table and "| 1.00 |" in table
    missing = real_tables.list_of_missing(rows, MODEL).splitlines()
    assert missing[0].startswith("- svamp: sample@0.1; ") and "; EM-FT, asdiv; " in missing[0]
    assert missing[1].startswith("- gsm8k: greedy; ")


def test_the_seeds_of_a_trained_run_are_one_line():
    some = [row("greedy", "1 0"), row("sample@1", "1 3", n=4, token="0.02", token_low="0.01",
                                      token_high="0.03")]
    for seed, right in (1, "4 4"), (2, "0 4"):
        run = f"EM-RL token, asdiv, {seed}"
        curves = {f"{curve}_by_step": f"0.5 {seed}" for curve in real_tables.CURVES}
        some += [row("greedy", "1 1", run=run),
                 row("sample@1", right, n=4, run=run, kl="0.5", **curves)]
    faster = "EM-RL token --lr 1e-5, asdiv, 1"  # a flag more than those of RUNS
    some += [row("greedy", "0 0", run=faster), row("sample@1", "0 0", n=4, run=faster)]
    summed = "EM-RL token --reward-norm sum, asdiv, 1"
    some += [row("greedy", "0 0", run=summed), row("sample@1", "0 0", n=4, run=summed)]
    rows = {real_tables.key_of(one): one for one in some}
    lines = real_tables.training_table(rows, MODEL, "svamp").splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [
        "| base", "| EM-RL token", "| EM-RL token --lr 1e-5", "| EM-RL token --reward-norm sum",
    ]
    assert lines[1].startswith("| EM-RL token | asdiv | 2 | 100.0% | +50.0 (")
    assert "| 75.0% | +25.0 (" in lines[1] and lines[2].count("| -50.0 (") == 2
    answers = real_tables.answers_table(rows, MODEL, "svamp").splitlines()[2:]
    assert [line.split(" | ")[0] for line in answers] == [line.split(" | ")[0] for line in lines]
    assert real_tables.controls_table(rows, MODEL, "svamp") == "Not measured yet."
    outcome = real_tables.outcome_table(rows, MODEL)
    assert "| EM-RL token, asdiv: svamp | +2.0 (+1.0 to +3.0) | +25.0 (" in outcome
    assert "--lr 1e-5" in outcome and "--reward-norm" not in outcome  # a sum is not foretold
    assert real_tables.training_table(rows, MODEL, "gsm8k") == "Not measured yet."
    curves = real_tables.curves_of(rows, MODEL)
    assert list(curves) == ["EM-RL token, asdiv"]  # with its first seed
    assert list(curves["EM-RL token, asdiv"]["length"]) == [0.5, 1]
    for steps, run in ("0.5 1 0.25", "longer, asdiv"), ("0.5 1.25", "another, asdiv"):
        curves = {f"{curve}_by_step": steps for curve in real_tables.CURVES}
        more = row("sample@1", "1 1", run=f"{run}, 1", **curves)
        rows[real_tables.key_of(more)] = more
    assert list(real_tables.curves_of(rows, MODEL)) == ["longer, asdiv", "another, asdiv"]


def test_a_run_is_compared_with_the_controls_that_saw_its_prompts():
    some = [row(method, "1 1 0 0") for method in real_tables.PLAIN]
    rights = {
        "EM-FT, asdiv, 1": "1 1 1 1", "control: random, asdiv, 1": "1 1 1 0",
        "control: format, asdiv, 1": "0 0 0 0", "majority, gsm8k-train, 1": "1 1 1 1",
        "control: random, gsm8k-train, 1": "1 1 1 1",
    }
    for run, right in rights.items():
        some += [row(method, right, run=run) for method in real_tables.PLAIN]
    rows = {real_tables.key_of(one): one for one in some}
    lines = real_tables.controls_table(rows, MODEL, "svamp").splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| EM-FT", "control: random"], ["| EM-FT", "control: format"],
        ["| majority", "control: random"],
    ]
    assert lines[0].count("| +25.0 (") == 2 and lines[1].count("| +100.0 (") == 2
    assert lines[2].count("| +0.0 (") == 2
    trained = {key: one for key, one in rows.items() if key[1]}  # without the base model
    for made in real_tables.training_table, real_tables.controls_table, real_tables.answers_table:
        assert made(trained, MODEL, "svamp") == "Not measured yet."


def test_a_figure_has_a_line_for_each_run_and_no_two_alike(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "Figure", lambda **how: drawn.append(Figure(**how)) or drawn[-1])
    curves = {f"run {i}": {name: [1, 2] for name in real_tables.CURVES} for i in range(16)}
    real.draw_training(curves, real_tables.CURVES, tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes()[1:4] == b"PNG"
    for axis in drawn[0].axes:
        lines = [(one.get_color(), one.get_linestyle(), one.get_marker()) for one in axis.lines]
        assert len(set(lines)) == len(curves)


def test_the_adapters_are_small_and_belong_to_a_model_of_the_hub():
    folder = ROOT / "findings/real"
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(config["r"] == 8 in tensor.shape for tensor in tensors.values())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6


def test_examples_are_the_first_of_each_kind_of_change(tmp_path, capsys):
    run, rights = "EM-RL token, asdiv, 1", {"": "0 0 1 1", "EM-RL token, asdiv, 1": "1 1 0 1"}
    rows = {}
    for who, right in rights.items():
        rows[MODEL, who, "svamp", "greedy", "1"] = {"right": right}
        lines = []
        for i in range(5):
            text = "the same" if i == 3 else f"{who}\n{i}"
            lines.append(dict(id=f"id-{i}", answer="7", response=text, length=3, entropy=0.5))
        path = tmp_path / f"{who} svamp greedy 1 x 12, 1.jsonl".strip()
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    real.print_examples(rows, run, "svamp", tmp_path, settings(name=MODEL))
    printed = capsys.readouterr().out
    assert re.findall(r"id-\d", printed) == ["id-0", "id-2"]
    assert printed.startswith(f"### {run}\n")
    assert f"After: right, 3 tokens, 0.500 nats a token.\n\n```text\n{run}\n0\n```" in printed
