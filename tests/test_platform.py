"""Other platforms' habits: Windows, terminals without Unicode, readers that go away, figures."""
import argparse
import ast
import errno
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import em_inf
import em_rl
import eval
from course import look
from engine import files, report, run
from engine.arguments import path_name, plain_text
from engine.load import load_model
from tests.models import NEEDS_POSIX, ROOT, TINY_BASE

TRAIN = (
    "--device cpu --data-size 32 --prompts 4 --val-size 2 --max-new-tokens 8 --eval-every 1 "
    "--save-every 1 --keep-best "
)


# -------------------------------------------------------------------------------- encodings


def calls_without_encoding(tree):
    """The lines of an ast that read or write text in the encoding of the platform."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        module = getattr(getattr(node.func, "value", None), "id", None)
        keywords = {keyword.arg for keyword in node.keywords}
        texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        modes = [text for text in texts if isinstance(text, str) and set(text) <= set("rwaxbt+")]
        binary = any("b" in mode for mode in modes)
        opens = name in ("open", "read_text", "write_text", "fdopen") and module != "os"
        opens |= name in ("TemporaryFile", "NamedTemporaryFile") and bool(modes)
        starts = name in ("run", "Popen", "check_output") and bool({"text"} & keywords)
        if (opens and not binary or starts) and "encoding" not in keywords:
            yield node.lineno


def test_every_file_of_text_names_its_encoding():
    """Windows would take cp1252, in which neither ∑ nor a Chinese prompt can be written."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if not name.startswith(("tests", "runs", ".")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found += [f"{name}:{line}" for line in calls_without_encoding(tree)]
    assert not found
    bad = "open(p); open(p, 'w'); p.read_text(); p.open('a'); run(c, text=True)"
    good = "open(p, 'rb'); os.open(p); p.write_text(t, encoding='utf-8'); TemporaryFile()"
    assert len(list(calls_without_encoding(ast.parse(bad)))) == 5
    assert not list(calls_without_encoding(ast.parse(good)))


def test_bytes_of_another_encoding_are_read_as_utf_8_or_refused():
    """In the C locale a prompt comes as halves of surrogate pairs, which no tokenizer takes."""
    halves = "∑ é".encode().decode("ascii", "surrogateescape")
    assert plain_text("∑ é") == "∑ é" == path_name("∑ é")
    if sys.getfilesystemencoding() == "utf-8" and os.name == "posix":
        assert plain_text(halves) == "∑ é"
    for kind, text in (plain_text, "a\udcff"), (path_name, halves):
        with pytest.raises(argparse.ArgumentTypeError, match="udc"):
            kind(text)


# ---------------------------------------------------------------------------------- Windows


FILES = [  # some of the tests; tests/windows.py has the command for all of them
    ROOT / "tests/test_answers.py", ROOT / "tests/test_steps.py",
    f"{ROOT / 'tests/test_runs.py'}::test_a_line_of_samples_that_is_none_ends_no_run",
]


def on_windows(folder):
    """Commands that run behind tests/windows.py, and their data."""
    (folder / "code.jsonl").write_bytes(b'{"prompt": "a", "tests": "assert f() == 1"}')
    lines = (ROOT / "tiny/train.jsonl").read_bytes().split(b"\n")[:32]
    (folder / "dätä ∑.jsonl").write_bytes(b"\r\n".join(lines))
    commands = [
        "em_rl.py --steps 1 --out rl --val-size 2 --data dätä_∑.jsonl " + TRAIN,
        "em_rl.py --resume rl --steps 2",
        "em_ft.py --steps 1 --out ft --data-size 8 " + TRAIN,
        "em_inf.py --limit 2 --seeds 1 --decode greedy,em-inf+self-consistency",
        "em_inf.py --prompt é_∑",
        "eval.py --limit 2 --seeds 1 --data dätä_∑.jsonl --out eval",
        "eval.py --regrade eval",
        "course/look.py --run rl --limit 1 --prompt é_∑",
        "eval.py --data code.jsonl --allow-code-execution",
        "bench/entropy.py",
    ]
    words = [word.replace("_∑", " ∑") for word in " -- ".join(commands).split()]
    words += ["--", "pytest", "-q", "-p", "no:cacheprovider", *FILES]
    return [ROOT / "tests/windows.py", *words]


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@NEEDS_POSIX
@pytest.mark.beside(command=on_windows, env=ASCII)
def test_the_scripts_and_tests_run_on_windows_and_in_a_terminal_of_ascii(done):
    """tests/windows.py takes away what Windows lacks; Windows does not write UTF-8 either."""
    assert not done.returncode and "Traceback" not in done.stderr, done.stderr
    assert "no figure" not in done.stderr and done.stdout.isascii()
    ended = [line for line in done.stdout.splitlines() if " ended with " in line]
    assert ["Linux or macOS" in line for line in ended] == [True, True, False]
    assert ended[2] == "--- pytest ended with 0", done.stdout[-3000:]
    for name in "rl/checkpoint", "rl/best", "rl/plot.png", "ft/result.json", "runs/look.html":
        assert (done.folder / name).exists()
    assert [row["step"] for row in run.read_rows(done.folder / "rl/metrics.csv")] == [0, 1, 2]
    page = (done.folder / "runs/look.html").read_text(encoding="utf-8")
    assert "<h2>é ∑</h2>" in page and "\\xb1" in done.stdout  # of the table's "mean ± sd"
    assert b"\r" not in (done.folder / "rl/config.json").read_bytes()


def test_a_file_that_another_program_has_open_is_tried_again(tmp_path, monkeypatch):
    """A virus scanner on Windows has a new file for a moment, and then it can be renamed."""
    tries, pauses, replace = [], [], Path.replace

    def refuse_twice(new, old):
        tries.append(old)
        if len(tries) <= 2:
            raise PermissionError(errno.EACCES, "Access is denied")
        return replace(new, old)

    monkeypatch.setattr(Path, "replace", refuse_twice)
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    files.replace_file(tmp_path / "a", "text\n")
    assert (tmp_path / "a").read_bytes() == b"text\n" and len(tries) == 3 and sum(pauses) == 1


def test_a_loaded_model_does_not_hang_on_its_file(tmp_path):
    """Whoever copied another model over the file changed this one, or ended it by SIGBUS."""
    model, tokenizer = load_model(TINY_BASE, "cpu")
    run.save_model(tmp_path / "model", model, tokenizer)
    loaded, _ = load_model(str(tmp_path / "model"), "cpu")
    path = tmp_path / "model/model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, weight in model.state_dict().items():
        assert weight.equal(loaded.state_dict()[name])


# ------------------------------------------------------------- a reader that has gone away


class Lost(io.RawIOBase):
    """A stream that takes so many bytes, and then fails."""

    def __init__(self, room, number):
        self.room, self.number, self.failed = room, number, 0

    def writable(self):
        return True

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            self.failed += 1
            raise OSError(self.number, os.strerror(self.number))
        return len(data)


def lose(monkeypatch, room, number=errno.EPIPE, name="stdout"):
    raw = Lost(room, number)
    text = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, name, text)
    return raw


COMMANDS = {
    em_inf: "--limit 2 --seeds 1 --decode sample --device cpu",
    eval: "--limit 2 --seeds 1 --decode sample --device cpu --out run",
    em_rl: TRAIN + "--steps 1 --out run",
}


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.parametrize("number, status", [
    (errno.EPIPE, "141"), (errno.EINVAL, "141"), (errno.ENOSPC, "No space left"),
])
def test_who_reads_no_more_ends_a_script_quietly(script, number, status, tmp_path, monkeypatch):
    """`| head -1` ended in a traceback; Windows says EINVAL of it; a full disk is told."""
    monkeypatch.chdir(tmp_path)
    before = lose(monkeypatch, 10, number)
    with pytest.raises(SystemExit) as end:
        script.main(COMMANDS[script].split())
    assert status in str(end.value) and "\n" not in str(end.value) and before.failed
    assert sys.stdout.buffer is before


def test_a_training_run_whose_reader_has_gone_saves_first(tmp_path, monkeypatch):
    """It ends as after Ctrl-C: nothing is lost, and nothing runs on unseen."""
    monkeypatch.chdir(tmp_path)
    stdout = lose(monkeypatch, 10**9)

    def log(row, logger=None, log=run.log):
        if row["step"] == 2:
            stdout.room = 0
        log(row, logger)

    monkeypatch.setattr(run, "log", log)
    with pytest.raises(SystemExit, match="step 2; to go on: --resume run"):
        em_rl.main((TRAIN + "--val none --steps 9 --out run").split())
    assert len(run.read_rows(Path("run/metrics.csv"))) == 3
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    em_rl.main("--resume run --steps 3".split())


def test_a_script_goes_on_without_its_stderr(tmp_path, monkeypatch):
    """It has bars and warnings; where it is full the script ended, and nobody could be told."""
    monkeypatch.chdir(tmp_path)
    stderr = lose(monkeypatch, 0, errno.ENOSPC, "stderr")
    load = eval.load_gradable
    monkeypatch.setattr(eval, "load_gradable", lambda *args: warn() or load(*args))
    eval.main(COMMANDS[eval].split())
    assert Path("run/results.json").exists() and stderr.failed


def warn():
    print("a warning", file=sys.stderr, flush=True)


def test_a_stream_that_was_closed_prints_nothing(tmp_path, monkeypatch):
    """`>&-`, and pythonw on Windows: sys.stdout is None, which has no isatty."""
    monkeypatch.chdir(tmp_path)
    for name in "stdout", "stderr":
        monkeypatch.setattr(sys, name, None)
    em_inf.main("--prompt hello --device cpu --max-new-tokens 4".split())
    eval.main(COMMANDS[eval].split())
    assert sys.stdout is sys.stderr is None and Path("run/results.json").exists()


@NEEDS_POSIX
def test_nothing_is_said_when_python_ends_either():
    """Python flushes its buffer at its end, and would tell of a broken pipe: exit status 120."""
    script = subprocess.Popen(
        [sys.executable, ROOT / "eval.py", "--help"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    script.stdout.close()
    assert script.wait() == 141 and script.stderr.read() == b""
    script.stderr.close()


# ---------------------------------------------------------------------------------- figures


@pytest.fixture
def small_run(tmp_path):
    config = {"script": "em_rl.py", "model": "who/m$_{odel\udcff", "reward": "token"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    row = {"entropy": 0.2, "length": 8.0, "val_greedy": 0.5, "val_sampled": 0.4}
    return [{"step": 0} | row, {"step": 1} | row]


def test_a_name_is_no_formula(small_run, tmp_path, capsys):
    report.plot(small_run, tmp_path)
    sample = {"correct": True, "logprob": -0.1, "length": 5}
    report.reliability_plot({"d$_{ata\udcff": [sample] * 4, "$x$": [sample] * 4}, tmp_path)
    assert (tmp_path / "plot.png").stat().st_size > 9999
    assert (tmp_path / "reliability.png").stat().st_size > 9999
    assert not capsys.readouterr().err


@pytest.mark.parametrize("fault", ["backend", "settings", "file"])
def test_no_run_is_lost_for_want_of_a_figure(fault, small_run, tmp_path, capsys, monkeypatch):
    """A wrong MPLBACKEND or a broken matplotlibrc ended a run at its first figure."""
    if fault == "file":
        (tmp_path / "plot.png").mkdir()  # as one that Windows' picture viewer has open
        report.plot(small_run, tmp_path)
        told = capsys.readouterr().err
    else:
        code = "import sys; from pathlib import Path; from engine import report; "
        code += f"report.plot({small_run}, Path(sys.argv[1]))"
        if fault == "settings":
            (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe")
        told = subprocess.run(
            [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True,
            encoding="utf-8", check=True, env=os.environ
            | {"MPLBACKEND" if fault == "backend" else "MATPLOTLIBRC": str(tmp_path)},
        ).stderr
    assert f"no figure in {tmp_path}: " in told and told.endswith("\n")
    assert len(told.splitlines()) == 1 or fault == "settings"  # matplotlib warns of them, too




# ------------------------------------------------------------------ what the system refuses


@pytest.mark.parametrize("script, flags, words", [
    (eval, f"--model {'x' * 300}", "xxx: File name too long"),
    (eval, f"--regrade {'x' * 300}", "xxx: File name too long"),
    (eval, "--regrade file/x", "file/x"),
    (look, "--out file/page.html", "file/page.html: Not a directory"),
    (look, "--out .", ".: Is a directory"),
    (look, "--out loop", "loop: Too many levels"),
    (eval, "--data pipe", "pipe: is no file"),
])
@NEEDS_POSIX
def test_a_name_that_the_system_refuses_is_one_line(script, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    with pytest.raises(SystemExit) as end:
        script.main(f"{flags} --limit 1".split())
    assert words in str(end.value) and "\n" not in str(end.value)


@pytest.mark.parametrize("script, flags", [
    (em_rl, "--resume="), (em_rl, "--out="), (eval, "--regrade="), (eval, "--data=a,,b"),
    (em_inf, "--prompt="), (em_inf, "--data="), (look, "--prompt="),
])
def test_a_blank_value_is_no_flag_that_was_left_out(script, flags, tmp_path, monkeypatch, capsys):
    """`--resume "$RUN"` without a RUN began a new run, and `--prompt ""` asked all problems."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        script.main([flags])
    assert "is blank" in capsys.readouterr().err or "'': no such file" in str(end.value)
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_code_keeps_its_traceback(monkeypatch):
    for error in OSError(errno.EINVAL, "of no file"), FileNotFoundError(2, "none", "a"):
        monkeypatch.setattr(eval, "load_gradable", lambda *args, error=error: raise_it(error))
        with pytest.raises(OSError):
            eval.main([])


def raise_it(error):
    raise error


@NEEDS_POSIX
def test_a_link_to_a_script_runs_it(tmp_path):
    """It looked for the tiny model beside the link."""
    (tmp_path / "link.py").symlink_to(ROOT / "em_rl.py")
    assert runpy.run_path(str(tmp_path / "link.py"))["TINY"] == em_rl.TINY
