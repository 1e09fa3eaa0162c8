"""The tiny world, and the findings on it."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

from tasks.answers import last_box
from tests.models import ROOT

sys.path.insert(0, str(ROOT / "tiny"))
import findings
import prepare
import report


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


def test_the_model_is_small_and_its_corpus_has_three_styles():
    assert sum(file.stat().st_size for file in (ROOT / "tiny/base").iterdir()) < 3e6
    stream = prepare.documents(0, prepare.HABITS, 1.0, ())
    texts = [next(stream)[1] for _ in range(2000)]
    assert all(last_box(text) is not None for text in texts)
    direct = np.mean([text.startswith("\\boxed") for text in texts])
    rambling = np.mean(["=" not in text and "," in text for text in texts])
    assert direct == pytest.approx(np.mean(list(prepare.HABITS["direct"].values())), abs=0.04)
    assert rambling == pytest.approx(prepare.HABITS["rambling"], abs=0.02)


def test_jobs_have_their_own_places_and_come_behind_those_they_wait_for():
    uses = list(findings.plan(findings.FULL, ROOT / "runs/x"))
    jobs = findings.jobs_of(uses)
    outs = [job.out for job in jobs]
    assert len(set(outs)) == len(outs)
    for i, job in enumerate(jobs):
        assert {needed.out for needed in job.after} <= set(outs[:i])
    used = {}
    for experiment, setting, job, _ in uses:
        assert job in jobs  # one place, one command
        used.setdefault((experiment, setting), []).append(job)
    assert len(used["kl", "0.001"]) == 3
    assert used["kl", "0.001"] == used["norm", "token, mean"]


def test_a_guard_would_have_stopped_where_the_run_collapsed():
    rows = []
    for step in range(20):
        entropy = 0.5 if step >= 10 else 0.1
        rows.append({"step": step, "entropy": entropy, "length": 20, "truncated": 0.0})
    # steps 10 to 12 have 5 times the entropy of the first three, 9 to 11 have 3.7 times
    assert findings.guard_stop(rows) == 12
    assert np.isnan(findings.guard_stop(rows[:12]))


def job_of(folder, name, code, *after):
    return findings.Job(folder / name, ["-c", "import sys; out = sys.argv[2]\n" + code], after)


MAKE = "open(out, 'a').write('x')"


def test_what_is_finished_is_skipped_unless_something_else_is_asked_for(tmp_path):
    first = job_of(tmp_path, "first", MAKE)
    second = job_of(tmp_path, "second", MAKE, first)
    for _ in range(2):
        findings.execute([first, second], 2, tmp_path)
    assert first.out.read_text() == second.out.read_text() == "x"
    findings.execute([job_of(tmp_path, "first", MAKE + "; " + MAKE)], 1, tmp_path)
    assert first.out.read_text() == "xxx"


def test_a_job_that_fails_is_named_and_stops_what_waits(tmp_path):
    bad = job_of(tmp_path, "bad", "raise ValueError('what went wrong')")
    later = job_of(tmp_path, "later", MAKE, bad)
    with pytest.raises(RuntimeError, match="(?s)^bad failed with exit code 1.*what went wrong"):
        findings.execute([bad, later], 2, tmp_path)
    assert not later.out.exists()


def test_findings_do_not_start_beside_another_nor_beside_the_jobs_of_a_killed_one(tmp_path):
    held = findings.lock(tmp_path)
    inode = os.fstat(held.fileno()).st_ino
    with pytest.raises(SystemExit, match="in use by another"):
        findings.execute([], 1, tmp_path)
    sleep = [sys.executable, "-S", "-c", "import time; time.sleep(100)"]
    orphan = subprocess.Popen(sleep, pass_fds=[held.fileno()])
    held.close()
    with pytest.raises(SystemExit, match="jobs of one that was killed"):
        findings.execute([], 1, tmp_path)
    orphan.kill()
    orphan.wait()
    look = f"""import os
for name in os.listdir("/dev/fd"):
    if os.path.exists("/dev/fd/" + name) and os.stat("/dev/fd/" + name).st_ino == {inode}:
        open(out, "w")"""
    job = job_of(tmp_path, "look", look)
    findings.execute([job], 1, tmp_path)
    assert job.out.exists(), "a job has not inherited the lock"


def test_numbers_of_all_seeds_are_collected_and_survive_their_csv(tmp_path):
    uses = []
    for seed, gain in (1, 0.1), (2, -0.07):
        job = findings.Job(tmp_path / f"{seed}.json", [], ())
        gains = {"gain greedy": gain, "gain T = 1": 0.1}
        parts = {"token": {"forecast": 0.05, "worked, wrong": np.nan}, "gains": gains}
        job.out.write_text(json.dumps(parts))
        uses += [("fails", "0, token", job, "gains"), ("rise", "base, token", job, "token")]
    found = findings.collect(uses + [("fails", "0, token", job, "token")])
    assert found["fails", "0, token", "gain greedy"] == [0.1, -0.07]
    assert found["rise", "base, token", "forecast"] == [0.05, 0.05]
    assert np.isnan(found["fails", "0, token", "sign right (greedy)"])  # 1.5 points have none
    assert found["fails", "0, token", "sign right (T = 1)"] == [1.0]
    findings.write_csv(tmp_path / "findings.csv", found)
    read = findings.read_csv(tmp_path / "findings.csv")
    assert read.keys() == found.keys()
    for key, values in found.items():
        assert read[key] == pytest.approx(values, nan_ok=True)


@pytest.mark.parametrize("metric, values, shown", [
    ("greedy", [0.5, 0.7], "60.0% ± 14.1%"),
    ("greedy", [0.5], "50.0%"),
    ("greedy", [float("nan")], ""),
    ("gain greedy", [-0.1, 0.3], "+10.0% ± 28.3%"),
    ("guard stops at step", [12.0, float("nan")], "12, never"),
    ("diagnosis", [-1.0], "harms"),
    ("sign right (greedy)", [float("nan")], "no sign"),
])
def test_a_cell_shows_the_unit_of_its_metric(metric, values, shown):
    assert report.cell(metric, values) == shown


@pytest.mark.parametrize("a, b, relation", [
    ([0.5, 0.5], [0.515, 0.515], "level with"),  # 512 problems do not tell 1.5 points
    ([0.9, 0.92], [0.5, 0.53], "above"),
    ([0.9, 0.1], [0.4, 0.6], "level with"),
    ([0.1], [0.5], "below"),
])
def test_two_settings_differ_only_beyond_their_noise(a, b, relation):
    assert report.compared(a, b) == relation


def test_findings_md_is_what_its_csv_says():
    text = report.report(findings.read_csv(ROOT / "tiny/findings.csv"), 0, 3, "")
    own = (ROOT / "tiny/findings.md").read_text()
    assert own[own.index("## ") :] == text[text.index("## ") :] and "uncommitted" not in own


def test_the_figures_can_be_drawn(tmp_path):
    found = findings.read_csv(ROOT / "tiny/findings.csv")
    row = {"val_greedy": 0.5, "val_sampled": 0.4, "entropy": 0.3}
    rows = [{"step": 0} | row, {"step": 10} | row]
    report.figures(found, {"token": [rows, rows]}, tmp_path)
    for picture in ROOT.glob("assets/findings-*.png"):
        assert (tmp_path / picture.name).stat().st_size > 10_000


def test_numbers_in_readme_and_course_are_those_of_findings_csv():
    """Tables stand under <!-- table: experiment; first column; metrics, ... --> and numbers
    before <!--experiment|setting|metric-->."""
    readme = (ROOT / "README.md").read_text()
    course = (ROOT / "course/README.md").read_text()
    found = findings.read_csv(ROOT / "tiny/findings.csv")
    mark = r"<!-- table: (.*?); (.*?); (.*?) -->\n\n"
    tables = re.findall(mark + r"(.*?)\n\n", readme, re.DOTALL)
    for experiment, first, metrics, shown in tables:
        assert shown == report.table(found, experiment, first, metrics.split(", "))
    numbers = re.findall(r"([+-]?[\d.]+)( %| points)?<!--(.*?)-->", readme + course)
    assert len(tables) == 2 and len(numbers) > 10
    for number, percent, key in numbers:
        mean = np.mean(found[tuple(key.split("|"))]) * (100 if percent else 1)
        last_digit = 10.0 ** -len(number.partition(".")[2])
        assert float(number) == pytest.approx(mean, abs=0.5001 * last_digit), key
    section = readme[readme.index("## What it finds") : readme.index("## A model of your own")]
    held = r"[+-]?[\d.]+( %| points)?<!--.*?-->|^\|.*$|β = [\d.]+|0\.1 nats"
    untold = re.findall(r"\d+\.\d+", re.sub(held, "", section, flags=re.MULTILINE))
    assert not untold, "numbers that no command has printed"
    for script, lines in re.findall(r"`(em_\w+\.py)` \|.*\| (\d+) lines \|", readme):
        assert int(lines) == len((ROOT / script).read_text().splitlines())
