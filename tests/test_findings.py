"""The findings on the tiny world: their jobs, their numbers, and the texts that say them."""
import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from tasks.errors import UserError
from tests.models import ROOT

sys.path.insert(0, str(ROOT / "findings"))
import figures
import jobs
import measure
import report

import findings
from tiny import prepare


def test_jobs_have_their_own_places_and_come_behind_those_they_wait_for():
    uses = list(findings.plan(findings.FULL | {"folder": ROOT / "runs/x"}))
    ordered = jobs.in_order(job for _, _, job, _ in uses)
    outs = [job.out for job in ordered]
    assert len(set(outs)) == len(outs)
    for i, job in enumerate(ordered):
        assert {needed.out for needed in job.after} <= set(outs[:i])
    used = {}
    for experiment, setting, job, _ in uses:
        assert job in ordered  # one place, one command
        used.setdefault((experiment, setting), []).append(job)
    assert len(used["kl", "0.001"]) == 3
    assert used["kl", "0.001"] == used["norm", "token, mean"] == used["coef", "0"]


def test_a_guard_would_have_stopped_where_the_run_collapsed():
    rows = []
    for step in range(20):
        entropy = 0.5 if step >= 10 else 0.1
        rows.append({"step": step, "entropy": entropy, "length": 20, "truncated": 0.0})
    # steps 10 to 12 have 5 times the entropy of the first three, 9 to 11 have 3.7 times
    assert measure.guard_stop(rows) == 12
    assert np.isnan(measure.guard_stop(rows[:12]))


def job_of(folder, name, code, *after):
    return jobs.Job(folder / name, ["-c", "import sys; out = sys.argv[2]\n" + code], after)


MAKE = "open(out, 'a').write('x')"


def test_what_is_finished_is_skipped_unless_something_else_is_asked_for(tmp_path):
    first = job_of(tmp_path, "first", MAKE)
    second = job_of(tmp_path, "second", MAKE, first)
    for _ in range(2):
        jobs.execute([first, second], 2, tmp_path)
    assert first.out.read_text() == second.out.read_text() == "x"
    jobs.execute([job_of(tmp_path, "first", MAKE + "; " + MAKE)], 1, tmp_path)
    assert first.out.read_text() == "xxx"


def test_a_run_of_other_settings_is_made_afresh_and_not_resumed(tmp_path):
    checkpoint = tmp_path / "run/checkpoint"
    code = "import os; os.makedirs(out + '/checkpoint')\n"
    code += "open(out + '/checkpoint/state.pt', 'w').write(sys.argv[1])"
    for settings in "a", "b":
        jobs.execute([job_of(tmp_path, "run", f"{code}  # {settings}")], 1, tmp_path)
        assert (checkpoint / "state.pt").read_text() == "--out"


def test_a_job_that_fails_is_named_and_stops_what_waits(tmp_path):
    bad = job_of(tmp_path, "bad", "raise ValueError('what went wrong')")
    later = job_of(tmp_path, "later", MAKE, bad)
    with pytest.raises(UserError, match="^bad failed with exit code 1.*what went wrong$"):
        jobs.execute([bad, later], 2, tmp_path)
    assert not later.out.exists()


def test_two_processes_do_not_do_the_same_jobs(tmp_path):
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from engine.files import lock; "
    code += f"held = lock({str(tmp_path)!r}); print('held', flush=True); time.sleep(100)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process"):
            jobs.execute([], 1, tmp_path)
    finally:
        other.kill()
        other.wait()


def test_numbers_of_all_seeds_are_collected_and_survive_their_csv(tmp_path):
    uses = []
    for seed, gain in (1, 0.1), (2, -0.07):
        job = jobs.Job(tmp_path / f"{seed}.json", [], ())
        gains = {"gain greedy": gain, "gain T = 1": 0.1}
        parts = {"token": {"forecast": 0.05, "worked wrong": np.nan}, "gains": gains}
        job.out.write_text(json.dumps(parts))
        uses += [("fails", "0, token", job, "gains"), ("surest", "token", job, "token")]
    found = findings.collect(uses + [("fails", "0, token", job, "token")])
    assert found["fails", "0, token", "gain greedy"] == [0.1, -0.07]
    assert found["surest", "token", "forecast"] == [0.05, 0.05]
    assert np.isnan(found["fails", "0, token", "sign right (greedy)"])  # 1.5 points have none
    assert found["fails", "0, token", "sign right (T = 1)"] == [1.0]
    report.write_csv(tmp_path / "findings.csv", found)
    read = report.read_csv(tmp_path / "findings.csv")
    assert read.keys() == found.keys()
    for key, values in found.items():
        assert read[key] == pytest.approx(values, nan_ok=True)


def test_a_run_s_peak_end_and_kl_are_read_from_its_metrics():
    rows = [{"step": 0, "val_greedy": 0.5}, {"step": 1, "kl": 0.0, "length": 10, "flops": 1e9}]
    for step, greedy in (5, 0.96), (10, 0.7):
        row = {"step": step, "val_greedy": greedy, "kl": 0.01 * step, "length": 20, "flops": 1e9}
        rows.append(row)
    for row in rows:
        row |= {"val_sampled": 0.4, "val_entropy": 0.3, "val_length": 20, "entropy": 0.3,
                "truncated": 0.0}
    found = measure.of_run(rows)
    assert (found["peak at step"], found["peak greedy"], found["greedy"]) == (5, 0.96, 0.7)
    assert found["steps to 95 %"] == 5 and found["FLOPs"] == 3
    assert found["KL at peak"] == pytest.approx(1.0) and found["KL at end"] == pytest.approx(2.0)
    assert measure.of_run(rows[:1])["KL at peak"] == 0
    del rows[-1]["kl"]  # no reference: the KL is unknown, and not 0
    assert np.isnan(measure.of_run(rows)["KL at end"])


def test_families_of_problems_are_what_their_names_say():
    for family, limits in findings.FAMILIES["threshold"].items():
        problems = measure.problems_of(limits, 20)
        assert len({problem["id"] for problem in problems}) == 20
        signs = {sign for problem in problems for sign in problem["prompt"][24:] if sign in "+-*"}
        lengths = {problem["operations"] for problem in problems}
        assert lengths <= set(limits.get("lengths", prepare.LENGTHS)), family
        assert signs == set(limits.get("signs", "+-*")), family


def test_measured_answers_count_the_different_right_ones():
    greedy = [sample("a", "1", True), sample("b", "2", False)]
    sampled = [sample("a", answer, True) for answer in "1144"]
    sampled += [sample("b", answer, answer == "3") for answer in "1233"]
    answers = measure.of_answers(greedy, sampled)["answers"]
    assert answers["distinct right answers"] == (2 + 1) / 2
    assert answers["distinct answers"] == (2 + 3) / 2
    assert answers["greedy"] == 0.5 and answers["T = 1"] == 6 / 8


def test_an_example_s_entropies_stand_below_their_tokens(monkeypatch):
    """Guards against digits that stand beside their tokens, and an end that is not shown."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "findings/findings.md").read_text(encoding="utf-8")
    lines = measure.examples({"base": "tiny/base"}).splitlines()[1:-1]
    assert len(lines) == 3 * 3 and set(lines[::3] + lines[1::3]) <= set(page.splitlines())
    for answer, below in zip(lines[1::3], lines[2::3]):
        assert answer.endswith(" end") and len(below) == len(answer.removesuffix("end"))
        digits = [place for place, char in enumerate(below) if char.isdigit()]
        starts = [match.start() for match in re.finditer(r"\\boxed{|, | end|\S", answer[22:])]
        assert digits == [22 + start for start in starts]


def sample(problem, answer, correct):
    return {
        "id": problem, "response": rf"\boxed{{{answer}}}", "correct": correct, "answered": True,
        "truncated": False, "length": 3, "entropy": float(answer), "logprob": -float(answer),
        "flops": 1.0, "seconds": 0.0, "seed": 1,
    }


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


FOUND = {
    ("kl", "0", "greedy"): [0.5, 0.52],
    ("kl", "1.5", "greedy"): [0.2],
    ("fails", "0, token", "gain greedy"): [-0.078],
}


def test_numbers_are_put_where_a_text_wants_them():
    text = "# Title\n\n<!-- table: kl; β; greedy -->\n\nold\n\nEM: 7.1 %<!--kl|0|greedy-->, "
    text += "+9 points<!--fails|0, token|gain greedy-->, 0.50<!--kl|1.5|greedy-->, "
    text += "3<!--no|such|x-->\n\n<!-- made by -->\n\nold\n\nend\n"
    filled = report.fill(text, FOUND, {"made by": "a command"})
    assert "| 0 | 51.0% ± 1.4% |\n| 1.5 | 20.0% |\n\nEM: 51.0 %<!--kl|0|greedy-->" in filled
    assert "-8 points<!--" in filled and "0.20<!--" in filled and "3<!--no|such|x-->" in filled
    assert "\n\na command\n\nend\n" in filled and "old" not in filled
    assert report.fill(filled, FOUND) == filled


def test_the_texts_say_what_the_csv_says():
    found = report.read_csv(ROOT / "findings/findings.csv")
    for name, count in ("findings/findings.md", 30), ("README.md", 12), ("course/README.md", 0):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert report.fill(text, found) == text, name
        marks = re.findall(r"<!-- \w+: (\w+)|<!--(\w+)\|", text)
        assert len(marks) >= count, name
        assert {first or second for first, second in marks} <= {key[0] for key in found}, name
    text = (ROOT / "findings/findings.md").read_text(encoding="utf-8")
    assert "-dirty" not in text and "not measured" not in text


def test_every_row_of_the_tables_is_used():
    """Guards against a row that nobody runs or shows, since its experiment is misspelled."""
    text = (ROOT / "findings/findings.md").read_text(encoding="utf-8")
    for row in rows_of("claims.csv"):
        assert f" here: {row['claim']}\n" in text
    uses = findings.plan(findings.FULL | {"folder": ROOT / "runs/x"})
    planned = {experiment for experiment, *_ in uses}
    assert {row["experiment"] for row in rows_of("experiments.csv")} <= planned


def rows_of(name):
    with (ROOT / "findings" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_figures_can_be_drawn(tmp_path):
    found = report.read_csv(ROOT / "findings/findings.csv")
    rows = [{"step": 0, "val_greedy": 0.5}, {"step": 10, "val_greedy": 0.7}]
    curves = {name: [rows, rows] for name in ("token", "token, fast", "random", "random, fast")}
    figures.draw_all(found, curves, tmp_path)
    pictures = list(ROOT.glob("assets/findings-*.png"))
    assert {path.name for path in pictures} == {path.name for path in tmp_path.iterdir()}
    for picture in pictures:
        assert (tmp_path / picture.name).stat().st_size > 10_000
        assert picture.name in (ROOT / "findings/findings.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("flags, place, changed", [
    ([], "findings", {"README.md", "findings/findings.md"}),
    (["--quick"], "runs/findings-quick", set()),
])
def test_the_committed_files_are_written_by_a_full_run_alone(
    flags, place, changed, tmp_path, monkeypatch,
):
    """Guards against paths that a move of files leaves behind: the CSV would have gone to tiny/."""
    before = {}
    for page in "README.md", "course/README.md", "findings/findings.md":
        text = (ROOT / page).read_text(encoding="utf-8")
        before[tmp_path / page] = text.replace("100.0", "99.9")
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(before[tmp_path / page], encoding="utf-8")
    found = report.read_csv(ROOT / "findings/findings.csv")
    done = dict(plan=[], execute=60.0, collect=found, examples="", draw_all=None)
    for name, result in done.items():
        monkeypatch.setattr(findings, name, lambda *_, result=result: result)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(findings, "ROOT", tmp_path)
    findings.main(flags)
    now = {str(path.relative_to(tmp_path)) for path in before
           if path.read_text(encoding="utf-8") != before[path]}
    assert now == changed
    written = tmp_path / place / "findings.csv"
    assert written.read_text(encoding="utf-8") == (ROOT / "findings/findings.csv").read_text(
        encoding="utf-8")
    assert "100.0%" in (tmp_path / place / "findings.md").read_text(encoding="utf-8")


def test_no_number_in_readme_s_findings_is_without_its_source():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## What it finds") : readme.index("## A model of your own")]
    held = r"[+-]?[\d.]+( %| points)?<!--.*?-->|<!-- .*? -->|^\|.*$|--beta [\d.]+"
    untold = re.findall(r"\d+\.\d+", re.sub(held, "", section, flags=re.MULTILINE))
    assert not untold, "numbers that no command has printed"
