"""
Grade the assignment: nine functions, and a training run with them.

    python course/assignment/grade.py                  # student.py, beside this file
    python course/assignment/grade.py my_student.py    # another file
    python course/assignment/grade.py --steps 0        # the functions only, in some seconds

A function gets all of its points or none. Where it is wrong, a message says how. Then EM-RL trains
the tiny model with the functions of the file, and greedy accuracy on held-out problems must rise
by 20 points (a right solution: from 69.1 % to about 100 % in 40 steps, in about a minute).

A function that raises something, never returns or ends the process loses its own points only. The
exit status is 0 if all points were reached, else 1. The file runs with your rights, as any program
does: grade a file that you do not trust in a container.
"""
import argparse
import importlib.util
import multiprocessing
import signal
import sys
import textwrap
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import checks

from engine.arguments import Help, positive_int, whole_number
from engine.output import printing

POINTS = {
    "token_entropy": 2,
    "token_logprobs": 2,
    "response_mask": 2,
    "token_reward": 1,
    "sequence_reward": 1,
    "rloo_advantage": 2,
    "policy_objective": 3,
    "em_ft_objective": 2,
    "em_inf_step": 3,
    "training": 2,
}
FUNCTIONS = [name for name in POINTS if name != "training"]
UNUSED = "sequence_reward", "em_ft_objective", "em_inf_step"  # in training
RISE = 0.2  # of accuracy, in training


def verdict(name, args):
    """What is wrong, or "". Of what the student's code raises, the lines in his file are shown."""
    try:
        spec = importlib.util.spec_from_file_location("student", args.file)
        student = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(student)
        if name == "training":
            from training import train  # with the engine, which the functions do without

            rise = train(student, args.steps, args.problems)
            checks.refuse(rise < RISE, f"Accuracy rose by {rise:.1%}, and {RISE:.0%} are asked.")
        else:
            checks.refuse(not hasattr(student, name), f"There is no {name} in the file.")
            getattr(checks, f"check_{name}")(getattr(student, name))
    except checks.Wrong as error:
        return str(error)
    except BaseException as error:  # SystemExit, too
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == args.file]
        if isinstance(error, NotImplementedError) and own:
            return f"{own[-1].name} is not written yet."
        shown = own or frames
        if isinstance(error, SyntaxError):  # its message names the line
            shown = []
        return "".join(traceback.format_list(shown[-3:]) + traceback.format_exception_only(error))
    return ""


def new_pool():
    """A process that has loaded torch, so that this takes nothing of a function's time. Ctrl-C
    does not end it: the main process does."""
    ignore = signal.SIGINT, signal.SIG_IGN
    pool = multiprocessing.get_context("spawn").Pool(1, signal.signal, ignore)
    pool.apply(checks.refuse, (False, ""))
    return pool


def grade(names, args):
    """Print what is wrong with each, and return it: {name: words}. A function that hangs, or ends
    the process, loses its own points only."""
    pool, wrong = new_pool(), {}
    for name in names:
        seconds = 3600 if name == "training" else args.seconds
        try:
            words = pool.apply_async(verdict, (name, args)).get(seconds)
        except multiprocessing.TimeoutError:
            words = (f"No result in {seconds} seconds: a loop that never ends, or something that "
                     "ended the process, such as os._exit.")
            pool.terminate()
            pool = new_pool()
        show(name, "As above." if words and words in wrong.values() else words)
        wrong[name] = words
    pool.close()
    pool.join()
    return wrong


def show(name, words):
    print(f"{name:17} {0 if words else POINTS[name]} of {POINTS[name]}", flush=True)
    for line in words.splitlines():
        print(textwrap.fill(line, 96, initial_indent="    ", subsequent_indent="    "))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    file = Path(__file__).with_name("student.py")
    add("file", nargs="?", type=Path, default=file, help="with the functions")
    add("--steps", type=whole_number, default=40, help="of training; 0: none")
    add("--problems", type=positive_int, default=512, help="held-out problems, at most 512")
    add("--seconds", type=positive_int, default=30, help="that a function may take")
    args = parser.parse_args(argv)
    args.file = str(args.file.resolve())
    if not Path(args.file).is_file():
        parser.error(f"{args.file}: there is no such file")
    wrong = grade(FUNCTIONS, args)
    missing = [name for name in FUNCTIONS if wrong[name] and name not in UNUSED]
    trains = args.steps and "training" in POINTS
    if trains and missing:
        wrong["training"] = f"It has to wait for {', '.join(missing)}."
        show("training", wrong["training"])
    elif trains:
        wrong |= grade(["training"], args)
    right = [name for name in wrong if not wrong[name]]
    print(f"{sum(POINTS[name] for name in right)} of {sum(POINTS[name] for name in wrong)} points, "
          f"{len(set(right) - {'training'})} of {len(FUNCTIONS)} functions")
    return int(len(right) < len(wrong))


if __name__ == "__main__":
    try:
        with printing("grade.py"):
            sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("grade.py: stopped")
