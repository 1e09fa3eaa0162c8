"""
Kill a script at random, resume it, and compare with an undisturbed run.

    python tests/kill.py em_rl.py --times 50    # or em_ft.py, eval.py
    mount -t tmpfs -o size=4m tmpfs /mnt && python tests/kill.py em_rl.py --disk /mnt

With --disk nothing is killed, but the disk is nearly full.
"""
import argparse
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import report
from engine.files import read_jsonl
from engine.load import load_model
from engine.run import read_rows
from tests.models import TINY_BASE

EVAL = "--device cpu --limit 8 --max-new-tokens 8 --rollout-batch 4 --out "
TRAIN = "--device cpu --data-size 8 --val-size 4 --prompts 2 --max-new-tokens 8 --steps 9 "
TRAIN += "--eval-every 2 --save-every 1 --keep-best --out "
FILES = "open os.mkdir os.remove os.rename os.rmdir".split()


def attempt(script, flags, seconds, risk):
    """Run a script in a forked process: its last line. It is killed after some seconds (of the
    CPU), or with probability `risk` at each operation on files."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        said = Path("log").read_text().strip().split("\n")[-1]
        assert "Error(" not in said, said
        return said

    def watch(event, _):
        if event in FILES and random.random() < risk:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.stdout = sys.stderr = open("log", "w")
    sys.addaudithook(watch)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # as abrupt
    try:
        importlib.import_module(script[:-3]).main(flags.split())
    except BaseException as error:
        print(repr(error))
    sys.stdout.flush()
    os._exit(0)


def results(folder):
    """Samples, metrics and weights, without seconds."""
    rows = read_jsonl(folder / "samples.jsonl")
    for path in folder.glob("metrics.csv"):
        rows += read_rows(path)
    found = {str(row | {"seconds": 0}) for row in rows}
    for path in folder.glob("*t/*.safetensors"):  # best and checkpoint
        found.add((path.parent.name, path.read_bytes()))
    return found


parser = argparse.ArgumentParser()
parser.add_argument("script")
parser.add_argument("--times", type=int, default=50)
parser.add_argument("--disk", default="")
args = parser.parse_args()
flags, needed = TRAIN, "*[td]/state.pt"  # checkpoint.old, too
if args.script == "eval.py":
    flags, needed = EVAL, "config.json"
report.plot = report.reliability_plot = lambda *_: None
load_model(TINY_BASE, "cpu")  # which imports a lot
os.chdir(tempfile.mkdtemp())
ballast, run = Path(args.disk, "ballast"), Path(args.disk, "run")
attempt(args.script, flags + "whole", 0, 0)
whole, duration = results(Path("whole")), os.times().children_user
for n in range(args.times):
    random.seed(n)
    shutil.rmtree(run, ignore_errors=True)
    seconds = risk = 0
    if args.disk:
        ballast.write_bytes(bytes(random.randrange(2**22)))
    elif n % 2:
        seconds = random.uniform(0, duration)
    else:
        risk = 0.006
    said = attempt(args.script, flags + str(run), seconds, risk)
    begun = list(run.glob(needed))
    ballast.unlink(missing_ok=True)
    attempt(args.script, f"--resume {run}", 0, 0)
    same = results(run) == whole
    print(n, "equal" if same else "had not begun", said[:99])
    assert same or not begun
print(f"{args.script}: all that had begun ended equal")
