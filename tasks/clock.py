"""
A time limit for Python code. math-verify has one of its own, but it needs SIGALRM: on Windows
no answer is read at all, and outside of the main thread it raises ValueError.

    within(5, equal, "1/2", "0.5")
"""
import functools
import importlib
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE_AT_A_TIME = threading.Lock()


class TimeIsUp(BaseException):
    """Raised by the alarm. It is no Exception, because sympy catches those and goes on."""


def within(seconds, function, *args):
    """function(*args), or TimeoutError where that takes more than `seconds`.

    An alarm interrupts the function. Where there is none (Windows, another thread), the
    function runs in a process that can be killed: there it must be one of a module, what it
    takes and returns must be JSON, and its exceptions become RuntimeError.
    """
    if hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread():
        return with_alarm(seconds, function, args)
    with ONE_AT_A_TIME:
        return in_worker(seconds, function, args)


def with_alarm(seconds, function, args):
    def stop(number, frame):
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again each second: see __del__
        return function(*args)
    except TimeIsUp:
        raise TimeoutError(f"{function.__name__}: not done in {seconds} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def worker(module):
    """A process that has imported a module, and waits for calls of its functions."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks.clock", module], cwd=ROOT, encoding="utf-8",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )
    process.stdout.readline()  # after some seconds of imports, which count for no call
    return process


def in_worker(seconds, function, args):
    process = worker(function.__module__)
    timer = threading.Timer(seconds, process.kill)
    reply = ""
    try:
        print(json.dumps([function.__name__, args]), file=process.stdin, flush=True)
        timer.start()
        reply = process.stdout.readline()  # nothing if it was killed
    finally:
        timer.cancel()
        if not reply:  # or Ctrl-C has come: the next call must not read this one's reply
            process.kill()
            worker.cache_clear()
    if not reply:
        raise TimeoutError(f"{function.__name__}: not done in {seconds} s")
    value, error = json.loads(reply)
    if error:
        raise RuntimeError(f"{function.__name__}: {error}")
    return value


def main(name):
    """The process: a call a line, [function, arguments]; a reply a line, [value, error]."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal
    module = importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        function, args = json.loads(line)
        try:
            reply = [getattr(module, function)(*args), None]
        except Exception as error:
            reply = [None, repr(error)]
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
