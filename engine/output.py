"""
What a script prints to: a pipe whose reader has gone, a full disk, a terminal without ∑ or é.
"""
import contextlib
import errno
import os
import sys

GONE = errno.EPIPE, errno.EINVAL  # Windows says EINVAL


class Output:
    """sys.stdout or sys.stderr, around the stream that it was before.

    Where it can't be written any more, `on_loss` is called, once, and from then on what is
    printed goes nowhere. By default it ends the script: without a word where the reader of a
    pipe has gone (`python eval.py | head -1`), else with the reason. A training run saves first
    (`run.StopSignal`).
    """

    def __init__(self, stream, script):
        self.stream, self.script, self.on_loss = stream, script, self.end
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")  # of characters that it does not have

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        return self.attempt(self.stream.flush)

    def attempt(self, call, *args):
        try:
            return call(*args)
        except OSError as error:
            with contextlib.suppress(OSError):  # a stream that is no file
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())  # what is still in the buffer, too
                os.close(nowhere)
            self.on_loss(error)

    def end(self, error):
        if error.errno in GONE:
            sys.exit(141)  # 128 + SIGPIPE, as a shell has it of any program
        sys.exit(f"{self.script}: what it prints can't be written: {error.strerror}")


@contextlib.contextmanager
def printing(script):
    """Print through `Output` in this block. A stream that was closed prints nothing."""
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")
        setattr(sys, name, Output(stream, script))
    streams = sys.stdout, sys.stderr
    try:
        yield
        sys.stdout.flush()
    finally:
        for stream in streams:
            stream.on_loss = print_nothing
            stream.flush()
        sys.stdout, sys.stderr = before


def print_nothing(error):
    pass
