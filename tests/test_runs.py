"""The training scripts as they are run: what they leave, resume, refuse and survive."""
import argparse
import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import filelock
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from transformers import AutoTokenizer

import em_ft
import em_inf
import em_rl
import eval as evaluation
from engine import report, run
from engine.guard import collapsed
from engine.inputs import digest_of_model
from engine.load import load_model
from engine.optimizer import MasterAdamW
from tasks.errors import UserError
from tests.models import FEW, NEEDS_POSIX, ROOT, TINY_BASE, random_model

FLAGS = (
    f"--device cpu --data {FEW} --data-size 32 --prompts 4 --val-size 4 --max-new-tokens 8 "
    "--steps 4 --eval-every 2 --save-every 2 "
)
BOTH = pytest.mark.parametrize("script", [em_rl, em_ft])
NEEDS_PEFT = pytest.mark.skipif(not find_spec("peft"), reason="--lora needs peft")
SIGNALS = signal.SIGINT, signal.SIGTERM


def train(flags, script=em_rl):
    script.main((FLAGS + flags).split())


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    train(f"--out {path}")
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, finished):
    """Each test has a finished run, draws no figures, and restores signals."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot", lambda *_: None)
    shutil.copytree(finished, "run")
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


def metrics(folder):
    """The rows of metrics.csv, without times."""
    rows = run.read_rows(Path(folder, "metrics.csv"))
    return [row | {"seconds": 0} for row in rows]


def outcome(folder):
    files = [*Path(folder).glob("*/*.safetensors"), Path(folder, "samples.jsonl")]
    return metrics(folder), {file.relative_to(folder): file.read_bytes() for file in files}


def saved_step(folder):
    return torch.load(f"{folder}/checkpoint/state.pt")["step"]


def everything():
    paths = [path for path in Path().rglob("*") if path.name != "lock"]
    return {path: path.is_file() and path.read_bytes() for path in paths}


def fails(flags, words, script=em_rl, always=FLAGS):
    """A command ends with one line that holds these words."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as end:
        script.main((always + flags).split())
    line = str(end.value)
    if line == "2":  # argparse has printed it
        line = printed.getvalue().strip().split("\n")[-1]
    assert "\n" not in line and all(word in line for word in words.split()), line


# ----------------------------------------------------------------------- runs that go well


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "gpt2"])
def test_hybrids_and_dropout_train_resume_are_evaluated_and_decode(kind, capsys):
    """Guards against 'LinearAttentionLayer' object has no attribute 'batch_repeat_interleave', and
    against training with the dropout of a config."""
    random_model(kind).save_pretrained("model")
    AutoTokenizer.from_pretrained(TINY_BASE).save_pretrained("model")
    data = f"--data {ROOT}/tiny/test.jsonl "
    flags = f"{data} --model model --val {ROOT}/tiny/test.jsonl --recompute --eval-every 1 --out"
    train(f"{flags} a --steps 2")
    train(f"{flags} b --steps 1")
    em_rl.main("--resume b --steps 2".split())
    assert outcome("a") == outcome("b") and metrics("a")[2]["grad_norm"] > 0
    small = f"{data} --limit 3 --seeds 1 --max-new-tokens 8 --device cpu".split()
    evaluation.main(["--model", "a/checkpoint", "--out", "e", *small])
    em_inf.main(["--model", "a/checkpoint", "--decode", "em-inf", *small])
    em_inf.main("--model model --prompt 1+1? --max-new-tokens 8 --device cpu".split())
    said = capsys.readouterr().out
    assert said.count("EMInf: entropy") == 2
    assert said.count("dropout: ") == (3 if kind == "gpt2" else 0)
    assert all(float(gap) < 1e-5 for gap in re.findall(r"trainer differ by (\S+)", said))


@pytest.mark.parametrize("script, flags", [
    (em_rl, ""),
    (em_rl, "--updates 2 --keep-best --reward random"),
    (em_rl, "--dtype bfloat16 --offload --val none"),
    (em_ft, "--beta 0.1 --rollouts 2 --keep-best"),
    pytest.param(em_rl, "--lora 4 --dtype bfloat16", marks=NEEDS_PEFT),
])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(script, flags):
    for name, steps in ("a", 4), ("b", 4), ("c", 2):
        train(f"{flags} --out {name} --steps {steps}", script)
    script.main("--resume c --steps 4".split())
    assert outcome("a") == outcome("b") == outcome("c")
    assert Path("a/best").exists() == ("--keep-best" in flags)
    assert Path("a/result.json").read_text() == Path("c/result.json").read_text()


@pytest.mark.parametrize("script, flags", [
    (em_rl, "--updates 2 --clip 0.1 --beta 0 --reward sequence --reward-norm sum"),
    (em_rl, "--reward correct --advantage grpo --guard 0"),
    (em_rl, "--reward correct+token --rollouts 2 --max-prompt-tokens 30 --seed 0"),
    (em_rl, "--reward consistency --temperature 0.7 --offload"),
    (em_rl, "--reward length --recompute --grad-clip 0.1 --entropy-coef 0.001"),
    (em_rl, "--reward self-certainty --entropy-coef exact"),
    (em_ft, "--loss sft --recompute --rollouts 4 --rollout-batch 3"),
    (em_ft, "--temperature 0.7 --updates 4 --dtype bfloat16"),
])
def test_every_option_runs(script, flags):
    train(f"--steps 2 --val none --out new {flags}", script)
    row = metrics("new")[-1]
    assert row["step"] == 2 and row["entropy"] > 0 and math.isfinite(row["grad_norm"])
    assert row["grad_norm"] >= 0


@pytest.mark.parametrize("name", em_rl.REWARDS)
def test_only_correct_reads_labels(name):
    lines = (ROOT / "tiny/train.jsonl").read_text().splitlines()[:32]
    bare = [json.dumps({"prompt": json.loads(line)["prompt"]}) for line in lines]
    Path("bare.jsonl").write_text("\n".join(bare))
    flags = f"--data bare.jsonl --val none --steps 1 --out new --reward {name}"
    if "correct" in name:
        fails(flags, "bare.jsonl answer")
    else:
        train(flags)
        assert metrics("new")[1]["reward_std"] >= 0


@NEEDS_PEFT
@BOTH
def test_adapters_start_as_the_base_leave_it_as_it_is(script):
    flags = "--steps 2 --val none --beta 0.1 --lr 1e-3 --device cpu"
    train(f"{flags} --out plain", script)
    train(f"{flags} --lora 4 --out adapters --recompute", script)
    first, second = metrics("adapters")[1:]
    for key in "entropy", "length":
        assert first[key] == pytest.approx(metrics("plain")[1][key], rel=1e-5)
    assert abs(first["kl"]) < 1e-7 < second["kl"]
    args = argparse.Namespace(
        resume="adapters", lora=4, model=TINY_BASE, seed=1, template=(), recompute=False, beta=0.1
    )
    model, _, adapters = run.load(args, "cpu", torch.float32)
    ids = torch.arange(40, 60)[None]
    plain, loaded = (
        load_model(name, "cpu")[0](ids).logits.softmax(-1)
        for name in (TINY_BASE, "adapters/checkpoint")
    )
    trained = model(ids).logits.softmax(-1)
    with adapters.disable_adapter():
        frozen = model(ids).logits.softmax(-1)
    for probs, same in (frozen, plain), (trained, loaded):
        assert (probs - same).abs().max() < 1e-5 < 1e-3 < (trained - plain).abs().max()


@pytest.mark.parametrize("dtype, settings, told", [
    (torch.bfloat16, dict(beta=0.1, lora=None), "4.0 GB"),  # 2 + 2 and 4 + 4 + 8 bytes each
    (torch.bfloat16, dict(beta=0.0, lora=None), "3.6 GB"),
    (torch.float32, dict(beta=0.1, lora=None), "4.0 GB"),  # 4 + 4 and 4 + 8
    (torch.float32, dict(beta=0.1, lora=8), "3.2 GB"),  # is its own reference
])
def test_the_memory_of_a_large_run_is_said_before_it_is_needed(dtype, settings, told, capsys):
    model = torch.nn.Linear(10_000, 20_000, bias=False, dtype=dtype, device="meta")
    run.print_memory(model, argparse.Namespace(**settings))
    assert told in capsys.readouterr().out
    run.print_memory(torch.nn.Linear(10, 10), argparse.Namespace(**settings))
    assert not capsys.readouterr().out


@NEEDS_PEFT
def test_adapters_without_a_tokenizer_have_that_of_their_base():
    train("--steps 2 --val none --lora 4 --out new")
    folder = Path("new/checkpoint")
    for path in folder.iterdir():
        if not path.name.startswith("adapter"):
            path.unlink()
    _, tokenizer = load_model(str(folder), "cpu")
    assert tokenizer.get_vocab() == load_model(TINY_BASE, "cpu")[1].get_vocab()
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace(TINY_BASE, "nobody/nothing"))
    with pytest.raises(UserError, match="^model nobody/nothing: its tokenizer can't be loaded"):
        load_model(str(folder), "cpu")


@NEEDS_PEFT
def test_adapters_are_refused_where_they_cannot_be_trained():
    train("--steps 2 --val none --lora 4 --out new")
    fails("--model new/checkpoint --val none --data bare", "bare")
    fails(f"--model new/checkpoint --val none --data {ROOT}/tiny/train.jsonl", "adapters --lora")
    fails("--resume new --lora 8", "--lora 8 4")
    Path("new/checkpoint/adapter_model.safetensors").write_bytes(b"")
    fails("--resume new --steps 4", "new/checkpoint adapters")


@BOTH
def test_micro_batches_of_any_size_give_the_same_step(script):
    for budget in "1", "90", "9999 --recompute":
        train(f"--steps 2 --val none --beta 0.1 --out {budget[:2]} --budget {budget}", script)
        for row, same in zip(metrics(budget[:2]), metrics("1")):
            assert row == pytest.approx(same, rel=1e-4, abs=1e-7)


def test_each_pass_over_the_prompts_has_an_order_of_its_own():
    train = [{"prompt": str(i)} for i in range(5)]
    args = argparse.Namespace(prompts=4, rollouts=2, seed=1)
    steps = [run.problems_of_step(step, train, args) for step in range(1, 6)]
    assert all(problems[::2] == problems[1::2] for problems in steps)
    order = [int(problem["prompt"]) for problems in steps for problem in problems[::2]]
    passes = [order[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(some) == [0, 1, 2, 3, 4] for some in passes)
    assert len({tuple(some) for some in passes}) > 1
    last = run.problems_of_step(2**31 - 1, train, args)  # no order is made before its time
    assert len(last) == 8


def test_a_training_prompt_with_tests_asks_for_a_program():
    """Coding prompts were trained under the system prompt that asks for a box."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    coding = {"id": "f", "prompt": "f?", "tests": "assert f() == 1"}
    problems = [coding, {"id": "2", "prompt": "2?"}]
    args = argparse.Namespace(max_prompt_tokens=999, prompts=2, data="")
    texts = [tokenizer.decode(p["ids"]) for p in run.prepare(problems, tokenizer, None, args)]
    assert ["boxed" in text for text in texts] == [False, True] and "python block" in texts[0]


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt2"])
def test_em_rl_runs_on_architecture(kind):
    random_model(kind).to(torch.bfloat16).save_pretrained("model")
    AutoTokenizer.from_pretrained(TINY_BASE).save_pretrained("model")
    data = ROOT / "tiny/train.jsonl"
    train(f"--model model --data {data} --val none --steps 2 --lr 1e-4 --out new")
    _, first, last = metrics("new")
    assert abs(first["kl"]) < 1e-6 < last["kl"]


def test_the_guard_ends_a_run_as_its_last_step_does(monkeypatch):
    monkeypatch.setattr(em_rl, "collapsed", lambda rows, _: "why" if len(rows) == 4 else None)
    train("--out new")
    assert saved_step("new") == 3 and Path("new/result.json").exists()
    assert "val_greedy" in metrics("new")[3]


def test_guard_sees_collapse_and_leaves_a_healthy_run_alone():
    def verdict(factor=4, **change):
        healthy = {"length": 20.0, "entropy": 0.2, "truncated": 0.0}
        rows = [healthy] * 3 + [healthy | change] * 3
        return collapsed([{"step": i} | row for i, row in enumerate(rows, 1)], factor)

    assert verdict(length=34) is verdict(length=120, factor=0) is None
    assert "120.0 tokens" in verdict(length=120)
    assert "tokens" in verdict(length=4)
    assert "entropy rose" in verdict(entropy=1)
    assert "the same" in verdict(entropy=0)
    assert "truncated" in verdict(truncated=0.6)


# ------------------------------------------------------------------- what a run tells people


@pytest.mark.parametrize("data, words", [
    ("gsm8k", "gsm8k test questions RENT TTRL gsm8k-train"),
    ("math500", "math500 test questions math-train"),
    ("humaneval", "humaneval eurus-code"),
    ("olympiad", "olympiad numina"),
    ("AI-MO/aimo-validation-amc", "amc numina"),  # its split "train" is the benchmark
    ("google-research-datasets/mbpp", ""),  # and this one's is not
    ("gsm8k-train", ""),
    ("numina", ""),
    ("/data/gsm8k", ""),
])
def test_training_on_a_benchmarks_test_questions_is_told(data, words):
    notes = run.notes_on_data(argparse.Namespace(data=data), [], [])
    assert len(notes) == bool(words) and all(word in notes[0] for word in words.split())


def test_prompts_that_training_and_evaluation_share_are_counted(capsys):
    data = ROOT / "tiny/test.jsonl"
    train(f"--data {data} --data-size 512 --val {data} --val-size 9 --steps 1 --out new")
    said = capsys.readouterr().out
    assert "note: 9 of the 9 held-out prompts are training prompts" in said
    assert said.index("note: ") < said.index("step 0")
    train(f"--data {ROOT}/tiny/train.jsonl --steps 1 --out other")
    assert "note: " not in capsys.readouterr().out


def ending(accuracies, size=512, keep_best=False, folder="run", **best):
    """What is printed at the end of a run with these accuracies on `size` problems, one a step."""
    Path(folder, "best").mkdir(exist_ok=True)
    if best:
        Path(folder, "best/row.json").write_text(json.dumps(best))
    rows = []
    for step, accuracy in enumerate(accuracies):
        rows.append({"step": step, "val_greedy": accuracy, "val_sampled": 0.5})
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps(config | {"keep_best": keep_best}))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        report.summarize(Path(folder), rows, size)
    return printed.getvalue()


@pytest.mark.parametrize("accuracies, told, not_told", [
    ([0.6, 0.934, 0.107], "worse 10.7% 60.0% peak 93.4% --keep-best --lr --entropy-coef", "chance"),
    ([0.691, 0.95, 0.8], "below peak 80.0% 95.0% step 1 --keep-best", "worse"),
    ([0.691, 0.685], "worse 68.5% 69.1% chance", "peak: --lr"),
    ([0.691, 0.92, 0.9], "", "worse below"),
    ([], "Nobody has looked --val", "final below peak"),
])
def test_a_collapse_is_told_in_words(accuracies, told, not_told):
    said = ending(accuracies)
    assert all(word in said for word in told.split())
    assert not any(word in said.replace("The peak is known", "") for word in not_told.split())


def test_a_loss_on_few_problems_may_be_chance():
    assert "chance" in ending([0.5, 0.25], size=4) and "chance" not in ending([0.5, 0.25])
    assert "peak: 50.0%" in ending([0.4, 0.9, 0.5]) and "peak:" not in ending([0.4, 0.9, 0.5], 4)


@pytest.mark.parametrize("accuracies, best, told", [
    ([0.5, 0.9, 0.6], dict(step=1, val_greedy=0.9), "run/best, of step 1 (90.0% greedy)\n"),
    ([0.5, 0.4], {}, "labels say: the base model\n"),
    ([0.5, 0.9, 0.6], {}, "step 1, which was not kept, as --keep-best came later\n"),
    ([0.5, 0.8, 0.6], dict(step=2, val_greedy=0.9), "killed after that step"),
])
def test_the_best_model_is_told_with_its_step(accuracies, best, told):
    """Guards against a best/ of a step that a kill made the run forget."""
    assert told in ending(accuracies, keep_best=True, **best)


def test_the_best_model_comes_with_its_row():
    train("--keep-best --out new")
    row = json.loads(Path("new/best/row.json").read_text())
    assert row["seconds"] > 0 and row | {"seconds": 0} == metrics("new")[row["step"]]


def test_a_step_is_one_line_of_what_was_measured(capsys):
    train("--beta 0 --steps 2 --out new")
    said = capsys.readouterr().out
    (line,) = re.findall("^step 2 [|] entropy.*$", said, re.M)
    for text in "entropy [0-9.]+ nats", "length [0-9.]+ tokens", "truncated [0-9]+%":
        assert re.search(text, line)
    assert "kl" not in line and "val_" not in line and "kl" not in metrics("new")[2]
    assert json.loads(rows_of("new/samples.jsonl")[-5])["response"] in said and "{'" not in said
    train("--steps 1 --out other")
    assert re.search(r"kl [0-9.e-]+ nats", capsys.readouterr().out)


@pytest.mark.parametrize("main", [em_rl.main, em_ft.main, evaluation.main])
def test_help_says_what_the_number_of_rows_changes(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "another number draws other samples, and the same greedy ones" in said


def test_any_file_of_a_model_identifies_it(tmp_path):
    """A large file is not read as a whole, and one of zeros in its place is seen all the same."""
    shutil.copytree(TINY_BASE, "model")
    digests = [digest_of_model(TINY_BASE), digest_of_model("model")]
    assert digests[0] == digests[1]
    for size in 2**18, 2**26 + 2**20:
        Path("model/more.safetensors").write_bytes(b"\1" * size)
        digests.append(digest_of_model("model"))
        zeros(Path("model/more.safetensors"))
        digests.append(digest_of_model("model"))
    assert len(set(digests)) == 5
    snapshot = tmp_path / "snapshots/c0ffee"
    shutil.copytree(TINY_BASE, snapshot)
    assert digest_of_model(str(snapshot)) == "commit c0ffee"


# --------------------------------------------------------------------------- interruptions


@NEEDS_POSIX
def test_ctrl_c_saves_and_a_second_process_is_refused():
    """In a real process, whose terminal lacks characters of the prompts."""
    Path("data.jsonl").write_text('{"prompt": "∑ é"}\n' * 32, encoding="utf-8")
    flags = "--data data.jsonl --val none"
    command = [sys.executable, ROOT / "em_rl.py", *(FLAGS + flags).split()]
    process = subprocess.Popen(
        command + ["--steps", "900", "--out", "cut"], encoding="latin-1",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
    )
    output = ""
    while "step 3 |" not in output:
        output += process.stdout.readline()
        assert process.poll() is None, output
    process.send_signal(signal.SIGSTOP)
    fails("--resume cut", "another process")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    output += process.communicate()[0]
    assert process.returncode == 1 and output.endswith("--resume cut\n")
    assert "\\u2211 é" in output and not Path("cut/result.json").exists()
    assert Path("cut/plot.png").stat().st_size > 9999
    steps = len(metrics("cut")) + 1
    em_rl.main(f"--resume cut --steps {steps}".split())
    train(f"{flags} --out whole --steps {steps}")
    assert outcome("cut") == outcome("whole")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_a_second_one_ends_at_once(number):
    def interrupt(*args, generate=em_rl.generate, **settings):
        signal.raise_signal(number)
        return generate(*args, **settings)

    def interrupt_twice(*args, **settings):
        signal.raise_signal(number)
        interrupt()

    train("--out new --steps 2")
    with mock.patch.object(em_rl, "generate", interrupt):
        fails("--resume new", "step 3 --resume new")
    assert saved_step("new") == 3
    with mock.patch.object(em_rl, "generate", interrupt_twice):
        with pytest.raises(SystemExit, match="at once"):
            train("--resume new")
    assert len(metrics("new")) == 4
    em_rl.main("--resume new".split())  # in a notebook, too, which holds the exception
    assert outcome("new") == outcome("run")


def test_a_run_that_another_process_has_is_left_as_it_is(finished):
    with open("run/samples.jsonl", "a") as file:
        file.write('{"step": 5}\n')
    before = everything()
    with filelock.FileLock("run/lock"):
        fails("--resume run --steps 6", "another process")
        shutil.rmtree("run/checkpoint")
        fails("--out run", "another process")  # and no advice to remove a run that goes on
    shutil.copytree(finished / "checkpoint", "run/checkpoint")
    assert everything() == before


def spoil(*args, score=em_rl.score):
    new = score(*args)
    return new._replace(logprobs=math.inf * new.logprobs)


@pytest.mark.parametrize("place, name, fault, words", [
    (torch, "save", OSError(errno.ENOSPC, "No space left"), "new/checkpoint No space left"),
    (em_rl, "score", spoil, "norm is --lr"),
    (run, "load_problems", KeyboardInterrupt, "stopped"),
    (em_rl, "score", torch.OutOfMemoryError, "memory --budget"),
])
def test_a_fault_leaves_the_checkpoint_before(place, name, fault, words):
    train("--out new --steps 2")
    with mock.patch.object(place, name, side_effect=fault):
        fails("--resume new --save-every 1", words)
    assert saved_step("new") == 2 and not list(Path("new").glob("*.new"))
    em_rl.main("--resume new --steps 4".split())
    assert outcome("new") == outcome("run")


@NEEDS_POSIX
@pytest.mark.beside(command=lambda _: [ROOT / "tests/kill.py", "em_rl.py", "--times", "2"])
def test_a_killed_run_resumes(done):
    assert done.returncode == 0 and "ended equal" in done.stdout, done.stderr


# ------------------------------------------------------------------- damaged files, bad input


@pytest.mark.parametrize("kept, more", [(0, b""), (0.5, b""), (0.98, b""), (0, b"\xff\n" * 99)])
@pytest.mark.parametrize(
    "name", ["config.json", "metrics.csv", "checkpoint/state.pt", "checkpoint/model.safetensors"]
)
def test_a_damaged_file_is_named_and_nothing_is_overwritten(name, kept, more):
    path = Path("run", name)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)] + more)
    before = everything()
    fails("--resume run --steps 6", name.removesuffix("/model.safetensors"))
    assert everything() == before


@pytest.mark.parametrize("end", ['{"step": 4, "se', "\n\n[]\n{}\n", None])
def test_a_line_of_samples_that_is_none_ends_no_run(end):
    path = Path("run/samples.jsonl")
    before = path.read_text()
    path.write_text(before + end) if end else path.unlink()
    train("--resume run --steps 6")
    after = path.read_text()
    assert after.startswith(before if end else "{")
    assert 6 in [json.loads(line)["step"] for line in after.splitlines()]
    assert {type(row["tokens"]) for row in metrics("run")[1:]} == {int}  # not 112.0


def test_a_run_killed_between_two_renames_or_before_its_report_goes_on():
    Path("run/checkpoint").rename("run/checkpoint.old")
    Path("run/result.json").unlink()
    fails("--out run", "--resume run")
    train("--resume run")
    assert Path("run/result.json").exists()
    train("--resume run --steps 6")
    assert saved_step("run") == 6


CONFIGS = [  # an edit of config.json, and words of the line that refuses it
    ({"reward": "confidence"}, "config.json --reward confidence"),
    ({"dtype": "float16"}, "config.json --dtype float16"),
    ({"lr": "high"}, "config.json --lr high"),
    ({"lr": -1}, "config.json --lr -1"),
    ({"steps": None}, "config.json steps null"),
    ({"steps": 4.5}, "config.json --steps 4.5"),
    ({"steps": True}, "config.json --steps"),
    ({"keep_best": "yes"}, "config.json --keep-best yes"),
    ({"model": None}, "config.json model null"),
    ({"data": ["a", "b"]}, "a,b no file"),
    ({"changed": 1}, "config.json changed not a setting"),
    ({"beta": ...}, "config.json beta missing"),
    ({"inputs": ...}, "config.json inputs missing"),
    ({"inputs": 5}, "config.json inputs damaged"),
]


@pytest.mark.parametrize("edit, words", CONFIGS)
def test_settings_that_were_saved_are_checked_as_flags_are(edit, words):
    """Guards against an unknown reward that trained on votes, and a key that took a default."""
    path = Path("run/config.json")
    config = json.loads(path.read_text()) | edit
    path.write_text(json.dumps({key: config[key] for key in config if config[key] is not ...}))
    before = everything()
    fails("--resume run", words, always="")
    assert everything() == before


DAMAGE = [  # a file of a run, what is replaced in it, by what, and words of the line
    ("metrics.csv", "\n1,", "\n1,high", "metrics.csv line 3"),
    ("metrics.csv", "step,entropy", "step,changed", "metrics.csv first line"),
    ("metrics.csv", "\n2,", "\n,", "metrics.csv line 4 step"),
    ("metrics.csv", r"(?m)^(1,[^,]*,[^,]*,[^,]*,)[^,]*", r"\1", "metrics.csv line 3 length"),
    ("metrics.csv", r"(?m)^(0,.*,)[^,]+(,[^,]+,[^,]+)$", r"\1\2", "line 2 val_entropy"),
    ("samples.jsonl", '{"step": 0', '{"prompt": "mine"}\n{"step": 0', "samples.jsonl line 1 step"),
    ("samples.jsonl", '"response": "', '"response": null, "was": "', "line 1 response null"),
    ("samples.jsonl", '"step": 0', '"step": "zero"', "line 1 step zero"),
    ("samples.jsonl", '"step": 0', '"step": true', "line 1 step true"),
]


@pytest.mark.parametrize("name, old, new, words", DAMAGE)
def test_a_line_that_is_not_a_runs_own_is_named(name, old, new, words):
    """Guards against KeyError 'step', 'length' and 'entropy' in the middle of a run."""
    path = Path("run", name)
    text = re.sub(old, new, path.read_text(), count=1)
    assert text != path.read_text()
    path.write_text(text)
    before = everything()
    fails("--resume run --steps 6", words)
    assert everything() == before


def rows_of(name):
    return Path(name).read_text().splitlines(keepends=True)


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


INPUTS = [  # what happens to an input while a run is not at work, and words of the line
    (lambda: Path("data.jsonl").write_text("".join(rows_of("data.jsonl")[::-1])), "data.jsonl"),
    (lambda: Path("data.jsonl").open("a").write('{"prompt": "more"}\n'), "data.jsonl 33 32"),
    (lambda: shutil.copy("val.jsonl", "data.jsonl"), "data.jsonl"),
    (lambda: Path("val.jsonl").write_text("".join(rows_of("val.jsonl")[1:])), "val.jsonl"),
    (lambda: zeros(Path("base/model.safetensors")), "base"),
    (lambda: Path("base/tokenizer_config.json").unlink(), "base"),
]


@pytest.mark.parametrize("change, words", INPUTS)
def test_a_run_goes_on_only_with_what_it_began_with(change, words, tmp_path, monkeypatch):
    for name, file in ("data", "train"), ("val", "test"):
        Path(f"{name}.jsonl").write_text("".join(rows_of(ROOT / f"tiny/{file}.jsonl")[:32]))
    shutil.copytree(TINY_BASE, "base")
    flags = "--model base --data data.jsonl --val val.jsonl --steps 2"
    train(f"{flags} --data-size 99 --val-size 32 --out new")
    Path("elsewhere").mkdir()
    shutil.copy("val.jsonl", "elsewhere/data.jsonl")  # of the same name
    monkeypatch.chdir("elsewhere")
    em_rl.main("--resume ../new --steps 3".split())  # the places in config.json are absolute
    monkeypatch.chdir(tmp_path)
    assert saved_step("new") == 3
    change()
    before = everything()
    fails("--resume new --steps 4", words, always="")
    assert everything() == before
    if "data" in words:  # others may be asked for
        em_rl.main("--resume new --steps 4 --data elsewhere/data.jsonl".split())
        assert saved_step("new") == 4
    if "base" in words:  # the same model elsewhere
        em_rl.main(["--resume", "new", "--steps", "4", "--model", TINY_BASE])


FOREIGN = {
    "samples.jsonl": '{"prompt": "1+1"}',
    "metrics.csv": "mine",
    "config.json": "{}",
    "lock": "mine",
    "checkpoint/notes": "mine",
}


@BOTH
@pytest.mark.parametrize("name", FOREIGN)
def test_no_run_writes_into_a_folder_that_has_files(name, script):
    path = Path("mine", name)
    path.parent.mkdir(parents=True)
    path.write_text(FOREIGN[name])
    before = everything()
    fails("--out mine", f"mine {name.partition('/')[0]}", script)
    fails(f"--out mine/{name}", "--out no folder", script)
    assert everything() == before


VALUES = """beta -1 nan inf|budget -1|clip -1 nan 1e99|data-size -1|device bogus|dtype float16
entropy-coef nan inf x
eval-every 0|grad-clip -1 0|guard -1 nan 0.5|lr -1 inf 1e38 x|max-new-tokens -1 0|prompts 0 33
rollout-batch 0|rollouts 0 1|save-every 0|seed -1 99999999999999999999|steps 0 1.5
lora 0
updates 5|temperature 0 nan 1e-40|val-size -1"""
REFUSED = [
    (None, f"--device {'mps' if torch.cuda.is_available() else 'cuda'}", "--device"),
    (None, "--device meta", "--device meta cuda"),
    (None, "--val bare.jsonl", "--val bare.jsonl answer"),
    (None, "--wandb project", "--wandb project pip install"),
    (None, "--lora 4", "--lora 4 pip install peft"),
    (None, "--resume run --out new", "--out new --resume run"),
    (None, "--resume evaluation", "evaluation eval.py"),
    (None, "--out evaluation", "evaluation another --out"),
    (em_rl, "--resume begun", "begun nothing"),
    (em_rl, "--out run", "run --resume"),
    (None, f"--data {'x' * 300}", "xxx no file"),
    (None, "--resume bare.jsonl", "bare.jsonl/config.json"),
    (None, f"--out {'x' * 300}", "--out no folder"),
    (em_rl, "--resume run --steps 3", "--steps 3"),
    (em_rl, "--data bare.jsonl --reward correct", "bare.jsonl answer"),
    (em_ft, "--data bare.jsonl --loss sft", "bare.jsonl solution"),
    (em_ft, "--data null.jsonl --loss sft", "null.jsonl solution"),
    (em_ft, "--data 5.jsonl --loss sft", "5.jsonl solution"),
    (em_ft, "--resume run", "run em_rl.py em_ft.py"),
    (em_ft, "--out run", "run another --out"),
]
NAMES = []
for line in VALUES.replace("\n", "|").split("|"):
    flag, *values = line.split()
    NAMES.append(flag)
    for value in values:
        only = em_rl if flag in ("clip", "entropy-coef") or value == "1" else None
        REFUSED.append((only, f"--{flag} {value}", f"--{flag} {value}"))


@pytest.mark.parametrize("only, flags, words", REFUSED)
def test_bad_input_is_one_line_and_changes_nothing(only, flags, words, monkeypatch):
    for package in "wandb", "peft":
        monkeypatch.setitem(sys.modules, package, None)
    for name, solution in ("bare", ""), ("null", ', "solution": null'), ("5", ', "solution": 5'):
        Path(f"{name}.jsonl").write_text(9 * f'{{"prompt": "1+1"{solution}}}\n')
    for name, script in ("evaluation", "eval.py"), ("begun", "em_rl.py"):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps({"script": script}))
    before = everything()
    for script in [only] if only else [em_rl, em_ft]:
        fails(flags if "--resume" in flags else f"--out new {flags}", words, script)
        assert everything() == before


NUMBERS = st.integers(-1, 5) | st.floats() | st.floats(0, 99) | st.sampled_from(["x", ""])


@BOTH
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(st.dictionaries(st.sampled_from(NAMES), NUMBERS, max_size=3))
def test_any_settings_run_or_are_refused_without_a_trace(script, settings):
    shutil.rmtree("new", ignore_errors=True)
    flags = "".join(f" --{name}={value}" for name, value in settings.items())
    try:
        train(f"--steps 1 --val none --out new {flags}", script)
        assert Path("new/result.json").exists()
    except SystemExit as end:
        assert "lower --lr" in str(end) or not Path("new").exists()


# -------------------------------------------------------------------------- float32 masters


def trained(model, optimizer=None, lr=1e-6):
    """The weights after ten steps of two micro-batches, with torch's AdamW for want of ours."""
    plain = torch.optim.AdamW(model.parameters(), lr=lr)
    rng = torch.Generator().manual_seed(0)
    for i in range(20):
        ids = torch.randint(0, 200, (4, 12), generator=rng)
        model(input_ids=ids, labels=ids).loss.backward()
        if i % 2 and optimizer:
            optimizer.clip(1.0)
            optimizer.step()
            optimizer.zero_grad()
        elif i % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            plain.step()
            plain.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("offload", [False, True])
def test_masters_in_cpu_memory_or_not_take_the_steps_of_plain_adamw(offload):
    model = random_model("qwen2")
    optimizer = MasterAdamW(model, 1e-3, offload)
    plain, ours = trained(random_model("qwen2"), lr=1e-3), trained(model, optimizer)
    for a, b, master in zip(plain, ours, optimizer.masters):
        assert (b - a).abs().max() < 1e-6 and torch.equal(b, master)  # of updates of some 1e-2
        assert (master.data_ptr() != b.data_ptr()) == offload


def test_a_weight_that_a_step_leaves_out_gets_no_gradient_of_the_step_before():
    """Guards against memory that is kept for gradients in CPU memory, and what is left in it."""
    model = torch.nn.ModuleList([torch.nn.Linear(2, 1, bias=False) for _ in range(2)])
    model.device = torch.device("cpu")
    optimizer, x = MasterAdamW(model, 0.1, offload=True), torch.ones(2)
    (model[0](x) + model[1](x)).backward()
    optimizer.step()
    optimizer.zero_grad()
    memory = [master.grad.data_ptr() for master in optimizer.masters]
    before = [layer.weight.detach().clone() for layer in model]
    model[0](x).backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0]) and torch.equal(model[1].weight, before[1])
    assert optimizer.masters[0].grad.data_ptr() == memory[0]


def test_bf16_weights_stand_still_at_lr_1e_6_and_their_masters_move_as_float32():
    half, ours, full = (random_model("qwen2").to(torch.bfloat16) for _ in range(3))
    start = torch.nn.utils.parameters_to_vector(full.float().parameters()).detach()
    optimizer = MasterAdamW(ours, 1e-6)
    rounded, moves = trained(ours, optimizer), []
    for weights in trained(half), trained(full), optimizer.masters:
        moves.append(torch.nn.utils.parameters_to_vector(weights) - start)
    still, float32, masters = moves
    assert (still != 0).float().mean() < 0.1 < 0.9 < (masters != 0).float().mean()
    assert masters.norm() == pytest.approx(float32.norm().item(), rel=0.05)
    assert torch.cosine_similarity(masters, float32, dim=0) > 0.9  # the gradients are bf16's
    for p, master in zip(rounded, optimizer.masters):
        assert torch.equal(p, master.bfloat16())


def test_gradients_of_bf16_weights_are_summed_in_float32():
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    optimizer = MasterAdamW(model, 1e-3, offload=False)
    for x in [256.0] + [1.0] * 100:  # 256 + 1 is 256 in bf16
        model(torch.tensor([[x]], dtype=torch.bfloat16)).sum().backward()
    assert model.weight.grad is None and optimizer.clip(1.0) == 356
